"""Low-rank adapters by peft: which layers get them, and merging them away again."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snd_nerfstudio.errors import InputError

ATTENTION_LAYERS = r".*blocks\.\d+\.attn\.(qkv|proj)"
"""peft matches the whole path; a bare "proj" would also catch patch_embed.proj, as in the released code."""
WITH_PATCH_EMBED = r".*(blocks\.\d+\.attn\.(qkv|proj)|patch_embed\.proj)"


@dataclass
class LoRASettings:
    """Low-rank adapters on the attention layers (paper appendix A.3: rank 8)."""

    rank: int = 8
    """Rank of the two factors."""
    alpha: float = 8.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.1
    """Dropout before the first factor, in training mode."""


def add_adapters(backbone: nn.Module, settings: LoRASettings, patch_embed: bool, seed: int) -> list[str]:
    """Put adapters into a frozen backbone, in place; afterwards only they require gradients.

    Args:
        backbone: any module that contains timm's attention blocks.
        settings: rank, scale, dropout.
        patch_embed: adapt the patch embedding too (the released code does, by accident of name matching).
        seed: for the first factors; the second ones start at zero, so the tokens do not change.

    Returns:
        Paths of the adapted layers.

    Raises:
        InputError: the settings cannot be used.
    """
    if settings.rank < 1 or not 0 <= settings.dropout < 1:
        raise InputError(
            f"--pipeline.model.lora: rank {settings.rank} must be >= 1, dropout {settings.dropout} in [0, 1)."
        )
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore  # a float works; peft annotates int
        lora_dropout=settings.dropout,
        target_modules=WITH_PATCH_EMBED if patch_embed else ATTENTION_LAYERS,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, backbone)
    backbone.eval()  # the new dropout layers come in training mode
    return [path for path, _ in _adapted_layers(backbone)]


def _adapted_layers(module: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(path, layer) for path, layer in module.named_modules() if isinstance(layer, LoraLayer)]


def merged(backbone: nn.Module, trained: dict[str, Tensor]) -> nn.Module:
    """A plain copy of an adapted backbone with some adapter values merged into its weights.

    ``W <- W + (alpha / rank) B A`` for each adapted layer.

    Args:
        backbone: with adapters; left as it is.
        trained: values of the backbone's trainable parameters, by the name they have in it.

    Returns:
        The same module without any peft layer: its keys are those of an untouched model.
    """
    plain = copy.deepcopy(backbone)
    parameters = dict(plain.named_parameters())
    with torch.no_grad():
        for name, value in trained.items():
            parameters[name].copy_(value)
    for path, layer in _adapted_layers(plain):
        layer.merge(safe_merge=True)
        parent, _, child = path.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain.requires_grad_(False).eval()
