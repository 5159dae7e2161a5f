"""Instance masks on disk, named after a hash of all that they depend on, so that none can be out of date.

``<folder>/<kind>-<settings>/<first two digits>/<key>.png``: 16-bit ids, with the key and a checksum in the file's text
chunks. ``settings.json`` beside them says in words what made them.
"""

import hashlib
import io
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from snd_nerfstudio.errors import InputError

FORMAT = 1
"""To be raised whenever the layout of files or the meaning of keys changes."""
FLAG = "--pipeline.datamanager.mask-cache"
MOST_IDS = 65_535
ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a temporary file is taken to be of a process that was killed."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Names of files that are being written."""


@dataclass
class MaskStatistics:
    """What happened since the cache was opened, in this process."""

    found: int = 0
    missing: int = 0
    damaged: int = 0
    written: int = 0


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
        self.folder = Path(folder) / f"{kind}-{self.settings_key[:12]}"
        self.statistics = MaskStatistics()
        self._log = log
        self._lock = threading.Lock()
        self._writable = True
        existed = self.folder.is_dir()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._replace(self.folder / "settings.json", described.encode())
            self._remove_abandoned()
        except OSError as error:
            if not existed:
                raise InputError(
                    f"{folder} cannot be written to ({error}), and masks are kept there: give another folder with "
                    f"{FLAG}."
                ) from error
            self._writable = False
            log(f"{self.folder} cannot be written to ({error}): its masks are used, others are made at every use.")

    def path(self, key: str) -> Path:
        """Where a mask is, or would be."""
        return self.folder / key[:2] / f"{key}.png"

    def get(self, key: str) -> Int[np.ndarray, "H W"] | None:
        """The mask, or None if there is none that can be read; a damaged file is reported."""
        path = self.path(key)
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            self._count("missing")
            return None
        except OSError as error:
            self._count("missing")
            self._log(f"The mask {path} cannot be read ({error}); it is made anew.")
            return None
        try:
            mask = decode(contents, key)
        except ValueError as error:
            self._count("damaged")
            self._log(f"The mask {path} is damaged ({error}); it is made anew.")
            return None
        self._count("found")
        return mask

    def put(self, key: str, mask: Int[np.ndarray, "H W"]) -> bool:
        """Write a mask; readers see all of it or nothing. Returns False if the disk does not take it."""
        if not self._writable:
            return False
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            self._replace(path, encode(mask, key))
        except OSError as error:
            self._writable = False
            self._log(f"{self.folder} cannot be written to any more ({error}): masks are made at every use.")
            return False
        self._count("written")
        return True

    def _replace(self, path: Path, contents: bytes) -> None:
        temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            temporary.write_bytes(contents)
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _count(self, name: str) -> None:
        with self._lock:
            setattr(self.statistics, name, getattr(self.statistics, name) + 1)

    def _remove_abandoned(self) -> None:
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("??/.*.tmp")]:
            with suppress(OSError):  # another process may be faster
                if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()


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
