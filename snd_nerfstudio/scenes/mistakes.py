"""Which mistake in a dataset's conventions explains that poses, intrinsics, depth and images do not agree."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import permutations, product
from typing import Any, Literal, Optional

import numpy as np
from jaxtyping import Float

from snd_nerfstudio.scenes.reprojection import Cameras, Matches, depth_ratios, epipolar_errors, reprojection_errors

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
"""Between OpenCV's and OpenGL's camera axes."""
FEWEST_MATCHES = 60
"""Fewer matches of a whole scene decide nothing."""
IMPROVEMENT = 0.4
"""A mistake is named if without it the error is no more than this share."""
UNIT_TOLERANCE = 0.06
"""A factor is called by a unit's name if it is this near to it."""
PLAUSIBLE_DEPTH = (0.15, 30.0)
"""Metres: what depth maps of rooms and objects usually measure."""
WAYS = {0: ("right", "left"), 1: ("down", "up"), 2: ("forward", "backward")}

UNITS = {
    1000.0: "metres are taken for millimetres",
    0.001: "millimetres are taken for metres",
    100.0: "metres are taken for centimetres",
    0.01: "centimetres are taken for metres",
    10.0: "centimetres are taken for millimetres",
    0.1: "millimetres are taken for centimetres",
    0.0254: "inches are taken for metres",
    39.37: "metres are taken for inches",
    25.4: "inches are taken for millimetres",
    0.3048: "feet are taken for metres",
    3.2808: "metres are taken for feet",
    0.2: "5000 units per metre (as in TUM's files) are taken for 1000",
    0.25: "4000 units per metre are taken for 1000",
}
"""By the factor that mends the depth."""

Status = Literal["consistent", "imprecise", "likely", "unexplained", "undecided"]


@dataclass(frozen=True)
class Hypothesis:
    """One way in which a dataset may be wrong, and the dataset without it."""

    key: str
    """Short name."""
    sentence: str
    """What is wrong."""
    remedy: str
    """What to do."""
    cameras: Cameras
    """As they would be."""
    factor: float = 1.0
    """That depths would have to be multiplied by."""
    along_ray: bool = False
    """Depths are distances from the camera's centre."""
    rank: int = 1
    """Of several that explain the images equally well the lowest is named."""


@dataclass(frozen=True)
class Verdict:
    """What the check of one scene found."""

    status: Status
    """`consistent`; `imprecise` (not right, not wrong by a convention); a mistake is `likely`; `unexplained`; or
    `undecided`."""
    sentence: str
    """For the user, with numbers."""
    key: str = ""
    """Of the likely mistake."""
    remedy: str = ""
    """Against it."""
    error: float = float("nan")
    """Median error as the dataset stands, pixels of the image file."""
    error_without: float = float("nan")
    """Median error without the likely mistake."""
    motion: float = float("nan")
    """Median distance that points move between the matched images, pixels."""
    matches: int = 0
    pairs: int = 0
    with_depth: bool = False
    """Whether the error is of points lifted with depth, or of epipolar lines."""
    depth_factor: Optional[float] = None
    """Median of triangulated over measured depth."""
    tried: dict[str, float] = field(default_factory=dict)
    """Error of every hypothesis, by its key."""

    @property
    def wrong(self) -> bool:
        """Whether something has to be mended before training."""
        return self.status in ("likely", "unexplained")


def tolerance(diagonal: float) -> float:
    """Error in pixels up to which a dataset is called consistent, for images of some diagonal: 2.5 of 640x480."""
    return 0.5 + 0.0025 * diagonal


def judge(
    cameras: Cameras, matches: Matches, world: Optional[Float[np.ndarray, "4 4"]] = None, scale: float = 1.0
) -> Verdict:
    """Compare a scene's cameras and depth with its images, and name the mistake that explains a disagreement.

    The error is the median distance of matched points from where they should be: with depth, where the point that is
    lifted from the other image falls; without, the epipolar line. Every hypothesis is a change of poses, intrinsics
    or depth. It is named if it takes the error below the tolerance (or twice that) and to less than 0.4 of what it
    was.

    Args:
        cameras: of the scene as they were read.
        matches: of the scene.
        world: what the dataparser multiplied the stored poses by from the left; None: nothing.
        scale: what it multiplied positions by after that.
    """
    facts: dict[str, Any] = {"matches": len(matches), "pairs": len(matches.pairs), "with_depth": matches.has_depth}
    undecided = ""
    if len(matches) < FEWEST_MATCHES:
        undecided = (
            f"only {len(matches)} points could be matched between images (too dark, blurred, far apart, or moving)"
        )
    elif matches.motion < 3 * tolerance(matches.diagonal):
        undecided = f"matched points move by {matches.motion:.1f} pixels only; the camera hardly moves"
    if undecided:
        return Verdict("undecided", f"cannot be decided: {undecided}", motion=matches.motion, **facts)
    error = _error(Hypothesis("", "", "", cameras), matches)
    ratios = depth_ratios(cameras, matches) if matches.has_depth else np.zeros(0)
    factor = float(np.median(ratios)) if len(ratios) >= FEWEST_MATCHES // 3 else None
    facts |= {"error": error, "motion": matches.motion, "depth_factor": factor}
    if error <= tolerance(matches.diagonal):
        return _agreement(cameras, matches, error, facts)
    return _disagreement(list(hypotheses(cameras, matches, world, scale)), matches, error, facts)


