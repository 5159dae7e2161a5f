"""Building a `TokenOperator` from Gaussians and masks, on the CPU by sums and on CUDA by gradients."""

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numba
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.splatting.hits import engine_lock, find_tiles, project_footprints
from snd_nerfstudio.splatting.projection import FAR, MIN_ALPHA, NEAR, project_gaussians
from snd_nerfstudio.splatting.rasterizer import check_values
from snd_nerfstudio.supervision.dense import EMPTY, check_pixel_aligned
from snd_nerfstudio.supervision.pooling import area_weights, pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_kernel import (
    TILE,
    Axis,
    Interpolation,
    Regions,
    corner_weights,
    majority_labels,
    region_shares,
    sum_weights,
    uniform_reach,
)
from snd_nerfstudio.supervision.token_operator import SparseRows, TokenOperator
from snd_nerfstudio.supervision.upsampling import axis_weights, interpolation_weights, token_labels

SMALL_IDS = 4096
"""Masks whose ids are all below this are used as they are; others are renumbered."""
CHANNELS_PER_PASS = 32
"""Channels that the route by gradients asks of the rasterizer at a time."""

Route = Literal["auto", "sums", "gradients"]


@torch.no_grad()
def build_token_operator(
    context_grid: tuple[int, int],
    context_masks: Int[Tensor, "v H W"] | None,
    context_size: tuple[int, int],
    gaussians: Gaussians,
    target_camera: PinholeCamera,
    target_mask: Int[Tensor, "Ht Wt"] | None,
    settings: SupervisionSettings,
    target_grid: tuple[int, int] | None = None,
    route: Route = "auto",
) -> TokenOperator:
    """Build the operator of one triplet; `dense_supervision` says what each step is.

    Args:
        context_grid: token rows and columns of each context view.
        context_masks: instance masks of the context views, or None for plain bilinear lifting.
        context_size: height and width of the context images.
        gaussians: one per context pixel, in the order (view, row, column); float32, or float64 for tests.
        target_camera: where to splat to.
        target_mask: instance mask of the target view, or None for no blending.
        settings: every switch; `blending` only says whether the regions' part is needed at all (below 1).
        target_grid: token rows and columns of the target; None: as of the contexts.
        route: `sums` composites on the CPU and sums weights to tokens as it goes; `gradients` takes the same sums from
            the rasterizer, as gradients with respect to features, a few channels at a time; `auto` is the first on the
            CPU and the second on CUDA.

    Raises:
        ValueError: the number of Gaussians is not that of the context pixels, or a mask has another size, or Gaussians
            or camera have values with which no view is defined (as `rasterize`).
    """
    views = check_pixel_aligned(gaussians, context_size)
    if target_mask is not None and tuple(target_mask.shape) != (target_camera.height, target_camera.width):
        raise ValueError(
            f"mask {tuple(target_mask.shape)} and target {target_camera.height}x{target_camera.width} differ in size"
        )
    if context_masks is not None and tuple(context_masks.shape) != (views, *context_size):
        raise ValueError(
            f"masks {tuple(context_masks.shape)} and {views} context views of {context_size} differ in size"
        )
    if route not in ("auto", "sums", "gradients"):
        raise ValueError(f"unknown route {route!r}; choose auto, sums or gradients")
    camera = target_camera.to(device=gaussians.device, dtype=gaussians.dtype)
    check_values(gaussians, camera)
    if settings.footprint == "squared":
        gaussians = replace(gaussians, scales=gaussians.scales**2)
    labels, count = (None, 0) if target_mask is None or settings.blending >= 1 else compact_labels(target_mask)
    h, w = context_grid if target_grid is None else target_grid
    rows = pooling_axis(h, camera.height, settings.pooling, gaussians.dtype)
    columns = pooling_axis(w, camera.width, settings.pooling, gaussians.dtype)
    if route == "auto":
        route = "sums" if gaussians.device.type == "cpu" else "gradients"
    build = _by_sums if route == "sums" else _by_gradients
    points, means, alpha, isolated = build(
        context_grid, context_masks, context_size, views, gaussians, camera, labels, count, rows, columns, settings
    )
    coverage = pool(alpha[..., None], h, w, "area")[..., 0]
    weighted = settings.weighting == "coverage"
    per_row = torch.ones(h * w, dtype=torch.float64, device=alpha.device)
    if weighted:
        mass = coverage if settings.pooling == "area" else pool(alpha[..., None], h, w, settings.pooling)[..., 0]
        mass = mass.flatten().double()
        per_row = torch.where(mass > EMPTY, 1 / mass.clamp(min=EMPTY), torch.zeros_like(mass))
    shares = None
    if labels is not None and means is not None:
        pixels = alpha if weighted else torch.ones_like(alpha)
        total = torch.bincount(labels.flatten().long(), pixels.flatten().double(), minlength=count)
        means = _scaled(means, torch.where(total > 0, 1 / total, torch.zeros_like(total)), alpha.dtype)
        shares = _scaled(_shares(rows, columns, labels, count, pixels), per_row, alpha.dtype)
    return TokenOperator(
        points=_scaled(points, per_row, alpha.dtype),
        regions=means,
        shares=shares,
        context_shape=(views, *context_grid),
        coverage=coverage,
        isolated=isolated,
        blendable=target_mask is None or settings.blending < 1,
    )


