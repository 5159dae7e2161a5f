"""The mask of a frame: from the cache, or made now and kept."""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

from snd_nerfstudio.checksums import sha256_of
from snd_nerfstudio.errors import BrokenFileError
from snd_nerfstudio.scenes.image_files import open_bytes
from snd_nerfstudio.scenes.masks.cache import MaskCache
from snd_nerfstudio.scenes.masks.sam import SamSegmenter, SamSettings
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSegmenter, SuperpixelSettings

MaskSource = Literal["stored", "sam", "superpixel", "none"]
"""Where instance masks come from."""
CACHE_NAME = ".snd_masks"
"""Folder of masks that lies beside the data unless another one is named."""
STRIPES = 64
"""Locks, of which every frame's mask has one, so that two threads do not make the same mask."""


@dataclass(frozen=True)
class MaskOrigin:
    """What a frame's mask is made of, without decoding it."""

    image_file: Path
    """Its bytes count, not its name."""
    size: tuple[int, int]
    """Height and width at which the mask is made."""
    depth_file: Path | None
    """None where depth is not looked at, or the frame has none."""
    camera: tuple[float, ...]
    """Intrinsics, distortion and the depth's unit as far as the mask depends on them."""
    image_hash: str | None = None
    """SHA-256 of the image's file, where it was read already."""


@dataclass(frozen=True)
class FramePixels:
    """A frame as masks are made of it: undistorted and resized to the size it is trained at."""

    image: UInt8[np.ndarray, "H W 3"]
    """sRGB."""
    intrinsics: Float[np.ndarray, "3 3"]
    """Of ``image``."""
    depth: Float[np.ndarray, "H W"] | None
    """World units along the optical axis, 0 = no value."""


class MaskMaker:
    """Masks by their frame's content, made on first use; several threads may ask at once.

    Args:
        segmenter: makes a mask of pixels: a `SuperpixelSegmenter` or a `sam.SamSegmenter`.
        folder: where masks are kept.
        log: for what the user should know.

    Raises:
        InputError: the folder cannot be written to.
    """

    def __init__(self, segmenter: Any, folder: Path, log: Callable[[str], Any] = print) -> None:
        self.segmenter = segmenter
        self.cache = MaskCache(folder, segmenter.name, segmenter.description, log)
        self.ahead = False
        """Whether masks are made ahead of training, which slow ones should be."""
        self._log = log
        self._told = False
        self._locks = [threading.Lock() for _ in range(STRIPES)]

    @property
    def uses_depth(self) -> bool:
        """Whether masks follow a frame's depth map where it has one."""
        return self.segmenter.uses_depth

    def key(self, origin: MaskOrigin) -> str:
        """Name of a frame's mask in the cache.

        Raises:
            BrokenFileError: a file cannot be read.
        """
        depth = None if origin.depth_file is None else _hash(origin.depth_file, "Depth map")
        image = origin.image_hash or _hash(origin.image_file, "Image")
        described = [self.cache.settings_key, image, origin.size, depth, origin.camera]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def mask(self, origin: MaskOrigin, pixels: Callable[[], FramePixels]) -> Int[np.ndarray, "H W"]:
        """A frame's mask.

        Args:
            origin: of the frame.
            pixels: reads them; called only where the mask is not in the cache.

        Returns:
            Ids from 1 on at the origin's size.
        """
        key = self.key(origin)
        with self._locks[int(key[:8], 16) % STRIPES]:
            found = self.cache.get(key)
            if found is not None and found.shape == tuple(origin.size):
                return found
            if self.segmenter.slow and not self.ahead and not self._told:
                self._told = True
                self._log(
                    "[yellow]Masks are made with SAM while they are asked for, which is slow: `snd-data masks --masks "
                    "sam` makes them ahead of training, with the same flags."
                )
            content = pixels()
            made = self.segmenter.segment(content.image, content.depth, content.intrinsics)
            self.cache.put(key, made)
        return made


def _hash(file: Path, kind: str) -> str:
    try:
        with open_bytes(file) as stream:
            return sha256_of(stream)
    except OSError as error:
        reason = error.strerror or str(error)
        raise BrokenFileError(
            f"{kind} {file} cannot be read ({reason}): restore it or remove the frame.", file
        ) from error


def mask_folder(cache: Path | None, data: Path) -> Path:
    """Where masks are kept.

    Args:
        cache: what the user named, or None.
        data: the dataset: a folder, or a file in it.
    """
    if cache is not None:
        return cache
    return (data if data.is_dir() else data.parent) / CACHE_NAME


def build_mask_maker(
    masks: MaskSource,
    superpixels: SuperpixelSettings,
    sam: SamSettings,
    folder: Path,
    log: Callable[[str], Any] = print,
) -> MaskMaker | None:
    """What makes the masks that a command asks for; None where they are stored, or there are none.

    Args:
        masks: which kind.
        superpixels: settings of ``superpixel``.
        sam: settings of ``sam``.
        folder: where masks are kept.
        log: for what the user should know.

    Raises:
        InputError: a setting makes no sense, the folder cannot be written to, or SAM's weights are not to be had.
    """
    if masks == "superpixel":
        return MaskMaker(SuperpixelSegmenter(superpixels), folder, log)
    if masks == "sam":
        return MaskMaker(SamSegmenter(sam, log), folder, log)
    return None
