"""Normals of NYU Depth v2 as Probe3D uses them: GeoNet's frames to train on, the labelled images to test on.

    nyu_geonet/*.mat (or nyuv2_geonet, beside or in the folder)    data1.zip and data2.zip of GeoNet in one folder:
                                             img (image less twice its mean), depth (m), norm; cut to [:480, :640]
    nyu_geonet/bad_frames.txt                optional: names of frames that are left out, one per line
    nyu_depth_v2_labeled.mat                 images and rawDepths, MATLAB 7.3 (which is HDF5)
    nyu_normals_gt/test/00001.png            Ladicky's normals, numbered from 1: 255 (n/2 + 1/2); or else
    all_normals.npy                          the same normals, 1449 x 480 x 640 x 3
    test_SN40.json, or splits.mat            which labelled images are tested; else those of nyu_normals_gt/test

Axes of the normals are left as published. Both protocols test the official 654 images.
"""

import json
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jaxtyping import Float32, UInt8

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.files import Request
from snd_nerfstudio.probing.datasets.reading import check_size, read_normals, unit_normals
from snd_nerfstudio.probing.datasets.splits import read_lines
from snd_nerfstudio.probing.samples import ProbeDataset, ProbeSample

SIZE = (480, 640)
DEEPEST = 10.0
"""Metres; what is deeper counts as not measured."""
CENTRE = (0, 480, 80, 560)
"""The middle square, which normals are trained and tested on."""
GEONET_MEAN = (122.175, 116.169, 103.508)
"""Twice of this was subtracted from GeoNet's images."""
LEFT_OUT = "bad_frames.txt"
DELETED_PLACES = (6919, 21181)
"""Places in the sorted list of all frames that the released code deletes because something is wrong with them."""
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    NotImplementedError,
    struct.error,
    MemoryError,
)
"""What scipy and h5py raise on damaged files."""


def open_normals(request: Request) -> ProbeDataset:
    """GeoNet's frames or the labelled test images.

    Raises:
        InputError: what is needed is missing, or there are only pickles of it.
    """
    if request.split == "train":
        return GeoNetDataset(request, geonet_folder(request.root))
    return LabelledDataset(request)


# ---------------------------------------------------------------------- training


def geonet_folder(root: Path) -> Path:
    """Where GeoNet's frames are.

    Raises:
        InputError: nowhere.
    """
    names = ("nyu_geonet", "nyuv2_geonet")
    for folder in (*(root / name for name in names), *(root.parent / name for name in names)):
        if folder.is_dir():
            return folder
    raise InputError(
        f"Folder {root / names[0]} is missing: put the .mat files of GeoNet's data1.zip and data2.zip "
        "(github.com/xjqi/GeoNet) there."
    )


class GeoNetDataset(ProbeDataset):
    """Frames of the raw videos with normals computed from depth (X. Qi et al., CVPR 2018).

    The released code deletes two frames by their place in the sorted list, which deletes others as soon as a file is
    missing or added. Here those named in bad_frames.txt are left out; without that file `paper` does as released.
    A file that is cut short is refused, and a frame that decodes to something impossible when it is read;
    ``--check --thorough`` names all of these.
    """

    def __init__(self, request: Request, folder: Path) -> None:
        self.name, self.root, self.task, self.split = request.name, request.root, request.task, request.split
        self.window = CENTRE
        self.folder, self.exact = folder, request.protocol == "paper"
        frames = sorted(file for file in folder.iterdir() if file.suffix == ".mat")
        listed = self.folder / LEFT_OUT
        named = set(read_lines(listed)) if listed.is_file() else set()
        unknown = named - {file.name for file in frames}
        if unknown:
            raise InputError(f"{listed} names {sorted(unknown)[0]}, which is no frame of {folder}: give file names.")
        with ThreadPoolExecutor(8) as pool:  # small reads wait for the disk
            whole = list(pool.map(is_complete, frames))
        short = [file for file, complete in zip(frames, whole) if not complete and file.name not in named]
        if short:
            names = ", ".join(file.name for file in short[:5]) + (", ..." if len(short) > 5 else "")
            raise InputError(
                f"{len(short)} of {len(frames)} files in {folder} are cut short ({names}): unpack them again, or leave "
                f"them out: add a line with the name of each to {listed}."
            )
        if not listed.is_file() and len(frames) > max(DELETED_PLACES):
            deleted = [frames[place].name for place in DELETED_PLACES]
            self.notes = (
                f"in {folder} {' and '.join(deleted)} lie where the released code deletes two frames"
                + (", and are left out." if self.exact else f": look at them, and list in {listed} what is bad."),
            )
            named = set(deleted) if self.exact else named
        self.frames = [file for file in frames if file.name not in named]
        self.left_out = tuple(file.name for file in frames if file.name in named)
        if not self.frames:
            raise InputError(
                f"Folder {folder} has no readable .mat files: unpack GeoNet's data1.zip and data2.zip there."
            )

    def __len__(self) -> int:
        return len(self.frames)

    def files(self, index: int) -> list[Path]:
        return [self.frames[index]]

    def list_files(self) -> list[Path]:
        listed = self.folder / LEFT_OUT
        return [listed] if listed.is_file() else []

    def scene(self, index: int) -> Optional[str]:
        return re.split(r"-", self.frames[index].stem)[0]

    def __getitem__(self, index: int) -> ProbeSample:
        file = self.frames[index]
        try:
            image, depth, normals = read_geonet(file, self.exact)
        except InputError as error:
            raise InputError(
                f"{str(error).rstrip('.')}, or leave it out: add the line {file.name} to {self.folder / LEFT_OUT}."
            ) from error
        return ProbeSample(file.stem, image, depth=depth, normals=normals)


