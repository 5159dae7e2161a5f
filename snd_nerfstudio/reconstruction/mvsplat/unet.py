"""The U-Net of MVSplat's two refinements: norms after the convolutions, attention across views at the deepest level."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

GROUPS = 8
"""Of every group norm in the U-Nets."""
HEAD_CHANNELS = 32
"""Channels of one attention head."""


class ResidualBlock(nn.Module):
    """``skip(x) + SiLU(GN(conv(SiLU(GN(conv(x))))))``."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, channels)
        self.skip = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """Apply the block."""
        inner = F.silu(self.norm1(self.conv1(x)))
        inner = F.silu(self.norm2(self.conv2(inner)))
        return (x if self.skip is None else self.skip(x)) + inner


class CrossViewAttention(nn.Module):
    """Attention over the positions of all views of a batch item together, without positions of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = channels // HEAD_CHANNELS
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.project = nn.Conv1d(channels, channels, 1)
        self.norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Float[Tensor, "n c h w"], views: int) -> Float[Tensor, "n c h w"]:
        """``x + GN(project(attention(x)))``; ``n`` counts batch items times views, views innermost."""
        n, _, height, width = x.shape
        tokens = rearrange(x, "(b v) c h w -> b c (v h w)", v=views)
        # channels are split into heads first, and into query, key and value within each head
        parts = rearrange(self.qkv(tokens), "b (head qkv c) n -> qkv b head n c", head=self.heads, qkv=3)
        query, key, value = (part.contiguous() for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        mixed = self.project(rearrange(mixed, "b head n c -> b (head c) n"))
        mixed = rearrange(mixed, "b c (v h w) -> (b v) c h w", v=views, h=height, w=width)
        return x + self.norm(mixed)


class DownLevel(nn.Module):
    """One level on the way down."""

    def __init__(self, channels: int, attention: bool, last: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, channels)
        self.attention = CrossViewAttention(channels) if attention else None
        self.shrink = None if last else nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, x: Float[Tensor, "n c h w"], views: int) -> list[Float[Tensor, "n c _ _"]]:
        """The map at this level and, but for the last level, the smaller one of the next."""
        x = self.block(x)
        if self.attention is not None:
            x = self.attention(x, views)
        return [x] if self.shrink is None else [x, self.shrink(x)]


class UpLevel(nn.Module):
    """One level on the way up: two blocks, each of which takes one skip connection."""

    def __init__(self, channels: int, attention: bool, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(2 * channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList(CrossViewAttention(channels) for _ in range(2 if attention else 0))
        self.grow = None if last else nn.Conv2d(channels, channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "n c h w"], skips: list[Float[Tensor, "n c _ _"]], views: int
    ) -> Float[Tensor, "n c _ _"]:
        """The map for the next level; takes the last two of ``skips``."""
        for number, block in enumerate(self.blocks):
            x = block(torch.cat([x, skips.pop()], dim=1))
            if self.attentions:
                x = self.attentions[number](x, views)
        return x if self.grow is None else self.grow(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNet(nn.Module):
    """A U-Net whose levels all have the same width (the latent diffusion U-Net without time).

    Args:
        channels: of input, output and every level.
        levels: how many; each but the last halves the map.
    """

    def __init__(self, channels: int, levels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(channels, attention=i == levels - 1, last=i == levels - 1) for i in range(levels)
        )
        self.middle = nn.ModuleList(ResidualBlock(channels, channels) for _ in range(2))
        self.up = nn.ModuleList(UpLevel(channels, attention=i == 0, last=i == levels - 1) for i in range(levels))
        self.out = nn.Conv2d(channels, channels, 3, padding=1)
        self.out_norm = nn.GroupNorm(GROUPS, channels)

    def forward(self, x: Float[Tensor, "n c h w"], views: int) -> Float[Tensor, "n c h w"]:
        """Refine maps; ``n`` counts batch items times views, views innermost."""
        skips = [self.stem(x)]
        for level in self.down:
            skips += level(skips[-1], views)
        x = skips[-1]
        for block in self.middle:
            x = block(x)
        for level in self.up:
            x = level(x, skips, views)
        return F.silu(self.out_norm(self.out(x)))
