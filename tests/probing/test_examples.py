import dataclasses

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.augmentation import augment_depth
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.examples import TrainingBatches, step_indices, windowed
from snd_nerfstudio.probing.protocols import DepthProbe, NormalsProbe, SegmentationProbe
from tests.probing.backbones import fewer


def opened(rooms, task, every=12):
    return fewer(open_dataset("rooms", rooms, task, "train"), every)


def test_every_epoch_takes_each_image_once_in_an_order_of_its_own():
    settings = DepthProbe(batch=3)
    epochs = [[index for step in range(4 * e, 4 * e + 4) for index in step_indices(step, 12, settings)] for e in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(12))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != list(range(12))
    assert epochs[0][:3] == step_indices(0, 12, settings)
    assert epochs[0] != [i for s in range(4) for i in step_indices(s, 12, dataclasses.replace(settings, seed=1))]


def test_what_is_no_whole_batch_is_left_out_or_a_smaller_batch():
    by_name = DepthProbe(batch=3, shuffle=False)
    assert [step_indices(step, 8, by_name) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    kept = dataclasses.replace(by_name, drop_last=False)
    assert [step_indices(step, 8, kept) for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7], [0, 1, 2]]


def test_the_datasets_window_is_cut_out_of_image_and_labels(rooms):
    dataset = opened(rooms, "normals")
    whole = dataset[2]
    dataset.window = (3, 50, 10, 80)
    cut = windowed(dataset, 2)
    np.testing.assert_array_equal(cut.image, whole.image[3:50, 10:80])
    np.testing.assert_array_equal(cut.depth, whole.depth[3:50, 10:80])
    np.testing.assert_array_equal(cut.normals, whole.normals[3:50, 10:80])
    images, labels = TrainingBatches(dataset, NormalsProbe(batch=2, augment=False, shuffle=False))(1)
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 47, 70)
    np.testing.assert_array_equal(images[0].permute(1, 2, 0), cut.image)
    np.testing.assert_array_equal(labels["normals"][0].permute(1, 2, 0), cut.normals)
    np.testing.assert_array_equal(labels["measured"][0], cut.depth > 0)


def test_a_batch_is_a_function_of_seed_and_step(rooms):
    dataset = opened(rooms, "depth")
    settings = DepthProbe(batch=2, crop=(42, 56), iterations=8)
    begun, anew = TrainingBatches(dataset, settings), TrainingBatches(dataset, settings)
    for step in range(3):
        last = begun(step)
    images, labels = anew(2)
    torch.testing.assert_close(last[0], images, rtol=0, atol=0)
    torch.testing.assert_close(last[1]["depth"], labels["depth"], rtol=0, atol=0)
    index = step_indices(2, len(dataset), settings)[1]
    sample, generator = dataset[index], np.random.default_rng((settings.seed, 1, 2, 1))
    image, depth = augment_depth(sample.image, sample.depth, generator, settings.augmentation("rooms"))
    np.testing.assert_array_equal(images[1].permute(1, 2, 0), image)
    np.testing.assert_array_equal(labels["depth"][1], depth)
    begun.close()
    anew.close()


@pytest.mark.parametrize("task", ["normals", "segmentation"])
def test_other_tasks_are_augmented_too(rooms, task):
    dataset = opened(rooms, task)
    settings = NormalsProbe(batch=3) if task == "normals" else SegmentationProbe(batch=3, crop=70, short_side=64)
    images, labels = TrainingBatches(dataset, settings)(0)
    size = (56, 84) if task == "normals" else (70, 70)
    assert images.shape == (3, 3, *size) and images.is_floating_point()
    assert {value.shape[-2:] for value in labels.values()} == {size}


def test_a_crop_that_does_not_fit_names_the_sample(rooms):
    with pytest.raises(InputError, match=r"Sample room_000\d/DSC\d+ of rooms: .* smaller than the training crop"):
        TrainingBatches(opened(rooms, "depth"), DepthProbe(crop=(57, 70)))(0)


def test_rooms_of_any_size_are_augmented_whole(rooms):
    images, labels = TrainingBatches(opened(rooms, "depth"), DepthProbe(batch=3))(0)
    assert images.shape == (3, 3, 56, 84) and labels["depth"].shape == (3, 56, 84)
