"""What is wrong with a dataset on disk, before hours are spent on it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import numpy as np

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import DATASETS, KnownDataset, dataset_folder, open_dataset
from snd_nerfstudio.probing.progress import Progress, quiet
from snd_nerfstudio.probing.samples import IGNORE, ProbeDataset, ProbeSample, Protocol, Split, Task

READ = 5
"""Samples that are decoded of each split, evenly spread."""
THREADS = 4
"""In which samples are decoded."""
NOTE = "Note: "
"""Begins what may be meant so."""
SCANNETPP_SIZE = (584, 876)
"""The released code resizes depth to these rows and columns before it is judged, with invalid zeros taking part."""


def check_dataset(
    name: str,
    root: Path,
    tasks: Optional[Sequence[Task]] = None,
    protocol: Protocol = "paper",
    thorough: bool = False,
    progress: Progress = quiet,
) -> list[str]:
    """What is missing or wrong in every split of every task.

    Looks for folders, lists and all files that they name, decodes samples, and compares depth with what is usual and
    numbers with what is published.

    Args:
        name: one of `DATASETS`.
        root: the dataset's folder, or the one above it.
        tasks: only these.
        protocol: whose splits.
        thorough: decode every sample, and not a few.
        progress: told how many samples of a split are decoded.

    Returns:
        Sentences that name a path and what to do, each once; those that begin with `NOTE` need not be mended. Empty:
        all is well.
    """
    try:
        dataset_folder(name, root)
    except InputError as error:
        return [str(error)]
    known, found = DATASETS[name], []
    for task in known.tasks if tasks is None else tasks:
        splits: dict[Split, ProbeDataset] = {}
        for split in ("train", "test"):
            try:
                splits[split] = open_dataset(name, root, task, split, protocol)
            except InputError as error:
                found.append(f"{task}, {split}: {error}")
                continue
            where, number = f"{task}, {split}", None if thorough else READ
            looked = _check_split(splits[split], known, number, lambda n, of, where=where: progress(where, n, of))
            found += [_marked(text, where) for text in looked]
        if len(splits) == 2:
            found += [_marked(text, task) for text in _compare(splits["train"], splits["test"])]
    return list(dict.fromkeys(found))


def _marked(text: str, where: str) -> str:
    note = text.startswith(NOTE)
    return f"{NOTE if note else ''}{where}: {text.removeprefix(NOTE)}"


def _check_split(
    dataset: ProbeDataset, known: KnownDataset, number: Optional[int], progress: Callable[[int, int], None]
) -> list[str]:
    """What is wrong with a split, so many of whose samples are decoded; None: all."""
    found = []
    if dataset.left_out:
        names = ", ".join(dataset.left_out[:3]) + (", ..." if len(dataset.left_out) > 3 else "")
        found.append(f"{NOTE}{len(dataset.left_out)} bad frames in {dataset.root} are left out: {names}.")
    found += [f"{NOTE}{note}" for note in dataset.notes]
    found += _missing(dataset)
    looked_at = range(len(dataset))
    if number is not None:
        looked_at = np.unique(np.linspace(0, len(dataset) - 1, number).round().astype(int)).tolist()
    unreadable: list[str] = []
    examples: dict[str, str] = {}

    def look(index: int) -> dict[str, str] | InputError:
        try:
            return _unusual(dataset[index], dataset, index, known)
        except InputError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:  # decoding leaves Python's lock
        for done, seen in enumerate(pool.map(look, looked_at), start=1):
            if isinstance(seen, InputError):
                unreadable.append(str(seen))
            else:
                examples = {**seen, **examples}  # the first of each kind
            progress(done, len(looked_at))
    # where nothing can be read, the cause is one
    return found + (unreadable[:1] if len(unreadable) == len(looked_at) else unreadable) + list(examples.values())


def _unusual(sample: ProbeSample, dataset: ProbeDataset, index: int, known: KnownDataset) -> dict[str, str]:
    """What is suspicious about one sample, by the kind of suspicion."""
    found: dict[str, str] = {}
    file = dataset.files(index)[0]
    if sample.depth is not None and dataset.task == "depth":
        measured = sample.depth[sample.depth > 0]
        near, far = known.typical_depth
        if len(measured) == 0:
            found["no depth"] = f"{NOTE}no pixel of {file} has depth."
        elif not near <= (middle := float(np.median(measured))) <= far:
            unit = "1/256 m" if dataset.name == "kitti" else "1 mm"
            found["unit"] = (
                f"The median depth of {dataset.files(index)[1]} would be {middle:.3g} m, which is not between "
                f"{near:g} and {far:g} m: depth must be stored in steps of {unit}, export it again."
            )
        if dataset.name == "scannetpp" and sample.depth.shape != SCANNETPP_SIZE:
            size, published = ("x".join(map(str, shape[::-1])) for shape in (sample.depth.shape, SCANNETPP_SIZE))
            found["size"] = f"{NOTE}{file} has {size} pixels, not the published {published}."
    if sample.labels is not None and dataset.task == "segmentation" and (sample.labels == IGNORE).all():
        found["no label"] = f"{NOTE}no pixel of {file} has a label."
    return found


def _missing(dataset: ProbeDataset) -> list[str]:
    files = sorted({file for index in range(len(dataset)) for file in dataset.files(index)})
    with ThreadPoolExecutor(8) as pool:
        absent = [file for file, there in zip(files, pool.map(Path.is_file, files)) if not there]
    if not absent:
        return []
    return [f"{len(absent)} of {len(files)} files are missing, the first one {absent[0]}: unpack them again."]


def _compare(train: ProbeDataset, test: ProbeDataset) -> list[str]:
    """What both splits have in common."""
    trained = {file for index in range(len(train)) for file in train.files(index)[:1]}
    tested = {file for index in range(len(test)) for file in test.files(index)[:1]}
    both = sorted(trained & tested)
    if both:
        return [f"{len(both)} images are trained and tested on, the first one {both[0]}: correct the lists."]
    scenes = {train.scene(i) for i in range(len(train))} & {test.scene(i) for i in range(len(test))} - {None}
    if not scenes:
        return []
    return [
        f"{NOTE}{train.root}: {len(scenes)} scenes are trained and tested on, so near duplicates are tested; "
        "protocol `fixed` keeps scenes apart."
    ]