def _by_sums(
    grid: tuple[int, int],
    masks: Int[Tensor, "v H W"] | None,
    size: tuple[int, int],
    views: int,
    gaussians: Gaussians,
    camera: PinholeCamera,
    labels: Int[Tensor, "Ht Wt"] | None,
    count: int,
    rows: Axis,
    columns: Axis,
    settings: SupervisionSettings,
) -> tuple[SparseRows, SparseRows | None, Float[Tensor, "Ht Wt"], Float[Tensor, ""]]:
    """A and G before any scaling, accumulated alpha, and the share of isolated pixels."""
    context_tokens, target_tokens = views * grid[0] * grid[1], rows.begin.size * columns.begin.size
    with engine_lock:
        interpolation, isolated = _interpolation(masks, size, grid, views, settings, gaussians.dtype)
        footprints = project_footprints(gaussians, camera, NEAR, FAR)
        tiles = find_tiles(footprints, camera.height, camera.width, TILE)
        regions = None
        if labels is not None:
            array = labels.numpy()
            regions = Regions(array, uniform_reach(array), count)
        sums, alpha = sum_weights(footprints, tiles, interpolation, rows, columns, regions, context_tokens)
    cut = int(sums.starts[target_tokens])
    points = SparseRows(
        torch.from_numpy(sums.starts[: target_tokens + 1].copy()),
        torch.from_numpy(sums.columns[:cut].copy()),
        torch.from_numpy(sums.values[:cut]),
        context_tokens,
    )
    means = None
    if regions is not None:
        means = SparseRows(
            torch.from_numpy(sums.starts[target_tokens:] - cut),
            torch.from_numpy(sums.columns[cut:].copy()),
            torch.from_numpy(sums.values[cut:]),
            context_tokens,
        )
    return points, means, torch.from_numpy(alpha), isolated


def _interpolation(
    masks: Int[Tensor, "v H W"] | None,
    size: tuple[int, int],
    grid: tuple[int, int],
    views: int,
    settings: SupervisionSettings,
    dtype: torch.dtype,
) -> tuple[Interpolation, Float[Tensor, ""]]:
    """The upsampling operator of all views, four consecutive tokens per pixel; and the share of isolated pixels."""
    (height, width), (h, w) = size, grid
    down, right = min(h - 1, 1) * w, min(w - 1, 1)
    offsets = np.array([0, right, down, down + right], np.int64)
    axes = _base_and_fraction(height, h, settings.align_corners, dtype)
    axes += _base_and_fraction(width, w, settings.align_corners, dtype)
    bases = np.empty(views * height * width, np.int32)
    weights = np.empty((len(bases), 4), axes[1].dtype)
    isolated = 0
    for view in range(views):
        mask, labels = np.zeros((1, 1), np.int32), np.zeros(1, np.int32)
        masked = masks is not None and settings.upsampling == "mask"
        if masks is not None and masked:
            compact, count = compact_labels(masks[view])
            mask = compact.numpy()
            if settings.token_label == "majority":
                labels = majority_labels(mask, count, h, w)
            else:
                labels = token_labels(compact, h, w, settings.token_label, settings.align_corners).flatten().numpy()
        pixels = slice(view * height * width, (view + 1) * height * width)
        isolated += corner_weights(
            *axes, offsets, w, mask, labels, masked, settings.isolated == "zero", view * h * w, bases[pixels],
            weights[pixels],
        )  # fmt: skip
    return Interpolation(bases, weights, offsets), torch.tensor(isolated / len(bases), dtype=dtype)


