import pytest

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.faults import EMPTY_STEPS, Faults


def test_an_error_ends_the_run_unless_it_may_be_skipped():
    with pytest.raises(BrokenFileError, match="a.png is damaged"):
        Faults("raise").note(BrokenFileError("a.png is damaged"), "a triplet")


def test_every_fault_is_counted_and_every_file_is_told_once():
    told = []
    faults = Faults("skip", told.append)
    for name in ("a", "b", "a", "a"):
        faults.note(BrokenFileError(f"{name}.png is damaged"), "a triplet")
    assert faults.count == 4 and faults.files == 2
    assert [line.split()[-3] for line in told] == ["a.png", "b.png"]


def test_many_steps_without_anything_to_read_are_an_error():
    faults = Faults("skip", lambda line: None)
    faults.note(BrokenFileError("disk/a.png does not exist"), "a triplet")
    for _ in range(EMPTY_STEPS - 1):
        faults.end_step(0)
    faults.end_step(1)  # counts from here again
    for _ in range(EMPTY_STEPS - 1):
        faults.end_step(0)
    with pytest.raises(InputError, match=f"last {EMPTY_STEPS} steps.*disk/a.png"):
        faults.end_step(0)
