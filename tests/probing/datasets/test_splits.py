import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.splits import (
    held_out_groups,
    in_hashed_test,
    index_entries,
    paired_entries,
    read_index,
    read_lines,
    scene_disjoint,
)


def test_lines_of_an_index(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("/b/2.png /d/2.png 518.8\n\n  a/1.png d/1.png\r\n/c/3.png None 518.8\n//a/0.png d/0.png\n")
    assert read_index(file) == [("a/0.png", "d/0.png"), ("a/1.png", "d/1.png"), ("b/2.png", "d/2.png")]
    entries = index_entries(tmp_path, file)
    assert entries[1].name == "a/1" and entries[1].image == tmp_path / "a/1.png"
    assert entries[1].depth == tmp_path / "d/1.png" and entries[1].labels is None


def test_a_line_without_depth_or_a_list_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a.png b.png\nc.png\n")
    with pytest.raises(InputError, match=r"list.txt, line 2: `c.png` is not"):
        read_index(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"list.txt cannot be read"):
        read_lines(file)
    with pytest.raises(InputError, match=r"none.txt is missing"):
        read_lines(tmp_path / "none.txt")


def pairs(tmp_path, images, labels):
    for folder, names in (("images", images), ("labels", labels)):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / folder / name)
    return tmp_path / "images", tmp_path / "labels"


def test_images_and_labels_of_trees_are_paired_by_path(tmp_path):
    images = ["s1/b.JPG", "s1/a.JPG", "s0/a.jpg", "s0/a.txt.png"]
    folders = pairs(tmp_path, images, ["s0/a.png", "s1/a.png", "s1/b.png", "s2/c.png"])
    entries = paired_entries(*folders, ".JPG", prefix="train/")
    assert [entry.name for entry in entries] == ["train/s0/a", "train/s1/a", "train/s1/b"]
    assert entries[2].image == folders[0] / "s1/b.JPG" and entries[2].labels == folders[1] / "s1/b.png"


def test_folders_behind_links_are_entered(tmp_path):
    folders = pairs(tmp_path, ["s0/a.jpg"], ["s0/a.png"])
    for folder in folders:
        (folder / "s1").symlink_to(folder / "s0", target_is_directory=True)
    assert [entry.name for entry in paired_entries(*folders, ".jpg")] == ["s0/a", "s1/a"]


def test_files_of_other_names_are_paired_by_their_number_only_where_asked(tmp_path):
    folders = pairs(tmp_path, ["rgb_0001.png", "rgb_0012.png"], ["new_class13_0012.png", "new_class13_0001.png"])
    with pytest.raises(InputError, match="2 of 2 images"):
        paired_entries(*folders, ".png")
    entries = paired_entries(*folders, ".png", by_number=True)
    assert [entry.labels.name for entry in entries] == ["new_class13_0001.png", "new_class13_0012.png"]
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(folders[1] / "other_1.png")  # two files of the number 1
    with pytest.raises(InputError, match=r"1 of 2 images .* the first rgb_0001.png"):
        paired_entries(*folders, ".png", by_number=True)


def test_what_is_missing_of_pairs_is_named(tmp_path):
    folders = pairs(tmp_path, ["a.jpg", "b.jpg", "c.jpg"], ["b.png"])
    with pytest.raises(InputError, match=r"2 of 3 images of .*images have no labels in .*labels, the first a.jpg"):
        paired_entries(*folders, ".jpg")
    with pytest.raises(InputError, match=r"images has no .tiff images"):
        paired_entries(*folders, ".tiff")
    with pytest.raises(InputError, match=r"Folder .*nowhere is missing"):
        paired_entries(folders[0], tmp_path / "nowhere", ".jpg")


def test_a_hashed_split_depends_on_name_and_seed_alone():
    names = [f"scene/{number:06d}" for number in range(4000)]
    tested = [name for name in names if in_hashed_test(name, 0.2, 0)]
    # 4000 draws of probability 0.2: 800, standard deviation 25
    assert abs(len(tested) - 800) < 125
    assert tested == [name for name in reversed(names) if in_hashed_test(name, 0.2, 0)][::-1]
    assert set(tested) < {name for name in names if in_hashed_test(name, 0.4, 0)}
    other = {name for name in names if in_hashed_test(name, 0.2, 1)}
    # independent draws share a fifth of the fifth: 160, standard deviation 12
    assert abs(len(other & set(tested)) - 160) < 60


def test_held_out_groups_are_about_the_fraction_and_never_none_nor_all():
    groups = [f"g{number % 20}" for number in range(400)]
    held_out = held_out_groups(groups, 0.15, 0)
    assert len(held_out) == 3  # 20 samples each: three groups are 60 of 400
    assert held_out == held_out_groups(groups[::-1], 0.15, 0)
    assert len({frozenset(held_out_groups(groups, 0.15, seed)) for seed in range(10)}) > 3
    assert len(held_out_groups(["a", "b"], 0.001, 0)) == len(held_out_groups(["a", "b"], 0.999, 0)) == 1
    with pytest.raises(InputError, match=r"All samples are of one scene \(a\)"):
        held_out_groups(["a", "a"], 0.5, 0)


def test_sides_of_a_split_by_scene_share_none():
    samples = ["a1", "a2", "b1", "c1"]

    def side(test):
        return scene_disjoint(samples, str, lambda name: name[0], lambda scenes: {"a"}, test)

    assert side(True) == ["a1", "a2"] and side(False) == ["b1", "c1"]
    with pytest.raises(InputError, match="`b1` does not tell its scene"):
        scene_disjoint(samples, str, lambda name: None if name == "b1" else "a", lambda scenes: {"a"}, True)
