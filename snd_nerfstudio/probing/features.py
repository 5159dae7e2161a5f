"""Images to the tokens that probes see, exactly as a protocol wants them: normalised, padded, from which block.

A backbone by itself resizes images to whole patches. Probes pad them instead, with zeros after normalisation, as the
released evaluation does; so normalising and padding are done here, and the transformer is called behind them.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, Optional, Protocol, Union

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from snd_nerfstudio.backbones.registry import IMAGENET_MEAN, IMAGENET_STD, PositionEmbedding
from snd_nerfstudio.backbones.variants import ConcatenatedBackbone, RefinedBackbone
from snd_nerfstudio.backbones.vit import Tokens
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.models import ProbeModel, vision_transformers
from snd_nerfstudio.probing.padding import PadCrop, Padding, pad_images, patch_padding

InputNorm = Literal["imagenet", "half"]


@dataclass(frozen=True)
class FeatureSettings:
    """Which tokens, of images treated how."""

    block: int = -1
    """Transformer block; negative ones count from the last."""
    norm: bool = True
    """Apply the transformer's final norm to patch tokens and class token."""
    class_token: bool = False
    """Take the class token too."""
    input_norm: InputNorm = "imagenet"
    """Colours less mean, over deviation: those the backbone was trained with (ImageNet's), or 1/2 and 1/2."""
    positions: Optional[PositionEmbedding] = None
    """How position embeddings are resized; None: as when the weights were trained."""
    pad_crop: PadCrop = "exact"
    """Leave the padding out of maps, or stretch padded maps over the image as the released code does (parity)."""
    extra_patch_quirk: bool = False
    """Pad sides that fit by a whole patch if the other side does not fit (Probe3D)."""


@dataclass(frozen=True)
class ProbeFeatures:
    """Tokens of a batch of images of one size."""

    tokens: Float[Tensor, "b h w c"]
    """Of the padded images."""
    class_token: Optional[Float[Tensor, "b d"]]
    """None if it is not asked for."""
    padding: Padding
    """What was added to the images."""
    size: tuple[int, int]
    """Rows and columns of the images without padding."""


class CustomBackbone(Protocol):
    """What else than a vision transformer can be probed: a module with these."""

    patch: int
    """Side of a patch, pixels."""
    channels: int
    """Channels of a token."""
    class_channels: int
    """Channels of the class token; 0 = there is none."""

    def prepared_tokens(self, prepared: Float[Tensor, "b 3 H W"], block: int, norm: bool) -> Tokens:
        """Tokens of images that are normalised and padded."""
        ...


def prepare(
    model: ProbeModel,
    images: Union[Float[Tensor, "b 3 H W"], UInt8[Tensor, "b 3 H W"]],
    settings: FeatureSettings,
) -> tuple[Float[Tensor, "b 3 H2 W2"], Padding]:
    """Images as the transformer gets them: ``(x - mean) / deviation``, then zeros at the sides to whole patches.

    Args:
        model: gives patch, mean and deviation.
        images: colours in [0, 1], or bytes.
        settings: see there.
    """
    colours = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = colours.new_full((3, 1, 1), 0.5), colours.new_full((3, 1, 1), 0.5)
    if settings.input_norm == "imagenet":
        spec = getattr(model.backbone, "spec", None)
        mean = colours.new_tensor(IMAGENET_MEAN if spec is None else spec.mean).view(3, 1, 1)
        std = colours.new_tensor(IMAGENET_STD if spec is None else spec.std).view(3, 1, 1)
    padding = patch_padding((images.shape[-2], images.shape[-1]), model.patch, settings.extra_patch_quirk)
    return pad_images((colours - mean) / std, padding), padding


