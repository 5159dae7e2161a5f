"""Pairs as SuperGlue lists them: a text file with 38 fields per line.

    path_A path_B rotation_A rotation_B K_A (9) K_B (9) T_AB (16)

Paths are relative to the folder with the images, rotations are quarter turns of EXIF, T_AB leads from A's camera axes
to B's. The images are found there as they are listed, or in ScanNet's tree as LoFTR packages it.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
from jaxtyping import Float

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs.base import (
    PairSet,
    PairView,
    PosedPair,
    check_rigid,
    missing_files,
    read_depth,
    read_image,
)
from snd_nerfstudio.probing.pairs.scannet import scaled

FIELDS = 38
LIST_NAMES = ("scannet_test_pairs_with_gt.txt", "pairs.txt")
"""What the list may be called if only the folder is given."""
SCANNET_SIZE = (968, 1296)
"""Height and width of ScanNet's colour images, which the released list's intrinsics belong to."""
OFF_CENTRE = 0.15
"""A principal point may be so far from the middle, as a share of the side, to belong to an image of a size."""
REMEDY = (
    "give the folder of the images with SuperGlue's scannet_test_pairs_with_gt.txt in it, or the path of such a list"
)
_SCANNET_FRAME = re.compile(r"(scene\d{4}_\d{2})\D.*?(\d+)(?:\.color)?\.\w+$")


@dataclass(frozen=True)
class ListedPair:
    """One line of the list."""

    paths: tuple[str, str]
    intrinsics: tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3 3"]]
    """Of the image files that the list was made for."""
    relative_pose: Float[np.ndarray, "4 4"]


class SuperGluePairs(PairSet):
    """Pairs of a list with 38 fields per line.

    Args:
        root: folder with the images.
        pair_list: the list; None: one of `LIST_NAMES` in the folder.

    Raises:
        InputError: the list is missing or a line of it is not what it should be.
    """

    def __init__(self, root: Path, pair_list: Optional[Path] = None) -> None:
        self.root = Path(root)
        self.pair_list = find_list(self.root) if pair_list is None else Path(pair_list)
        self.lines = read_list(self.pair_list)

    def __len__(self) -> int:
        return len(self.lines)

    def read(self, index: int) -> PosedPair:
        """See `PairSet.read`."""
        line = self.lines[index]
        return PosedPair.of(
            self._view(index, 0),
            self._view(index, 1),
            relative_pose=line.relative_pose,
            name=f"{line.paths[0]}-{line.paths[1]}",
            scene=_scene(line.paths[0]),
        )

    def _view(self, index: int, end: int) -> PairView:
        line = self.lines[index]
        file, matrix = image_file(self.root, line.paths[end]), line.intrinsics[end]
        image, depth = read_image(file), read_depth(depth_file(file))
        return PairView(image, depth, scaled(matrix, self._calibrated(index, matrix, image.shape), depth.shape))

    def _calibrated(self, index: int, matrix: Float[np.ndarray, "3 3"], size: tuple[int, ...]) -> tuple[int, ...]:
        """Height and width that a line's intrinsics belong to: the file's, or those of ScanNet's colour images."""
        for height, width in (size[:2], SCANNET_SIZE):
            middle = matrix[:2, 2] / [width, height]
            if (np.abs(middle - 0.5) < OFF_CENTRE).all():
                return height, width
        raise InputError(
            f"{self.pair_list}, line {index + 1}: the principal point ({matrix[0, 2]:g}, {matrix[1, 2]:g}) is not "
            f"near the middle of its image of {size[1]}x{size[0]} pixels: give the images that the list was made for."
        )


def find_list(root: Path) -> Path:
    """The list of pairs in a folder.

    Raises:
        InputError: there is none.
    """
    for name in LIST_NAMES:
        if (root / name).is_file():
            return root / name
    raise InputError(f"{root} holds neither {' nor '.join(LIST_NAMES)}: {REMEDY}.")


def read_list(file: Path) -> list[ListedPair]:
    """All pairs of a list; empty lines are skipped.

    Raises:
        InputError: it is missing, empty, or a line has another number of fields, turned images, or matrices that are
            not numbers, intrinsics or a rigid transform.
    """
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list of pairs {file} cannot be read ({error}): {REMEDY}.") from error
    pairs = [_parse(line.split(), f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise InputError(f"The list of pairs {file} is empty: {REMEDY}.")
    return pairs


def _parse(fields: list[str], where: str) -> ListedPair:
    if len(fields) != FIELDS:
        raise InputError(
            f"{where} has {len(fields)} fields, not {FIELDS} (two paths, two rotations, two 3 x 3 intrinsics, one "
            "4 x 4 pose): use the list with ground truth."
        )
    if fields[2:4] != ["0", "0"]:
        raise InputError(f"{where} turns its images by {fields[2]} and {fields[3]} quarters: store them upright.")
    try:
        numbers = np.array([float(field) for field in fields[4:]])
    except ValueError as error:
        raise InputError(f"{where} has something else than a number ({error}): {REMEDY}.") from error
    matrices = numbers[:9].reshape(3, 3), numbers[9:18].reshape(3, 3)
    if not all(np.isfinite(matrix).all() and (np.diag(matrix) > 0).all() for matrix in matrices):
        raise InputError(f"{where} has intrinsics that are not positive finite numbers: {REMEDY}.")
    pose = check_rigid(numbers[18:].reshape(4, 4), f"{where}: the pose")
    return ListedPair((fields[0], fields[1]), matrices, pose)


def image_file(root: Path, path: str) -> Path:
    """Where a listed image is: as listed, or as LoFTR packages ScanNet; as listed if it is nowhere."""
    frame = _SCANNET_FRAME.search(path)
    packaged = root / frame[1] / "color" / f"{int(frame[2])}.jpg" if frame else root / path
    return packaged if packaged.is_file() and not (root / path).is_file() else root / path


def depth_file(image: Path) -> Path:
    """Where the depth map of an image is: the first that exists of the names that ScanNet's tools give it.

    `<frame>.color.jpg` has `<frame>.depth.pgm` or `.png` beside it, `<frame>.jpg` likewise, and `color/<frame>.jpg`
    has `depth/<frame>.png`. The first of them if none exists.
    """
    stem = image.name.rsplit(".", 1)[0].removesuffix(".color")
    beside = [image.with_name(f"{stem}.depth{ending}") for ending in (".pgm", ".png")]
    names = [*beside, image.parent.parent / "depth" / f"{stem}.png", image.parent / "depth" / f"{stem}.png"]
    return next((name for name in names if name.is_file()), names[2] if image.parent.name == "color" else names[0])


def check(root: Path) -> list[str]:
    """What is missing or wrong, one sentence each; nothing if all pairs can be read.

    Args:
        root: folder with the images and the list.
    """
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is not a folder: {REMEDY}."]
    try:
        pairs = SuperGluePairs(root)
    except InputError as error:
        return [str(error)]
    images = [image_file(root, path) for line in pairs.lines for path in line.paths]
    return [
        *missing_files(images, "images", "export ScanNet's colour images there, named as in the list"),
        *missing_files([depth_file(file) for file in images], "depth maps", "export ScanNet's depth beside them"),
    ]


def _scene(path: str) -> str:
    frame = _SCANNET_FRAME.search(path)
    return frame[1] if frame else str(Path(path).parent)
