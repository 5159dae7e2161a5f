"""Sizes of the network, and what its depth means."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Mapping

from snd_nerfstudio.errors import InputError

Geometry = Literal["official", "exact"]

STRIDE = 16
"""Image sides are padded to a multiple of this: both U-Nets halve them that often."""


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes of the network; the defaults are the released RE10K model's."""

    candidates: int = 128
    """Depths tried by the plane sweep, evenly spaced in inverse depth."""
    stem_channels: int = 64
    """Channels of the image encoder at half resolution."""
    middle_channels: int = 96
    """Channels of the image encoder's second stage."""
    feature_channels: int = 128
    """Channels of the matched features, at a quarter of the resolution."""
    transformer_blocks: int = 6
    """Blocks of the multi-view transformer; every second one has shifted windows."""
    cost_channels: int = 128
    """Channels of the U-Net over the cost volume."""
    depth_channels: int = 32
    """Channels of the U-Net that refines depth at full resolution."""
    harmonics: int = 25
    """Colour coefficients per channel: 1, 4, 9, 16 or 25."""
    min_scale: float = 0.5
    """Smallest standard deviation of a Gaussian, tenths of a pixel (both axes summed)."""
    max_scale: float = 15.0
    """Largest one."""


@dataclass(frozen=True)
class MVSplatSettings(NetworkSizes):
    """Sizes, the range of depths, and what depth means."""

    geometry: Geometry = "exact"
    """How depth and pixels are read: `official` repeats the released code, whose plane sweep and unprojection disagree
    (docs/mvsplat.md); `exact` is consistent, and for models trained here."""
    near: float = 1.0
    """Smallest depth tried, world units, where a call does not say otherwise."""
    far: float = 100.0
    """Largest depth tried, world units, where a call does not say otherwise."""

    def __post_init__(self) -> None:
        if not 0 < self.near < self.far < math.inf:
            raise InputError(
                f"near {self.near:g} and far {self.far:g}: 0 < near < far is needed (--pipeline.datamanager.near, "
                "--pipeline.datamanager.far)."
            )
        if self.geometry not in ("official", "exact"):
            raise InputError(f"geometry {self.geometry!r}: choose official or exact.")
        if self.harmonics not in (1, 4, 9, 16, 25):
            raise InputError(f"harmonics {self.harmonics}: choose 1, 4, 9, 16 or 25.")
        if self.candidates < 2:
            raise InputError(f"candidates {self.candidates}: the plane sweep needs at least 2 depths.")
        for name, divisor in (("feature_channels", 4), ("cost_channels", 32), ("depth_channels", 32)):
            if getattr(self, name) < divisor or getattr(self, name) % divisor:
                raise InputError(f"{name} {getattr(self, name)} must be a multiple of {divisor}.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "MVSplatSettings":
        """The settings that a checkpoint stores.

        Raises:
            InputError: a setting is missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) != names:
            differing = sorted(set(values) ^ names) if isinstance(values, Mapping) else [type(values).__name__]
            raise InputError(
                f"{source} was written by another version of this program (settings: {', '.join(map(str, differing))})."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"The settings in {source} make no sense ({error}).") from error


RE10K = MVSplatSettings(geometry="official")
"""The released model (`config/experiment/re10k.yaml`): images of 256x256, near 1, far 100."""
SCANNETPP = MVSplatSettings(geometry="official")
"""The released Splat and Distill code (`config/experiment/scannetpp.yaml`): the same network, near and far, on images
of 576x880; nothing nearer than a metre can be represented."""
