"""The mean of the depth probe's bins, a few rows of tokens at a time.

Enlarged logits are 256 channels at sixteen times the tokens; with what is rectified of them and with its gradient a
training step would wait for memory most of the time. Here no more than a slab of them exists at any time, in the
backward pass too, where it is computed again.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

SLAB = 2**20
"""Enlarged logits that exist at once on a CPU: 4 MB in float32."""


class _ExpectedDepth(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bins: Tensor, floor: float, factor: int, slab: int) -> Tensor:
        batch, _, height, width = logits.shape
        size = (height * factor, width * factor)
        # numerator and denominator in one product
        sums = torch.stack([bins, torch.ones_like(bins)], dim=1)
        both = logits.new_empty(batch, size[0], size[1], 2)
        for images, rows, around in _slabs(logits, factor, slab):
            rectified = _rectified(logits[images, :, around], factor).permute(0, 2, 3, 1)
            first = (rows.start - around.start) * factor
            fine = slice(rows.start * factor, rows.stop * factor)
            both[images, fine] = rectified[:, first : first + fine.stop - fine.start] @ sums
        # what is added to every rectified logit
        both = both + floor * sums.sum(dim=0)
        depth = both[..., 0] / both[..., 1]
        ctx.save_for_backward(logits, bins, depth, both[..., 1])
        ctx.sizes = (factor, slab)
        return depth[:, None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, bins, depth, total = ctx.saved_tensors
        factor, slab = ctx.sizes
        # depth is n / t: the rectified logit of bin k gets (bin_k - depth) / t
        to_bins = gradient[:, 0] / total
        to_all = -to_bins * depth
        found = torch.zeros_like(logits)
        for images, rows, around in _slabs(logits, factor, slab):
            with torch.enable_grad():
                part = logits[images, :, around].detach().requires_grad_()
                rectified = _rectified(part, factor)
            # bins last in memory, as the logits have them: any other order takes several times as long
            fine = slice(around.start * factor, around.stop * factor)
            back = torch.addcmul(to_all[images, fine, :, None], to_bins[images, fine, :, None], bins)
            # the rows beside it have slabs of their own
            back[:, : (rows.start - around.start) * factor] = 0
            back[:, (rows.stop - around.start) * factor :] = 0
            found[images, :, around] += torch.autograd.grad(rectified, part, back.permute(0, 3, 1, 2))[0]
        return found, None, None, None, None


def _rectified(part: Tensor, factor: int) -> Tensor:
    return F.relu(F.interpolate(part, scale_factor=factor, mode="bilinear", align_corners=False), inplace=True)


def _slabs(logits: Tensor, factor: int, slab: int) -> Iterator[tuple[slice, slice, slice]]:
    """Images, rows of tokens, and those rows with the ones beside them; on a GPU all at once."""
    batch, bins, height, width = logits.shape
    if logits.is_cuda:
        yield slice(0, batch), slice(0, height), slice(0, height)
        return
    step = max(slab // (bins * width * factor**2), 1)
    for image in range(batch):
        for start in range(0, height, step):
            stop = min(start + step, height)
            yield slice(image, image + 1), slice(start, stop), slice(max(start - 1, 0), min(stop + 1, height))


def expected_depth(
    logits: Float[Tensor, "b k h w"], bins: Float[Tensor, "k"], floor: float, factor: int, slab: int = SLAB
) -> Float[Tensor, "b 1 h2 w2"]:
    """``sum_k p_k bin_k`` with ``p_k = (relu(x_k) + floor) / sum_j (relu(x_j) + floor)`` of the enlarged logits x.

    Args:
        logits: differentiable once; fastest with the bins last in memory.
        bins: metres; no gradient goes there.
        floor: added to every rectified logit.
        factor: by which logits are enlarged, bilinearly (``align_corners=False``); 2 or more.
        slab: enlarged logits that exist at once on a CPU.

    Returns:
        Metres.
    """
    return _ExpectedDepth.apply(logits, bins, floor, factor, slab)  # type: ignore