def is_complete(file: Path) -> bool:
    """Whether the elements of a MATLAB 5 file end where the file does; they are not decoded."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header = stream.read(128)
            if len(header) < 128 or header[126:128] not in (b"IM", b"MI"):
                return False
            order = "<II" if header[126:128] == b"IM" else ">II"
            place = 128
            while place < size:
                stream.seek(place)
                _, length = struct.unpack(order, stream.read(8))
                place += 8 + length
    except (OSError, struct.error):
        return False
    return place == size > 128


def read_geonet(
    file: Path, exact: bool
) -> tuple[UInt8[np.ndarray, "480 640 3"], Float32[np.ndarray, "480 640"], Float32[np.ndarray, "480 640 3"]]:
    """Image, depth (metres, 0 = none) and unit normals (zeros = none) of one frame.

    Args:
        file: its .mat file.
        exact: cut decimals of the image off as the released code does, instead of rounding.

    Raises:
        InputError: the file cannot be decoded, or what is in it cannot be right.
    """
    content = _load_mat(file, ["img", "depth", "norm"])
    for key, axes in (("img", 3), ("depth", 2), ("norm", 3)):
        array = content.get(key)
        if not isinstance(array, np.ndarray) or array.ndim != axes or array.dtype.kind not in "fiu":
            raise InputError(f"{file} has no numbers `{key}` of {axes} axes: it is no frame of GeoNet.")
        if array.shape[0] < SIZE[0] or array.shape[1] < SIZE[1] or array.shape[2:] not in ((), (3,)):
            raise InputError(f"`{key}` of {file} has the shape {array.shape}, less than 480x640: download it again.")
    image, depth, normals = (content[key][: SIZE[0], : SIZE[1]] for key in ("img", "depth", "norm"))
    image = image + 2 * np.array(GEONET_MEAN, image.dtype if image.dtype.kind == "f" else np.float64)
    if not (np.isfinite(image).all() and image.min() > -1 and image.max() < 256):
        raise InputError(f"`img` of {file} is outside of 0 to 255 after its mean is added: download it again.")
    depth = np.where(np.isfinite(depth) & (depth > 0) & (depth <= DEEPEST), depth, 0).astype(np.float32)
    if not np.isfinite(normals).all() or not (unit := unit_normals(normals)).any() or not depth.any():
        raise InputError(f"{file} has no depth, no normals, or some that are no numbers: download it again.")
    whole = np.trunc(image) if exact else np.round(image)
    return np.clip(whole, 0, 255).astype(np.uint8), depth, unit


def _load_mat(file: Path, keys: list[str]) -> dict[str, Any]:
    """Some variables of a MATLAB 5 file; scipy runs nothing that is in it.

    Raises:
        InputError: the file cannot be decoded.
    """
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        return loadmat(str(file), variable_names=keys)
    except (*_BROKEN, MatReadError, zlib.error) as error:
        raise InputError(f"{file} cannot be decoded ({error}): download it again.") from error


# ---------------------------------------------------------------------- testing


@dataclass(frozen=True)
class _Normals:
    """Published normals: one file per image, or one array."""

    folder: Optional[Path]
    array: Optional[Path]

    def file(self, number: int) -> Path:
        """Of the image that is counted from 0."""
        return self.folder / f"{number + 1:05d}.png" if self.folder is not None else self.array  # type: ignore

    def _stored(self) -> np.ndarray:
        file = self.array
        try:
            stored = np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore
        except _BROKEN as error:
            raise InputError(f"{file} cannot be read ({error}): write it again.") from error
        if stored.ndim != 4 or stored.shape[1:] != (*SIZE, 3) or stored.dtype.kind != "f":
            raise InputError(f"{file} holds {stored.dtype} {stored.shape}; expected floats, 1449 x 480 x 640 x 3.")
        return stored

    def read(self, number: int) -> Float32[np.ndarray, "H W 3"]:
        if self.folder is not None:
            return read_normals(self.file(number))
        stored = self._stored()
        if number >= len(stored):
            raise InputError(f"{self.array} has {len(stored)} images, but number {number} is wanted: write it again.")
        return unit_normals(np.nan_to_num(np.asarray(stored[number], np.float32)))


class LabelledDataset(ProbeDataset):
    """The official test images with measured depth and the normals of Ladicky et al. (ECCV 2014)."""

    def __init__(self, request: Request) -> None:
        self.name, self.root, self.task, self.split = request.name, request.root, request.task, request.split
        self.window = CENTRE
        self.labelled = self.root / "nyu_depth_v2_labeled.mat"
        self.normals = _find_normals(self.root, request.protocol == "paper")
        used = "nyu_normals_gt" if self.normals.folder is not None else "all_normals.npy"
        self.split_rule = f"published, normals of {used}"
        if not self.labelled.is_file():
            raise InputError(f"{self.labelled} is missing: download it from NYU Depth v2's page.")
        self.lists, self.numbers = _test_numbers(self.root)

    def __len__(self) -> int:
        return len(self.numbers)

    def files(self, index: int) -> list[Path]:
        return [self.labelled, self.normals.file(self.numbers[index])]

    def list_files(self) -> list[Path]:
        return self.lists

    def __getitem__(self, index: int) -> ProbeSample:
        number = self.numbers[index]
        image, depth = self._image(number)
        normals = self.normals.read(number)
        check_size(self.normals.file(number), normals, self.labelled, image)
        return ProbeSample(f"{number + 1:04d}", image, depth=depth, normals=normals)

    def _image(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and measured depth; MATLAB's axes come in the opposite order."""
        try:
            import h5py
        except ImportError as error:
            raise InputError(f"{self.labelled} is a MATLAB 7.3 file: install h5py (pip install h5py).") from error
        try:
            # opened anew each time: a handle cannot be shared by processes
            with h5py.File(self.labelled, "r") as content:
                if number >= len(content["images"]):  # type: ignore
                    raise InputError(
                        f"{self.labelled} has no image {number + 1}, which the list names: download both again."
                    )
                image = np.asarray(content["images"][number]).transpose(2, 1, 0)  # type: ignore
                depth = np.asarray(content["rawDepths"][number]).T  # type: ignore
        except InputError:
            raise
        except (*_BROKEN, RuntimeError) as error:
            raise InputError(f"{self.labelled} cannot be read ({error}): download it again.") from error
        if image.dtype != np.uint8 or image.shape[2:] != (3,) or depth.shape != image.shape[:2]:
            raise InputError(f"{self.labelled}: `images` or `rawDepths` is not as published: download it again.")
        depth = np.where(np.isfinite(depth) & (depth > 0) & (depth <= DEEPEST), depth, 0).astype(np.float32)
        return np.ascontiguousarray(image), depth


