"""ScanNet-1500: SuperGlue's 1500 test pairs as LoFTR packages them.

test.npz                        `name`: whole numbers (1500, 4): scene, scan, first frame, second frame
intrinsics.npz                  one 3 x 3 matrix per scene, of 640 x 480 pixels
sceneSSSS_RR/color/<frame>.jpg
sceneSSSS_RR/depth/<frame>.png  16 bits, millimetres
sceneSSSS_RR/pose/<frame>.txt   camera-to-world
"""

import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs.base import (
    PairSet,
    PairView,
    PosedPair,
    check_rigid,
    missing_files,
    read_depth,
    read_image,
)

INTRINSICS_SIZE = (480, 640)
"""Height and width that the intrinsics belong to."""
REMEDY = (
    "unpack LoFTR's scannet_test_1500 there, with test.npz and intrinsics.npz of LoFTR's repository beside the scenes"
)
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
"""What numpy raises on an archive that is damaged or holds pickled objects."""


class ScanNetPairs(PairSet):
    """Pairs of ScanNet as LoFTR packages them.

    Raises:
        InputError: a list is missing or not what it should be.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.frames = read_list(self.root)
        self.intrinsics = read_intrinsics(self.root)

    def __len__(self) -> int:
        return len(self.frames)

    def scene(self, index: int) -> str:
        """Name of a pair's scene."""
        return f"scene{self.frames[index, 0]:04d}_{self.frames[index, 1]:02d}"

    def files(self, kind: str, ending: str) -> list[Path]:
        """The files of one kind, two per pair in the order of the pairs."""
        return [
            self.root / self.scene(index) / kind / f"{frame}{ending}"
            for index in range(len(self))
            for frame in self.frames[index, 2:]
        ]

    def read(self, index: int) -> PosedPair:
        """See `PairSet.read`."""
        scene, (first, second) = self.scene(index), self.frames[index, 2:].tolist()
        if scene not in self.intrinsics:
            raise InputError(f"{self.root / 'intrinsics.npz'} has no {scene}, which test.npz lists: {REMEDY}.")
        folder = self.root / scene
        poses = [read_pose(folder / "pose" / f"{frame}.txt") for frame in (first, second)]
        return PosedPair.of(
            self._view(scene, first),
            self._view(scene, second),
            relative_pose=np.linalg.inv(poses[1]) @ poses[0],
            name=f"{scene}/{first}-{second}",
            scene=scene,
        )

    def _view(self, scene: str, frame: int) -> PairView:
        depth = read_depth(self.root / scene / "depth" / f"{frame}.png")
        matrix = scaled(self.intrinsics[scene], INTRINSICS_SIZE, depth.shape)
        return PairView(read_image(self.root / scene / "color" / f"{frame}.jpg"), depth, matrix)


def read_list(root: Path) -> Int[np.ndarray, "n 4"]:
    """The pairs of `test.npz`: scene, scan, first and second frame.

    Raises:
        InputError: the file is missing, damaged, holds pickled objects or an array of another shape.
    """
    file = root / "test.npz"
    names = _open(file, "name")["name"]
    if names.ndim != 2 or names.shape[1] != 4 or names.dtype.kind not in "iu" or len(names) == 0:
        raise InputError(f"{file}: `name` is {names.dtype} of shape {names.shape}, not (n, 4) whole: {REMEDY}.")
    return names.astype(np.int64)


def read_intrinsics(root: Path) -> dict[str, Float[np.ndarray, "3 3"]]:
    """One matrix per scene, float64.

    Raises:
        InputError: the file is missing, damaged or holds something else.
    """
    file = root / "intrinsics.npz"
    matrices = _open(file)
    for scene, matrix in matrices.items():
        if matrix.shape != (3, 3) or matrix.dtype.kind not in "fiu" or not (np.diag(matrix) > 0).all():
            raise InputError(f"{file}: {scene} is not a 3 x 3 matrix of intrinsics: {REMEDY}.")
    return {scene: matrix.astype(np.float64) for scene, matrix in matrices.items()}


def read_pose(file: Path) -> Float[np.ndarray, "4 4"]:
    """A camera-to-world matrix in a text file.

    Raises:
        InputError: it is missing or not a rigid transform; ScanNet has -inf where tracking was lost.
    """
    try:
        pose = np.loadtxt(file, dtype=np.float64, ndmin=2)
    except FileNotFoundError as error:
        raise InputError(f"Pose {file} does not exist: {REMEDY}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"Pose {file} cannot be read ({error}): {REMEDY}.") from error
    return check_rigid(pose, f"Pose {file}")


def scaled(
    matrix: Float[np.ndarray, "3 3"], size: tuple[int, ...], wanted: tuple[int, ...]
) -> Float[np.ndarray, "3 3"]:
    """Intrinsics of an image of one height and width, for the same image at another."""
    return np.array([wanted[1] / size[1], wanted[0] / size[0], 1.0])[:, None] * matrix


def check(root: Path) -> list[str]:
    """What is missing or wrong, one sentence each; nothing if all pairs can be read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is not a folder: {REMEDY}."]
    found = []
    for reader in (read_list, read_intrinsics):
        try:
            reader(root)
        except InputError as error:
            found.append(str(error))
    if found:
        return found
    pairs = ScanNetPairs(root)
    unknown = sorted({pairs.scene(index) for index in range(len(pairs))} - set(pairs.intrinsics))
    if unknown:
        found.append(f"{root / 'intrinsics.npz'} lacks {len(unknown)} scenes, the first is {unknown[0]}: {REMEDY}.")
    for kind, ending, what in (
        ("color", ".jpg", "colour images"),
        ("depth", ".png", "depth maps"),
        ("pose", ".txt", "poses"),
    ):
        found += missing_files(pairs.files(kind, ending), what, REMEDY)
    return found


def _open(file: Path, needed: str = "") -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if needed and needed not in archive.files:
                raise InputError(f"{file} has no `{needed}`, only {', '.join(archive.files)}: {REMEDY}.")
            return {name: archive[name] for name in ([needed] if needed else archive.files)}
    except FileNotFoundError as error:
        raise InputError(f"{file} does not exist: {REMEDY}.") from error
    except InputError:
        raise
    except (*_UNREADABLE, AttributeError, TypeError) as error:
        raise InputError(f"{file} cannot be read ({error}): {REMEDY}.") from error
