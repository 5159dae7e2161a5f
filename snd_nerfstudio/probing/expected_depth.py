"""The mean of the depth probe's bins at four times the tokens' resolution.

Enlarged logits are 256 channels at sixteen times the tokens: with what is rectified of them and with its gradient a
training step on a CPU would wait for memory most of the time. There, a compiled loop interpolates the logits of one
pixel after the other where they are needed, backwards too, and none of them is ever stored.
"""

from typing import Any, no_type_check

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from snd_nerfstudio.splatting.hits import compiled, engine_lock

STRIP = 8
"""Rows of tokens whose gradients one thread sums. Strips are added in their order, so the number of threads changes no
bit."""
REORDER = {"reassoc", "contract"}
"""Lets sums over bins be vectorised; what is not a number stays so."""


def expected_depth(
    logits: Float[Tensor, "b k h w"], bins: Float[Tensor, "k"], floor: float, factor: int
) -> Float[Tensor, "b 1 h2 w2"]:
    """``sum_k p_k bin_k`` with ``p_k = (relu(x_k) + floor) / sum_j (relu(x_j) + floor)`` of the enlarged logits x.

    Args:
        logits: differentiable, on a CPU once; fastest with the bins last in memory.
        bins: metres; no gradient goes there.
        floor: added to every rectified logit.
        factor: by which logits are enlarged, bilinearly (``align_corners=False``); 2 or more.

    Returns:
        Metres.
    """
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return _ExpectedDepth.apply(logits, bins.to(logits), floor, factor)  # type: ignore
    return plain_expected_depth(logits, bins, floor, factor)


def plain_expected_depth(
    logits: Float[Tensor, "b k h w"], bins: Float[Tensor, "k"], floor: float, factor: int
) -> Float[Tensor, "b 1 h2 w2"]:
    """What `expected_depth` gives, with all enlarged logits in memory."""
    weights = F.relu(F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)) + floor
    return torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(dim=1, keepdim=True)


class _ExpectedDepth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bins: Tensor, floor: float, factor: int) -> Tensor:
        rows = np.ascontiguousarray(logits.detach().permute(0, 2, 3, 1).numpy())
        batch, height, width, _ = rows.shape
        taps = _taps(height, factor, rows.dtype), _taps(width, factor, rows.dtype)
        depth = np.empty((batch, height * factor, width * factor), rows.dtype)
        total = np.empty_like(depth)
        # what the floor adds to numerator and denominator
        added = floor * np.array([bins.sum(), len(bins)], dtype=rows.dtype)
        with engine_lock:
            _forward(rows, bins.numpy(), added, *taps[0], *taps[1], depth, total)
        ctx.save_for_backward(logits, bins)
        ctx.kept = rows, taps, depth, total
        return torch.from_numpy(depth)[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        rows, taps, depth, total = ctx.kept
        _, bins = ctx.saved_tensors  # so that a change of the logits in place is noticed
        batch, height, width, count = rows.shape
        # depth is n / t: the rectified logit of bin k gets (bin_k - depth) / t
        scaled = np.ascontiguousarray(gradient[:, 0].numpy()) / total
        strips = -(-height // STRIP)
        parts = np.zeros((batch, strips, STRIP + 2, width, count), rows.dtype)
        with engine_lock:
            _backward(rows, bins.numpy(), scaled, depth, *taps[0], *taps[1], parts)
        found = np.zeros((batch, strips * STRIP + 2, width, count), rows.dtype)
        for strip in range(strips):
            found[:, strip * STRIP : (strip + 1) * STRIP + 2] += parts[:, strip]
        return torch.from_numpy(found[:, 1 : height + 1]).permute(0, 3, 1, 2), None, None, None


def _taps(length: int, factor: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """First of the two neighbours of each finer place, and the second's weight; the last place has no second one."""
    places = np.maximum((np.arange(length * factor) + 0.5) / factor - 0.5, 0)
    first = np.minimum(places.astype(np.int64), length - 1)
    weight = np.where(first < length - 1, places - first, 0).astype(dtype)
    return first, weight


@no_type_check
@compiled(parallel=True, fastmath=REORDER)
def _forward(logits, bins, added, first_row, row_weight, first_column, column_weight, depth, total):
    """Depth of every finer pixel, and the sum of its weights."""
    batch, height, width, count = logits.shape
    fine_height, fine_width = depth.shape[1], depth.shape[2]
    one, zero = bins.dtype.type(1), bins.dtype.type(0)
    for job in numba.prange(batch * fine_height):
        image, y = job // fine_height, job % fine_height
        row = np.empty((width, count), logits.dtype)
        above = first_row[y]
        below = min(above + 1, height - 1)
        to_below = row_weight[y]
        for x in range(width):
            for k in range(count):
                row[x, k] = (one - to_below) * logits[image, above, x, k] + to_below * logits[image, below, x, k]
        for x in range(fine_width):
            left, to_right = row[first_column[x]], column_weight[x]
            right = row[min(first_column[x] + 1, width - 1)]
            numerator, denominator = zero, zero
            for k in range(count):
                value = (one - to_right) * left[k] + to_right * right[k]
                value = zero if value < zero else value
                numerator += value * bins[k]
                denominator += value
            denominator += added[1]
            depth[image, y, x] = (numerator + added[0]) / denominator
            total[image, y, x] = denominator


@no_type_check
@compiled(parallel=True, fastmath=REORDER)
def _backward(logits, bins, scaled, depth, first_row, row_weight, first_column, column_weight, parts):
    """Gradients of the logits: of each strip of rows, with the row before and the row behind it."""
    batch, height, width, count = logits.shape
    fine_height, fine_width = depth.shape[1], depth.shape[2]
    factor = fine_height // height
    strips, strip_rows = parts.shape[1], parts.shape[2] - 2
    one, zero = bins.dtype.type(1), bins.dtype.type(0)
    for job in numba.prange(batch * strips):
        image, strip = job // strips, job % strips
        start = strip * strip_rows
        stop = min(start + strip_rows, height)
        row = np.empty((width, count), logits.dtype)
        gradient = np.empty((width, count), logits.dtype)
        for y in range(start * factor, stop * factor):
            above = first_row[y]
            below = min(above + 1, height - 1)
            to_below = row_weight[y]
            for x in range(width):
                for k in range(count):
                    row[x, k] = (one - to_below) * logits[image, above, x, k] + to_below * logits[image, below, x, k]
                    gradient[x, k] = zero
            for x in range(fine_width):
                here, middle = scaled[image, y, x], depth[image, y, x]
                if here == zero:
                    continue
                place, to_right = first_column[x], column_weight[x]
                following = min(place + 1, width - 1)
                to_left = one - to_right
                for k in range(count):
                    value = to_left * row[place, k] + to_right * row[following, k]
                    part = here * (bins[k] - middle) if value > zero else zero
                    gradient[place, k] += to_left * part
                    gradient[following, k] += to_right * part
            for x in range(width):
                for k in range(count):
                    parts[image, strip, above - start + 1, x, k] += (one - to_below) * gradient[x, k]
                    parts[image, strip, below - start + 1, x, k] += to_below * gradient[x, k]
