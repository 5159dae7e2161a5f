"""ScanNet as its SensReader exports it: many scenes under one root, each a video with depth.

::

    <root>/scannetv2_train.txt, scannetv2_val.txt          scene names (optional; also in splits/)
    <root>/<scene>/                                        or <root>/scans/<scene>/
        color/0.jpg, 1.jpg, ...                            RGB
        depth/0.png                                        uint16, millimetres (optional)
        pose/0.txt                                         4x4 camera-to-world, OpenCV axes; -inf where it was lost
        intrinsic/intrinsic_color.txt, intrinsic_depth.txt 4x4, in pixels of colour and depth
        instance-filt/0.png                                instance ids (optional; or instance/)

The 25,000 frames of the 2D benchmark (``scannet_frames_25k``: color/000000.jpg, intrinsics_color.txt) are read too.
Formats: ScanNet's README and ``SensReader``. Depth is resized to its colour image: its authors call the two aligned
(ScanNet/ScanNet, issue 2).
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Tuple, Type

import numpy as np
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image

from data_parsers.multi_scene import (
    CAMERA_KEYS,
    MultiSceneConfig,
    Scene,
    Split,
    places_in_capture,
    split_by_lists,
    split_names,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import UNREADABLE
from snd_nerfstudio.scenes.file_list import FileList

TRAIN_LIST, VAL_LIST = "scannetv2_train.txt", "scannetv2_val.txt"
COLOUR_INTRINSICS = ("intrinsic/intrinsic_color.txt", "intrinsics_color.txt", "intrinsic_color.txt")
DEPTH_INTRINSICS = ("intrinsic/intrinsic_depth.txt", "intrinsics_depth.txt", "intrinsic_depth.txt")
MASK_FOLDERS = ("instance-filt", "instance")
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
OFF_CENTRE = 0.15
"""Share of the image by which a principal point of ScanNet never misses the middle: then images were resized."""
LOOSE_REGISTRATION = 5e-3
"""Share of the image beyond which depth that misses its colour is told; ScanNet's own calibration gives 0.23 %."""


@dataclass
class ScanNetScenesConfig(MultiSceneConfig):
    """ScanNet as exported by its SensReader (color/, depth/, pose/, intrinsic/): many scenes under one root."""

    _target: Type = field(default_factory=lambda: ScanNetScenes)
    """Target class to instantiate."""
    data: Path = Path("scannet")
    """Folder that holds the scenes or `scans/`, or a single scene."""
    every_nth: int = 1
    """Take every n-th frame; ScanNet has 30 a second, and gaps between contexts are counted in frames that are taken.
    """
    calibrated_size: Optional[Tuple[int, int]] = None
    """Width and height of the images that intrinsic_color.txt is for (1296 968), if yours were resized since."""


