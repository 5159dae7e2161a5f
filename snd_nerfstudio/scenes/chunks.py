"""Chunks of posed video as pixelSplat and MVSplat lay out RealEstate10K and ACID: many scenes in one torch file.

::

    <folder>/000000.torch, 000001.torch, ...    lists of scenes, about 100 MB each
    <folder>/index.json                         {key: name of the chunk}

    scene: "key" str, "url" str, "timestamps" [n] microseconds, "images" n JPEG files as uint8 [bytes],
           "cameras" [n, 18] float32: fx / width, fy / height, cx / width, cy / height, two unused numbers, and the
           first three rows of world-to-camera in OpenCV's axes, row by row

The layout is that of pixelSplat's dataset (github.com/dcharatan/pixelsplat, ``src/dataset/dataset_re10k.py``).

An image in a chunk has a path that leads through it, ``000000.torch/<key>/000012.jpg``, where the number is its place
in the scene's list. Such a path stands wherever that of a file can; one image is read without reading the chunk.
"""

import mmap
import os
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

from snd_nerfstudio.errors import BrokenFileError
from snd_nerfstudio.tensor_files import UNREADABLE, first_line

SUFFIX = ".torch"
CAMERA_NUMBERS = 18
_ENDING = ".jpg"
_ZIP = b"PK\x03\x04"
_CACHED_BYTES = 256 << 20
"""Of chunk indices that are kept: those of some 20 million images."""


@dataclass(frozen=True)
class ChunkIndex:
    """Where the images of a chunk's scenes are; 12 bytes an image."""

    file: Path
    """The chunk."""
    keys: tuple[str, ...]
    """Of its scenes."""
    bounds: Int[np.ndarray, "bounds"]
    """First image of each scene among all of the chunk; at the end how many there are."""
    lengths: Int[np.ndarray, "images"]
    """Bytes of each image."""
    offsets: Optional[Int[np.ndarray, "images"]]
    """Byte of the chunk with which each image begins; None where torch does not say."""
    contents: Optional[tuple[UInt8[np.ndarray, "_"], ...]] = None
    """The images themselves where there are no offsets."""
    held: int = 0
    """Bytes of memory that ``contents`` takes; 0 where it is mapped."""

    @cached_property
    def places(self) -> dict[str, int]:
        """Number of the scene of each key."""
        return {key: place for place, key in enumerate(self.keys)}

    @property
    def memory(self) -> int:
        """About how many bytes this takes."""
        offsets = 0 if self.offsets is None else self.offsets.nbytes
        return self.lengths.nbytes + offsets + self.bounds.nbytes + 200 * len(self.keys) + self.held

    def frames(self, key: str) -> range:
        """Which of the chunk's images a scene has.

        Raises:
            BrokenFileError: the chunk has no such scene.
        """
        if key not in self.places:
            raise BrokenFileError(
                f"{self.file} has no scene {key}: restore the chunk, or start again without the scene."
            )
        place = self.places[key]
        return range(int(self.bounds[place]), int(self.bounds[place + 1]))

    def read(self, frame: int) -> bytes:
        """One image of the chunk: one seek and one read of its bytes, no others.

        Raises:
            BrokenFileError: the chunk ends before.
            OSError: it cannot be read.
        """
        if self.offsets is None:
            assert self.contents is not None
            return self.contents[frame].tobytes()
        length = int(self.lengths[frame])
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(int(self.offsets[frame]))
            content = stream.read(length)
        if len(content) != length:
            raise BrokenFileError(f"{self.file} has become shorter while it was in use: restore it and start again.")
        return content


@dataclass(frozen=True)
class Chunk:
    """What a chunk says of its scenes, and where their images are."""

    index: ChunkIndex
    """Keys of the scenes, and where their images are."""
    timestamps: Int[np.ndarray, "images"]
    """Of each image, microseconds."""
    cameras: Float[np.ndarray, "images 18"]
    """Of each image as the file has them: intrinsics divided by width and height, world-to-camera."""


def frame_name(number: int) -> str:
    """The last part of the path of a scene's image, counted from 0."""
    return f"{number:06d}{_ENDING}"


def is_packed(path: Path) -> bool:
    """Whether a path leads through a chunk: ``<chunk>.torch/<key>/000012.jpg``."""
    chunk = path.parent.parent
    return chunk.suffix == SUFFIX and not chunk.is_dir()


