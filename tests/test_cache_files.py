"""A folder of files that is damaged, full, not to be written to, or used by several at once."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from snd_nerfstudio.cache_files import (
    ABANDONED_AFTER,
    COUNT_EVERY,
    CacheFolder,
    CacheMessages,
    CacheStatistics,
    FileStatistics,
)
from snd_nerfstudio.errors import InputError

MESSAGES = CacheMessages(
    refused="refused {root}: {error}",
    read_only="read only {folder}: {error}",
    unreadable="unreadable {path}: {error}",
    damaged="damaged {path}: {error}",
    unwritable="unwritable {folder}: {error}, {free:.3g} free",
    full="full {folder}: {size:.9f} of {limit:.9f}, {free:.3g} free",
)
PLENTY = 1e9


def key_of(number: int) -> str:
    """Keys of 64 digits that begin in different ways."""
    return f"{number:02x}" * 32


def open_folder(folder, limit=PLENTY, **more):
    said = []
    statistics = FileStatistics() if limit is None else CacheStatistics()
    return CacheFolder(folder, ".bin", MESSAGES, statistics, limit, log=said.append, **more), said


def files_in(folder):
    """Every file below a folder, hidden ones too."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def refuse(contents: bytes) -> bytes:
    """Makes no sense of anything."""
    raise ValueError("nonsense")


@pytest.mark.parametrize("limit", [None, PLENTY])
def test_what_was_written_is_read_by_whoever_opens_the_folder(tmp_path, limit):
    cache, said = open_folder(tmp_path / "deep" / "cache", limit)
    assert cache.read(key_of(1)) is None and cache.get(key_of(1), bytes) is None
    assert cache.write(key_of(1), b"one") and cache.write(key_of(2), b"three")
    other, _ = open_folder(cache.folder, limit)
    assert other.read(key_of(1)) == b"one" and other.get(key_of(2), bytes.decode) == "three"
    assert cache.size == other.size == (0 if limit is None else 8)
    names = [f"01/{key_of(1)}.bin", f"02/{key_of(2)}.bin"]
    assert files_in(cache.folder) == [cache.folder / name for name in names] and not said
    assert cache.path(key_of(2)) == cache.folder / names[1]
    assert vars(cache.statistics) == vars(type(cache.statistics)(missing=2, written=2))
    assert vars(other.statistics) == vars(type(cache.statistics)(found=1))


def test_a_folder_within_keeps_its_files_and_settings_apart(tmp_path):
    one, _ = open_folder(tmp_path, within="one", settings='{"regions": 7}')
    two, _ = open_folder(tmp_path, within="two")
    assert one.write(key_of(1), b"one") and two.read(key_of(1)) is None
    assert files_in(tmp_path) == [one.path(key_of(1)), tmp_path / "one" / "settings.json"]
    assert (tmp_path / "one" / "settings.json").read_text() == '{"regions": 7}' and one.size == 3


@pytest.mark.parametrize("limit", [None, 5.0])
def test_a_damaged_file_is_reported_and_makes_room_where_that_is_scarce(tmp_path, limit):
    cache, said = open_folder(tmp_path, limit)
    assert cache.write(key_of(1), b"12345")
    assert cache.get(key_of(1), refuse) is None
    assert said == [f"damaged {cache.path(key_of(1))}: nonsense"]
    assert cache.path(key_of(1)).exists() == (limit is None) and cache.size == 0
    assert cache.statistics.damaged == 1 and cache.statistics.found == cache.statistics.missing == 0
    assert cache.write(key_of(1), b"54321") and cache.read(key_of(1)) == b"54321" and len(said) == 1


def test_a_file_that_cannot_be_read_is_as_good_as_missing_and_said(tmp_path):
    cache, said = open_folder(tmp_path)
    cache.path(key_of(1)).mkdir(parents=True)
    assert cache.get(key_of(1), bytes) is None and cache.statistics.missing == 1
    assert len(said) == 1 and said[0].startswith(f"unreadable {cache.path(key_of(1))}: ")


# ---------------------------------------------------------------------- room


