"""Files that break while they are used: an error, or left out, counted and told."""

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Optional

from snd_nerfstudio.errors import BrokenFileError, InputError

OnError = Literal["raise", "skip"]
"""What becomes of a triplet whose files cannot be read."""
Kind = Literal["training", "evaluation"]
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
        self._seen: set[str] = set()
        self._triplets: Counter[str] = Counter()
        self._latest: Optional[BrokenFileError] = None
        self._empty_steps = 0

    @property
    def files(self) -> int:
        """How many different files, or things that are wrong with them, there were."""
        return len(self._seen)

    def triplets(self, kind: Kind) -> int:
        """How many triplets were left out of training or evaluation."""
        return self._triplets[kind]

    def note(self, error: BrokenFileError, what: str, kind: Optional[Kind] = None) -> None:
        """Leave something out, and say so the first time that this file is the reason.

        Args:
            error: names the file.
            what: is left out, for the message.
            kind: of the triplet that is left out; None where it is none.

        Raises:
            BrokenFileError: the same error, if nothing may be left out.
        """
        if self.on_error == "raise":
            raise error
        with self._lock:
            fault = str(error if error.file is None else error.file)
            first = fault not in self._seen
            self._seen.add(fault)
            self._latest = error
            if kind is not None:
                self._triplets[kind] += 1
        if first:
            self._log(f"[yellow]Left out {what}: {error}")

    def end_step(self, triplets: int) -> None:
        """Called after each training step with the number of triplets it had.

        Raises:
            InputError: there was none for many steps.
        """
        self._empty_steps = 0 if triplets else self._empty_steps + 1
        if self._empty_steps >= EMPTY_STEPS:
            latest = "" if self._latest is None else self._latest
            raise InputError(f"In the last {EMPTY_STEPS} steps no triplet could be read ({FLAG} skip). {latest}")
