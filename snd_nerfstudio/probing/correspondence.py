"""Correspondence between two posed images with depth: are the most similar features those of the same point?

Follows what the paper's figure 7 is computed with (released code after Probe3D, Banani et al. 2024): pixels on a
quarter of the depth maps' resolution, nearest neighbours in feature space, the 1000 best by the ratio test, and the
distance between where a point's match is and where the point is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import FeatureMap, match, sample
from snd_nerfstudio.probing.pairs.base import PosedPair

LEAST_DEPTH = 1e-9
"""Points behind the second camera are projected as if they were this far before it."""
ANGLE_DIGITS = 4
"""Angles are rounded to this many digits of a degree, float32's resolution, so that one on an edge falls on it."""


@dataclass(frozen=True)
class CorrespondenceSettings:
    """How correspondence is measured."""

    scale: float = 0.25
    """Resolution at which pixels are matched, and in whose pixels errors are counted, over that of the depth maps."""
    matches: int = 1000
    """Matches that are kept of a pair, those with the highest weights; all if there are fewer."""
    pad_crop: Literal["parity", "exact"] = "exact"
    """`exact`: where a pixel is in the padded feature map. `parity`: as if the map covered the unpadded image."""
    depth_resize: Literal["parity", "exact"] = "exact"
    """`exact`: a pixel lies where its depth was measured. `parity`: depth of the upper left of the pixels that are
    merged, at the middle of them."""
    pixels: tuple[float, ...] = (5.0, 10.0, 20.0)
    """Thresholds in pixels of the scaled resolution: 10 are 40 pixels of a 640 x 480 depth map at scale 0.25."""
    centimetres: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Thresholds of the distance between the two points, centimetres."""
    bins: tuple[float, ...] = (0.0, 15.0, 30.0, 60.0, 180.0)
    """Edges of the bins of the angle between the cameras, degrees; each bin holds its lower edge."""
    binned_by: Literal["pixels", "centimetres"] = "pixels"
    """What the threshold of the recall in bins is in."""
    binned_threshold: float = 10.0
    """Threshold of the recall in bins."""
    norm: Literal["half", "imagenet"] = "imagenet"
    """Mean and standard deviation that images are to be normalised with: 0.5 each, or ImageNet's. Whoever computes
    the features does that; it is kept here because the protocols differ in it."""

    def __post_init__(self) -> None:
        if not (0 < self.scale <= 1 and self.matches >= 1):
            raise InputError(f"scale is {self.scale} and matches {self.matches}: 0 < scale <= 1 and matches >= 1.")
        if len(self.bins) < 2 or list(self.bins) != sorted(set(self.bins)):
            raise InputError(f"bins are {self.bins}, but must be two or more rising edges, degrees.")


PROTOCOLS = {
    "paper": CorrespondenceSettings(pad_crop="parity", depth_resize="parity", norm="half"),
    "fixed": CorrespondenceSettings(),
}
"""`paper`: what the released code does. `fixed`: its inaccuracies mended."""
NAVI = CorrespondenceSettings(
    # Probe3D counts in pixels of the 512 x 512 images, 5, 25 and 50: these are a quarter of them
    pixels=(1.25, 6.25, 12.5),
    bins=(0.0, 30.0, 60.0, 90.0, 120.0),
    binned_by="centimetres",
    binned_threshold=2.0,
)
"""NAVI's objects as Probe3D measures them."""


@dataclass(frozen=True)
class PairErrors:
    """How far the matches of one pair are off."""

    pixels: Float[Tensor, "m"]
    """Distance in the second image, pixels of the scaled resolution."""
    metres: Float[Tensor, "m"]
    """Distance between the two points."""
    angle: float
    """Between the two cameras, degrees."""
    points: tuple[int, int]
    """Pixels with a depth in either image, at the scaled resolution."""
    name: str = ""
    scene: str = ""


@dataclass(frozen=True)
class BinRecall:
    """Pairs with an angle in ``[low, high)``."""

    low: float
    high: float
    pairs: int
    """Those with matches."""
    recall: Optional[float]
    """Mean of their recalls, percent; None without pairs."""


@dataclass(frozen=True)
class PairRecall:
    """One pair, for whoever wants to look closer."""

    name: str
    scene: str
    angle: float
    points: tuple[int, int]
    matches: int
    recall: Optional[float]
    """At the threshold of the bins, percent; None without matches."""


