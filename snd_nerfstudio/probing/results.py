"""Results of probes on disk: one JSON file for each task, dataset and model, with all that is needed to repeat it."""

import contextlib
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from snd_nerfstudio.errors import InputError

SCHEMA = 2
"""Raised whenever a reader of the files would have to change."""
REVISION = 1
"""Raised by hand whenever a change of this package changes what some measurement gives, so that nothing that was
measured before is taken for it."""
PACKAGES = ("torch", "timm", "nerfstudio", "snd-nerfstudio", "numpy")
"""Whose versions are written down, as far as they are installed."""
DATASET_PARTS: dict[str, Any] = dict(name=str, content_hash=str, split_rule=str, samples=dict, notes=list, part=bool)
WHAT_PARTS: dict[str, Any] = dict(
    task=str, model=str, description=dict, protocol=str, config=dict, seed=int, variant=dict, revision=int
)
RESULT_PARTS: dict[str, Any] = dict(
    last=dict, best=dict, best_iteration=(int, type(None)), seconds=(int, float)
) | dict(details=dict, versions=dict, machine=dict, date=str)
"""Types of what the files hold."""
KEY_DIGITS = 10
"""Of the key, in file names."""


@dataclass(frozen=True)
class DatasetRecord:
    """Which copy of which dataset."""

    name: str
    content_hash: str
    """Two copies with the same hash have the same samples."""
    split_rule: str
    """Where the split comes from."""
    samples: dict[str, int]
    """How many were used, by split."""
    notes: tuple[str, ...] = ()
    """What whoever reads the numbers should know about this copy."""
    part: bool = False
    """Some samples of it only, which nothing that was published can be compared with."""


@dataclass(frozen=True)
class Measurement:
    """What is measured. Two measurements that are equal in everything here give the same result."""

    task: str
    dataset: DatasetRecord
    model: str
    """Label in tables."""
    description: dict[str, Any]
    """Of the model: backbone, SHA-256 of its weights, and what became of their keys."""
    protocol: str
    config: dict[str, Any]
    """All settings, resolved."""
    seed: int
    variant: dict[str, Any] = field(default_factory=dict)
    """What tells a head from others of the same model and settings."""
    revision: int = REVISION
    """Of the code that measured."""

    @property
    def key(self) -> str:
        """SHA-256 over all of this in a canonical form, but for where weights were read from."""
        content = plain(self)
        content["description"].pop("weights_source", None)  # where they lay; the hashes say which they are
        content = json.dumps(content, sort_keys=True, allow_nan=False)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def file_name(self) -> str:
        """Says what is in the file, and differs where anything differs."""
        words = [self.task, self.dataset.name, self.model, self.protocol]
        return "_".join([*(file_word(word) for word in words), self.key[:KEY_DIGITS]]) + ".json"


@dataclass(frozen=True)
class ProbeResult:
    """A measurement and what came out."""

    what: Measurement
    last: dict[str, Optional[float]]
    """Metrics of the probe as it was at the end of its training, or of the backbone where nothing is trained."""
    best: dict[str, Optional[float]]
    """Metrics of the probe that was best on the test set while it was trained; empty where nothing is trained."""
    best_iteration: Optional[int] = None
    seconds: float = 0.0
    """Wall time of this model's part."""
    details: dict[str, Any] = field(default_factory=dict)
    """What does not fit into a table: curves, classes, pairs."""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    """UTC, ISO 8601."""


