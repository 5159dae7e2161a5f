import shutil

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from tests.probing.datasets.writers import room_frames, write_nyu_depth, write_nyu_semantics


def frames_of(rooms, split):
    return [frame for frame in room_frames(rooms) if (frame.scene < 2) == (split == "train")]


@pytest.mark.parametrize("split", ["train", "test"])
def test_depth_in_millimetres(rooms, tmp_path, split):
    root = write_nyu_depth(rooms, tmp_path / "nyuv2")
    dataset = open_dataset("nyuv2", root, "depth", split)
    frames = frames_of(rooms, split)
    assert len(dataset) == len(frames) and dataset.eval_crop == "eigen" and dataset.max_depth == 10
    for sample, frame in zip(dataset, frames):
        np.testing.assert_array_equal(sample.image, frame.image)
        np.testing.assert_array_equal(sample.depth, (frame.millimetres / 1000).astype(np.float32))
    # training crops alone avoid the white border
    assert dataset.window == ((45, 472, 43, 608) if split == "train" else None)


def test_the_inner_folder_may_be_given(rooms, tmp_path):
    root = write_nyu_depth(rooms, tmp_path / "nyuv2")
    inner = open_dataset("nyuv2", root / "data_depth", "depth", "test")
    np.testing.assert_array_equal(inner[0].depth, open_dataset("nyuv2", tmp_path, "depth", "test")[0].depth)


def test_depth_times_ten_thousand_is_refused(rooms, tmp_path):
    root = write_nyu_depth(rooms, tmp_path / "nyuv2", scale=10)
    dataset = open_dataset("nyuv2", root, "depth", "test")
    with pytest.raises(InputError, match=r"sync_depth_00001.png reaches [\d.]+ m where nothing is farther than 10 m"):
        dataset[0]


@pytest.mark.parametrize("names", ["nyu_rgb_{:04d}.png", "new_nyu_class13_{:04d}.png"])
def test_thirteen_classes_whatever_the_files_are_called(rooms, tmp_path, names):
    root = write_nyu_semantics(rooms, tmp_path / "nyuv2", names)
    for split in ("train", "test"):
        dataset = open_dataset("nyuv2", root, "segmentation", split)
        frames = frames_of(rooms, split)
        assert len(dataset) == len(frames) and len(dataset.classes) == 13 and dataset.classes[-1] == "window"
        for sample, frame in zip(dataset, frames):
            np.testing.assert_array_equal(sample.image, frame.image)
            np.testing.assert_array_equal(sample.labels, frame.classes(13))


def test_labels_of_forty_classes_or_a_missing_folder_are_refused(rooms, tmp_path):
    root = write_nyu_semantics(rooms, tmp_path / "nyuv2")
    dataset = open_dataset("nyuv2", root, "segmentation", "test")
    Image.fromarray(np.full((56, 84), 40, np.uint8)).save(dataset.files(0)[1])
    with pytest.raises(InputError, match="id 40, but its classes are 1 to 13"):
        dataset[0]
    shutil.rmtree(root / "data_sem" / "nyuv2_test_class13")
    with pytest.raises(InputError, match=r"Folder .*nyuv2_test_class13 is missing"):
        open_dataset("nyuv2", root, "segmentation", "test")
