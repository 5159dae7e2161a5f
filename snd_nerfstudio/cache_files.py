"""Folders of files that are named after a hash of all that they depend on, so that none can be out of date.

``<folder>/<first two digits>/<key><suffix>``. Files appear whole or not at all, and several threads and processes may
use one folder at once. What is in a file, and whether it is damaged, is for the caches that are built on this to say.
"""

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from snd_nerfstudio.errors import InputError

ABANDONED_AFTER = 24 * 3600.0
"""Seconds after which a temporary file is taken to be of a process that was killed."""
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
"""Names of files that are being written."""
COUNT_EVERY = 256
"""Files written between counts of what other processes wrote to the same folder."""
COUNT_SHARE = 16
"""In a large folder that many times fewer than it holds: counting takes as long as there are files."""
RECOUNT_AFTER = 10.0
"""Seconds after which a full folder is counted again before anything more is refused; so many per thousand files."""

Content = TypeVar("Content")


@dataclass
class FileStatistics:
    """What happened since the cache was opened, in this process."""

    found: int = 0
    missing: int = 0
    damaged: int = 0
    written: int = 0


@dataclass
class CacheStatistics(FileStatistics):
    """The same of a cache that may be full."""

    turned_away: int = 0
    """Not written because the cache is full or cannot be written to."""


@dataclass(frozen=True)
class CacheMessages:
    """What a cache tells the user. Names in braces are filled in: paths, errors, and sizes in gigabytes."""

    refused: str
    """The folder cannot be made or written to: ``{root}``, ``{error}``."""
    read_only: str | None
    """It cannot be written to, but read: ``{folder}``, ``{error}``. None: such a folder is refused."""
    unreadable: str
    """A file is there that cannot be read: ``{path}``, ``{error}``."""
    damaged: str
    """What is in a file makes no sense: ``{path}``, ``{error}``."""
    unwritable: str
    """The disk took a file no more; said once: ``{folder}``, ``{error}``, ``{free}``."""
    full: str = ""
    """The limit is reached; said once: ``{folder}``, ``{size}``, ``{limit}``, ``{free}``."""


