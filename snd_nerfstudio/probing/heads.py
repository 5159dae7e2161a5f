"""Linear heads of the probes, applied to tokens; their maps are enlarged afterwards.

The released code enlarges the features by four and then applies a 1x1 convolution. Both are linear, and the weights
of an interpolation sum to 1, so the order does not matter (paper appendix A.4). Here the head comes first: it has a
sixteenth of the positions to see, and maps of classes or bins are narrower than features.
"""

from typing import Literal, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.probing.expected_depth import expected_depth
from snd_nerfstudio.probing.padding import PadCrop, Padding, to_image

UPSAMPLING = 4
"""Depth and normals are predicted on a grid this much finer than the tokens'."""
DEPTH_BINS = 256
"""Depths whose weighted mean is the prediction."""
FLOOR = 0.1
"""Added to every rectified logit, so that no bin has weight 0."""

HeadNorm = Literal["none", "batch"]
HeadInit = Literal["uniform", "normal"]


def upsample(maps: Float[Tensor, "b k h w"], factor: int = UPSAMPLING) -> Float[Tensor, "b k h2 w2"]:
    """Enlarge maps bilinearly (``align_corners=False``)."""
    return F.interpolate(maps, scale_factor=factor, mode="bilinear", align_corners=False)


class LinearHead(nn.Module):
    """A linear layer over tokens and, if wanted, the class token of their image beside each of them.

    Initialised as PyTorch does a 1x1 convolution: weights and biases uniform within ``1 / sqrt(inputs)``.

    Args:
        channels: of a token.
        outputs: channels of the map.
        class_channels: of the class token; 0 = it is not used.
    """

    def __init__(self, channels: int, outputs: int, class_channels: int = 0) -> None:
        super().__init__()
        self.channels = channels
        self.class_channels = class_channels
        self.linear = nn.Linear(channels + class_channels, outputs)

    def forward(
        self, tokens: Float[Tensor, "b h w c"], class_token: Optional[Float[Tensor, "b d"]] = None
    ) -> Float[Tensor, "b k h w"]:
        """A map over the tokens, float32 or better also for tokens that were kept in half precision.

        Raises:
            ValueError: a class token is missing, or there is one that the head has no weights for.
        """
        if (class_token is None) != (self.class_channels == 0):
            raise ValueError(f"this head has {self.class_channels} weights for a class token, which does not fit")
        weight = self.linear.weight
        # the same as with the class token beside every token, whose part is the same for all of them
        output = F.linear(tokens.to(weight.dtype), weight[:, : self.channels], self.linear.bias)
        if class_token is not None:
            output = output + F.linear(class_token.to(weight.dtype), weight[:, self.channels :])[:, None, None]
        return rearrange(output, "b h w k -> b k h w")


class DepthHead(LinearHead):
    """Logits of depths that are spaced evenly from the least to the greatest, both included (released code).

    Args:
        channels: of a token.
        min_depth: the least depth, metres.
        max_depth: the greatest depth, metres.
        class_channels: of the class token; 0 = it is not used.
        bins: how many depths.
    """

    bins: Tensor

    def __init__(
        self, channels: int, min_depth: float, max_depth: float, class_channels: int = 0, bins: int = DEPTH_BINS
    ) -> None:
        super().__init__(channels, bins, class_channels)
        self.register_buffer("bins", torch.linspace(min_depth, max_depth, bins), persistent=False)

    def depth(self, logits: Float[Tensor, "b k h w"]) -> Float[Tensor, "b 1 h2 w2"]:
        """Depth in metres, four times as fine as the logits of `forward`.

        ``p_k = (relu(x_k) + 0.1) / sum_j (relu(x_j) + 0.1)`` and ``depth = sum_k p_k bin_k`` of the enlarged logits
        ``x``. This is not linear, so it comes after the enlarging.
        """
        return expected_depth(logits, self.bins, FLOOR, UPSAMPLING)

    def at_pixels(
        self, logits: Float[Tensor, "b k h w"], size: tuple[int, int], padding: Padding, pad_crop: PadCrop
    ) -> Float[Tensor, "b H W"]:
        """Depth at the pixels of an image, metres.

        In testing the released code clamps depth to the bins' range, which a mean of bins never leaves.

        Args:
            logits: of `forward`.
            size: rows and columns of the image without padding.
            padding: what was added to the image.
            pad_crop: see `to_image`.
        """
        return to_image(self.depth(logits), size, padding, pad_crop)[:, 0]


class NormalsHead(LinearHead):
    """A direction and a concentration ``s`` per token: four channels (Bae et al. 2021; Probe3D).

    Args:
        channels: of a token.
        class_channels: of the class token; 0 = it is not used, as in the released code's last version.
    """

    def __init__(self, channels: int, class_channels: int = 0) -> None:
        super().__init__(channels, 4, class_channels)

    @staticmethod
    def at_pixels(
        maps: Float[Tensor, "b 4 h w"], size: tuple[int, int], padding: Padding, pad_crop: PadCrop
    ) -> Float[Tensor, "b 4 H W"]:
        """Directions, not of length 1, and ``s`` at the pixels of an image: enlarged by four, then bicubic.

        With ``parity`` the second step aligns corners, unlike the first, as the released code does.
        """
        return to_image(upsample(maps), size, padding, pad_crop, mode="bicubic", align_corners=True)


class SegmentationHead(LinearHead):
    """Logits of classes, with or without BatchNorm before them.

    The released code has neither normalisation nor an initialisation of its own (``none``, ``uniform``). DINOv2's
    probes have BatchNorm, and weights of deviation 0.01 with zero bias (``batch``, ``normal``).

    Args:
        channels: of a token.
        classes: how many.
        head_norm: what comes before the linear layer.
        init: of the linear layer.
    """

    def __init__(self, channels: int, classes: int, head_norm: HeadNorm = "none", init: HeadInit = "uniform") -> None:
        super().__init__(channels, classes)
        self.norm = nn.BatchNorm1d(channels) if head_norm == "batch" else None
        if init == "normal":
            nn.init.normal_(self.linear.weight, std=0.01)
            nn.init.zeros_(self.linear.bias)

    def forward(
        self, tokens: Float[Tensor, "b h w c"], class_token: Optional[Float[Tensor, "b d"]] = None
    ) -> Float[Tensor, "b k h w"]:
        """A map over the tokens; statistics of BatchNorm are those of all tokens of the batch."""
        if self.norm is not None:
            rows = self.norm(rearrange(tokens, "b h w c -> (b h w) c").to(self.linear.weight.dtype))
            tokens = rows.view(tokens.shape)
        return super().forward(tokens, class_token)

    @staticmethod
    def at_pixels(
        logits: Float[Tensor, "b k h w"], size: tuple[int, int], padding: Padding, pad_crop: PadCrop
    ) -> Float[Tensor, "b k H W"]:
        """Logits at the pixels of an image."""
        return to_image(logits, size, padding, pad_crop)