def packed_names(folder: Path) -> frozenset[bytes]:
    """Names of the images of a scene in a chunk.

    Args:
        folder: ``<chunk>.torch/<key>``.

    Returns:
        As in ``os.listdir``; none where there is no such chunk or scene.

    Raises:
        BrokenFileError: the chunk is damaged.
    """
    try:
        index = chunk_index(folder.parent)
    except FileNotFoundError:
        return frozenset()
    if folder.name not in index.places:
        return frozenset()
    return frozenset(os.fsencode(frame_name(number)) for number in range(len(index.frames(folder.name))))


def read_packed(path: Path) -> bytes:
    """An image in a chunk.

    Args:
        path: ``<chunk>.torch/<key>/000012.jpg``.

    Raises:
        BrokenFileError: the chunk is damaged, or has no such scene or image.
        FileNotFoundError: there is no such chunk.
    """
    index = chunk_index(path.parent.parent)
    frames = index.frames(path.parent.name)
    number = int(path.stem) if path.stem.isdecimal() else len(frames)
    if number >= len(frames) or path.name != frame_name(number):
        raise BrokenFileError(f"{index.file}: scene {path.parent.name} has {len(frames)} images, and no {path.name}.")
    return index.read(frames[number])


class _Indices:
    """The indices used last, for all threads of a process."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int, int], ChunkIndex] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._reading = threading.Lock()

    def get(self, file: Path) -> ChunkIndex:
        identity = _identity(file)
        found = self._found(identity)
        if found is None:
            with self._reading:  # unpickling is Python: two threads at it are no quicker than one
                found = self._found(identity) or read_chunk(file).index
        return found

    def put(self, identity: tuple[str, int, int], index: ChunkIndex) -> None:
        with self._lock:
            replaced = self._kept.pop(identity, None)
            self._bytes += index.memory - (0 if replaced is None else replaced.memory)
            self._kept[identity] = index
            while self._bytes > _CACHED_BYTES and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._bytes -= oldest.memory

    def _found(self, identity: tuple[str, int, int]) -> Optional[ChunkIndex]:
        with self._lock:
            if identity in self._kept:
                self._kept.move_to_end(identity)
            return self._kept.get(identity)


_indices = _Indices()


def _identity(file: Path) -> tuple[str, int, int]:
    state = file.stat()
    return os.path.abspath(file), state.st_mtime_ns, state.st_size


def chunk_index(file: Path) -> ChunkIndex:
    """Where a chunk's images are; kept in memory until the file changes or many others have been asked for.

    Raises:
        BrokenFileError: the chunk is damaged, or is none.
        FileNotFoundError: there is no such file.
    """
    return _indices.get(file)


def read_chunk(file: Path) -> Chunk:
    """Reads all of a chunk but its images; whatever is no tensor or plain value is refused, not executed.

    Raises:
        BrokenFileError: the chunk is damaged, or is none.
        FileNotFoundError: there is no such file.
    """
    identity = _identity(file)
    zipped = _is_zip(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except UNREADABLE as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is not None:
            raise BrokenFileError(
                f"{file} holds more than tensors and plain values ({refused[1]}), which is not opened, for it could "
                "run code: write the chunk again without it."
            ) from error
        raise BrokenFileError(
            f"{file} is damaged, or is no chunk of scenes ({first_line(error)}): restore it, or remove it together "
            "with its scenes in index.json."
        ) from error
    if not isinstance(content, (list, tuple)):
        raise BrokenFileError(f"{file} holds {type(content).__name__}; expected a list of scenes.")
    keys = [_check_scene(file, place, scene) for place, scene in enumerate(content)]
    repeated = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    if repeated is not None:
        raise BrokenFileError(f"{file} holds scene {repeated} twice: write the chunk again with one of them.")
    images = [image for scene in content for image in scene["images"]]
    offsets = _offsets(file, content, images) if zipped else None
    index = ChunkIndex(
        file=file,
        keys=tuple(keys),
        bounds=np.cumsum([0, *(len(scene["images"]) for scene in content)]),
        lengths=np.array([len(image) for image in images], dtype=np.int32),
        offsets=offsets,
        contents=tuple(image.numpy() for image in images) if offsets is None else None,
        held=0 if zipped else sum(len(image) for image in images),
    )
    _indices.put(identity, index)
    return Chunk(
        index=index,
        timestamps=_joined([scene["timestamps"].to(torch.int64) for scene in content], (), np.int64),
        cameras=_joined([scene["cameras"].to(torch.float32) for scene in content], (CAMERA_NUMBERS,), np.float32),
    )


def _is_zip(file: Path) -> bool:
    """Whether torch wrote the file in its present format, which can be mapped; the one before 1.6 cannot."""
    try:
        with file.open("rb") as stream:
            return stream.read(len(_ZIP)) == _ZIP
    except FileNotFoundError:
        raise
    except OSError as error:
        raise BrokenFileError(f"{file} cannot be read ({error.strerror}).") from error


def _joined(tensors: Sequence[torch.Tensor], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """One array of its own: views would keep the whole file mapped."""
    return np.concatenate([np.zeros((0, *shape), dtype), *(tensor.numpy() for tensor in tensors)])


def _check_scene(file: Path, place: int, scene: Any) -> str:
    """A scene's key, if the scene is what it should be."""
    if not isinstance(scene, dict):
        raise BrokenFileError(f"{file}: scene {place} of the list is {type(scene).__name__}; expected a dict.")
    key = scene.get("key")
    if not isinstance(key, str) or key in ("", ".", "..") or "/" in key or "\0" in key:
        raise BrokenFileError(f"{file}: scene {place} of the list has key {key!r}; expected text without slashes.")
    for name in ("timestamps", "cameras", "images"):
        if name not in scene:
            raise BrokenFileError(f"{file}: scene {key} has no `{name}`: write the chunk again with it.")
    images, times, cameras = scene["images"], scene["timestamps"], scene["cameras"]
    if not isinstance(images, (list, tuple)):
        raise BrokenFileError(
            f"{file}: `images` of scene {key} is {type(images).__name__}; expected a list of tensors."
        )
    for number, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8 or image.ndim != 1:
            raise BrokenFileError(f"{file}: image {number} of scene {key} is no tensor uint8 [bytes] of a JPEG file.")
        if len(image) == 0:
            raise BrokenFileError(f"{file}: image {number} of scene {key} is empty: write the chunk again without it.")
    count = len(images)
    if not isinstance(times, torch.Tensor) or times.shape != (count,):
        raise BrokenFileError(f"{file}: `timestamps` of scene {key} must be a tensor of one number for {count} images.")
    if not isinstance(cameras, torch.Tensor) or cameras.shape != (count, CAMERA_NUMBERS):
        raise BrokenFileError(
            f"{file}: `cameras` of scene {key} must be a tensor [{count}, 18] for its {count} images."
        )
    return key


