"""ScanNet++ as FiT3D published it for evaluation (`scannetpp_probe`).

    images/{training,validation}/**/*.JPG          584x876
    annotations/{training,validation}/**/*.png     0 = none, 1 to 100
    scannetpp_train.txt, scannetpp_val.txt         <image> <depth> [focal]; depth in millimetres

Its split keeps scenes apart: 230 to train, 50 to test.
"""

import re
from typing import Optional

from snd_nerfstudio.probing.datasets.classes import SCANNETPP100
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import index_entries, paired_entries


def scene_of(name: str) -> Optional[str]:
    """The scene's ten hexadecimal digits in a path."""
    found = re.search(r"(?<![0-9a-f])[0-9a-f]{10}(?![0-9a-f])", name)
    return found[0] if found else None


def open_dataset(request: Request) -> FileDataset:
    """Depth from index lists or segmentation from folders; both protocols use the published split."""
    root, train = request.root, request.split == "train"
    if request.task == "depth":
        listed = root / f"scannetpp_{'train' if train else 'val'}.txt"
        entries = index_entries(root, listed)
        return FileDataset(request, entries, Rules(max_depth=20.0), [listed], scene_of)
    part = "training" if train else "validation"
    entries: list[Entry] = paired_entries(root / "images" / part, root / "annotations" / part, ".JPG")
    return FileDataset(request, entries, Rules(classes=SCANNETPP100), scene_of=scene_of)
