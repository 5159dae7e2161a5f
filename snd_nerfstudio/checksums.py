"""Checksums of files."""

import hashlib
import io
from pathlib import Path


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal; it is read in pieces."""
    with file.open("rb") as stream:
        return sha256_of(stream)


def sha256_of(stream: io.BufferedIOBase) -> str:
    """The SHA-256 in hexadecimal of what is left of a stream; it is read in pieces."""
    digest = hashlib.sha256()
    while piece := stream.read(1 << 22):
        digest.update(piece)
    return digest.hexdigest()
