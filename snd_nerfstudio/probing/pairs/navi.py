"""NAVI v1 (Jampani et al. 2023): photographs of 36 scanned objects with pose and depth of the object.

    <object>/wild_set/annotations.json              one entry per image: camera (q, t, focal_length), filename,
                                                    image_size (height, width), split
    <object>/wild_set/images/000.jpg                to be turned as its EXIF data says
    <object>/wild_set/depth/000.png                 16 bits: 655350 / depth in millimetres; 0 = not the object
    <object>/multiview-00-<camera>/...              likewise
    custom_splits/pairwise_pixel_correspondences/pairs-{multiview,wild_set}.txt     image, image, angle

q (w, x, y, z) and t (millimetres) lead from the object's axes to the camera's. Images that Probe3D has made smaller,
`downsampled_000.jpg`, are read in the place of the large ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs.base import (
    PairSet,
    PairView,
    PosedPair,
    check_rigid,
    missing_files,
    read_image,
    read_values,
)

DEPTH_CODE = 65535 * 10.0
"""Depth in millimetres is this over the stored number."""
PAIR_LISTS = "custom_splits/pairwise_pixel_correspondences"
REMEDY = "download NAVI (navi_v1.0.tar.gz or later, github.com/google/navi) and give the folder that it unpacks to"


@dataclass(frozen=True)
class NaviSettings:
    """Which pairs of NAVI are taken, and how they are cropped."""

    collection: Literal["wild_set", "multiview"] = "wild_set"
    """`wild_set`: different places and light. `multiview`: one place, another camera position."""
    pairs: Literal["drawn", "listed"] = "drawn"
    """`drawn`: a partner within the angle for some images, as Probe3D does. `listed`: the data set's own list."""
    max_angle: float = 120.0
    """Largest angle between the cameras of a drawn pair, degrees."""
    every: int = 4
    """Every so manieth image gets a partner."""
    seed: int = 8
    """Seed of the partners."""
    size: int = 512
    """Height and width of the images after the crop around the object, pixels."""


@dataclass(frozen=True)
class NaviImage:
    """One image as it is annotated."""

    folder: Path
    stem: str
    size: tuple[int, int]
    """Height and width that the focal length belongs to."""
    focal: float
    """Pixels."""
    pose: Float[np.ndarray, "4 4"]
    """From the object's axes to the camera's, metres."""

    def file(self, kind: str, ending: str) -> Path:
        """Where its image or depth map is: the smaller one if there is one."""
        small = self.folder / kind / f"downsampled_{self.stem}{ending}"
        return small if small.is_file() else self.folder / kind / f"{self.stem}{ending}"


class NaviPairs(PairSet):
    """Pairs of images of the same object, cropped to it; depth is of the object alone.

    Raises:
        InputError: the folder is not NAVI, or an annotation is not what it should be.
    """

    def __init__(self, root: Path, settings: NaviSettings = NaviSettings()) -> None:
        self.root, self.settings = Path(root), settings
        self.images = read_images(self.root, settings.collection)
        draw = self._listed if settings.pairs == "listed" else self._drawn
        self.chosen: list[tuple[NaviImage, NaviImage]] = draw()
        if not self.chosen:
            raise InputError(f"{root} has no two images of one object within {settings.max_angle} degrees: {REMEDY}.")

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> PosedPair:
        """See `PairSet.read`."""
        pair = self.chosen[index]
        scene = "/".join(pair[0].folder.parts[-2:])
        return PosedPair.of(
            *(read_crop(image, self.settings.size) for image in pair),
            relative_pose=pair[1].pose @ np.linalg.inv(pair[0].pose),
            name=f"{scene}/{pair[0].stem}-{pair[1].stem}",
            scene=scene,
        )

    def _drawn(self) -> list[tuple[NaviImage, NaviImage]]:
        """A partner at an angle in ``(0, max_angle]`` for every so manieth image of each scene."""
        generator = np.random.default_rng(self.settings.seed)
        pairs = []
        for scene in self.images.values():
            rotations = np.stack([image.pose[:3, :3] for image in scene])
            cosine = (np.einsum("aij,bij->ab", rotations, rotations) - 1) / 2
            angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
            np.fill_diagonal(angle, 0)
            for index in range(0, len(scene), self.settings.every):
                partners = np.flatnonzero((angle[index] > 0) & (angle[index] <= self.settings.max_angle))
                if len(partners):
                    pairs.append((scene[index], scene[int(generator.choice(partners))]))
        return pairs

    def _listed(self) -> list[tuple[NaviImage, NaviImage]]:
        file = self.root / PAIR_LISTS / f"pairs-{self.settings.collection}.txt"
        known: dict[tuple[str, ...], NaviImage] = {
            _key(f"{image.folder}/{image.stem}"): image for scene in self.images.values() for image in scene
        }
        try:
            lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The list of pairs {file} cannot be read ({error}): {REMEDY}.") from error
        pairs = []
        for number, line in enumerate(lines, 1):
            keys = [_key(path) for path in line[:2]]
            if len(line) < 2 or any(key not in known for key in keys):
                raise InputError(f"{file}, line {number}: {' '.join(line)} names an unknown image: {REMEDY}.")
            pairs.append((known[keys[0]], known[keys[1]]))
        return pairs


