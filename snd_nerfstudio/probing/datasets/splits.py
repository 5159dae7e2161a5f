"""Lists of samples, pairs of folders, and splits that nobody published."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Optional, TypeVar

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.files import Entry

T = TypeVar("T")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty, stripped.

    Raises:
        InputError: the file is missing or no text.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"List {file} is missing: download it with the dataset, or write it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"List {file} cannot be read ({error}): restore it.") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_index(file: Path) -> list[tuple[str, str]]:
    """Image and depth map of every line ``<image> <depth> [focal]`` of a list, sorted by image.

    Leading slashes are dropped, and lines whose depth is ``None`` (the format of the released code, also on
    KITTI, where it looked for ``None`` after the path had been joined and so never found it).

    Raises:
        InputError: the file is missing, or a line has no second word.
    """
    pairs = []
    for number, line in enumerate(read_lines(file), start=1):
        words = line.split()
        if len(words) < 2:
            raise InputError(f"List {file}, line {number}: `{line}` is not `<image> <depth> [focal]`, correct it.")
        if words[1] != "None":
            pairs.append((words[0].lstrip("/"), words[1].lstrip("/")))
    return sorted(pairs)


def index_entries(root: Path, listed: Path) -> list[Entry]:
    """What `read_index` finds in a list, as files below a folder; samples are named as images, without suffix."""
    pairs = read_index(listed)
    return [Entry(Path(image).with_suffix("").as_posix(), root / image, depth=root / depth) for image, depth in pairs]


def paired_entries(images: Path, labels: Path, suffix: str, by_number: bool = False, prefix: str = "") -> list[Entry]:
    """Images of a folder and those below it, and the PNG with labels of each.

    Args:
        images: folder of images.
        labels: folder with the same tree of labels.
        suffix: of images, in capitals or not.
        by_number: where names differ, pair files by the number that their names end with.
        prefix: put before the names of samples.

    Returns:
        Entries sorted by the image's path, which without suffix is their name.

    Raises:
        InputError: a folder is missing or empty, or an image has no labels.
    """
    for folder in (images, labels):
        if not folder.is_dir():
            raise InputError(f"Folder {folder} is missing: unpack the dataset's images and labels there.")
    names = _below(images, suffix)
    if not names:
        raise InputError(f"Folder {images} has no {suffix} images: unpack them there.")
    held = {name[: -len(".png")]: name for name in _below(labels, ".png")}
    found = {name: held.get(name[: -len(suffix)]) for name in names}
    if by_number and not any(found.values()):
        found = dict(zip(names, _numbered(names, held)))
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} images of {images} have no labels in {labels}, the first {missing[0]}: "
            "complete the labels, under the images' names with .png."
        )
    return [
        Entry(prefix + name[: -len(suffix)], images / name, labels=labels / file)
        for name, file in found.items()
        if file is not None
    ]


def _below(folder: Path, suffix: str) -> list[str]:
    """Files of a folder and of all below it, also behind links, whose names end so, in capitals or not; sorted."""
    found = []
    for place, _, files in os.walk(folder, followlinks=True):
        inner = os.path.relpath(place, folder).replace(os.sep, "/")
        start = "" if inner == "." else f"{inner}/"
        found += [start + file for file in files if file.lower().endswith(suffix.lower())]
    return sorted(found)


def _numbered(names: Sequence[str], held: dict[str, str]) -> list[Optional[str]]:
    """The file with labels that has the same last number as each image."""

    def number(name: str) -> Optional[int]:
        last = re.search(r"(\d+)(\.\w+)?$", name)
        return int(last[1]) if last else None

    counts = Counter(number(name) for name in held)
    files = {number(name): file for name, file in held.items() if counts[number(name)] == 1}
    return [files.get(number(name)) if number(name) is not None else None for name in names]


def _draw(seed: int, name: str) -> float:
    """A number in [0, 1) that depends on seed and name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") / 2**64


def in_hashed_test(name: str, fraction: float, seed: int) -> bool:
    """Whether a name is in the test part of a split at random; it does not depend on which other names there are."""
    return _draw(seed, name) < fraction


def by_frame(fraction: float, seed: int) -> str:
    """What a split by the hash of names is called in reports."""
    return f"{fraction:.0%} of the frames to test, by the hash of their names, seed {seed}"


def by_scene(fraction: float, seed: int) -> str:
    """What a split by scenes is called in reports."""
    return f"scenes of {fraction:.0%} of the frames to test, seed {seed}"


def held_out_groups(groups: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Whole groups, at random, that together hold about a fraction of all samples: scenes that are held out.

    Args:
        groups: the group of every sample.
        fraction: of samples that are wanted.
        seed: another one holds out others.

    Returns:
        At least one group, and not all of them.

    Raises:
        InputError: there is one group only.
    """
    counts = Counter(groups)
    if len(counts) < 2:
        names = ", ".join(counts) or "none"
        raise InputError(f"All samples are of one scene ({names}): add another one, or use the `paper` protocol.")
    order = sorted(counts, key=lambda group: (_draw(seed, group), group))
    chosen, held = set(), 0
    for group in order[:-1]:
        if held >= fraction * len(groups):
            break
        chosen.add(group)
        held += counts[group]
    return chosen


def scene_disjoint(
    samples: Sequence[T],
    name_of: Callable[[T], str],
    scene_of: Callable[[str], Optional[str]],
    choose: Callable[[Sequence[str]], set[str]],
    test: bool,
) -> list[T]:
    """The samples of either side of a split that shares no scene.

    Args:
        samples: of both sides.
        name_of: name of a sample.
        scene_of: scene in a name, None if there is none.
        choose: from the scene of every sample those that are held out.
        test: which side.

    Raises:
        InputError: a name tells no scene.
    """
    scenes = [scene_of(name_of(sample)) for sample in samples]
    unknown = [sample for sample, scene in zip(samples, scenes) if scene is None]
    if unknown:
        raise InputError(
            f"`{name_of(unknown[0])}` does not tell its scene, so the `fixed` protocol cannot keep scenes "
            "apart: keep the published names, or use the `paper` protocol."
        )
    held_out = choose([scene for scene in scenes if scene is not None])
    return [sample for sample, scene in zip(samples, scenes) if (scene in held_out) == test]
