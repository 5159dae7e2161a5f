"""Semantic keypoints: SPair-71k (Min et al. 2019), and the share of them that features carry to the right place.

JPEGImages/<category>/<image>.jpg
Layout/{small,large}/{trn,val,test}.txt     names of pairs: 000001-<image>-<image>:<category>
PairAnnotation/{trn,val,test}/<pair>.json   src_kps and trg_kps [x, y], src_bndbox and trg_bndbox [left, top,
                                            right, bottom], category, viewpoint_variation
ImageAnnotation/<category>/<image>.json     kps: by number, [x, y] or null
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import FeatureMap, locate, sample
from snd_nerfstudio.probing.pairs.base import missing_files, read_image

REMEDY = "download SPair-71k (cvlab.postech.ac.kr/research/SPair-71k) and give the folder that it unpacks to"
Split = Literal["trn", "val", "test"]


@dataclass(frozen=True)
class KeypointPair:
    """Two images of objects of one category, and keypoints that both show."""

    images: tuple[UInt8[np.ndarray, "h0 w0 3"], UInt8[np.ndarray, "h1 w1 3"]]
    """RGB, at the size of the files."""
    points: tuple[Float[np.ndarray, "k 2"], Float[np.ndarray, "k 2"]]
    """Pixels (x, y), centres at +0.5."""
    boxes: tuple[Float[np.ndarray, "4"], Float[np.ndarray, "4"]]
    """Left, top, right and bottom of the objects, pixels."""
    category: str
    viewpoint: int
    """How different the viewpoints are: 0, 1 or 2."""
    name: str


class SPair71k:
    """Pairs of SPair-71k, read when they are asked for.

    Args:
        root: folder of the data set.
        split: which pairs.
        layout: `large` has all pairs, `small` a tenth of those for training.
        categories: only these; None: all.

    Raises:
        InputError: the list of pairs is missing, or none of them is of these categories.
    """

    def __init__(
        self,
        root: Path,
        split: Split = "test",
        layout: Literal["small", "large"] = "large",
        categories: Optional[Sequence[str]] = None,
    ) -> None:
        self.root, self.split = Path(root), split
        listed = read_layout(self.root / "Layout" / layout / f"{split}.txt")
        self.names = [name for name in listed if categories is None or name.split(":")[1] in categories]
        if not self.names:
            raise InputError(
                f"{self.root} has no pairs of {', '.join(categories or ())}: its categories are "
                f"{', '.join(sorted({name.split(':')[1] for name in listed}))}."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> KeypointPair:
        return self._read(self.names[index])

    def __iter__(self) -> Iterator[KeypointPair]:
        return (self._read(name) for name in self.names)

    def annotation_file(self, name: str) -> Path:
        """Where the annotation of a pair is."""
        return self.root / "PairAnnotation" / self.split / f"{name}.json"

    def image_files(self, name: str) -> list[Path]:
        """Where both images of a pair are."""
        pair, category = name.split(":")
        return [self.root / "JPEGImages" / category / f"{image}.jpg" for image in pair.split("-")[1:]]

    def _read(self, name: str) -> KeypointPair:
        file = self.annotation_file(name)
        try:
            content = json.loads(file.read_text())
            points = [np.array(content[f"{end}_kps"], dtype=np.float64).reshape(-1, 2) for end in ("src", "trg")]
            boxes = [np.array(content[f"{end}_bndbox"], dtype=np.float64).reshape(4) for end in ("src", "trg")]
            category, viewpoint = str(content["category"]), int(content["viewpoint_variation"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{file} cannot be read ({type(error).__name__}: {error}): {REMEDY}.") from error
        if len(points[0]) != len(points[1]) or len(points[0]) == 0 or (boxes[1][2:] <= boxes[1][:2]).any():
            raise InputError(f"{file} has no keypoints in common or an empty box: {REMEDY}.")
        images = [read_image(image) for image in self.image_files(name)]
        return KeypointPair(
            images=(images[0], images[1]),
            points=(points[0] + 0.5, points[1] + 0.5),  # stored as places of pixels
            boxes=(boxes[0], boxes[1]),
            category=category,
            viewpoint=viewpoint,
            name=name,
        )


def read_layout(file: Path) -> list[str]:
    """Names of pairs.

    Raises:
        InputError: the file is missing, empty, or holds something else.
    """
    try:
        names = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The list of pairs {file} cannot be read ({error}): {REMEDY}.") from error
    for name in names:
        if name.count(":") != 1 or name.split(":")[0].count("-") != 2:
            raise InputError(f"{file}: `{name}` is not of the form <number>-<image>-<image>:<category>: {REMEDY}.")
    if not names:
        raise InputError(f"The list of pairs {file} is empty: {REMEDY}.")
    return names


def check_spair(root: Path, split: Split = "test") -> list[str]:
    """What is missing or wrong, one sentence each; nothing if all pairs of a split can be read."""
    root = Path(root)
    if not root.is_dir():
        return [f"{root} is not a folder: {REMEDY}."]
    try:
        pairs = SPair71k(root, split)
    except InputError as error:
        return [str(error)]
    return [
        *missing_files([pairs.annotation_file(name) for name in pairs.names], "annotations", REMEDY),
        *missing_files([file for name in pairs.names for file in pairs.image_files(name)], "images", REMEDY),
    ]


# ---------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class KeypointResult:
    """Percentages of correct keypoints."""

    alpha: float
    """A keypoint is correct within this share of the longer side of the object's box."""
    per_image: Optional[float]
    """Mean over pairs, which is what SPair-71k's authors report; None without pairs."""
    per_point: Optional[float]
    """All keypoints count the same."""
    categories: dict[str, float]
    """Mean over pairs of each category."""
    category_mean: Optional[float]
    """Mean over categories."""
    viewpoints: dict[str, float]
    """Mean over pairs by how different the viewpoints are."""
    pairs: int
    points: int

    def plain(self) -> dict[str, Any]:
        """Numbers, strings and dicts alone, as JSON has them."""
        return asdict(self)


