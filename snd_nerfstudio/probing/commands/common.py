"""What the commands of `snd-probe` share: their flags, opening models and data, and measuring model by model."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.features import FeatureSettings, feature_map
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.models import ProbeModel, open_model, vision_transformers
from snd_nerfstudio.probing.progress import reporting
from snd_nerfstudio.probing.report import make_tables, to_markdown
from snd_nerfstudio.probing.results import (
    DatasetRecord,
    Measurement,
    ProbeResult,
    find_result,
    finished,
    write_result,
)
from snd_nerfstudio.probing.samples import ProbeDataset, ProbeSample

SOURCES = ("teacher", "student", "original")
"""What of a run can be probed."""


@dataclass
class Flags:
    """What all measuring commands take."""

    models: tuple[str, ...]
    """What to measure: NAME (published weights), NAME=WEIGHTS (a known name such as snd or fit3d-concat, a file, or
    random), or the config.yml of a run (its teacher), with @student or @original behind it for these."""
    data: Path
    """The dataset's folder."""
    dataset: str = "rooms"
    """Name of the dataset; `snd-probe --help` lists them."""
    out: Path = Path("probes")
    """Folder for results, pictures and trained heads. A result that is there already is not measured again."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or auto, which takes a GPU if there is one."""
    limit: Optional[int] = None
    """Use so many samples (or pairs) of each split, spread evenly. None: all."""
    again: bool = False
    """Measure anew what is there already."""

    def check(self) -> None:
        """Raise `InputError` where flags are impossible, or results could not be written."""
        if not self.models:
            raise InputError("--models names nothing to measure: give at least one, for example dinov2_vits14.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit {self.limit} must be at least 1.")
        check_writable(self.out)


# ---------------------------------------------------------------------- models and devices


def chosen_device(text: str) -> str:
    """The device of `--device`.

    Raises:
        InputError: there is no such device here.
    """
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--device {text} cannot be used ({reason}): give cpu or auto.") from error
    return text


def open_models(texts: Sequence[str], seed: int, device: str = "cpu") -> list[ProbeModel]:
    """The models of `--models`, on a device.

    Args:
        texts: see `Flags.models`.
        seed: of random weights.
        device: where to.

    Raises:
        InputError: one is named twice, unknown, or cannot be had.
    """
    if len(set(texts)) < len(texts):
        raise InputError(f"--models {' '.join(texts)} names a model twice: name each once.")
    models = []
    for text in texts:
        path, _, which = text.partition("@")
        model = (
            _open_run(Path(path), which or "teacher") if path.endswith((".yml", ".yaml")) else open_model(text, seed)
        )
        model.backbone.to(device)
        models.append(model)
    labels = [model.label for model in models]
    if len(set(labels)) < len(labels):
        twice = max(labels, key=labels.count)
        raise InputError(f"--models: two models would both be called {twice}: name one alone.")
    return models


def _open_run(config_file: Path, which: str) -> ProbeModel:
    """Teacher, student or original backbone of a training run."""
    if which not in SOURCES:
        raise InputError(f"--models {config_file}@{which}: behind the @ stands one of {', '.join(SOURCES)}.")
    from snd_nerfstudio.checksums import sha256
    from snd_nerfstudio.snd_pipeline import load_trained_model

    config, model, step = load_trained_model(config_file)
    name = f"{config.timestamp or config_file.parent.name}@{which}"
    settings = config.pipeline.model
    if which == "original":
        from snd_nerfstudio.backbones.build import build_trainable

        backbone = build_trainable(
            settings.backbone, settings.weights, config.pipeline.seed, settings.position_embedding
        )
        return ProbeModel.from_backbone(name, backbone, registry_name=settings.backbone, weights=settings.weights)
    checkpoint = sorted((config_file.parent / config.relative_model_dir).glob("step-*.ckpt"))[-1]
    return ProbeModel.from_backbone(
        name,
        model.merged_backbone(which),
        registry_name=settings.backbone,
        weights=f"run {config.method_name}",
        weights_source=str(checkpoint),
        weights_sha256={checkpoint.name: sha256(checkpoint)},
        method=config.method_name,
        step=step,
    )


def encoder(
    model: ProbeModel, settings: FeatureSettings, resized: Callable[[int, int], tuple[int, int]] = lambda h, w: (h, w)
) -> Callable[[np.ndarray], FeatureMap]:
    """What the measurements of matching call for each image.

    Args:
        model: gives the features.
        settings: which.
        resized: from height and width of an image to those that the backbone gets; by a bilinear antialiasing filter.
    """

    def encode(image: np.ndarray) -> FeatureMap:
        height, width = resized(*image.shape[:2])
        if (height, width) != image.shape[:2]:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        return feature_map(model, image, settings)

    return encode


# ---------------------------------------------------------------------- data


