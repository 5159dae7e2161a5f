"""Datasets to probe with, in the layouts they are published in; each is opened by its name."""

import importlib
from dataclasses import dataclass, field
from pathlib import Path

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.samples import ProbeDataset, Protocol, Split, Task


@dataclass(frozen=True)
class KnownDataset:
    """What is known of a dataset before it is opened."""

    module: str
    """Module of this package that opens it."""
    tasks: tuple[Task, ...]
    folders: tuple[str, ...]
    """Names that its own folder has, in which it is looked for below the folder that is given."""
    counts: dict[tuple[Task, Split], int] = field(default_factory=dict)
    """Published numbers of samples."""
    typical_depth: tuple[float, float] = (0.2, 10.0)
    """Metres that the median of a depth map lies between."""


DATASETS: dict[str, KnownDataset] = {
    "scannetpp": KnownDataset(
        "scannetpp",
        ("depth", "segmentation"),
        ("scannetpp_probe",),
        {("segmentation", "train"): 140_451, ("segmentation", "test"): 30_638},
    ),
    "scannet": KnownDataset("scannet", ("depth", "segmentation"), ("scannet_probe", "scannet_frames_25k")),
    "nyuv2": KnownDataset(
        "nyuv2",
        ("depth", "normals", "segmentation"),
        ("nyuv2",),
        {
            ("depth", "train"): 795,
            ("depth", "test"): 654,
            ("segmentation", "train"): 795,
            ("segmentation", "test"): 654,
            ("normals", "test"): 654,
        },
    ),
    "ade20k": KnownDataset(
        "ade20k",
        ("segmentation",),
        ("ADEChallengeData2016",),
        {("segmentation", "train"): 20_210, ("segmentation", "test"): 2_000},
    ),
    "voc2012": KnownDataset(
        "voc2012",
        ("segmentation",),
        ("VOC2012", "VOCdevkit/VOC2012"),
        {("segmentation", "train"): 1_464, ("segmentation", "test"): 1_449},
    ),
    "kitti": KnownDataset(
        "kitti", ("depth",), ("kitti",), {("depth", "train"): 850, ("depth", "test"): 150}, typical_depth=(3.0, 60.0)
    ),
    "rooms": KnownDataset("rooms", ("depth", "normals", "segmentation"), ("rooms",)),
}
"""Every dataset that can be opened."""


def dataset_folder(name: str, root: Path) -> Path:
    """The dataset's own folder: the given one, or the published one below it.

    Raises:
        InputError: there is no such dataset or folder.
    """
    if name not in DATASETS:
        raise InputError(f"There is no dataset {name}: choose one of {', '.join(DATASETS)}.")
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"Folder {root} does not exist: give the folder of {name}.")
    for folder in DATASETS[name].folders:
        if root.name != Path(folder).name and (root / folder).is_dir():
            return root / folder
    return root


def open_dataset(
    name: str, root: Path, task: Task, split: Split, protocol: Protocol = "fixed", seed: int = 0
) -> ProbeDataset:
    """One split of a dataset.

    Args:
        name: one of `DATASETS`.
        root: the dataset's folder, or the one above it.
        task: what is probed.
        split: `test` is what the paper validates and tests on.
        protocol: `paper` splits as the released code does; `fixed` keeps scenes apart where that does not.
        seed: of splits that nobody published.

    Returns:
        Samples in an order that depends on names alone.

    Raises:
        InputError: there is no such dataset or task, or a folder, list or label is missing.
    """
    folder = dataset_folder(name, root)
    known = DATASETS[name]
    if task not in known.tasks:
        raise InputError(f"Dataset {name} has no {task}: it has {', '.join(known.tasks)}.")
    if split not in ("train", "test") or protocol not in ("paper", "fixed"):
        raise InputError(f"Split {split} or protocol {protocol} is unknown: give train or test, paper or fixed.")
    from snd_nerfstudio.probing.datasets.files import Request

    module = importlib.import_module(f"{__name__}.{known.module}")
    dataset = module.open_dataset(Request(name, folder, task, split, protocol, seed))
    published = known.counts.get((task, split))
    if published is not None and len(dataset) != published:
        note = f"{dataset.root} has {len(dataset)} samples, the published split has {published}."
        dataset.notes = (*dataset.notes, note)
    return dataset


def check_dataset(name: str, root: Path) -> list[str]:
    """What is missing or wrong, a sentence each that names a path and what to do; see `checking.check_dataset`."""
    from snd_nerfstudio.probing.datasets import checking

    return checking.check_dataset(name, root)
