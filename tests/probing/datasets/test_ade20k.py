import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from tests.probing.datasets.writers import room_frames, write_ade20k


@pytest.fixture
def root(rooms, tmp_path):
    return write_ade20k(rooms, tmp_path / "ADEChallengeData2016")


def test_images_and_labels_of_both_splits(rooms, root):
    for split in ("train", "test"):
        dataset = open_dataset("ade20k", root.parent, "segmentation", split)
        frames = [frame for frame in room_frames(rooms) if (frame.scene < 2) == (split == "train")]
        assert len(dataset) == len(frames) and dataset.root == root
        for sample, frame in zip(dataset, frames):
            np.testing.assert_array_equal(sample.image, frame.image)
            np.testing.assert_array_equal(sample.labels, frame.classes(150))


def test_names_come_from_the_table_if_it_is_there(root):
    dataset = open_dataset("ade20k", root, "segmentation", "test")
    assert len(dataset.classes) == 150 and dataset.classes[:2] == ("wall", "thing 2")
    assert dataset.list_files() == [root / "objectInfo150.txt"]
    (root / "objectInfo150.txt").unlink()
    dataset = open_dataset("ade20k", root, "segmentation", "test")
    assert len(dataset.classes) == 150 and dataset.classes[149] == "class 150" and dataset.list_files() == []


def test_the_grey_images_of_ade20k_become_colour_and_labels_in_colours_are_refused(root):
    dataset = open_dataset("ade20k", root, "segmentation", "test")
    image, label = dataset.files(0)
    grey = Image.open(image).convert("L")
    grey.save(image)
    sample = dataset[0]
    assert sample.image.shape == (56, 84, 3) and (sample.image == sample.image[..., :1]).all()
    Image.fromarray(np.zeros((56, 84, 3), np.uint8)).save(label)
    with pytest.raises(InputError, match=rf"{label.name} has colours"):
        dataset[0]
