"""A dataset whose samples are image files side by side: what nearly all of them come down to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jaxtyping import Float32

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.reading import (
    check_size,
    read_depth,
    read_ids,
    read_image,
    read_normals,
    resized_image,
    to_classes,
)
from snd_nerfstudio.probing.samples import EvalCrop, ProbeDataset, ProbeSample, Protocol, Split, Task, Window

KB_SIZE = (352, 1216)
"""Rows and columns that are kept of a KITTI image."""


@dataclass(frozen=True)
class Request:
    """Which dataset is wanted."""

    name: str
    """As in `open_dataset`."""
    root: Path
    """The dataset's own folder."""
    task: Task
    split: Split
    protocol: Protocol
    seed: int = 0
    """Of splits that nobody published."""


@dataclass(frozen=True)
class Entry:
    """The files of one sample."""

    name: str
    image: Path
    depth: Optional[Path] = None
    normals: Optional[Path] = None
    labels: Optional[Path] = None
    instances: Optional[Path] = None

    def files(self) -> list[Path]:
        """Those that there are."""
        every = (self.image, self.depth, self.normals, self.labels, self.instances)
        return [file for file in every if file is not None]


@dataclass(frozen=True)
class Rules:
    """How files become a sample."""

    depth_unit: float = 1e-3
    """Metres of one stored step."""
    stored_max_depth: Optional[float] = None
    """Metres that no measurement exceeds: more of it means that the files have another unit."""
    zero_is_none: bool = True
    """Whether class 0 is stored as 1."""
    label_hint: str = ""
    """What to do about ids that are none of the classes."""
    fit_image: bool = False
    """Resize images to their labels' size; otherwise another size is an error."""
    kb_crop: bool = False
    """Keep the lowest 352 rows and the middle 1216 columns."""
    min_depth: float = 1e-3
    max_depth: float = 10.0
    eval_crop: EvalCrop = "none"
    window: Optional[Window] = None
    classes: tuple[str, ...] = ()


def unknown_scene(name: str) -> Optional[str]:
    """Of datasets whose names do not tell."""
    return None


@dataclass
class FileDataset(ProbeDataset):
    """Samples of entries, decoded by rules."""

    request: Request
    entries: Sequence[Entry]
    rules: Rules
    lists: Sequence[Path] = ()
    """See `list_files`."""
    scene_of: Callable[[str], Optional[str]] = unknown_scene
    """The scene in the name of a sample."""
    split_rule: str = "published"

    def __post_init__(self) -> None:
        wanted, rules = self.request, self.rules
        self.name, self.root, self.task, self.split = wanted.name, wanted.root, wanted.task, wanted.split
        self.min_depth, self.max_depth = rules.min_depth, rules.max_depth
        self.eval_crop, self.window, self.classes = rules.eval_crop, rules.window, rules.classes
        if not self.entries:
            raise InputError(
                f"{self.root} has no samples to {self.split} {self.task} of {self.name}: complete it, or choose "
                "another seed if the split is drawn."
            )

    def __len__(self) -> int:
        return len(self.entries)

    def files(self, index: int) -> list[Path]:
        return self.entries[index].files()

    def list_files(self) -> list[Path]:
        return list(self.lists)

    def scene(self, index: int) -> Optional[str]:
        return self.scene_of(self.entries[index].name)

    def __getitem__(self, index: int) -> ProbeSample:
        entry, rules = self.entries[index], self.rules
        image = read_image(entry.image)
        maps: dict[str, tuple[Path, Any]] = {}
        if entry.depth is not None:
            maps["depth"] = entry.depth, read_metres(entry.depth, rules)
        if entry.normals is not None:
            maps["normals"] = entry.normals, read_normals(entry.normals)
        if entry.labels is not None:
            ids = read_ids(entry.labels)
            classes = to_classes(ids, len(rules.classes), rules.zero_is_none, entry.labels, rules.label_hint)
            maps["labels"] = entry.labels, classes
        if entry.instances is not None:
            maps["instances"] = entry.instances, read_ids(entry.instances, "Instance map")
        if rules.fit_image:
            image = _fitted(image, entry, [array for _, array in maps.values()])
        for file, array in maps.values():
            check_size(file, array, entry.image, image)
        read = {kind: array for kind, (_, array) in maps.items()}
        if rules.kb_crop:
            image = kb_cropped(image, entry.image)
            read = {kind: kb_cropped(array, entry.image) for kind, array in read.items()}
        return ProbeSample(entry.name, image, **read)


def read_metres(file: Path, rules: Rules) -> Float32[np.ndarray, "H W"]:
    """A depth map whose unit is checked.

    Raises:
        InputError: it cannot be read, or is deeper than the sensor can see.
    """
    depth = read_depth(file, rules.depth_unit)
    if rules.stored_max_depth is not None and depth.max() > rules.stored_max_depth + 1e-6:
        raise InputError(
            f"Depth map {file} reaches {depth.max():.1f} m where nothing is farther than "
            f"{rules.stored_max_depth:g} m: its unit is not the millimetre (some packages of NYUv2 "
            "store metres times 10,000, which also wraps at 6.55 m), so export the depth again as millimetres."
        )
    return depth


def kb_cropped(array: np.ndarray, file: Path) -> np.ndarray:
    """The lowest 352 rows and middle 1216 columns of a KITTI image (the "KB crop" of the released code).

    Raises:
        InputError: the image is smaller.
    """
    height, width = array.shape[:2]
    if height < KB_SIZE[0] or width < KB_SIZE[1]:
        raise InputError(
            f"{file} has {width}x{height} pixels, but KITTI is cropped to {KB_SIZE[1]}x{KB_SIZE[0]}: give the images "
            "in their published size."
        )
    top, left = height - KB_SIZE[0], (width - KB_SIZE[1]) // 2
    return array[top : top + KB_SIZE[0], left : left + KB_SIZE[1]]


def _fitted(image: np.ndarray, entry: Entry, maps: list[np.ndarray]) -> np.ndarray:
    """An image in its labels' size if that has the same shape to 2 % (ScanNet: 1296x968 and 640x480)."""
    if not maps or maps[0].shape[:2] == image.shape[:2]:
        return image
    height, width = maps[0].shape[:2]
    if abs(width / height * image.shape[0] / image.shape[1] - 1) > 0.02:
        raise InputError(
            f"{entry.image} has {image.shape[1]}x{image.shape[0]} pixels and its labels {width}x{height}, which is "
            "another shape: restore the published files."
        )
    return resized_image(image, height, width)
