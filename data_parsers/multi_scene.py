"""What our dataparsers share: many scenes in one DataparserOutputs, and how some of them are held out."""

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.utils.rich_utils import CONSOLE

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.file_list import FileList

Split = Literal["train", "val", "test", "all"]
HELD_OUT_SHARE = 0.15
HELD_OUT_FRAMES = 16
COORDINATE_LOSS = 0.02
"""Share of the distance between two frames that may be lost when poses become float32."""
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")
CAMERA_KEYS = ("fl_x", "fl_y", "cx", "cy", "w", "h", *DISTORTION_KEYS)
"""Columns of `Scene.cameras`, under the names that transforms.json has for them."""


@dataclass
class MultiSceneConfig(DataParserConfig):
    """Base of the layouts of this package: they know several scenes, hold some out themselves, and keep poses."""


@dataclass(frozen=True)
class Scene:
    """One scene's usable frames in capture order, as arrays: objects for each frame would cost gigabytes."""

    name: str
    images: FileList
    """RGB images."""
    order: Int[np.ndarray, "n"]
    """Position of each frame in the capture."""
    poses: Float[np.ndarray, "n 4 4"]
    """Camera-to-world in nerfstudio's OpenGL axes."""
    cameras: Float[np.ndarray, "n 12"]
    """``CAMERA_KEYS`` in pixels of the image."""
    masks: Optional[FileList] = None
    """Instance masks."""
    depths: Optional[FileList] = None
    """Depth maps."""
    depth_scale: float = 1e-3
    """World units per unit of a depth file."""
    world: Float[np.ndarray, "4 4"] = field(default_factory=lambda: np.eye(4))
    """What the poses in the files were multiplied by from the left, for messages about mistakes in them."""

    def __len__(self) -> int:
        return len(self.order)

    def take(self, chosen: Int[np.ndarray, "m"]) -> "Scene":
        """Some of the frames."""
        return replace(
            self,
            images=self.images.take(chosen),
            order=self.order[chosen],
            poses=self.poses[chosen],
            cameras=self.cameras[chosen],
            masks=None if self.masks is None else self.masks.take(chosen),
            depths=None if self.depths is None else self.depths.take(chosen),
        )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which ``frame_2`` comes before ``frame_10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def places_in_capture(numbers: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Place of each frame in its capture, from 0, where frames are numbered in rising order but seldom one by one.

    The median distance of two numbers counts as one step, so that every tenth frame of a video gives 0, 1, 2, ...,
    and where three of these are missing three places stay empty.
    """
    if len(numbers) < 2:
        return np.zeros(len(numbers), dtype=np.int64)
    distances = np.diff(numbers)
    steps = np.maximum(np.round(distances / np.median(distances)), 1)
    return np.concatenate([[0], np.cumsum(steps)]).astype(np.int64)


def find_transforms(root: Path) -> list[Path]:
    """The transforms.json of a folder, or those of its sub-folders in natural order.

    Raises:
        InputError: there is none.
    """
    if (root / "transforms.json").is_file():
        return [root / "transforms.json"]
    found = root.glob("*/transforms.json") if root.is_dir() else []
    files = sorted(found, key=lambda file: natural_key(file.parent.name))
    if not files:
        raise InputError(f"--data {root}: no transforms.json there nor in its sub-folders.")
    return files


def read_poses(matrices: Sequence[Any], file: Path, images: Sequence[str]) -> Float[np.ndarray, "n 4 4"]:
    """The ``transform_matrix`` of each frame, 4x4 or 3x4.

    Args:
        matrices: as JSON gives them.
        file: they are from, for messages.
        images: name of each frame, for messages.

    Raises:
        InputError: one has another shape, is not finite or not invertible.
    """
    try:
        poses = np.array(matrices, dtype=np.float64)
    except (TypeError, ValueError):  # not all alike
        poses = np.zeros(0)
    if poses.shape[1:] == (3, 4):
        poses = _with_last_row(poses)
    if poses.shape[1:] != (4, 4):
        poses = np.stack([_read_pose(matrix, file, image) for matrix, image in zip(matrices, images, strict=True)])
    finite = np.isfinite(poses).all(axis=(1, 2))
    if not finite.all():
        image = images[int(np.argmin(finite))]
        raise InputError(f"{file}: `transform_matrix` of {image} holds NaN or infinity; mend or remove the frame.")
    invertible = np.abs(np.linalg.det(poses[:, :3, :3])) >= 1e-6
    if not invertible.all():
        image = images[int(np.argmin(invertible))]
        raise InputError(f"{file}: `transform_matrix` of {image} is not invertible; mend or remove the frame.")
    return poses


def _read_pose(matrix: Any, file: Path, image: str) -> Float[np.ndarray, "4 4"]:
    try:
        pose = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.zeros(0)
    if pose.shape == (3, 4):
        pose = _with_last_row(pose[None])[0]
    if pose.shape != (4, 4):
        raise InputError(f"{file}: `transform_matrix` of {image} is not a 4x4 matrix.")
    return pose


def _with_last_row(poses: Float[np.ndarray, "n 3 4"]) -> Float[np.ndarray, "n 4 4"]:
    last = np.broadcast_to(np.array([[[0.0, 0.0, 0.0, 1.0]]]), (len(poses), 1, 4))
    return np.concatenate([poses, last], axis=1)


def read_cameras(content: dict[str, Any], frames: Sequence[dict[str, Any]], file: Path) -> Float[np.ndarray, "n 12"]:
    """``CAMERA_KEYS`` of each frame: its own where it has them, else the scene's.

    Raises:
        InputError: a key is missing or no number, or the camera model is not a perspective one.
    """
    keys = {*CAMERA_KEYS, "camera_model", "is_fisheye", "distortion_params"}
    if frames and all(keys.isdisjoint(frame) for frame in frames):
        return np.tile(_read_camera(content, frames[0], file), (len(frames), 1))
    return np.array([_read_camera(content, frame, file) for frame in frames]).reshape(-1, len(CAMERA_KEYS))


def _read_camera(content: dict[str, Any], frame: dict[str, Any], file: Path) -> Float[np.ndarray, "12"]:
    model = frame.get("camera_model", content.get("camera_model", "OPENCV"))
    if frame.get("is_fisheye", content.get("is_fisheye", False)):
        model = "with `is_fisheye`"
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise InputError(
            f"{file}: camera model {model} is not a perspective one; undistort the images to pinholes first."
        )
    camera: dict[str, float] = {}
    together = frame.get("distortion_params", content.get("distortion_params"))  # nerfstudio prefers them
    if together is not None:
        if not isinstance(together, list) or len(together) != len(DISTORTION_KEYS):
            raise InputError(f"{file}: `distortion_params` must be six numbers: {', '.join(DISTORTION_KEYS)}.")
        frame = {**frame, **dict(zip(DISTORTION_KEYS, together, strict=True))}
    for key in CAMERA_KEYS:
        value = frame.get(key, content.get(key, 0.0 if key in DISTORTION_KEYS else None))
        if value is None and key == "fl_y":
            value = camera["fl_x"]
        if value is None:
            raise InputError(f"{file}: `{key}` is missing, both for the scene and for frame {frame.get('file_path')}.")
        try:
            camera[key] = float(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{file}: `{key}` of frame {frame.get('file_path')} is no number: {value!r}.") from error
    return np.array(list(camera.values()))


def read_files(frames: Sequence[dict[str, Any]], key: str, file: Path) -> FileList:
    """The files that frames name under a key, relative to the folder of their transforms.json.

    Raises:
        InputError: something else than a text stands there.
    """
    names = [frame.get(key) for frame in frames]
    wrong = [name for name in names if not (name is None or isinstance(name, str))]
    if wrong:
        raise InputError(f"{file}: `{key}` {wrong[0]!r} is no file name; mend or remove it.")
    return FileList.of(None if name is None else os.path.join(file.parent, name) for name in names)


def read_depth_unit(content: dict[str, Any], usual: float, file: Path) -> float:
    """World units per unit of a depth file: the file's ``depth_unit_scale_factor``, or the usual one.

    Raises:
        InputError: it is no number above 0.
    """
    value = content.get("depth_unit_scale_factor")
    value = usual if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(
            f"{file}: `depth_unit_scale_factor` {value!r} must be a number above 0, world units per unit of a depth "
            "file: 0.001 for millimetres in a scene in metres."
        )
    return float(value)


def check_coordinates(scene: Scene) -> None:
    """Raise `InputError` if cameras lie so far from the origin that float32 would lose where they are."""
    centres = scene.poses[:, :3, 3]
    if len(centres) < 2:
        return
    step = float(np.median(np.linalg.norm(np.diff(centres, axis=0), axis=1)))
    lost = float(np.spacing(np.float32(np.abs(centres).max())))
    if step > 0 and lost > COORDINATE_LOSS * step:
        raise InputError(
            f"Scene {scene.name}: cameras are {step:.2g} apart but up to {np.abs(centres).max():.3g} from the origin, "
            f"where float32 knows positions to {lost:.2g}: subtract one offset from the translation of all its poses."
        )


def held_out_tail(count: int) -> int:
    """How many frames at the end of a single scene are kept for evaluation: a contiguous stretch.

    15 %, but at least 16 where that leaves twice as many to train on; a triplet needs neighbours on both sides.
    """
    share = max(round(HELD_OUT_SHARE * count), 1)
    return max(share, HELD_OUT_FRAMES) if count >= 3 * HELD_OUT_FRAMES else share


def split_names(names: Sequence[str], split: Split) -> list[str]:
    """Hold out the last of several scenes: 15 %, at least one.

    Args:
        names: of all of them, sorted; at least two.
        split: ``train``, ``val``/``test`` (the same), or ``all``.
    """
    if split == "all":
        return list(names)
    held_out = max(1, round(HELD_OUT_SHARE * len(names)))
    return list(names[:-held_out] if split == "train" else names[-held_out:])


def split_frames(scene: Scene, split: Split) -> Scene:
    """Hold out the last frames of a single scene.

    Raises:
        InputError: it has fewer than three frames.
    """
    if split == "all":
        return scene
    if len(scene) < 3:
        raise InputError(f"Scene {scene.name} has {len(scene)} usable frames; a triplet needs at least three.")
    first = len(scene) - held_out_tail(len(scene))
    return scene.take(np.arange(first) if split == "train" else np.arange(first, len(scene)))


def split_scenes(names: Sequence[str], split: Split, read: Callable[[str], Scene]) -> list[Scene]:
    """Read the scenes of one side: of several the first or the last scenes, of a single one its frames.

    Args:
        names: of all scenes, sorted.
        split: which side.
        read: reads a scene; called for those of the wanted side alone.

    Raises:
        InputError: there is a single scene with fewer than three frames, or what ``read`` raises.
    """
    if len(names) == 1:
        return [split_frames(read(names[0]), split)]
    return [read(name) for name in split_names(names, split)]


def split_by_lists(
    root: Path,
    names: Sequence[str],
    split: Split,
    lists: tuple[str, str],
    read: Callable[[str], Scene],
    hold_out: Callable[[Sequence[str], Split, Callable[[str], Scene]], list[Scene]] = split_scenes,
) -> list[Scene]:
    """Read the scenes of one side of a dataset that may come with lists of its training and validation scenes.

    Without a training list all scenes that are not held out are trained on.

    Args:
        root: of the dataset.
        names: of all scenes on disk, sorted.
        split: which side.
        lists: files below ``root`` with the names of training and of validation scenes, separated by white space.
        read: reads a scene.
        hold_out: splits the scenes if none of the validation list is on disk.

    Raises:
        InputError: there is nothing to train on, or what ``read`` raises.
    """
    train, val = (_listed(names, root / file) for file in lists)
    if split == "all":
        return [read(name) for name in names]
    train = [name for name in train or names if name not in set(val)]
    if val and not train and split == "train":
        raise InputError(
            f"{root}: every scene on disk is listed in {lists[1]}. Add scenes of the training list, or train on "
            "these with --pipeline.datamanager.all-scenes True."
        )
    if val:
        return [read(name) for name in (train if split == "train" else val)]
    CONSOLE.log(
        f"[yellow]{root}: no scene of {lists[1]} is on disk (or there is no such list); the last scenes, or the last "
        "frames of the only one, are held out instead."
    )
    return hold_out(train, split, read)


def _listed(names: Sequence[str], file: Path) -> list[str]:
    """The scenes on disk that a file lists; none without the file."""
    if not file.is_file():
        return []
    listed, on_disk = list(dict.fromkeys(file.read_text(encoding="utf-8").split())), set(names)
    present = [name for name in listed if name in on_disk]
    if len(present) < len(listed):
        CONSOLE.log(f"{file}: {len(listed) - len(present)} of {len(listed)} listed scenes are not on disk.")
    return present


def to_outputs(scenes: Sequence[Scene]) -> DataparserOutputs:
    """All frames of all scenes in one list; poses are kept as they are (metres where the files are metric).

    ``metadata`` holds ``scene_names`` and ``scene_worlds``; and for every frame ``scene_index``, ``frame_order``,
    ``instance_filenames``, ``depth_filenames`` and ``depth_scale``.

    Raises:
        InputError: coordinates of a scene are too large for float32.
    """
    cameras = torch.from_numpy(np.concatenate([scene.cameras for scene in scenes])).float()
    column = {key: cameras[:, index : index + 1] for index, key in enumerate(CAMERA_KEYS)}
    for scene in scenes:
        check_coordinates(scene)
    poses = torch.from_numpy(np.concatenate([scene.poses[:, :3] for scene in scenes])).float()
    centres = poses[:, :3, 3]
    counts = [len(scene) for scene in scenes]
    return DataparserOutputs(
        image_filenames=FileList.joined([scene.images for scene in scenes]),  # type: ignore
        cameras=Cameras(
            camera_to_worlds=poses,
            fx=column["fl_x"],
            fy=column["fl_y"],
            cx=column["cx"],
            cy=column["cy"],
            width=column["w"].round().long(),
            height=column["h"].round().long(),
            distortion_params=cameras[:, -len(DISTORTION_KEYS) :],
            camera_type=CameraType.PERSPECTIVE,
        ),
        scene_box=SceneBox(aabb=torch.stack([centres.amin(0) - 1.0, centres.amax(0) + 1.0])),
        metadata={
            "scene_names": [scene.name for scene in scenes],
            "scene_worlds": [(scene.world, 1.0) for scene in scenes],
            "scene_index": np.repeat(np.arange(len(scenes)), counts),
            "frame_order": np.concatenate([scene.order for scene in scenes]).astype(np.int64),
            "instance_filenames": _joined_or_none([scene.masks for scene in scenes], counts),
            "depth_filenames": _joined_or_none([scene.depths for scene in scenes], counts),
            "depth_scale": np.repeat([scene.depth_scale for scene in scenes], counts),
        },
    )


def _joined_or_none(lists: Sequence[Optional[FileList]], counts: Sequence[int]) -> Optional[FileList]:
    files = FileList.joined(
        [FileList.without_files(n) if one is None else one for one, n in zip(lists, counts, strict=True)]
    )
    return files if files.any_file else None
