"""What differs between the linear probes: head, loss, schedule, prediction, scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, Optional, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import schedules
from snd_nerfstudio.probing.augmentation import flip_average, rescaled_size, slide
from snd_nerfstudio.probing.examples import Labels
from snd_nerfstudio.probing.features import ProbeFeatures
from snd_nerfstudio.probing.heads import DepthHead, NormalsHead, SegmentationHead
from snd_nerfstudio.probing.losses import angular_loss, gradient_loss, segmentation_loss, sig_loss
from snd_nerfstudio.probing.metrics.depth import depth_errors, mean_of_images
from snd_nerfstudio.probing.metrics.normals import NormalsScores, valid_normals
from snd_nerfstudio.probing.metrics.segmentation import SegmentationCounts
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.protocols import AnyProbe, DepthProbe, NormalsProbe, SegmentationProbe
from snd_nerfstudio.probing.samples import IGNORE, ProbeDataset

Settings = TypeVar("Settings", DepthProbe, NormalsProbe, SegmentationProbe)
Head = TypeVar("Head", DepthHead, NormalsHead, SegmentationHead)
Variant = dict[str, Any]
"""What tells the heads of one model apart: ``lr``, ``repeat``, and ``head_norm`` in segmentation."""


@runtime_checkable
class Scores(Protocol):
    """Collects the errors of a test set."""

    def update(self, prediction: Tensor, labels: Labels) -> None:
        """Add a batch of predictions of `Objective.predict`."""
        ...

    def compute(self) -> dict[str, float]:
        """Scores of all images."""
        ...


class Objective(ABC, Generic[Settings, Head]):
    """One task's probe on one pair of datasets.

    Args:
        settings: of the probe.
        train: gives depth range and classes.
        test: gives what is judged.
    """

    best_metric: str
    """The score by which the best step is chosen."""
    better: Literal["lower", "higher"]

    def __init__(self, settings: Settings, train: ProbeDataset, test: ProbeDataset) -> None:
        self.settings, self.train, self.test = settings, train, test

    def variants(self) -> list[Variant]:
        """The heads that every model gets."""
        return [{"lr": lr, "repeat": number} for lr in self.settings.rates for number in range(self.settings.repeats)]

    @abstractmethod
    def make_head(self, channels: int, class_channels: int, variant: Variant) -> Head:
        """A head with weights from the global generator."""

    @abstractmethod
    def loss(self, head: Head, features: ProbeFeatures, labels: Labels, step: int) -> Float[Tensor, ""]:
        """Of a batch, with its gradient to the head."""

    @abstractmethod
    def predict(self, head: Head, features: ProbeFeatures) -> Float[Tensor, "b k H W"]:
        """At the pixels of the images: depth in metres, normals with uncertainty, or logits."""

    @abstractmethod
    def scores(self) -> Scores:
        """An empty collection."""

    @abstractmethod
    def rate(self, step: int, total: int) -> float:
        """Factor on the learning rate."""

    def betas(self, step: int, total: int) -> tuple[float, float]:
        """AdamW's betas."""
        return self.settings.betas

    def on_image(
        self, image: Float[Tensor, "1 3 H W"], predict: Callable[[Tensor], Tensor]
    ) -> Shaped[Tensor, "1 k H W"]:
        """What is judged of a test image; ``predict`` gives what is predicted of images as they are seen."""
        return predict(image)

    def on_tokens(self, predictions: Sequence[Float[Tensor, "b k H W"]]) -> Shaped[Tensor, "b k H W"]:
        """What is judged where tokens are cached: from predictions of the images, and of their mirror images if
        `mirrors`."""
        return predictions[0]

    @property
    def mirrors(self) -> bool:
        """Whether test images are mirrored too."""
        return False


def head_inputs(model: ProbeModel, settings: AnyProbe) -> tuple[int, int]:
    """Channels of the tokens and of the class token that a head sees.

    Raises:
        InputError: a class token is wanted and there is none.
    """
    if settings.features.class_token and not model.class_channels:
        raise InputError(f"{model.label} has no class token: probe it with --features.no-class-token.")
    return model.channels, model.class_channels if settings.features.class_token else 0


# ---------------------------------------------------------------------- depth


class DepthScores:
    """Errors image by image, see `metrics.depth`."""

    def __init__(self, test: ProbeDataset) -> None:
        self.test = test
        self.images: list[dict[str, float]] = []

    def update(self, prediction: Float[Tensor, "b 1 H W"], labels: Labels) -> None:
        """Add images."""
        for guess, truth in zip(prediction[:, 0].cpu(), labels["depth"].cpu(), strict=True):
            errors = depth_errors(guess, truth, self.test.min_depth, self.test.max_depth, self.test.eval_crop)
            self.images.append(errors)

    def compute(self) -> dict[str, float]:
        """Means over images."""
        return mean_of_images(self.images)


