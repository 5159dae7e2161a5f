"""Pixels to the token grid (paper section 3.5)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def area_weights(
    cells: int, pixels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Float[Tensor, "cells pixels"]:
    """Share of each pixel in the mean over each of ``cells`` equal intervals of an axis; rows sum to 1.

    A pixel that a cell's border cuts counts in both cells by its overlap, so cells of fractional size are exact.
    """
    edges = torch.arange(cells + 1, dtype=torch.float64, device=device) * (pixels / cells)
    left = torch.arange(pixels, dtype=torch.float64, device=device)
    overlap = torch.minimum(edges[1:, None], left + 1) - torch.maximum(edges[:-1, None], left)
    return (overlap.clamp(min=0) * (cells / pixels)).to(dtype)


def pool(maps: Float[Tensor, "H W c"], h: int, w: int, method: str = "area") -> Float[Tensor, "h w c"]:
    """Bring a pixel map to the token grid.

    Args:
        maps: any map.
        h: token rows.
        w: token columns.
        method: ``area``, the mean over each cell, or ``bilinear`` at the cells' centres without antialiasing (the
            released code, which reads 2x2 pixels per token).
    """
    if method == "bilinear":
        channels_first = rearrange(maps, "H W c -> 1 c H W")
        pooled = F.interpolate(channels_first, size=(h, w), mode="bilinear", align_corners=False)
        return rearrange(pooled, "1 c h w -> h w c")
    rows = area_weights(h, maps.shape[0], maps.dtype, maps.device)
    columns = area_weights(w, maps.shape[1], maps.dtype, maps.device)
    # rows first: the larger reduction leaves a map h / H as tall for the second product
    narrow = torch.einsum("hH,HWc->hWc", rows, maps)
    return torch.einsum("wW,hWc->hwc", columns, narrow)
