"""A hash by which a dataset that has changed is noticed."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Optional

import numpy as np

from snd_nerfstudio.checksums import sha256_of
from snd_nerfstudio.scenes.file_list import FileList
from snd_nerfstudio.scenes.frames import Frames
from snd_nerfstudio.scenes.image_files import open_bytes

FILES_HASHED = 64
"""Files of each kind, evenly spread, of which the content counts; of the others name and place do."""


def dataset_fingerprint(frames: Frames, root: Path) -> str:
    """Hash of all frames' names, cameras and order, and of the content of some of their files.

    It does not depend on where the dataset lies, so that a run can go on elsewhere.

    Args:
        frames: the dataset.
        root: its folder; file names count as seen from there.

    Raises:
        OSError: a file that is there cannot be read.
        BrokenFileError: a chunk of images is damaged.
    """
    digest = hashlib.sha256()
    for name in ("camera_to_worlds", "intrinsics", "sizes", "scene_index", "frame_order", "distortion", "depth_scale"):
        values = getattr(frames, name)
        digest.update(f"{name};".encode())
        if values is not None:
            digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
    digest.update("\n".join(frames.scene_names).encode())
    base = os.path.join(root, "")
    for kind in ("image_files", "mask_files", "depth_files"):
        files = getattr(frames, kind)
        digest.update(f"{kind};".encode())
        if files is None:
            continue
        listed = files if isinstance(files, FileList) else FileList.of(files)
        for text in listed.texts():
            digest.update(_name(text, base))
        for index in np.unique(np.linspace(0, len(files) - 1, FILES_HASHED).round().astype(int)).tolist():
            file = files[index]
            with suppress(FileNotFoundError):
                if file is not None:
                    with open_bytes(file) as stream:
                        digest.update(sha256_of(stream).encode())
    return digest.hexdigest()


def _name(text: Optional[str], base: str) -> bytes:
    if text is None:
        return b"\0"
    return os.fsencode(text[len(base) :] if text.startswith(base) else os.path.basename(text)) + b"\n"
