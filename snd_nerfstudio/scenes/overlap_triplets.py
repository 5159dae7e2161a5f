"""Choosing context and target views by what they see, for captures whose frames are in no useful order."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from jaxtyping import Bool, Float, Int

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.overlap import ViewGeometry, overlap_matrix, viewing_angles
from snd_nerfstudio.scenes.triplets import (
    NO_BASELINE,
    NoTripletError,
    SceneSampler,
    TargetView,
    TripletIndex,
    frames_by_scene,
    pick_targets,
)

PAIRS_AT_ONCE = 2_000_000
"""Pairs times frames that are looked through for targets at once."""


@dataclass(frozen=True)
class PairLimits:
    """Which two views may be contexts."""

    min_overlap: float = 0.3
    """Smallest overlap."""
    max_overlap: float = 0.8
    """Largest overlap."""
    min_baseline: float = NO_BASELINE
    """Shortest distance between the cameras, world units."""
    max_baseline: Optional[float] = None
    """Longest distance between the cameras, world units; None: no limit."""
    max_angle: Optional[float] = 90.0
    """Largest angle between the viewing directions in degrees; None: no limit."""

    def check(self) -> None:
        """Refuse limits that no pair can keep.

        Raises:
            InputError: they are out of order, or of another range than they can be.
        """
        flag = "--pipeline.datamanager."
        if not 0 < self.min_overlap <= self.max_overlap <= 1:
            raise InputError(
                f"{flag}min-overlap {self.min_overlap:g} and {flag}max-overlap {self.max_overlap:g}: shares of a "
                "view, 0 < min <= max <= 1, are needed."
            )
        if not (self.min_baseline >= 0 and (self.max_baseline is None or self.max_baseline > self.min_baseline)):
            raise InputError(
                f"{flag}min-context-baseline {self.min_baseline:g} and {flag}max-context-baseline "
                f"{self.max_baseline}: distances in world units, 0 <= min < max, are needed."
            )


@dataclass(frozen=True)
class _ScenePairs:
    """One scene's frames in the order of the capture, the overlaps between them, and the valid context pairs."""

    frames: Int[np.ndarray, "n"]
    overlaps: Float[np.ndarray, "n n"]
    pairs: Int[np.ndarray, "pairs 2"]
    """Places in ``frames``."""


