"""Work done ahead of the training thread."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Computes ``load(step)`` for the steps to come in background threads.

    Threads rather than processes: decoding and resizing release the interpreter lock, nothing has to be pickled, an
    error keeps its message, and no process is forked from one that already runs a viewer and a GPU.

    Args:
        load: pure function of the step.
        workers: threads.
        ahead: steps to keep in flight.
    """

    def __init__(self, load: Callable[[int], Item], workers: int, ahead: int) -> None:
        self._load = load
        self._pool = ThreadPoolExecutor(max(workers, 1), thread_name_prefix="snd-loader")
        self._ahead = max(ahead, 1)
        self._pending: dict[int, Future[Item]] = {}

    def get(self, step: int) -> Item:
        """The item of ``step``; the following steps are started. Steps may be asked for in any order."""
        for stale in [known for known in self._pending if not step <= known <= step + self._ahead]:
            self._pending.pop(stale).cancel()
        for wanted in range(step, step + self._ahead + 1):
            if wanted not in self._pending:
                self._pending[wanted] = self._pool.submit(self._load, wanted)
        return self._pending.pop(step).result()