def _agreement(cameras: Cameras, matches: Matches, before: float, facts: dict[str, Any]) -> Verdict:
    """Small errors may hide a mistake of the depth alone; poses or intrinsics that are wrong make large ones."""
    after, best = before, Hypothesis("", "", "", cameras)
    if matches.has_depth and before > 0.3 * tolerance(matches.diagonal):
        guesses = [(_error(guess, matches), guess) for guess in _depth_mistakes(best, matches)]
        after, best = min(guesses, key=lambda pair: pair[0])
    if after <= IMPROVEMENT * before:
        return _likely(best, matches, before, after, facts)
    note = "" if matches.has_depth else "; without depth maps the scale cannot be checked"
    what, motion = _kind(matches), matches.motion
    sentence = f"consistent: {what} are off by {before:.1f} pixels (they move by {motion:.0f}){note}"
    return Verdict("consistent", sentence, **facts)


def _disagreement(guesses: list[Hypothesis], matches: Matches, before: float, facts: dict[str, Any]) -> Verdict:
    allowed = tolerance(matches.diagonal)
    errors = [_error(guess, matches) for guess in guesses]
    tried = {guesses[place].key: errors[place] for place in np.argsort(errors, kind="stable")[::-1].tolist()}
    good = [place for place, error in enumerate(errors) if error <= 1.25 * min(errors) + 0.15 * allowed]
    chosen = min(good, key=lambda place: (guesses[place].rank, errors[place]))
    after, best = errors[chosen], guesses[chosen]
    facts = facts | {"tried": tried}
    if after <= min(IMPROVEMENT * before, 2 * allowed):
        return _likely(best, matches, before, after, facts)
    what = f"{_kind(matches)} are off by {before:.1f} pixels (they move by {matches.motion:.0f})"
    if before <= max(2 * allowed, 0.2 * matches.motion):
        sentence = f"imprecise: {what}; no mistake of convention explains it"
        return Verdict("imprecise", sentence, **facts)
    sentence = (
        f"poses and images do not agree: {what}, and no single mistake that is known here explains it (the best, "
        f"{best.key}, leaves {after:.1f})"
    )
    remedy = "check that the poses belong to these images, their convention, and the intrinsics"
    return Verdict("unexplained", sentence, remedy=remedy, **facts)


def _kind(matches: Matches) -> str:
    return "points reprojected with depth" if matches.has_depth else "distances from epipolar lines"


def _likely(best: Hypothesis, matches: Matches, before: float, after: float, facts: dict[str, Any]) -> Verdict:
    errors = f"{_kind(matches)} are off by {before:.1f} pixels, and by {after:.1f} without this mistake"
    sentence = f"{best.sentence}: {errors}"
    return Verdict("likely", sentence, best.key, best.remedy, error_without=after, **facts)


def _error(guess: Hypothesis, matches: Matches) -> float:
    if matches.has_depth:
        return float(np.median(reprojection_errors(guess.cameras, matches, guess.factor, guess.along_ray)))
    return float(np.median(epipolar_errors(guess.cameras, matches)))


# ---------------------------------------------------------------------- what may be wrong


def hypotheses(
    cameras: Cameras, matches: Matches, world: Optional[Float[np.ndarray, "4 4"]], scale: float
) -> Iterator[Hypothesis]:
    """Every mistake that can be tried on a scene; those of the poses also together with a wrong unit."""
    yield from _intrinsics(cameras, matches)
    poses = [*_axes(cameras), *_inverses(cameras, world, scale), *_orders(cameras)]
    yield from poses
    if not matches.has_depth:
        return
    yield from _depth_mistakes(Hypothesis("", "", "", cameras), matches)
    for guess in poses:
        yield from _units(guess, matches)