@torch.no_grad()
def encode(
    model: ProbeModel,
    images: Union[Float[Tensor, "b 3 H W"], UInt8[Tensor, "b 3 H W"]],
    settings: FeatureSettings,
) -> ProbeFeatures:
    """Tokens of images.

    Of FiT3D's two transformers the patch tokens lie one after the other in the channels, and the class token is the
    original's (its released code). MEF's patch tokens have gone through the final norm and its convolution whatever
    ``norm`` says, which holds for its class token alone; the paper's evaluation of MEF is not released, this is ours.

    Args:
        model: whose.
        images: colours in [0, 1], or bytes, on the model's device.
        settings: see there.

    Raises:
        InputError: a class token is wanted and there is none; positions do not fit the model; or MEF's convolution
            is asked for behind another block than the last.
        ValueError: there is no such block.
    """
    if settings.class_token and not model.class_channels:
        raise InputError(f"{model.label} has no class token: probe it with --features.no-class-token.")
    prepared, padding = prepare(model, images, settings)
    with resized_positions(model, settings.positions):
        patches, class_token = _tokens(model.backbone, prepared, settings.block, settings.norm)
    if not settings.class_token:
        class_token = None
    return ProbeFeatures(patches, class_token, padding, (images.shape[-2], images.shape[-1]))


def feature_map(model: ProbeModel, image: UInt8[np.ndarray, "H W 3"], settings: FeatureSettings) -> FeatureMap:
    """Patch tokens of one image for matching; which part of them is padding is said there, and left to the matcher.

    Args:
        model: whose; the image goes where its tensors are.
        image: RGB.
        settings: see `FeatureSettings`.

    Raises:
        InputError: see `encode`.
    """
    where = next((tensor.device for tensor in model.backbone.state_dict().values()), torch.device("cpu"))
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(where)
    found = encode(model, pixels, settings)
    values = rearrange(found.tokens[0], "h w c -> c h w")
    return FeatureMap(values, found.size, found.padding.padded(found.size))


@contextmanager
def resized_positions(model: ProbeModel, how: Optional[PositionEmbedding]) -> Iterator[None]:
    """Let a model's transformers resize their position embedding in another way, as long as this lasts.

    Nothing changes where ``how`` is None, or where positions are rotary and nothing is resized.

    Raises:
        InputError: a transformer cannot do that.
    """
    with ExitStack() as undo:
        for backbone in vision_transformers(model.backbone):
            if how in (None, backbone.positions) or backbone.positions == "rotary":
                continue
            from snd_nerfstudio.backbones.positions import resample_with

            vit = backbone.vit
            undo.callback(_restore, vit, vit.__class__, dict(vit.__dict__))
            try:
                resample_with(vit, how)  # type: ignore
            except TypeError as error:
                raise InputError(
                    f"--features.positions {how} cannot be used with {model.label} ({error}): leave it out."
                ) from error
        yield


def _restore(module: nn.Module, kind: type, attributes: dict) -> None:
    module.__class__ = kind  # type: ignore
    module.__dict__.clear()
    module.__dict__.update(attributes)


def _tokens(
    backbone: nn.Module, prepared: Float[Tensor, "b 3 H W"], block: int, norm: bool
) -> tuple[Float[Tensor, "b h w c"], Optional[Float[Tensor, "b d"]]]:
    """Patch tokens and class token, which may differ in channels."""
    if isinstance(backbone, RefinedBackbone):
        if block not in (-1, backbone.backbone.blocks - 1):
            raise InputError("--features.block: MEF's convolution lies behind the last block, so give -1.")
        raw = backbone.backbone.prepared_tokens(prepared, block, norm=False)
        final_norm: nn.Module = backbone.backbone.vit.norm  # type: ignore
        grid = backbone.refine(rearrange(final_norm(raw.patches), "b h w c -> b c h w"))
        class_token = raw.class_token
        if norm and class_token is not None:
            class_token = final_norm(class_token)
        return rearrange(grid, "b c h w -> b h w c"), class_token
    if isinstance(backbone, ConcatenatedBackbone):
        original, class_token = _tokens(backbone.original, prepared, block, norm)
        fine_tuned, _ = _tokens(backbone.fine_tuned, prepared, block, norm)
        return torch.cat([original, fine_tuned], dim=-1), class_token
    found = backbone.prepared_tokens(prepared, block, norm)  # type: ignore
    return found.patches, found.class_token
