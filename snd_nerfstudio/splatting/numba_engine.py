"""The CPU engine: tiles in parallel, and all channels in one pass, compiled by numba.

Per 16 x 16 tile, the work is split in two so that each half is fast. First the weights, which need no features
(`hits.py`): the tile's Gaussians are walked front to back, each over the rows of its own pixel box, with the tile's
transmittances in the L1 cache; every hit is noted as (pixel, Gaussian, weight). Then the features, which need no
geometry: the hits are grouped by pixel, and each pixel's feature row is summed in one place from the rows of its
Gaussians, which neighbouring pixels share and which therefore sit in the L2 cache.

Each pixel belongs to one tile and each tile to one thread, and nothing is reduced across threads: the result's bits do
not depend on the number of threads.
"""

from typing import no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.hits import (
    LANES,
    compiled,
    compositing_constants,
    depth_bits,
    engine_lock,
    find_tiles,
    front_to_back,
    project_footprints,
    tile_areas,
    weigh_box,
)
from snd_nerfstudio.splatting.projection import TILE_SIZE

TILE_PIXELS = TILE_SIZE * TILE_SIZE
MAX_HITS_PER_PIXEL = 2400
"""A hit leaves at most 254/255 of the transmittance, which stays above 1e-4: 2344 hits, and some for rounding."""
TILES_PER_TASK = 4
"""Tiles that a thread takes at a time: few enough to balance crowded tiles, enough to be cheap."""
PACKED = 11
"""What `find_hits` reads of a Gaussian: seven columns of its record, and its box."""


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
    # Allocated by numpy, which asks for huge pages: a fresh large torch tensor spends longer in page faults.
    dtype = gaussians.means.numpy().dtype
    height, width = camera.height, camera.width
    image = np.empty((height, width, features.shape[1]), dtype)
    alpha = np.empty((height, width), dtype)
    depth = np.empty((height, width), dtype)
    with engine_lock:
        footprints = project_footprints(gaussians, camera, near, far)
        tiles = find_tiles(footprints, height, width, TILE_SIZE)
        with numba.parallel_chunksize(TILES_PER_TASK):
            areas = tile_areas(*tiles, footprints.boxes, height, width, TILE_SIZE)
            _composite_tiles(
                *tiles, areas, footprints.records, depth_bits(footprints), footprints.boxes,
                features.contiguous().numpy(), compositing_constants(dtype), image, alpha, depth,
            )  # fmt: skip
    return Splatted(features=torch.from_numpy(image), alpha=torch.from_numpy(alpha), depth=torch.from_numpy(depth))


@compiled(parallel=True)
@no_type_check
def _composite_tiles(
    tile_starts, tile_gaussians, tile_areas, records, bits, boxes, features, constants, image, alpha, depth
):
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
            members, records, bits, boxes, constants, height, width, first_y, first_x,
            transmittance, hit_pixels, hit_gaussians, hit_weights,
        )  # fmt: skip
        gather_features(
            hit_pixels[:hits], hit_gaussians, hit_weights, transmittance, records, features, constants,
            first_y, first_x, image, alpha, depth,
        )  # fmt: skip


@compiled()
@no_type_check
def find_hits(
    members, records, bits, boxes, constants, height, width, first_y, first_x,
    transmittance, hit_pixels, hit_gaussians, hit_weights,
):  # fmt: skip
    """Walk one tile's Gaussians front to back; note every hit's (pixel, Gaussian, weight); return their number.

    `members` are sorted front to back in place. `transmittance` (256, overwritten) ends as the transmittance behind the
    last hit of each pixel.
    """
    packed = np.empty((members.size, PACKED), records.dtype)
    keys = np.empty(members.size, bits.dtype)
    for i in range(members.size):
        g = members[i]
        for column in range(7):
            packed[i, column] = records[g, column]
        keys[i] = bits[g, 7]
        for side in range(4):
            packed[i, 7 + side] = boxes[g, side]
    order = front_to_back(keys)
    by_index = members.copy()
    stride = np.uint64(TILE_SIZE + LANES)
    behind = np.ones(TILE_SIZE * (TILE_SIZE + LANES), records.dtype)
    weights, line = np.empty(TILE_SIZE * LANES, records.dtype), np.empty(LANES, records.dtype)
    end_y, end_x = min(first_y + TILE_SIZE, height), min(first_x + TILE_SIZE, width)
    hits = 0
    for number in range(order.size):
        m = np.uint64(order[number])
        g = by_index[m]
        members[number] = g
        low_x, low_y = max(np.int64(packed[m, 7]), first_x), max(np.int64(packed[m, 8]), first_y)
        columns = min(np.int64(packed[m, 9]), end_x) - low_x
        rows = min(np.int64(packed[m, 10]), end_y) - low_y
        weigh_box(
            behind, stride, np.uint64(low_y - first_y) * stride + np.uint64(low_x - first_x), weights, line, low_x,
            low_y, columns, rows, packed[m, 0], packed[m, 1], packed[m, 2], packed[m, 3], packed[m, 4], packed[m, 5],
            packed[m, 6], constants,
        )  # fmt: skip
        for row in range(rows):
            pixel = (low_y - first_y + row) * TILE_SIZE + low_x - first_x
            for column in range(columns):
                weight = weights[np.uint64(row * LANES + column)]
                if weight > 0:
                    at = np.uint64(hits)
                    hit_pixels[at] = pixel + column
                    hit_gaussians[at] = g
                    hit_weights[at] = weight
                    hits += 1
    for y in range(TILE_SIZE):
        for x in range(TILE_SIZE):
            transmittance[y * TILE_SIZE + x] = abs(behind[y * (TILE_SIZE + LANES) + x])
    return hits


@compiled(fastmath={"contract"})
@no_type_check
def gather_features(
    hit_pixels, hit_gaussians, hit_weights, transmittance, records, features, constants,
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
                depth_sum += weights[hit] * records[gaussians[hit], 7]
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
