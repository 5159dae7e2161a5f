"""Token operators on disk: geometry that was computed once serves every epoch, every backbone of one grid, every loss.

One file per operator, named after a hash of all that it depends on, so that nothing in a cache can be out of date: with
other frames, cameras, masks, reconstructor weights or settings it is another name. Files are safetensors and hold

* column indices as uint16 (uint32 beyond 65,536 columns) and the number of entries of each row;
* values as uint16 fractions of their row's largest value: as small as float16 and, for what is summed up, finer: every
  entry is off by at most 1/131,070 of the row's largest, where float16 rounds the largest themselves by up to 1/2,048.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from snd_nerfstudio.cache_files import CacheFolder, CacheMessages, CacheStatistics
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_operator import SparseRows, TokenOperator

FORMAT = 1
"""To be raised whenever the same inputs give another operator, or the layout of files changes."""
STEPS = 65535
"""Steps of a stored value, from 0 to the largest of its row."""
NARROW = 1 << 16
"""Matrices with more columns than this have wider column indices."""
MESSAGES = CacheMessages(
    refused="--pipeline.datamanager.operator-cache {root} cannot be written to ({error}). Give another folder.",
    read_only=None,
    unreadable="The cached operator {path} cannot be read ({error}); it is built anew.",
    damaged="The cached operator {path} is damaged ({error}); it is built anew.",
    unwritable="The operator cache {folder} cannot be written to ({error}); {free:.3g} GB are free on its disk. What "
    "is in it is used, operators that are not are built at every use.",
    full="The operator cache {folder} is full: {size:.3g} GB of {limit:.3g} GB "
    "(--pipeline.datamanager.operator-cache-limit); {free:.3g} GB are free on its disk. What is in it is used, "
    "operators that are not are built at every use.",
)


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
        self.statistics = CacheStatistics()
        self._files = CacheFolder(folder, ".safetensors", MESSAGES, self.statistics, limit, log=log)
        self.folder, self.limit = self._files.folder, limit

    @property
    def size(self) -> int:
        """Bytes in the folder, as far as this process knows."""
        return self._files.size

    def path(self, key: str) -> Path:
        """Where an operator is, or would be."""
        return self._files.path(key)

    def get(self, key: str) -> TokenOperator | None:
        """The operator, or None if there is none that can be read; a damaged file is deleted and reported."""
        return self._files.get(key, lambda contents: decode(contents, key))

    def put(self, key: str, operator: TokenOperator) -> bool:
        """Write an operator; readers see all of it or nothing. Returns False if the cache is full or out of disk."""
        return self._files.write(key, encode(operator, key))

    def keep(self, key: str, operator: TokenOperator) -> TokenOperator:
        """Write an operator, and return it as `get` will give it, whether there was room for it or not.

        What is used then does not depend on what the folder happens to hold, which keeps resuming exact.
        """
        contents = encode(operator, key)
        self._files.write(key, contents)
        return decode(contents, key)
