"""Small chunks in pixelSplat's layout, written without the package."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

CAMERA = [0.9, 1.6, 0.5, 0.45, 0.0, 0.0, 1, 0, 0, 0.1, 0, 1, 0, 0.2, 0, 0, 1, 0.3]
"""Looks along z from (-0.1, -0.2, -0.3)."""


def jpeg(colour: int, width: int = 24, height: int = 16) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (colour % 256, 80, 120)).save(stream, "JPEG")
    return stream.getvalue()


def packed(images: list[bytes]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.frombuffer(image, np.uint8).copy()) for image in images]


def scene(key: str, count: int = 4, **changes: Any) -> dict[str, Any]:
    """A scene whose frames have different colours; the camera moves along x."""
    cameras = torch.tensor(CAMERA).repeat(count, 1)
    cameras[:, 9] += 0.05 * torch.arange(count)
    images = packed([jpeg(10 * number + 7 * len(key) + ord(key[-1])) for number in range(count)])
    return {
        "url": "https://example.org/watch",
        "timestamps": torch.arange(count) * 33_333,
        "cameras": cameras,
        "images": images,
        "key": key,
        **changes,
    }


def write_chunks(folder: Path, *chunks: list[dict[str, Any]], index: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    listed = {}
    for number, scenes in enumerate(chunks):
        torch.save(scenes, folder / f"{number:06d}.torch")
        listed.update({one["key"]: f"{number:06d}.torch" for one in scenes})
    if index:
        (folder / "index.json").write_text(json.dumps(listed))
    return folder