class OverlapSampler(SceneSampler):
    """Draws triplets whose contexts overlap by a given share, and whose target lies between them in what it sees.

    A frame is **between** two contexts if it overlaps each of them at least as much as they overlap each other. For a
    camera that moves past a wall these are just the frames between them; it needs no order and no path.

    Args:
        scene_index: scene number of each frame, ``[frames]``.
        frame_order: position of each frame in its scene's capture, ``[frames]``: only decides which context is the
            first, and how evaluation triplets are spread.
        geometries: asked once for each scene with the numbers of its frames.
        scene_names: for messages.
        limits: of the contexts.
        target_view: where the target lies.
        progress: wraps the scene numbers, to show how far it is.

    Raises:
        InputError: the limits make no sense, or what ``geometries`` raises.
        NoTripletError: no scene has a valid triplet; the message says which limit left none.
    """

    def __init__(
        self,
        scene_index: Int[np.ndarray, "frames"],
        frame_order: Int[np.ndarray, "frames"],
        geometries: Callable[[Int[np.ndarray, "n"]], ViewGeometry],
        scene_names: Sequence[str],
        limits: PairLimits,
        target_view: TargetView = "between",
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> None:
        limits.check()
        self.limits = limits
        self.max_angle = limits.max_angle
        self.scene_names = tuple(scene_names)
        self.target_view: TargetView = target_view
        self.zero_baseline_pairs = 0
        self.opposite_pairs = 0
        self.largest_overlap = 0.0
        """Largest overlap of two different frames, for messages."""
        self.without_target = 0
        """Pairs within the limits that no frame is between."""
        self._scenes: list[_ScenePairs] = []
        frames = frames_by_scene(scene_index, np.asarray(frame_order), len(self.scene_names))
        for scene in progress(range(len(self.scene_names))):
            self._scenes.append(self._scene(frames[scene], geometries))
        self.usable_scenes = np.array([s for s, scene in enumerate(self._scenes) if len(scene.pairs)], dtype=np.int64)
        if len(self.usable_scenes) == 0:
            raise NoTripletError(self._no_triplet_message())

    def _scene(
        self, frames: Int[np.ndarray, "n"], geometries: Callable[[Int[np.ndarray, "n"]], ViewGeometry]
    ) -> _ScenePairs:
        none = np.zeros((0, 2), dtype=np.int64)
        if len(frames) < (2 if self.target_view != "between" else 3):
            return _ScenePairs(frames, np.eye(len(frames), dtype=np.float16), none)
        geometry, limits = geometries(frames), self.limits
        overlaps = overlap_matrix(geometry, limits.max_angle)
        upper = np.triu(np.ones_like(overlaps, dtype=bool), 1)
        self.largest_overlap = max(self.largest_overlap, float(overlaps[upper].max()))
        # a share is a count out of at most a few hundred, kept in float16
        low, high = limits.min_overlap - 1e-3, limits.max_overlap + 1e-3
        pairs = np.argwhere(upper & (overlaps >= low) & (overlaps <= high))
        poses = geometry.camera_to_worlds
        baselines = np.linalg.norm(poses[pairs[:, 0], :3, 3] - poses[pairs[:, 1], :3, 3], axis=1)
        wide = baselines >= limits.min_baseline
        self.zero_baseline_pairs += int((~wide).sum())
        wide &= baselines <= (np.inf if limits.max_baseline is None else limits.max_baseline)
        pairs = pairs[wide]
        if limits.max_angle is not None:
            apart = viewing_angles(poses, poses) > limits.max_angle + 1e-6
            self.opposite_pairs += int((apart & upper).sum())
        if self.target_view == "between":
            has_target = np.zeros(len(pairs), dtype=bool)
            step = max(PAIRS_AT_ONCE // len(frames), 1)
            for first in range(0, len(pairs), step):
                chunk = pairs[first : first + step]
                has_target[first : first + step] = _between(overlaps, chunk[:, 0], chunk[:, 1]).any(axis=1)
            self.without_target += int((~has_target).sum())
            pairs = pairs[has_target]
        return _ScenePairs(frames, overlaps, pairs)

    def _no_triplet_message(self) -> str:
        limits, flag = self.limits, "--pipeline.datamanager."
        return (
            f"No scene has two frames that overlap by {limits.min_overlap:g} to {limits.max_overlap:g} within the "
            "limits of baseline and angle and another frame between them (largest overlap of two frames: "
            f"{self.largest_overlap:.2f}; {self.zero_baseline_pairs} pairs too near to each other, "
            f"{self.without_target} without a frame between). Lower {flag}min-overlap, raise {flag}max-overlap or "
            f"{flag}max-context-angle, or look with `snd-data inspect` whether the poses are right."
        )

    @property
    def num_pairs(self) -> int:
        """How many valid context pairs there are."""
        return sum(len(scene.pairs) for scene in self._scenes)

    def overlap(self, first: int, second: int) -> float:
        """Overlap of two frames of one scene; 0 if they are of different ones."""
        for scene in self._scenes:
            places = [np.flatnonzero(scene.frames == frame) for frame in (first, second)]
            if all(len(place) for place in places):
                return float(scene.overlaps[places[0][0], places[1][0]])
        return 0.0

    def _targets(self, scene: _ScenePairs, left: int, right: int) -> Int[np.ndarray, "n"]:
        """Places of all frames that may be the target of a context pair."""
        contexts = np.array([left, right], dtype=np.int64)
        if self.target_view == "context":
            return contexts
        inside = np.flatnonzero(_between(scene.overlaps, contexts[:1], contexts[1:])[0])
        if self.target_view == "between_or_context":
            inside = np.union1d(inside, contexts)
        return inside

    def draw(
        self, seed: int, step: int, rank: int = 0, item: int = 0, max_gap: Optional[int] = None, targets: int = 1
    ) -> TripletIndex:
        """One random triplet: scene, pair and target are each drawn uniformly; a function of the arguments alone.

        Args:
            seed: of the run.
            step: of training.
            rank: of the process.
            item: of the step.
            max_gap: not used, frames have no gap here.
            targets: how many different targets, or as many as there are.
        """
        generator = np.random.default_rng([seed, step, rank, item])
        scene = self._scenes[int(generator.choice(self.usable_scenes))]
        left, right = (int(place) for place in scene.pairs[generator.integers(len(scene.pairs))])
        target, more = pick_targets(generator, self._targets(scene, left, right), targets)
        frames = scene.frames
        return TripletIndex(
            (int(frames[left]), int(frames[right])), int(frames[target]), tuple(int(frames[other]) for other in more)
        )

    def spread_over(self, scene: int, count: int) -> list[TripletIndex]:
        """At most ``count`` triplets spread evenly over a usable scene; targets overlap both contexts most."""
        held = self._scenes[scene]
        taken, chosen = min(count, len(held.pairs)), []
        for place in range(taken):
            left, right = (int(p) for p in held.pairs[(2 * place + 1) * len(held.pairs) // (2 * taken)])
            targets = self._targets(held, left, right)
            common = np.minimum(held.overlaps[left, targets], held.overlaps[right, targets])
            best = int(targets[int(np.argmax(common))])
            frames = held.frames
            chosen.append(TripletIndex((int(frames[left]), int(frames[right])), int(frames[best])))
        return chosen


def _between(
    overlaps: Float[np.ndarray, "n n"], left: Int[np.ndarray, "p"], right: Int[np.ndarray, "p"]
) -> Bool[np.ndarray, "p n"]:
    """Which frames overlap both contexts at least as much as they overlap each other; never a context itself."""
    common = np.minimum(overlaps[left], overlaps[right])
    inside = common >= overlaps[left, right][:, None]
    rows = np.arange(len(left))
    inside[rows, left] = False
    inside[rows, right] = False
    return inside
