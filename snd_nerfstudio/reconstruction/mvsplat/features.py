"""Image features that know the other view: a small CNN, then windowed attention within and between the views."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.reconstruction.mvsplat.settings import MVSplatSettings

WINDOWS = 2
"""Attention windows along each axis."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with instance norms; ReLU on both sides of the addition (UniMatch's block)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(channels_in, channels, 1, stride) if channels_in != channels or stride != 1 else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """``relu(skip(x) + relu(IN(conv(relu(IN(conv(x)))))))``."""
        inner = F.relu(F.instance_norm(self.conv1(x)))
        inner = F.relu(F.instance_norm(self.conv2(inner)))
        return F.relu((x if self.skip is None else F.instance_norm(self.skip(x))) + inner)


class ImageEncoder(nn.Module):
    """Features at a quarter of the resolution, each image for itself. Feature (i, j) is centred on pixel (4 i, 4 j)."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: MVSplatSettings) -> None:
        super().__init__()
        first, middle, last = settings.stem_channels, settings.middle_channels, settings.feature_channels
        self.stem = nn.Conv2d(3, first, 7, 2, 3, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(ResidualBlock(channels_in, channels, stride), ResidualBlock(channels, channels, 1))
            for channels_in, channels, stride in ((first, first, 1), (first, middle, 2), (middle, last, 1))
        )
        self.head = nn.Conv2d(last, last, 1)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD)[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "n 3 H W"]) -> Float[Tensor, "n c h w"]:
        """Encode images in [0, 1]."""
        x = F.relu(F.instance_norm(self.stem((images - self.mean) / self.std)))
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def window_positions(height: int, width: int, channels: int, like: Tensor) -> Float[Tensor, "c h w"]:
    """Sine code of positions inside one window (DETR, Carion et al. 2020): first half of the channels y, second x.

    Position k of n (from 1) is the angle ``2 pi k / (n + 1e-6)``; channel i has the frequency
    ``10000^(-2 floor(i / 2) / (channels / 2))``, even ones sine, odd ones cosine.
    """
    half = channels // 2
    index = torch.arange(half, device=like.device)
    period = 10000.0 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def code(count: int) -> Tensor:
        steps = torch.arange(1, count + 1, dtype=torch.float32, device=like.device) / (count + 1e-6) * (2 * math.pi)
        angles = steps / period[:, None]
        return torch.where(index[:, None] % 2 == 0, angles.sin(), angles.cos())

    rows = code(height)[:, :, None].expand(half, height, width)
    columns = code(width)[:, None, :].expand(half, height, width)
    return torch.cat([rows, columns]).to(like.dtype)


def attention_bounds(size: int, shifted: bool) -> list[int]:
    """Where one axis is cut into windows.

    Swin's shifted windows roll the map, attend within windows, mask what the roll has joined, and roll back. What may
    attend to each other then are just contiguous stretches: of s, w and w - s, with w the window's size and s = w // 2.
    The released code masks with -100 instead of minus infinity, which is the same to within ``exp(-100)``.
    """
    window = size // WINDOWS
    if not shifted:
        return [0, window, size]
    return [0, window // 2, window // 2 + window, size]


def windowed_attention(
    query: Float[Tensor, "n h w c"], key: Float[Tensor, "n h w c"], value: Float[Tensor, "n h w c"], shifted: bool
) -> Float[Tensor, "n h w c"]:
    """``softmax(q k^T / sqrt(c)) v`` within each of 2x2 windows, or of the 3x3 that remain when they are shifted."""
    n, height, width, channels = query.shape
    rows, columns = attention_bounds(height, shifted), attention_bounds(width, shifted)
    bands = []
    for top, bottom in zip(rows[:-1], rows[1:], strict=True):
        blocks = []
        for left, right in zip(columns[:-1], columns[1:], strict=True):
            q, k, v = (t[:, top:bottom, left:right].reshape(n, 1, -1, channels) for t in (query, key, value))
            found = F.scaled_dot_product_attention(q, k, v)
            blocks.append(found.view(n, bottom - top, right - left, channels))
        bands.append(torch.cat(blocks, dim=2))
    return torch.cat(bands, dim=1)


class Attention(nn.Module):
    """Windowed attention of one head, its result projected and normalised.

    With ``feed_forward`` the result is mixed with the input first.
    """

    def __init__(self, channels: int, feed_forward: bool) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(channels, channels, bias=False)
        self.value = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)
        self.norm = nn.LayerNorm(channels)
        self.mlp = None
        if feed_forward:
            self.mlp = nn.Sequential(
                nn.Linear(2 * channels, 8 * channels, bias=False),
                nn.GELU(),
                nn.Linear(8 * channels, channels, bias=False),
            )
            self.mlp_norm = nn.LayerNorm(channels)

    def forward(
        self, x: Float[Tensor, "n h w c"], source: Float[Tensor, "n h w c"], shifted: bool
    ) -> Float[Tensor, "n h w c"]:
        """``x`` and what it found in ``source``."""
        found = windowed_attention(self.query(x), self.key(source), self.value(source), shifted)
        message = self.norm(self.merge(found))
        if self.mlp is not None:
            message = self.mlp_norm(self.mlp(torch.cat([x, message], dim=-1)))
        return x + message


class TransformerBlock(nn.Module):
    """Attention within a view, then from each view to the other as it was when it entered the block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.self_attention = Attention(channels, feed_forward=False)
        self.cross_attention = Attention(channels, feed_forward=True)

    def forward(self, x: Float[Tensor, "b 2 h w c"], shifted: bool) -> Float[Tensor, "b 2 h w c"]:
        """One block."""
        batch = x.shape[0]
        views, other = (rearrange(t, "b v h w c -> (b v) h w c") for t in (x, x.flip(1)))
        views = self.self_attention(views, views, shifted)
        views = self.cross_attention(views, other, shifted)
        return rearrange(views, "(b v) h w c -> b v h w c", b=batch)


class MultiViewTransformer(nn.Module):
    """Six blocks over the features of both views; every second one has shifted windows."""

    def __init__(self, settings: MVSplatSettings) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            TransformerBlock(settings.feature_channels) for _ in range(settings.transformer_blocks)
        )

    def forward(self, features: Float[Tensor, "b 2 c h w"]) -> Float[Tensor, "b 2 c h w"]:
        """Features aware of the other view."""
        channels, height, width = features.shape[-3:]
        positions = window_positions(height // WINDOWS, width // WINDOWS, channels, features)
        x = rearrange(features + positions.repeat(1, WINDOWS, WINDOWS), "b v c h w -> b v h w c")
        for number, block in enumerate(self.blocks):
            x = block(x, shifted=number % 2 == 1)
        return rearrange(x, "b v h w c -> b v c h w")
