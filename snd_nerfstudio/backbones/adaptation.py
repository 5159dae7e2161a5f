"""What of a backbone is trained: adapters, its last blocks, or all of it."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, Optional

import torch
from torch import Tensor, nn

from snd_nerfstudio.backbones.lora import LoRASettings, add_adapters
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.errors import InputError

Trains = Literal["lora", "blocks", "full"]


def choose_trained(
    backbone: TokenBackbone, trains: Trains, lora: LoRASettings, patch_embed: bool, last_blocks: int, seed: int
) -> list[str]:
    """Let a part of a frozen backbone require gradients, in place.

    Parameters on which no patch token depends, such as those of a pooling layer, stay frozen: they would never get a
    gradient, and DDP would wait for it.

    Args:
        backbone: frozen, in eval mode.
        trains: ``lora``: low-rank adapters; ``blocks``: every parameter of the last blocks and of the final norm;
            ``full``: every parameter.
        lora: the adapters.
        patch_embed: adapt the patch embedding too.
        last_blocks: how many blocks.
        seed: of the adapters.

    Returns:
        Paths in the transformer: of adapted layers, or of the largest modules (and parameters beside them) that are
        trained as a whole.

    Raises:
        InputError: the settings do not fit the backbone.
    """
    vit = backbone.vit
    if trains == "lora":
        layers = add_adapters(vit, lora, patch_embed, seed)
        unused = unused_parameters(backbone)
        idle = [path for path in layers if any(name.startswith(f"{path}.") for name in unused)]
        if idle:
            raise InputError(
                f"--pipeline.model.trains lora: adapters at {', '.join(compact(idle))} do nothing here, as the "
                "attention of this backbone does not call these layers. Update timm, or take --pipeline.model.trains "
                "blocks or full."
            )
        return layers
    if trains == "blocks":
        if not 1 <= last_blocks <= backbone.blocks:
            raise InputError(
                f"--pipeline.model.last-blocks {last_blocks} must be from 1 to {backbone.blocks}, the number of the "
                "backbone's blocks."
            )
        vit.blocks[backbone.blocks - last_blocks :].requires_grad_(True)  # type: ignore
        vit.norm.requires_grad_(True)  # type: ignore
    else:
        vit.requires_grad_(True)
    for name in unused_parameters(backbone):
        vit.get_parameter(name).requires_grad_(False)
    return trained_modules(vit)


def unused_parameters(backbone: TokenBackbone) -> list[str]:
    """Names, in the transformer, of parameters that require gradients and on which no patch token depends."""
    side = 2 * backbone.spec.patch
    trained = {name: parameter for name, parameter in backbone.vit.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        tokens = backbone(backbone.mean.new_zeros(1, 3, side, side))
        gradients = torch.autograd.grad(tokens.sum(), list(trained.values()), allow_unused=True)
    return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]


def trained_modules(module: nn.Module, path: str = "") -> list[str]:
    """Paths of the largest modules below this one, and of parameters beside them, that are trained as a whole."""
    parameters = list(module.parameters())
    if path and parameters and all(parameter.requires_grad for parameter in parameters):
        return [path]
    start = f"{path}." if path else ""
    found = [f"{start}{name}" for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    for name, child in module.named_children():
        found += trained_modules(child, f"{start}{name}")
    return found


def compact(paths: Sequence[str]) -> list[str]:
    """Paths, with those put together that differ in their first number or in their last name alone.

    ``blocks.0.attn.qkv``, ``blocks.0.attn.proj``, ``blocks.1.attn.qkv``, ``blocks.1.attn.proj`` and ``norm`` give
    ``blocks.0-1.attn.{qkv,proj}`` and ``norm``.
    """
    numbers: dict[str, list[int]] = {}
    for path in paths:
        found = re.search(r"\.(\d+)(?=\.|$)", path)
        pattern = path if found is None else f"{path[: found.start()]}.#{path[found.end() :]}"
        numbers.setdefault(pattern, []).extend([] if found is None else [int(found[1])])
    siblings: dict[tuple[str, str], list[str]] = {}
    for pattern, counted in numbers.items():
        parent, _, name = pattern.replace("#", _ranges(counted)).rpartition(".")
        siblings.setdefault((parent, "" if parent else name), []).append(name)
    compacted = []
    for (parent, _), names in siblings.items():
        together = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
        compacted.append(f"{parent}.{together}" if parent else together)
    return compacted


def _ranges(numbers: Sequence[int]) -> str:
    ordered = sorted(set(numbers))
    if len(ordered) > 1 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ",".join(map(str, ordered))


def flags_of(trained: Iterable[str]) -> Optional[str]:
    """The flags under which parameters of these names are what a transformer trains; None if there are none."""
    names = list(trained)
    if not names:
        return None
    if any(".lora_" in name for name in names):
        return "--pipeline.model.trains lora"
    if any(not name.startswith(("blocks.", "norm.")) for name in names):
        return "--pipeline.model.trains full"
    blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    return f"--pipeline.model.trains blocks --pipeline.model.last-blocks {len(blocks)}"


class OriginalValues:
    """What is trained of a backbone as it was before: in no checkpoint, and on the device on which it was last used.

    Args:
        backbone: as it is before training; values of its trained parameters are copied.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._values = {name: p.detach().clone() for name, p in backbone.named_parameters() if p.requires_grad}

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """Values by parameter name, on a device."""
        self._values = {name: value.to(device) for name, value in self._values.items()}
        return self._values