def _key(path: str) -> tuple[str, ...]:
    """Object, scene and stem of a path, with or without `images`."""
    parts = [part for part in Path(path).parts if part not in ("/", ".", "images")]
    return (*parts[-3:-1], Path(path).stem)


def read_images(root: Path, collection: str) -> dict[str, list[NaviImage]]:
    """All images of a collection by `<object>/<scene>`, in the order of their names.

    Raises:
        InputError: there are none, or an annotation cannot be read.
    """
    folders = sorted(file.parent for file in root.glob(f"*/{collection}*/annotations.json"))
    if not folders:
        raise InputError(f"{root} has no <object>/{collection}*/annotations.json: {REMEDY}.")
    return {"/".join(folder.parts[-2:]): _read_scene(folder) for folder in folders}


def _read_scene(folder: Path) -> list[NaviImage]:
    file = folder / "annotations.json"
    images = []
    try:
        for entry in json.loads(file.read_text()):
            camera: dict[str, Any] = entry["camera"]
            pose = np.eye(4)
            pose[:3, :3] = rotation_of(np.array(camera["q"], dtype=np.float64))
            pose[:3, 3] = np.array(camera["t"], dtype=np.float64) / 1000
            stem = Path(entry["filename"]).stem
            height, width = (int(length) for length in entry["image_size"])
            pose = check_rigid(pose, f"{file}: the pose of {entry['filename']}")
            images.append(NaviImage(folder, stem, (height, width), float(camera["focal_length"]), pose))
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}): {REMEDY}.") from error
    return sorted(images, key=lambda image: image.stem)


def rotation_of(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3 3"]:
    """Rotation matrix of a quaternion (w, x, y, z) of any length above 0."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def decode_depth(stored: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """Depth in metres of what NAVI's depth maps hold, ``655.35 / stored``; 0 where nothing is stored."""
    return np.where(stored > 0, DEPTH_CODE / 1000 / np.maximum(stored, 1), 0).astype(np.float32)


def read_crop(image: NaviImage, size: int) -> PairView:
    """An image, its depth and its intrinsics, cropped to a square around the object and resized.

    The square is as large as the longer side of the object's box and lies within the image if it fits; what of it
    does not is black and without depth. Images are resized with a bicubic filter, depth by nearest neighbour.

    Raises:
        InputError: a file cannot be read, or sizes of image, depth and annotation are of different shape.
    """
    picture = read_image(image.file("images", ".jpg"), upright=True)
    depth_file = image.file("depth", ".png")
    depth = decode_depth(read_values(depth_file))
    height, width = depth.shape
    for what, (rows, columns) in (("its image", picture.shape[:2]), ("its annotation", image.size)):
        if abs(rows * width - columns * height) > max(rows, columns):
            raise InputError(f"{depth_file} has {width}x{height} pixels, {what} {columns}x{rows}: {REMEDY}.")
    rows, columns = np.flatnonzero(depth.any(axis=1)), np.flatnonzero(depth.any(axis=0))
    if len(rows) == 0:
        raise InputError(f"Depth map {depth_file} is empty: {REMEDY}.")
    side = int(max(rows[-1] - rows[0], columns[-1] - columns[0])) + 1
    top = _start(int(rows[0] + rows[-1] + 1), side, height)
    left = _start(int(columns[0] + columns[-1] + 1), side, width)
    # the image may have another resolution than the depth map
    factor = picture.shape[1] / width, picture.shape[0] / height
    box = (left * factor[0], top * factor[1], (left + side) * factor[0], (top + side) * factor[1])
    cropped = Image.fromarray(picture).crop(tuple(round(edge) for edge in box))  # type: ignore
    place = ((np.arange(size) + 0.5) * side / size).astype(int)
    depth = np.array(Image.fromarray(depth).crop((left, top, left + side, top + side)))[place[:, None], place]
    focal = image.focal * width / image.size[1]
    matrix = np.array([[focal, 0, width / 2 - left], [0, focal, height / 2 - top], [0, 0, 1.0]])
    matrix[:2] *= size / side
    return PairView(np.asarray(cropped.resize((size, size), Image.Resampling.BICUBIC)), depth, matrix)


def _start(twice_middle: int, side: int, length: int) -> int:
    """Where a square begins on one axis: about the middle, but inside; evenly beyond both ends if it is longer."""
    if side > length:
        return (length - side) // 2
    return min(max((twice_middle - side) // 2, 0), length - side)


def check(root: Path) -> list[str]:
    """What is missing or wrong, one sentence each; nothing if all images of `wild_set` can be read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is not a folder: {REMEDY}."]
    try:
        scenes = read_images(root, "wild_set")
    except InputError as error:
        return [str(error)]
    images = [image for scene in scenes.values() for image in scene]
    return [
        *missing_files([image.file("images", ".jpg") for image in images], "images", REMEDY),
        *missing_files([image.file("depth", ".png") for image in images], "depth maps", REMEDY),
    ]
