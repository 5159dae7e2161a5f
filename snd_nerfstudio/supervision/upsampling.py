"""Tokens to pixels within instance masks (paper section 3.3, equations 2 and 3)."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.supervision.settings import SupervisionSettings


@dataclass(frozen=True)
class InterpolationWeights:
    """Each pixel as a weighted sum of four tokens: one sparse row of the upsampling operator."""

    tokens: Int[Tensor, "pixels 4"]
    """Row-major token numbers."""
    weights: Float[Tensor, "pixels 4"]
    """They sum to 1, or are all 0 for an isolated pixel under ``isolated="zero"``."""
    isolated: Float[Tensor, ""]
    """Share of pixels none of whose four tokens shares their instance."""


def axis_weights(
    pixels: int, tokens: int, align_corners: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, "p 2"]]:
    """The two neighbouring tokens of each pixel along one axis and their weights."""
    if align_corners:
        position = torch.linspace(0, tokens - 1, pixels, device=device, dtype=dtype)
    else:
        centre = (torch.arange(pixels, device=device, dtype=dtype) + 0.5) * (tokens / pixels) - 0.5
        position = centre.clamp(0, tokens - 1)
    low = position.floor().long().clamp(max=tokens - 1)
    high = (low + 1).clamp(max=tokens - 1)
    fraction = position - low
    return torch.stack([low, high], dim=-1), torch.stack([1 - fraction, fraction], dim=-1)


def token_labels(
    mask: Int[Tensor, "H W"], h: int, w: int, rule: str = "majority", align_corners: bool = False
) -> Int[Tensor, "h w"]:
    """The instance of every token.

    Args:
        mask: instance id of every pixel.
        h: token rows.
        w: token columns.
        rule: ``majority`` of the pixels whose centre lies in the token's cell (of equally common ids the smallest), or
            ``sample`` of the one pixel at the token's position.
        align_corners: where a token's position is, for ``sample``.

    Returns:
        Instance ids, as in ``mask``.
    """
    height, width = mask.shape
    if rule == "sample":
        if align_corners:
            rows = torch.linspace(0, height - 1, h, device=mask.device).round().long()
            columns = torch.linspace(0, width - 1, w, device=mask.device).round().long()
        else:
            rows = ((torch.arange(h, device=mask.device) + 0.5) * height / h).long()
            columns = ((torch.arange(w, device=mask.device) + 0.5) * width / w).long()
        return mask[rows[:, None], columns]
    ids, compact = torch.unique(mask, return_inverse=True)
    rows = ((torch.arange(height, device=mask.device) + 0.5) * h / height).long().clamp(max=h - 1)
    columns = ((torch.arange(width, device=mask.device) + 0.5) * w / width).long().clamp(max=w - 1)
    cell = rows[:, None] * w + columns
    counts = torch.bincount((cell * len(ids) + compact).flatten(), minlength=h * w * len(ids)).view(h * w, len(ids))
    # argmax does not promise which of equal counts it returns, so the ranking is made strict
    ranking = counts * (len(ids) + 1) - torch.arange(len(ids), device=mask.device)
    return ids[ranking.argmax(dim=1)].view(h, w)


def interpolation_weights(
    mask: Int[Tensor, "H W"] | None,
    size: tuple[int, int],
    grid: tuple[int, int],
    settings: SupervisionSettings,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> InterpolationWeights:
    """The upsampling operator U, four tokens per pixel.

    ``w_uv = b_uv [label(v) = label(u)] / sum_v' b_uv' [label(v') = label(u)]`` with the bilinear weights ``b``
    (equation 3). Without a mask, or with ``upsampling="bilinear"``, ``w = b``.

    Args:
        mask: instance id of every pixel; None for plain bilinear interpolation.
        size: height and width in pixels.
        grid: token rows and columns.
        settings: which variant.
        dtype: of the weights.
        device: where to build them when there is no mask.

    Returns:
        Row-major over pixels.
    """
    height, width = size
    h, w = grid
    device = torch.device(device) if mask is None else mask.device
    rows, row_weights = axis_weights(height, h, settings.align_corners, device, dtype)
    columns, column_weights = axis_weights(width, w, settings.align_corners, device, dtype)
    tokens = rows[:, None, :, None] * w + columns[None, :, None, :]
    weights = row_weights[:, None, :, None] * column_weights[None, :, None, :]
    tokens = rearrange(tokens, "H W i j -> (H W) (i j)")
    weights = rearrange(weights, "H W i j -> (H W) (i j)")
    if mask is None or settings.upsampling == "bilinear":
        return InterpolationWeights(tokens, weights, torch.zeros((), dtype=dtype, device=device))
    labels = token_labels(mask, h, w, settings.token_label, settings.align_corners).flatten()
    same = labels[tokens] == mask.reshape(-1, 1)
    within = weights * same
    total = within.sum(dim=-1, keepdim=True)
    isolated = total <= 0
    fallback = weights if settings.isolated == "bilinear" else torch.zeros_like(weights)
    masked = torch.where(isolated, fallback, within / torch.where(isolated, torch.ones_like(total), total))
    return InterpolationWeights(tokens, masked, isolated.to(dtype).mean())


def apply_weights(
    tokens: Float[Tensor, "h w c"], operator: InterpolationWeights, size: tuple[int, int]
) -> Float[Tensor, "H W c"]:
    """``F_high(u) = sum_v w_uv F_low(v)`` (equation 2), dense.

    Args:
        tokens: on their grid.
        operator: U, for this grid and size.
        size: height and width of the result.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    pixels = operator.weights[:, :1] * flat[operator.tokens[:, 0]]
    for corner in range(1, 4):  # one corner at a time: a [pixels, 4, c] tensor would be four times the map
        pixels.addcmul_(operator.weights[:, corner : corner + 1], flat[operator.tokens[:, corner]])
    return pixels.view(*size, -1)


def upsample(
    tokens: Float[Tensor, "h w c"],
    mask: Int[Tensor, "H W"] | None,
    size: tuple[int, int],
    settings: SupervisionSettings,
) -> Float[Tensor, "H W c"]:
    """Tokens to pixels within instance masks.

    Args:
        tokens: on their grid.
        mask: instance id of every pixel, or None.
        size: height and width of the result.
        settings: which variant.
    """
    h, w, _ = tokens.shape
    return apply_weights(tokens, interpolation_weights(mask, size, (h, w), settings, tokens.dtype, tokens.device), size)
