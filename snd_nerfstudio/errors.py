"""The one kind of error a user's input can cause, and how the command line shows it."""

import sys
from pathlib import Path
from types import TracebackType


class InputError(ValueError):
    """Something the user gave is wrong; the message names the file or flag, what is wrong, and what to do."""


class BrokenFileError(InputError):
    """A file of the dataset is missing, damaged, or not what it should be.

    Args:
        message: names the file, what is wrong, and what to do.
        file: which one; several errors of one file are one fault.
    """

    def __init__(self, message: str, file: Path | None = None) -> None:
        super().__init__(message)
        self.file = file


def show_input_errors_without_traceback() -> None:
    """Let an uncaught `InputError` end the process with its message alone; every other error looks as before."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, InputError):
            print(f"\nError: {error}", file=sys.stderr)
        else:
            previous(kind, error, trace)

    sys.excepthook = hook
