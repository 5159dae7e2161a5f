"""DINOv2's vision transformer in plain PyTorch, with the keys and methods of its torch.hub models.

This file needs nothing but torch: an export for torch.hub carries a copy of it. It is also the slow twin of the timm
model that is trained.
"""

import math
from collections.abc import Sequence
from typing import Any, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, c]``."""
        b, n, c = tokens.shape
        q, k, v = self.qkv(tokens).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class MLP(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, c]``."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """A gated linear unit, as the giant model has instead of an MLP."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(channels, 2 * hidden)
        self.w3 = nn.Linear(hidden, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, c]``."""
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, c]``."""
        return tokens * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, channels: int, heads: int, hidden: int, swiglu: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-6)
        self.attn = Attention(channels, heads)
        self.ls1 = LayerScale(channels)
        self.norm2 = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = SwiGLU(channels, hidden) if swiglu else MLP(channels, hidden)
        self.ls2 = LayerScale(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens ``[b, n, c]``."""
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class PatchEmbed(nn.Module):
    """Patches to tokens."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, patch, patch)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images ``[b, 3, H, W]`` to ``[b, h * w, c]``."""
        return self.proj(images).flatten(2).transpose(1, 2)


class PlainVisionTransformer(nn.Module):
    """DINOv2's architecture (Oquab et al. 2023; registers: Darcet et al. 2024).

    Args:
        channels: of a token.
        depth: number of blocks.
        heads: of the attention.
        hidden: channels inside the MLP (of one of the two halves for SwiGLU).
        patch: side of a patch in pixels.
        grid: side of the square token grid that the position embedding belongs to.
        registers: number of register tokens.
        swiglu: gated units instead of MLPs.
        antialias: how the position embedding follows the image size: False as DINOv2's models without registers
            (bicubic, scale with an offset of 0.1), True as those with registers and as timm (bicubic, antialiased).
    """

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        hidden: int,
        patch: int = 14,
        grid: int = 37,
        registers: int = 0,
        swiglu: bool = False,
        antialias: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim = self.num_features = channels
        self.patch_size, self.num_heads, self.n_blocks = patch, heads, depth
        self.num_register_tokens = registers
        self.antialias = antialias
        self.cls_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, channels))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, channels)) if registers else None
        self.patch_embed = PatchEmbed(channels, patch)
        self.blocks = nn.ModuleList([Block(channels, heads, hidden, swiglu) for _ in range(depth)])
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, channels))

    def positions(self, height: int, width: int) -> Tensor:
        """Position embedding ``[1, 1 + h * w, c]`` for an image of that many pixels."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        h, w = height // self.patch_size, width // self.patch_size
        if h == w == side:
            return self.pos_embed
        positions = self.pos_embed.float()
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.antialias:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        else:
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        grid = grid.permute(0, 2, 3, 1).reshape(1, h * w, -1)
        return torch.cat([positions[:, :1], grid], dim=1).to(self.pos_embed.dtype)

    def prepare_tokens(self, images: Tensor) -> Tensor:
        """Class token, registers and patches of normalised images ``[b, 3, H, W]``, before the first block."""
        patches = self.patch_embed(images)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + self.positions(*images.shape[-2:])
        if self.register_tokens is None:
            return tokens
        return torch.cat([tokens[:, :1], self.register_tokens.expand(len(images), -1, -1), tokens[:, 1:]], dim=1)

    def forward_features(self, images: Tensor) -> dict[str, Any]:
        """Tokens of normalised images ``[b, 3, H, W]`` by the names of DINOv2's code.

        Sides must be multiples of the patch. ``x_norm_patchtokens`` is ``[b, h * w, c]``.
        """
        tokens = self.prepare_tokens(images)
        for block in self.blocks:
            tokens = block(tokens)
        normed, first = self.norm(tokens), 1 + self.num_register_tokens
        return {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1:first],
            "x_norm_patchtokens": normed[:, first:],
            "x_prenorm": tokens,
            "masks": None,
        }

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: Union[int, Sequence[int]] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Patch tokens after some blocks.

        Args:
            images: normalised, ``[b, 3, H, W]``.
            n: that many last blocks, or their indices.
            reshape: to ``[b, c, h, w]``.
            return_class_token: pairs of patch tokens and class token.
            norm: apply the final norm.
        """
        wanted = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        tokens, outputs = self.prepare_tokens(images), []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in wanted:
                outputs.append(self.norm(tokens) if norm else tokens)
        if len(outputs) != len(wanted):
            raise ValueError(f"blocks {list(wanted)} were asked for, there are {self.n_blocks}")
        patches = [output[:, 1 + self.num_register_tokens :] for output in outputs]
        if reshape:
            h, w = (side // self.patch_size for side in images.shape[-2:])
            patches = [p.transpose(1, 2).reshape(len(images), -1, h, w).contiguous() for p in patches]
        if return_class_token:
            return tuple(zip(patches, (output[:, 0] for output in outputs)))
        return tuple(patches)

    def forward(self, images: Tensor) -> Tensor:
        """The class token after the final norm, ``[b, c]``."""
        return self.forward_features(images)["x_norm_clstoken"]
