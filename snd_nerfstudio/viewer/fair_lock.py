"""A lock that is given in the order it was asked for."""

from collections import deque
from threading import Condition
from types import TracebackType


class FairLock:
    """First come, first served; a context manager like ``threading.Lock``, not reentrant.

    Training releases its lock between two steps and takes it again at once. Python's own lock then goes back to it
    nearly every time, and a render that waits for it waits for many steps: pictures in the browser lag far behind.
    """

    def __init__(self) -> None:
        self._changed = Condition()
        self._queue: deque[object] = deque()  # the first has the lock

    def __enter__(self) -> "FairLock":
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                self._changed.wait_for(lambda: self._queue[0] is ticket)
            except BaseException:  # Ctrl-C while waiting: whoever comes behind must not wait for this one
                self._queue.remove(ticket)
                self._changed.notify_all()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._queue.popleft()
            self._changed.notify_all()