class DepthObjective(Objective[DepthProbe, DepthHead]):
    """Expected depth of 256 bins."""

    best_metric = "abs_rel"
    better = "lower"

    def make_head(self, channels: int, class_channels: int, variant: Variant) -> DepthHead:
        return DepthHead(channels, self.train.min_depth, self.train.max_depth, class_channels)

    def loss(self, head: DepthHead, features: ProbeFeatures, labels: Labels, step: int) -> Float[Tensor, ""]:
        depth = self._depth(head, features)
        loss = sig_loss(depth, labels["depth"], step, self.settings.mean_only_steps)
        if self.settings.gradient_weight:
            loss = loss + self.settings.gradient_weight * gradient_loss(depth, labels["depth"])
        return loss

    def predict(self, head: DepthHead, features: ProbeFeatures) -> Float[Tensor, "b 1 H W"]:
        return self._depth(head, features).clamp(self.train.min_depth, self.train.max_depth)[:, None]

    def _depth(self, head: DepthHead, features: ProbeFeatures) -> Float[Tensor, "b H W"]:
        logits = head(features.tokens, features.class_token)
        return head.at_pixels(logits, features.size, features.padding, self.settings.features.pad_crop)

    def scores(self) -> DepthScores:
        return DepthScores(self.test)

    def rate(self, step: int, total: int) -> float:
        return schedules.depth_rate(step, total, self.settings.warmup)

    def betas(self, step: int, total: int) -> tuple[float, float]:
        return schedules.depth_betas(step, total) if self.settings.beta_cycle else self.settings.betas

    def on_image(
        self, image: Float[Tensor, "1 3 H W"], predict: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "1 k H W"]:
        return flip_average(image, predict) if self.mirrors else predict(image)

    def on_tokens(self, predictions: Sequence[Float[Tensor, "b k H W"]]) -> Float[Tensor, "b k H W"]:
        return (predictions[0] + predictions[1].flip(-1)) / 2 if self.mirrors else predictions[0]

    @property
    def mirrors(self) -> bool:
        return self.settings.flip_average


# ---------------------------------------------------------------------- normals


class MaskedNormalsScores:
    """Angles, over the pixels of one mask or more."""

    def __init__(self, settings: NormalsProbe) -> None:
        self.masks = {mask: NormalsScores() for mask in settings.test_masks}

    def update(self, prediction: Float[Tensor, "b 4 H W"], labels: Labels) -> None:
        """Add images."""
        normals, measured = labels["normals"].cpu(), labels["measured"].cpu()
        for mask, scores in self.masks.items():
            valid = valid_normals(measured.float(), normals, mask == "normal")
            scores.update(prediction.cpu(), normals, valid)

    def compute(self) -> dict[str, float]:
        """Scores of the first mask, and those of the others behind their names."""
        found: dict[str, float] = {}
        for number, (mask, scores) in enumerate(self.masks.items()):
            found |= {f"{mask}/{name}" if number else name: value for name, value in scores.compute().items()}
        return found


class NormalsObjective(Objective[NormalsProbe, NormalsHead]):
    """A direction and its uncertainty."""

    best_metric = "rmse"
    better = "lower"

    def make_head(self, channels: int, class_channels: int, variant: Variant) -> NormalsHead:
        return NormalsHead(channels, class_channels)

    def loss(self, head: NormalsHead, features: ProbeFeatures, labels: Labels, step: int) -> Float[Tensor, ""]:
        need_normal = self.settings.train_mask == "normal"
        valid = valid_normals(labels["measured"].float(), labels["normals"], need_normal)
        return angular_loss(self.predict(head, features), labels["normals"], valid)

    def predict(self, head: NormalsHead, features: ProbeFeatures) -> Float[Tensor, "b 4 H W"]:
        maps = head(features.tokens, features.class_token)
        return head.at_pixels(maps, features.size, features.padding, self.settings.features.pad_crop)

    def scores(self) -> MaskedNormalsScores:
        return MaskedNormalsScores(self.settings)

    def rate(self, step: int, total: int) -> float:
        return schedules.normals_rate(step, total, self.settings.warmup)


# ---------------------------------------------------------------------- segmentation


class ClassScores:
    """Accuracy and intersection over union of the whole set."""

    def __init__(self, classes: int) -> None:
        self.counts = SegmentationCounts(classes, IGNORE)

    def update(self, prediction: Integer[Tensor, "b 1 H W"], labels: Labels) -> None:
        """Add images, whose classes are given."""
        self.counts.update(prediction[:, 0].cpu(), labels["labels"].cpu())

    def compute(self) -> dict[str, float]:
        """``aAcc``, ``mIoU``, ``mAcc`` in percent."""
        scores = self.counts.compute()
        return {"mIoU": scores.iou, "aAcc": scores.accuracy, "mAcc": scores.class_accuracy_mean}