def _offsets(file: Path, content: Any, images: Sequence[torch.Tensor]) -> Optional[Int[np.ndarray, "images"]]:
    """With which byte of a mapped file each image begins, or None if that cannot be told.

    Tensors point into the mapped file, so their addresses are those bytes plus the address of the whole, which torch
    keeps to itself: it is a whole number of pages, and the tensor that comes first lies where the zip archive has a
    record. Some images are then compared with the file.
    """
    if not images or not all(image.is_contiguous() for image in images):
        return None
    addresses = np.array([image.data_ptr() for image in images], dtype=np.int64)
    others = [scene[name].data_ptr() for scene in content for name in ("timestamps", "cameras") if len(scene[name])]
    lowest = min(int(addresses.min()), *others)
    tried = sorted({0, len(images) // 2, len(images) - 1})
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            records = sorted(record.header_offset for record in archive.infolist() if "/data/" in record.filename)
            for header in records:
                stream.seek(header)
                local = stream.read(30)  # of a zip archive: the header's size, less its name and padding
                start = header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
                offsets = addresses - (lowest - start)
                aligned = (lowest - start) % mmap.ALLOCATIONGRANULARITY == 0
                if aligned and all(_lies_at(stream, int(offsets[one]), images[one]) for one in tried):
                    return offsets
    except (OSError, ValueError, zipfile.BadZipFile):
        return None
    return None


def _lies_at(stream: Any, offset: int, image: torch.Tensor) -> bool:
    if offset < 0:
        return False
    stream.seek(offset)
    return stream.read(len(image)) == image.numpy().tobytes()