@lru_cache(maxsize=64)
def _base_and_fraction(
    pixels: int, tokens: int, align_corners: bool, dtype: torch.dtype
) -> tuple[Int[np.ndarray, "p"], Float[np.ndarray, "p"]]:
    """First of each pixel's two neighbouring tokens along an axis, and the weight of the other; both exist."""
    neighbours, weights = axis_weights(pixels, tokens, align_corners, torch.device("cpu"), dtype)
    # The last token may come as its own neighbour, with weight 1: then it is the other of the two before it.
    last = (neighbours[:, 0] == tokens - 1) & (tokens > 1)
    base = torch.where(last, neighbours[:, 0] - 1, neighbours[:, 0])
    fraction = torch.where(last, torch.ones_like(weights[:, 1]), weights[:, 1])
    return base.numpy(), fraction.numpy()


def compact_labels(mask: Int[Tensor, "H W"]) -> tuple[Int[Tensor, "H W"], int]:
    """Ids as int32 from 0 to below the returned count, in the same order; small ones stay as they are."""
    lowest, highest = (int(value) for value in torch.aminmax(mask))
    if lowest >= 0 and highest < SMALL_IDS:
        return mask.to(torch.int32).contiguous(), highest + 1
    ids, labels = torch.unique(mask, return_inverse=True)
    return labels.to(torch.int32), len(ids)


@lru_cache(maxsize=64)
def pooling_axis(tokens: int, pixels: int, method: str, dtype: torch.dtype) -> Axis:
    """Weights of `pool` along one axis, of the very same values."""
    if method == "area":
        matrix = area_weights(tokens, pixels, dtype)
    else:
        # what the library does to the rows of an identity matrix is what it does to an axis
        identity = torch.eye(pixels, dtype=dtype)[None, None]
        matrix = F.interpolate(identity, size=(tokens, pixels), mode="bilinear", align_corners=False)[0, 0]
    used = (matrix != 0).numpy()
    begin = used.argmax(axis=1)
    end = pixels - used[:, ::-1].argmax(axis=1)
    longest = int((end - begin).max())
    places = np.minimum(begin[:, None] + np.arange(longest), pixels - 1)
    weights = np.take_along_axis(matrix.numpy(), places, axis=1) * (np.arange(longest) < (end - begin)[:, None])
    first = np.searchsorted(end, np.arange(pixels), side="right")
    return Axis(begin, end, np.ascontiguousarray(weights, dtype=matrix.numpy().dtype), first)


def _shares(
    rows: Axis, columns: Axis, labels: Int[Tensor, "H W"], count: int, pixels: Float[Tensor, "H W"]
) -> SparseRows:
    """Q before any scaling: how much of each token's pooled mass lies in each region."""
    with engine_lock:
        starts, found, values = region_shares(
            *rows[:3], *columns[:3], labels.cpu().numpy(), count, pixels.cpu().contiguous().numpy(),
            4 * numba.get_num_threads(),
        )  # fmt: skip
    return SparseRows(torch.from_numpy(starts), torch.from_numpy(found), torch.from_numpy(values), count).to(
        pixels.device
    )


