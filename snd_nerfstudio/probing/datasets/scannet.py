"""ScanNet's frames, as the released code had them or as ScanNet publishes them.

    scannet_probe/train_index.txt, test_index.txt              <image> <depth> [focal]; depth in millimetres
    scannet_probe/{train,test}/{color,label}/**.{jpg,png}      labels: NYU40, 0 = none, 1 to 40
    scannet_frames_25k/sceneXXXX_YY/{color,depth,label,pose}/  the download, every hundredth frame

The paper splits the frames of `scannet_frames_25k` 80 to 20 at random and publishes neither list nor seed. Here
protocol `paper` draws them by the hash of their names; near duplicates of training frames are then tested. `fixed`
tests on rooms that are not trained on: those of `scannetv2_val.txt` if that list lies in the folder, else a fifth.

Colour (1296x968) is brought to the size of the depth maps or labels (640x480) where they differ, by area averages.
The window that depth is judged in was made for NYUv2's 640x480; `fixed` judges all of the image.
"""

import re
from typing import Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.classes import SCANNET40
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import (
    by_frame,
    by_scene,
    held_out_groups,
    in_hashed_test,
    index_entries,
    paired_entries,
    read_lines,
    scene_disjoint,
)

HELD_OUT = 0.2
"""Share of the frames that are tested on."""
FOLDER = re.compile(r"scene\d{4}_\d\d")


def scene_of(name: str) -> Optional[str]:
    """The room in a path, `scene0000` of `scene0000_01`: its scans show the same place."""
    found = re.search(r"scene\d{4}(?=_\d\d)", name)
    return found[0] if found else None


def open_dataset(request: Request) -> FileDataset:
    """Depth or segmentation, of either layout."""
    root, test = request.root, request.split == "test"
    raw = root.is_dir() and any(FOLDER.fullmatch(child.name) for child in root.iterdir())
    fixed = request.protocol == "fixed"
    rules = Rules(
        eval_crop="none" if fixed else "eigen",
        fit_image=True,
        classes=SCANNET40 if request.task == "segmentation" else (),
        label_hint="map raw ScanNet ids to NYU40 with the column nyu40id of scannetv2-labels.combined.tsv",
    )
    lists, rule = [], "published"
    if raw:
        entries = _frames(request)
        if not fixed:
            rule = by_frame(HELD_OUT, request.seed)
            entries = [e for e in entries if in_hashed_test(e.name, HELD_OUT, request.seed) == test]
    else:
        entries = []
        for part in ("train", "test") if fixed else (request.split,):
            if request.task == "depth":
                lists.append(root / f"{part}_index.txt")
                entries += index_entries(root, lists[-1])
            else:
                pairs = paired_entries(root / part / "color", root / part / "label", ".jpg", prefix=f"{part}/")
                entries += pairs
    if fixed:
        official, rule = root / "scannetv2_val.txt", by_scene(HELD_OUT, request.seed)
        if official.is_file():
            lists.append(official)
            rule = "scenes of scannetv2_val.txt to test"
            held_out = {scene_of(line) or line for line in read_lines(official)}

        def choose(scenes):
            return held_out if official.is_file() else held_out_groups(scenes, HELD_OUT, request.seed)

        entries = scene_disjoint(entries, lambda entry: entry.name, scene_of, choose, test)
    return FileDataset(request, entries, rules, lists, scene_of, rule)


def _frames(request: Request) -> list[Entry]:
    """All frames of `scannet_frames_25k` that have what the task needs."""
    kind = "depth" if request.task == "depth" else "label"
    entries = []
    for folder in sorted(child for child in request.root.iterdir() if FOLDER.fullmatch(child.name)):
        for part in ("color", kind):
            if not (folder / part).is_dir():
                raise InputError(
                    f"Folder {folder / part} is missing: unpack scannet_frames_25k.zip again, or remove the scene."
                )
        held = {file.stem: file for file in (folder / kind).glob("*.png")}
        for image in sorted((folder / "color").glob("*.jpg")):
            if image.stem not in held:
                raise InputError(f"{image} has no {kind} in {folder / kind}: unpack scannet_frames_25k.zip again.")
            labels = {"depth" if kind == "depth" else "labels": held[image.stem]}
            entries.append(Entry(f"{folder.name}/{image.stem}", image, **labels))
    return entries
