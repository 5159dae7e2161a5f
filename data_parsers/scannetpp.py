"""The ScanNet++ tree that FiT3D and Splat and Distill prepare: many scenes of undistorted frames under one root.

::

    <root>/metadata/nvs_sem_train.txt, nvs_sem_val.txt            scene names (optional)
    <root>/scenes/<scene>/transforms_train.json                   intrinsics and poses
                         /images/DSC01234.JPG
                         /instance_segmentation/DSC01234.JPG.png  instance ids
                         /depth/DSC01234.png                      millimetres (optional; the published tree has none)

ScanNet++ as downloaded is recognised too. Where its toolkit has undistorted the images they are read as they are::

    <root>/splits/nvs_sem_train.txt, nvs_sem_val.txt
    <root>/data/<scene>/dslr/nerfstudio/transforms_undistorted.json
                       /dslr/undistorted_images/DSC01234.JPG      or resized_undistorted_images/
                       /dslr/instance_segmentation/               as above, or:
    <root>/obj_ids/<scene>/DSC01234.JPG.pth                       instance ids as the toolkit saves them
"""

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Type

import numpy as np
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.rich_utils import CONSOLE

from data_parsers.multi_scene import (
    MultiSceneConfig,
    Scene,
    Split,
    natural_key,
    read_cameras,
    read_poses,
    split_by_lists,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.file_list import FileList

TRAIN_LIST = "nvs_sem_train.txt"
VAL_LIST = "nvs_sem_val.txt"
UNDISTORTED_IMAGES = ("undistorted_images", "resized_undistorted_images")
"""Where the toolkit's versions put undistorted images."""


@dataclass
class ScanNetppScenesConfig(MultiSceneConfig):
    """ScanNet++ as prepared by FiT3D and Splat and Distill: many scenes under one root."""

    _target: Type = field(default_factory=lambda: ScanNetppScenes)
    """Target class to instantiate."""
    data: Path = Path("scannetpp")
    """Root of the tree, the folder that holds `scenes/`."""
    keep_bad_frames: bool = False
    """Keep frames that the dataset marks `is_bad`."""
    obj_ids: Optional[Path] = None
    """Folder of instance ids that ScanNet++'s toolkit saved: <scene>/<image>.pth. None: `obj_ids` below `data`."""


@dataclass(frozen=True)
class SceneFiles:
    """Where one scene's files are."""

    transforms: Path
    """JSON with intrinsics and poses."""
    images: Path
    """Folder of images."""
    masks: Path
    """Folder of instance masks."""
    obj_ids: Path
    """Folder of instance ids as the toolkit saves them."""
    depth: Optional[Path] = None
    """Folder of depth maps."""


@dataclass
class ScanNetppScenes(DataParser):
    """Reads every scene of the chosen split."""

    config: ScanNetppScenesConfig

    def _generate_dataparser_outputs(self, split: str = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of the split's scenes.

        Raises:
            InputError: the tree is not of this layout, or a file in it is wrong.
        """
        root = self.config.data
        folder = root / "scenes"
        if self._is_toolkit_tree():
            return to_outputs(self._scenes_of_split(self._undistorted_scenes(), split))  # type: ignore
        if not folder.is_dir():
            if root.is_file():
                raise InputError(f"--data {root} is a file: if it lists datasets, end the command with `scene-list`.")
            raise InputError(
                f"--data {root}: no folder `scenes` in it. Expected scenes/<scene>/transforms_train.json; for folders "
                "with a transforms.json end the command with `nerfstudio-scenes`, for other layouts with theirs."
            )
        names = sorted(entry.name for entry in folder.iterdir() if (entry / "transforms_train.json").is_file())
        if not names:
            raise InputError(f"--data {root}: no scenes/<scene>/transforms_train.json found.")
        return to_outputs(self._scenes_of_split(names, split))  # type: ignore

    def _is_toolkit_tree(self) -> bool:
        """Whether this is ScanNet++ as downloaded."""
        root = self.config.data
        return not (root / "scenes").is_dir() and any((root / "data").glob("*/dslr"))

    def _undistorted_scenes(self) -> list[str]:
        """Scenes of the download whose images the toolkit has undistorted.

        Raises:
            InputError: there are none; the message has the command that makes them.
        """
        root = self.config.data
        present = sorted(folder.parent.name for folder in (root / "data").glob("*/dslr"))
        usable = [
            name for name in present if self._files(name).transforms.is_file() and self._files(name).images.is_dir()
        ]
        if not usable:
            out = root.parent / f"{root.resolve().name}_snd"
            command = f"snd-data scannetpp --data {shlex.quote(str(root))} --out {shlex.quote(str(out))}"
            raise InputError(
                f"--data {root} is ScanNet++ as downloaded: fisheye images and no masks. Make pinhole images, masks "
                f"and depth of it with `{command}`, then train with --data {shlex.quote(str(out))}."
            )
        if len(usable) < len(present):
            CONSOLE.log(f"[yellow]{root}: {len(present) - len(usable)} of {len(present)} scenes are not undistorted.")
        return usable

    def _files(self, name: str) -> SceneFiles:
        root = self.config.data
        obj_ids = (self.config.obj_ids or root / "obj_ids") / name
        if self._is_toolkit_tree():
            dslr = root / "data" / name / "dslr"
            images = next((folder for kind in UNDISTORTED_IMAGES if (folder := dslr / kind).is_dir()), None)
            return SceneFiles(
                transforms=dslr / "nerfstudio" / "transforms_undistorted.json",
                images=images or dslr / UNDISTORTED_IMAGES[0],
                masks=dslr / "instance_segmentation",
                obj_ids=obj_ids,
            )
        folder = root / "scenes" / name
        depth = folder / "depth"
        return SceneFiles(
            transforms=folder / "transforms_train.json",
            images=folder / "images",
            masks=folder / "instance_segmentation",
            obj_ids=obj_ids,
            depth=depth if depth.is_dir() else None,
        )

    def _scenes_of_split(self, names: list[str], split: Split) -> list[Scene]:
        folder = "splits" if self._is_toolkit_tree() else "metadata"
        lists = f"{folder}/{TRAIN_LIST}", f"{folder}/{VAL_LIST}"
        return split_by_lists(self.config.data, names, split, lists, self._read_scene)

    def _read_scene(self, name: str) -> Scene:
        files = self._files(name)
        file = files.transforms
        content = read_object(file)
        described: dict[str, dict[str, Any]] = {}
        # the published tool appended the test frames to `frames`, so some files hold them twice
        for frame in [*(content.get("frames") or []), *(content.get("test_frames") or [])]:
            if not isinstance(frame.get("file_path"), str):
                raise InputError(f"{file}: a frame has no `file_path`.")
            described.setdefault(Path(frame["file_path"]).name, frame)
        if not described:
            raise InputError(f"{file} has no frames.")
        images = sorted(described, key=natural_key)
        numbers = [_first_number(image) for image in images]
        place = numbers if None not in numbers and len(set(numbers)) == len(numbers) else list(range(len(images)))
        order = dict(zip(images, place, strict=True))
        kept = [image for image in images if self.config.keep_bad_frames or not described[image].get("is_bad", False)]
        if not kept:
            raise InputError(f"{file}: all {len(described)} frames are marked `is_bad`.")
        mask_of = _mask_finder(files.masks, files.obj_ids)
        frames = [described[image] for image in kept]
        depth, folder = files.depth, str(files.images)
        return Scene(
            name=name,
            images=FileList.of(os.path.join(folder, image) for image in kept),
            order=np.array([order[image] for image in kept], dtype=np.int64),
            poses=to_mesh_world(read_poses([frame.get("transform_matrix") for frame in frames], file, kept)),
            cameras=read_cameras(content, frames, file),
            masks=FileList.of(mask_of(image) for image in kept),
            depths=None if depth is None else FileList.of(depth / f"{Path(image).stem}.png" for image in kept),
            world=to_mesh_world(np.eye(4)),
        )


def _mask_finder(folder: Path, obj_ids: Path) -> Callable[[str], Path]:
    """The instance mask of an image: DSC01234.JPG.png, else DSC01234.png, else the toolkit's DSC01234.JPG.pth.

    Folders are listed once, for asking after each file of a large dataset takes long.
    """
    images, saved = (set(os.listdir(place)) if place.is_dir() else set() for place in (folder, obj_ids))

    def find(image: str) -> Path:
        for name in (f"{image}.png", f"{Path(image).stem}.png"):
            if name in images:
                return folder / name
        return obj_ids / f"{image}.pth" if f"{image}.pth" in saved else folder / f"{image}.png"

    return find


def _first_number(name: str) -> Optional[int]:
    match = re.search(r"\d+", name)
    return int(match.group()) if match else None


def to_mesh_world(poses: Float[np.ndarray, "*n 4 4"]) -> Float[np.ndarray, "*n 4 4"]:
    """Undo the world rotation of the stored poses, so that the scene's mesh and its cameras share one world.

    The files hold nerfstudio's usual turn of COLMAP's world: swap rows 0 and 1 and negate row 2 to go back.
    """
    return np.stack([poses[..., 1, :], poses[..., 0, :], -poses[..., 2, :], poses[..., 3, :]], axis=-2)


scannetpp_scenes = DataParserSpecification(
    config=ScanNetppScenesConfig(), description="ScanNet++ as prepared by FiT3D and Splat and Distill; many scenes."
)
