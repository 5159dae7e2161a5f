"""How good a reconstruction is: the first thing to look at, for features splatted with bad geometry teach nothing."""

from dataclasses import dataclass
from typing import Optional

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, Splatted, rasterize
from snd_nerfstudio.splatting.harmonics import harmonic_colours

COVERED = 0.5
"""Alpha from which a pixel counts as covered."""
SIMILAR_RATIO = 1.25
"""Depths within this factor of the measured one count as right (the usual delta_1 of depth estimation)."""


def gaussian_colours(gaussians: Gaussians, context: Views, camera: PinholeCamera) -> Float[Tensor, "n 3"]:
    """Colours of Gaussians as one camera sees them: the reconstructor's own, or else those of the context pixels."""
    if gaussians.harmonics is not None:
        return harmonic_colours(gaussians, camera.camera_to_world[:3, 3])
    return rearrange(context.images, "v c h w -> (v h w) c")


def splat_colours(gaussians: Gaussians, context: Views, camera: PinholeCamera) -> Splatted:
    """The reconstruction in colour, on black."""
    return rasterize(gaussians, camera, gaussian_colours(gaussians, context, camera))


def psnr(image: Float[Tensor, "*pixels 3"], truth: Float[Tensor, "*pixels 3"]) -> float:
    """Peak signal-to-noise ratio of colours in [0, 1]: ``-10 log10(mean squared error)``, dB, at most 100."""
    error = (image.clamp(0, 1) - truth).square().mean().clamp(min=1e-10)
    return float(-10 * torch.log10(error))


def ssim(image: Float[Tensor, "H W 3"], truth: Float[Tensor, "H W 3"]) -> float:
    """Structural similarity (Wang et al. 2004), Gaussian window of 11 pixels with deviation 1.5."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    batches = [rearrange(x.clamp(0, 1), "h w c -> 1 c h w") for x in (image, truth)]
    return float(structural_similarity_index_measure(*batches, data_range=1.0))  # type: ignore


def context_depths(gaussians: Gaussians, context: Views) -> Float[Tensor, "v H W"]:
    """z-depth of every Gaussian in the view whose pixel it belongs to, world units."""
    poses = context.camera_to_worlds
    means = rearrange(gaussians.means, "(v h w) xyz -> v h w xyz", v=len(context), h=context.height, w=context.width)
    return torch.einsum("vhwi,vi->vhw", means - poses[:, None, None, :3, 3], poses[:, :3, 2])


@dataclass(frozen=True)
class DepthErrors:
    """Of predicted against measured depth, over the pixels that have a measurement."""

    relative: float
    """Mean of ``|z - d| / d`` (AbsRel)."""
    right: float
    """Share of the pixels with ``max(z / d, d / z) < 1.25`` (delta_1)."""
    measured: float
    """Share of all pixels that have a measurement."""


def depth_errors(predicted: Float[Tensor, "*pixels"], measured: Float[Tensor, "*pixels"]) -> Optional[DepthErrors]:
    """Compare depth maps; None if nothing was measured.

    Args:
        predicted: z-depth, world units.
        measured: the same, 0 = no value.
    """
    valid: Bool[Tensor, "*pixels"] = measured > 0
    if not valid.any():
        return None
    z, d = predicted[valid], measured[valid]
    ratio = torch.maximum(z / d, d / z.clamp(min=1e-6))
    return DepthErrors(
        relative=float(((z - d).abs() / d).mean()),
        right=float((ratio < SIMILAR_RATIO).float().mean()),
        measured=float(valid.float().mean()),
    )


@torch.no_grad()
def reconstruction_quality(
    gaussians: Gaussians, triplet: ViewTriplet
) -> tuple[dict[str, float], dict[str, Float[Tensor, "H W 3"]]]:
    """Measure a reconstruction on a target view that it has not seen.

    Args:
        gaussians: of the context views.
        triplet: the first of its target views is looked at; depths of the context views are used where they are there.

    Returns:
        ``psnr`` and ``ssim`` of the re-rendered target (holes are black and count), ``psnr_covered`` over the covered
        pixels with colours divided by alpha, ``coverage`` (mean alpha), and with measured depth ``depth_error``
        (AbsRel) and ``depth_right`` (delta_1) of the context views; and the pictures ``target`` and ``splatted``.
    """
    splat = splat_colours(gaussians, triplet.context, triplet.target.camera(0))
    truth = rearrange(triplet.target.images[0], "c h w -> h w c")
    covered = splat.alpha > COVERED
    filled = splat.features / splat.alpha.clamp(min=1e-6)[..., None]
    metrics = {
        "psnr": psnr(splat.features, truth),
        "psnr_covered": psnr(filled[covered], truth[covered]) if covered.any() else 0.0,
        "ssim": ssim(splat.features, truth),
        "coverage": float(splat.alpha.mean()),
    }
    if triplet.context.depths is not None:
        errors = depth_errors(context_depths(gaussians, triplet.context), triplet.context.depths)
        if errors is not None:
            metrics |= {"depth_error": errors.relative, "depth_right": errors.right}
    return metrics, {"target": truth, "splatted": splat.features.clamp(0, 1)}
