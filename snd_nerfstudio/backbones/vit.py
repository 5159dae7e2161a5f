"""A vision transformer seen as a map from images to a grid of tokens."""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.backbones.registry import BackboneSpec, PositionEmbedding
from snd_nerfstudio.backbones.weights import WeightReport
from snd_nerfstudio.errors import InputError


def token_grid(height: int, width: int, patch: int) -> tuple[int, int]:
    """Rows and columns of the token grid of an image: its side divided by the patch, rounded down.

    Raises:
        InputError: a side is shorter than one patch.
    """
    rows, columns = height // patch, width // patch
    if rows < 1 or columns < 1:
        raise InputError(f"An image of {height}x{width} pixels is smaller than one patch of {patch} pixels.")
    return rows, columns


@dataclass(frozen=True)
class Tokens:
    """What a vision transformer says about some images after one of its blocks."""

    patches: Float[Tensor, "b h w c"]
    """One token per patch, on their grid."""
    class_token: Optional[Float[Tensor, "b c"]]
    """None where the transformer has none."""


class TokenBackbone(nn.Module):
    """Images to patch tokens after the final norm.

    The image is resized bilinearly to the nearest smaller multiple of the patch, normalised, and passed through the
    transformer; class and register tokens are dropped (released SnD code: last block, post-norm patch tokens).

    Args:
        spec: which transformer.
        vit: the timm model.
        positions: how its position embedding follows the image size; None: as its authors do. The timm model is changed
            accordingly.

    Raises:
        InputError: this transformer's position embedding cannot be interpolated like that.
    """

    mean: Tensor
    std: Tensor
    weight_report: Optional[WeightReport] = None
    """What became of the weights it was built with; None for random ones."""

    def __init__(self, spec: BackboneSpec, vit: nn.Module, positions: Optional[PositionEmbedding] = None) -> None:
        super().__init__()
        self.spec = spec
        self.vit = vit
        self.positions: PositionEmbedding = positions or spec.positions
        if (self.positions == "rotary") != (spec.positions == "rotary"):
            raise InputError(
                f"--pipeline.model.position-embedding {self.positions} does not fit {spec.architecture}, whose "
                f"position embedding is {'' if spec.positions == 'rotary' else 'not '}rotary: leave the flag out."
            )
        if self.positions == "hub":
            from snd_nerfstudio.backbones.positions import resample_with

            try:
                resample_with(vit, "hub")  # type: ignore
            except TypeError as error:
                raise InputError(
                    f"--pipeline.model.position-embedding hub cannot be used with {spec.architecture} ({error}). "
                    "Use timm."
                ) from error
        self.register_buffer("mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.vit.num_features)  # type: ignore

    @property
    def blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)  # type: ignore

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        return token_grid(height, width, self.spec.patch)

    def prepared(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b 3 h w"]:
        """Images in [0, 1] as the transformer wants them: sides multiples of the patch, normalised.

        Raises:
            InputError: the image is smaller than one patch.
        """
        h, w = self.grid(*images.shape[-2:])
        size = (h * self.spec.patch, w * self.spec.patch)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        return (images - self.mean) / self.std

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens on their grid, ``h = H // patch``, ``w = W // patch``.

        Args:
            images: colours in [0, 1].

        Raises:
            InputError: the image is smaller than one patch.
        """
        h, w = self.grid(*images.shape[-2:])
        tokens = self.vit.forward_features(self.prepared(images))  # type: ignore
        tokens = tokens[:, self.vit.num_prefix_tokens :]  # type: ignore
        return rearrange(tokens, "b (h w) c -> b h w c", h=h, w=w)

    def tokens(self, images: Float[Tensor, "b 3 H W"], block: int = -1, norm: bool = True) -> Tokens:
        """Patch tokens and class token after any block; register tokens are dropped.

        Args:
            images: colours in [0, 1].
            block: its index; negative ones count from the last.
            norm: apply the transformer's final norm, which belongs to its last block.

        Raises:
            InputError: the image is smaller than one patch.
            ValueError: there is no such block.
        """
        return self.prepared_tokens(self.prepared(images), block, norm)

    def prepared_tokens(self, prepared: Float[Tensor, "b 3 h w"], block: int = -1, norm: bool = True) -> Tokens:
        """`tokens` of images that are normalised already, and whose sides are multiples of the patch.

        Raises:
            ValueError: there is no such block.
        """
        if not -self.blocks <= block < self.blocks:
            raise ValueError(f"block {block} was asked for, {self.spec.architecture} has {self.blocks}")
        has_class = getattr(self.vit, "cls_token", None) is not None
        found = self.vit.forward_intermediates(  # type: ignore
            prepared,
            indices=[block % self.blocks],
            return_prefix_tokens=has_class,
            norm=norm,
            output_fmt="NCHW",
            intermediates_only=True,
            stop_early=True,
        )[0]
        patches, prefix = found if has_class else (found, None)
        return Tokens(rearrange(patches, "b c h w -> b h w c"), None if prefix is None else prefix[:, 0])