def _scaled(rows: SparseRows, factors: Float[Tensor, "rows"], dtype: torch.dtype) -> SparseRows:
    """Every row times its factor."""
    per_entry = torch.repeat_interleave(factors, rows.starts.diff())
    return replace(rows, values=(rows.values * per_entry).to(dtype))


# ---------------------------------------------------------------------- by gradients


def _by_gradients(
    grid: tuple[int, int],
    masks: Int[Tensor, "v H W"] | None,
    size: tuple[int, int],
    views: int,
    gaussians: Gaussians,
    camera: PinholeCamera,
    labels: Int[Tensor, "Ht Wt"] | None,
    count: int,
    rows: Axis,
    columns: Axis,
    settings: SupervisionSettings,
) -> tuple[SparseRows, SparseRows | None, Float[Tensor, "Ht Wt"], Float[Tensor, ""]]:
    """As `_by_sums`, through any differentiable rasterizer.

    The gradient of `sum_u v_u F_u` with respect to a Gaussian's feature is `sum_u v_u w_ug`: a channel of v gives every
    Gaussian's mass in one weighted set of pixels. A Gaussian reaches few tokens, so that tokens far apart share a
    channel: with m channels per axis, m the most tokens that any Gaussian reaches along it, channel and place of the
    Gaussian tell the token.
    """
    device, dtype = gaussians.device, gaussians.dtype
    context_tokens = views * grid[0] * grid[1]
    lifting = [
        interpolation_weights(mask, size, grid, settings, dtype, device)
        for mask in ([None] * views if masks is None else list(masks))
    ]
    tokens = torch.cat([lift.tokens + view * grid[0] * grid[1] for view, lift in enumerate(lifting)])
    weights = torch.cat([lift.weights for lift in lifting]).double()
    isolated = torch.stack([lift.isolated for lift in lifting]).mean()
    alpha = rasterize(gaussians, camera, gaussians.means.new_zeros(len(gaussians), 0)).alpha

    boxes, seen = _widest_boxes(gaussians, camera)
    (low_y, span_y), (low_x, span_x) = (
        _tokens_of(axis, boxes[:, side], boxes[:, side + 2], seen) for axis, side in ((rows, 1), (columns, 0))
    )
    colours_y, colours_x = _colours(rows, span_y, device, dtype), _colours(columns, span_x, device, dtype)
    points = _Entries(len(rows.begin) * len(columns.begin), context_tokens, device)
    for first in range(0, span_y * span_x, CHANNELS_PER_PASS):
        channel = torch.arange(first, min(first + CHANNELS_PER_PASS, span_y * span_x), device=device)
        of_y, of_x = channel // span_x, channel % span_x
        upstream = colours_y[of_y].T[:, None, :] * colours_x[of_x].T[None, :, :]
        g, number, mass = _masses(gaussians, camera, upstream)
        token_y = low_y[g] + (of_y[number] - low_y[g]) % span_y
        token_x = low_x[g] + (of_x[number] - low_x[g]) % span_x
        points.add(token_y * len(columns.begin) + token_x, tokens[g], mass[:, None] * weights[g])
    if labels is None:
        return points.rows(), None, alpha, isolated
    means, present = _Entries(count, context_tokens, device), torch.unique(labels)
    for ids in present.split(CHANNELS_PER_PASS):
        g, number, mass = _masses(gaussians, camera, (labels[..., None] == ids).to(dtype))
        means.add(ids[number].long(), tokens[g], mass[:, None] * weights[g])
    return points.rows(), means.rows(), alpha, isolated


def _masses(
    gaussians: Gaussians, camera: PinholeCamera, upstream: Float[Tensor, "H W c"]
) -> tuple[Int[Tensor, "m"], Int[Tensor, "m"], Float[Tensor, "m"]]:
    """Gaussian, channel and `sum_u upstream[u, channel] w_ug`, float64, wherever that is not zero."""
    with torch.enable_grad():
        features = gaussians.means.new_zeros(len(gaussians), upstream.shape[-1]).requires_grad_()
        rendered = rasterize(gaussians, camera, features).features
        (masses,) = torch.autograd.grad(rendered, features, upstream)
    g, channel = masses.nonzero(as_tuple=True)
    return g, channel, masses[g, channel].double()


