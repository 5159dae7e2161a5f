import shutil

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import open_dataset
from tests.probing.datasets.writers import kitti_steps, room_frames, sized, write_kitti


def both(root, protocol, seed=0):
    return [open_dataset("kitti", root, "depth", split, protocol, seed) for split in ("train", "test")]


def names(dataset):
    return [dataset.files(index)[0].name for index in range(len(dataset))]


def drives(dataset):
    return {dataset.scene(index) for index in range(len(dataset))}


@pytest.mark.parametrize("layout", ["lists", "plain", "download"])
def test_depth_in_steps_of_a_256th_of_a_metre(rooms, tmp_path, layout):
    write_kitti(rooms, tmp_path, layout)
    by_name = {f"drive_{f.scene:04d}_sync_image_{f.number:010d}": f for f in room_frames(rooms)}
    total = 0
    for dataset in both(tmp_path, "fixed"):
        assert dataset.eval_crop == "garg" and (dataset.min_depth, dataset.max_depth) == (1e-3, 80)
        total += len(dataset)
        sample = dataset[0]
        frame = by_name[sample.name.partition("26_")[2].removesuffix("_image_02")]
        np.testing.assert_array_equal(sample.image, sized(frame.image, 352, 1216))
        np.testing.assert_array_equal(sample.depth, sized(kitti_steps(frame), 352, 1216) / np.float32(256))
    assert total == 6


def test_only_file_names_of_the_lists_count_and_the_paper_follows_them(rooms, tmp_path):
    write_kitti(rooms, tmp_path)
    train, test = both(tmp_path, "paper")
    assert test.split_rule == "published"
    assert len(train) == 4 and len(test) == 2 and test.list_files() == [tmp_path / "kitti_val.txt"]
    listed = [line.split()[0].split("/")[-1] for line in (tmp_path / "kitti_val.txt").read_text().splitlines()]
    assert names(test) == sorted(listed)
    assert drives(train) & drives(test)  # frames of one drive on both sides


def test_fixed_keeps_drives_apart_with_and_without_lists(rooms, tmp_path):
    for layout in ("lists", "plain"):
        root = tmp_path / layout
        write_kitti(rooms, root, layout)
        train, test = both(root, "fixed")
        assert not drives(train) & drives(test) and len(names(train) + names(test)) == 6
        assert len(train) == 4 and len(test) == 2  # one of three drives is the fewest that can be held out
    assert names(test) == names(both(tmp_path / "lists", "fixed")[1])


def test_without_lists_the_paper_draws_frames_by_their_names(rooms, tmp_path):
    write_kitti(rooms, tmp_path, "plain", every=5, size=(8, 8))
    train, test = both(tmp_path, "paper")
    # 36 draws of probability 0.15: 5.4, standard deviation 2.1
    assert 1 <= len(test) <= 13 and len(train) + len(test) == 36 and not set(names(train)) & set(names(test))
    assert test.split_rule.startswith("15% of the frames")
    assert names(both(tmp_path, "paper")[1]) == names(test) != names(both(tmp_path, "paper", seed=3)[1])


def test_uncropped_images_are_cropped(rooms, tmp_path):
    write_kitti(rooms, tmp_path, size=(375, 1242))
    dataset = both(tmp_path, "paper")[0]
    frame = room_frames(rooms)[0]
    np.testing.assert_array_equal(dataset[0].image, sized(frame.image, 375, 1242)[23:, 13:1229])
    np.testing.assert_array_equal(dataset[0].depth * 256, sized(kitti_steps(frame), 375, 1242)[23:, 13:1229])


def test_names_that_collide_are_refused(rooms, tmp_path):
    write_kitti(rooms, tmp_path)
    listed = tmp_path / "kitti_train.txt"
    listed.write_text("drive_a/image_02/0001.png a/0001.png\ndrive_b/image_02/0001.png b/0001.png\n")
    with pytest.raises(InputError, match=r"names drive_a/image_02/0001.png and drive_b/image_02/0001.png, which"):
        both(tmp_path, "paper")
    listed.write_text("a/0001.png a/0001.png\nb/None.png None\n")
    assert names(open_dataset("kitti", tmp_path, "depth", "train", "paper")) == ["0001.png"]
    with pytest.raises(InputError, match="`0001` does not tell its scene.*use the `paper` protocol"):
        both(tmp_path, "fixed")


def test_what_is_missing_is_named(rooms, tmp_path):
    write_kitti(rooms, tmp_path, "plain")
    removed = sorted((tmp_path / "depth").iterdir())[0]
    removed.unlink()
    with pytest.raises(InputError, match=rf"1 images have no depth map in .*depth, the first one .*{removed.name}"):
        both(tmp_path, "paper")
    shutil.rmtree(tmp_path / "depth")
    with pytest.raises(InputError, match=r"Folder .*depth is missing"):
        both(tmp_path, "paper")
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(InputError, match="has no folder images"):
        both(tmp_path, "paper")
