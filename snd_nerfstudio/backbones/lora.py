"""Low-rank adapters by peft: which layers get them, and merging them away again."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snd_nerfstudio.errors import InputError

ATTENTION_LAYERS = r".*blocks\.\d+\.attn\.(qkv|q_proj|k_proj|v_proj|proj)"
"""peft matches the whole path; a bare "proj" would also catch patch_embed.proj, as in the released code."""
PATCH_EMBEDDING = r".*patch_embed\.proj"


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

    Adapted are the projections of every attention: ``qkv`` or ``q_proj``, ``k_proj`` and ``v_proj``, and ``proj``.

    Args:
        backbone: any module that contains timm's attention blocks.
        settings: rank, scale, dropout.
        patch_embed: adapt the patch embedding too (the released code does, by accident of name matching).
        seed: for the first factors; the second ones start at zero, so the tokens do not change.

    Returns:
        Paths of the adapted layers.

    Raises:
        InputError: the settings cannot be used, or the backbone has no such layers.
    """
    if settings.rank < 1 or not 0 <= settings.dropout < 1:
        raise InputError(
            f"--pipeline.model.lora: rank {settings.rank} must be >= 1, dropout {settings.dropout} in [0, 1)."
        )
    if not any(re.fullmatch(ATTENTION_LAYERS, path) for path, _ in backbone.named_modules()):
        raise InputError(
            f"--pipeline.model.trains lora: this backbone ({type(backbone).__name__}) has no layers for adapters, none "
            "called blocks.<i>.attn.qkv, q_proj, k_proj, v_proj or proj. Take --pipeline.model.trains blocks or full, "
            "or another --pipeline.model.backbone."
        )
    from peft import LoraConfig, inject_adapter_in_model

    for module in backbone.modules():
        # otherwise timm's Eva reads the weight of qkv to add a bias, instead of calling the layer and its adapter
        if getattr(module, "qkv_bias_separate", True) is False:
            module.qkv_bias_separate = True  # type: ignore

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore  # a float works; peft annotates int
        lora_dropout=settings.dropout,
        target_modules=f"{ATTENTION_LAYERS}|{PATCH_EMBEDDING}" if patch_embed else ATTENTION_LAYERS,
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
    """A plain copy of a backbone with other values of what is trained, adapters merged into the weights.

    ``W <- W + (alpha / rank) B A`` for each adapted layer.

    Args:
        backbone: with or without adapters; left as it is.
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
