"""Token operators on disk: geometry that was computed once serves every epoch, every backbone of one grid, every loss.

One file per operator, named after a hash of all that it depends on, so that nothing in a cache can be out of date: with
other frames, cameras, masks, reconstructor weights or settings it is another name. Files are safetensors and hold

* column indices as uint16 (uint32 beyond 65,536 columns) and the number of entries of each row;
* values as uint16 fractions of their row's largest value: as small as float16 and, for what is summed up, finer: every
  entry is off by at most 1/131,070 of the row's largest, where float16 rounds the largest themselves by up to 1/2,048.
"""

import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_operator import SparseRows, TokenOperator

FORMAT = 1
"""To be raised whenever the same inputs give another operator, or the layout of files changes."""
STEPS = 65535
"""Steps of a stored value, from 0 to the largest of its row."""
NARROW = 1 << 16
"""Matrices with more columns than this have wider column indices."""
ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a temporary file is taken to be of a process that was killed."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Names of files that are being written."""
COUNT_EVERY = 256
"""Files written between counts of what other processes wrote to the same folder."""
RECOUNT_AFTER = 10.0
"""Seconds after which a full folder is counted again before anything more is refused."""


def content_digest(triplet: ViewTriplet) -> str:
    """Hash of all of a triplet that its operator depends on: context views, and the target's camera and mask."""
    digest = hashlib.sha256()
    context, target = triplet.context, triplet.target
    parts = {
        "context images": context.images,
        "context poses": context.camera_to_worlds,
        "context intrinsics": context.intrinsics,
        "context masks": context.masks,
        "context depths": context.depths,
        "target pose": target.camera_to_worlds[:1],
        "target intrinsics": target.intrinsics[:1],
        "target mask": None if target.masks is None else target.masks[:1],
    }
    for name, tensor in parts.items():
        digest.update(f"{name} {None if tensor is None else (tuple(tensor.shape), tensor.dtype)};".encode())
        if tensor is not None:
            digest.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))  # type: ignore
    digest.update(f"target size {target.height}x{target.width}".encode())
    return digest.hexdigest()


def operator_key(
    triplet_digest: str,
    reconstructor: str,
    grid: tuple[int, int],
    settings: SupervisionSettings,
    with_black: bool,
) -> str:
    """Name of an operator in a cache.

    Args:
        triplet_digest: see `content_digest`.
        reconstructor: what makes the Gaussians: its kind, a hash of its weights, its settings.
        grid: token rows and columns.
        settings: of the teacher's path; how strongly to blend does not matter.
        with_black: whether black tokens are marked.
    """
    switches = {name: value for name, value in vars(settings).items() if name != "blending"}
    described = json.dumps([FORMAT, triplet_digest, reconstructor, grid, switches, with_black], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def encode(operator: TokenOperator, key: str) -> bytes:
    """The contents of an operator's file.

    Raises:
        ValueError: the operator was built for no blending; a cache serves every blending strength.
    """
    if not operator.blendable:
        raise ValueError("an operator that was built for no blending is not for a cache")
    arrays = {
        "context_shape": np.array(operator.context_shape, np.int64),
        "coverage": operator.coverage.cpu().numpy(),
        "isolated": operator.isolated.cpu().numpy(),
    }
    if operator.black is not None:
        arrays["black"] = operator.black.cpu().numpy()
    for name in ("points", "regions", "shares"):
        rows = getattr(operator, name)
        if rows is not None:
            arrays |= {f"{name}.{part}": array for part, array in _encode_rows(rows).items()}
    arrays = {
        name: np.require(array, requirements="C") for name, array in arrays.items()
    }  # safetensors ignores strides
    return save_safetensors(arrays, metadata={"key": key, "checksum": _checksum(arrays)})


def decode(contents: bytes, key: str) -> TokenOperator:
    """The operator of a file's contents.

    Raises:
        ValueError: they are damaged, or of another operator.
    """
    try:
        metadata = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])["__metadata__"]
        written_key, checksum = metadata["key"], metadata["checksum"]
        arrays = load_safetensors(contents)
    except Exception as error:  # safetensors raises an exception of its own, json and slicing others
        raise ValueError(f"not a readable file ({error})") from error
    if written_key != key:
        raise ValueError("the file of another operator")
    if checksum != _checksum(arrays):
        raise ValueError("its checksum is wrong")
    black = arrays.get("black")
    return TokenOperator(
        points=_decode_rows(arrays, "points"),
        regions=_decode_rows(arrays, "regions") if "regions.counts" in arrays else None,
        shares=_decode_rows(arrays, "shares") if "shares.counts" in arrays else None,
        context_shape=tuple(arrays["context_shape"].tolist()),
        coverage=torch.from_numpy(arrays["coverage"]),
        isolated=torch.from_numpy(arrays["isolated"]),
        black=None if black is None else torch.from_numpy(black),
    )


def _encode_rows(rows: SparseRows) -> dict[str, np.ndarray]:
    starts, values = rows.starts.cpu(), rows.values.cpu().double()
    counts = starts.diff()
    largest = torch.zeros(len(counts), dtype=torch.float64)
    of_entry = torch.repeat_interleave(torch.arange(len(counts)), counts)
    largest.scatter_reduce_(0, of_entry, values, "amax")
    steps = (values / largest.clamp(min=torch.finfo(torch.float32).tiny)[of_entry] * STEPS).round()
    return {
        "counts": counts.numpy().astype(np.uint32),
        "columns": rows.columns.cpu().numpy().astype(np.uint16 if rows.width <= NARROW else np.uint32),
        "values": steps.numpy().astype(np.uint16),
        "largest": largest.float().numpy(),
        "width": np.array(rows.width, np.int64),
    }


