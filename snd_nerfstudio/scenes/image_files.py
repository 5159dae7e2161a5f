"""Opening images wherever they are: files of their own, or in a chunk."""

import io
from pathlib import Path

from snd_nerfstudio.scenes.chunks import is_packed, read_packed


def open_bytes(path: Path) -> io.BytesIO | io.BufferedReader:
    """An image's bytes, to be closed by whoever asked for them.

    Args:
        path: of a file, or one that leads through a chunk (`scenes.chunks`).

    Raises:
        OSError: there is no such file, or it cannot be read.
        BrokenFileError: the chunk is damaged, or has no such scene or image.
    """
    return io.BytesIO(read_packed(path)) if is_packed(path) else path.open("rb")
