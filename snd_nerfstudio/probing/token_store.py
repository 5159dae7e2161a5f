"""Tokens and labels of a whole dataset, computed once and kept in memory or on disk.

Tokens are kept in float16, depth in float32, normals in float16 (an error of less than 0.05 degrees), classes in
bytes. On disk each kind is one .npy file that is mapped into memory; ``about.json`` says of what and how far they are
filled, and is replaced after every shard, so that an interrupted computation goes on where it was.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.examples import Labels, image_tensor, labels_of, windowed
from snd_nerfstudio.probing.features import FeatureSettings, ProbeFeatures, encode
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.padding import patch_padding
from snd_nerfstudio.probing.progress import Progress, quiet
from snd_nerfstudio.probing.results import REVISION
from snd_nerfstudio.probing.samples import ProbeDataset, ProbeSample, Task

VERSION = 1
"""Of the layout on disk; what the numbers mean is told by `results.REVISION`."""
SHARD = 16
"""Rows that are computed and written at once."""
LIMIT_FLAG = "--cache-limit-gb"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class CachePlace:
    """Where arrays are kept, and how much they may take."""

    folder: Optional[Path] = None
    """None: in memory."""
    limit_gb: float = 16.0
    """Gigabytes that one dataset's tokens or labels may take, less what ``used`` says."""
    used: int = 0
    """Bytes that are spent already."""


def stored_arrays(
    what: str,
    key: Mapping[str, Any],
    rows: int,
    fill: Callable[[int, int], Arrays],
    place: CachePlace,
    progress: Progress = quiet,
) -> Arrays:
    """Arrays of so many rows, computed shard by shard unless they are there already.

    Args:
        what: what they are, for messages.
        key: everything that the numbers depend on; plain values.
        rows: how many.
        fill: gives rows from its first argument to before its second.
        place: where they are kept.
        progress: told how many rows are done.

    Returns:
        Arrays in memory, or mapped and not to be written to.

    Raises:
        InputError: they would be larger than allowed or than the disk is; or files are damaged.
    """
    text = json.dumps({"version": VERSION, "revision": REVISION, **key}, sort_keys=True)
    folder = None if place.folder is None else place.folder / hashlib.sha256(text.encode()).hexdigest()[:24]
    done, arrays = (0, {}) if folder is None else _opened(folder, text, rows)
    while done < rows:
        stop = min(done + SHARD, rows)
        values = fill(done, stop)
        if not arrays:
            arrays = _created(folder, values, rows, place, what)
        for name, value in values.items():
            arrays[name][done:stop] = value
        done = stop
        if folder is not None:
            _save_about(folder, text, rows, done, arrays)
        progress(what, done, rows)
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _about_arrays(arrays: Arrays) -> dict[str, Any]:
    return {name: {"shape": list(array.shape), "dtype": str(array.dtype)} for name, array in arrays.items()}


def _save_about(folder: Path, text: str, rows: int, done: int, arrays: Arrays) -> None:
    for array in arrays.values():
        array.flush()  # type: ignore  # before it is said that they are there
    about = {"key": json.loads(text), "rows": rows, "done": done, "arrays": _about_arrays(arrays)}
    partial = folder / f"about.json.{os.getpid()}.tmp"
    partial.write_text(json.dumps(about, indent=1))
    os.replace(partial, folder / "about.json")


def _opened(folder: Path, text: str, rows: int) -> tuple[int, Arrays]:
    """Rows that are filled, and the arrays; nothing where nothing was begun."""
    file = folder / "about.json"
    if not file.is_file():
        return 0, {}
    try:
        about = json.loads(file.read_text())
        mode = "r" if about["done"] == rows else "r+"
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in about["arrays"]}
        as_said = _about_arrays(arrays) == about["arrays"] and about["key"] == json.loads(text)
        done = int(about["done"])
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise InputError(f"{folder} holds damaged cached tokens ({error}): delete that folder.") from error
    if not as_said or about["rows"] != rows or not 0 <= done <= rows:
        raise InputError(f"{folder} does not hold the cached tokens that its about.json says: delete that folder.")
    return done, arrays


def _created(folder: Optional[Path], first: Arrays, rows: int, place: CachePlace, what: str) -> Arrays:
    """Empty arrays for so many rows like the first."""
    size = sum(rows * value[:1].nbytes for value in first.values())
    if size + place.used > place.limit_gb * 1e9:
        raise InputError(
            f"{what} take {size / 1e9:.3g} GB{f' beside {place.used / 1e9:.3g} GB' if place.used else ''}, more than "
            f"{LIMIT_FLAG} {place.limit_gb:g} allows: raise it, or give --cache none."
        )
    if folder is None:
        return {name: np.empty((rows, *value.shape[1:]), value.dtype) for name, value in first.items()}
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{what} take {size / 1e9:.3g} GB, but only {free / 1e9:.3g} GB are free in {folder}: make room, or give "
            "another --cache-folder or --cache none."
        )
    created = {}
    for name, value in first.items():
        shape = (rows, *value.shape[1:])
        created[name] = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=value.dtype, shape=shape)
    return created


def _dataset_key(dataset: ProbeDataset, content_hash: str) -> dict[str, Any]:
    window = None if dataset.window is None else list(dataset.window)
    return {"content": content_hash, "images": len(dataset), "window": window}


def _same_size(sizes: Sequence[tuple[str, tuple[int, int]]], first: tuple[int, int], dataset: ProbeDataset) -> None:
    for name, size in sizes:
        if size != first:
            raise InputError(
                f"Images of {dataset.name} differ in size ({name}: {size[1]}x{size[0]}, the first one: "
                f"{first[1]}x{first[0]}), so whole images cannot be cached: give --cache none."
            )


