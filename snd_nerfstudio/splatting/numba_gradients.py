"""The CPU engine with gradients: compositing forward and backward by numba, projection by torch and its autograd.

Forward finds and sums hits by the same functions as `numba_engine.py`, and keeps the hits: 5 bytes each, in float32.
Backward walks each tile's hits back to front. With `q_i` the upstream gradient times all that Gaussian i brings along,

    q_i = g_features . f_i + g_alpha + g_depth (z_i - depth) / alpha = dL/dw_i
    alpha_i dL/dalpha_i = w_i (q_i - sum_{j behind i} w_j q_j / T_{i+1})

(from `w_j = alpha_j prod_{k before j} (1 - alpha_k)`; 3D Gaussian splatting, Kerbl et al. 2023, section 6): one number
per pixel is carried along, whatever the number of channels. The transmittance is restored by `T_i = T_{i+1} + w_i`.

Each tile writes the gradients of its own Gaussians to rows of its own; the rows of a Gaussian are then added in the
order of the tiles. The result's bits do not depend on the number of threads, nor on which thread was faster.
"""

from dataclasses import replace
from typing import Any, NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.hits import (
    Footprints,
    Tiles,
    compiled,
    compositing_constants,
    depth_bits,
    engine_lock,
    falloff,
    find_tiles,
    fma,
    footprints_of,
    tile_areas,
)
from snd_nerfstudio.splatting.numba_engine import (
    MAX_HITS_PER_PIXEL,
    TILE_PIXELS,
    TILES_PER_TASK,
    find_hits,
    gather_features,
)
from snd_nerfstudio.splatting.projection import TILE_SIZE, project_gaussians

GEOMETRY = 7
"""Columns of a gradient row before those of the features: mean x, mean y, conic xx, xy, yy, opacity, depth."""
MAX_BATCH_BYTES = 1 << 27
"""Tiles are worked off in batches, whose scratch memory is bounded by this (or by what one tile needs)."""


class Hits(NamedTuple):
    """The hits of the tiles [first_tile, end_tile), in the order in which `find_hits` found them."""

    first_tile: int
    end_tile: int
    starts: np.ndarray
    """Start of each tile's run of hits, int64, tiles + 1."""
    pixels: np.ndarray
    """Pixel within the tile, row by row, uint8."""
    weights: np.ndarray
    """`w_i`."""
    counts: np.ndarray
    """Number of consecutive hits of each of the tiles' Gaussians, int32, in the order of `Tiles.gaussians`."""
    transmittances: np.ndarray
    """What remains behind the last hit of each pixel, (tiles, 256)."""


def splat_numba_with_gradients(
    gaussians: Gaussians, camera: PinholeCamera, features: Float[Tensor, "n c"], near: float, far: float
) -> Splatted:
    """Splat on the CPU as `splat_numba` does, and let gradients flow to the Gaussians and the features.

    Hits and their order are taken as given. No gradient flows through an alpha that is capped at 0.999, nor to what was
    skipped or culled: those gradients are exactly zero. Gradients of gradients are not available.

    Args:
        gaussians: The Gaussians, float32 or float64, on the CPU; both passes run in that dtype.
        camera: The camera, of the same dtype; a constant.
        features: One row per Gaussian, of the same dtype.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The splatted view; features, alpha and depth are all differentiable.
    """
    means, quats, scales = (field.view_as(field) for field in (gaussians.means, gaussians.quats, gaussians.scales))
    shape = replace(gaussians, means=means, quats=quats, scales=scales)
    projection = project_gaussians(shape, camera, near=near, far=far)
    touching = (projection.boxes[:, 2] > projection.boxes[:, 0])[:, None]
    for field in (means, quats, scales):
        if field.requires_grad:
            # What was culled may have overflowed on its way to the image, and 0 * inf would be its gradient.
            field.register_hook(lambda gradient: torch.where(touching, gradient, torch.zeros_like(gradient)))
    image, alpha, depth = _Compositing.apply(
        projection.means2d,
        projection.conics,
        gaussians.opacities,
        projection.depths,
        features,
        projection.boxes,
        camera.height,
        camera.width,
    )
    return Splatted(features=image, alpha=alpha, depth=depth)


