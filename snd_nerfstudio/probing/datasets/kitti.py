"""KITTI's depth selection: 1,000 frames, split 85 to 15.

    kitti/images, depth, kitti_train.txt, kitti_val.txt    <image> <depth> [focal]; file names alone count
    kitti/images, depth                                    without lists
    .../val_selection_cropped/{image,groundtruth_depth}    the download

Depth is in 1/256 m. Neither list nor seed is published. Without lists, protocol `paper` draws the split by the hash
of the names; `fixed` keeps whole drives apart, also where there are lists. Images are cut to 352x1216 (the "KB
crop"), which changes nothing on the download.
"""

import re
from pathlib import Path
from typing import Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import (
    by_frame,
    by_scene,
    held_out_groups,
    in_hashed_test,
    read_index,
    scene_disjoint,
)

HELD_OUT = 0.15
RULES = Rules(depth_unit=1 / 256, max_depth=80.0, eval_crop="garg", kb_crop=True)
FOLDERS = (
    ("images", "depth"),
    ("image", "groundtruth_depth"),
    *(
        (f"{outer}val_selection_cropped/image", f"{outer}val_selection_cropped/groundtruth_depth")
        for outer in ("", "depth_selection/", "data_depth_selection/")
    ),
)
"""Where images and depth may be."""


def scene_of(name: str) -> Optional[str]:
    """The drive in a file name."""
    found = re.search(r"\d{4}_\d\d_\d\d_drive_\d{4}", name)
    return found[0] if found else None


def open_dataset(request: Request) -> FileDataset:
    """Depth, with published or drawn split."""
    root, test = request.root, request.split == "test"
    present = [pair for pair in FOLDERS if (root / pair[0]).is_dir()]
    if not present:
        raise InputError(f"{root} has no folder images with KITTI's depth selection: unpack it to images and depth.")
    images, depths = root / present[0][0], root / present[0][1]
    if not depths.is_dir():
        raise InputError(f"Folder {depths} is missing: unpack the depth maps there.")
    every = {"train": root / "kitti_train.txt", "test": root / "kitti_val.txt"}
    lists: list[Path] = []
    rule = "published"
    fixed = request.protocol == "fixed"
    if any(file.is_file() for file in every.values()):
        lists = list(every.values()) if fixed else [every[request.split]]
        entries = _listed(images, depths, lists)
    else:
        entries = _paired(images, depths)
        if not fixed:
            rule = by_frame(HELD_OUT, request.seed)
            entries = [e for e in entries if in_hashed_test(e.name, HELD_OUT, request.seed) == test]
    if fixed:
        rule = by_scene(HELD_OUT, request.seed)

        def choose(drives):
            return held_out_groups(drives, HELD_OUT, request.seed)

        entries = scene_disjoint(entries, lambda entry: entry.name, scene_of, choose, test)
    return FileDataset(request, entries, RULES, lists, scene_of, rule)


def _listed(images: Path, depths: Path, lists: list[Path]) -> list[Entry]:
    """What lists name; of their paths the last part counts, which must then be unique."""
    listed: dict[str, tuple[str, str]] = {}
    for file in lists:
        for pair in read_index(file):
            name = Path(pair[0]).name
            if name in listed and listed[name] != pair:
                raise InputError(
                    f"List {file} names {listed[name][0]} and {pair[0]}, which both mean {images / name}: give every "
                    "image a file name of its own."
                )
            listed[name] = pair
    return [Entry(Path(n).stem, images / n, depths / Path(pair[1]).name) for n, pair in sorted(listed.items())]


def _paired(images: Path, depths: Path) -> list[Entry]:
    """Images with the depth maps of the same name, or of the name that the download gives them."""
    held = {file.stem: file for file in depths.glob("*.png")}
    entries, missing = [], []
    for image in sorted(file for file in images.iterdir() if file.suffix.lower() in (".png", ".jpg")):
        depth = held.get(image.stem) or held.get(image.stem.replace("_sync_image_", "_sync_groundtruth_depth_"))
        if depth is None:
            missing.append(image)
        else:
            entries.append(Entry(image.stem, image, depth))
    if missing:
        raise InputError(
            f"{len(missing)} images have no depth map in {depths}, the first one {missing[0]}: unpack both again."
        )
    return entries