def _decode_rows(arrays: Mapping[str, np.ndarray], name: str) -> SparseRows:
    counts = arrays[f"{name}.counts"].astype(np.int64)
    scale = np.repeat(arrays[f"{name}.largest"] / np.float32(STEPS), counts)
    return SparseRows(
        starts=torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])),
        columns=torch.from_numpy(arrays[f"{name}.columns"].astype(np.int32)),
        values=torch.from_numpy(arrays[f"{name}.values"].astype(np.float32) * scale),
        width=int(arrays[f"{name}.width"]),
    )


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape};".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


@dataclass
class CacheStatistics:
    """What happened since the cache was opened, in this process."""

    found: int = 0
    missing: int = 0
    damaged: int = 0
    written: int = 0
    turned_away: int = 0
    """Not written because the cache is full."""


class OperatorCache:
    """A folder of operators; several threads and processes may use it at once.

    Args:
        folder: made if it is missing.
        limit: bytes that it may hold; what comes later is not written.
        log: for damaged entries and for a full cache.

    Raises:
        InputError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, limit: float, log: Callable[[str], Any] = print) -> None:
        self.folder, self.limit = Path(folder), limit
        self.statistics = CacheStatistics()
        self._log = log
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{uuid.uuid4().hex}.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"--pipeline.datamanager.operator-cache {folder} cannot be written to ({error}). Give another folder."
            ) from error
        self._remove_abandoned()
        self._bytes, self._since_count, self._told_full = self._count(), 0, False
        self._counted = time.monotonic()

    def path(self, key: str) -> Path:
        """Where an operator is, or would be."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> TokenOperator | None:
        """The operator, or None if there is none that can be read; a damaged file is deleted and reported."""
        path = self.path(key)
        try:
            contents = path.read_bytes()
        except FileNotFoundError:
            self._add("missing")
            return None
        except OSError as error:
            self._add("missing")
            self._log(f"The cached operator {path} cannot be read ({error}); it is built anew.")
            return None
        try:
            operator = decode(contents, key)
        except ValueError as error:
            self._add("damaged")
            self._log(f"The cached operator {path} is damaged ({error}); it is built anew.")
            self._delete(path)
            return None
        self._add("found")
        return operator

    def put(self, key: str, operator: TokenOperator) -> bool:
        """Write an operator; readers see all of it or nothing. Returns False if the cache is full or out of disk."""
        return self._write(key, encode(operator, key))

    def keep(self, key: str, operator: TokenOperator) -> TokenOperator:
        """Write an operator, and return it as `get` will give it, whether there was room for it or not.

        What is used then does not depend on what the folder happens to hold, which keeps resuming exact.
        """
        contents = encode(operator, key)
        self._write(key, contents)
        return decode(contents, key)

    def _write(self, key: str, contents: bytes) -> bool:
        path = self.path(key)
        if not self._has_room(len(contents)):
            self._add("turned_away")
            return False
        temporary = path.parent / f".{uuid.uuid4().hex}.tmp"
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(contents)
            replaced = _size_of(path)
            os.replace(temporary, path)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._add("turned_away")
            self._tell_full(f"The operator cache {self.folder} cannot be written to ({error})")
            return False
        with self._lock:
            self._bytes += len(contents) - replaced
            self._since_count += 1
            self.statistics.written += 1
        return True

    @property
    def size(self) -> int:
        """Bytes in the folder, as far as this process knows."""
        return self._bytes

    def _add(self, name: str) -> None:
        with self._lock:
            setattr(self.statistics, name, getattr(self.statistics, name) + 1)

    def _has_room(self, more: int) -> bool:
        with self._lock:
            if self._since_count >= COUNT_EVERY:
                self._bytes, self._since_count = self._count(), 0
            room = self._bytes + more <= self.limit
            if not room and time.monotonic() > self._counted + RECOUNT_AFTER:  # others may have made room
                self._bytes, self._counted = self._count(), time.monotonic()
                room = self._bytes + more <= self.limit
        if not room:
            self._tell_full(
                f"The operator cache {self.folder} is full: {self._bytes / 1e9:.3g} GB of "
                f"{self.limit / 1e9:.3g} GB (--pipeline.datamanager.operator-cache-limit)"
            )
        return room

    def _tell_full(self, reason: str) -> None:
        if not self._told_full:
            self._told_full = True
            free = shutil.disk_usage(self.folder).free
            self._log(
                f"{reason}; {free / 1e9:.3g} GB are free on its disk. What is in it is used, operators that are not "
                "are built at every use."
            )

    def _delete(self, path: Path) -> None:
        size = _size_of(path)
        with suppress(OSError):
            path.unlink()
            with self._lock:
                self._bytes -= size

    def _count(self) -> int:
        return sum(_size_of(path) for path in self.folder.glob("??/*.safetensors"))

    def _remove_abandoned(self) -> None:
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("??/.*.tmp")]:
            with suppress(OSError):  # another process may be faster
                if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
