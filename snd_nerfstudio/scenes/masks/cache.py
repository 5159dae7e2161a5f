"""Instance masks on disk, named after a hash of all that they depend on, so that none can be out of date.

``<folder>/<kind>-<settings>/<first two digits>/<key>.png``: 16-bit ids, with the key and a checksum in the file's text
chunks. ``settings.json`` beside them says in words what made them.
"""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snd_nerfstudio.cache_files import CacheFolder, CacheMessages, FileStatistics

FORMAT = 1
"""To be raised whenever the layout of files or the meaning of keys changes."""
FLAG = "--pipeline.datamanager.mask-cache"
MOST_IDS = 65_535
MESSAGES = CacheMessages(
    refused=f"{{root}} cannot be written to ({{error}}), and masks are kept there: give another folder with {FLAG}.",
    read_only="{folder} cannot be written to ({error}): its masks are used, others are made at every use.",
    unreadable="The mask {path} cannot be read ({error}); it is made anew.",
    damaged="The mask {path} is damaged ({error}); it is made anew.",
    unwritable="{folder} cannot be written to any more ({error}): masks are made at every use.",
)


class MaskCache:
    """A folder of masks that one kind of maker made with one group of settings.

    Several threads and processes may use it at once. A folder that cannot be written to is read all the same if there
    are masks of these settings in it.

    Args:
        folder: of the masks of all kinds; made if it is missing.
        kind: what makes the masks.
        description: all of the maker that decides on a mask; anything that JSON can hold.
        log: for damaged entries, and where nothing can be written.

    Raises:
        InputError: the folder cannot be made or written to, and holds no such masks.
    """

    def __init__(self, folder: Path, kind: str, description: dict[str, Any], log: Callable[[str], Any] = print) -> None:
        described = json.dumps({"format": FORMAT, "kind": kind, **description}, sort_keys=True, indent=1)
        self.settings_key = hashlib.sha256(described.encode()).hexdigest()
        self.statistics = FileStatistics()
        name = f"{kind}-{self.settings_key[:12]}"
        self._files = CacheFolder(folder, ".png", MESSAGES, self.statistics, within=name, settings=described, log=log)
        self.folder = self._files.folder
        self._given_up = not self._files.writable

    def path(self, key: str) -> Path:
        """Where a mask is, or would be."""
        return self._files.path(key)

    def get(self, key: str) -> Int[np.ndarray, "H W"] | None:
        """The mask, or None if there is none that can be read; a damaged file is reported."""
        return self._files.get(key, lambda contents: decode(contents, key))

    def put(self, key: str, mask: Int[np.ndarray, "H W"]) -> bool:
        """Write a mask; readers see all of it or nothing. Returns False if the disk does not take it."""
        if self._given_up:  # encoding for nothing takes time
            return False
        written = self._files.write(key, encode(mask, key))
        self._given_up |= not written
        return written


def encode(mask: Int[np.ndarray, "H W"], key: str) -> bytes:
    """The contents of a mask's file.

    Raises:
        ValueError: an id does not fit into 16 bits.
    """
    if mask.min() < 0 or mask.max() > MOST_IDS:
        raise ValueError(f"ids from {mask.min()} to {mask.max()} do not fit into 16 bits")
    values = mask.astype(np.uint16)
    about = PngInfo()
    about.add_text("key", key)
    about.add_text("checksum", _checksum(values))
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, format="PNG", pnginfo=about)
    return stream.getvalue()


def decode(contents: bytes, key: str) -> Int[np.ndarray, "H W"]:
    """The mask of a file's contents.

    Raises:
        ValueError: they are damaged, or of another mask.
    """
    try:
        with Image.open(io.BytesIO(contents), formats=["PNG"]) as image:
            values = np.asarray(image).astype(np.uint16)
            about = dict(image.text)  # type: ignore
    except Exception as error:  # Pillow raises many kinds on broken files
        raise ValueError(f"not a readable file: {error}") from error
    if about.get("key") != key:
        raise ValueError("the file of another mask")
    if about.get("checksum") != _checksum(values):
        raise ValueError("its checksum is wrong")
    return values.astype(np.int64)


def _checksum(values: np.ndarray) -> str:
    return hashlib.sha256(f"{values.shape} {values.dtype};".encode() + values.tobytes()).hexdigest()