def transfer(
    maps: tuple[FeatureMap, FeatureMap],
    points: Float[Tensor, "k 2"],
    sizes: tuple[tuple[int, int], tuple[int, int]],
    window: Optional[int] = None,
    temperature: float = 0.05,
) -> Float[Tensor, "k 2"]:
    """Where the features of some points of the first image are in the second.

    Args:
        maps: features of both images.
        points: pixels (x, y) of the first image as it was before it was resized for the backbone.
        sizes: height and width of both images before that.
        window: see `matching.locate`.
        temperature: likewise.

    Returns:
        Pixels (x, y) of the second image, float32.

    Raises:
        InputError: a feature is not finite.
    """
    before, after = (points.new_tensor(size[::-1]).float() for size in sizes)
    queries = sample(maps[0].values, maps[0].in_map(points.float() / before))
    found = locate(maps[1].values, queries, window, temperature)
    return maps[1].in_image(found) * after.to(found)


def correct_keypoints(
    predicted: Float[Tensor, "k 2"], truth: Float[Tensor, "k 2"], box: Float[Tensor, "4"], alpha: float = 0.1
) -> Bool[Tensor, "k"]:
    """Whether keypoints lie within ``alpha * max(width, height)`` of the box from where they should be (PCK).

    Args:
        predicted: pixels (x, y).
        truth: likewise.
        box: left, top, right, bottom of the object that the true keypoints are of.
        alpha: share of the box's longer side.
    """
    return (predicted - truth).norm(dim=1) <= alpha * (box[2:] - box[:2]).max()


def evaluate_keypoints(
    pairs: Iterable[KeypointPair],
    encode: Callable[[UInt8[np.ndarray, "h w 3"]], FeatureMap],
    alpha: float = 0.1,
    window: Optional[int] = None,
    temperature: float = 0.05,
) -> KeypointResult:
    """Carry keypoints from the first image of each pair to the second by their features alone.

    Args:
        pairs: with keypoints.
        encode: resizes and normalises an image and computes its features.
        alpha: see `correct_keypoints`.
        window: see `matching.locate`.
        temperature: likewise.

    Raises:
        InputError: a file of a pair cannot be read, or a feature is not finite.
    """
    shares: list[tuple[float, str, int]] = []
    correct = points = 0
    for pair in pairs:
        with torch.no_grad():
            maps = encode(pair.images[0]), encode(pair.images[1])
            start, truth, box = (torch.from_numpy(array).float() for array in (*pair.points, pair.boxes[1]))
            sizes = tuple(image.shape[:2] for image in pair.images)
            found = transfer(maps, start.to(maps[0].values.device), sizes, window, temperature)  # type: ignore
        right = correct_keypoints(found.cpu(), truth, box, alpha)
        shares.append((float(right.double().mean()), pair.category, pair.viewpoint))
        correct, points = correct + int(right.sum()), points + len(right)
    by_category = _means((category, share) for share, category, _ in shares)
    return KeypointResult(
        alpha=alpha,
        per_image=100 * float(np.mean([share for share, *_ in shares])) if shares else None,
        per_point=100 * correct / points if points else None,
        categories=by_category,
        category_mean=float(np.mean(list(by_category.values()))) if by_category else None,
        viewpoints=_means((str(viewpoint), share) for share, _, viewpoint in shares),
        pairs=len(shares),
        points=points,
    )


def _means(entries: Iterable[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, share in entries:
        groups.setdefault(key, []).append(share)
    return {key: 100 * float(np.mean(groups[key])) for key in sorted(groups)}
