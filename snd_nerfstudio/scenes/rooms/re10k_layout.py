"""Rooms as pixelSplat and MVSplat lay out RealEstate10K: chunks of several scenes, described in `scenes.chunks`.

train/000000.torch, 000001.torch, ...     the rooms for training
train/index.json                          the chunk of each room
test/...                                  likewise, the rooms for validation
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from snd_nerfstudio.scenes.rooms.cameras import pinhole
from snd_nerfstudio.scenes.rooms.layout import Room

SCENES_PER_CHUNK = 4
FRAMES_PER_SECOND = 30


def jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The bytes of the JPEG file that the other layouts have of an image."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95, subsampling=0)
    return stream.getvalue()


def packed_cameras(room: Room, height: int, width: int) -> Float[np.ndarray, "n 18"]:
    """Intrinsics divided by the image's size, two zeros, and the rows of world-to-camera in OpenCV's axes."""
    matrix = pinhole(height, width)
    intrinsics = [matrix[0, 0] / width, matrix[1, 1] / height, matrix[0, 2] / width, matrix[1, 2] / height]
    rows = np.linalg.inv(room.camera_to_worlds)[:, :3].reshape(-1, 12)
    return np.concatenate([np.tile([*intrinsics, 0.0, 0.0], (len(rows), 1)), rows], axis=1)


def packed_scene(key: str, room: Room, images: Sequence[bytes], height: int, width: int) -> dict[str, Any]:
    """One entry of a chunk's list.

    Args:
        key: name of the room.
        room: with its cameras.
        images: JPEG files, one for each camera.
        height: rows of the images.
        width: columns of the images.
    """
    import torch

    return {
        "url": "",
        "timestamps": torch.arange(len(images)) * 1_000_000 // FRAMES_PER_SECOND,
        "cameras": torch.from_numpy(packed_cameras(room, height, width)).float(),
        "images": [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in images],
        "key": key,
    }


def write_chunk(file: Path, scenes: Sequence[dict[str, Any]]) -> None:
    """Writes a chunk; torch puts the file's name into it, so it has to have its final one, in another folder."""
    import torch

    torch.save(list(scenes), file)
