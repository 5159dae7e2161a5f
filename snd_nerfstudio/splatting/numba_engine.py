"""The CPU engine: tiles in parallel, and all channels in one pass, compiled by numba.

Per 16 x 16 tile, the work is split in two so that each half is fast. First the weights, which need no features: the
tile's Gaussians are walked front to back, each over the rows of its own pixel box, with the tile's transmittances in
the L1 cache; every hit is noted as (pixel, Gaussian, weight). Then the features, which need no geometry: the hits are
grouped by pixel, and each pixel's feature row is summed in one place from the rows of its Gaussians, which neighbouring
pixels share and which therefore sit in the L2 cache.

Each pixel belongs to one tile and each tile to one thread, and nothing is reduced across threads: the result's bits do
not depend on the number of threads.

All compiled functions of this path live in this one file, because numba's on-disk cache notices changes of a function's
own file only: clear __pycache__ if TILE_SIZE ever changes, which is compiled in here, or if `find_hits` or
`gather_features` do, which are compiled into `numba_gradients.py` too. They carry `no_type_check`, because numba can
compile a function but not the run-time shape checker around it.
"""

import threading
from typing import Any, Callable, NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.projection import (
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    TILE_SIZE,
    exponent_limits,
    project_gaussians,
)

TILE_PIXELS = TILE_SIZE * TILE_SIZE
MAX_HITS_PER_PIXEL = 2400
"""A hit leaves at most 254/255 of the transmittance, which stays above 1e-4: 2344 hits, and some for rounding."""
TILES_PER_TASK = 4
"""Tiles that a thread takes at a time: few enough to balance crowded tiles, enough to be cheap."""
RADIX_BITS = 11
"""Digit width of the depth sort: 2048 counters stay in the L1 cache."""

# Not every threading layer of numba may be entered by two Python threads at once (viewer and trainer).
engine_lock = threading.Lock()