def finished(
    what: Measurement,
    last: Mapping[str, Any],
    best: Mapping[str, Any],
    seconds: float,
    device: str,
    best_iteration: Optional[int] = None,
    details: Optional[Mapping[str, Any]] = None,
) -> ProbeResult:
    """A result with the versions, the machine and the time of this moment."""
    return ProbeResult(
        what,
        plain(last),
        plain(best),
        best_iteration,
        round(seconds, 3),
        plain(details or {}),
        versions(),
        machine(device),
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


# ---------------------------------------------------------------------- files


def write_result(result: ProbeResult, folder: Path, replace: bool = False) -> Path:
    """Write a result, whole or not at all.

    Args:
        result: what to write.
        folder: made if it is not there.
        replace: an earlier result of the same measurement makes way.

    Returns:
        The file.

    Raises:
        InputError: there is such a result already, or the file cannot be written.
    """
    path = Path(folder) / result.what.file_name
    if path.exists() and not replace:
        raise InputError(f"{path} exists already: read it, or give --again to measure anew.")
    content = {"schema": SCHEMA, "key": result.what.key, **plain(result)}
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return path


def find_result(what: Measurement, folder: Path) -> Optional[ProbeResult]:
    """The result of a measurement that was made before; None if there is none.

    Raises:
        InputError: the file that should hold it is damaged or holds another one.
    """
    path = Path(folder) / what.file_name
    if not path.exists():
        return None
    found = read_result(path)
    if found.what.key != what.key:
        raise InputError(f"{path} holds the result of another measurement: move it away.")
    return found


def read_result(path: Path) -> ProbeResult:
    """Read a result.

    Raises:
        InputError: it cannot be read, is no result, is of another schema, lacks something, or was edited.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"Result {path} cannot be read ({error}): measure it again.") from error
    if not isinstance(content, dict) or "schema" not in content:
        raise InputError(f"{path} is no result of snd-probe: name files that it wrote.")
    if content["schema"] != SCHEMA:
        raise InputError(
            f"Result {path} has schema {content['schema']}, and this version reads {SCHEMA}: measure it again."
        )
    what = _part(path, content, "what", dict)
    dataset = _checked(path, _part(path, what, "dataset", dict), DATASET_PARTS)
    for name in ("last", "best"):
        if not all(_is_number(value) for value in _part(path, content, name, dict).values()):
            raise InputError(f"Result {path}: `{name}` must be numbers by their names: measure it again.")
    measurement = Measurement(
        **_checked(path, what, WHAT_PARTS), dataset=DatasetRecord(**{**dataset, "notes": tuple(dataset["notes"])})
    )
    result = ProbeResult(what=measurement, **_checked(path, content, RESULT_PARTS))
    if measurement.key != content.get("key"):
        raise InputError(f"Result {path} was changed after it was written (its key does not fit): measure it again.")
    return result


def _checked(path: Path, content: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of a result by their names.

    Raises:
        InputError: one is missing or of another type.
    """
    return {name: _part(path, content, name, kind) for name, kind in parts.items()}


def _part(path: Path, content: Mapping[str, Any], name: str, kind: Any) -> Any:
    if name not in content or not isinstance(content[name], kind):
        raise InputError(f"Result {path} lacks `{name}`, or it is something else than expected: measure it again.")
    return content[name]


def read_results(places: Iterable[Path]) -> list[ProbeResult]:
    """All results in some files and folders, in the order of their names; a file is read once.

    Raises:
        InputError: a place does not exist, there is no result, or one cannot be read.
    """
    files: dict[Path, None] = {}
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(file for file in place.glob("*.json") if not file.name.startswith("."))
            files.update(dict.fromkeys(inside))
        elif place.is_file():
            files[place] = None
        else:
            raise InputError(f"--results {place}: no such file or folder.")
    if not files:
        raise InputError("--results: there is no result in these folders; measure something first.")
    return [read_result(file) for file in files]


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror or error}): give another --out.") from error


# ---------------------------------------------------------------------- pieces


def hash_arrays(entries: Iterable[tuple[str, Sequence[np.ndarray]]]) -> str:
    """SHA-256 over names and arrays, types and shapes included, in their order."""
    digest = hashlib.sha256()
    for name, arrays in entries:
        digest.update(f"{name}\n".encode())
        for array in arrays:
            digest.update(f"{array.dtype.str} {array.shape}\n".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Of Python and of the packages that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def machine(device: str) -> dict[str, Any]:
    """What it was computed on; not whose machine it was."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    return {
        "system": f"{platform.system()} {platform.release()}",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device,
    }


def plain(value: Any) -> Any:
    """What JSON can hold: dataclasses become dicts, tuples lists, paths strings, and what is not finite null."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def file_word(text: str) -> str:
    """A text as part of a file name: letters, digits, dots and hyphens."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", text).strip("-.")[:60] or "x"


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