class _Compositing(torch.autograd.Function):
    """Composite 2D Gaussians into features, alpha and depth; their pixel boxes, int32, say where each may hit."""

    @staticmethod
    def forward(
        ctx: Any,
        means2d: Float[Tensor, "n 2"],
        conics: Float[Tensor, "n 3"],
        opacities: Float[Tensor, "n"],
        depths: Float[Tensor, "n"],
        features: Float[Tensor, "n c"],
        boxes: Int[Tensor, "n 4"],
        height: int,
        width: int,
    ) -> tuple[Float[Tensor, "height width c"], Float[Tensor, "height width"], Float[Tensor, "height width"]]:
        dtype = depths.numpy().dtype
        image = np.empty((height, width, features.shape[1]), dtype)
        alpha = np.empty((height, width), dtype)
        depth = np.empty((height, width), dtype)
        with engine_lock:
            footprints = footprints_of(means2d, conics, depths, boxes, opacities)
            ctx.tiles = find_tiles(footprints, height, width, TILE_SIZE)
            ctx.hits = _composite(ctx.tiles, footprints, features.contiguous().numpy(), (image, alpha, depth))
        results = torch.from_numpy(image), torch.from_numpy(alpha), torch.from_numpy(depth)
        ctx.save_for_backward(means2d, conics, opacities, depths, features, results[1], results[2])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        with engine_lock:
            rows = _gradient_rows(ctx.tiles, ctx.hits, _arrays(*ctx.saved_tensors), _arrays(*upstream))
        gradients = torch.from_numpy(rows)
        geometry = gradients[:, 0:2], gradients[:, 2:5], gradients[:, 5], gradients[:, 6]
        return *geometry, gradients[:, GEOMETRY:], None, None, None


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The tensors as C-ordered arrays, which is what the compiled functions are compiled for."""
    return [tensor.contiguous().numpy() for tensor in tensors]


def _composite(
    tiles: Tiles, footprints: Footprints, features: np.ndarray, results: tuple[np.ndarray, ...]
) -> list[Hits]:
    """Overwrite `results` (image, alpha, depth), sort each tile's Gaussians front to back, and return the hits."""
    dtype = results[0].dtype
    constants = compositing_constants(dtype)
    batches = []
    with numba.parallel_chunksize(TILES_PER_TASK):
        areas = tile_areas(*tiles, footprints.boxes, *results[1].shape, TILE_SIZE)
        capacities = np.minimum(areas, TILE_PIXELS * MAX_HITS_PER_PIXEL)
        for first, end in _batches(capacities * (1 + dtype.itemsize)):
            found_starts = np.concatenate([[0], np.cumsum(capacities[first:end])])
            found = np.empty(found_starts[-1], np.uint8), np.empty(found_starts[-1], dtype)
            counts = np.empty(tiles.starts[end] - tiles.starts[first], np.int32)
            transmittances = np.empty((end - first, TILE_PIXELS), dtype)
            totals = _composite_tiles(
                first, *tiles, footprints.records, depth_bits(footprints), footprints.boxes, features, constants,
                found_starts, *found, counts, transmittances, *results,
            )  # fmt: skip
            starts = np.concatenate([[0], np.cumsum(totals)])
            # Only what was found is kept: far fewer hits than there was room for.
            pixels, weights = np.empty(starts[-1], np.uint8), np.empty(starts[-1], dtype)
            _pack(found_starts, *found, starts, pixels, weights)
            batches.append(Hits(first, end, starts, pixels, weights, counts, transmittances))
    return batches


def _gradient_rows(
    tiles: Tiles, batches: list[Hits], saved: list[np.ndarray], upstream: list[np.ndarray]
) -> np.ndarray:
    """One row of gradients per Gaussian: GEOMETRY columns, then those of the features."""
    features = saved[4]
    constants = compositing_constants(features.dtype)
    total = np.zeros((len(features), GEOMETRY + features.shape[1]), features.dtype)
    for hits in batches:
        entries = np.diff(tiles.starts[hits.first_tile : hits.end_tile + 1])
        for first, end in _batches(entries * (total.shape[1] * total.itemsize)):
            first_tile, end_tile = hits.first_tile + first, hits.first_tile + end
            with numba.parallel_chunksize(TILES_PER_TASK):
                rows = _push_back_tiles(first_tile, end_tile, tiles.starts, tiles.gaussians, *hits, *saved, *upstream,
                                        constants)  # fmt: skip
            members = tiles.gaussians[tiles.starts[first_tile] : tiles.starts[end_tile]]
            with numba.parallel_chunksize(1):
                _add_rows(total, members, rows, numba.get_num_threads())
    return total


