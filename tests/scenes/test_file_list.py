import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from snd_nerfstudio.scenes.file_list import FileList

FILES = [Path("a/b/one.png"), None, Path("a/b/two.png"), Path("c/three ü.png"), Path("four.png")]


def test_it_gives_the_paths_it_was_given():
    files = FileList.of(FILES)
    assert len(files) == 5 and list(files) == FILES and files == FILES
    assert files[-1] == Path("four.png") and files[1] is None


def test_a_place_beyond_its_end_is_an_error():
    with pytest.raises(IndexError):
        FileList.of(FILES)[5]


def test_parts_and_joined_lists_keep_their_order():
    files = FileList.of(FILES)
    assert files.take(np.array([3, 1, 0])) == [FILES[3], None, FILES[0]]
    assert files[1:3] == FILES[1:3]
    assert FileList.joined([files, FileList.without_files(2), files[3:]]) == [*FILES, None, None, *FILES[3:]]
    assert FileList.joined([]) == []


def test_it_knows_whether_there_is_a_file_at_all():
    assert FileList.of(FILES).any_file and not FileList.of([None, None]).any_file


def test_it_travels_to_other_processes():
    assert pickle.loads(pickle.dumps(FileList.of(FILES))) == FILES


def test_existence_is_that_of_each_file(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/folder.png").mkdir()
    (tmp_path / "a/there.png").touch()
    (tmp_path / "a/link.png").symlink_to("there.png")
    (tmp_path / "a/broken.png").symlink_to("nowhere.png")
    names = ["a/there.png", "a/gone.png", "b/there.png", "a/link.png", "a/broken.png", "a/folder.png"]
    files = [tmp_path / name for name in names]
    expected = [file.is_file() for file in files]
    assert expected == [True, False, False, True, False, False]
    assert FileList.of([*files, None]).exist().tolist() == [*expected, False]


def test_a_hundred_thousand_files_take_a_few_megabytes():
    tracemalloc.start()
    files = FileList.of(f"scenes/room_{n // 500:03}/images/DSC{n:05}.JPG" for n in range(100_000))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(files) == 100_000 and files[70_001] == Path("scenes/room_140/images/DSC70001.JPG")
    assert kept < 4e6  # 12 bytes of name, 8 where it ends, 4 of folder: 2.4 MB
