"""Position embeddings for image sizes other than the one a model was trained at.

`interpolate_positions` calls ``F.interpolate`` as DINOv2's own code and timm do. `multiply_positions` does the same by
small matrix products, which survive ``torch.export`` and ONNX with image sizes left open.
"""

from typing import Literal, Optional, Union

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Interpolation = Literal["hub", "timm"]
Side = Union[int, torch.SymInt]
"""Rows or columns of a token grid; symbolic while a model is traced for all of them."""
HUB_OFFSET = 0.1
"""DINOv2 adds this to the new grid's side before it divides by the old one's."""


def cubic_kernel(distance: Float[Tensor, "*n"], a: float) -> Float[Tensor, "*n"]:
    """Cubic convolution (Keys 1981) with free parameter ``a``: 1 at 0, 0 at and beyond 2.

    Args:
        distance: in samples.
        a: -0.75 in PyTorch's bicubic mode, -0.5 in its antialiased one.
    """
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def interpolation_matrix(old: int, new: Side, interpolation: Interpolation) -> Float[Tensor, "new old"]:
    """Weights of old samples in new ones along one axis, float64; rows sum to 1.

    Args:
        old: number of samples.
        new: number of samples wanted.
        interpolation: see `interpolate_positions`.
    """
    taken = torch.arange(old, dtype=torch.float64)
    places: Tensor = torch.arange(new, dtype=torch.float64) + 0.5
    if interpolation == "hub":
        centres: Tensor = places * (old / (new + HUB_OFFSET)) - 0.5  # type: ignore  # a factor, symbolic or not
        first = centres.floor()
        rows = []
        for tap in (-1, 0, 1, 2):
            weights = cubic_kernel(centres - first - tap, -0.75)
            source = (first + tap).clamp(0, old - 1)
            rows.append(weights[:, None] * (source[:, None] == taken).double())
        return rows[0] + rows[1] + rows[2] + rows[3]
    scale: Tensor = torch.ones(1, dtype=torch.float64) * old / new  # type: ignore  # likewise
    widest = scale.clamp(min=1.0)
    centres = places * scale
    inside = taken >= (centres - 2 * widest + 0.5).clamp(min=0).floor()[:, None]
    inside &= taken < (centres + 2 * widest + 0.5).clamp(max=old).floor()[:, None]
    weights = cubic_kernel((taken + 0.5 - centres[:, None]) / widest, -0.5) * inside.double()
    return weights / weights.sum(dim=1, keepdim=True)


def interpolate_positions(
    positions: Float[Tensor, "1 p c"], prefix: int, grid: tuple[int, int], new: tuple[int, int], how: Interpolation
) -> Float[Tensor, "1 q c"]:
    """A position embedding for another token grid; unchanged where the grid is the same.

    Args:
        positions: of the prefix tokens and then of a grid, row by row.
        prefix: number of prefix tokens that have an embedding.
        grid: rows and columns of that grid.
        new: rows and columns wanted.
        how: ``hub``: bicubic, scaled by ``(new + 0.1) / old``; ``timm``: bicubic with antialiasing.
    """
    if new == grid:
        return positions
    old = rearrange(positions[:, prefix:].float(), "1 (h w) c -> 1 c h w", h=grid[0])
    if how == "hub":
        scales = tuple((wanted + HUB_OFFSET) / there for wanted, there in zip(new, grid, strict=True))
        resampled = F.interpolate(old, scale_factor=scales, mode="bicubic")
    else:
        resampled = F.interpolate(old, size=new, mode="bicubic", antialias=True)
    resampled = rearrange(resampled, "1 c h w -> 1 (h w) c").to(positions.dtype)
    return torch.cat([positions[:, :prefix], resampled], dim=1)


def multiply_positions(
    positions: Float[Tensor, "1 p c"], prefix: int, grid: tuple[int, int], new: tuple[Side, Side], how: Interpolation
) -> Float[Tensor, "1 q c"]:
    """What `interpolate_positions` gives, without a branch on sizes."""
    rows = interpolation_matrix(grid[0], new[0], how)
    columns = interpolation_matrix(grid[1], new[1], how)
    # DINOv2's offset would move even a grid of the same size, and its code leaves that alone
    same_rows = torch.arange(new[0]).sum() == grid[0] * (grid[0] - 1) // 2
    same_columns = torch.arange(new[1]).sum() == grid[1] * (grid[1] - 1) // 2
    same = same_rows & same_columns
    rows = torch.where(same, _identity(new[0], grid[0]), rows).to(positions.device)
    columns = torch.where(same, _identity(new[1], grid[1]), columns).to(positions.device)
    old = rearrange(positions[:, prefix:].double(), "1 (h w) c -> h (w c)", h=grid[0])
    stretched = rearrange(rows @ old, "h (w c) -> w (h c)", w=grid[1])
    resampled = rearrange(columns @ stretched, "w (h c) -> 1 (h w) c", c=positions.shape[-1])
    return torch.cat([positions[:, :prefix], resampled.to(positions.dtype)], dim=1)


def _identity(rows: Side, columns: int) -> Float[Tensor, "rows columns"]:
    return (torch.arange(rows)[:, None] == torch.arange(columns)).double()


class ResampledVisionTransformer(VisionTransformer):
    """A timm model whose position embedding follows the image size in a way of our choice.

    Made of an existing model by `resample_with`; weights and everything else stay timm's.
    """

    interpolation: Interpolation
    traceable: bool

    def _pos_embed(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n c"]:
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        height, width = x.shape[1:3]
        assert self.pos_embed is not None
        resample = multiply_positions if self.traceable else interpolate_positions
        old = self.patch_embed.grid_size
        positions = resample(self.pos_embed, prefix, old, (height, width), self.interpolation)
        tokens = x.flatten(1, 2)
        first = [t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        if self.no_embed_class:
            return self.pos_drop(torch.cat([*first, tokens + positions], dim=1))
        return self.pos_drop(torch.cat([*first, tokens], dim=1) + positions)


def why_not_resampled(vit: nn.Module, interpolation: Interpolation) -> Optional[str]:
    """Why a model's position embedding cannot be resampled like this; None: it can."""
    if not isinstance(vit, VisionTransformer) or type(vit) not in (VisionTransformer, ResampledVisionTransformer):
        return f"{type(vit).__name__} is not timm's plain VisionTransformer"
    if vit.pos_embed is None:
        return "the model has no position embedding"
    if not vit.dynamic_img_size:
        return "the model was built for one image size"
    if interpolation == "hub" and (vit.num_prefix_tokens != 1 or vit.cls_token is None or vit.no_embed_class):
        return "DINOv2's own code does it for models with a class token and no registers"
    return None


def resample_with(vit: nn.Module, interpolation: Interpolation, traceable: bool = False) -> None:
    """Let a timm model resample its position embedding like this, in place.

    Args:
        vit: the model.
        interpolation: see `interpolate_positions`.
        traceable: by matrix products, for a graph of all image sizes.

    Raises:
        TypeError: it cannot be done, see `why_not_resampled`.
    """
    if (problem := why_not_resampled(vit, interpolation)) is not None:
        raise TypeError(problem)
    vit.__class__ = ResampledVisionTransformer
    vit.interpolation = interpolation  # type: ignore
    vit.traceable = traceable  # type: ignore
