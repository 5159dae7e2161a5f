import math

import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.metrics.segmentation import SegmentationCounts


def counted(prediction, labels, classes, **settings):
    counts = SegmentationCounts(classes, **settings)
    counts.update(torch.tensor(prediction), torch.tensor(labels))
    return counts


def test_scores_by_hand():
    #                 class 0 twice right, once taken for 1; class 1 right once, once taken for 2; one pixel ignored
    counts = counted([[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [1, 1, 255]], 3)
    assert counts.counts.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    scores = counts.compute()
    assert scores.accuracy == pytest.approx(100 * 3 / 5)
    # 2 / (3 + 2 - 2), 1 / (2 + 2 - 1), and class 2 is predicted and never there
    assert scores.class_iou.tolist() == pytest.approx([100 * 2 / 3, 100 / 3, 0])
    assert scores.iou == pytest.approx((200 / 3 + 100 / 3 + 0) / 3)
    # without class 2, which has no pixels to be right at
    assert scores.class_accuracy[:2].tolist() == pytest.approx([100 * 2 / 3, 50])
    assert math.isnan(scores.class_accuracy[2]) and scores.class_accuracy_mean == pytest.approx((200 / 3 + 50) / 2)


def test_a_class_that_is_neither_there_nor_predicted_is_left_out_of_both_means():
    few, many = (counted([0, 1, 1], [0, 1, 0], classes).compute() for classes in (2, 40))
    assert few.iou == many.iou and few.class_accuracy_mean == many.class_accuracy_mean
    assert math.isnan(many.class_iou[17])


def example(seed=0, size=(3, 40, 50), classes=7):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, size, generator=generator)
    wrong = torch.randint(0, classes, size, generator=generator)
    prediction = torch.where(torch.rand(size, generator=generator) < 0.6, labels, wrong)
    labels[torch.rand(size, generator=generator) < 0.2] = 255
    return prediction, labels


def test_counts_are_those_of_a_loop_over_pixels():
    prediction, labels = example(size=(2, 12, 9))
    counts = SegmentationCounts(7)
    counts.update(prediction, labels)
    slow = [[0] * 7 for _ in range(7)]
    for guess, truth in zip(prediction.flatten().tolist(), labels.flatten().tolist(), strict=True):
        if truth != 255:
            slow[truth][guess] += 1
    assert counts.counts.tolist() == slow and counts.counts.dtype == torch.int64


def test_scores_agree_with_torchmetrics_where_all_classes_are_there():
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

    prediction, labels = example()
    counts = SegmentationCounts(7)
    counts.update(prediction, labels)
    scores = counts.compute()
    settings = {"num_classes": 7, "ignore_index": 255}
    iou = multiclass_jaccard_index(prediction, labels, average="none", **settings)
    torch.testing.assert_close(scores.class_iou, 100 * iou.double(), rtol=1e-5, atol=1e-5)
    assert scores.iou == pytest.approx(100 * float(iou.mean()), rel=1e-5)
    overall = multiclass_accuracy(prediction, labels, average="micro", **settings)
    assert scores.accuracy == pytest.approx(100 * float(overall), rel=1e-5)
    by_class = multiclass_accuracy(prediction, labels, average="macro", **settings)
    assert scores.class_accuracy_mean == pytest.approx(100 * float(by_class), rel=1e-5)


def test_images_are_counted_together_and_not_averaged():
    prediction, labels = example()
    together, apart = SegmentationCounts(7), SegmentationCounts(7)
    together.update(prediction, labels)
    for guess, truth in zip(prediction, labels, strict=True):
        apart.update(guess, truth)
    assert torch.equal(together.counts, apart.counts)


def test_pixels_beyond_two_to_the_24_are_still_counted():
    counts = SegmentationCounts(2)
    counts.counts[0, 0] = 2**24
    counts.update(torch.tensor([0]), torch.tensor([0]))
    assert counts.counts[0, 0] == 2**24 + 1  # float32 would stay where it is


def test_eight_bit_labels_and_more_than_256_classes_are_counted():
    counts = SegmentationCounts(150)
    counts.update(torch.tensor([149, 3], dtype=torch.uint8), torch.tensor([149, 255], dtype=torch.uint8))
    assert counts.counts[149, 149] == 1 and counts.counts.sum() == 1
    many = counted([299, 1, 255], [299, -1, 255], 300, ignore=-1)
    assert many.counts[299, 299] == many.counts[255, 255] == 1 and many.counts.sum() == 2


def test_images_with_nothing_but_ignored_pixels_change_nothing():
    counts = counted([0, 1], [255, 255], 2)
    assert counts.counts.sum() == 0
    scores = counts.compute()
    assert math.isnan(scores.accuracy) and math.isnan(scores.iou) and math.isnan(scores.class_accuracy_mean)


@pytest.mark.parametrize("label", [13, 254, -1])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(InputError, match=f"the class {label}, but there are 13 classes"):
        counted([0, 0], [0, label], 13)


def test_a_prediction_that_is_no_class_is_refused():
    with pytest.raises(ValueError, match="0..12"):
        counted([0, 13], [0, 0], 13)
