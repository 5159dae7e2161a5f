"""Pairs of our procedural rooms, whose depth and poses are exact: what `snd_nerfstudio.scenes.rooms` writes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

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
from snd_nerfstudio.scenes.overlap import GRID, ViewGeometry, overlap_matrix
from snd_nerfstudio.scenes.rooms.cameras import opencv_from_stored

REMEDY = "write rooms with `python -m snd_nerfstudio.scenes.rooms --out` and give that folder"
LISTS = {"train": ("nvs_sem_train.txt",), "val": ("nvs_sem_val.txt",)}
Split = Literal["train", "val", "all"]


@dataclass(frozen=True)
class RoomPairsSettings:
    """Which pairs of views are taken from the rooms."""

    split: Split = "val"
    """Rooms for validation, for training, or all of them."""
    pairs: int = 64
    """Number of pairs; fewer if the rooms have no more."""
    min_overlap: float = 0.3
    """Smallest share of either view that the other one sees."""
    max_overlap: float = 1.0
    """Largest share of either view that the other one sees."""
    rotation_edges: tuple[float, ...] = (0.0, 15.0, 30.0, 60.0, 180.0)
    """Edges of bins of the angle between cameras, degrees; each bin gives as many pairs as the others if it can."""
    seed: int = 0
    """Seed of the choice of pairs."""

    def check(self) -> None:
        """Raises `InputError` if no pair can fulfil this."""
        if not 0 <= self.min_overlap <= self.max_overlap <= 1:
            raise InputError(
                f"min_overlap {self.min_overlap} and max_overlap {self.max_overlap} of the rooms' pairs must fulfil "
                "0 <= min <= max <= 1."
            )
        if len(self.rotation_edges) < 2 or list(self.rotation_edges) != sorted(set(self.rotation_edges)):
            raise InputError(f"rotation_edges {self.rotation_edges} of the rooms' pairs must be two or more, rising.")
        if self.pairs < 1:
            raise InputError(f"pairs is {self.pairs}, but must be at least 1.")


@dataclass(frozen=True)
class RoomViews:
    """One room on disk."""

    folder: Path
    names: tuple[str, ...]
    """Of the views, in the order of the capture: DSC00001 and so on."""
    camera_to_worlds: Float[np.ndarray, "n 4 4"]
    """OpenCV camera-to-world, metres."""
    intrinsics: Float[np.ndarray, "3 3"]
    """Pixels of the files, centres at +0.5."""
    size: tuple[int, int]
    """Height and width of the files."""

    def image_file(self, index: int) -> Path:
        """Where a view's image is."""
        return self.folder / "images" / f"{self.names[index]}.JPG"

    def depth_file(self, index: int) -> Path:
        """Where a view's depth map is."""
        return self.folder / "depth" / f"{self.names[index]}.png"

    def image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """A view in colour; raises `InputError` if it cannot be read."""
        return read_image(self.image_file(index))

    def depth(self, index: int) -> Float[np.ndarray, "h w"]:
        """A view's depth, metres; raises `InputError` if it cannot be read."""
        return read_depth(self.depth_file(index))


class RoomPairs(PairSet):
    """Pairs of views of rooms, as many of each bin of angles, drawn with a seed.

    Raises:
        InputError: the folder holds no rooms, a file of them is missing, or no pair is as it should be.
    """

    def __init__(self, root: Path, settings: RoomPairsSettings = RoomPairsSettings()) -> None:
        settings.check()
        self.rooms = [read_room(folder) for folder in room_folders(Path(root), settings.split)]
        self.chosen = _draw(self.rooms, settings)
        if not self.chosen:
            raise InputError(
                f"{root}: no two views of a room overlap by {settings.min_overlap} to {settings.max_overlap} at an "
                f"angle in {settings.rotation_edges}: allow more, or write rooms with more frames."
            )

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> PosedPair:
        """See `PairSet.read`."""
        room, first, second = self.chosen[index]
        views = self.rooms[room]
        poses = views.camera_to_worlds
        return PosedPair.of(
            *(PairView(views.image(view), views.depth(view), views.intrinsics) for view in (first, second)),
            relative_pose=np.linalg.inv(poses[second]) @ poses[first],
            name=f"{views.folder.name}/{views.names[first]}-{views.names[second]}",
            scene=views.folder.name,
        )


