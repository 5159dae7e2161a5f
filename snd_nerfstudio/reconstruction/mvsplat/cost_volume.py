"""The plane sweep: how well each feature agrees with the other view, if it lay at each of many depths."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snd_nerfstudio.reconstruction.mvsplat.settings import Geometry

CHUNK_BYTES = 128 * 2**20
"""Warped features held at a time; the whole volume would need gigabytes."""
FEATURE_STRIDE = 4
"""Pixels per feature."""
MIN_DEPTH = 1e-3
"""Points behind the other camera are put this far in front of it, far outside its image."""


def inverse_depth_candidates(
    near: Float[Tensor, "*batch"], far: Float[Tensor, "*batch"], count: int
) -> Float[Tensor, "*batch count"]:
    """Evenly spaced in inverse depth, the farthest first: ``1/far + k/(count-1) (1/near - 1/far)``."""
    steps = torch.linspace(0, 1, count, dtype=near.dtype, device=near.device)
    farthest = 1 / far
    return farthest[..., None] + steps * (1 / near - farthest)[..., None]


def sampling_grid(
    inverse_depths: Float[Tensor, "n d"],
    reference: Float[Tensor, "n 3 3"],
    source: Float[Tensor, "n 3 3"],
    reference_to_source: Float[Tensor, "n 4 4"],
    size: tuple[int, int],
    geometry: Geometry,
) -> Float[Tensor, "n d h w 2"]:
    """Where the features of the reference view land in the source view, in `grid_sample`'s coordinates.

    ``x' ~ K_s (R K_r^-1 (u, v, 1) z + t)``. A feature is centred on a pixel's centre: on (4 j + 0.5, 4 i + 0.5) in
    pixels, which `exact` uses. `official` takes (4 j, 4 i), and the reference's intrinsics for the source too.

    Args:
        inverse_depths: candidates of each view, 1 / world units; z-depth in the reference camera.
        reference: intrinsics in pixels of the image.
        source: the other camera's.
        reference_to_source: from camera to camera.
        size: height and width of the feature map.
        geometry: which reading.
    """
    height, width = size
    offset = 0.5 if geometry == "exact" else 0.0
    if geometry == "official":
        source = reference
    rows = torch.arange(height, device=reference.device, dtype=torch.float32) * FEATURE_STRIDE + offset
    columns = torch.arange(width, device=reference.device, dtype=torch.float32) * FEATURE_STRIDE + offset
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=0).flatten(1)
    # the two products that do not depend on the depth, in float64: they are small, and the sum below cancels
    pose = reference_to_source.double()
    turn = source.double() @ pose[:, :3, :3] @ torch.linalg.inv(reference.double())
    far_point = (turn @ pixels.double()).to(reference.dtype)
    shift = (source.double() @ pose[:, :3, 3:]).to(reference.dtype)
    depths = (1 / inverse_depths)[:, None, :, None]
    points = far_point[:, :, None, :] * depths + shift[:, :, None, :]
    landed = points[:, :2] / points[:, 2:].clamp(min=MIN_DEPTH)
    extent = landed.new_tensor([max(width - 1, 1), max(height - 1, 1)]) * FEATURE_STRIDE
    grid = 2 * (landed - offset) / extent[:, None, None] - 1
    return rearrange(grid, "n xy d (h w) -> n d h w xy", h=height)


def correlations(
    reference: Float[Tensor, "n c h w"], source: Float[Tensor, "n c h w"], grid: Float[Tensor, "n d h w 2"]
) -> Float[Tensor, "n d h w"]:
    """``<reference, warped source> / sqrt(c)`` for every depth, a few depths at a time.

    Outside the source view the features are zero, and so is the correlation. No gradient flows to the grid. With
    gradients, more than one chunk is computed again on the way back instead of being remembered.
    """
    chunk = max(1, CHUNK_BYTES // (reference.numel() * reference.element_size()))
    parts = []
    for part in grid.split(chunk, dim=1):
        if torch.is_grad_enabled() and reference.requires_grad and grid.shape[1] > chunk:
            parts.append(checkpoint(_correlate, reference, source, part, use_reentrant=False))
        else:
            parts.append(_correlate(reference, source, part))
    return torch.cat(parts, dim=1)  # type: ignore


def _correlate(reference: Tensor, source: Tensor, grid: Tensor) -> Tensor:
    flat = rearrange(grid, "n d h w xy -> n (d h) w xy")
    warped = F.grid_sample(source, flat, mode="bilinear", padding_mode="zeros", align_corners=True)
    warped = rearrange(warped, "n c (d h) w -> n c d h w", d=grid.shape[1])
    return torch.einsum("nchw,ncdhw->ndhw", reference, warped) / math.sqrt(reference.shape[1])
