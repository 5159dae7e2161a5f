"""Files written in one step, so that neither an interruption nor a second command leaves half of one."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def in_one_step(file: Path) -> Iterator[Path]:
    """Gives a name of its own to write to, beside the file, which it becomes at the end; on an error it is removed."""
    partial = file.with_name(f"{file.name}.{os.getpid()}-{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Writes a text file in one step."""
    with in_one_step(file) as partial:
        partial.write_text(text, encoding="utf-8")
