"""A room as the ScanNet++ toolkit has it: fisheye frames, and a mesh whose vertices are annotated.

dslr/resized_images/DSC00001.JPG         RGB of a fisheye camera
dslr/resized_anon_masks/DSC00001.png     8 bit, 0 where the image is anonymised (a grey disc in every tenth frame)
dslr/nerfstudio/transforms.json          OPENCV_FISHEYE, training frames and test frames
dslr/train_test_lists.json               the last eighth of the frames is for testing
scans/mesh_aligned_0.05.ply              the mesh, metres, z up
scans/segments.json                      the segment of each vertex
scans/segments_anno.json                 the segments of each instance
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from snd_nerfstudio.scenes.rooms.cameras import pinhole, stored_from_opencv
from snd_nerfstudio.scenes.rooms.layout import Room
from snd_nerfstudio.scenes.rooms.rendering import render_colours
from snd_nerfstudio.scenes.toolkit.fisheye import FisheyeCamera, distorted

FOLDERS = ("dslr/resized_images", "dslr/resized_anon_masks", "dslr/nerfstudio", "scans")
DISTORTION = np.array([-0.03, 0.012, -0.008, 0.002])
"""k1 to k4, of the size of those of ScanNet++'s lens."""
ANONYMISED_EVERY = 10
GREY = 128


def fisheye(height: int, width: int) -> FisheyeCamera:
    """The camera whose undistorted images have the intrinsics of `pinhole` at every size.

    Undistortion keeps the middle of the long edges where it is: there, half a short side `s` away from the centre,
    the pinhole with focal length `f` sees the ray at the angle `atan(s / f)`. The fisheye has to put it at `s` too.
    """
    intrinsics = pinhole(height, width)
    half = 0.5 * min(height, width)
    angle = np.arctan([half / intrinsics[0, 0]])
    intrinsics[[0, 1], [0, 1]] = half / distorted(angle, DISTORTION)
    return FisheyeCamera(intrinsics, DISTORTION, height, width)


def fisheye_rays(
    camera: FisheyeCamera, camera_to_world: Float[np.ndarray, "4 4"], samples: int = 1
) -> Float[np.ndarray, "r 6"]:
    """Rays through a regular grid of points in every pixel of a fisheye image, like `pixel_rays` for pinholes."""
    x = (np.arange(camera.width * samples) + 0.5) / samples
    y = (np.arange(camera.height * samples) + 0.5) / samples
    pixels = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    rays = np.empty((len(pixels), 6), np.float32)
    rays[:, :3] = camera_to_world[:3, 3]
    rays[:, 3:] = camera.directions(pixels) @ camera_to_world[:3, :3].T
    return rays


def anonymised(camera: FisheyeCamera, frame: int) -> Bool[np.ndarray, "h w"]:
    """Pixels of a frame that are made unrecognisable: a disc in every tenth frame."""
    if frame % ANONYMISED_EVERY != ANONYMISED_EVERY - 1:
        return np.zeros((camera.height, camera.width), bool)
    row, column = np.mgrid[: camera.height, : camera.width]
    return np.hypot(row - 0.6 * camera.height, column - 0.4 * camera.width) < 0.12 * camera.height


def write_frame(folder: Path, name: str, room: Room, frame: int, camera: FisheyeCamera) -> None:
    """Renders and writes one frame's image and anonymisation mask."""
    samples = 2
    rays = fisheye_rays(camera, room.camera_to_worlds[frame], samples)
    image = render_colours(room, rays, camera.height, camera.width, samples, camera.intrinsics[0, 0])
    hidden = anonymised(camera, frame)
    image[hidden] = GREY
    mask = np.where(hidden, 0, 255).astype(np.uint8)
    Image.fromarray(image).save(folder / "dslr/resized_images" / f"{name}.JPG", quality=95, subsampling=0)
    Image.fromarray(mask).save(folder / "dslr/resized_anon_masks" / f"{name}.png")


def write_annotations(folder: Path, room: Room) -> None:
    """Writes `segments.json` and `segments_anno.json`: each instance has a segment for each of its textures."""
    vertex_face = np.zeros(len(room.vertices), np.int64)
    vertex_face[room.faces] = np.arange(len(room.faces))[:, None]
    parts = np.stack([room.face_instance, room.face_texture], -1)[vertex_face]
    pairs, segment = np.unique(parts, axis=0, return_inverse=True)
    # numbers with gaps and in no order, as real ones are
    numbers = 7 * (len(pairs) - np.arange(len(pairs))) + 3
    groups = []
    for instance, label in room.instance_labels.items():
        corners = room.vertices[room.faces[room.face_instance == instance]].reshape(-1, 3)
        groups.append(
            {
                "id": instance,
                "objectId": instance,
                "label": label,
                "segments": numbers[pairs[:, 0] == instance].tolist(),
                "obb": {
                    "centroid": (0.5 * (corners.min(0) + corners.max(0))).tolist(),
                    "axesLengths": (corners.max(0) - corners.min(0)).tolist(),
                    "normalizedAxes": np.eye(3).flatten().tolist(),
                },
            }
        )
    segments = {"sceneId": folder.name, "segIndices": numbers[segment.reshape(-1)].tolist()}
    (folder / "scans/segments.json").write_text(json.dumps(segments))
    (folder / "scans/segments_anno.json").write_text(
        json.dumps({"sceneId": folder.name, "segGroups": groups}, indent=1)
    )


def write_cameras(folder: Path, names: list[str], room: Room, camera: FisheyeCamera) -> None:
    """Writes `transforms.json` and `train_test_lists.json`."""
    frames: list[dict[str, Any]] = [
        {
            "file_path": f"{name}.JPG",
            "mask_path": f"{name}.png",
            "transform_matrix": stored_from_opencv(pose).tolist(),
            "is_bad": False,
        }
        for name, pose in zip(names, room.camera_to_worlds, strict=True)
    ]
    train = len(frames) - len(frames) // 8
    content = {
        "fl_x": float(camera.intrinsics[0, 0]),
        "fl_y": float(camera.intrinsics[1, 1]),
        "cx": float(camera.intrinsics[0, 2]),
        "cy": float(camera.intrinsics[1, 2]),
        "w": camera.width,
        "h": camera.height,
        **{f"k{index + 1}": float(k) for index, k in enumerate(camera.distortion)},
        "camera_model": "OPENCV_FISHEYE",
        "frames": frames[:train],
        "test_frames": frames[train:],
    }
    images = [frame["file_path"] for frame in frames]
    lists = {"train": images[:train], "test": images[train:], "has_masks": True}
    (folder / "dslr/nerfstudio/transforms.json").write_text(json.dumps(content, indent=1))
    (folder / "dslr/train_test_lists.json").write_text(json.dumps(lists, indent=1))
