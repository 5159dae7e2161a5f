"""Where things are in ScanNet++ as downloaded (the tree of its toolkit), and what its JSON files say about frames.

    <root>/splits/nvs_sem_train.txt, nvs_sem_val.txt      scene names
    <root>/data/<scene>/dslr/resized_images/DSC01234.JPG  fisheye images
                       /dslr/resized_anon_masks/DSC01234.png   255 = shown as it was, 0 = anonymised
                       /dslr/nerfstudio/transforms.json   camera and poses
                       /dslr/train_test_lists.json        names of frames
                       /scans/mesh_aligned_0.05.ply, segments.json, segments_anno.json

Layout and keys are those of the dataset's documentation and toolkit (C. Yeshwanth et al., ICCV 2023).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jaxtyping import Float

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.rooms.cameras import opencv_from_stored
from snd_nerfstudio.scenes.toolkit.fisheye import FisheyeCamera


@dataclass(frozen=True)
class ToolkitFrame:
    """One frame as the files describe it."""

    name: str
    """Of its image file: DSC01234.JPG."""
    mask_name: str
    """Of its anonymisation mask: DSC01234.png."""
    described: dict[str, Any]
    """Its entry in transforms.json."""
    is_test: bool
    """Whether it is kept for evaluating novel views."""

    def camera_to_world(self) -> Float[np.ndarray, "4 4"]:
        """OpenCV pose in the world of the mesh.

        Raises:
            InputError: the stored matrix is no rigid motion.
        """
        try:
            stored = np.array(self.described.get("transform_matrix"), np.float64)
        except (TypeError, ValueError):
            stored = np.zeros(0)
        if stored.shape == (3, 4):
            stored = np.concatenate([stored, [[0.0, 0.0, 0.0, 1.0]]])
        if stored.shape != (4, 4) or not np.isfinite(stored).all():
            raise InputError("its pose is not a 4x4 matrix of finite numbers")
        turn = stored[:3, :3]
        if np.abs(turn @ turn.T - np.eye(3)).max() > 1e-2 or np.linalg.det(turn) < 0:
            raise InputError("its pose is not rigid")
        return opencv_from_stored(stored)


@dataclass(frozen=True)
class ToolkitScene:
    """One scene's files."""

    folder: Path
    """data/<scene>."""

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def transforms(self) -> Path:
        return self.folder / "dslr" / "nerfstudio" / "transforms.json"

    @property
    def mesh(self) -> Path:
        return self.folder / "scans" / "mesh_aligned_0.05.ply"

    @property
    def segments(self) -> Path:
        return self.folder / "scans" / "segments.json"

    @property
    def annotations(self) -> Path:
        return self.folder / "scans" / "segments_anno.json"

    def scans(self) -> tuple[Path, Path, Path]:
        """Mesh, segments and annotations.

        Raises:
            InputError: one of them is missing.
        """
        files = (self.mesh, self.segments, self.annotations)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing; download the scene's scans.")
        return files

    def image(self, frame: ToolkitFrame) -> Path:
        """A frame's fisheye image."""
        return self.folder / "dslr" / "resized_images" / frame.name

    @property
    def masks(self) -> Path:
        """Folder of the anonymisation masks."""
        return self.folder / "dslr" / "resized_anon_masks"

    @property
    def lists(self) -> Path:
        return self.folder / "dslr" / "train_test_lists.json"

    def has_masks(self) -> bool:
        """Whether something may be anonymised: the lists say so or, where they say nothing, there is a folder of masks.

        Raises:
            InputError: train_test_lists.json is there, but is no JSON, or tells of masks that are not there.
        """
        listed = read_object(self.lists).get("has_masks") if self.lists.is_file() else None
        if listed and not self.masks.is_dir():
            raise InputError(
                f"{self.masks} is missing, but {self.lists.name} says that the scene has masks; download them too."
            )
        return self.masks.is_dir() if listed is None else bool(listed)

    def read(self) -> tuple[FisheyeCamera, list[ToolkitFrame]]:
        """The camera and all frames, each once.

        The toolkit's own tools append the test frames to `frames`, so a frame that stands there and in `test_frames`
        (or among the test frames of train_test_lists.json) is one frame, and for testing.

        Raises:
            InputError: a file is missing, no JSON, or without a key that is needed.
        """
        content = read_object(self.transforms)
        camera = _camera(content, self.transforms)
        listed = read_object(self.lists).get("test", []) if self.lists.is_file() else []
        tests = {Path(str(name)).name for name in listed}
        described: dict[str, dict[str, Any]] = {}
        for key in ("frames", "test_frames"):
            for entry in content.get(key) or []:
                if not isinstance(entry, dict) or "file_path" not in entry:
                    raise InputError(f"{self.transforms}: an entry of `{key}` has no `file_path`.")
                name = Path(entry["file_path"]).name
                described.setdefault(name, entry)
                if key == "test_frames":
                    tests.add(name)
        if not described:
            raise InputError(f"{self.transforms} has no frames.")
        frames = [
            ToolkitFrame(name, Path(entry.get("mask_path") or f"{Path(name).stem}.png").name, entry, name in tests)
            for name, entry in sorted(described.items())
        ]
        return camera, frames


def _camera(content: dict[str, Any], file: Path) -> FisheyeCamera:
    if content.get("camera_model") != "OPENCV_FISHEYE":
        raise InputError(f"{file}: `camera_model` is {content.get('camera_model')}, expected OPENCV_FISHEYE.")
    keys = ("fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "k3", "k4")
    try:
        values = {key: float(content[key]) for key in keys}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: `{'`, `'.join(keys)}` must all be there, and be numbers ({error}).") from error
    if not np.isfinite(list(values.values())).all() or min(values[key] for key in ("fl_x", "fl_y", "w", "h")) <= 0:
        raise InputError(f"{file}: the intrinsics are not positive finite numbers.")
    return FisheyeCamera(
        intrinsics=np.array([[values["fl_x"], 0, values["cx"]], [0, values["fl_y"], values["cy"]], [0, 0, 1.0]]),
        distortion=np.array([values[f"k{index}"] for index in (1, 2, 3, 4)]),
        height=round(values["h"]),
        width=round(values["w"]),
    )


def find_scenes(root: Path, wanted: Optional[list[str]] = None) -> list[ToolkitScene]:
    """The scenes below `<root>/data` that have DSLR frames.

    Args:
        root: folder that holds `data/`.
        wanted: names of scenes; None for all.

    Raises:
        InputError: there is no such folder or scene.
    """
    folder = root / "data"
    if not folder.is_dir():
        raise InputError(
            f"--data {root}: no folder `data` in it. Give the folder of the ScanNet++ download that holds "
            "data/<scene>/dslr and splits/."
        )
    present = sorted(entry.name for entry in folder.iterdir() if (entry / "dslr").is_dir())
    if not present:
        raise InputError(f"--data {root}: no data/<scene>/dslr found; download the DSLR images and the scans.")
    missing = sorted(set(wanted or ()) - set(present))
    if missing:
        raise InputError(
            f"--scenes {missing[0]}: no folder {folder / missing[0] / 'dslr'} ({len(present)} scenes found)."
        )
    return [ToolkitScene(folder / name) for name in present if wanted is None or name in wanted]
