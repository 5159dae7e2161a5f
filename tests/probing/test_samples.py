import hashlib
from pathlib import Path

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.samples import IGNORE, ProbeDataset, ProbeSample


class Texts(ProbeDataset):
    """Samples that are text files."""

    def __init__(self, root, names, lists=()):
        self.name, self.root, self.task, self.split = "texts", root, "depth", "train"
        self.names, self.lists = names, [root / name for name in lists]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return ProbeSample(self.names[index], np.zeros((2, 3, 3), np.uint8))

    def files(self, index):
        return [self.root / self.names[index], self.root / "shared"]

    def list_files(self):
        return self.lists


@pytest.fixture
def folder(tmp_path):
    for name, text in (("a", "one"), ("b", "three"), ("shared", ""), ("list", "a b"), ("below/c", "four")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_hash_is_of_names_sizes_and_the_content_of_lists(folder):
    listed, empty = hashlib.sha256(b"a b").hexdigest(), hashlib.sha256(b"").hexdigest()
    # the shared file counts once, and is read
    expected = "a\t3\nb\t5\nshared\t0\n" + f"list\t{listed}\nshared\t{empty}\n"
    assert Texts(folder, ["b", "a"], ["list"]).content_hash() == hashlib.sha256(expected.encode()).hexdigest()


def test_the_hash_does_not_depend_on_where_the_dataset_is_nor_on_order_and_time(folder, tmp_path_factory):
    first = Texts(folder, ["a", "below/c"], ["list"]).content_hash()
    moved = tmp_path_factory.mktemp("other") / "moved"
    folder.rename(moved)
    (moved / "a").write_text("two")  # of the same size
    assert Texts(moved, ["below/c", "a"], ["list"]).content_hash() == first


@pytest.mark.parametrize("change", ["size", "name", "list", "shared", "fewer"])
def test_the_hash_changes_with_sizes_names_lists_shared_files_and_samples(folder, change):
    first = Texts(folder, ["a", "b"], ["list"]).content_hash()
    names = ["a", "b"]
    if change == "size":
        (folder / "a").write_text("four")
    elif change == "name":
        names[1] = (folder / "b").rename(folder / "d").name
    elif change == "list":
        (folder / "list").write_text("b a")
    elif change == "shared":
        (folder / "shared").write_text("12")
        first = Texts(folder, ["a", "b"], ["list"]).content_hash()
        (folder / "shared").write_text("21")
    else:
        names = ["a"]
    assert Texts(folder, names, ["list"]).content_hash() != first


def test_a_missing_file_is_named(folder):
    (folder / "b").unlink()
    with pytest.raises(InputError, match=r"b is missing: restore it"):
        Texts(folder, ["a", "b"]).content_hash()


def test_a_dataset_can_be_walked_through_and_has_defaults(folder):
    dataset = Texts(folder, ["a", "b"])
    assert [sample.name for sample in dataset] == ["a", "b"]
    assert dataset.eval_crop == "none" and dataset.window is None and dataset.scene(0) is None
    assert dataset.classes == () and (dataset.min_depth, dataset.max_depth) == (1e-3, 10.0)
    assert IGNORE == 255 and isinstance(dataset.root, Path)
