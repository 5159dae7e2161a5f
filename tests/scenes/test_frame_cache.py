"""Frames to files and back, and a folder of them that is damaged, full, or used by several at once."""

import hashlib
import io
import os
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.frame_cache import DECODING, FrameCache, decode, encode

FLAG = "--pipeline.datamanager.frame-cache"
PLENTY = 1e9
SIZE = (20, 30)
BYTES = 128 + 20 * 30 * 3 + 32 + 4
"""Of a file: numpy's header, pixels, key, checksum."""


def key_of(number: int) -> str:
    return FrameCache.key(f"{number:064x}", SIZE, ())


def frame(number=0, size=SIZE):
    return np.random.default_rng(number).integers(256, size=(3, *size)).astype(np.uint8)


def open_cache(folder, limit=PLENTY):
    said = []
    return FrameCache(folder, limit, said.append), said


def test_a_frame_comes_back_exactly_and_may_be_written_to(tmp_path):
    cache, said = open_cache(tmp_path / "deep" / "frames")
    assert cache.get(key_of(0), SIZE) is None
    assert cache.put(key_of(0), frame(0)) and cache.put(key_of(1), frame(1))
    for opened in (cache, open_cache(cache.folder)[0]):
        for number in range(2):
            found = opened.get(key_of(number), SIZE)
            assert np.array_equal(found, frame(number)) and found.dtype == np.uint8 and found.flags.writeable
        assert opened.size == 2 * BYTES
    assert vars(cache.statistics) == dict(found=2, missing=1, damaged=0, written=2, turned_away=0) and not said


@pytest.mark.parametrize("layout", ["transposed", "every other column", "Fortran order", "read-only"])
def test_any_array_of_the_frame_s_pixels_will_do(tmp_path, layout):
    given = {
        "transposed": lambda: frame(0, SIZE[::-1]).transpose(0, 2, 1),
        "every other column": lambda: frame(0, (20, 60))[:, :, ::2],
        "Fortran order": lambda: np.asfortranarray(frame()),
        "read-only": lambda: np.frombuffer(frame().tobytes(), np.uint8).reshape(3, *SIZE),
    }[layout]()
    cache, _ = open_cache(tmp_path)
    assert cache.put(key_of(0), given) and np.array_equal(cache.get(key_of(0), SIZE), given)


def test_numpy_opens_a_file_too(tmp_path):
    cache, _ = open_cache(tmp_path)
    cache.put(key_of(0), frame())
    path = cache.path(key_of(0))
    assert path == tmp_path / key_of(0)[:2] / f"{key_of(0)}.npy"
    assert np.array_equal(np.load(path, allow_pickle=False), frame())


def test_the_key_is_the_hash_of_all_that_a_frame_depends_on(monkeypatch):
    arguments = ("ab" * 32, (448, 672), (500.0, 501.5, 0.1))
    described = f'[1, "{DECODING}", "{"ab" * 32}", [448, 672], [500.0, 501.5, 0.1]]'
    key = FrameCache.key(*arguments)
    assert key == hashlib.sha256(described.encode()).hexdigest()
    assert key == FrameCache.key(*arguments[:2], tuple(np.array(arguments[2])))
    others = [
        FrameCache.key("cd" * 32, *arguments[1:]),
        FrameCache.key(arguments[0], (672, 448), arguments[2]),
        FrameCache.key(*arguments[:2], ()),
        FrameCache.key(*arguments[:2], (500.0, 501.5, np.nextafter(0.1, 1))),
    ]
    monkeypatch.setattr("snd_nerfstudio.scenes.frame_cache.FORMAT", 2)
    others.append(FrameCache.key(*arguments))
    monkeypatch.undo()
    monkeypatch.setattr("snd_nerfstudio.scenes.frame_cache.DECODING", "by hand")
    others.append(FrameCache.key(*arguments))
    assert len({key, *others}) == 7


def flipped(contents: bytes, place: int) -> bytes:
    broken = bytearray(contents)
    broken[place] ^= 4
    return bytes(broken)


def no_image(contents: bytes) -> bytes:
    """Something else with the right key and checksum."""
    body = contents + bytes.fromhex(key_of(0))
    return body + zlib.crc32(body).to_bytes(4, "little")


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([None]), allow_pickle=True)
    return stream.getvalue()


