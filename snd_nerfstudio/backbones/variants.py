"""Baselines that are more than a vision transformer: a convolution behind it, or two of them side by side.

They look like a `TokenBackbone` and are for looking at and probing. They are not for training.
"""

import copy
from typing import Optional, Union

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.backbones.registry import BackboneSpec
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import LoadedWeights, WeightReport


class RefinedBackbone(nn.Module):
    """Tokens after the final norm through one 3x3 convolution on their grid, zeros around it (MEF).

    Args:
        backbone: with MEF's adapters merged.
        refine: ``weight`` (c, c, 3, 3) and ``bias`` (c) of the convolution.
    """

    weight_report: Optional[WeightReport] = None
    """What became of the weights it was built with."""

    def __init__(self, backbone: TokenBackbone, refine: dict[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        channels = backbone.channels
        self.refine = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.refine.load_state_dict(refine)
        self.requires_grad_(False).eval()

    @property
    def spec(self) -> BackboneSpec:
        """Of the vision transformer."""
        return self.backbone.spec

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.backbone.channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        return self.backbone.grid(height, width)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens on their grid; images in [0, 1]."""
        grid = rearrange(self.backbone(images), "b h w c -> b c h w")
        return rearrange(self.refine(grid), "b c h w -> b h w c")


class ConcatenatedBackbone(nn.Module):
    """Tokens of the original and of a fine-tuned transformer, one after the other in the channels (FiT3D).

    Args:
        original: gives the first half of the channels.
        fine_tuned: the same architecture.
    """

    weight_report: Optional[WeightReport] = None
    """What became of the weights it was built with."""

    def __init__(self, original: TokenBackbone, fine_tuned: Union[TokenBackbone, RefinedBackbone]) -> None:
        super().__init__()
        self.original = original
        self.fine_tuned = fine_tuned
        self.requires_grad_(False).eval()

    @property
    def spec(self) -> BackboneSpec:
        """Of either transformer."""
        return self.original.spec

    @property
    def channels(self) -> int:
        """Channels of a token, twice those of one transformer."""
        return self.original.channels + self.fine_tuned.channels

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        return self.original.grid(height, width)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens on their grid; images in [0, 1]."""
        return torch.cat([self.original(images), self.fine_tuned(images)], dim=-1)


def with_variant(
    backbone: TokenBackbone, loaded: LoadedWeights
) -> Union[TokenBackbone, RefinedBackbone, ConcatenatedBackbone]:
    """A backbone together with what its weights bring along besides a vision transformer, if anything.

    Args:
        backbone: has ``loaded.state`` already.
        loaded: its weights.
    """
    whole = backbone if loaded.refine is None else RefinedBackbone(backbone, loaded.refine)
    if loaded.original is None:
        return whole
    original = copy.deepcopy(backbone)
    original.vit.load_state_dict(loaded.original)
    return ConcatenatedBackbone(original, whole)
