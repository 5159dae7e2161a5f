"""Checksums of files."""

import hashlib
from pathlib import Path


def sha256(file: Path) -> str:
    """A file's SHA-256 in hexadecimal; it is read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