def test_a_full_folder_turns_away_and_says_so_once(tmp_path):
    cache, said = open_folder(tmp_path, limit=10.0)
    written = [cache.write(key_of(number), b"4444") for number in range(5)]
    assert written == [True, True, False, False, False] and cache.size == 8
    assert vars(cache.statistics) == vars(CacheStatistics(written=2, turned_away=3))
    assert len(said) == 1 and said[0].startswith(f"full {tmp_path}: 0.000000008 of 0.000000010, ")
    assert len(files_in(tmp_path)) == 2 and cache.read(key_of(0)) == b"4444"
    assert cache.write(key_of(4), b"22") and cache.size == 10  # what is small enough still goes in


def test_what_is_written_again_counts_once(tmp_path):
    cache, said = open_folder(tmp_path, limit=10.0)
    assert all(cache.write(key_of(0), contents) for contents in (b"4444", b"333", b"55555")) and not said
    assert cache.size == open_folder(tmp_path)[0].size == 5


def test_without_a_limit_nothing_is_turned_away(tmp_path):
    cache, said = open_folder(tmp_path, None)
    assert all(cache.write(key_of(number), bytes(1000)) for number in range(20)) and not said
    assert len(files_in(tmp_path)) == 20


def test_a_large_folder_is_counted_less_often(tmp_path, monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.cache_files.COUNT_EVERY", 1)
    monkeypatch.setattr("snd_nerfstudio.cache_files.COUNT_SHARE", 2)
    assert COUNT_EVERY > 1
    other, _ = open_folder(tmp_path)
    assert all(other.write(key_of(number), b"1") for number in range(6))
    cache, _ = open_folder(tmp_path, limit=100.0)
    other.write(key_of(6), b"1")
    # it knows of 6 files, and of one more with each that it writes: 5 writes are half of the 11 known then, and it
    # counts 7 + 5 before the sixth
    sizes = []
    for number in range(7, 13):
        cache.write(key_of(number), b"1")
        sizes.append(cache.size)
    assert sizes == [7, 8, 9, 10, 11, 13]


def test_a_full_folder_is_counted_again_after_a_while_that_grows_with_its_files(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("snd_nerfstudio.cache_files.time.monotonic", lambda: now[0])
    (tmp_path / "ab").mkdir()
    for number in range(2000):
        (tmp_path / "ab" / f"{number}.bin").write_bytes(b"1")
    cache, said = open_folder(tmp_path, limit=2000.0)
    assert not cache.write(key_of(1), b"1") and len(said) == 1
    (tmp_path / "ab" / "0.bin").unlink()
    now[0] += 19.0  # 2,000 files: twice ten seconds
    assert not cache.write(key_of(1), b"1")
    now[0] += 2.0
    assert cache.write(key_of(1), b"1") and cache.size == 2000 and len(said) == 1


def test_a_disk_that_does_not_take_a_file_is_said_once_and_tried_again(tmp_path):
    cache, said = open_folder(tmp_path)
    (tmp_path / "01").write_text("a file where the folder should be")
    assert [cache.write(key_of(1), b"one") for _ in range(3)] == [False, False, False]
    assert len(said) == 1 and said[0].startswith(f"unwritable {tmp_path}: ")
    assert cache.statistics == CacheStatistics(turned_away=3) and files_in(tmp_path) == [tmp_path / "01"]
    (tmp_path / "01").unlink()
    assert cache.write(key_of(1), b"one") and cache.size == 3


def test_a_folder_that_was_taken_away_is_said_and_not_fatal(tmp_path):
    cache, said = open_folder(tmp_path / "deep" / "cache")
    (tmp_path / "deep" / "cache").rmdir()
    (tmp_path / "deep").rmdir()
    assert not cache.write(key_of(1), b"one") and cache.read(key_of(1)) is None
    assert len(said) == 1 and said[0].startswith("unwritable ") and " free" in said[0]


# ---------------------------------------------------------------------- opening


@pytest.mark.parametrize("place", ["taken", "taken/cache"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, place):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=f"^refused {tmp_path / place}: "):
        open_folder(tmp_path / place)
    assert files_in(tmp_path) == [tmp_path / "taken"]


def test_braces_in_a_folder_s_name_are_left_as_they_are(tmp_path):
    (tmp_path / "{0}{error}").write_text("a file")
    with pytest.raises(InputError, match=r"refused .*/\{0\}\{error\}: "):
        open_folder(tmp_path / "{0}{error}")


def test_a_folder_whose_settings_cannot_be_written_is_read(tmp_path):
    open_folder(tmp_path)[0].write(key_of(1), b"one")
    (tmp_path / "settings.json").mkdir()
    reader, said = open_folder(tmp_path, settings="{}")
    assert len(said) == 1 and said[0].startswith(f"read only {tmp_path}: ") and not reader.writable
    assert reader.get(key_of(1), bytes) == b"one"
    assert not reader.write(key_of(2), b"two") and reader.read(key_of(2)) is None
    assert reader.statistics == CacheStatistics(found=1, missing=1, turned_away=1) and len(said) == 1
    assert files_in(tmp_path) == [reader.path(key_of(1))]


READER = """
import os, sys
from pathlib import Path
from snd_nerfstudio.cache_files import CacheFolder, CacheMessages, CacheStatistics
from snd_nerfstudio.errors import InputError
os.chdir(sys.argv[1])
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
def open_folder(name, read_only="read only {folder}"):
    messages = CacheMessages("refused {root}", read_only, "", "damaged", "unwritable", "full")
    return CacheFolder(Path(name), ".bin", messages, CacheStatistics(), 100.0, log=print)
used = open_folder("used")
print(used.get("01" * 32, bytes), used.write("02" * 32, b"two"), used.get("03" * 32, bytes))
def refuse(contents):
    raise ValueError("nonsense")
print(used.get("01" * 32, refuse), used.get("01" * 32, bytes), used.size)
for name, read_only in (("empty", "read only {folder}"), ("used", None)):
    try:
        open_folder(name, read_only)
    except InputError as error:
        print(error)
"""


def test_a_folder_that_only_others_may_write_to_is_read_if_there_is_anything_in_it(tmp_path):
    open_folder(tmp_path / "used")[0].write(key_of(1), b"one")
    open_folder(tmp_path / "empty")
    folders = [tmp_path / "used" / "01", tmp_path / "used", tmp_path / "empty"]
    tmp_path.chmod(0o755)
    try:
        for folder in folders:
            folder.chmod(0o555)
        cache_of = [sys.executable, "-c", READER, str(tmp_path)]
        result = subprocess.run(cache_of, check=False, capture_output=True, text=True, timeout=60)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "read only used",
        "b'one' False None",
        "damaged",
        "None b'one' 3",
        "refused empty",
        "refused used",
    ]


def temporary(folder: Path, name, age):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"half a file")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_what_killed_processes_left_is_removed_when_it_is_old(tmp_path):
    names = [f".{number:032x}.tmp" for number in range(4)]
    old = [temporary(tmp_path / place, names[0], ABANDONED_AFTER + 60) for place in ("", "ab")]
    kept = [
        temporary(tmp_path, names[1], 0),
        temporary(tmp_path / "ab", names[2], ABANDONED_AFTER - 60),
        temporary(tmp_path / "ab", ".notes.tmp", 10 * ABANDONED_AFTER),
        temporary(tmp_path / "project", names[3], 10 * ABANDONED_AFTER),
        temporary(tmp_path / "ab", f"{key_of(0xAB)}.bin", 10 * ABANDONED_AFTER),
    ]
    cache, _ = open_folder(tmp_path)
    assert not any(path.exists() for path in old) and all(path.exists() for path in kept)
    assert cache.size == len(b"half a file")  # temporary files do not count


# ---------------------------------------------------------------------- several at once


@pytest.mark.parametrize("shared", [True, False])
def test_two_threads_see_whole_files_only(tmp_path, shared):
    caches = [open_folder(tmp_path) for _ in range(2)]
    if shared:
        caches[1] = caches[0]

    def work(which):
        cache, wrong = caches[which][0], 0
        for number in np.random.default_rng(which).integers(6, size=200).tolist():
            found = cache.get(key_of(number), bytes)
            wrong += found is not None and found != bytes([number]) * 50_000
            wrong += not cache.write(key_of(number), bytes([number]) * 50_000)
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 0]
    counts = [cache.statistics for cache, _ in (caches[:1] if shared else caches)]
    assert sum(count.written for count in counts) == sum(count.found + count.missing for count in counts) == 400
    assert not caches[0][1] and not caches[1][1] and len(files_in(tmp_path)) == 6
