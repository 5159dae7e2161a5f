"""Files written in one step."""

import pytest

from snd_nerfstudio.scenes.toolkit.files import in_one_step, write_text


def test_two_writers_of_one_file_do_not_share_a_name(tmp_path):
    file = tmp_path / "depth.png"
    with in_one_step(file) as first, in_one_step(file) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first" and list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    file = tmp_path / "lists.txt"
    write_text(file, "before")
    with pytest.raises(RuntimeError), in_one_step(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