def _widest_boxes(gaussians: Gaussians, camera: PinholeCamera) -> tuple[Int[Tensor, "n 4"], Bool[Tensor, "n"]]:
    """Pixels that each Gaussian can reach by any rasterizer's rules: where its alpha is at least 1/255; and which ones
    reach any. Culled ones get an arbitrary box."""
    projection = project_gaussians(gaussians, camera)
    xx, xy, yy = projection.conics.double().unbind(dim=1)
    variances = torch.stack([yy, xx], dim=1) / (xx * yy - xy * xy)[:, None]
    reach = torch.log(gaussians.opacities.double().clamp(min=MIN_ALPHA) / MIN_ALPHA)
    half = (2 * reach[:, None] * variances).sqrt() * (1 + 1e-3) + 1
    size = torch.tensor([camera.width, camera.height], device=gaussians.device)
    centre = projection.means2d.double()
    seen = (projection.depths >= NEAR) & (projection.depths <= FAR) & torch.isfinite(half).all(dim=1)
    seen &= (gaussians.opacities >= MIN_ALPHA * (1 - 1e-6)) & (variances > 0).all(dim=1)
    seen &= (centre + half > 0).all(dim=1) & (centre - half < size).all(dim=1)
    low = torch.where(seen[:, None], centre - half, torch.zeros_like(half)).floor().clamp(min=0)
    high = torch.where(seen[:, None], centre + half, torch.ones_like(half)).ceil()
    low, high = torch.minimum(low.long(), size - 1), torch.minimum(high.long(), size)
    return torch.cat([low, torch.maximum(high, low + 1)], dim=1), seen


def _tokens_of(
    axis: Axis, first: Int[Tensor, "n"], end: Int[Tensor, "n"], seen: Bool[Tensor, "n"]
) -> tuple[Int[Tensor, "n"], int]:
    """The first token along an axis that pixels [first, end) may belong to, and how many tokens such a range has."""
    device = first.device
    starts_after = torch.from_numpy(axis.first).to(device)
    begins_before = torch.from_numpy(np.searchsorted(axis.begin, np.arange(len(axis.first) + 1))).to(device)
    low = starts_after[first]
    spans = (begins_before[end] - low)[seen]
    return low, max(int(spans.max()) if len(spans) else 1, 1)


def _colours(axis: Axis, span: int, device: torch.device, dtype: torch.dtype) -> Float[Tensor, "span pixels"]:
    """Pooling weights of the tokens that share each channel: token t has channel t modulo the span."""
    colours = torch.zeros(span, len(axis.first), dtype=dtype)
    for token, (begin, end) in enumerate(zip(axis.begin.tolist(), axis.end.tolist(), strict=True)):
        colours[token % span, begin:end] += torch.from_numpy(axis.weights[token, : end - begin])
    return colours.to(device)


class _Entries:
    """A sparse matrix that is added to; what falls on one place is summed."""

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        self._size = height, width
        self._sum = torch.sparse_coo_tensor(
            torch.zeros(2, 0, dtype=torch.long, device=device),
            torch.zeros(0, dtype=torch.float64, device=device),
            self._size,
            check_invariants=False,
        ).coalesce()

    def add(self, rows: Int[Tensor, "m"], columns: Int[Tensor, "m 4"], values: Float[Tensor, "m 4"]) -> None:
        """Add four values to each row."""
        places = torch.stack([rows[:, None].expand_as(columns).reshape(-1), columns.reshape(-1)])
        more = torch.sparse_coo_tensor(places, values.reshape(-1), self._size, check_invariants=False)
        self._sum = (self._sum + more.coalesce()).coalesce()

    def rows(self) -> SparseRows:
        """Row by row, without zeros."""
        row, column = self._sum.indices()
        values = self._sum.values()
        kept = values != 0
        counts = torch.bincount(row[kept], minlength=self._size[0])
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return SparseRows(starts, column[kept].to(torch.int32), values[kept], self._size[1])
