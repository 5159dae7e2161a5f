"""The teacher's path on full-resolution maps, as fast as it was found to go on a CPU: `supervision.py` measures it.

Projection, tiles and splatting weights are the package's own, so that all variants composite the same hits. Buffers
are made in the first run and used again in the next.

Tried, not faster, and therefore not here: compositing in blocks of 64 to 192 of 384 channels (up to 25 % more time),
sums over eight hits at a time (70 % more), 32 channels by `composite_three`'s scheme (five times the time).
"""

from dataclasses import dataclass, field
from typing import Optional, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from measuring import Seconds, timed
from torch import Tensor

from snd_nerfstudio.splatting import Gaussians, PinholeCamera
from snd_nerfstudio.splatting.hits import (
    CHUNKS_PER_THREAD,
    LANES,
    Footprints,
    Tiles,
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
from snd_nerfstudio.splatting.numba_engine import TILES_PER_TASK, _composite_tiles
from snd_nerfstudio.splatting.projection import FAR, NEAR, TILE_SIZE
from snd_nerfstudio.supervision.dense import EMPTY
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_builder import _interpolation, compact_labels, pooling_axis
from snd_nerfstudio.supervision.token_kernel import Axis, Interpolation, Regions

SIDE = 48
"""Side of a tile for three channels, pixels: five planes of it fit the L1 cache."""
STRIDE = SIDE + LANES
PACKED = 11
"""Seven columns of a record and a box."""


@dataclass
class DensePath:
    """Context tokens to target tokens in passes of some channels; projection, sorting and weights of U are shared."""

    context_masks: Int[Tensor, "v H W"]
    gaussians: Gaussians
    camera: PinholeCamera
    target_mask: Int[Tensor, "H W"]
    settings: SupervisionSettings
    width: int
    """Channels of a pass; those of three have a kernel of their own."""
    seconds: list[Seconds] = field(default_factory=list)
    """Of each pass of the last run."""
    _buffers: dict[str, np.ndarray] = field(default_factory=dict)

    def __call__(
        self, context_tokens: Float[Tensor, "v h w c"], passes: Optional[int] = None
    ) -> Float[Tensor, "h w c"]:
        """Target tokens; after the first few passes only, if their number is given, with the rest left unset."""
        views, h, w, channels = context_tokens.shape
        height, width = self.target_mask.shape
        settings, dtype = self.settings, self.gaussians.dtype
        flat = context_tokens.reshape(-1, channels).numpy()
        rows = pooling_axis(h, height, settings.pooling, dtype)
        columns = pooling_axis(w, width, settings.pooling, dtype)
        labels, count = compact_labels(self.target_mask)
        regions = Regions(labels.numpy(), np.empty((0, 0), np.uint8), count)
        result = np.empty((h * w, channels), flat.dtype)
        self.seconds = []
        with engine_lock:
            size = self.context_masks.shape[1], self.context_masks.shape[2]
            lift, _ = _interpolation(self.context_masks, size, (h, w), views, settings, dtype)
            footprints = project_footprints(self.gaussians, self.camera, NEAR, FAR)
            tiles = find_tiles(footprints, height, width, SIDE if self.width == 3 else TILE_SIZE)
            packed = self._pack(tiles, footprints) if self.width == 3 else None
            for low in list(range(0, channels, self.width))[:passes]:
                part = slice(low, low + self.width)
                seconds, _ = timed(
                    lambda part=part: self._pass(
                        flat[:, part], lift, footprints, tiles, packed, regions, rows, columns, result[:, part]
                    )
                )
                self.seconds.append(seconds)
        return torch.from_numpy(result).view(h, w, channels)

    def _pass(
        self,
        tokens: np.ndarray,
        lift: Interpolation,
        footprints: Footprints,
        tiles: Tiles,
        packed: Optional[np.ndarray],
        regions: Regions,
        rows: Axis,
        columns: Axis,
        result: np.ndarray,
    ) -> None:
        """Write some channels of the target tokens."""
        tokens, dtype = np.ascontiguousarray(tokens), tokens.dtype
        (height, width), channels = regions.labels.shape, tokens.shape[1]
        chunks = CHUNKS_PER_THREAD * numba.get_num_threads()
        weighted, blending = self.settings.weighting == "coverage", self.settings.blending
        alpha = self._buffer("alpha", (height, width), dtype)
        features = self._buffer("features", (len(self.gaussians), channels), dtype)
        image = self._buffer("image", (height, width, channels), dtype)
        upsample_pixels(tokens, *lift, footprints.boxes, features, chunks)
        if packed is None:
            self._composite(tiles, footprints, features, image, alpha)
        else:
            with numba.parallel_chunksize(1):
                composite_three(*tiles, packed, features, compositing_constants(dtype), image, alpha)
        sums, mass = region_sums(image, alpha, regions.labels, regions.count, weighted, chunks)
        means = sums.sum(axis=0) / np.maximum(mass.sum(axis=0), np.finfo(dtype).tiny)[:, None]
        blend_and_pool(
            image, alpha, regions.labels, means.astype(dtype), *rows[:3], *columns[:3],
            np.array([blending, 1 - blending, EMPTY, 1], dtype), weighted, result,
        )  # fmt: skip

    def _composite(
        self, tiles: Tiles, footprints: Footprints, features: np.ndarray, image: np.ndarray, alpha: np.ndarray
    ) -> None:
        """The engine's compositing."""
        height, width = alpha.shape
        with numba.parallel_chunksize(TILES_PER_TASK):
            areas = tile_areas(*tiles, footprints.boxes, height, width, TILE_SIZE)
            _composite_tiles(
                *tiles, areas, footprints.records, depth_bits(footprints), footprints.boxes, features,
                compositing_constants(features.dtype), image, alpha, self._buffer("depth", alpha.shape, alpha.dtype),
            )  # fmt: skip

    def _pack(self, tiles: Tiles, footprints: Footprints) -> np.ndarray:
        """Records of each tile's Gaussians, sorted once for all passes."""
        packed = self._buffer("packed", (len(tiles.gaussians), PACKED), footprints.records.dtype)
        pack_tiles(*tiles, footprints.records, depth_bits(footprints), footprints.boxes, packed)
        return packed

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if name not in self._buffers or self._buffers[name].shape != shape:
            self._buffers[name] = np.empty(shape, dtype)
        return self._buffers[name]


@compiled(parallel=True, fastmath={"contract"})
@no_type_check
def upsample_pixels(tokens, bases, weights, offsets, boxes, features, chunks):
    """The feature of every Gaussian that hits anything, from four tokens; the other rows stay as they are."""
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
def pack_tiles(tile_starts, tile_gaussians, records, bits, boxes, packed):
    """Copy what compositing reads of each tile's Gaussians, front to back; bring `tile_gaussians` to that order."""
    for tile in numba.prange(tile_starts.size - 1):
        start = tile_starts[tile]
        members = tile_gaussians[start : tile_starts[tile + 1]]
        by_index = members.copy()
        keys = np.empty(members.size, bits.dtype)
        for i in range(members.size):
            keys[i] = bits[members[i], 7]
        order = front_to_back(keys)
        for i in range(members.size):
            g = by_index[order[i]]
            members[i] = g
            for column in range(7):
                packed[start + i, column] = records[g, column]
            for side in range(4):
                packed[start + i, 7 + side] = boxes[g, side]


@compiled(parallel=True)
@no_type_check
def composite_three(tile_starts, tile_gaussians, packed, features, constants, image, alpha):
    """Three channels, Gaussian by Gaussian, into planes of a tile that stay in the L1 cache."""
    height, width = alpha.shape
    across = (width + SIDE - 1) // SIDE
    stride = np.uint64(STRIDE)
    for tile in numba.prange(tile_starts.size - 1):
        first_y, first_x = tile // across * SIDE, tile % across * SIDE
        end_y, end_x = min(first_y + SIDE, height), min(first_x + SIDE, width)
        behind = np.ones(SIDE * STRIDE, packed.dtype)
        red, green, blue = np.zeros_like(behind), np.zeros_like(behind), np.zeros_like(behind)
        weights, line = np.empty(SIDE * LANES, packed.dtype), np.empty(LANES, packed.dtype)
        for i in range(tile_starts[tile], tile_starts[tile + 1]):
            m = np.uint64(i)
            g = np.uint64(tile_gaussians[m])
            low_y, high_y = max(np.int64(packed[m, 8]), first_y), min(np.int64(packed[m, 10]), end_y)
            start_x, box_end = max(np.int64(packed[m, 7]), first_x), min(np.int64(packed[m, 9]), end_x)
            rows = high_y - low_y
            a, b, c = features[g, 0], features[g, 1], features[g, 2]
            for low_x in range(start_x, box_end, LANES):
                place = np.uint64(low_y - first_y) * stride + np.uint64(low_x - first_x)
                weigh_box(
                    behind, stride, place, weights, line, low_x, low_y, min(low_x + LANES, box_end) - low_x, rows,
                    packed[m, 0], packed[m, 1], packed[m, 2], packed[m, 3], packed[m, 4], packed[m, 5], packed[m, 6],
                    constants,
                )  # fmt: skip
                for row in range(rows):
                    begin, noted = place + np.uint64(row) * stride, np.uint64(row) * np.uint64(LANES)
                    for lane in range(LANES):
                        weight = weights[noted + np.uint64(lane)]
                        red[begin + np.uint64(lane)] += a * weight
                        green[begin + np.uint64(lane)] += b * weight
                        blue[begin + np.uint64(lane)] += c * weight
        for y in range(first_y, end_y):
            for x in range(first_x, end_x):
                pixel = (y - first_y) * STRIDE + x - first_x
                image[y, x, 0], image[y, x, 1], image[y, x, 2] = red[pixel], green[pixel], blue[pixel]
                alpha[y, x] = constants[4] - abs(behind[pixel])


@compiled(parallel=True, fastmath={"contract"})
@no_type_check
def region_sums(image, alpha, labels, count, weighted, chunks):
    """Every chunk's sums of features and of weights over each region."""
    height, width, channels = image.shape
    sums = np.zeros((chunks, count, channels), image.dtype)
    mass = np.zeros((chunks, count), np.float64)
    for chunk in numba.prange(chunks):
        for y in range(chunk * height // chunks, (chunk + 1) * height // chunks):
            for x in range(width):
                label = labels[y, x]
                mass[chunk, label] += alpha[y, x] if weighted else 1
                total, row = sums[chunk, label], image[y, x]
                for channel in range(channels):
                    total[channel] += row[channel]
    return sums, mass


@compiled(parallel=True, fastmath={"contract"})
@no_type_check
def blend_and_pool(
    image, alpha, labels, means, row_begin, row_end, row_weights, column_begin, column_end, column_weights, numbers,
    weighted, result,
):  # fmt: skip
    """Blend the pixels that pooling reads, and pool them; `result` is overwritten.

    Along a row of a token's pixels the mean of a region is added once for each run of that region.
    """
    own, others, empty, one = numbers
    zero = own - own
    channels = image.shape[2]
    for token_row in numba.prange(row_begin.size):
        for token in range(column_begin.size):
            total = result[token_row * column_begin.size + token]
            total[:] = zero
            covered = zero
            for y in range(row_begin[token_row], row_end[token_row]):
                down = row_weights[token_row, y - row_begin[token_row]]
                run, label = zero, labels[y, column_begin[token]]
                for x in range(column_begin[token], column_end[token]):
                    share = down * column_weights[token, x - column_begin[token]]
                    if labels[y, x] != label:
                        mean = means[label]
                        for channel in range(channels):
                            total[channel] += run * mean[channel]
                        run, label = zero, labels[y, x]
                    run += others * share * alpha[y, x] if weighted else others * share
                    covered += share * alpha[y, x]
                    row, factor = image[y, x], own * share
                    for channel in range(channels):
                        total[channel] += factor * row[channel]
                mean = means[label]
                for channel in range(channels):
                    total[channel] += run * mean[channel]
            if weighted:
                scale = one / covered if covered > empty else zero
                for channel in range(channels):
                    total[channel] *= scale
