"""How far a command is: a bar where somebody looks, a line now and then where output goes to a file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""
PAUSE = 60.0
"""Seconds between lines about one thing, but for its last."""


def quiet(what: str, done: int, total: int) -> None:
    """Says nothing."""


@contextmanager
def reporting() -> Iterator[Progress]:
    """Shows progress on the standard error output: a bar for each thing that is done, or lines if it is no terminal."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, transient=True, console=Console(stderr=True)) as bars:
        known: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(what, total=total)
            bars.update(known[what], completed=done, total=total)

        yield report


class _Lines:
    """A line about a thing at its end, and each minute until then."""

    def __init__(self) -> None:
        self.said: dict[str, float] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self.said.setdefault(what, now) >= PAUSE:
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)
            self.said[what] = now
