"""Errors of depth maps as in AdaBins and DINOv2's probes: image by image, then the mean over images."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snd_nerfstudio.errors import InputError

DepthCrop = Literal["none", "eigen", "garg"]
DEPTH_METRICS = ("abs_rel", "rmse", "d1", "d2", "d3", "log10", "rmse_log", "silog", "sq_rel")
"""Keys of what `depth_errors` gives."""
EIGEN_WINDOW = (45, 471, 41, 601)
"""First row and the one after the last, likewise columns: of NYUv2's 480 x 640, applied to any size."""
GARG_WINDOW = (0.40810811, 0.99189189, 0.03594771, 0.96405229)
"""The same for KITTI, as shares of the sides."""


def evaluation_window(size: tuple[int, int], crop: DepthCrop) -> tuple[slice, slice]:
    """Rows and columns that count.

    Args:
        size: rows and columns of the depth map.
        crop: ``none``: all; ``eigen``: a fixed window, used for NYUv2 and ScanNet; ``garg``: shares of the sides,
            used for KITTI.

    Raises:
        InputError: nothing of the map lies within the window.
    """
    if crop == "none":
        return slice(0, size[0]), slice(0, size[1])
    if crop == "eigen":
        top, bottom, left, right = EIGEN_WINDOW
    else:
        top, bottom = (int(share * size[0]) for share in GARG_WINDOW[:2])
        left, right = (int(share * size[1]) for share in GARG_WINDOW[2:])
    bottom, right = min(bottom, size[0]), min(right, size[1])
    if top >= bottom or left >= right:
        raise InputError(
            f"A depth map of {size[0]} x {size[1]} has no pixel in the evaluation crop '{crop}': use the crop 'none' "
            "or larger maps."
        )
    return slice(top, bottom), slice(left, right)


def evaluated_pixels(
    depth: Float[Tensor, "H W"], min_depth: float, max_depth: float, crop: DepthCrop
) -> Bool[Tensor, "H W"]:
    """Pixels within the crop whose measured depth lies between the bounds, which are excluded.

    Raises:
        InputError: see `evaluation_window`.
    """
    inside = torch.zeros_like(depth, dtype=torch.bool)
    inside[evaluation_window((depth.shape[0], depth.shape[1]), crop)] = True
    return inside & (depth > min_depth) & (depth < max_depth)


def depth_errors(
    prediction: Float[Tensor, "H W"],
    depth: Float[Tensor, "H W"],
    min_depth: float,
    max_depth: float,
    crop: DepthCrop = "none",
) -> dict[str, float]:
    """Errors of one depth map over `evaluated_pixels`, with ``d = prediction - depth`` and ``e`` that of logarithms.

    ``abs_rel = mean |d| / depth``; ``sq_rel = mean d^2 / depth``; ``rmse = sqrt(mean d^2)``, metres;
    ``log10 = mean |e| / ln 10``; ``rmse_log = sqrt(mean e^2)``; ``silog = 100 sqrt(mean e^2 - (mean e)^2)``; ``d1``,
    ``d2``, ``d3`` the shares of pixels whose ``max(depth / prediction, prediction / depth)`` is less than 1.25,
    1.25^2 and 1.25^3.

    Args:
        prediction: metres.
        depth: metres, 0 = not measured.
        min_depth: metres.
        max_depth: metres.
        crop: see `evaluation_window`.

    Returns:
        The errors, all nan if no pixel counts.

    Raises:
        InputError: see `evaluation_window`.
        ValueError: a predicted depth is not finite or not positive; its logarithms would be nan, and `mean_of_images`
            would leave the image out.
    """
    pixels = evaluated_pixels(depth, min_depth, max_depth, crop)
    p, t = prediction[pixels].double(), depth[pixels].double()
    if not len(t):
        return dict.fromkeys(DEPTH_METRICS, math.nan)
    if not (torch.isfinite(p) & (p > 0)).all():
        raise ValueError("predicted depths must be finite and positive: clamp them first")
    d, e = p - t, torch.log(p) - torch.log(t)
    ratio = torch.maximum(p / t, t / p)
    squared = e.square().mean()
    return {
        "abs_rel": float((d.abs() / t).mean()),
        "rmse": float(d.square().mean().sqrt()),
        **{f"d{power}": float((ratio < 1.25**power).double().mean()) for power in (1, 2, 3)},
        "log10": float(e.abs().mean() / math.log(10)),
        "rmse_log": float(squared.sqrt()),
        "silog": float(100 * (squared - e.mean().square()).clamp(min=0).sqrt()),
        "sq_rel": float((d.square() / t).mean()),
    }


def mean_of_images(images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every error over the images that have one; nan if none has.

    Args:
        images: of `depth_errors` or of the normals' errors, all with the same keys.
    """
    means: dict[str, float] = {}
    for name in images[0] if images else ():
        values = [image[name] for image in images if not math.isnan(image[name])]
        means[name] = math.fsum(values) / len(values) if values else math.nan
    return means
