"""Files that break while they are used: an error, or left out, counted and told."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

from snd_nerfstudio.errors import BrokenFileError, InputError

OnError = Literal["raise", "skip"]
"""What becomes of a triplet whose files cannot be read."""
FLAG = "--pipeline.datamanager.on-error"
EMPTY_STEPS = 25
"""So many steps in a row without any triplet are more than some broken files: a disk that is gone."""


class Faults:
    """What was left out since the run started, in this process.

    Args:
        on_error: ``raise``: nothing is left out; ``skip``: what cannot be read is.
        log: gets one line for each broken file.
    """

    def __init__(self, on_error: OnError, log: Callable[[str], Any] = print) -> None:
        self.on_error: OnError = on_error
        self._log = log
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._empty_steps = 0

    @property
    def count(self) -> int:
        """How much was left out: triplets, and at the start files."""
        return sum(self._seen.values())

    @property
    def files(self) -> int:
        """How many different faults there were."""
        return len(self._seen)

    def note(self, error: BrokenFileError, what: str) -> None:
        """Leave something out, and say so the first time that this file is the reason.

        Args:
            error: names the file.
            what: is left out, for the message.

        Raises:
            BrokenFileError: the same error, if nothing may be left out.
        """
        if self.on_error == "raise":
            raise error
        with self._lock:
            self._seen[str(error)] += 1
            first = self._seen[str(error)] == 1
        if first:
            self._log(f"[yellow]Left out {what}: {error}")

    def end_step(self, triplets: int) -> None:
        """Called after each training step with the number of triplets it had.

        Raises:
            InputError: there was none for many steps.
        """
        self._empty_steps = 0 if triplets else self._empty_steps + 1
        if self._empty_steps >= EMPTY_STEPS:
            latest = next(reversed(self._seen), "")
            raise InputError(f"In the last {EMPTY_STEPS} steps no triplet could be read ({FLAG} skip). {latest}")
