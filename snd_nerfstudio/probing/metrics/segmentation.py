"""Accuracy and intersection over union of classes, counted over a whole set."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from snd_nerfstudio.errors import InputError


@dataclass(frozen=True)
class SegmentationScores:
    """Scores of a set, percent."""

    accuracy: float
    """Pixels that are right (aAcc)."""
    iou: float
    """Mean of ``class_iou`` over the classes that are in the labels or in the predictions (mIoU)."""
    class_accuracy_mean: float
    """Mean of ``class_accuracy`` over the classes that are in the labels (mAcc)."""
    class_iou: Float[Tensor, "k"]
    """``right / (labelled + predicted - right)``; nan where a class is in neither, 0 where it is only predicted."""
    class_accuracy: Float[Tensor, "k"]
    """``right / labelled``; nan where a class is not in the labels."""


class SegmentationCounts:
    """How many pixels of each class were predicted as which.

    Whole numbers of 64 bits: the released code adds in float32, which loses pixels beyond 2^24 of a class.

    Args:
        classes: how many.
        ignore: the label that does not count.
        device: of the counts.
    """

    def __init__(self, classes: int, ignore: int = 255, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.ignore = ignore
        self.counts: Int[Tensor, "k k"] = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        """Rows are labels, columns predictions."""

    def update(self, prediction: Integer[Tensor, "*pixels"], labels: Integer[Tensor, "*pixels"]) -> None:
        """Add images of any size.

        Args:
            prediction: classes from 0.
            labels: classes from 0, or the one to be ignored.

        Raises:
            InputError: a label is none of the classes.
            ValueError: a predicted class is none of them.
        """
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        device = self.counts.device
        # eight bits would wrap in what follows
        prediction, labels = prediction.to(device, torch.int64), labels.to(device, torch.int64)
        wrong = (labels != self.ignore) & ((labels < 0) | (labels >= self.classes))
        if wrong.any():
            raise InputError(
                f"Labels contain the class {int(labels[wrong][0])}, but there are {self.classes} classes from 0 and "
                f"the ignored label {self.ignore}: check the dataset's classes and whether its label 0 means nothing."
            )
        if ((prediction < 0) | (prediction >= self.classes)).any():
            raise ValueError(f"predicted classes must lie in 0..{self.classes - 1}")
        if (labels == self.ignore).all():
            return
        self.counts += multiclass_confusion_matrix(
            prediction.flatten(), labels.flatten(), self.classes, ignore_index=self.ignore, validate_args=False
        )

    def compute(self) -> SegmentationScores:
        """Scores of everything so far; nan where nothing was counted."""
        counts = self.counts.double()
        right, labelled, predicted = counts.diag(), counts.sum(dim=1), counts.sum(dim=0)
        iou = 100 * right / (labelled + predicted - right)
        accuracy = 100 * right / labelled
        return SegmentationScores(
            accuracy=float(100 * right.sum() / labelled.sum()),
            iou=float(iou.nanmean()),
            class_accuracy_mean=float(accuracy.nanmean()),
            class_iou=iou,
            class_accuracy=accuracy,
        )
