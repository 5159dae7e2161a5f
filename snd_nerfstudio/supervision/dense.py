"""The teacher's path step by step on full-resolution maps: easy to read, and the reference for faster ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.supervision.blending import blend
from snd_nerfstudio.supervision.pooling import pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.upsampling import apply_weights, interpolation_weights

EMPTY = 1e-6
"""Below this coverage a token has no value; its feature is set to zero."""


@dataclass(frozen=True)
class Lifted:
    """A feature for every Gaussian."""

    features: Float[Tensor, "n c"]
    """In the Gaussians' order (view, row, column)."""
    isolated: Float[Tensor, ""]
    """Share of context pixels none of whose four tokens shares their instance."""


@dataclass(frozen=True)
class DenseSupervision:
    """Target tokens and every map on the way to them."""

    tokens: Float[Tensor, "h w c"]
    """What the student is to predict."""
    coverage: Float[Tensor, "h w"]
    """Accumulated alpha, averaged over each token's cell: the share of the token that has support."""
    lifted: Lifted
    """Feature of every Gaussian."""
    splatted: Float[Tensor, "H W c"]
    """Before blending, premultiplied by ``alpha``."""
    blended: Float[Tensor, "H W c"]
    """After blending; premultiplied if ``weighting`` is "coverage"."""
    alpha: Float[Tensor, "H W"]
    """Accumulated alpha of every pixel."""


def lift(
    context_tokens: Float[Tensor, "v h w c"],
    context_masks: Int[Tensor, "v H W"] | None,
    size: tuple[int, int],
    settings: SupervisionSettings,
) -> Lifted:
    """Give every Gaussian the feature of its context pixel (paper section 3.3).

    Args:
        context_tokens: the teacher's tokens of each context view.
        context_masks: instance masks of the context views, or None.
        size: height and width of the context images.
        settings: how to upsample.
    """
    _, h, w, _ = context_tokens.shape
    masks = [None] * len(context_tokens) if context_masks is None else list(context_masks)
    operators = [
        interpolation_weights(mask, size, (h, w), settings, context_tokens.dtype, context_tokens.device)
        for mask in masks
    ]
    maps = [
        apply_weights(tokens, operator, size).flatten(0, 1)
        for tokens, operator in zip(context_tokens, operators, strict=True)
    ]
    return Lifted(torch.cat(maps), torch.stack([operator.isolated for operator in operators]).mean())


def check_pixel_aligned(gaussians: Gaussians, context_size: tuple[int, int]) -> int:
    """How many context views the Gaussians belong to, one per pixel.

    Raises:
        ValueError: their number is not a multiple of that of a view's pixels.
    """
    height, width = context_size
    views, rest = divmod(len(gaussians), height * width)
    if rest or not views:
        raise ValueError(
            f"{len(gaussians)} Gaussians for context views of {height}x{width}: lifting needs one per pixel"
        )
    return views


def dense_supervision(
    context_tokens: Float[Tensor, "v h w c"],
    context_masks: Int[Tensor, "v H W"] | None,
    context_size: tuple[int, int],
    gaussians: Gaussians,
    target_camera: PinholeCamera,
    target_mask: Int[Tensor, "Ht Wt"] | None,
    settings: SupervisionSettings,
) -> DenseSupervision:
    """Lift, splat, blend and pool: ``target_tokens = D B S U context_tokens``.

    Args:
        context_tokens: the teacher's tokens of each context view.
        context_masks: instance masks of the context views, or None for plain bilinear lifting.
        context_size: height and width of the context images.
        gaussians: one per context pixel, in the order (view, row, column).
        target_camera: where to splat to.
        target_mask: instance mask of the target view, or None for no blending.
        settings: every switch.

    Raises:
        ValueError: the number of Gaussians is not that of the context pixels.
    """
    _, h, w, _ = context_tokens.shape
    if check_pixel_aligned(gaussians, context_size) != len(context_tokens):
        raise ValueError(f"{len(gaussians)} Gaussians are not one per pixel of {len(context_tokens)} context views")
    lifted = lift(context_tokens, context_masks, context_size, settings)
    splat = rasterize(gaussians, target_camera, lifted.features, footprint=settings.footprint)
    weighted = settings.weighting == "coverage"
    blended = splat.features
    if target_mask is not None:
        blended = blend(splat.features, target_mask, settings.blending, splat.alpha if weighted else None)
    coverage = pool(splat.alpha[..., None], h, w, "area")[..., 0]
    tokens = pool(blended, h, w, settings.pooling)
    if weighted:
        mass = pool(splat.alpha[..., None], h, w, settings.pooling)
        tokens = torch.where(mass > EMPTY, tokens / mass.clamp(min=EMPTY), torch.zeros_like(tokens))
    return DenseSupervision(tokens, coverage, lifted, splat.features, blended, splat.alpha)
