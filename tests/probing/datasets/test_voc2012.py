import shutil

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from tests.probing.datasets.writers import room_frames, write_voc2012


@pytest.fixture
def root(rooms, tmp_path):
    return write_voc2012(rooms, tmp_path / "VOCdevkit" / "VOC2012")


def test_background_is_a_class_and_palette_indices_count(rooms, root):
    for split in ("train", "test"):
        dataset = open_dataset("voc2012", root.parents[1], "segmentation", split)
        frames = [frame for frame in room_frames(rooms) if (frame.scene < 2) == (split == "train")]
        assert len(dataset) == len(frames) and len(dataset.classes) == 21 and dataset.classes[0] == "background"
        for sample, frame in zip(dataset, frames):
            np.testing.assert_array_equal(sample.image, frame.image)
            np.testing.assert_array_equal(sample.labels, frame.classes(21))
    assert any((frame.classes(21) == 0).any() for frame in room_frames(rooms))


def test_what_users_break_is_named(root):
    dataset = open_dataset("voc2012", root, "segmentation", "test")
    label = dataset.files(0)[1]
    with Image.open(label) as image:
        image.convert("RGB").save(label)  # what many viewers export
    with pytest.raises(InputError, match=rf"{label.name} has colours"):
        dataset[0]
    label.unlink()
    with pytest.raises(InputError, match=rf"{label.name} is missing"):
        dataset[0]
    shutil.rmtree(root / "SegmentationClass")
    with pytest.raises(InputError, match=r"Folder .*SegmentationClass is missing: unpack VOCtrainval"):
        open_dataset("voc2012", root, "segmentation", "train")
    (root / "ImageSets" / "Segmentation" / "train.txt").unlink()
    with pytest.raises(InputError, match=r"List .*train.txt is missing"):
        open_dataset("voc2012", root, "segmentation", "train")
