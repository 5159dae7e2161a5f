from pathlib import Path

import pytest

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.faults import EMPTY_STEPS, Faults


def damaged(name, reason="damaged"):
    return BrokenFileError(f"{name} is {reason}", Path(name))


def test_an_error_ends_the_run_unless_it_may_be_skipped():
    with pytest.raises(BrokenFileError, match="a.png is damaged"):
        Faults("raise").note(damaged("a.png"), "a triplet")


def test_triplets_are_counted_by_kind_and_every_file_is_told_once():
    told = []
    faults = Faults("skip", told.append)
    for name, reason in (("a.png", "damaged"), ("b.png", "damaged"), ("a.png", "gone"), ("a.png", "gone")):
        faults.note(damaged(name, reason), "a triplet", "training")
    faults.note(damaged("c.png"), "a triplet", "evaluation")
    faults.note(damaged("c.png"), "a picture")
    assert faults.triplets("training") == 4 and faults.triplets("evaluation") == 1 and faults.files == 3
    assert [line.split()[-3] for line in told] == ["a.png", "b.png", "c.png"]


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