class Tiles(NamedTuple):
    """Gaussians by the 16 x 16 tile that they touch; tiles are numbered row by row."""

    starts: np.ndarray
    """Start of each tile's run in `gaussians`, int64, tiles + 1."""
    gaussians: np.ndarray
    """Indices of Gaussians, int32, run after run, front to back within each."""
    areas: np.ndarray
    """Number of (Gaussian, pixel) pairs that the boxes hold in each tile, int64."""


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` with the on-disk cache where a cache directory can be written, and without it elsewhere."""

    def decorate(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither __pycache__ nor NUMBA_CACHE_DIR can be written
            return numba.njit(**options)(function)

    return decorate


def splat_numba(
    gaussians: Gaussians, camera: PinholeCamera, features: Float[Tensor, "n c"], near: float, far: float
) -> Splatted:
    """Splat on the CPU; the first call for a dtype compiles (seconds, then cached on disk).

    The number of threads is numba's own (`numba.set_num_threads`, `NUMBA_NUM_THREADS`).

    Args:
        gaussians: The Gaussians, float32 or float64, on the CPU; the compositing runs in that dtype.
        camera: The camera, of the same dtype.
        features: One row per Gaussian, of the same dtype.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The splatted view.
    """
    projection = project_gaussians(gaussians, camera, near=near, far=far)
    # Allocated by numpy, which asks for huge pages: a fresh large torch tensor spends longer in page faults.
    dtype = projection.depths.numpy().dtype
    image = np.empty((camera.height, camera.width, features.shape[1]), dtype)
    alpha = np.empty((camera.height, camera.width), dtype)
    depth = np.empty((camera.height, camera.width), dtype)
    with engine_lock, numba.parallel_chunksize(TILES_PER_TASK):
        tiles = sort_into_tiles(projection.depths, projection.boxes, camera.height, camera.width)
        _composite_tiles(
            *tiles,
            projection.means2d.contiguous().numpy(),
            projection.conics.contiguous().numpy(),
            gaussians.opacities.contiguous().numpy(),
            exponent_limits(gaussians.opacities).numpy(),
            projection.boxes.numpy(),
            projection.depths.contiguous().numpy(),
            features.contiguous().numpy(),
            compositing_constants(dtype),
            image,
            alpha,
            depth,
        )
    return Splatted(features=torch.from_numpy(image), alpha=torch.from_numpy(alpha), depth=torch.from_numpy(depth))


def sort_into_tiles(depths: Float[Tensor, "n"], boxes: Int[Tensor, "n 4"], height: int, width: int) -> Tiles:
    """The Gaussians of each tile, front to back, ties in order of index; depths are positive where a box is not empty.

    The caller holds `engine_lock`.
    """
    keys, pixel_boxes = depths.contiguous().numpy(), boxes.numpy()
    visible = np.flatnonzero(pixel_boxes[:, 2] > pixel_boxes[:, 0])
    # The bits of positive floats sort like the floats.
    order = _stable_order(keys[visible].view(np.uint32 if keys.dtype == np.float32 else np.uint64))
    return Tiles(*_bin_to_tiles(visible[order].astype(np.int32), pixel_boxes, height, width))


def compositing_constants(dtype: np.dtype) -> np.ndarray:
    """MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, one half and one, as `find_hits` takes them."""
    return np.array([MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, 0.5, 1.0], dtype)


@compiled()
@no_type_check
def _stable_order(keys: np.ndarray) -> np.ndarray:
    """Indices that sort unsigned integers, equal ones kept in order (least-significant-digit radix sort)."""
    n = keys.size
    order, scratch = np.arange(n), np.empty(n, np.int64)
    differing = keys[:1].copy()
    differing[:] = 0
    for i in range(n):
        differing[0] |= keys[i] ^ keys[0]
    digit_mask = (1 << RADIX_BITS) - 1
    for shift in range(0, keys.itemsize * 8, RADIX_BITS):
        if n == 0 or (differing[0] >> np.uint64(shift)) & np.uint64(digit_mask) == 0:
            continue  # all keys share this digit
        starts = np.zeros(digit_mask + 2, np.int64)
        for i in range(n):
            starts[((keys[i] >> np.uint64(shift)) & np.uint64(digit_mask)) + np.uint64(1)] += 1
        for digit in range(digit_mask):
            starts[digit + 1] += starts[digit]
        for i in range(n):
            digit = np.int64((keys[order[i]] >> np.uint64(shift)) & np.uint64(digit_mask))
            scratch[starts[digit]] = order[i]
            starts[digit] += 1
        order, scratch = scratch, order
    return order


@compiled()
@no_type_check
def _bin_to_tiles(
    front_to_back: np.ndarray, boxes: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counting sort of Gaussians into the tiles that their pixel boxes overlap, front to back within each tile.

    Returns:
        The fields of `Tiles`.
    """
    tiles_across = (width + TILE_SIZE - 1) // TILE_SIZE
    tiles_down = (height + TILE_SIZE - 1) // TILE_SIZE
    starts = np.zeros(tiles_across * tiles_down + 1, np.int64)
    areas = np.zeros(tiles_across * tiles_down, np.int64)
    for g in front_to_back:
        first_x, first_y, end_x, end_y = boxes[g]
        for tile_y in range(first_y // TILE_SIZE, (end_y - 1) // TILE_SIZE + 1):
            rows = min(end_y, (tile_y + 1) * TILE_SIZE) - max(first_y, tile_y * TILE_SIZE)
            for tile_x in range(first_x // TILE_SIZE, (end_x - 1) // TILE_SIZE + 1):
                columns = min(end_x, (tile_x + 1) * TILE_SIZE) - max(first_x, tile_x * TILE_SIZE)
                starts[tile_y * tiles_across + tile_x + 1] += 1
                areas[tile_y * tiles_across + tile_x] += rows * columns
    starts = np.cumsum(starts)
    cursors = starts[:-1].copy()
    members = np.empty(starts[-1], np.int32)
    for g in front_to_back:
        first_x, first_y, end_x, end_y = boxes[g]
        for tile_y in range(first_y // TILE_SIZE, (end_y - 1) // TILE_SIZE + 1):
            for tile_x in range(first_x // TILE_SIZE, (end_x - 1) // TILE_SIZE + 1):
                tile = tile_y * tiles_across + tile_x
                members[cursors[tile]] = g
                cursors[tile] += 1
    return starts, members, areas


@compiled(parallel=True)
@no_type_check
def _composite_tiles(
    tile_starts: np.ndarray,
    tile_gaussians: np.ndarray,
    tile_areas: np.ndarray,
    means2d: np.ndarray,
    conics: np.ndarray,
    opacities: np.ndarray,
    limits: np.ndarray,
    boxes: np.ndarray,
    depths: np.ndarray,
    features: np.ndarray,
    constants: np.ndarray,
    image: np.ndarray,
    alpha: np.ndarray,
    depth: np.ndarray,
) -> None:
    """Composite every tile, tiles in parallel, into `image`, `alpha` and `depth` (overwritten)."""
    height, width = alpha.shape
    tiles_across = (width + TILE_SIZE - 1) // TILE_SIZE
    for tile in numba.prange(tile_areas.size):
        first_y, first_x = tile // tiles_across * TILE_SIZE, tile % tiles_across * TILE_SIZE
        members = tile_gaussians[tile_starts[tile] : tile_starts[tile + 1]]
        capacity = min(tile_areas[tile], TILE_PIXELS * MAX_HITS_PER_PIXEL)
        hit_pixels = np.empty(capacity, np.int32)
        hit_gaussians = np.empty(capacity, np.int32)
        hit_weights = np.empty(capacity, features.dtype)
        transmittance = np.empty(TILE_PIXELS, features.dtype)
        hits = find_hits(
            members, means2d, conics, opacities, limits, boxes, constants, height, width, first_y, first_x,
            transmittance, hit_pixels, hit_gaussians, hit_weights,
        )  # fmt: skip
        gather_features(
            hit_pixels[:hits], hit_gaussians, hit_weights, transmittance, depths, features, constants,
            first_y, first_x, image, alpha, depth,
        )  # fmt: skip


@compiled()
@no_type_check
def find_hits(
    members, means2d, conics, opacities, limits, boxes, constants, height, width, first_y, first_x,
    transmittance, hit_pixels, hit_gaussians, hit_weights,
):  # fmt: skip
    """Walk one tile's Gaussians front to back; note every hit's (pixel, Gaussian, weight); return their number.

    `transmittance` (256, overwritten) ends as the transmittance behind the last hit of each pixel.
    """
    # Constants come as an array in the working dtype: a float literal would promote float32 arithmetic to float64.
    max_alpha, min_alpha, min_transmittance, half, one = constants
    transmittance[:] = one
    finished = np.zeros(TILE_PIXELS, np.bool_)
    end_y, end_x = min(first_y + TILE_SIZE, height), min(first_x + TILE_SIZE, width)
    unfinished = (end_y - first_y) * (end_x - first_x)
    hits = 0
    for g in members:
        mean_x, mean_y = means2d[g, 0] - half, means2d[g, 1] - half
        half_xx, xy, half_yy = half * conics[g, 0], conics[g, 1], half * conics[g, 2]
        opacity, limit = opacities[g], limits[g]
        column_range = range(max(boxes[g, 0], first_x), min(boxes[g, 2], end_x))
        for y in range(max(boxes[g, 1], first_y), min(boxes[g, 3], end_y)):
            dy = mean_y - means2d.dtype.type(y)
            row_term, row_slope = half_yy * dy * dy, xy * dy
            row = (y - first_y) * TILE_SIZE - first_x
            for x in column_range:
                dx = mean_x - means2d.dtype.type(x)
                exponent = half_xx * dx * dx + row_term + row_slope * dx
                # Written so that a NaN is skipped; beyond the limit alpha is surely too faint, without computing it.
                if not (exponent >= 0 and exponent <= limit) or finished[row + x]:
                    continue
                hit_alpha = min(max_alpha, opacity * np.exp(-exponent))
                if hit_alpha < min_alpha:
                    continue
                remaining = transmittance[row + x] * (one - hit_alpha)
                if remaining <= min_transmittance:
                    finished[row + x] = True
                    unfinished -= 1
                    continue
                hit_pixels[hits] = row + x
                hit_gaussians[hits] = g
                hit_weights[hits] = hit_alpha * transmittance[row + x]
                hits += 1
                transmittance[row + x] = remaining
        if unfinished == 0:
            break
    return hits


@compiled(fastmath={"contract"})
@no_type_check
def gather_features(
    hit_pixels, hit_gaussians, hit_weights, transmittance, depths, features, constants,
    first_y, first_x, image, alpha, depth,
):  # fmt: skip
    """Group one tile's hits by pixel, front to back, and sum features, alpha and depth of each pixel."""
    height, width = alpha.shape
    starts = np.zeros(TILE_PIXELS + 1, np.int64)
    for pixel in hit_pixels:
        starts[pixel + 1] += 1
    starts = np.cumsum(starts)
    cursors = starts[:-1].copy()
    gaussians = np.empty(hit_pixels.size, np.int32)
    weights = np.empty(hit_pixels.size, hit_weights.dtype)
    for hit in range(hit_pixels.size):
        slot = cursors[hit_pixels[hit]]
        gaussians[slot] = hit_gaussians[hit]
        weights[slot] = hit_weights[hit]
        cursors[hit_pixels[hit]] = slot + 1

    one = constants[4]
    zero = one - one
    for y in range(first_y, min(first_y + TILE_SIZE, height)):
        for x in range(first_x, min(first_x + TILE_SIZE, width)):
            pixel = (y - first_y) * TILE_SIZE + x - first_x
            start, stop = starts[pixel], starts[pixel + 1]
            weight_sum, depth_sum = zero, zero
            for hit in range(start, stop):
                weight_sum += weights[hit]
                depth_sum += weights[hit] * depths[gaussians[hit]]
            alpha[y, x] = one - transmittance[pixel]
            depth[y, x] = depth_sum / weight_sum if stop > start else zero
            _sum_rows(image[y, x], features, gaussians, weights, start, stop)


@compiled(fastmath={"contract"})
@no_type_check
def _sum_rows(total, features, rows, weights, start, stop):
    """`total = sum over hits in [start, stop) of weight * features[row]`, four rows at a time.

    Four at a time, because `total` is then read and written once per four rows. Rows are sliced before the loop over
    channels: that is what lets the compiler use vector instructions.
    """
    total[:] = 0
    hit = start
    while hit + 4 <= stop:
        first, second = features[rows[hit]], features[rows[hit + 1]]
        third, fourth = features[rows[hit + 2]], features[rows[hit + 3]]
        a, b, c, d = weights[hit], weights[hit + 1], weights[hit + 2], weights[hit + 3]
        for channel in range(total.size):
            total[channel] += a * first[channel] + b * second[channel] + c * third[channel] + d * fourth[channel]
        hit += 4
    while hit < stop:
        row, weight = features[rows[hit]], weights[hit]
        for channel in range(total.size):
            total[channel] += weight * row[channel]
        hit += 1
