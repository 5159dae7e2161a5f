import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.datasets.scannet import scene_of
from tests.probing.datasets.writers import room_frames, write_scannet_frames, write_scannet_probe


@pytest.fixture
def probe(rooms, tmp_path):
    return write_scannet_probe(rooms, tmp_path / "scannet_probe")


@pytest.fixture(scope="module")
def frames_25k(rooms, tmp_path_factory):
    return write_scannet_frames(rooms, tmp_path_factory.mktemp("scannet") / "scannet_frames_25k")


def both(*arguments, **settings):
    return [open_dataset("scannet", *arguments, split, **settings) for split in ("train", "test")]


def names(dataset):
    return {dataset.files(index)[0].as_posix() for index in range(len(dataset))}


def scenes(dataset):
    return {dataset.scene(index) for index in range(len(dataset))}


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_the_paper_uses_the_lists_and_folders_as_they_are(rooms, probe, task):
    train, test = both(probe, task, protocol="paper")
    frames = room_frames(rooms, every=20)
    assert len(train) == 6 and len(test) == 3 and train.eval_crop == "eigen" and train.max_depth == 10
    for sample, frame in zip(test, frames[2::3]):
        np.testing.assert_array_equal(sample.image, frame.image)
        if task == "depth":
            np.testing.assert_array_equal(sample.depth, (frame.millimetres / 1000).astype(np.float32))
        else:
            np.testing.assert_array_equal(sample.labels, frame.classes(40))
    assert len(test.classes) == (40 if task == "segmentation" else 0)
    assert scenes(train) & scenes(test)


@pytest.mark.parametrize("task", ["depth", "segmentation"])
def test_fixed_splits_the_same_frames_by_room(probe, task):
    paper, fixed = both(probe, task, protocol="paper"), both(probe, task, protocol="fixed")
    assert names(paper[0]) | names(paper[1]) == names(fixed[0]) | names(fixed[1])
    assert scenes(fixed[0]) | scenes(fixed[1]) == {"scene0000", "scene0001", "scene0002"}
    assert not scenes(fixed[0]) & scenes(fixed[1]) and fixed[0].eval_crop == "none"


def test_frames_of_the_download(rooms, frames_25k):
    frames = {(f.scene, 100 * f.number): f for f in room_frames(rooms, 6)}
    for task in ("depth", "segmentation"):
        train, test = both(frames_25k, task, protocol="paper")
        assert len(train) + len(test) == len(frames) == 30
        for dataset in (train, test):
            sample = dataset[0]
            scan, stem = sample.name.split("/")
            frame = frames[int(scan[5:9]), int(stem)]
            np.testing.assert_array_equal(sample.image, frame.image)
            if task == "depth":
                np.testing.assert_array_equal(sample.depth, (frame.millimetres / 1000).astype(np.float32))
            else:
                np.testing.assert_array_equal(sample.labels, frame.classes(40))


def test_the_drawn_split_is_the_same_everywhere_and_another_with_another_seed(rooms, frames_25k, tmp_path):
    train, test = both(frames_25k, "depth", protocol="paper")
    # 30 draws of probability 0.2: 6, standard deviation 2.2
    assert 1 <= len(test) <= 13 and not names(train) & names(test)
    assert test.split_rule == "20% of the frames to test, by the hash of their names, seed 0"
    labelled = both(frames_25k, "segmentation", protocol="paper")
    assert names(labelled[1]) == names(test)
    copied = tmp_path / "elsewhere" / "scannet_frames_25k"
    shutil.copytree(frames_25k, copied)
    removed = sorted(copied.glob("*/color/*.jpg"))[0]
    removed.unlink()
    again = both(copied, "depth", protocol="paper")[1]
    kept = {name.replace(str(copied), str(frames_25k)) for name in names(again)}
    assert kept == names(test) - {str(removed).replace(str(copied), str(frames_25k))}
    assert names(both(frames_25k, "depth", protocol="paper", seed=5)[1]) != names(test)


def test_fixed_keeps_scans_of_a_room_together(frames_25k):
    held_out = Counter()
    for seed in range(8):
        train, test = both(frames_25k, "depth", protocol="fixed", seed=seed)
        assert not scenes(train) & scenes(test) and len(train) == 20 and len(test) == 10
        held_out.update(scenes(test))
        assert test.split_rule == f"scenes of 20% of the frames to test, seed {seed}"
    assert len(held_out) > 1


def test_fixed_uses_the_official_validation_list_where_it_is(frames_25k, tmp_path):
    copied = tmp_path / "scannet_frames_25k"
    shutil.copytree(frames_25k, copied)
    (copied / "scannetv2_val.txt").write_text("scene0001_00\nscene0001_01\nscene0700_00\n")
    for seed in (0, 1):
        train, test = both(copied, "depth", protocol="fixed", seed=seed)
        assert scenes(test) == {"scene0001"} and scenes(train) == {"scene0000", "scene0002"}
    assert test.list_files() == [copied / "scannetv2_val.txt"]
    assert test.split_rule == "scenes of scannetv2_val.txt to test"
    (copied / "scannetv2_val.txt").write_text("scene0700_00\n")
    with pytest.raises(InputError, match="no samples to test depth"):
        open_dataset("scannet", copied, "depth", "test", "fixed")


def test_larger_colour_is_brought_to_the_size_of_the_labels(rooms, tmp_path):
    root = write_scannet_frames(rooms, tmp_path / "scannet_frames_25k", every=30, colour_factor=2)
    frames = {(f.scene, 100 * f.number): f for f in room_frames(rooms)}
    for task in ("depth", "segmentation"):
        sample = both(root, task, protocol="fixed")[0][0]
        frame = frames[int(sample.name[5:9]), int(sample.name.split("/")[1])]
        assert sample.image.shape == (56, 84, 3)
        # the mean of four equal pixels, less what JPEG loses
        assert np.abs(sample.image.astype(int) - frame.image).mean() < 1.5


def test_what_users_break_is_named(probe, frames_25k, tmp_path):
    copied = tmp_path / "scannet_frames_25k"
    shutil.copytree(frames_25k, copied)
    label = sorted(copied.glob("scene0000_00/label/*.png"))[0]
    Image.fromarray(np.full((56, 84), 1163, np.uint16)).save(label)  # raw ScanNet ids
    holding = [
        (d, i) for d in both(copied, "segmentation", protocol="paper") for i in range(len(d)) if label in d.files(i)
    ]
    (dataset, index), *others = holding
    with pytest.raises(InputError, match=r"id 1163.*nyu40id of scannetv2-labels"):
        dataset[index]
    assert not others
    label.unlink()
    with pytest.raises(InputError, match=r"scene0000_00/color/\d+.jpg has no label in .*scene0000_00/label"):
        open_dataset("scannet", copied, "segmentation", "train", "paper")
    shutil.rmtree(label.parent)
    with pytest.raises(InputError, match=r"scene0000_00/label is missing"):
        open_dataset("scannet", copied, "segmentation", "train", "paper")
    for part in ("train", "test"):
        listed = probe / f"{part}_index.txt"
        listed.write_text(listed.read_text().replace("scene", "place"))
    with pytest.raises(InputError, match="place0000_01_000001` does not tell its scene"):
        open_dataset("scannet", probe, "depth", "train", "fixed")


def test_the_room_of_a_scan():
    assert scene_of("test/color/scene0123_04_000100") == "scene0123" and scene_of("scene0123") is None
