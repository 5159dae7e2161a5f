"""Paths of very many files in little memory."""

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Optional, SupportsIndex, Union, overload

import numpy as np
from jaxtyping import Bool, Int

from snd_nerfstudio.scenes.chunks import is_packed, packed_names

NO_FILE = -1


class FileList(Sequence[Optional[Path]]):
    """Paths, or None where there is no file, about 30 bytes each; a `Path` is made when one is asked for.

    Folders are kept once and names in one block of bytes: 140,000 `Path` objects take some 100 MB, three such lists and
    what is made of them gigabytes.

    Args:
        folders: as strings.
        folder_of: index of each file's folder, or -1 where there is no file.
        names: of all files, one after the other, as the file system encodes them.
        ends: where each name ends in ``names``.
    """

    def __init__(
        self, folders: Sequence[str], folder_of: Int[np.ndarray, "n"], names: bytes, ends: Int[np.ndarray, "n"]
    ) -> None:
        self._folders, self._folder_of = tuple(folders), folder_of.astype(np.int32)
        self._names, self._ends = names, ends.astype(np.int64)

    @classmethod
    def of(cls, files: Iterable[Union[str, Path, None]]) -> "FileList":
        """A list of any paths."""
        folders: dict[str, int] = {}
        folder_of, names = [], []
        for file in files:
            folder, name = os.path.split(file) if file is not None else ("", "")
            folder_of.append(NO_FILE if file is None else folders.setdefault(folder, len(folders)))
            names.append(os.fsencode(name))
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        return cls(list(folders), np.array(folder_of, dtype=np.int32), b"".join(names), ends)

    @classmethod
    def joined(cls, lists: Sequence["FileList"]) -> "FileList":
        """Several lists, one after the other."""
        folders: list[str] = []
        folder_of, ends, length = [], [], 0
        for files in lists:
            shifted = np.where(files._folder_of == NO_FILE, NO_FILE, files._folder_of + len(folders))
            folder_of.append(shifted)
            ends.append(files._ends + length)
            folders += files._folders
            length += len(files._names)
        if not lists:
            return cls.of([])
        return cls(folders, np.concatenate(folder_of), b"".join(files._names for files in lists), np.concatenate(ends))

    @classmethod
    def without_files(cls, count: int) -> "FileList":
        """As many times None."""
        return cls((), np.full(count, NO_FILE), b"", np.zeros(count, dtype=np.int64))

    def take(self, chosen: Int[np.ndarray, "m"]) -> "FileList":
        """Some of the files, in the order asked for."""
        return FileList.of(self._text(int(index)) for index in chosen)

    @property
    def any_file(self) -> bool:
        """Whether there is a file at all."""
        return bool((self._folder_of != NO_FILE).any())

    def __len__(self) -> int:
        return len(self._folder_of)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Optional[Path]: ...

    @overload
    def __getitem__(self, index: slice) -> "FileList": ...

    def __getitem__(self, index: Union[SupportsIndex, slice]) -> Union[Path, None, "FileList"]:
        """A file's path, or None; a slice is a list again.

        Raises:
            IndexError: there is no such place.
        """
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        text = self._text(operator.index(index))
        return None if text is None else Path(text)

    def __iter__(self) -> Iterator[Optional[Path]]:
        for index in range(len(self)):
            yield self[index]

    def texts(self) -> Iterator[Optional[str]]:
        """All paths as strings, which are quicker to make."""
        return (self._text(index) for index in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore

    def _text(self, index: int) -> Optional[str]:
        place = range(len(self))[index]
        folder = int(self._folder_of[place])
        if folder == NO_FILE:
            return None
        start = int(self._ends[place - 1]) if place else 0
        return os.path.join(self._folders[folder], os.fsdecode(self._names[start : int(self._ends[place])]))

    def exist(self) -> Bool[np.ndarray, "n"]:
        """Whether each file is on disk; every folder is listed once, which is far quicker than a look at each file.

        Raises:
            InputError: a chunk that files are in is damaged.
        """
        present = np.zeros(len(self), dtype=bool)
        order = np.argsort(self._folder_of, kind="stable")
        listed: dict[str, frozenset[bytes]] = {}
        for place in order.tolist():
            folder = int(self._folder_of[place])
            if folder == NO_FILE:
                continue
            name = self._folders[folder]
            if name not in listed:
                listed = {name: _files_in(name)}
            start = int(self._ends[place - 1]) if place else 0
            present[place] = self._names[start : int(self._ends[place])] in listed[name]
        return present


def _files_in(folder: str) -> frozenset[bytes]:
    """Names of the files in a folder, or of the images of a scene in a chunk; none if it cannot be listed."""
    place = Path(folder)
    if is_packed(place / "image"):
        return packed_names(place)
    try:
        with os.scandir(os.fsencode(folder or ".")) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()
