"""A vision transformer seen as a map from images to a grid of tokens."""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from snd_nerfstudio.backbones.registry import BACKBONES, BackboneSpec
from snd_nerfstudio.errors import InputError

TIMM_MINIMUM = (1, 0, 12)
TIMM_REMEDY = 'pip install -U "timm>=1.0.12,<2"'


def import_timm() -> Any:
    """Import timm, which takes seconds and which nerfstudio pins to a version without DINOv2.

    Raises:
        InputError: timm is too old; the message is the command that mends it.
    """
    installed = version("timm")
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in installed.split(".")[:3])
    if numbers < TIMM_MINIMUM:
        raise InputError(
            f"timm {installed} is too old (nerfstudio pins it but does not use it). Run: {TIMM_REMEDY}\n"
            "pip then reports a conflict with nerfstudio's pin; it is harmless."
        )
    import timm

    return timm


def token_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of the token grid of an image: its side divided by the patch, rounded down.

    Raises:
        InputError: a side is shorter than one patch.
    """
    rows, columns = height // patch, width // patch
    if rows < 1 or columns < 1:
        raise InputError(f"An image of {height}x{width} pixels is smaller than one patch of {patch} pixels.")
    return rows, columns


class TokenBackbone(nn.Module):
    """Images to patch tokens after the final norm.

    The image is resized bilinearly to the nearest smaller multiple of the patch, normalised, and passed through the
    transformer; class and register tokens are dropped (released SnD code: last block, post-norm patch tokens).

    Args:
        spec: which transformer.
        vit: the timm model.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: BackboneSpec, vit: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.vit = vit
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.vit.num_features)  # type: ignore

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        return token_grid(height, width, self.spec.patch)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens on their grid, ``h = H // patch``, ``w = W // patch``.

        Args:
            images: colours in [0, 1].

        Raises:
            InputError: the image is smaller than one patch.
        """
        h, w = self.grid(*images.shape[-2:])
        size = (h * self.spec.patch, w * self.spec.patch)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        tokens = self.vit.forward_features((images - self.mean) / self.std)  # type: ignore
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # type: ignore
        return rearrange(tokens, "b (h w) c -> b h w c", h=h, w=w)


def build_backbone(name: str, weights: str, seed: int) -> TokenBackbone:
    """Build a backbone and give it weights.

    Args:
        name: an entry of the registry.
        weights: ``published`` (downloaded through timm), ``random`` (drawn from ``seed``), or the path of a
            ``.safetensors`` or ``.pth`` file in timm's or DINOv2's hub layout.
        seed: for random weights.

    Returns:
        The backbone, frozen, in eval mode, float32 on the CPU.

    Raises:
        InputError: unknown name, no published weights, download failed, file missing or its keys do not match.
    """
    if name not in BACKBONES:
        raise InputError(f"Unknown backbone --pipeline.model.backbone {name}: choose one of {', '.join(BACKBONES)}.")
    spec = BACKBONES[name]
    if weights == "published":
        vit = _create_published(name, spec)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vit = create_vit(spec)
        if weights != "random":
            load_weights(vit, Path(weights))
    backbone = TokenBackbone(spec, vit)
    backbone.requires_grad_(False)
    return backbone.eval()


def create_vit(spec: BackboneSpec, pretrained: bool = False) -> nn.Module:
    """The bare timm model of a spec; images of any multiple of the patch are accepted."""
    timm = import_timm()
    return timm.create_model(
        spec.timm_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **spec.timm_arguments
    )


def _create_published(name: str, spec: BackboneSpec) -> nn.Module:
    if not spec.source:
        raise InputError(
            f"Backbone {name} has no published weights: use --pipeline.model.weights random or the path of a file."
        )
    try:
        return create_vit(spec, pretrained=True)
    except InputError:
        raise
    except Exception as error:  # whatever the downloading libraries raise when offline
        raise InputError(
            f"The published weights of {name} could not be downloaded from {spec.source} ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Download model.safetensors there on a "
            "machine with internet and pass --pipeline.model.weights PATH; or train from noise with "
            "--pipeline.model.weights random."
        ) from error


def load_weights(vit: nn.Module, file: Path) -> None:
    """Load a file in timm's or DINOv2's hub layout (the same keys, the hub's with ``mask_token`` besides), strictly.

    Raises:
        InputError: the file is missing or unreadable, or a key is missing, unexpected or of another shape.
    """
    if not file.is_file():
        raise InputError(
            f"--pipeline.model.weights {file}: no such file. Give `published`, `random`, or a .safetensors/.pth file."
        )
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"--pipeline.model.weights {file} cannot be read as weights ({error}).") from error
    state.pop("mask_token", None)  # the hub's; used only while DINOv2 itself was trained
    own = vit.state_dict()
    missing = sorted(own.keys() - state.keys())
    unexpected = sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    if missing or unexpected or reshaped:
        problems = [
            f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            if keys
        ]
        raise InputError(
            f"--pipeline.model.weights {file} does not fit the backbone: {'; '.join(problems)}. It must be a timm or "
            "DINOv2 hub state dict of the same model."
        )
    vit.load_state_dict(state)


def fingerprint(tensors: dict[str, Tensor]) -> UInt8[Tensor, "32"]:
    """SHA-256 over names, shapes and bytes of some tensors, to recognise a base model again."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
