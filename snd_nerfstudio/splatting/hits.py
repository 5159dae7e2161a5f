"""Which Gaussians hit which pixels, and with what weight: what all CPU paths of this package have in common.

Projection, sorting into tiles and the weights of one Gaussian's box, compiled by numba. Compositing features
(`numba_engine.py`), pushing gradients back (`numba_gradients.py`) and summing weights to tokens
(`supervision/token_kernel.py`) find the same hits with the same bits, because those come from the functions here.
Multiply-adds are fused where `fma` says so and nowhere else: a compiler that may contract does so in one caller and not
in another.

Functions that are compiled carry `no_type_check`, because numba can compile a function but not the run-time
shape checker around it.
"""

import hashlib
import math
import threading
import warnings
from pathlib import Path
from typing import Any, Callable, NamedTuple, no_type_check

import numba
import numpy as np
import torch
from jaxtyping import Float, Int
from numba.extending import intrinsic, overload
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera
from snd_nerfstudio.splatting.projection import (
    BLUR_VARIANCE,
    FIELD_OF_VIEW_MARGIN,
    LIMIT_MARGIN,
    MAX_ALPHA,
    MIN_ALPHA,
    MIN_TRANSMITTANCE,
    TILE_SIZE,
    exponent_limits,
)

LANES = 16
"""Pixels of a row that are weighed at once: one vector of float32 where there is AVX-512."""
RADIX_BITS = 11
"""Digit width of the depth sort: 2048 counters stay in the L1 cache."""
CHUNKS_PER_THREAD = 4
"""Ranges of Gaussians per thread in projection and sorting."""
BLOCK = 128
"""Gaussians that are projected at a time."""
RECORD = 8
"""Columns of a record: see `Footprints`."""

# Not every threading layer of numba may be entered by two Python threads at once (viewer and trainer).
engine_lock = threading.Lock()
# numba takes another layer then, and nobody has to do anything
warnings.filterwarnings("ignore", message="The TBB threading layer requires", category=numba.NumbaWarning)


SHARED_SOURCES = hashlib.sha256(
    b"".join(Path(__file__).with_name(name).read_bytes() for name in ("hits.py", "numba_engine.py", "projection.py"))
).hexdigest()
"""Changes with the files whose functions are compiled into other files' functions."""


class Footprints(NamedTuple):
    """2D Gaussians on one image, as the compositing functions take them."""

    records: Float[np.ndarray, "n 8"]
    """Mean x and y less one half (so that pixel column c is at c), half xx, xy and half yy of the conic, opacity,
    largest exponent that can matter, z-depth."""
    boxes: Int[np.ndarray, "n 4"]
    """int32 (first column, first row, end column, end row); empty where nothing is hit."""


