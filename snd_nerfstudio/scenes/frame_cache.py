"""Frames on disk as they are trained on: decoded, undistorted, resized, named after a hash of what they depend on.

A file is an ordinary ``.npy`` of bytes (RGB, height, width), which ``np.load`` opens, followed by its key (32 bytes)
and the CRC-32 of all before it (4 bytes, little endian). Nothing is compressed: reading a PNG or a lossless WebP
takes longer than decoding a JPEG of the same size, and reading from this cache has to take next to nothing.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from snd_nerfstudio.cache_files import CacheFolder, CacheMessages, CacheStatistics

FORMAT = 1
"""To be raised whenever the layout of files or the meaning of keys changes."""
DECODING = "RGB, JPEGs at the smallest size that is enough; distortion removed, bilinear; resized, bicubic, antialiased"
"""How pixels come from a file. To be changed with it: frames that were made in another way then have other names."""
FLAG = "--pipeline.datamanager.frame-cache"
KEY_BYTES, CHECKSUM_BYTES = 32, 4
MESSAGES = CacheMessages(
    refused=f"{FLAG} {{root}} cannot be written to ({{error}}): give another folder.",
    read_only=f"{FLAG} {{folder}} cannot be written to ({{error}}): its frames are used, others are decoded at every "
    "use.",
    unreadable="The cached frame {path} cannot be read ({error}); it is made anew.",
    damaged="The cached frame {path} is damaged ({error}); it is made anew.",
    unwritable=f"{FLAG} {{folder}} cannot be written to any more ({{error}}); {{free:.3g}} GB are free on its disk. "
    "What is in it is used, other frames are decoded at every use.",
    full=f"The frame cache {{folder}} is full: {{size:.3g}} GB of {{limit:.3g}} GB ({FLAG}-limit); {{free:.3g}} GB "
    "are free on its disk. What is in it is used, other frames are decoded at every use.",
)


class FrameCache:
    """A folder of frames; several threads and processes may use it at once.

    A folder that cannot be written to is read all the same if there is anything in it.

    Args:
        folder: made if it is missing.
        limit: bytes that it may hold; what comes later is not written.
        log: for damaged frames, and where nothing can be written.

    Raises:
        InputError: the folder cannot be made or written to, and there is nothing in it.
    """

    def __init__(self, folder: Path, limit: float, log: Callable[[str], Any] = print) -> None:
        self.statistics = CacheStatistics()
        self._files = CacheFolder(folder, ".npy", MESSAGES, self.statistics, limit, log=log)
        self.folder, self.limit = self._files.folder, limit

    @staticmethod
    def key(image_sha256: str, size: tuple[int, int], camera: tuple[float, ...]) -> str:
        """Name of a frame in a cache.

        Args:
            image_sha256: hash of the image file.
            size: height and width that it is resized to.
            camera: the size that the image is calibrated for; with distortion, intrinsics and distortion too.
        """
        numbers = [float(value) for value in camera]
        described = json.dumps([FORMAT, DECODING, image_sha256, [int(side) for side in size], numbers])
        return hashlib.sha256(described.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes in the folder, as far as this process knows."""
        return self._files.size

    def path(self, key: str) -> Path:
        """Where a frame is, or would be."""
        return self._files.path(key)

    def get(self, key: str, size: tuple[int, int]) -> UInt8[np.ndarray, "3 h w"] | None:
        """The frame in sRGB, or None if there is none that can be read; a damaged file is deleted and reported.

        Args:
            key: see `key`.
            size: height and width that the key was made with.
        """
        return self._files.get(key, lambda contents: decode(contents, key, size))

    def put(self, key: str, image: UInt8[np.ndarray, "3 h w"]) -> bool:
        """Write a frame; readers see all of it or nothing. Returns False if the cache is full or out of disk."""
        return self._files.write(key, encode(image, key))


def encode(image: UInt8[np.ndarray, "3 h w"], key: str) -> bytes:
    """The contents of a frame's file."""
    stream = io.BytesIO()
    np.save(stream, image, allow_pickle=False)
    stream.write(bytes.fromhex(key))
    stream.write(zlib.crc32(stream.getbuffer()).to_bytes(CHECKSUM_BYTES, "little"))
    return stream.getvalue()


def decode(contents: bytes, key: str, size: tuple[int, int]) -> UInt8[np.ndarray, "3 h w"]:
    """The frame of a file's contents; it may be written to.

    Raises:
        ValueError: they are damaged, or of another frame.
    """
    checked = memoryview(contents)[:-CHECKSUM_BYTES]
    if zlib.crc32(checked).to_bytes(CHECKSUM_BYTES, "little") != contents[-CHECKSUM_BYTES:]:
        raise ValueError("its checksum is wrong")
    if checked[-KEY_BYTES:] != bytes.fromhex(key):
        raise ValueError("the file of another frame")
    image = np.lib.format.read_array(io.BytesIO(contents), allow_pickle=False)
    if image.dtype != np.uint8 or image.shape != (3, *size):
        raise ValueError(f"{image.dtype} of shape {image.shape} instead of bytes of shape {(3, *size)}")
    return image
