"""What all data sets of posed image pairs give, and reading their files."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import UNREADABLE


@dataclass(frozen=True)
class PairView:
    """One image of a pair."""

    image: UInt8[np.ndarray, "h w 3"]
    """RGB."""
    depth: Float[np.ndarray, "a b"]
    """Metres along the optical axis, 0 = none."""
    intrinsics: Float[np.ndarray, "3 3"]
    """In pixels of the depth map, centres at +0.5."""


@dataclass(frozen=True)
class PosedPair:
    """Two images of one scene with what is needed to tell whether two of their pixels show the same point."""

    images: tuple[UInt8[np.ndarray, "h0 w0 3"], UInt8[np.ndarray, "h1 w1 3"]]
    """RGB, at the size of the files."""
    depths: tuple[Float[np.ndarray, "a0 b0"], Float[np.ndarray, "a1 b1"]]
    """Metres along the optical axis, 0 = none; registered to the images but perhaps of another size."""
    intrinsics: tuple[Float[np.ndarray, "3 3"], Float[np.ndarray, "3 3"]]
    """In pixels of the depth maps, centres at +0.5."""
    relative_pose: Float[np.ndarray, "4 4"]
    """From the first camera's axes to the second's (x right, y down, z forward), metres."""
    name: str
    scene: str

    @staticmethod
    def of(
        first: PairView, second: PairView, relative_pose: Float[np.ndarray, "4 4"], name: str, scene: str
    ) -> "PosedPair":
        """Two views as one pair."""
        return PosedPair(
            images=(first.image, second.image),
            depths=(first.depth, second.depth),
            intrinsics=(first.intrinsics, second.intrinsics),
            relative_pose=relative_pose,
            name=name,
            scene=scene,
        )


class PairSet(ABC):
    """Pairs that are read when they are asked for, by their place, by slices or one after the other."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> PosedPair:
        """The pair at a place in ``[0, len)``.

        Raises:
            InputError: a file is missing or cannot be decoded.
        """

    @overload
    def __getitem__(self, index: int) -> PosedPair: ...

    @overload
    def __getitem__(self, index: slice) -> "PairSet": ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Selection(self, range(len(self))[index])
        return self.read(range(len(self))[index])

    def __iter__(self) -> Iterator[PosedPair]:
        return (self.read(index) for index in range(len(self)))

    def spread(self, count: int) -> "PairSet":
        """So many pairs, spread evenly; all of them if there are fewer."""
        chosen = np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int))
        return Selection(self, chosen.tolist())


class Selection(PairSet):
    """Some pairs of a set."""

    def __init__(self, whole: PairSet, chosen: Sequence[int]) -> None:
        self.whole, self.chosen = whole, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> PosedPair:
        """See `PairSet.read`."""
        return self.whole.read(self.chosen[index])


def read_image(file: Path, upright: bool = False) -> UInt8[np.ndarray, "h w 3"]:
    """An image in RGB, whatever it is stored in.

    Args:
        file: of any format that Pillow reads.
        upright: turn it as its EXIF data says.

    Raises:
        InputError: it is missing or cannot be decoded.
    """
    try:
        with Image.open(file) as image:
            return np.asarray((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"Image {file} does not exist: restore it from the data set.") from error
    except UNREADABLE as error:
        raise InputError(f"Image {file} cannot be decoded ({error}): restore it from the data set.") from error


def read_depth(file: Path, unit: float = 1e-3) -> Float[np.ndarray, "h w"]:
    """A depth map of 16 bits and one channel, metres; 0 = none.

    Args:
        file: a PNG or PGM.
        unit: metres per stored value.

    Raises:
        InputError: it is missing, cannot be decoded or has several channels.
    """
    values = read_values(file)
    return (values * np.float32(unit)).astype(np.float32)


def read_values(file: Path) -> Float[np.ndarray, "h w"]:
    """The numbers that an image of one channel holds, float32.

    Raises:
        InputError: see `read_depth`.
    """
    try:
        with Image.open(file) as image:
            values = np.asarray(image)
    except FileNotFoundError as error:
        raise InputError(f"Depth map {file} does not exist: restore it from the data set.") from error
    except UNREADABLE as error:
        raise InputError(f"Depth map {file} cannot be decoded ({error}): restore it from the data set.") from error
    if values.ndim != 2 or values.dtype == np.uint8:
        raise InputError(
            f"Depth map {file} has shape {values.shape} and type {values.dtype}: one channel of 16 bits is expected, "
            "so restore it from the data set."
        )
    return values.astype(np.float32)


def check_rigid(pose: np.ndarray, what: str) -> Float[np.ndarray, "4 4"]:
    """A matrix that is a rotation and a translation, float64.

    Args:
        pose: what was read.
        what: names the pose and its file in the message.

    Raises:
        InputError: it is something else.
    """
    rotation = pose[:3, :3] if pose.shape == (4, 4) else np.zeros((3, 3))
    rigid = bool(np.isfinite(pose).all()) and np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-2
    if not rigid or np.linalg.det(rotation) < 0:
        raise InputError(
            f"{what} is not a 4 x 4 matrix of a rotation and a translation: restore it from the data set or remove "
            "the pair."
        )
    return pose.astype(np.float64)


def missing_files(files: Iterable[Path], kind: str, remedy: str) -> list[str]:
    """A sentence if some files are missing, naming the first of them; nothing otherwise."""
    files = list(dict.fromkeys(files))
    with ThreadPoolExecutor(8) as pool:  # stat calls wait for the disk, not for the interpreter
        gone = [file for file, there in zip(files, pool.map(Path.is_file, files)) if not there]
    if not gone:
        return []
    return [f"{len(gone)} of {len(files)} {kind} are missing, the first is {gone[0]}: {remedy}."]