def _depth_mistakes(plain: Hypothesis, matches: Matches) -> Iterator[Hypothesis]:
    """Depth of another unit, or another kind, than it is taken for."""
    yield from _units(replace(plain, rank=0), matches)
    yield Hypothesis(
        "depth_along_ray",
        "depth maps hold the distance from the camera's centre, not the depth along its axis",
        "divide each value by the length of (x, y, 1), the pixel's ray in camera axes",
        plain.cameras,
        along_ray=True,
    )


def _axes(cameras: Cameras) -> Iterator[Hypothesis]:
    """Camera axes other than they are taken for: all proper rotations by quarter turns."""
    for order in permutations(range(3)):
        for signs in product((1.0, -1.0), repeat=3):
            turn = np.eye(4)
            turn[:3, :3] = np.eye(3)[list(order)] * np.array(signs)[:, None]
            if np.linalg.det(turn[:3, :3]) < 0 or np.allclose(turn, np.eye(4)):
                continue
            turned = replace(cameras, camera_to_worlds=cameras.camera_to_worlds @ turn)
            if np.allclose(turn, FLIP):
                yield Hypothesis(
                    "flipped_axes",
                    "the camera axes are OpenCV's (x right, y down, z forward) where OpenGL's (x right, y up, z "
                    "backward) are expected, or the other way round",
                    "negate the second and third column of every transform_matrix",
                    turned,
                )
                continue
            # the true cameras' axes, in the axes that the columns were taken for
            named = [WAYS[int(np.argmax(np.abs(turn[:3, k])))][0 if turn[:3, k].sum() > 0 else 1] for k in range(3)]
            yield Hypothesis(
                f"turned_axes_{'_'.join(named)}",
                f"the camera axes are turned: the camera really looks where its `{named[2]}` is now, and its right "
                f"is where its `{named[0]}` is now (the poses are of a robot or a phone held upright, or the images "
                "were turned after calibration)",
                "turn the rotation part of every transform_matrix (or the images and their intrinsics) accordingly",
                turned,
                rank=3,
            )


def _inverses(cameras: Cameras, world: Optional[Float[np.ndarray, "4 4"]], scale: float) -> Iterator[Hypothesis]:
    """World-to-camera matrices, or only their rotations, taken for camera-to-world."""
    stored = cameras.camera_to_worlds @ FLIP
    stored[:, :3, 3] /= scale
    if world is not None:
        stored = np.linalg.inv(world) @ stored
    inverse = np.linalg.inv(stored)
    transposed = stored.copy()
    transposed[:, :3, :3] = stored[:, :3, :3].transpose(0, 2, 1)
    for key, poses, sentence, remedy, rank in (
        ("world_to_camera", inverse, "the poses are world-to-camera matrices", "invert every transform_matrix", 1),
        (
            "rotation_inverted",
            transposed,
            "the rotations are inverted: world-to-camera beside positions of cameras",
            "transpose the rotation part of every transform_matrix",
            3,
        ),
    ):
        for axes, turn in (("OpenCV", FLIP), ("OpenGL", np.eye(4))):
            mended = poses.copy()
            mended[:, :3, 3] *= scale
            then = " and then negate its second and third column" if axes == "OpenCV" else ""
            yield Hypothesis(
                f"{key}_{axes.lower()}",
                f"{sentence} ({axes}'s axes)",
                f"{remedy}{then}; camera-to-world with OpenGL's axes is expected",
                # what is stored is in OpenGL's axes for the parser; ours are OpenCV's
                replace(cameras, camera_to_worlds=mended @ turn @ FLIP),
                rank=rank,
            )


def _orders(cameras: Cameras) -> Iterator[Hypothesis]:
    """Poses that belong to other images."""
    poses = cameras.camera_to_worlds
    remedy = "pair every image with its own pose"
    yield Hypothesis(
        "reversed_order", "the poses are in the reverse order of the images", remedy,
        replace(cameras, camera_to_worlds=poses[::-1].copy()), rank=3,
    )  # fmt: skip
    for shift in (-1, 1):
        yield Hypothesis(
            f"shifted_by_{'one' if shift > 0 else 'minus_one'}",
            f"every image has the pose of the {'next' if shift > 0 else 'previous'} one",
            remedy,
            replace(cameras, camera_to_worlds=np.roll(poses, shift, axis=0)),
            rank=4,
        )


