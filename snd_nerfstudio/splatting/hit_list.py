"""The twin of the CPU engine's gradients: a list of all hits, composited by torch and differentiated by its autograd.

It takes the engine's hits and is therefore comparable to it to rounding, in float32 too, where `reference.py` may see a
hit at a threshold differently. It serves tests and `benchmarks/splatting_gradients.py`: `rasterize` is several times
faster.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.hits import (
    compositing_constants,
    depth_bits,
    engine_lock,
    find_tiles,
    footprints_of,
    tile_areas,
)
from snd_nerfstudio.splatting.numba_engine import TILE_PIXELS, find_hits
from snd_nerfstudio.splatting.projection import FAR, MAX_ALPHA, NEAR, TILE_SIZE, project_gaussians


@dataclass(frozen=True)
class HitList:
    """All hits of one view, pixel by pixel and front to back within each."""

    pixels: Int[Tensor, "hits"]
    """Number of the pixel, `row * width + column`, int64."""
    gaussians: Int[Tensor, "hits"]
    """Index of the Gaussian, int64."""


@torch.no_grad()
def list_hits(gaussians: Gaussians, camera: PinholeCamera, near: float = NEAR, far: float = FAR) -> HitList:
    """The hits that the CPU engine composites, found tile by tile on one thread.

    Args:
        gaussians: The Gaussians, float32 or float64, on the CPU.
        camera: The camera, of the same dtype.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The hits.
    """
    projection = project_gaussians(gaussians, camera, near=near, far=far)
    footprints = footprints_of(
        projection.means2d, projection.conics, projection.depths, projection.boxes, gaussians.opacities
    )
    size, dtype = (camera.height, camera.width), footprints.records.dtype
    with engine_lock:
        tiles = find_tiles(footprints, *size, TILE_SIZE)
        areas = tile_areas(*tiles, footprints.boxes, *size, TILE_SIZE)
    tiles_across = -(-camera.width // TILE_SIZE)
    pixels, members = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for tile, area in enumerate(areas):
        first_y, first_x = tile // tiles_across * TILE_SIZE, tile % tiles_across * TILE_SIZE
        candidates = tiles.gaussians[tiles.starts[tile] : tiles.starts[tile + 1]]
        found = np.empty(area, np.int32), np.empty(area, np.int32), np.empty(area, dtype)
        with engine_lock:
            hits = find_hits(
                candidates, footprints.records, depth_bits(footprints), footprints.boxes, compositing_constants(dtype),
                *size, first_y, first_x, np.empty(TILE_PIXELS, dtype), *found,
            )  # fmt: skip
        row, column = np.divmod(found[0][:hits], TILE_SIZE)
        pixels.append(np.int64(first_y + row) * camera.width + first_x + column)
        members.append(found[1][:hits].astype(np.int64))
    all_pixels = torch.from_numpy(np.concatenate(pixels))
    order = torch.argsort(all_pixels, stable=True)
    return HitList(pixels=all_pixels[order], gaussians=torch.from_numpy(np.concatenate(members))[order])


def splat_hits(
    gaussians: Gaussians,
    camera: PinholeCamera,
    features: Float[Tensor, "n c"],
    hits: HitList,
    near: float = NEAR,
    far: float = FAR,
) -> Splatted:
    """Composite listed hits, each pixel's transmittances by a cumulative sum of `log(1 - alpha)` in float64.

    Args:
        gaussians: The Gaussians, any floating dtype, on the CPU.
        camera: The camera, of the same dtype.
        features: One row per Gaussian, of the same dtype.
        hits: The hits, in the order of `list_hits`.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The splatted view, differentiable.
    """
    projection = project_gaussians(gaussians, camera, near=near, far=far)
    parameters = torch.cat(
        [projection.means2d, projection.conics, gaussians.opacities[:, None], projection.depths[:, None], features],
        dim=1,
    )
    mean_x, mean_y, xx, xy, yy, opacity, depth = parameters[:, :7].index_select(0, hits.gaussians).unbind(dim=1)
    rows = parameters[:, 7:].index_select(0, hits.gaussians)
    dx = mean_x - (hits.pixels % camera.width + 0.5).to(mean_x.dtype)
    dy = mean_y - (hits.pixels // camera.width + 0.5).to(mean_y.dtype)
    alpha = (opacity * torch.exp(-0.5 * (xx * dx * dx + yy * dy * dy) - xy * dx * dy)).clamp(max=MAX_ALPHA)

    pixels = camera.height * camera.width
    passed = torch.log1p(-alpha.double())
    before = torch.cumsum(passed, dim=0) - passed
    counts = torch.bincount(hits.pixels, minlength=pixels)
    first_hits = (torch.cumsum(counts, dim=0) - counts)[hits.pixels]
    weights = alpha * torch.exp(before - before[first_hits]).to(alpha.dtype)

    columns = torch.cat([rows, torch.ones_like(depth)[:, None], depth[:, None]], dim=1) * weights[:, None]
    sums = columns.new_zeros(pixels, columns.shape[1]).index_add(0, hits.pixels, columns)
    sums = sums.view(camera.height, camera.width, -1)
    covered = sums[..., -2]
    return Splatted(features=sums[..., :-2], alpha=covered, depth=sums[..., -1] / covered.clamp(min=1e-10))
