"""Training and test images with the labels of one task, as tensors; which of them a step sees."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.augmentation import augment_depth, augment_normals, augment_segmentation
from snd_nerfstudio.probing.protocols import AnyProbe, DepthProbe, NormalsProbe
from snd_nerfstudio.probing.samples import ProbeDataset, ProbeSample, Task

Labels = dict[str, Tensor]
"""``depth`` [b, H, W] in metres, 0 = none; or ``normals`` [b, 3, H, W] and ``measured`` [b, H, W], whether there is a
depth; or ``labels`` [b, H, W] of classes."""


def windowed(dataset: ProbeDataset, index: int) -> ProbeSample:
    """A sample with the maps that its task needs and no others, cut to the dataset's window.

    Raises:
        InputError: it lacks what its task needs, or cannot be read.
    """
    sample = dataset[index]
    needed = {"depth": ("depth",), "normals": ("depth", "normals"), "segmentation": ("labels",)}[dataset.task]
    missing = [kind for kind in needed if getattr(sample, kind) is None]
    if missing:
        raise InputError(
            f"Sample {sample.name} of {dataset.name} has no {missing[0]}, which the {dataset.task} probe needs: "
            "restore its files."
        )
    kept = {kind: getattr(sample, kind) for kind in ("image", *needed)}
    if dataset.window is not None:
        top, bottom, left, right = dataset.window
        kept = {kind: array[top:bottom, left:right] for kind, array in kept.items()}
    return ProbeSample(sample.name, **kept)


def image_tensor(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[Tensor, "3 H W"]:
    """Channels first."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def label_tensors(
    task: Task,
    depth: Optional[Float[np.ndarray, "H W"]],
    normals: Optional[Float[np.ndarray, "H W 3"]],
    labels: Optional[Shaped[np.ndarray, "H W"]],
) -> Labels:
    """What one image's labels are in `Labels`, without the axis of the batch."""
    if task == "depth":
        assert depth is not None
        return {"depth": torch.from_numpy(np.ascontiguousarray(depth))}
    if task == "normals":
        assert depth is not None and normals is not None
        rows = np.ascontiguousarray(normals.transpose(2, 0, 1))
        return {"normals": torch.from_numpy(rows), "measured": torch.from_numpy(depth > 0)}
    assert labels is not None
    return {"labels": torch.from_numpy(np.ascontiguousarray(labels))}


def labels_of(sample: ProbeSample, task: Task) -> Labels:
    """Labels of a whole sample."""
    return label_tensors(task, sample.depth, sample.normals, sample.labels)


def training_example(
    dataset: ProbeDataset, index: int, settings: AnyProbe, generator: np.random.Generator
) -> tuple[Tensor, Labels]:
    """An image, [3, H, W] in bytes or in [0, 1], with its labels; changed at random if the settings say so.

    Args:
        dataset: of which.
        index: which.
        settings: of the probe.
        generator: of all that is random.

    Raises:
        InputError: the sample cannot be read, or is smaller than the crop.
    """
    sample = windowed(dataset, index)
    if not settings.augment:
        return image_tensor(sample.image), labels_of(sample, dataset.task)
    depth, normals, labels = sample.depth, sample.normals, sample.labels
    try:
        if isinstance(settings, DepthProbe):
            assert depth is not None
            image, depth = augment_depth(sample.image, depth, generator, settings.augmentation(dataset.name))
        elif isinstance(settings, NormalsProbe):
            assert depth is not None and normals is not None
            changes = settings.augmentation(dataset.name)
            image, normals, depth = augment_normals(sample.image, normals, depth, generator, changes)
        else:
            assert labels is not None
            image, labels = augment_segmentation(sample.image, labels, generator, settings.augmentation(dataset.name))
    except InputError as error:
        raise InputError(f"Sample {sample.name} of {dataset.name}: {error}") from error
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return pixels, label_tensors(dataset.task, depth, normals, labels)


def step_indices(step: int, images: int, settings: AnyProbe) -> list[int]:
    """The images of a step, a function of seed and step alone.

    Every epoch takes each image once, in an order of its own or by name; what is no whole batch at its end is left
    out or makes a smaller batch.

    Args:
        step: from 0.
        images: how many there are.
        settings: of the probe.

    Raises:
        InputError: there are fewer images than one batch has.
    """
    epoch, place = divmod(step, settings.steps_per_epoch(images))
    order = np.random.default_rng((settings.seed, 0, epoch)).permutation(images) if settings.shuffle else range(images)
    return [int(index) for index in order[place * settings.batch : (place + 1) * settings.batch]]


class TrainingBatches:
    """The batches of an uncached training, decoded by threads while the step before runs.

    Args:
        dataset: what to train on.
        settings: of the probe.
    """

    def __init__(self, dataset: ProbeDataset, settings: AnyProbe) -> None:
        self.dataset, self.settings = dataset, settings
        self.pool = ThreadPoolExecutor(settings.workers)
        self.ahead: tuple[int, Sequence[Future]] = (-1, ())

    def __call__(self, step: int) -> tuple[Tensor, Labels]:
        """Images and labels of a step; the next one is begun if there is one.

        Raises:
            InputError: a sample cannot be read, or images of a batch differ in size.
        """
        ready = self.ahead[1] if self.ahead[0] == step else self._begin(step)
        if step + 1 < self.settings.steps(len(self.dataset)):
            self.ahead = (step + 1, self._begin(step + 1))
        images, labels = zip(*(future.result() for future in ready), strict=True)
        if len({image.shape for image in images}) > 1:
            raise InputError(
                f"Images of {self.dataset.name} differ in size and cannot be batched whole: give --batch 1 or "
                "--augment."
            )
        return torch.stack(images), {kind: torch.stack([row[kind] for row in labels]) for kind in labels[0]}

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(wait=True, cancel_futures=True)

    def _begin(self, step: int) -> list[Future]:
        indices = step_indices(step, len(self.dataset), self.settings)
        return [self.pool.submit(self._example, step, place, index) for place, index in enumerate(indices)]

    def _example(self, step: int, place: int, index: int) -> tuple[Tensor, Labels]:
        generator = np.random.default_rng((self.settings.seed, 1, step, place))
        return training_example(self.dataset, index, self.settings, generator)
