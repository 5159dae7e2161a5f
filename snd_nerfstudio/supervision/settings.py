"""Every switch of the teacher's path."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SupervisionSettings:
    """How context tokens become target tokens. The defaults are the `fixed` profile's."""

    upsampling: Literal["mask", "bilinear"] = "mask"
    """Interpolate tokens within instance masks (paper equations 2-3), or plainly (ablation B)."""
    align_corners: bool = False
    """Token 0 sits on pixel row 0 (released code) instead of at the centre of its patch."""
    token_label: Literal["majority", "sample"] = "majority"
    """A token's instance: the commonest one in its patch, or that of a single pixel (released code)."""
    isolated: Literal["bilinear", "zero"] = "bilinear"
    """Feature of a pixel none of whose tokens shares its instance: plain bilinear, or zero (released code)."""
    footprint: Literal["exact", "squared"] = "exact"
    """Size of a Gaussian when features are splatted: its own, or variances taken for deviations (released code)."""
    blending: float = 0.5
    """Alpha of paper equation 4: weight of a pixel against the mean of its instance region; 1 = no blending."""
    weighting: Literal["coverage", "none"] = "coverage"
    """Average pixels by accumulated alpha, so that holes do not darken a region or a token, or all alike (paper)."""
    pooling: Literal["area", "bilinear"] = "area"
    """Pixels to tokens: mean over the token's cell, or bilinear without antialiasing (released code)."""
