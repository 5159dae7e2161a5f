"""Kernels for `supervision.py`: the teacher's path on full-resolution maps, as fast as it was found to go on a CPU.

Splatting weights come from the package's own functions, so that all variants composite the same hits.
"""

from typing import no_type_check

import numba
import numpy as np

from snd_nerfstudio.splatting.hits import LANES, compiled, front_to_back, weigh_box
from snd_nerfstudio.splatting.numba_engine import MAX_HITS_PER_PIXEL, TILE_PIXELS, find_hits
from snd_nerfstudio.splatting.projection import TILE_SIZE


@compiled(parallel=True, fastmath={"contract"})
@no_type_check
def upsample_pixels(tokens, bases, weights, offsets, boxes, features, chunks):
    """The feature of every Gaussian that hits anything, from four tokens, into `features` (the rest stays as it is)."""
    n = features.shape[0]
    for chunk in numba.prange(chunks):
        for g in range(chunk * n // chunks, (chunk + 1) * n // chunks):
            if boxes[g, 2] <= boxes[g, 0]:
                continue
            base = bases[g]
            first, second = tokens[base], tokens[base + offsets[1]]
            third, fourth = tokens[base + offsets[2]], tokens[base + offsets[3]]
            a, b, c, d = weights[g, 0], weights[g, 1], weights[g, 2], weights[g, 3]
            row = features[g]
            for channel in range(row.size):
                row[channel] = a * first[channel] + b * second[channel] + c * third[channel] + d * fourth[channel]


@compiled(parallel=True)
@no_type_check
def composite_blocks(
    tile_starts, tile_gaussians, tile_areas, records, bits, boxes, features, constants, block, image, alpha
):
    """As the engine's compositing, but in blocks of channels.

    A pixel's neighbours share most of its Gaussians: of a block of channels their rows fit the L1 cache together.
    """
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
        _gather_blocks(
            hit_pixels[:hits], hit_gaussians, hit_weights, transmittance, features, constants, first_y, first_x, block,
            image, alpha,
        )  # fmt: skip


@compiled()
@no_type_check
def _gather_blocks(
    hit_pixels, hit_gaussians, hit_weights, transmittance, features, constants, first_y, first_x, block, image, alpha
):
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
    channels = features.shape[1]
    for low in range(0, channels, block):
        high = min(low + block, channels)
        for y in range(first_y, min(first_y + TILE_SIZE, height)):
            for x in range(first_x, min(first_x + TILE_SIZE, width)):
                pixel = (y - first_y) * TILE_SIZE + x - first_x
                alpha[y, x] = constants[4] - transmittance[pixel]
                _sum_block(image[y, x, low:high], features, low, high, gaussians, weights, starts[pixel], starts[pixel + 1])


@compiled(fastmath={"contract"})
@no_type_check
def _sum_block(total, features, low, high, rows, weights, start, stop):
    total[:] = 0
    hit = start
    while hit + 4 <= stop:
        first, second = features[rows[hit], low:high], features[rows[hit + 1], low:high]
        third, fourth = features[rows[hit + 2], low:high], features[rows[hit + 3], low:high]
        a, b, c, d = weights[hit], weights[hit + 1], weights[hit + 2], weights[hit + 3]
        for channel in range(total.size):
            total[channel] += a * first[channel] + b * second[channel] + c * third[channel] + d * fourth[channel]
        hit += 4
    while hit < stop:
        row, weight = features[rows[hit], low:high], weights[hit]
        for channel in range(total.size):
            total[channel] += weight * row[channel]
        hit += 1