# ---------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TokenStore:
    """Tokens of every image of a dataset."""

    arrays: Arrays
    """``tokens`` [n, h, w, c] and perhaps ``class_tokens`` [n, d], float16."""
    size: tuple[int, int]
    """Rows and columns of an image."""
    settings: FeatureSettings
    patch: int

    def __len__(self) -> int:
        return len(self.arrays["tokens"])

    @property
    def bytes(self) -> int:
        """How much memory or disk they take."""
        return sum(array.nbytes for array in self.arrays.values())

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> ProbeFeatures:
        """Tokens of some images, as they are stored: heads bring them to float32 themselves."""
        rows = {name: _rows(array, indices).to(device) for name, array in self.arrays.items()}
        padding = patch_padding(self.size, self.patch, self.settings.extra_patch_quirk)
        return ProbeFeatures(rows["tokens"], rows.get("class_tokens"), padding, self.size)


def _rows(array: np.ndarray, indices: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array[np.asarray(indices)]))


def token_store(
    model: ProbeModel,
    dataset: ProbeDataset,
    settings: FeatureSettings,
    place: CachePlace,
    content_hash: Optional[str] = None,
    mirrored: bool = False,
    device: torch.device | str = "cpu",
    batch: int = 4,
    progress: Progress = quiet,
) -> TokenStore:
    """Tokens of all images of a dataset, whole and unchanged, computed unless they are there already.

    What was computed is found again by the model's tensors and positions, the settings, and names and sizes of the
    dataset's files.

    Args:
        model: whose, on the device.
        dataset: all of its images must be of one size.
        settings: which tokens.
        place: where they are kept.
        content_hash: of the dataset, if it is known already.
        mirrored: of the images' mirror images instead.
        device: where the backbone runs.
        batch: images at once.
        progress: told how many images are done.

    Raises:
        InputError: images differ in size; tokens would take too much, or are beyond float16 (65,504); or see
            `encode`.
    """
    what = f"Tokens of {model.label} on {dataset.name} ({dataset.split}{', mirrored' if mirrored else ''})"
    described = {name: model.description[name] for name in ("state_sha256", "architecture", "kind", "positions")}
    used = asdict(settings)
    del used["pad_crop"]  # only maps depend on it
    key = {
        "what": "tokens",
        "model": described,
        "features": used,
        "dataset": _dataset_key(dataset, content_hash or dataset.content_hash()),
        "mirrored": mirrored,
    }
    height, width = windowed(dataset, 0).image.shape[:2]
    size = (height, width)

    def fill(start: int, stop: int) -> Arrays:
        samples = [windowed(dataset, index) for index in range(start, stop)]
        _same_size([(row.name, (row.image.shape[0], row.image.shape[1])) for row in samples], size, dataset)
        images = torch.stack([image_tensor(row.image) for row in samples])
        images = images.flip(-1) if mirrored else images
        parts = [encode(model, part.to(device), settings) for part in images.split(batch)]
        arrays = {"tokens": torch.cat([part.tokens for part in parts]).half().cpu().numpy()}
        found = [part.class_token for part in parts if part.class_token is not None]
        if found:
            arrays["class_tokens"] = torch.cat(found).half().cpu().numpy()
        for array in arrays.values():
            if not np.isfinite(array).all():
                raise InputError(f"{what} are not finite in half precision: give --cache none.")
        return arrays

    arrays = stored_arrays(what, key, len(dataset), fill, place, progress)
    return TokenStore(arrays, size, settings, model.patch)


# ---------------------------------------------------------------------- labels


@dataclass(frozen=True)
class LabelStore:
    """Labels of every image of a dataset, at the images' size."""

    arrays: Arrays

    @property
    def bytes(self) -> int:
        """How much memory or disk they take."""
        return sum(array.nbytes for array in self.arrays.values())

    def batch(self, indices: Sequence[int]) -> Labels:
        """Labels of some images; normals in float32 again."""
        rows = {name: _rows(array, indices) for name, array in self.arrays.items()}
        return {name: row.float() if row.dtype == torch.float16 else row for name, row in rows.items()}


def stored_labels(sample: ProbeSample, task: Task) -> Arrays:
    """Labels of one sample as they are kept."""
    arrays = {kind: value.numpy() for kind, value in labels_of(sample, task).items()}
    return {kind: array.astype(np.float16) if kind == "normals" else array for kind, array in arrays.items()}


def label_store(
    dataset: ProbeDataset,
    place: CachePlace,
    content_hash: Optional[str] = None,
    progress: Progress = quiet,
) -> LabelStore:
    """Labels of all images of a dataset.

    Args:
        dataset: all of its images must be of one size.
        place: where they are kept.
        content_hash: of the dataset, if it is known already.
        progress: told how many images are done.

    Raises:
        InputError: images differ in size, or labels would take too much.
    """
    what = f"Labels of {dataset.name} ({dataset.split})"
    described = _dataset_key(dataset, content_hash or dataset.content_hash())
    key = {"what": "labels", "task": dataset.task, "dataset": described}
    height, width = windowed(dataset, 0).image.shape[:2]

    def fill(start: int, stop: int) -> Arrays:
        samples = [windowed(dataset, index) for index in range(start, stop)]
        _same_size([(row.name, (row.image.shape[0], row.image.shape[1])) for row in samples], (height, width), dataset)
        rows = [stored_labels(sample, dataset.task) for sample in samples]
        return {kind: np.stack([row[kind] for row in rows]) for kind in rows[0]}

    return LabelStore(stored_arrays(what, key, len(dataset), fill, place, progress))
