"""ADE20K's scene parsing benchmark (`ADEChallengeData2016`).

images/{training,validation}/*.jpg         20,210 and 2,000
annotations/{training,validation}/*.png    0 = none, 1 to 150
objectInfo150.txt                          a table of the classes, the names in its last column
"""

from pathlib import Path

from snd_nerfstudio.probing.datasets.files import FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import paired_entries, read_lines

CLASSES = 150


def open_dataset(request: Request) -> FileDataset:
    """Segmentation, with the official split."""
    part = "training" if request.split == "train" else "validation"
    table = request.root / "objectInfo150.txt"
    names = class_names(table) if table.is_file() else tuple(f"class {index + 1}" for index in range(CLASSES))
    entries = paired_entries(request.root / "images" / part, request.root / "annotations" / part, ".jpg")
    return FileDataset(request, entries, Rules(classes=names), [table] if table.is_file() else [])


def class_names(table: Path) -> tuple[str, ...]:
    """The first name of each class; numbers where the table is of another form."""
    rows = [line.split("\t") for line in read_lines(table)]
    names = {int(row[0]): row[-1].split(",")[0].strip() for row in rows if row[0].strip().isdigit()}
    return tuple(names.get(index + 1, f"class {index + 1}") for index in range(CLASSES))