class SegmentationObjective(Objective[SegmentationProbe, SegmentationHead]):
    """Classes."""

    best_metric = "mIoU"
    better = "higher"

    def variants(self) -> list[Variant]:
        norms = ("none", "batch") if self.settings.head_norm == "both" else (self.settings.head_norm,)
        plain = super().variants()
        return [{**variant, "head_norm": norm} for norm in norms for variant in plain]

    def make_head(self, channels: int, class_channels: int, variant: Variant) -> SegmentationHead:
        if class_channels:
            raise InputError("--features.class-token: the segmentation probe sees patch tokens alone; leave it out.")
        norm = variant["head_norm"]
        init = "normal" if norm == "batch" else "uniform"
        return SegmentationHead(channels, len(self.train.classes), norm, init)

    def loss(self, head: SegmentationHead, features: ProbeFeatures, labels: Labels, step: int) -> Float[Tensor, ""]:
        return segmentation_loss(self.predict(head, features), labels["labels"], self.settings.loss_over, IGNORE)

    def predict(self, head: SegmentationHead, features: ProbeFeatures) -> Float[Tensor, "b k H W"]:
        logits = head(features.tokens, features.class_token)
        return head.at_pixels(logits, features.size, features.padding, self.settings.features.pad_crop)

    def scores(self) -> ClassScores:
        return ClassScores(len(self.train.classes))

    def rate(self, step: int, total: int) -> float:
        return schedules.segmentation_rate(step, total, self.settings.warmup)

    def on_image(
        self, image: Float[Tensor, "1 3 H W"], predict: Callable[[Tensor], Tensor]
    ) -> Integer[Tensor, "1 1 H W"]:
        settings, size = self.settings, (image.shape[-2], image.shape[-1])
        if settings.short_side is not None:
            image = resized_bytes(image, rescaled_size(size, settings.long_side, settings.short_side))
        if settings.window is None:
            logits = predict(image)
        else:
            logits = slide(image, predict, settings.window, settings.stride)
        return largest_class(logits, size)

    def on_tokens(self, predictions: Sequence[Float[Tensor, "b k H W"]]) -> Integer[Tensor, "b 1 H W"]:
        return largest_class(predictions[0], (predictions[0].shape[-2], predictions[0].shape[-1]))


def largest_class(
    logits: Float[Tensor, "b k h w"], size: tuple[int, int], at_once: int = 2**25
) -> Integer[Tensor, "b 1 H W"]:
    """The class with the largest logit, at another size; the first of equal ones.

    Logits of many classes at the size of a photograph take gigabytes, so only some classes are enlarged at a time.

    Args:
        logits: of each class.
        size: rows and columns to which they are resized, bilinearly (``align_corners=False``).
        at_once: resized logits that exist at a time.
    """
    if logits.shape[-2:] == size:
        return logits.argmax(dim=1, keepdim=True)
    best: Optional[Tensor] = None
    found = torch.zeros(0)
    step = max(at_once // (len(logits) * size[0] * size[1]), 1)
    for start in range(0, logits.shape[1], step):
        part = logits[:, start : start + step]
        value, place = F.interpolate(part, size=size, mode="bilinear", align_corners=False).max(dim=1, keepdim=True)
        if best is None:
            best, found = value, place
        else:
            larger = value > best
            best, found = torch.where(larger, value, best), torch.where(larger, place + start, found)
    return found


def resized_bytes(image: Float[Tensor, "1 3 H W"], size: tuple[int, int]) -> Float[Tensor, "1 3 h w"]:
    """A test image resized bilinearly in bytes, as MMSegmentation does by OpenCV."""
    import cv2

    pixels = (image[0] * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    resized = cv2.resize(pixels, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(resized).permute(2, 0, 1)[None].to(image) / 255


def make_objective(settings: AnyProbe, train: ProbeDataset, test: ProbeDataset) -> Objective:
    """The objective of some settings.

    Raises:
        InputError: settings and datasets do not belong together, or contradict themselves.
    """
    task = {DepthProbe: "depth", NormalsProbe: "normals", SegmentationProbe: "segmentation"}[type(settings)]
    for dataset, split in ((train, "training"), (test, "test")):
        if dataset.task != task:
            raise InputError(
                f"The {split} set {dataset.name} was opened for {dataset.task}, not {task}: open it for that."
            )
    settings.check()
    if isinstance(settings, DepthProbe):
        if (train.min_depth, train.max_depth) != (test.min_depth, test.max_depth):
            raise InputError(
                f"Depth of {train.name} lies within {train.min_depth:g} and {train.max_depth:g} m and that of "
                f"{test.name} within {test.min_depth:g} and {test.max_depth:g} m: use datasets of one range."
            )
        return DepthObjective(settings, train, test)
    if isinstance(settings, NormalsProbe):
        return NormalsObjective(settings, train, test)
    if train.classes != test.classes:
        raise InputError(f"{train.name} and {test.name} do not have the same classes: train and test on one dataset.")
    return SegmentationObjective(settings, train, test)
