import threading

import pytest

from snd_nerfstudio.scenes.prefetch import Prefetcher


def test_items_come_in_whatever_order_they_are_asked_for():
    prefetcher = Prefetcher(lambda step: step * step, workers=2, ahead=3)
    assert [prefetcher.get(step) for step in (0, 1, 2, 100, 101, 5)] == [0, 1, 4, 10000, 10201, 25]


def test_the_following_steps_are_loaded_before_they_are_asked_for():
    started = [threading.Event() for _ in range(4)]

    def load(step):
        if step < 4:
            started[step].set()
        return step

    prefetcher = Prefetcher(load, workers=1, ahead=3)
    prefetcher.get(0)
    assert all(event.wait(timeout=10) for event in started)


def test_an_error_reaches_the_one_who_asked():
    def load(step):
        raise ValueError(f"step {step} is broken")

    prefetcher = Prefetcher(load, workers=1, ahead=1)
    with pytest.raises(ValueError, match="step 3 is broken"):
        prefetcher.get(3)