@dataclass(frozen=True)
class CorrespondenceResult:
    """Recalls are percent of the matches of all pairs together, except for those in bins."""

    settings: CorrespondenceSettings
    pixels: dict[str, Optional[float]]
    """Recall by threshold in pixels."""
    centimetres: dict[str, Optional[float]]
    """Recall by threshold in centimetres."""
    bins: list[BinRecall]
    pairs: int
    matches: int
    pairs_with_fewer_matches: int
    """Pairs with some matches, but fewer than wanted."""
    pairs_without_matches: int
    """Pairs in which an image has no depth: they are in no recall."""
    pairs_outside_bins: int
    """Pairs whose angle is in none of the bins."""
    each: list[PairRecall]

    def plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts alone, as JSON has them."""
        return asdict(self)


def pair_errors(
    maps: tuple[FeatureMap, FeatureMap],
    depths: tuple[Float[Tensor, "h0 w0"], Float[Tensor, "h1 w1"]],
    intrinsics: tuple[Float[Tensor, "3 3"], Float[Tensor, "3 3"]],
    relative_pose: Float[Tensor, "4 4"],
    settings: CorrespondenceSettings = PROTOCOLS["fixed"],
) -> PairErrors:
    """Match the pixels of two images by their features and measure how far off the matches are.

    Pixels with a depth d are lifted, ``X = K^-1 (u, v, 1) d``. A match of pixel i of the first image with pixel j of
    the second is off by ``|project(K_1, T X_i) - (u, v)_j|`` in the image and by ``|T X_i - X_j|`` in space.

    Args:
        maps: features of both images.
        depths: depth along the optical axis, metres; 0 = none.
        intrinsics: in pixels of the depth maps, centres at +0.5.
        relative_pose: T, from the first camera's axes to the second's, metres.
        settings: how to measure.

    Raises:
        InputError: a feature is not finite.
    """
    places, points, scaled = [], [], []
    for depth, matrix in zip(depths, intrinsics):
        where, lifted, own = _lift(depth.float(), matrix.float(), settings)
        places.append(where)
        points.append(lifted)
        scaled.append(own)
    features = [
        _sample(fmap, where, depth.shape, settings)  # type: ignore
        for fmap, where, depth in zip(maps, places, depths)
    ]
    matches = match(*features, most=settings.matches)
    transform = relative_pose.to(points[0])
    moved = points[0][matches.first] @ transform[:3, :3].T + transform[:3, 3]
    projected = moved @ scaled[1].T
    projected = projected[:, :2] / projected[:, 2:].clamp_min(LEAST_DEPTH)
    return PairErrors(
        pixels=(projected - places[1][matches.second]).norm(dim=1),
        metres=(moved - points[1][matches.second]).norm(dim=1),
        angle=rotation_angle(relative_pose),
        points=(len(points[0]), len(points[1])),
    )


def rotation_angle(transform: Float[Tensor, "4 4"]) -> float:
    """Angle of a rotation, degrees: ``acos((trace R - 1) / 2)``."""
    rotation = transform[:3, :3].double()
    cosine = float(((torch.trace(rotation) - 1) / 2).clamp(-1, 1))
    return round(float(np.degrees(np.arccos(cosine))), ANGLE_DIGITS)


def _lift(
    depth: Float[Tensor, "h w"], intrinsics: Float[Tensor, "3 3"], settings: CorrespondenceSettings
) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 3"], Float[Tensor, "3 3"]]:
    """Pixel positions, points and intrinsics of a depth map at the scaled resolution."""
    exact = settings.depth_resize == "exact"
    axes = []
    for length in depth.shape:
        index = torch.arange(int(length * settings.scale + 1e-6), device=depth.device, dtype=torch.float64)
        picked = ((index + (0.5 if exact else 0.0)) / settings.scale + 1e-6).floor().clamp(max=length - 1)
        # the middle of the pixel whose depth it is, or that of the pixel of the scaled map
        position = (picked + 0.5) * settings.scale if exact else index + 0.5
        axes.append((picked.long(), position.float()))
    (rows, y), (columns, x) = axes
    small = depth[rows[:, None], columns]
    row, column = torch.nonzero(small > 0, as_tuple=True)
    where = torch.stack([x[column], y[row]], dim=1)
    scaled = intrinsics.clone()
    scaled[:2] *= settings.scale
    rays = torch.cat([where, torch.ones_like(where[:, :1])], dim=1) @ torch.linalg.inv(scaled).T
    return where, rays * small[row, column, None], scaled


def _sample(
    fmap: FeatureMap, where: Float[Tensor, "n 2"], size: tuple[int, int], settings: CorrespondenceSettings
) -> Float[Tensor, "n c"]:
    """Features at positions in the scaled depth map of a size."""
    extent = where.new_tensor([size[1], size[0]]) * settings.scale
    if settings.pad_crop == "parity":
        return sample(fmap.values, where / extent.add(1e-6).floor())
    return sample(fmap.values, fmap.in_map(where / extent))


# ---------------------------------------------------------------------- many pairs


def evaluate_pairs(
    pairs: Iterable[PosedPair],
    encode: Callable[[UInt8[np.ndarray, "h w 3"]], FeatureMap],
    settings: CorrespondenceSettings = PROTOCOLS["fixed"],
    after_each: Optional[Callable[[PairErrors], None]] = None,
) -> CorrespondenceResult:
    """Measure correspondence on a data set.

    Args:
        pairs: images with depth and relative pose.
        encode: resizes and normalises an image (see `CorrespondenceSettings.norm`) and computes its features.
        settings: how to measure.
        after_each: called with each pair's errors, to show progress.

    Raises:
        InputError: a file of a pair cannot be read, or a feature is not finite.
    """
    errors = []
    for pair in pairs:
        with torch.no_grad():
            maps = encode(pair.images[0]), encode(pair.images[1])
            device = maps[0].values.device
            depths, matrices = (
                tuple(torch.from_numpy(array).float().to(device) for array in arrays)
                for arrays in (pair.depths, pair.intrinsics)
            )
            pose = torch.from_numpy(pair.relative_pose)
            found = pair_errors(maps, depths, matrices, pose, settings)  # type: ignore
        kept = replace(found, pixels=found.pixels.cpu(), metres=found.metres.cpu(), name=pair.name, scene=pair.scene)
        errors.append(kept)
        if after_each is not None:
            after_each(kept)
    return summarize(errors, settings)


def summarize(errors: Sequence[PairErrors], settings: CorrespondenceSettings) -> CorrespondenceResult:
    """Recalls of many pairs: a match counts if its error is smaller than the threshold.

    In bins of the angle between the cameras, recalls of pairs are averaged; elsewhere all matches count the same.
    """
    pixels = torch.cat([torch.zeros(0), *(pair.pixels.cpu() for pair in errors)])
    metres = torch.cat([torch.zeros(0), *(pair.metres.cpu() for pair in errors)])
    by_pixels = settings.binned_by == "pixels"
    each = []
    for pair in errors:
        values = pair.pixels if by_pixels else 100 * pair.metres
        recall = _recall(values, settings.binned_threshold)
        each.append(PairRecall(pair.name, pair.scene, pair.angle, pair.points, len(pair.pixels), recall))
    bins = []
    for low, high in zip(settings.bins[:-1], settings.bins[1:]):
        inside = [pair.recall for pair in each if low <= pair.angle < high and pair.recall is not None]
        bins.append(BinRecall(low, high, len(inside), sum(inside) / len(inside) if inside else None))
    return CorrespondenceResult(
        settings=settings,
        pixels={f"{threshold:g}": _recall(pixels, threshold) for threshold in settings.pixels},
        centimetres={f"{threshold:g}": _recall(100 * metres, threshold) for threshold in settings.centimetres},
        bins=bins,
        pairs=len(errors),
        matches=len(pixels),
        pairs_with_fewer_matches=sum(0 < pair.matches < settings.matches for pair in each),
        pairs_without_matches=sum(pair.matches == 0 for pair in each),
        pairs_outside_bins=sum(not settings.bins[0] <= pair.angle < settings.bins[-1] for pair in each),
        each=each,
    )


def _recall(errors: Float[Tensor, "m"], threshold: float) -> Optional[float]:
    return 100 * float((errors < threshold).double().mean()) if len(errors) else None