def _intrinsics(cameras: Cameras, matches: Matches) -> Iterator[Hypothesis]:
    matrix = cameras.intrinsics

    def changed(key: str, sentence: str, remedy: str, intrinsics: np.ndarray, rank: int) -> Hypothesis:
        return Hypothesis(key, sentence, remedy, replace(cameras, intrinsics=intrinsics), rank=rank)

    focal, centre = matrix[:, [0, 1], [0, 1]], matrix[:, :2, 2]
    crossed_focal, crossed_centre, crossed = matrix.copy(), matrix.copy(), matrix.copy()
    crossed_focal[:, [0, 1], [0, 1]] = crossed[:, [0, 1], [0, 1]] = focal[:, ::-1]
    crossed_centre[:, :2, 2] = crossed[:, :2, 2] = centre[:, ::-1]
    yield changed("swapped_centre", "cx and cy are swapped", "swap `cx` and `cy`", crossed_centre, 1)
    yield changed("swapped_focal", "fl_x and fl_y are swapped", "swap `fl_x` and `fl_y`", crossed_focal, 1)
    yield changed(
        "swapped_intrinsics", "the intrinsics of x and y are swapped", "swap `fl_x` with `fl_y`, `cx` with `cy`",
        crossed, 2,
    )  # fmt: skip
    for key, parts, what in (
        ("scaled_intrinsics", (np.arange(2), slice(None)), "all intrinsics"),
        ("scaled_focal", ([0, 1], [0, 1]), "the focal lengths"),
    ):

        def scaled(factor: float, parts: tuple = parts) -> np.ndarray:
            other = matrix.copy()
            other[(slice(None), *parts)] *= factor
            return other

        def error(factor: float, scaled=scaled) -> float:
            return _error(Hypothesis("", "", "", replace(cameras, intrinsics=scaled(factor))), matches)

        grid = np.geomspace(0.2, 5.0, 33)
        for width in (0.1, 0.02, 0.005):
            best = min(grid.tolist(), key=error)
            grid = best * np.geomspace(1 / (1 + width), 1 + width, 9)
        best = min(grid.tolist(), key=error)
        cause = "the images were resized after calibration, or " if key == "scaled_intrinsics" else ""
        yield changed(
            key,
            f"{what} are too {'small' if best > 1 else 'large'} by a factor of {max(best, 1 / best):.3g} ({cause}a "
            "field of view was taken for another one)",
            f"multiply {'`fl_x`, `fl_y`, `cx` and `cy`' if key == 'scaled_intrinsics' else '`fl_x` and `fl_y`'} by "
            f"{best:.3g}",
            scaled(best),
            3,
        )


def _units(guess: Hypothesis, matches: Matches) -> Iterator[Hypothesis]:
    """Depth and poses in different units: the factor is that of triangulated over measured depths."""
    ratios = depth_ratios(guess.cameras, matches)
    if len(ratios) < FEWEST_MATCHES // 3:
        return
    factor = float(np.median(ratios))
    if abs(np.log(factor)) < np.log(1.03):
        return
    near = min(UNITS, key=lambda unit: abs(np.log(unit / factor)))
    known = abs(np.log(near / factor)) < UNIT_TOLERANCE
    measured = float(np.median(matches.depths[matches.depths > 0]))
    plausible = PLAUSIBLE_DEPTH[0] <= measured <= PLAUSIBLE_DEPTH[1]
    mended = PLAUSIBLE_DEPTH[0] <= measured * factor <= PLAUSIBLE_DEPTH[1]
    of_poses = plausible and not mended
    if of_poses:
        inverse = min(UNITS, key=lambda unit: abs(np.log(unit * factor)))
        name = f" ({UNITS[inverse]})" if abs(np.log(inverse * factor)) < UNIT_TOLERANCE else ""
        size = f"large by a factor of {factor:.4g}" if factor > 1 else f"small by a factor of {1 / factor:.4g}"
        sentence = f"positions are too {size} for the depth maps{name}"
        remedy = f"multiply the positions (last column of transform_matrix) by {1 / factor:.4g}"
    else:
        name = f" ({UNITS[near]})" if known else ""
        size = f"small by a factor of {factor:.4g}" if factor > 1 else f"large by a factor of {1 / factor:.4g}"
        sentence = f"depth maps are too {size} for the poses{name}"
        remedy = f"multiply depth_unit_scale_factor by {factor:.4g} (or the poses' positions by {1 / factor:.4g})"
    both = bool(guess.key)
    yield replace(
        guess,
        key=f"{guess.key}_and_unit" if both else ("pose_unit" if of_poses else "depth_unit"),
        sentence=f"{guess.sentence}; besides, {sentence}" if both else sentence,
        remedy=f"{guess.remedy}; {remedy}" if both else remedy,
        factor=factor,
        rank=guess.rank + 1,
    )
