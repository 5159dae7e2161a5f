"""What our dataparsers share: many scenes in one DataparserOutputs, and how some of them are held out."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.scene_box import SceneBox

from snd_nerfstudio.errors import InputError

Split = Literal["train", "val", "test", "all"]
HELD_OUT_SHARE = 0.15
HELD_OUT_FRAMES = 16
DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "p1", "p2")


@dataclass(frozen=True)
class Frame:
    """One frame as its scene's JSON describes it."""

    image: Path
    """RGB image."""
    order: int
    """Position in the capture."""
    pose: Float[np.ndarray, "4 4"]
    """Camera-to-world in nerfstudio's OpenGL axes."""
    camera: dict[str, float]
    """fl_x fl_y cx cy w h and the distortion keys, in pixels of the image."""
    mask: Optional[Path] = None
    """Instance mask."""
    depth: Optional[Path] = None
    """Depth map."""


@dataclass(frozen=True)
class Scene:
    """One scene's usable frames in capture order."""

    name: str
    frames: Sequence[Frame]
    depth_scale: float = 1e-3
    """World units per unit of a depth file."""


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which ``frame_2`` comes before ``frame_10``."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} must hold a JSON object with `frames`.")
    return content


def read_pose(matrix: Any, file: Path, image: str) -> Float[np.ndarray, "4 4"]:
    """A 4x4 (or 3x4) ``transform_matrix``.

    Raises:
        InputError: it has another shape, is not finite or not invertible.
    """
    try:
        pose = np.array(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.zeros(0)
    if pose.shape == (3, 4):
        pose = np.concatenate([pose, [[0.0, 0.0, 0.0, 1.0]]])
    if pose.shape != (4, 4):
        raise InputError(f"{file}: `transform_matrix` of {image} is not a 4x4 matrix.")
    if not np.isfinite(pose).all():
        raise InputError(f"{file}: `transform_matrix` of {image} holds NaN or infinity; mend or remove the frame.")
    if abs(np.linalg.det(pose[:3, :3])) < 1e-6:
        raise InputError(f"{file}: `transform_matrix` of {image} is not invertible; mend or remove the frame.")
    return pose


def read_camera(content: dict[str, Any], frame: dict[str, Any], file: Path) -> dict[str, float]:
    """Intrinsics of a frame: its own where it has them, else the scene's.

    Raises:
        InputError: a key is missing or the camera model is not a perspective one.
    """
    model = frame.get("camera_model", content.get("camera_model", "OPENCV"))
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL"):
        raise InputError(
            f"{file}: camera model {model} is not a perspective one; undistort the images to pinholes first."
        )
    camera: dict[str, float] = {}
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
        fallback = {"fl_y": "fl_x"}.get(key)
        value = frame.get(key, content.get(key))
        if value is None and fallback is not None:
            value = camera[fallback]
        if value is None:
            raise InputError(f"{file}: `{key}` is missing, both for the scene and for frame {frame.get('file_path')}.")
        camera[key] = float(value)
    for key in DISTORTION_KEYS:
        camera[key] = float(frame.get(key, content.get(key, 0.0)))
    return camera


def held_out_tail(count: int) -> int:
    """How many frames at the end of a single scene are kept for evaluation: a contiguous stretch.

    15 %, but at least 16 where that leaves twice as many to train on; a triplet needs neighbours on both sides.
    """
    share = max(round(HELD_OUT_SHARE * count), 1)
    return max(share, HELD_OUT_FRAMES) if count >= 3 * HELD_OUT_FRAMES else share


def split_scenes(scenes: list[Scene], split: Split) -> list[Scene]:
    """Hold out the last scenes (15 %, at least one); of a single scene the last frames.

    Args:
        scenes: all of them, sorted.
        split: ``train``, ``val``/``test`` (the same), or ``all``.

    Raises:
        InputError: there is a single scene with fewer than three frames.
    """
    if split == "all":
        return scenes
    if len(scenes) > 1:
        held_out = max(1, round(HELD_OUT_SHARE * len(scenes)))
        return scenes[:-held_out] if split == "train" else scenes[-held_out:]
    (scene,) = scenes
    if len(scene.frames) < 3:
        raise InputError(f"Scene {scene.name} has {len(scene.frames)} usable frames; a triplet needs at least three.")
    first = len(scene.frames) - held_out_tail(len(scene.frames))
    frames = scene.frames[:first] if split == "train" else scene.frames[first:]
    return [Scene(scene.name, frames, scene.depth_scale)]


def to_outputs(scenes: Sequence[Scene]) -> DataparserOutputs:
    """All frames of all scenes in one list; poses are kept as they are (metres where the files are metric).

    ``metadata`` holds ``scene_names``; and for every frame ``scene_index``, ``frame_order``,
    ``instance_filenames``, ``depth_filenames`` and ``depth_scale``.
    """
    frames = [frame for scene in scenes for frame in scene.frames]

    def column(key: str) -> torch.Tensor:
        return torch.tensor([frame.camera[key] for frame in frames], dtype=torch.float32)[:, None]

    poses = torch.from_numpy(np.stack([frame.pose for frame in frames])).float()
    cameras = Cameras(
        camera_to_worlds=poses[:, :3],
        fx=column("fl_x"),
        fy=column("fl_y"),
        cx=column("cx"),
        cy=column("cy"),
        width=column("w").round().long(),
        height=column("h").round().long(),
        distortion_params=torch.cat([column(key) for key in DISTORTION_KEYS], dim=1),
        camera_type=CameraType.PERSPECTIVE,
    )
    centres = poses[:, :3, 3]
    box = torch.stack([centres.amin(0) - 1.0, centres.amax(0) + 1.0])
    counts = [len(scene.frames) for scene in scenes]
    masks = [frame.mask for frame in frames]
    depths = [frame.depth for frame in frames]
    return DataparserOutputs(
        image_filenames=[frame.image for frame in frames],
        cameras=cameras,
        scene_box=SceneBox(aabb=box),
        metadata={
            "scene_names": [scene.name for scene in scenes],
            "scene_index": np.repeat(np.arange(len(scenes)), counts),
            "frame_order": np.array([frame.order for frame in frames], dtype=np.int64),
            "instance_filenames": masks if any(masks) else None,
            "depth_filenames": depths if any(depths) else None,
            "depth_scale": np.repeat([scene.depth_scale for scene in scenes], counts),
        },
    )