class Tiles(NamedTuple):
    """Gaussians by the square tile that they touch; tiles are numbered row by row."""

    starts: Int[np.ndarray, "tiles_and_1"]
    """Start of each tile's run in `gaussians`, int64."""
    gaussians: Int[np.ndarray, "pairs"]
    """Indices of Gaussians, int32, run after run, ascending within each."""


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` with the on-disk cache where a cache directory can be written, and without it elsewhere.

    Division by zero gives inf or NaN, as numpy's does: a check for it would keep loops from being vectorised.
    """
    options = {"error_model": "numpy", **options}

    def decorate(function: Callable) -> Callable:
        try:
            dispatcher = numba.njit(cache=True, **options)(function)
        except RuntimeError:  # "no locator available": neither __pycache__ nor NUMBA_CACHE_DIR can be written
            return numba.njit(**options)(function)
        # numba looks at the time of the function's own file only, and these files are compiled into others' functions
        index = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
        if hasattr(index, "_source_stamp"):
            index._source_stamp = (index._source_stamp, SHARED_SOURCES)  # type: ignore
        return dispatcher

    return decorate


def compositing_constants(dtype: Any) -> tuple:
    """MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, one half and one, in the working dtype.

    A float literal inside a compiled function would promote float32 arithmetic to float64.
    """
    return tuple(np.array([MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, 0.5, 1.0], dtype))


# ---------------------------------------------------------------------- projection


def project_footprints(gaussians: Gaussians, camera: PinholeCamera, near: float, far: float) -> Footprints:
    """`projection.project_gaussians` without its autograd, compiled: the same operations in the same order.

    The caller holds `engine_lock`.

    Args:
        gaussians: float32 or float64, on the CPU.
        camera: of the same dtype.
        near: smallest z-depth kept, world units.
        far: largest z-depth kept, world units.
    """
    means, quats, scales, opacities = (
        tensor.detach().contiguous().numpy()
        for tensor in (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
    )
    dtype = means.dtype
    reach = torch.log(gaussians.opacities.detach().clamp(min=MIN_ALPHA) / MIN_ALPHA).numpy()
    pose = camera.world_to_camera()
    intrinsics = camera.intrinsics
    focal, centre = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    size = intrinsics.new_tensor([camera.width, camera.height])
    margin = FIELD_OF_VIEW_MARGIN * 0.5 * size / focal
    slope_bounds = torch.stack([-(centre / focal + margin), (size - centre) / focal + margin])
    records = np.empty((len(means), RECORD), dtype)
    boxes = np.empty((len(means), 4), np.int32)
    constants = np.array(
        [near, far, BLUR_VARIANCE, 0.5, 1.0, 2.0, 3.0, 0.01, 1 + 1e-3, 1e-2, TILE_SIZE, MIN_ALPHA * (1 - 1e-6),
         math.inf, LIMIT_MARGIN], dtype,
    )  # fmt: skip
    _project(
        means, quats, scales, opacities, reach, pose.numpy(), focal.numpy(), centre.numpy(), size.numpy(),
        slope_bounds.contiguous().numpy(), constants, records, boxes, CHUNKS_PER_THREAD * numba.get_num_threads(),
    )  # fmt: skip
    return Footprints(records, boxes)


def footprints_of(
    means2d: Float[Tensor, "n 2"],
    conics: Float[Tensor, "n 3"],
    depths: Float[Tensor, "n"],
    boxes: Int[Tensor, "n 4"],
    opacities: Float[Tensor, "n"],
) -> Footprints:
    """What the compositing functions take, of the fields of a `projection.Projection`."""
    half = 0.5
    columns = [
        means2d[:, 0] - half,
        means2d[:, 1] - half,
        half * conics[:, 0],
        conics[:, 1],
        half * conics[:, 2],
        opacities,
        exponent_limits(opacities),
        depths,
    ]
    return Footprints(torch.stack(columns, dim=1).detach().numpy(), boxes.contiguous().numpy())


@compiled(parallel=True)
@no_type_check
def _project(
    means, quats, scales, opacities, reach, pose, focal, centre, size, slope_bounds, constants, records, boxes, chunks
):  # fmt: skip
    n = means.shape[0]
    for chunk in numba.prange(chunks):
        end = (chunk + 1) * n // chunks
        # Columns of one array rather than many arrays: the compiler then sees at once that they do not overlap.
        block = np.empty(22 * BLOCK, records.dtype)
        for first in range(chunk * n // chunks, end, BLOCK):
            count = min(BLOCK, end - first)
            for i in range(count):
                g = first + i
                block[i], block[BLOCK + i], block[2 * BLOCK + i] = means[g, 0], means[g, 1], means[g, 2]
                block[3 * BLOCK + i], block[4 * BLOCK + i] = quats[g, 0], quats[g, 1]
                block[5 * BLOCK + i], block[6 * BLOCK + i] = quats[g, 2], quats[g, 3]
                block[7 * BLOCK + i], block[8 * BLOCK + i] = scales[g, 0], scales[g, 1]
                block[9 * BLOCK + i] = scales[g, 2]
                block[10 * BLOCK + i], block[11 * BLOCK + i] = opacities[g], reach[g]
            _project_block(block, count, pose, focal, centre, size, slope_bounds, constants)
            for i in range(count):
                g = first + i
                for column in range(5):
                    records[g, column] = block[(12 + column) * BLOCK + i]
                records[g, 5], records[g, 6] = opacities[g], reach[g] + constants[13]
                records[g, 7] = block[17 * BLOCK + i]
                for side in range(4):
                    boxes[g, side] = np.int32(block[(18 + side) * BLOCK + i])


@compiled()
@no_type_check
def _project_block(block, count, pose, focal, centre, size, slope_bounds, constants):
    """Columns 0 to 11 of a block of Gaussians to 12 to 21; see `projection.py`, whose order of operations this is.

    Without branches, so that the compiler can vectorise it: what is culled is computed with a depth of 1.
    """
    near, far, blur, half, one, two, three, least, wider, wide, tile, faintest, infinite, _ = constants
    zero = one - one
    w00, w01, w02, w03 = pose[0]
    w10, w11, w12, w13 = pose[1]
    w20, w21, w22, w23 = pose[2]
    focal_x, focal_y = focal
    centre_x, centre_y = centre
    width, height = size
    left, top, right, bottom = slope_bounds[0, 0], slope_bounds[0, 1], slope_bounds[1, 0], slope_bounds[1, 1]
    for i in range(count):
        x, y, z = block[i], block[BLOCK + i], block[2 * BLOCK + i]
        view_x = x * w00 + y * w01 + z * w02 + w03
        view_y = x * w10 + y * w11 + z * w12 + w13
        view_z = x * w20 + y * w21 + z * w22 + w23
        in_range = (view_z >= near) & (view_z <= far)
        depth = view_z if in_range else one
        slope_x, slope_y = view_x / depth, view_y / depth
        mean_x, mean_y = slope_x * focal_x + centre_x, slope_y * focal_y + centre_y
        slope_x = min(max(slope_x, left), right)
        slope_y = min(max(slope_y, top), bottom)

        qw, qx, qy, qz = block[3 * BLOCK + i], block[4 * BLOCK + i], block[5 * BLOCK + i], block[6 * BLOCK + i]
        norm = np.sqrt(qw * qw + qx * qx + qy * qy + qz * qz)
        length = norm if norm > zero else one
        qw, qx, qy, qz = (qw / length if norm > zero else one), qx / length, qy / length, qz / length
        stretch_x, stretch_y = focal_x / depth, focal_y / depth
        across_x = stretch_x * (w00 - slope_x * w20)
        across_y = stretch_x * (w01 - slope_x * w21)
        across_z = stretch_x * (w02 - slope_x * w22)
        down_x = stretch_y * (w10 - slope_y * w20)
        down_y = stretch_y * (w11 - slope_y * w21)
        down_z = stretch_y * (w12 - slope_y * w22)
        scale = block[7 * BLOCK + i]
        rx, ry, rz = one - two * (qy * qy + qz * qz), two * (qx * qy + qw * qz), two * (qx * qz - qw * qy)
        across_1 = (across_x * rx + across_y * ry + across_z * rz) * scale
        down_1 = (down_x * rx + down_y * ry + down_z * rz) * scale
        scale = block[8 * BLOCK + i]
        rx, ry, rz = two * (qx * qy - qw * qz), one - two * (qx * qx + qz * qz), two * (qy * qz + qw * qx)
        across_2 = (across_x * rx + across_y * ry + across_z * rz) * scale
        down_2 = (down_x * rx + down_y * ry + down_z * rz) * scale
        scale = block[9 * BLOCK + i]
        rx, ry, rz = two * (qx * qz + qw * qy), two * (qy * qz - qw * qx), one - two * (qx * qx + qy * qy)
        across_3 = (across_x * rx + across_y * ry + across_z * rz) * scale
        down_3 = (down_x * rx + down_y * ry + down_z * rz) * scale
        xx = (across_1 * across_1 + across_2 * across_2 + across_3 * across_3) + blur
        xy = across_1 * down_1 + across_2 * down_2 + across_3 * down_3
        yy = (down_1 * down_1 + down_2 * down_2 + down_3 * down_3) + blur

        # Products of float32 are exact in float64, and the determinant of a thin covariance is mostly rounding.
        product = np.float64(xx) * np.float64(yy) - np.float64(xy) * np.float64(xy)
        block[12 * BLOCK + i] = product
        determinant = block[12 * BLOCK + i]
        half_trace = half * (xx + yy)
        largest = half_trace + np.sqrt(max(half_trace * half_trace - determinant, least))
        radius = np.ceil(three * np.sqrt(largest))
        opacity, reach = block[10 * BLOCK + i], block[11 * BLOCK + i]
        half_x = np.sqrt(two * reach * xx) * wider + wide
        half_y = np.sqrt(two * reach * yy) * wider + wide
        first_x = max(np.ceil(mean_x - half_x - half), np.floor((mean_x - radius) / tile) * tile, zero)
        first_y = max(np.ceil(mean_y - half_y - half), np.floor((mean_y - radius) / tile) * tile, zero)
        end_x = min(np.floor(mean_x + half_x + half), np.ceil((mean_x + radius) / tile) * tile, width)
        end_y = min(np.floor(mean_y + half_y + half), np.ceil((mean_y + radius) / tile) * tile, height)
        # Compared so that a NaN anywhere hides the Gaussian.
        hit = in_range & (opacity >= faintest) & (determinant > zero) & (determinant < infinite)
        hit = hit & (mean_x + radius > zero) & (mean_y + radius > zero)
        hit = hit & (mean_x - radius < width) & (mean_y - radius < height)
        hit = hit & (end_x > first_x) & (end_y > first_y)
        divisor = determinant if hit else one
        block[12 * BLOCK + i], block[13 * BLOCK + i] = mean_x - half, mean_y - half
        block[14 * BLOCK + i] = half * (yy / divisor)
        block[15 * BLOCK + i] = -xy / divisor
        block[16 * BLOCK + i] = half * (xx / divisor)
        block[17 * BLOCK + i] = view_z
        block[18 * BLOCK + i] = first_x if hit else zero
        block[19 * BLOCK + i] = first_y if hit else zero
        block[20 * BLOCK + i] = end_x if hit else zero
        block[21 * BLOCK + i] = end_y if hit else zero


# ---------------------------------------------------------------------- tiles


def find_tiles(footprints: Footprints, height: int, width: int, tile_size: int) -> Tiles:
    """The Gaussians of each tile.

    The caller holds `engine_lock`.

    Args:
        footprints: of all Gaussians.
        height: of the image, pixels.
        width: of the image, pixels.
        tile_size: side of a tile, pixels.
    """
    boxes = footprints.boxes
    across, down = -(-width // tile_size), -(-height // tile_size)
    chunks = CHUNKS_PER_THREAD * numba.get_num_threads()
    places = np.zeros((chunks, across * down), np.int64)
    tile_of = (np.arange(max(height, width)) // tile_size).astype(np.int32)  # a look is faster than a division
    _count_pairs(boxes, tile_of, across, places)
    # A tile's run holds the chunks' Gaussians one after the other, and is therefore in order of index.
    totals = places.sum(axis=0)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(totals)])
    places = np.cumsum(places, axis=0) - places + starts[:-1]
    members = np.empty(starts[-1], np.int32)
    _fill_tiles(boxes, tile_of, across, places, members)
    return Tiles(starts, members)


def depth_bits(footprints: Footprints) -> np.ndarray:
    """The records as unsigned integers, in the same memory: the bits of positive floats sort like the floats."""
    return footprints.records.view(np.uint32 if footprints.records.dtype == np.float32 else np.uint64)


@compiled(parallel=True)
@no_type_check
def _count_pairs(boxes, tile_of, across, counts):
    n, chunks = boxes.shape[0], counts.shape[0]
    for chunk in numba.prange(chunks):
        count = counts[chunk]
        for g in range(chunk * n // chunks, (chunk + 1) * n // chunks):
            first_x, first_y, end_x, end_y = boxes[g]
            if end_x <= first_x:
                continue
            for row in range(tile_of[first_y], tile_of[end_y - 1] + 1):
                for column in range(tile_of[first_x], tile_of[end_x - 1] + 1):
                    count[row * across + column] += 1


@compiled(parallel=True)
@no_type_check
def _fill_tiles(boxes, tile_of, across, places, members):
    n, chunks = boxes.shape[0], places.shape[0]
    for chunk in numba.prange(chunks):
        place = places[chunk]
        for g in range(chunk * n // chunks, (chunk + 1) * n // chunks):
            first_x, first_y, end_x, end_y = boxes[g]
            if end_x <= first_x:
                continue
            for row in range(tile_of[first_y], tile_of[end_y - 1] + 1):
                for column in range(tile_of[first_x], tile_of[end_x - 1] + 1):
                    tile = row * across + column
                    members[place[tile]] = g
                    place[tile] += 1


@compiled()
@no_type_check
def front_to_back(keys):
    """The order of depths given as `depth_bits`, ties in order of index (least-significant-digit radix sort).

    `keys` is overwritten.
    """
    n = keys.size
    order, other_order = np.arange(n).astype(np.int32), np.empty(n, np.int32)
    other_keys = np.empty_like(keys)
    differing = np.uint64(0)
    for i in range(n):
        differing |= np.uint64(keys[i] ^ keys[0])
    counters = np.empty((1 << RADIX_BITS) + 1, np.int32)
    digit_mask = np.uint64((1 << RADIX_BITS) - 1)
    for shift in range(0, keys.itemsize * 8, RADIX_BITS):
        if (differing >> np.uint64(shift)) & digit_mask == 0:
            continue  # all keys share this digit
        counters[:] = 0
        for i in range(n):
            counters[((np.uint64(keys[i]) >> np.uint64(shift)) & digit_mask) + np.uint64(1)] += 1
        for digit in range(1 << RADIX_BITS):
            counters[digit + 1] += counters[digit]
        for i in range(n):
            digit = (np.uint64(keys[i]) >> np.uint64(shift)) & digit_mask
            place = counters[digit]
            counters[digit] = place + 1
            other_keys[place] = keys[i]
            other_order[place] = order[i]
        keys, other_keys = other_keys, keys
        order, other_order = other_order, order
    return order


@compiled(parallel=True)
@no_type_check
def tile_areas(starts, members, boxes, height, width, tile_size):
    """Number of (Gaussian, pixel) pairs that the boxes hold in each tile, int64."""
    across = (width + tile_size - 1) // tile_size
    areas = np.zeros(starts.size - 1, np.int64)
    for tile in numba.prange(areas.size):
        first_y, first_x = tile // across * tile_size, tile % across * tile_size
        end_y, end_x = min(first_y + tile_size, height), min(first_x + tile_size, width)
        for place in range(starts[tile], starts[tile + 1]):
            g = members[place]
            rows = min(np.int64(boxes[g, 3]), end_y) - max(np.int64(boxes[g, 1]), first_y)
            areas[tile] += rows * (min(np.int64(boxes[g, 2]), end_x) - max(np.int64(boxes[g, 0]), first_x))
    return areas


# ---------------------------------------------------------------------- weights


@intrinsic
@no_type_check
def _fma(typing_context, a, b, c):
    def generate(context, builder, signature, values):
        return builder.fma(*values)

    return a(a, a, a), generate


fma: Any = _fma
"""`fma(a, b, c) = a * b + c`, rounded once; inside compiled functions only."""


def falloff(exponent: float) -> float:
    """`exp(-exponent)`; inside compiled functions only."""
    return math.exp(-exponent)


@overload(falloff)
@no_type_check
def _compiled_falloff(exponent):
    """For float32 a polynomial that compilers can vectorise: relative error 6e-7 for exponents from 0 to ln 255, beyond
    which alpha is too faint; for one that is negative or beyond 80 anything may come out."""
    if exponent != numba.float32:
        return lambda exponent: np.exp(-exponent)
    to_log2, magic = np.float32(-1.4426950408889634), np.float32(12582912.0)  # 1.5 * 2**23: adding it rounds
    c0, c1, c2 = np.float32(1.000000072), np.float32(6.931469671e-1), np.float32(2.402211972e-1)
    c3, c4, c5 = np.float32(5.550713275e-2), np.float32(9.675541331e-3), np.float32(1.327647152e-3)

    def fast(exponent):
        whole = fma(exponent, to_log2, magic) - magic
        part = fma(exponent, to_log2, -whole)
        value = fma(fma(fma(fma(fma(c5, part, c4), part, c3), part, c2), part, c1), part, c0)  # 2**part, minimax
        return value * np.int32((np.int32(127) + np.int32(whole)) << np.int32(23)).view(np.float32)

    return fast


@compiled()
@no_type_check
def weigh_box(
    transmittance, stride, place, weights, line, low_x, low_y, columns, rows, mean_x, mean_y, half_xx, xy, half_yy,
    opacity, limit, constants,
):  # fmt: skip
    """Composite one Gaussian over a box of at most 16 columns, and note the weight `w = alpha T` of every pixel.

    No array is sliced and all indices are unsigned: reference counts and checks for negative indices would cost more
    than the arithmetic.

    Args:
        transmittance: of a tile, flat, with 16 columns to spare on its right; changed. A pixel that is finished has
            that of its last hit with a minus sign.
        stride: of its rows, uint64.
        place: of the box's first pixel in it, uint64.
        weights: flat, rows x 16, overwritten; 0 where there is no hit and beyond the box.
        line: 16, overwritten by the sums of `weights` over the rows.
        low_x: the box's first column in the image.
        low_y: its first row in the image.
        columns: of the box.
        rows: of the box.
        mean_x: of the Gaussian; as the rest, see `Footprints`.
        mean_y: of the Gaussian.
        half_xx: of the conic.
        xy: of the conic.
        half_yy: of the conic.
        opacity: of the Gaussian.
        limit: of the exponent.
        constants: `compositing_constants` as a tuple.
    """
    max_alpha, min_alpha, min_transmittance, half, one = constants
    zero = one - one
    kind = type(one)
    first, end = kind(low_x), kind(columns)
    for lane in range(LANES):
        line[lane] = zero
    for row in range(rows):
        dy = mean_y - kind(low_y + row)
        row_term, row_slope = half_yy * dy * dy, xy * dy
        start = place + np.uint64(row) * stride
        noted = np.uint64(row) * np.uint64(LANES)
        for lane in range(LANES):
            number = kind(np.int32(lane))
            dx = mean_x - (first + number)
            exponent = fma(fma(half_xx, dx, row_slope), dx, row_term)
            alpha = opacity * falloff(exponent)
            alpha = alpha if alpha < max_alpha else max_alpha
            before = transmittance[start + np.uint64(lane)]
            after = fma(-alpha, before, before)
            # Written so that a NaN is skipped; beyond the limit alpha is surely too faint.
            hit = (exponent >= zero) & (exponent <= limit) & (alpha >= min_alpha) & (number < end)
            taken = hit & (after > min_transmittance)
            weight = alpha * before if taken else zero
            weights[noted + np.uint64(lane)] = weight
            line[np.uint64(lane)] += weight
            finished = -abs(before) if hit else before
            transmittance[start + np.uint64(lane)] = after if taken else finished
