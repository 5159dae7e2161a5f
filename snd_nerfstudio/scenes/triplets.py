"""Choosing context and target views.

Every valid context pair is enumerated once, so a draw cannot fail and needs no retry; a draw depends on
``(seed, step, rank, item)`` alone, so a resumed run sees exactly the triplets it would have seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional

import numpy as np
from jaxtyping import Bool, Float, Int

from snd_nerfstudio.errors import InputError

NO_BASELINE = 1e-6
"""Cameras nearer to each other than this, in world units, are at the same place."""


class NoTripletError(InputError):
    """The dataset is in order, but too short for a single triplet."""


TargetView = Literal["between", "between_or_context", "context"]
"""Where the target lies: strictly between the contexts; anywhere from one to the other, both included (the released
code); or at one of the contexts (ablation E of the paper's Table 5)."""


@dataclass(frozen=True)
class TripletIndex:
    """Frame numbers of one triplet, into the list of all frames."""

    context: tuple[int, int]
    target: int
    more_targets: tuple[int, ...] = ()
    """Further targets of the same contexts, where several are asked for."""


def frames_by_scene(
    scene_index: Int[np.ndarray, "frames"], frame_order: Int[np.ndarray, "frames"], scenes: int
) -> list[Int[np.ndarray, "n"]]:
    """Frames of each scene in the order of their capture, found in one pass over all of them."""
    scene_index = np.asarray(scene_index)
    frames = np.lexsort((frame_order, scene_index))
    return np.split(frames, np.searchsorted(scene_index[frames], np.arange(1, scenes)))


def growing_gap(step: int, initial: int, final: int, warmup_steps: int) -> int:
    """Largest gap at a step: ``initial + floor((final - initial) * step / warmup_steps)``, at most ``final``.

    It is how MVSplat's training widens the distance between its contexts.
    """
    return min(initial + (final - initial) * step // warmup_steps, final)


class SceneSampler(ABC):
    """What every way of choosing triplets has in common: scenes, some of which give triplets."""

    scene_names: tuple[str, ...]
    """Of all scenes."""
    usable_scenes: Int[np.ndarray, "n"]
    """Numbers of the scenes that give triplets."""
    max_angle: Optional[float] = None
    """Largest angle between the contexts' viewing directions in degrees, or None."""
    zero_baseline_pairs: int = 0
    """Context pairs that were left out because their cameras are at the same place, or too near to each other."""
    opposite_pairs: int = 0
    """Context pairs that were left out because they look too far apart."""

    @property
    @abstractmethod
    def num_pairs(self) -> int:
        """How many valid context pairs there are."""

    @abstractmethod
    def draw(
        self, seed: int, step: int, rank: int = 0, item: int = 0, max_gap: Optional[int] = None, targets: int = 1
    ) -> TripletIndex:
        """One random triplet, a function of the arguments alone.

        Args:
            seed: of the run.
            step: of training.
            rank: of the process.
            item: of the step.
            max_gap: largest gap for now, where pairs have one.
            targets: how many different targets, or as many as there are.
        """

    @abstractmethod
    def spread_over(self, scene: int, count: int) -> list[TripletIndex]:
        """At most ``count`` triplets spread evenly over one usable scene's path, targets in the middle."""

    @property
    def skipped_scenes(self) -> list[str]:
        """Names of the scenes that give no triplet: too short, or without a pair that can be reconstructed."""
        usable = set(self.usable_scenes.tolist())
        return [name for scene, name in enumerate(self.scene_names) if scene not in usable]

    def spread(self, count: int) -> list[TripletIndex]:
        """A fixed list of at most ``count`` triplets spread evenly over scenes and paths, target in the middle."""
        chosen: list[TripletIndex] = []
        per_scene = np.bincount(np.arange(count) % len(self.usable_scenes), minlength=len(self.usable_scenes))
        for scene, wanted in zip(self.usable_scenes.tolist(), per_scene.tolist(), strict=True):
            chosen += self.spread_over(scene, wanted)
        return chosen


def pick_targets(
    generator: np.random.Generator, choices: Int[np.ndarray, "n"], targets: int
) -> tuple[int, tuple[int, ...]]:
    """A target, and the further ones if there shall be more; the first does not depend on how many are asked for."""
    target = int(generator.choice(choices))
    others = choices[choices != target]
    more = generator.choice(others, min(targets - 1, len(others)), replace=False) if targets > 1 else ()
    return target, tuple(int(frame) for frame in more)


class TripletSampler(SceneSampler):
    """Draws triplets from scenes whose frames are ordered along a camera path (paper section 3.1).

    Args:
        scene_index: scene number of each frame, ``[frames]``.
        frame_order: position of each frame in its scene's capture, ``[frames]``; dropped frames leave gaps in it.
        camera_to_worlds: OpenCV camera-to-world of each frame, ``[frames 4 4]``; pairs without baseline are left out.
        scene_names: for messages.
        min_gap: smallest difference of ``frame_order`` between the contexts.
        max_gap: largest such difference.
        target_view: where the target lies.
        max_angle: largest angle between the contexts' viewing directions in degrees; pairs beyond are left out. None:
            no limit.
        min_baseline: shortest distance between the contexts, world units; pairs below it have no baseline.

    Raises:
        InputError: the gaps make no sense.
        NoTripletError: no scene has a valid triplet; the message names the shortest remedy.
    """

    def __init__(
        self,
        scene_index: Int[np.ndarray, "frames"],
        frame_order: Int[np.ndarray, "frames"],
        camera_to_worlds: Float[np.ndarray, "frames 4 4"],
        scene_names: Sequence[str],
        min_gap: int = 8,
        max_gap: int = 12,
        target_view: TargetView = "between",
        max_angle: Optional[float] = None,
        min_baseline: float = NO_BASELINE,
    ) -> None:
        smallest = 2 if target_view == "between" else 1
        if not smallest <= min_gap <= max_gap:
            raise InputError(
                f"--pipeline.datamanager.min-context-gap {min_gap}, --pipeline.datamanager.max-context-gap {max_gap}: "
                f"need {smallest} <= min <= max (a target lies between the contexts)."
            )
        self.target_view: TargetView = target_view
        self.scene_names = tuple(scene_names)
        self.max_angle = max_angle
        self.min_baseline = min_baseline
        self.zero_baseline_pairs = 0
        self.opposite_pairs = 0
        # pairs[scene][gap] = [n 2] frame numbers; targets are looked up per draw from the sorted frames of the scene
        self._frames_of_scene: list[Int[np.ndarray, "n"]] = []
        self._order = np.asarray(frame_order)
        self._pairs: list[dict[int, Int[np.ndarray, "n 2"]]] = []
        for frames in frames_by_scene(scene_index, self._order, len(self.scene_names)):
            self._frames_of_scene.append(frames)
            self._pairs.append(self._pairs_of_scene(frames, camera_to_worlds, min_gap, max_gap))
        self.usable_scenes = np.array([s for s, pairs in enumerate(self._pairs) if pairs], dtype=np.int64)
        if len(self.usable_scenes) == 0:
            raise NoTripletError(self._no_triplet_message(min_gap, max_gap))

    def _pairs_of_scene(
        self,
        frames: Int[np.ndarray, "n"],
        camera_to_worlds: Float[np.ndarray, "frames 4 4"],
        min_gap: int,
        max_gap: int,
    ) -> dict[int, Int[np.ndarray, "pairs 2"]]:
        order = self._order[frames]
        pairs: dict[int, Int[np.ndarray, "pairs 2"]] = {}
        for gap in range(min_gap, max_gap + 1):
            partner = np.searchsorted(order, order + gap)
            found = (partner < len(order)) & (order[np.minimum(partner, len(order) - 1)] == order + gap)
            if self.target_view == "between":
                found &= partner - np.arange(len(order)) > 1  # a frame strictly between survived
            left = np.flatnonzero(found)
            candidates = np.stack([frames[left], frames[partner[left]]], axis=1)
            candidates = candidates[self._reconstructible(camera_to_worlds[candidates])]
            if len(candidates):
                pairs[gap] = candidates
        return pairs

    def _reconstructible(self, cameras: Float[np.ndarray, "pairs 2 4 4"]) -> Bool[np.ndarray, "pairs"]:
        """Which pairs have a baseline and look in similar directions; the others are counted."""
        kept = np.linalg.norm(cameras[:, 0, :3, 3] - cameras[:, 1, :3, 3], axis=1) >= self.min_baseline
        self.zero_baseline_pairs += int((~kept).sum())
        if self.max_angle is not None:
            first, second = cameras[:, 0, :3, 2], cameras[:, 1, :3, 2]
            sine, cosine = np.linalg.norm(np.cross(first, second), axis=1), (first * second).sum(axis=1)
            opposite = kept & (np.degrees(np.arctan2(sine, cosine)) > self.max_angle + 1e-6)
            self.opposite_pairs += int(opposite.sum())
            kept &= ~opposite
        return kept

    def _no_triplet_message(self, min_gap: int, max_gap: int) -> str:
        longest = int(np.argmax([len(frames) for frames in self._frames_of_scene]))
        count = len(self._frames_of_scene[longest])
        if self.opposite_pairs:
            others = f", the other {self.zero_baseline_pairs} have the same camera position"
            return (
                f"{self.opposite_pairs} context pairs look more than {self.max_angle:g} degrees apart"
                f"{others if self.zero_baseline_pairs else ''}: none is left. Check the rotation of the poses and the "
                "order of the frames, lower --pipeline.datamanager.max-context-gap, or raise "
                "--pipeline.datamanager.max-context-angle."
            )
        if self.zero_baseline_pairs:
            return (
                f"All {self.zero_baseline_pairs} context pairs have the same camera position: a target cannot be "
                "reconstructed from them. Check the poses (translation column) of the dataset."
            )
        return (
            f"No scene has two frames {min_gap}..{max_gap} frames apart with another frame between them; the longest "
            f"scene, {self.scene_names[longest]}, has {count} usable frames. Use more frames, or lower "
            "--pipeline.datamanager.min-context-gap and --pipeline.datamanager.max-context-gap."
        )

    @property
    def num_pairs(self) -> int:
        """How many valid context pairs there are."""
        return sum(len(pairs) for scene in self._pairs for pairs in scene.values())

    def _targets(self, scene: int, left: int, right: int) -> Int[np.ndarray, "n"]:
        """All frames that may be the target of a context pair."""
        if self.target_view == "context":
            return np.array([left, right], dtype=np.int64)
        frames = self._frames_of_scene[scene]
        order = self._order[frames]
        inside = (order > self._order[left]) & (order < self._order[right])
        if self.target_view == "between_or_context":
            inside |= (frames == left) | (frames == right)
        return frames[inside]

    def draw(
        self, seed: int, step: int, rank: int = 0, item: int = 0, max_gap: Optional[int] = None, targets: int = 1
    ) -> TripletIndex:
        """One random triplet: scene, gap, pair and target are each drawn uniformly.

        Every scene counts the same however many frames it has (as in the released code, one item per scene and epoch).

        Args:
            seed: of the run.
            step: of training.
            rank: of the process.
            item: of the step.
            max_gap: largest gap for now; a scene whose pairs are all further apart gives those of its smallest gap.
            targets: how many different targets, or as many as there are.
        """
        generator = np.random.default_rng([seed, step, rank, item])
        scene = int(generator.choice(self.usable_scenes))
        pairs = self._pairs[scene]
        gaps = sorted(pairs)
        if max_gap is not None:
            gaps = [gap for gap in gaps if gap <= max_gap] or gaps[:1]
        gap = int(generator.choice(np.array(gaps)))
        left, right = (int(frame) for frame in pairs[gap][generator.integers(len(pairs[gap]))])
        choices = self._targets(scene, left, right)
        return TripletIndex((left, right), *pick_targets(generator, choices, targets))

    def spread_over(self, scene: int, count: int) -> list[TripletIndex]:
        """At most ``count`` triplets spread evenly over one usable scene's path, targets in the middle."""
        gaps = sorted(self._pairs[scene])
        pairs = self._pairs[scene][gaps[len(gaps) // 2]]
        taken, chosen = min(count, len(pairs)), []
        for place in range(taken):
            left, right = (int(f) for f in pairs[(2 * place + 1) * len(pairs) // (2 * taken)])
            targets = self._targets(scene, left, right)
            chosen.append(TripletIndex((left, right), int(targets[len(targets) // 2])))
        return chosen
