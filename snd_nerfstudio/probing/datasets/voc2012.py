"""PASCAL VOC 2012 without the additional SBD labels.

ImageSets/Segmentation/{train,val}.txt     1,464 and 1,449 names
JPEGImages/<name>.jpg
SegmentationClass/<name>.png               palette images: 0 = background, 1 to 20, 255 = none
"""

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.classes import VOC21
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import read_lines


def open_dataset(request: Request) -> FileDataset:
    """Segmentation, with the official split; background is a class."""
    root = request.root
    listed = root / "ImageSets" / "Segmentation" / f"{'train' if request.split == 'train' else 'val'}.txt"
    names = sorted(read_lines(listed))
    for folder in ("JPEGImages", "SegmentationClass"):
        if not (root / folder).is_dir():
            raise InputError(f"Folder {root / folder} is missing: unpack VOCtrainval_11-May-2012.tar there.")
    entries = [
        Entry(name, root / "JPEGImages" / f"{name}.jpg", labels=root / "SegmentationClass" / f"{name}.png")
        for name in names
    ]
    return FileDataset(request, entries, Rules(zero_is_none=False, classes=VOC21), [listed])
