"""Angles between predicted and measured normals: image by image, and over all pixels of a set."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from snd_nerfstudio.probing.metrics.depth import mean_of_images

THRESHOLDS = (11.25, 22.5, 30.0)
"""Degrees."""
NORMALS_METRICS = ("d1", "d2", "d3", "rmse", "mean", "median")
"""Keys of what `normals_errors` gives."""


def valid_normals(
    depth: Float[Tensor, "*b H W"], normals: Float[Tensor, "*b 3 H W"], need_normal: bool
) -> Bool[Tensor, "*b H W"]:
    """Pixels that count: those with depth, as Probe3D and the released code have it.

    Args:
        depth: metres, 0 = not measured.
        normals: of length 1, or 0 where there is none.
        need_normal: also that there is a normal (longer than 0.5). Else a pixel with depth and without a normal
            counts as wrong by 90 degrees.
    """
    valid = depth > 0
    return valid & (normals.norm(dim=-3) > 0.5) if need_normal else valid


def angles(
    prediction: Float[Tensor, "3 H W"], normals: Float[Tensor, "3 H W"], valid: Bool[Tensor, "H W"]
) -> Float[Tensor, "n"]:
    """Angles of the valid pixels, degrees, float64; 90 where either normal is 0.

    Args:
        prediction: of any length.
        normals: of length 1.
        valid: which pixels count.
    """
    # in single precision acos is off by 0.02 degrees near 0
    cosine = F.cosine_similarity(prediction[:, valid].double(), normals[:, valid].double(), dim=0)
    return torch.rad2deg(cosine.clamp(-1, 1).acos())


def normals_errors(errors: Float[Tensor, "n"]) -> dict[str, float]:
    """Errors of one image.

    Args:
        errors: of `angles`.

    Returns:
        ``d1``, ``d2``, ``d3``: shares of pixels below 11.25, 22.5 and 30 degrees; ``rmse``, ``mean`` and ``median``
        in degrees. All nan if there is no pixel (the released code counts such an image as one without error).
    """
    if not len(errors):
        return dict.fromkeys(NORMALS_METRICS, math.nan)
    ordered = errors.sort().values
    return {
        **{f"d{place}": float((errors < limit).double().mean()) for place, limit in enumerate(THRESHOLDS, start=1)},
        "rmse": float(errors.square().mean().sqrt()),
        "mean": float(errors.mean()),
        # torch.median takes the lower of two middle values
        "median": float((ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2),
    }


@dataclass
class NormalsScores:
    """Collects the errors of a set of images.

    The paper's figure is the mean over images of each image's RMSE. ``rmse_pooled`` is the RMSE over the pixels of
    all images together, which is never less if all have as many pixels.
    """

    images: list[dict[str, float]] = field(default_factory=list)
    """`normals_errors` of the images so far."""
    squares: float = 0.0
    """Sum of squared errors over all pixels, square degrees."""
    pixels: int = 0
    """How many pixels."""

    def update(
        self,
        prediction: Float[Tensor, "b c H W"],
        normals: Float[Tensor, "b 3 H W"],
        valid: Bool[Tensor, "b H W"],
    ) -> None:
        """Add images.

        Args:
            prediction: directions of any length; channels beyond the third are left out.
            normals: of length 1.
            valid: which pixels count.
        """
        for guess, truth, mask in zip(prediction[:, :3], normals, valid, strict=True):
            errors = angles(guess, truth, mask)
            self.images.append(normals_errors(errors))
            self.squares += float(errors.square().sum())
            self.pixels += len(errors)

    def compute(self) -> dict[str, float]:
        """Mean over images of each error, and ``rmse_pooled``; empty if there were no images."""
        pooled = math.sqrt(self.squares / self.pixels) if self.pixels else math.nan
        return {**mean_of_images(self.images), "rmse_pooled": pooled} if self.images else {}
