"""What probes are trained and measured on: decoded images with their labels, and datasets of them."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
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

BLOCK = 1000
"""Files whose sizes are asked for at once."""

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
    part: bool = False
    """Only some of its samples are taken."""

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
        """SHA-256 over the names and sizes of all files of all samples, sorted, and over the content of the lists and
        of files that hold several samples.

        Files of one sample are not read: a change that keeps the size of an image is not seen.

        Raises:
            InputError: a file is missing.
        """

        # strings in blocks, because paths and futures one by one take minutes for 300,000 files
        counts = Counter(os.fspath(file) for index in range(len(self)) for file in self.files(index))
        everything = sorted(counts)
        shared = {Path(file) for file, count in counts.items() if count > 1}
        blocks = [everything[start : start + BLOCK] for start in range(0, len(everything), BLOCK)]
        digest = hashlib.sha256()
        with ThreadPoolExecutor(8) as pool:  # stat calls wait for the disk
            lines = sorted(line for block in pool.map(self._lines, blocks) for line in block)
        digest.update("".join(lines).encode())
        for file in sorted(shared.union(self.list_files())):
            digest.update(f"{self._relative(os.fspath(file))}\t{sha256(file)}\n".encode())
        return digest.hexdigest()

    def _lines(self, files: Sequence[str]) -> list[str]:
        """Name and size of each file."""
        lines = []
        for file in files:
            try:
                lines.append(f"{self._relative(file)}\t{os.stat(file).st_size}\n")
            except OSError as error:
                raise InputError(f"{file} is missing: restore it, or remove it from its list.") from error
        return lines

    def _relative(self, file: str) -> str:
        folder = os.path.join(os.fspath(self.root), "")
        return file[len(folder) :].replace(os.sep, "/") if file.startswith(folder) else os.path.basename(file)