class Limited(ProbeDataset):
    """Some samples of a dataset, spread evenly.

    Args:
        whole: the dataset.
        count: how many; all of them if there are fewer.
    """

    def __init__(self, whole: ProbeDataset, count: int) -> None:
        self.whole = whole
        self.chosen = spread(len(whole), count)
        for name in ("name", "root", "task", "split", "classes", "min_depth", "max_depth", "eval_crop", "window"):
            setattr(self, name, getattr(whole, name))
        self.left_out, self.notes = whole.left_out, whole.notes
        fewer = f", {len(self.chosen)} of {len(whole)}" if len(self.chosen) < len(whole) else ""
        self.split_rule = f"{whole.split_rule}{fewer}"
        self.part = len(self.chosen) < len(whole)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> ProbeSample:
        return self.whole[self.chosen[index]]

    def files(self, index: int) -> list[Path]:
        """See `ProbeDataset.files`."""
        return self.whole.files(self.chosen[index])

    def list_files(self) -> list[Path]:
        """See `ProbeDataset.list_files`."""
        return self.whole.list_files()

    def scene(self, index: int) -> Optional[str]:
        """See `ProbeDataset.scene`."""
        return self.whole.scene(self.chosen[index])


def spread(total: int, count: int) -> list[int]:
    """So many of the numbers below a total, spread evenly; all of them if there are fewer."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist() if total else []


def check_writable(folder: Path) -> None:
    """Make a folder and write a file to it, before hours are spent on what goes there.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--out {folder} cannot be written ({error.strerror or error}): give another one.") from error


def check_block(models: Sequence[ProbeModel], block: int, flag: str) -> None:
    """Raise `InputError` where a model has no such transformer block."""
    for model in models:
        for backbone in vision_transformers(model.backbone):
            if not -backbone.blocks <= block < backbone.blocks:
                raise InputError(
                    f"{flag} {block}: {model.label} has {backbone.blocks} blocks, so give {-backbone.blocks} to "
                    f"{backbone.blocks - 1}."
                )


def open_splits(flags: Flags, task: Any, protocol: str, seed: int) -> tuple[ProbeDataset, ProbeDataset]:
    """Training and test images of a dataset; random splits are drawn with the seed.

    Raises:
        InputError: see `datasets.open_dataset`; or a split is empty.
    """
    from snd_nerfstudio.probing.datasets import open_dataset

    found = []
    for split in ("train", "test"):
        dataset = open_dataset(
            flags.dataset, flags.data, task, split, "paper" if protocol == "paper" else "fixed", seed
        )
        if len(dataset) == 0:
            raise InputError(f"--data {flags.data} has no image to {split} on: look with --check.")
        found.append(dataset if flags.limit is None else Limited(dataset, flags.limit))
    return found[0], found[1]


def record_of(train: ProbeDataset, test: ProbeDataset) -> DatasetRecord:
    """What a result says about its dataset; its notes are printed.

    Raises:
        InputError: a file is missing.
    """
    hashes = {dataset.split: dataset.content_hash() for dataset in (train, test)}
    notes = [*train.notes, *test.notes]
    notes += [f"{len(d.left_out)} frames of {d.root} are left out." for d in (train, test) if d.left_out]
    notes = tuple(dict.fromkeys(notes))
    for note in notes:
        print(f"Note: {note}", flush=True)
    rules = dict.fromkeys([train.split_rule, test.split_rule])
    return DatasetRecord(
        name=test.name,
        content_hash=" ".join(f"{split}:{value}" for split, value in hashes.items()),
        split_rule=" / ".join(rules),
        samples={"train": len(train), "test": len(test)},
        notes=notes,
        part=train.part or test.part,
    )


# ---------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Found:
    """What was measured of one model where nothing is trained."""

    metrics: dict[str, Optional[float]]
    details: dict[str, Any]


def measure(
    flags: Flags,
    models: Sequence[ProbeModel],
    describe: Callable[[ProbeModel], Measurement],
    run: Callable[[ProbeModel, Callable[[], None]], Found],
    steps: int,
    device: str,
) -> list[ProbeResult]:
    """Measure models one after the other and write their results; those that are there already are read instead.

    Args:
        flags: of the command.
        models: on their device.
        describe: what is measured of a model.
        run: measures it; calls its second argument after each of its steps.
        steps: of a model.
        device: for the record.

    Returns:
        The results, in the order of the models.

    Raises:
        InputError: a result cannot be read or written, or what measuring raises.
    """
    results = []
    with reporting() as progress:
        for model in models:
            what = describe(model)
            done = None if flags.again else find_result(what, flags.out)
            if done is None:
                counter = count(1)
                start = time.perf_counter()
                found = run(model, lambda: progress(f"{what.task}, {model.label}", next(counter), steps))
                seconds = time.perf_counter() - start
                done = finished(what, found.metrics, {}, seconds, device, details=found.details)
                # another process may have written it meanwhile
                write_result(done, flags.out, replace=flags.again or find_result(what, flags.out) is not None)
            else:
                announce_done(done, flags.out)
            results.append(done)
    return results


def announce_done(result: ProbeResult, folder: Path) -> None:
    """Say that a result is taken from an earlier time."""
    print(f"Already measured: {folder / result.what.file_name} (--again measures anew).", flush=True)


def show(results: Sequence[ProbeResult], folder: Path) -> None:
    """Print a table, and where more is."""
    print(to_markdown(make_tables(results)))
    print(f"Results are in {folder}; `snd-probe report --results {folder}` makes tables of all of them.", flush=True)