DAMAGES = {
    "a flipped bit": lambda whole: flipped(whole, len(whole) // 2),
    "half of it": lambda whole: whole[: len(whole) // 2],
    "all but one byte": lambda whole: whole[:-1],
    "more than all": lambda whole: whole + b" ",
    "empty": lambda whole: b"",
    "another frame's": lambda whole: encode(frame(), key_of(99)),
    "of another size": lambda whole: encode(frame(0, (30, 20)), key_of(0)),
    "text": lambda whole: b"This is not a frame at all.\n" * 70,
    "zeros": lambda whole: bytes(len(whole)),
    "without an image": lambda whole: no_image(b"not numpy's"),
    "of objects": lambda whole: no_image(objects()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_frame_is_reported_deleted_and_made_anew(tmp_path, damage):
    cache, said = open_cache(tmp_path)
    cache.put(key_of(0), frame(0))
    cache.put(key_of(1), frame(1))
    path = cache.path(key_of(0))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert cache.get(key_of(0), SIZE) is None
    assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0] and "made anew" in said[0]
    assert not path.exists() and cache.statistics.damaged == 1 and cache.statistics.missing == 0
    assert cache.put(key_of(0), frame(0)) and np.array_equal(cache.get(key_of(0), SIZE), frame(0))
    assert np.array_equal(cache.get(key_of(1), SIZE), frame(1)) and len(said) == 1


def test_every_flipped_bit_and_every_cut_is_noticed():
    size = (2, 3)
    whole = encode(frame(0, size), key_of(0))
    assert np.array_equal(decode(whole, key_of(0), size), frame(0, size))
    broken = [flipped(whole, place) for place in range(len(whole))] + [whole[:end] for end in range(len(whole))]
    for contents in broken:
        with pytest.raises(ValueError):
            decode(contents, key_of(0), size)


def test_a_full_cache_says_so_once_and_serves_what_it_has(tmp_path):
    cache, said = open_cache(tmp_path, limit=2.5 * BYTES)
    assert [cache.put(key_of(number), frame(number)) for number in range(5)] == [True, True, False, False, False]
    assert len(said) == 1 and f"{FLAG}-limit" in said[0] and str(tmp_path) in said[0] and "is full" in said[0]
    assert cache.statistics.turned_away == 3 and cache.statistics.written == 2
    assert [cache.get(key_of(number), SIZE) is not None for number in range(5)] == [True, True, False, False, False]
    assert cache.size == 2 * BYTES <= cache.limit
    larger, said = open_cache(tmp_path, limit=3.0 * BYTES)
    assert larger.put(key_of(2), frame(2)) and not larger.put(key_of(3), frame(3)) and len(said) == 1


def test_a_disk_that_does_not_take_a_frame_is_said_once(tmp_path):
    cache, said = open_cache(tmp_path)
    (tmp_path / key_of(0)[:2]).write_text("a file where the folder should be")
    assert [cache.put(key_of(0), frame()) for _ in range(2)] == [False, False]
    assert len(said) == 1 and f"{FLAG} {tmp_path} cannot be written to" in said[0]


@pytest.mark.parametrize("place", ["taken", "taken/frames"])
def test_a_folder_that_cannot_be_made_is_refused_with_the_flag(tmp_path, place):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match=f"{FLAG} {tmp_path / place} cannot be written to .*: give another folder"):
        FrameCache(tmp_path / place, PLENTY)


READER = """
import os, sys
from pathlib import Path
import numpy as np
from snd_nerfstudio.scenes.frame_cache import FrameCache
os.chdir(sys.argv[1])
if os.geteuid() == 0:  # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
cache = FrameCache(Path("frames"), 1e9)
print(cache.get(sys.argv[2], (20, 30)).sum(), cache.put("ab" * 32, np.zeros((3, 20, 30), np.uint8)))
"""


def test_frames_in_a_folder_that_only_others_may_write_to_are_used(tmp_path):
    cache, _ = open_cache(tmp_path / "frames")
    cache.put(key_of(0), frame())
    folders = [cache.path(key_of(0)).parent, cache.folder]
    tmp_path.chmod(0o755)
    try:
        for folder in folders:
            folder.chmod(0o555)
        command = [sys.executable, "-c", READER, str(tmp_path), key_of(0)]
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert result.returncode == 0, result.stderr
    told, read = result.stdout.splitlines()
    assert f"{FLAG} frames cannot be written to" in told and read == f"{frame().sum()} False"


def test_what_killed_processes_left_is_cleared_away_later(tmp_path):
    old, new = (tmp_path / "ab" / f".{digit * 32}.tmp" for digit in "12")
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    assert open_cache(tmp_path)[0].size == 0
    assert not old.exists() and new.exists()


def test_two_threads_see_whole_frames_only(tmp_path):
    cache, said = open_cache(tmp_path)

    def work(seed):
        wrong = 0
        for number in np.random.default_rng(seed).integers(6, size=100).tolist():
            found = cache.get(key_of(number), SIZE)
            wrong += found is not None and not np.array_equal(found, frame(number))
            wrong += not cache.put(key_of(number), frame(number))
        return wrong

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [0, 0]
    assert not said and cache.statistics.damaged == 0 and cache.statistics.written == 200
    assert cache.statistics.found + cache.statistics.missing == 200