def room_folders(root: Path, split: Split = "val") -> list[Path]:
    """The rooms of a split.

    Raises:
        InputError: there is no list of them, or it is empty.
    """
    names: list[str] = []
    for name in LISTS.get(split, (*LISTS["train"], *LISTS["val"])):
        file = root / "metadata" / name
        try:
            names += file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read ({error}): {REMEDY}.") from error
    if not names:
        raise InputError(f"{root / 'metadata'} lists no rooms for `{split}`: write more, or take another split.")
    return [root / "scenes" / name for name in names]


def read_room(folder: Path) -> RoomViews:
    """Cameras and file names of a room.

    Raises:
        InputError: its `transforms_train.json` is missing or not what is written for rooms.
    """
    file = folder / "transforms_train.json"
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        stored = [np.array(frame["transform_matrix"], dtype=np.float64) for frame in content["frames"]]
        names = tuple(Path(frame["file_path"]).stem for frame in content["frames"])
        fl_x, fl_y, cx, cy = (float(content[key]) for key in ("fl_x", "fl_y", "cx", "cy"))
        matrix = np.array([[fl_x, 0, cx], [0, fl_y, cy], [0, 0, 1]])
        size = int(content["h"]), int(content["w"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}): {REMEDY}.") from error
    if not names:
        raise InputError(f"{file} lists no frames: {REMEDY}.")
    poses = [check_rigid(pose, f"{file}: the pose of {name}") for pose, name in zip(stored, names)]
    return RoomViews(folder, names, np.stack([opencv_from_stored(pose) for pose in poses]), matrix, size)


def _draw(rooms: list[RoomViews], settings: RoomPairsSettings) -> list[tuple[int, int, int]]:
    """Room, first and second view of each pair, in the order of rooms and views."""
    edges = settings.rotation_edges
    bins: list[list[tuple[int, int, int]]] = [[] for _ in edges[1:]]
    for number, views in enumerate(rooms):
        overlap, angle = _overlaps(views), rotation_angles(views.camera_to_worlds)
        fits = (overlap >= settings.min_overlap) & (overlap <= settings.max_overlap)
        for place, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
            within = np.triu(fits & (angle >= low) & (angle < high), 1)
            bins[place] += [(number, int(a), int(b)) for a, b in np.argwhere(within)]
    generator = np.random.default_rng(settings.seed)
    shuffled = [[bin_pairs[place] for place in generator.permutation(len(bin_pairs))] for bin_pairs in bins]
    chosen: list[tuple[int, int, int]] = []
    while len(chosen) < settings.pairs and any(shuffled):
        for bin_pairs in shuffled:
            if bin_pairs and len(chosen) < settings.pairs:
                chosen.append(bin_pairs.pop())
    # either view may be the first one
    swap = generator.random(len(chosen)) < 0.5
    return sorted((room, b, a) if turned else (room, a, b) for (room, a, b), turned in zip(chosen, swap))


def rotation_angles(poses: Float[np.ndarray, "n 4 4"]) -> Float[np.ndarray, "n n"]:
    """Angles of the rotations between cameras, degrees."""
    trace = np.einsum("aij,bij->ab", poses[:, :3, :3], poses[:, :3, :3])
    return np.degrees(np.arccos(np.clip((trace - 1) / 2, -1, 1)))


def _overlaps(views: RoomViews) -> Float[np.ndarray, "n n"]:
    """Overlap of all views of a room by their depth."""
    depths = []
    for index in range(len(views.names)):
        depth = views.depth(index)
        rows, columns = (
            ((np.arange(count) + 0.5) * length / count).astype(int) for count, length in zip(GRID, depth.shape)
        )
        depths.append(depth[rows[:, None], columns])
    relative = views.intrinsics / np.array([views.size[1], views.size[0], 1.0])[:, None]
    matrices = np.tile(relative, (len(views.names), 1, 1))
    return overlap_matrix(ViewGeometry(views.camera_to_worlds, matrices, np.stack(depths)))


def check(root: Path) -> list[str]:
    """What is missing or wrong, one sentence each; nothing if all rooms can be read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is not a folder: {REMEDY}."]
    found: list[str] = []
    try:
        folders = room_folders(root, "all")
    except InputError as error:
        return [str(error)]
    for folder in folders:
        try:
            views = read_room(folder)
        except InputError as error:
            found.append(str(error))
            continue
        indices = range(len(views.names))
        found += missing_files([views.image_file(index) for index in indices], "images", REMEDY)
        found += missing_files([views.depth_file(index) for index in indices], "depth maps", REMEDY)
    return found
