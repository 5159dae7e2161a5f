"""Our procedural rooms, with everything that can be known of them; the layout is that of `scenes.rooms.writing`."""

from typing import Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules
from snd_nerfstudio.probing.datasets.splits import read_lines

FILES = {
    "depth": "depth/{stem}.png",
    "normals": "normals/{stem}.png",
    "labels": "semantics/{stem}.png",
    "instances": "instance_segmentation/{stem}.JPG.png",
}


def scene_of(name: str) -> Optional[str]:
    """The room in a sample's name."""
    return name.partition("/")[0]


def open_dataset(request: Request) -> FileDataset:
    """All labels whatever the task, as far as their folders exist; rooms to test on are not trained on."""
    metadata = request.root / "metadata"
    listed = metadata / f"nvs_sem_{'train' if request.split == 'train' else 'val'}.txt"
    names = metadata / "semantic_classes.txt"
    classes, lists = (), [listed]
    if request.task == "segmentation" or names.is_file():
        classes = tuple(read_lines(names))
        lists.append(names)
    needed = "labels" if request.task == "segmentation" else request.task
    entries = []
    for scene in sorted(read_lines(listed)):
        folder = request.root / "scenes" / scene
        if not (folder / "images").is_dir():
            raise InputError(f"Folder {folder / 'images'} is missing: make the rooms again, in the layout `snd`.")
        present = [k for k, f in FILES.items() if (folder / f).parent.is_dir() and (k != "labels" or classes)]
        if needed not in present:
            raise InputError(f"Folder {(folder / FILES[needed]).parent} is missing: make the rooms again.")
        for image in sorted((folder / "images").glob("*.JPG")):
            maps = {kind: folder / FILES[kind].format(stem=image.stem) for kind in present}
            entries.append(Entry(f"{scene}/{image.stem}", image, **maps))
    return FileDataset(request, entries, Rules(zero_is_none=False, classes=classes), lists, scene_of)
