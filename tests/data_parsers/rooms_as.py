"""Writes the rooms of the tests in other layouts; poses and intrinsics come from the generator's own functions."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from snd_nerfstudio.scenes.rooms.cameras import opencv_from_stored, pinhole

SIZE = (56, 84)


@dataclass(frozen=True)
class RoomFrame:
    """One frame of a room."""

    stem: str
    pose: np.ndarray
    """OpenCV camera-to-world."""
    image: Path
    depth: Path
    mask: Path


def room_frames(rooms: Path, name: str) -> list[RoomFrame]:
    scene = rooms / "scenes" / name
    content = json.loads((scene / "transforms_train.json").read_text())
    return [
        RoomFrame(
            Path(frame["file_path"]).stem,
            opencv_from_stored(np.array(frame["transform_matrix"])),
            scene / "images" / frame["file_path"],
            scene / "depth" / f"{Path(frame['file_path']).stem}.png",
            scene / "instance_segmentation" / f"{frame['file_path']}.png",
        )
        for frame in content["frames"]
    ]


def write_matrix(file: Path, matrix: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(" ".join(f"{value:.9f}" for value in row) for row in matrix) + "\n")


def counted_from_centres(height: int, width: int) -> np.ndarray:
    """ScanNet's 4x4 intrinsics: the middle of the first pixel is at 0."""
    matrix = np.eye(4)
    matrix[:3, :3] = pinhole(height, width)
    matrix[:2, 2] -= 0.5
    return matrix


def write_scannet(frames: list[RoomFrame], folder: Path, step: int = 1, digits: int = 1) -> None:
    """As the SensReader exports it, with half as many rows and columns of depth; number = place times ``step``."""
    for kind in ("color", "depth", "pose", "instance-filt"):
        (folder / kind).mkdir(parents=True)
    for place, frame in enumerate(frames):
        name = str(step * place).zfill(digits)
        Image.open(frame.image).save(folder / f"color/{name}.jpg", quality=95, subsampling=0)
        Image.fromarray(np.asarray(Image.open(frame.depth))[::2, ::2]).save(folder / f"depth/{name}.png")
        shutil.copy(frame.mask, folder / f"instance-filt/{name}.png")
        write_matrix(folder / f"pose/{name}.txt", frame.pose)
    write_matrix(folder / "intrinsic/intrinsic_color.txt", counted_from_centres(*SIZE))
    write_matrix(folder / "intrinsic/intrinsic_depth.txt", counted_from_centres(SIZE[0] // 2, SIZE[1] // 2))


def transforms(frames: list[dict]) -> dict:
    matrix = pinhole(*SIZE)
    return {
        "camera_model": "PINHOLE",
        "fl_x": matrix[0, 0],
        "fl_y": matrix[1, 1],
        "cx": matrix[0, 2],
        "cy": matrix[1, 2],
        "w": SIZE[1],
        "h": SIZE[0],
        "frames": frames,
    }


def opengl(pose: np.ndarray) -> list[list[float]]:
    return (pose @ np.diag([1.0, -1.0, -1.0, 1.0])).tolist()


def write_capture(frames: list[RoomFrame], folder: Path, with_masks: bool = False) -> None:
    """As ns-process-data writes it, with depth."""
    (folder / "images").mkdir(parents=True)
    described = []
    for frame in frames:
        shutil.copy(frame.image, folder / "images")
        described.append({
            "file_path": f"images/{frame.image.name}",
            "depth_file_path": str(frame.depth),
            "transform_matrix": opengl(frame.pose),
            **({"instance_path": str(frame.mask)} if with_masks else {}),
        })  # fmt: skip
    (folder / "transforms.json").write_text(json.dumps(transforms(described)))


def write_video(
    frames: list[RoomFrame], folder: Path, step: int = 1, name: str = "walk.avi", code: str = "FFV1"
) -> None:
    """A video (FFV1 loses nothing) that shows a frame, then ``step - 1`` black ones; poses, depth and masks along."""
    import cv2

    folder.mkdir(parents=True)
    writer = cv2.VideoWriter(str(folder / name), cv2.VideoWriter_fourcc(*code), 30, SIZE[::-1])
    assert writer.isOpened()
    described = []
    for place, frame in enumerate(frames):
        image = np.ascontiguousarray(np.asarray(Image.open(frame.image))[..., ::-1])
        for copy in range(step):
            writer.write(image if copy == 0 else np.zeros_like(image))
        described.append({
            "frame_index": step * place,
            "depth_file_path": str(frame.depth),
            "instance_path": str(frame.mask),
            "transform_matrix": opengl(frame.pose),
        })  # fmt: skip
    writer.release()
    (folder / "transforms.json").write_text(json.dumps(transforms(described)))


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """w x y z of a rotation, by the eigenvector of Bar-Itzhack's symmetric matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = np.array([
        [a - e - i, d + b, g + c, h - f],
        [d + b, e - a - i, h + f, c - g],
        [g + c, h + f, i - a - e, d - b],
        [h - f, c - g, d - b, a + e + i],
    ])  # fmt: skip
    x, y, z, w = np.linalg.eigh(matrix / 3)[1][:, -1]
    return np.array([w, x, y, z])


def write_colmap(frames: list[RoomFrame], folder: Path, model: str = "PINHOLE") -> None:
    """Images and a COLMAP model in text; COLMAP's poses are world-to-camera in OpenCV axes."""
    (folder / "images").mkdir(parents=True)
    sparse = folder / "colmap" / "sparse" / "0"
    sparse.mkdir(parents=True)
    matrix = pinhole(*SIZE)
    numbers = [matrix[0, 0], matrix[1, 1], matrix[0, 2], matrix[1, 2], *([0.0] * 4 if model != "PINHOLE" else [])]
    parameters = " ".join(str(number) for number in numbers)
    (sparse / "cameras.txt").write_text(f"1 {model} {SIZE[1]} {SIZE[0]} {parameters}\n")
    lines = []
    for number, frame in enumerate(frames, 1):
        shutil.copy(frame.image, folder / "images")
        there = np.linalg.inv(frame.pose)
        values = " ".join(f"{value:.12f}" for value in (*quaternion(there[:3, :3]), *there[:3, 3]))
        lines += [f"{number} {values} 1 {frame.image.name}", ""]
    (sparse / "images.txt").write_text("\n".join(lines) + "\n")
    (sparse / "points3D.txt").write_text("1 0.5 0.5 0.5 200 100 50 0.1 1 0\n")