@dataclass
class ScanNetScenes(DataParser):
    """Reads every scene of the chosen split."""

    config: ScanNetScenesConfig

    def _generate_dataparser_outputs(self, split: Split = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of the split's scenes whose camera was tracked.

        Raises:
            InputError: the tree is not of this layout, or a file in it is wrong.
        """
        root = self.config.data
        if self.config.every_nth < 1:
            raise InputError(f"--every-nth {self.config.every_nth} must be at least 1.")
        self._lost: dict[str, int] = {}
        self._loose: dict[str, float] = {}
        lists = "splits/" if (root / "splits").is_dir() else ""
        scenes = split_by_lists(
            root, self._scene_names(), split, (lists + TRAIN_LIST, lists + VAL_LIST), self._read_scene, split_spaces
        )
        self._tell(scenes)
        return to_outputs(scenes)

    @property
    def _folder(self) -> Path:
        """Where the scenes are."""
        root = self.config.data
        if (root / "color").is_dir():
            return root.resolve().parent
        return root / "scans" if (root / "scans").is_dir() else root

    def _scene_names(self) -> list[str]:
        root = self.config.data
        if (root / "color").is_dir():
            return [root.resolve().name]
        folder = self._folder
        names = sorted(entry.parent.name for entry in folder.glob("*/color")) if folder.is_dir() else []
        if not names:
            raise InputError(
                f"--data {root}: no <scene>/color there nor in scans/. Expected what ScanNet's SensReader exports of "
                "a .sens file: color/, depth/, pose/ and intrinsic/ in each scene's folder."
            )
        return names

    def _read_scene(self, name: str) -> Scene:
        folder = self._folder / name
        numbered = {int(stem): file for file in os.listdir(folder / "color") if (stem := Path(file).stem).isdigit()}
        if not numbered:
            raise InputError(f"{folder / 'color'} holds no numbered images (0.jpg, 1.jpg, ...).")
        numbers = np.array(sorted(numbered), dtype=np.int64)
        places = places_in_capture(numbers)
        taken = places % self.config.every_nth == 0
        images = [numbered[int(number)] for number in numbers[taken]]
        stems = [Path(image).stem for image in images]
        poses = _read_poses(folder / "pose", stems)
        tracked = np.isfinite(poses).all(axis=(1, 2))
        if not tracked.any():
            raise InputError(f"{folder / 'pose'}: none of the {len(poses)} poses is finite; remove the scene.")
        self._lost[name] = int((~tracked).sum())
        masks = next((place for kind in MASK_FOLDERS if (place := folder / kind).is_dir()), None)
        depths = folder / "depth" if (folder / "depth").is_dir() else None
        kept = np.flatnonzero(tracked)
        camera = self._camera(folder, [folder / "color" / images[index] for index in kept])
        if depths is not None:
            self._loose[name] = _registration_error(folder, camera, depths / f"{stems[kept[0]]}.png")

        def files(place: Optional[Path]) -> Optional[FileList]:
            return None if place is None else FileList.of(place / f"{stems[index]}.png" for index in kept)

        return Scene(
            name=name,
            images=FileList.of(folder / "color" / images[index] for index in kept),
            order=places[taken][kept] // self.config.every_nth,
            poses=poses[kept] @ OPENCV_TO_OPENGL,
            cameras=np.tile(camera, (len(kept), 1)),
            masks=files(masks),
            depths=files(depths),
        )

    def _camera(self, folder: Path, images: Sequence[Path]) -> Float[np.ndarray, "12"]:
        """``CAMERA_KEYS`` of the colour camera, at the size of the first image that can be read."""
        width, height = _first_size(images)
        file, matrix = _intrinsics(folder, COLOUR_INTRINSICS)
        calibrated = np.array(self.config.calibrated_size or (width, height), dtype=np.float64)
        # ScanNet's tools count pixels from their centres, we from their corners
        focal, principal = matrix[[0, 1], [0, 1]], matrix[:2, 2] + 0.5
        if not (np.abs(principal / calibrated - 0.5) < OFF_CENTRE).all() or not (focal > 0).all():
            raise InputError(
                f"{file}: focal length {focal[0]:g} and principal point ({principal[0]:g}, {principal[1]:g}) are not "
                f"of images of {calibrated[0]:g}x{calibrated[1]:g} pixels. If the images were resized after the "
                "export, give the size they had: scannet-scenes --calibrated-size 1296 968."
            )
        scale = np.array([width, height]) / calibrated
        values = {"fl_x": focal[0] * scale[0], "fl_y": focal[1] * scale[1], "w": width, "h": height}
        values |= {"cx": principal[0] * scale[0], "cy": principal[1] * scale[1]}
        return np.array([values.get(key, 0.0) for key in CAMERA_KEYS])

    def _tell(self, scenes: Sequence[Scene]) -> None:
        kept, lost = sum(len(scene) for scene in scenes), sum(self._lost.values())
        if lost:
            worst = max(self._lost, key=lambda name: self._lost[name])
            CONSOLE.log(
                f"[yellow]{self.config.data}: {lost} frames without a finite pose, where ScanNet lost track, are "
                f"left out ({self._lost[worst]} of them in {worst}); {kept} are there."
            )
        loose = [name for name, share in self._loose.items() if share > LOOSE_REGISTRATION]
        if loose:
            CONSOLE.log(
                f"[yellow]{self.config.data}: the intrinsics of colour and depth disagree in {len(loose)} scenes, "
                f"e.g. {loose[0]}: depth misses its colour by up to {self._loose[loose[0]]:.1%} of the image."
            )


def split_spaces(names: Sequence[str], split: Split, read: Callable[[str], Scene]) -> list[Scene]:
    """Hold out the last spaces: scene0000_00 and scene0000_01 show the same one, and stay together."""
    spaces = list(dict.fromkeys(name.split("_")[0] for name in names))
    if len(spaces) == 1:
        return split_scenes(names, split, read)
    chosen = set(split_names(spaces, split))
    return [read(name) for name in names if name.split("_")[0] in chosen]


def _read_poses(folder: Path, stems: Sequence[str]) -> Float[np.ndarray, "n 4 4"]:
    """The pose of each frame; not finite where there is none."""
    poses = np.empty((len(stems), 4, 4))
    for index, stem in enumerate(stems):
        poses[index] = _read_matrix(folder / f"{stem}.txt")
    return poses


def _read_matrix(file: Path) -> Float[np.ndarray, "4 4"]:
    try:
        values = np.array(file.read_text(encoding="utf-8").split(), dtype=np.float64)
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: export the scene again, with poses and intrinsics.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no text file of numbers ({error}).") from error
    if values.size != 16:
        raise InputError(f"{file} holds {values.size} numbers, not a 4x4 matrix.")
    return values.reshape(4, 4)


def _intrinsics(folder: Path, places: Sequence[str]) -> tuple[Path, Float[np.ndarray, "4 4"]]:
    file = next((found for place in places if (found := folder / place).is_file()), folder / places[0])
    return file, _read_matrix(file)


def _first_size(images: Sequence[Path]) -> tuple[int, int]:
    """Width and height of the first of some images that can be read.

    Raises:
        InputError: none can; it names the first.
    """
    for image in images:
        with suppress(InputError):
            return _image_size(image)
    return _image_size(images[0])


def _image_size(file: Path) -> tuple[int, int]:
    """Width and height that an image's header states."""
    try:
        with Image.open(file) as image:
            return image.size
    except UNREADABLE as error:
        raise InputError(f"Image {file} cannot be decoded ({error}): restore it or remove the frame.") from error


def _registration_error(folder: Path, camera: Float[np.ndarray, "12"], depth: Path) -> float:
    """How far depth that is resized to its image misses it, by the intrinsics of both: the largest share of a side.

    0 if the depth camera's intrinsics or its first map are not there.
    """
    if not depth.is_file() or not any((folder / place).is_file() for place in DEPTH_INTRINSICS):
        return 0.0
    try:
        size = np.array(_image_size(depth))
    except InputError:  # it is named where it is needed
        return 0.0
    _, matrix = _intrinsics(folder, DEPTH_INTRINSICS)
    focal, principal = matrix[[0, 1], [0, 1]], matrix[:2, 2] + 0.5
    of = dict(zip(CAMERA_KEYS, camera.tolist(), strict=True))
    colour = np.array([of["w"], of["h"]])
    corners = np.array([[0.0, 0.0], [1.0, 1.0]])  # the error is linear along either side
    rays = (corners * size - principal) / focal
    seen = (rays * [of["fl_x"], of["fl_y"]] + [of["cx"], of["cy"]]) / colour
    return float(np.abs(seen - corners).max())


scannet_scenes = DataParserSpecification(
    config=ScanNetScenesConfig(), description="ScanNet as its SensReader exports it; many scenes."
)
