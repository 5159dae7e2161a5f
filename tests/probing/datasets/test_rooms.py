import os
import pickle
import shutil

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.scenes.rooms.furniture import CLASSES
from tests.probing.datasets.writers import room_frames


@pytest.mark.parametrize("task", ["depth", "normals", "segmentation"])
def test_a_sample_is_what_the_room_knows(rooms, task):
    dataset = open_dataset("rooms", rooms, task, "train")
    assert len(dataset) == 2 * 60 and dataset.name == "rooms" and dataset.classes == CLASSES
    for frame in room_frames(rooms)[:3]:
        place = frame.scene * 60 + frame.number - 1
        sample = dataset[place]
        assert sample.name == f"room_{frame.scene:04d}/{frame.stem}"
        np.testing.assert_array_equal(sample.image, frame.image)
        np.testing.assert_array_equal(sample.depth, (frame.millimetres / 1000).astype(np.float32))
        np.testing.assert_allclose(sample.normals, frame.normals, atol=1e-5)
        np.testing.assert_array_equal(sample.labels, frame.semantics)
        assert sample.instances.dtype == np.int64 and len(np.unique(sample.instances)) > 2
        assert dataset.scene(place) == f"room_{frame.scene:04d}" and len(dataset.files(place)) == 5


def test_normals_are_those_of_the_depth_map(rooms):
    """Independently: the cross product of differences between unprojected neighbours, on flat pieces."""
    import json

    camera = json.loads((rooms / "scenes" / "room_0000" / "transforms_train.json").read_text())
    sample = open_dataset("rooms", rooms, "normals", "train")[0]
    height, width = sample.depth.shape
    rows, columns = np.mgrid[:height, :width] + 0.5
    rays = np.stack(
        [(columns - camera["cx"]) / camera["fl_x"], (rows - camera["cy"]) / camera["fl_y"], rows * 0 + 1], -1
    )
    points = rays * sample.depth[..., None]
    across, down = np.gradient(points, axis=1)[1:-1, 1:-1], np.gradient(points, axis=0)[1:-1, 1:-1]
    expected = np.cross(down, across)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    cosine = (expected * sample.normals[1:-1, 1:-1]).sum(axis=-1)
    assert np.median(cosine) > 0.99


def test_a_dataset_can_be_sent_to_another_process(rooms):
    dataset = open_dataset("rooms", rooms, "depth", "test")
    sent = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(sent[3].depth, dataset[3].depth)
    assert sent.content_hash() == dataset.content_hash()


def test_rooms_to_test_on_are_not_trained_on(rooms):
    train, test = (open_dataset("rooms", rooms, "depth", split) for split in ("train", "test"))
    assert {train.scene(i) for i in range(len(train))} == {"room_0000", "room_0001"}
    assert {test.scene(i) for i in range(len(test))} == {"room_0002"}
    assert train.content_hash() != test.content_hash()


def test_what_is_missing_matters_only_to_the_task_that_needs_it(rooms, tmp_path):
    broken = tmp_path / "rooms"
    shutil.copytree(rooms, broken, copy_function=os.link)
    shutil.rmtree(broken / "scenes" / "room_0002" / "normals")
    sample = open_dataset("rooms", broken, "depth", "test")[0]
    assert sample.normals is None and sample.labels is not None
    with pytest.raises(InputError, match=r"Folder .*room_0002/normals is missing"):
        open_dataset("rooms", broken, "normals", "test")
    (broken / "metadata" / "semantic_classes.txt").unlink()
    assert open_dataset("rooms", broken, "depth", "test")[0].labels is None
    with pytest.raises(InputError, match=r"semantic_classes.txt is missing"):
        open_dataset("rooms", broken, "segmentation", "test")
    shutil.rmtree(broken / "scenes" / "room_0000")
    with pytest.raises(InputError, match=r"room_0000/images is missing"):
        open_dataset("rooms", broken, "depth", "train")