def _batches(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Consecutive ranges (first, end) of tiles whose sizes add up to no more than MAX_BATCH_BYTES, or of one tile."""
    ends = np.cumsum(sizes)
    ranges, first = [], 0
    while first < len(sizes):
        before = ends[first] - sizes[first]
        end = max(first + 1, int(np.searchsorted(ends, before + MAX_BATCH_BYTES, side="right")))
        ranges.append((first, end))
        first = end
    return ranges


@compiled(parallel=True)
@no_type_check
def _composite_tiles(
    first_tile, tile_starts, tile_gaussians, records, bits, boxes, features, constants, found_starts,
    found_pixels, found_weights, counts, transmittances, image, alpha, depth,
):  # fmt: skip
    """Composite a batch of tiles, keep its hits in `found_*`, and return each tile's number of them."""
    height, width = alpha.shape
    tiles_across = (width + TILE_SIZE - 1) // TILE_SIZE
    tiles = found_starts.size - 1
    totals = np.empty(tiles, np.int64)
    for index in numba.prange(tiles):
        tile = first_tile + index
        first_y, first_x = tile // tiles_across * TILE_SIZE, tile % tiles_across * TILE_SIZE
        members = tile_gaussians[tile_starts[tile] : tile_starts[tile + 1]]
        pixels = found_pixels[found_starts[index] : found_starts[index + 1]]
        weights = found_weights[found_starts[index] : found_starts[index + 1]]
        hit_gaussians = np.empty(pixels.size, np.int32)
        hits = find_hits(
            members, records, bits, boxes, constants, height, width, first_y, first_x,
            transmittances[index], pixels, hit_gaussians, weights,
        )  # fmt: skip
        gather_features(
            pixels[:hits], hit_gaussians, weights, transmittances[index], records, features, constants,
            first_y, first_x, image, alpha, depth,
        )  # fmt: skip
        hit = 0
        for entry in range(tile_starts[tile], tile_starts[tile + 1]):
            start = hit
            while hit < hits and hit_gaussians[hit] == tile_gaussians[entry]:
                hit += 1
            counts[entry - tile_starts[first_tile]] = hit - start
        totals[index] = hits
    return totals


@compiled(parallel=True)
@no_type_check
def _pack(found_starts, found_pixels, found_weights, starts, pixels, weights):
    """Copy each tile's hits from their roomy place to their own."""
    for tile in numba.prange(starts.size - 1):
        start, end, found = starts[tile], starts[tile + 1], found_starts[tile]
        pixels[start:end] = found_pixels[found : found + end - start]
        weights[start:end] = found_weights[found : found + end - start]


@compiled(parallel=True)
@no_type_check
def _push_back_tiles(
    first_tile, end_tile, tile_starts, tile_gaussians, first_kept, end_kept, hit_starts, hit_pixels, hit_weights,
    counts, transmittances, means2d, conics, opacities, depths, features, alpha, depth, image_grad, alpha_grad,
    depth_grad, constants,
):  # fmt: skip
    """Gradient rows of the tiles [first_tile, end_tile) out of the batch of hits, in the order of `tile_gaussians`."""
    width = alpha.shape[1]
    tiles_across = (width + TILE_SIZE - 1) // TILE_SIZE
    first_entry, first_count = tile_starts[first_tile], tile_starts[first_kept]
    rows = np.empty((tile_starts[end_tile] - first_entry, GEOMETRY + features.shape[1]), features.dtype)
    for tile in numba.prange(first_tile, end_tile):
        first_y, first_x = tile // tiles_across * TILE_SIZE, tile % tiles_across * TILE_SIZE
        kept, start, end = tile - first_kept, tile_starts[tile], tile_starts[tile + 1]
        weight_grads, depth_sum_grads = _gradients_of_sums(alpha, depth, alpha_grad, depth_grad, first_y, first_x)
        _push_back_hits(
            tile_gaussians[start:end], counts[start - first_count : end - first_count],
            hit_pixels[hit_starts[kept] : hit_starts[kept + 1]], hit_weights[hit_starts[kept] : hit_starts[kept + 1]],
            transmittances[kept].copy(), weight_grads, depth_sum_grads, image_grad, means2d, conics, opacities, depths,
            features, constants, first_y, first_x, rows[start - first_entry : end - first_entry],
        )  # fmt: skip
    return rows


@compiled()
@no_type_check
def _gradients_of_sums(alpha, depth, alpha_grad, depth_grad, first_y, first_x):
    """Per pixel of a tile, the gradients of `sum_i w_i` and of `sum_i w_i z_i`, whose ratio the depth is."""
    height, width = alpha.shape
    weight_grads = np.zeros(TILE_PIXELS, alpha.dtype)
    depth_sum_grads = np.zeros(TILE_PIXELS, alpha.dtype)
    for y in range(first_y, min(first_y + TILE_SIZE, height)):
        for x in range(first_x, min(first_x + TILE_SIZE, width)):
            if alpha[y, x] > 0:
                pixel = (y - first_y) * TILE_SIZE + x - first_x
                depth_sum_grads[pixel] = depth_grad[y, x] / alpha[y, x]
                weight_grads[pixel] = alpha_grad[y, x] - depth_sum_grads[pixel] * depth[y, x]
    return weight_grads, depth_sum_grads


@compiled(fastmath={"contract"})
@no_type_check
def _push_back_hits(
    members, counts, hit_pixels, hit_weights, transmittance, weight_grads, depth_sum_grads, image_grad, means2d,
    conics, opacities, depths, features, constants, first_y, first_x, rows,
):  # fmt: skip
    """Walk one tile's hits back to front and write the gradient row of every member.

    `transmittance` comes as that behind each pixel's last hit and is used up.
    """
    max_alpha, half = constants[0], constants[3]
    zero = half - half
    behind = np.zeros(TILE_PIXELS, rows.dtype)  # sum of w_j q_j over the hits behind
    end = hit_pixels.size
    for member in range(members.size - 1, -1, -1):
        g = members[member]
        row, feature = rows[member], features[g]
        feature_grad = row[GEOMETRY:]
        row[:] = zero
        if counts[member] == 0:
            continue
        mean_x, mean_y, z = means2d[g, 0] - half, means2d[g, 1] - half, depths[g]
        may_be_capped = opacities[g] > max_alpha
        # Moments of s = alpha dL/dalpha over the offsets from the centre, and the gradient of z.
        s_0, s_x, s_y, s_xx, s_xy, s_yy, z_grad = zero, zero, zero, zero, zero, zero, zero
        for hit in range(end - 1, end - 1 - counts[member], -1):
            pixel, weight = np.int64(hit_pixels[hit]), hit_weights[hit]
            y, x = first_y + pixel // TILE_SIZE, first_x + pixel % TILE_SIZE
            upstream = image_grad[y, x]
            q = weight_grads[pixel] + depth_sum_grads[pixel] * z
            for channel in range(feature.size):
                q += upstream[channel] * feature[channel]
                feature_grad[channel] += weight * upstream[channel]
            z_grad += weight * depth_sum_grads[pixel]
            s = weight * (q - behind[pixel] / transmittance[pixel])
            behind[pixel] += weight * q
            transmittance[pixel] += weight
            dx, dy = mean_x - means2d.dtype.type(x), mean_y - means2d.dtype.type(y)
            if may_be_capped and _is_capped(dx, dy, conics[g], opacities[g], max_alpha, half):
                continue
            s_0 += s
            s_x += s * dx
            s_y += s * dy
            s_xx += s * dx * dx
            s_xy += s * dx * dy
            s_yy += s * dy * dy
        end -= counts[member]
        row[0] = -(conics[g, 0] * s_x + conics[g, 1] * s_y)
        row[1] = -(conics[g, 1] * s_x + conics[g, 2] * s_y)
        row[2] = -half * s_xx
        row[3] = -s_xy
        row[4] = -half * s_yy
        row[5] = s_0 / opacities[g]
        row[6] = z_grad


@compiled()
@no_type_check
def _is_capped(dx, dy, conic, opacity, max_alpha, half):
    """Whether `weigh_box` capped this hit: its operations in its order."""
    exponent = fma(fma(half * conic[0], dx, conic[1] * dy), dx, half * conic[2] * dy * dy)
    return opacity * falloff(exponent) > max_alpha


@compiled(parallel=True)
@no_type_check
def _add_rows(total, gaussians, rows, parts):
    """`total[gaussians[i]] += rows[i]` in order of i; each of `parts` ranges of Gaussians goes to one thread."""
    for part in numba.prange(parts):
        first, end = part * total.shape[0] // parts, (part + 1) * total.shape[0] // parts
        for entry in range(gaussians.size):
            g = gaussians[entry]
            if first <= g < end:
                summed, addend = total[g], rows[entry]
                for column in range(summed.size):
                    summed[column] += addend[column]