class CacheFolder:
    """The files of a cache.

    Args:
        root: what the user named; made if it is missing.
        suffix: how names of files end.
        messages: what is told when.
        statistics: counts what happens; `CacheStatistics` where there is a limit.
        limit: bytes that the files may take; what comes later is not written. None: no limit.
        within: name of the folder in ``root`` that holds the files; empty: ``root`` itself.
        settings: written to ``settings.json`` beside the files, for whoever looks into the folder. None: nothing is.
        log: takes the messages.

    Raises:
        InputError: the folder cannot be made or written to, and there is nothing in it, or `CacheMessages.read_only`
            is None.
    """

    def __init__(
        self,
        root: Path,
        suffix: str,
        messages: CacheMessages,
        statistics: FileStatistics,
        limit: float | None = None,
        within: str = "",
        settings: str | None = None,
        log: Callable[[str], Any] = print,
    ) -> None:
        self.folder, self.limit, self.statistics = Path(root) / within, limit, statistics
        self.writable = True
        """False where nothing could be written from the beginning; nothing is tried then."""
        self._suffix, self._messages, self._log = suffix, messages, log
        self._lock = threading.Lock()
        self._told = False
        used = _holds_anything(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._try_writing(settings)
            self._remove_abandoned()
        except OSError as error:
            if messages.read_only is None or not used:
                raise InputError(messages.refused.format(root=root, error=error)) from error
            self.writable = False
            log(messages.read_only.format(folder=self.folder, error=error))
        self._bytes = self._number = self._since_count = 0
        self._counted = time.monotonic()
        if limit is not None:
            self._count()

    @property
    def size(self) -> int:
        """Bytes in the folder, as far as this process knows; counted only where there is a limit."""
        return self._bytes

    def path(self, key: str) -> Path:
        """Where a file is, or would be."""
        return self.folder / key[:2] / f"{key}{self._suffix}"

    def read(self, key: str) -> bytes | None:
        """A file's contents, or None if there is none that can be read."""
        path = self.path(key)
        try:
            return path.read_bytes()
        except FileNotFoundError:
            self._add("missing")
        except OSError as error:
            self._add("missing")
            self._log(self._messages.unreadable.format(path=path, error=error))
        return None

    def get(self, key: str, decode: Callable[[bytes], Content]) -> Content | None:
        """What a file holds, or None if there is none that can be read; a damaged one is reported.

        Where there is a limit it is deleted too, and makes room for the one that takes its place.

        Args:
            key: names the file.
            decode: makes sense of its contents; raises ValueError where they are damaged.
        """
        contents = self.read(key)
        if contents is None:
            return None
        try:
            content = decode(contents)
        except ValueError as error:
            path = self.path(key)
            self._add("damaged")
            self._log(self._messages.damaged.format(path=path, error=error))
            if self.limit is not None:
                self._delete(path)
            return None
        self._add("found")
        return content

    def write(self, key: str, contents: bytes) -> bool:
        """Write a file; readers see all of it or nothing. Returns False if the cache is full or out of disk."""
        if not self.writable or not self._has_room(len(contents)):
            return self._turn_away()
        path = self.path(key)
        try:
            path.parent.mkdir(exist_ok=True)
            replaced = _replace(path, contents)
        except OSError as error:
            self._tell_once(self._messages.unwritable, error=error)
            return self._turn_away()
        with self._lock:
            self.statistics.written += 1
            if self.limit is not None:
                self._bytes += len(contents) - replaced
                self._number += replaced == 0
                self._since_count += 1
        return True

    def _turn_away(self) -> bool:
        if isinstance(self.statistics, CacheStatistics):
            self._add("turned_away")
        return False

    def _add(self, name: str) -> None:
        with self._lock:
            setattr(self.statistics, name, getattr(self.statistics, name) + 1)

    def _has_room(self, more: int) -> bool:
        if self.limit is None:
            return True
        with self._lock:
            if self._since_count >= max(COUNT_EVERY, self._number // COUNT_SHARE):
                self._count()
            room = self._bytes + more <= self.limit
            patience = RECOUNT_AFTER * max(1.0, self._number / 1000)
            if not room and time.monotonic() > self._counted + patience:  # others may have made room
                self._count()
                room = self._bytes + more <= self.limit
        if not room:
            self._tell_once(self._messages.full, size=self._bytes / 1e9, limit=self.limit / 1e9)
        return room

    def _tell_once(self, message: str, **about: Any) -> None:
        with self._lock:
            told, self._told = self._told, True
        if not told:
            there = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
            free = shutil.disk_usage(there).free / 1e9
            self._log(message.format(folder=self.folder, free=free, **about))

    def _delete(self, path: Path) -> None:
        size = _size_of(path)
        with suppress(OSError):
            path.unlink()
            with self._lock:
                self._bytes -= size
                self._number -= 1

    def _count(self) -> None:
        sizes = [_size_of(path) for path in self.folder.glob(f"??/*{self._suffix}")]
        self._bytes, self._number, self._since_count = sum(sizes), len(sizes), 0
        self._counted = time.monotonic()

    def _try_writing(self, settings: str | None) -> None:
        if settings is not None:
            _replace(self.folder / "settings.json", settings.encode())
            return
        probe = _temporary_beside(self.folder / "probe")
        probe.touch()
        probe.unlink()

    def _remove_abandoned(self) -> None:
        for path in [*self.folder.glob(".*.tmp"), *self.folder.glob("??/.*.tmp")]:
            with suppress(OSError):  # another process may be faster
                if TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > ABANDONED_AFTER:
                    path.unlink()


def _replace(path: Path, contents: bytes) -> int:
    """Write a file by another name and rename it; bytes of the one that it replaces."""
    temporary = _temporary_beside(path)
    try:
        temporary.write_bytes(contents)
        replaced = _size_of(path)
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise
    return replaced


def _temporary_beside(path: Path) -> Path:
    return path.parent / f".{uuid.uuid4().hex}.tmp"


def _holds_anything(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
