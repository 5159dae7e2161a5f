import shutil

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.datasets.scannetpp import scene_of
from tests.probing.datasets.writers import hexadecimal, room_frames, write_scannetpp


@pytest.fixture
def root(rooms, tmp_path):
    return write_scannetpp(rooms, tmp_path / "scannetpp_probe")


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
def test_depth_of_the_lists(rooms, root, protocol):
    for split, scenes in (("train", (0, 1)), ("test", (2,))):
        dataset = open_dataset("scannetpp", root, "depth", split, protocol)
        frames = [frame for frame in room_frames(rooms) if frame.scene in scenes]
        assert len(dataset) == len(frames) > 0 and dataset.max_depth == 20 and dataset.eval_crop == "none"
        for sample, frame in zip(dataset, frames):
            np.testing.assert_array_equal(sample.image, frame.image)
            np.testing.assert_array_equal(sample.depth, (frame.millimetres / 1000).astype(np.float32))
            assert sample.labels is None


def test_labels_of_the_folders(rooms, root):
    dataset = open_dataset("scannetpp", root, "segmentation", "train")
    frames = [frame for frame in room_frames(rooms) if frame.scene < 2]
    assert len(dataset.classes) == 100 and dataset.classes[9] == "chair" and len(dataset) == len(frames)
    for sample, frame in zip(dataset, frames):
        np.testing.assert_array_equal(sample.image, frame.image)
        np.testing.assert_array_equal(sample.labels, frame.classes(100))
    assert dataset.scene(0) == hexadecimal(0) and dataset.scene(len(dataset) - 1) == hexadecimal(1)


def test_the_folder_above_is_enough(root):
    assert open_dataset("scannetpp", root.parent, "depth", "test").root == root


def test_a_hash_sees_an_edited_list_and_a_missing_file(root):
    dataset = open_dataset("scannetpp", root, "depth", "test")
    first = dataset.content_hash()
    assert open_dataset("scannetpp", root, "depth", "test", "paper").content_hash() == first
    listed = root / "scannetpp_val.txt"
    listed.write_text(listed.read_text() + "\n")
    assert dataset.content_hash() != first
    dataset.files(0)[1].unlink()
    with pytest.raises(InputError, match="png is missing"):
        dataset.content_hash()


def test_what_users_break_is_named(root):
    shutil.rmtree(root / "annotations" / "training")
    with pytest.raises(InputError, match=r"Folder .*annotations/training is missing: unpack"):
        open_dataset("scannetpp", root, "segmentation", "train")
    test = open_dataset("scannetpp", root, "segmentation", "test")
    label = test.files(0)[1]
    Image.fromarray(np.full((56, 84), 101, np.uint8)).save(label)
    with pytest.raises(InputError, match=rf"{label.name} holds the id 101, but its classes are 1 to 100"):
        test[0]
    Image.fromarray(np.full((56, 84), 357, np.uint16)).save(label)
    with pytest.raises(InputError, match="holds the id 357"):
        test[0]
    Image.fromarray(np.ones((28, 42), np.uint8)).save(label)
    with pytest.raises(InputError, match="42x28 pixels but its image DSC00001.JPG has 84x56"):
        test[0]
    (root / "scannetpp_train.txt").unlink()
    with pytest.raises(InputError, match=r"List .*scannetpp_train.txt is missing"):
        open_dataset("scannetpp", root, "depth", "train")


def test_scenes_are_ten_hexadecimal_digits():
    assert scene_of("images/training/0a5c013435/DSC01234") == "0a5c013435"
    assert scene_of("0a5c013435_DSC01234") == "0a5c013435"
    assert scene_of("images/DSC01234") is None and scene_of("0a5c013435ff") is None
