"""Hashes by which a dataset that has changed is noticed."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np

from snd_nerfstudio.checksums import sha256_of
from snd_nerfstudio.errors import BrokenFileError
from snd_nerfstudio.scenes.file_list import FileList
from snd_nerfstudio.scenes.frames import Frames
from snd_nerfstudio.scenes.image_files import open_bytes

FILES_HASHED = 64
"""Files of each kind, evenly spread, of which the content counts; of the others the name does."""


def dataset_fingerprint(frames: Frames, with_masks: bool, with_depth: bool) -> dict[str, str]:
    """Hashes of a dataset's cameras, and of the names of its files and the content of some of them.

    They do not depend on where the dataset lies, nor on what its folders are called, so that a run can go on elsewhere.
    A file that cannot be read counts as such.

    Args:
        frames: the dataset.
        with_masks: whether its instance masks are used.
        with_depth: whether its depth maps are used.

    Returns:
        ``cameras``, ``images``, and where they are used ``masks`` and ``depth``: "none" where there are none of them.
    """
    hashes = {"cameras": _of_cameras(frames), "images": _of_files(frames.image_files)}
    if with_masks:
        hashes["masks"] = "none" if frames.mask_files is None else _of_files(frames.mask_files)
    if with_depth:
        hashes["depth"] = "none" if frames.depth_files is None else _of_files(frames.depth_files)
    return hashes


def _of_cameras(frames: Frames) -> str:
    digest = hashlib.sha256()
    for name in ("camera_to_worlds", "intrinsics", "sizes", "scene_index", "frame_order", "distortion", "depth_scale"):
        values = getattr(frames, name)
        digest.update(f"{name};".encode())
        if values is not None:
            digest.update(np.ascontiguousarray(values, dtype=np.float64).tobytes())
    if len(frames.scene_names) > 1:  # a single scene is called after its folder
        digest.update("\n".join(frames.scene_names).encode())
    return digest.hexdigest()


def _of_files(files: Sequence[Optional[Path]]) -> str:
    digest = hashlib.sha256()
    listed = files if isinstance(files, FileList) else FileList.of(files)
    for text in listed.texts():
        digest.update(b"\0" if text is None else os.fsencode(os.path.basename(text)) + b"\n")
    for index in np.unique(np.linspace(0, len(files) - 1, FILES_HASHED).round().astype(int)).tolist():
        digest.update(_of_content(files[index]).encode())
    return digest.hexdigest()


def _of_content(file: Optional[Path]) -> str:
    if file is None:
        return "none"
    try:
        with open_bytes(file) as stream:
            return sha256_of(stream)
    except (OSError, BrokenFileError):
        return "unreadable"
