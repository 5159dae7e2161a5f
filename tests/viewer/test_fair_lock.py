import threading
import time

from snd_nerfstudio.viewer.fair_lock import FairLock


def test_one_at_a_time():
    lock, inside, most = FairLock(), 0, 0

    def work():
        nonlocal inside, most
        for _ in range(200):
            with lock:
                inside += 1
                most = max(most, inside)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads) and most == 1


def test_who_waits_is_served_before_the_holder_gets_it_again():
    lock, order, waiting = FairLock(), [], threading.Event()

    def render():
        waiting.set()
        with lock:
            order.append("render")

    with lock:
        thread = threading.Thread(target=render)
        thread.start()
        waiting.wait(timeout=10)
        while len(lock._queue) < 2:  # until it stands in the queue
            time.sleep(0.001)
        order.append("step")
    with lock:
        order.append("step")
    thread.join(timeout=10)
    assert order == ["step", "render", "step"]


def test_an_error_inside_releases_the_lock():
    lock = FairLock()
    try:
        with lock:
            raise KeyError
    except KeyError:
        pass
    with lock:
        assert len(lock._queue) == 1


def test_an_interrupted_wait_does_not_block_those_behind(monkeypatch):
    lock = FairLock()
    with lock:

        def interrupted(predicate):
            raise KeyboardInterrupt

        monkeypatch.setattr(lock._changed, "wait_for", interrupted)
        try:
            with lock:
                raise AssertionError("the lock was taken twice")
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
    with lock:
        assert len(lock._queue) == 1