def _find_normals(root: Path, exact: bool) -> _Normals:
    """The published normals in a form that holds numbers and nothing else; the released code reads the array."""
    folder, array = root / "nyu_normals_gt" / "test", root / "all_normals.npy"
    if folder.is_dir() and not (exact and array.is_file()):
        return _Normals(folder, None)
    if array.is_file():
        return _Normals(None, array)
    for pickled in ("all_normals.pklz", "nyuv2_snorm_all.pkl"):
        if (root / pickled).is_file():
            kept, opened = ("d['all_normals']", "gzip.open") if pickled.endswith("z") else ("d['snorms']", "open")
            axes = "" if pickled.endswith("z") else ".transpose(0, 2, 3, 1)"
            raise InputError(
                f"{root / pickled} is a pickle, which is not opened because it can run code: unpack "
                f"nyu_normals_gt.zip (L. Ladicky) to {folder.parent}, or, if you trust the file, keep its numbers "
                "alone with python -c "
                f"\"import gzip, pickle, numpy; d = pickle.load({opened}('{root / pickled}', 'rb')); "
                f"numpy.save('{array}', {kept}{axes}.astype('float32'))\"."
            )
    raise InputError(f"{folder} is missing: unpack nyu_normals_gt.zip (L. Ladicky's normals) to {folder.parent}.")


def _test_numbers(root: Path) -> tuple[list[Path], list[int]]:
    """The list that says which images are tested, and their numbers from 0."""
    listed, splits = root / "test_SN40.json", root / "splits.mat"
    source = listed if listed.is_file() else splits
    try:
        if listed.is_file():
            found = [int(Path(row["img"]).name.split("_")[0]) for row in json.loads(listed.read_text())]
        elif splits.is_file():
            found = [int(number) for number in np.ravel(_load_mat(splits, ["testNdxs"])["testNdxs"])]
        else:
            source = root / "nyu_normals_gt" / "test"
            found = [int(file.stem) for file in source.glob("*.png") if file.stem.isdigit()]
            if not found:
                raise InputError(
                    f"{splits} is missing, which says what is tested: download it from NYU Depth v2's page."
                )
    except InputError:
        raise
    except _BROKEN as error:
        raise InputError(f"{source} cannot be read ({error}): restore it.") from error
    if not found or min(found) < 1:
        raise InputError(f"{source} names no images, or one below 1 although they are counted from 1: restore it.")
    return [source] if source.is_file() else [], sorted(number - 1 for number in found)
