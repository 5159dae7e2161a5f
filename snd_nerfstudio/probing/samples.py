"""What probes are trained and measured on: decoded images with their labels, and datasets of them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError

IGNORE = 255
"""Label of pixels that have no class."""

Task = Literal["depth", "normals", "segmentation"]
Split = Literal["train", "test"]
Protocol = Literal["paper", "fixed"]
EvalCrop = Literal["none", "eigen", "garg"]
Window = tuple[int, int, int, int]
"""First row, row after the last, first column, column after the last."""


@dataclass(frozen=True)
class ProbeSample:
    """One decoded image with whatever labels its dataset has, at the size they are published in."""

    name: str
    """Unique in its dataset; paths are written with slashes."""
    image: UInt8[np.ndarray, "H W 3"]
    """RGB."""
    depth: Optional[Float32[np.ndarray, "H W"]] = None
    """Metres along the optical axis, 0 = none."""
    normals: Optional[Float32[np.ndarray, "H W 3"]] = None
    """Of unit length, in camera axes as published; zeros = none."""
    labels: Optional[UInt8[np.ndarray, "H W"]] = None
    """Class index from 0; `IGNORE` = none."""
    instances: Optional[Int64[np.ndarray, "H W"]] = None
    """Instance ids, 0 = none; rooms alone have them."""


class ProbeDataset(ABC):
    """The samples of one split for one task, in an order that does not depend on the file system."""

    name: str
    """As in `open_dataset`."""
    root: Path
    """The dataset's own folder."""
    task: Task
    split: Split
    classes: tuple[str, ...] = ()
    """Names of the classes; only for segmentation."""
    min_depth: float = 1e-3
    """Metres; depth is judged where it lies strictly between these two."""
    max_depth: float = 10.0
    eval_crop: EvalCrop = "none"
    """Which window of a sample depth is judged in."""
    window: Optional[Window] = None
    """What the published protocol cuts out of every sample of this split before anything else; None: all of it."""
    left_out: tuple[str, ...] = ()
    """Names of files that are known to be bad and are no samples."""
    split_rule: str = "published"
    """Where the split comes from, for reports."""
    notes: tuple[str, ...] = ()
    """Sentences about this copy of the dataset that whoever uses it should read."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> ProbeSample:
        """Decodes one sample.

        Raises:
            IndexError: there are not so many.
            InputError: a file is missing, damaged, or not what it should be; the message names it.
        """

    @abstractmethod
    def files(self, index: int) -> list[Path]:
        """The files that a sample is made of."""

    def __iter__(self) -> Iterator[ProbeSample]:
        return (self[index] for index in range(len(self)))

    def list_files(self) -> list[Path]:
        """The files that say which samples belong to the split, or what the classes are."""
        return []

    def scene(self, index: int) -> Optional[str]:
        """The place that a sample was captured in; None where names do not tell."""
        return None

    def content_hash(self) -> str:
        """SHA-256 over the names and sizes of all files of all samples, sorted, and over the content of the lists.

        Images themselves are not read: a change that keeps a file's size is not seen.

        Raises:
            InputError: a file is missing.
        """

        def line(file: Path) -> str:
            try:
                return f"{self._relative(file)}\t{file.stat().st_size}\n"
            except OSError as error:
                raise InputError(f"{file} is missing: restore it, or remove it from its list.") from error

        digest = hashlib.sha256()
        everything = {file for index in range(len(self)) for file in self.files(index)}
        with ThreadPoolExecutor(8) as pool:  # stat calls wait for the disk
            lines = sorted(pool.map(line, everything))
        digest.update("".join(lines).encode())
        for file in sorted(self.list_files()):
            digest.update(f"{self._relative(file)}\t{sha256(file)}\n".encode())
        return digest.hexdigest()

    def _relative(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix() if file.is_relative_to(self.root) else file.name
