import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.masks.cache import MaskCache, decode, encode

KEY = "ab" * 32
MASK = (np.arange(12).reshape(3, 4) * 5900 % 65_536).astype(np.int64)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path, said) -> MaskCache:
    return MaskCache(tmp_path / "masks", "superpixel", {"regions": 7}, said.append)


def test_a_mask_comes_back_as_it_was_with_16_bits(cache):
    assert cache.get(KEY) is None
    assert cache.put(KEY, MASK)
    assert np.array_equal(cache.get(KEY), MASK) and cache.get(KEY).dtype == np.int64
    assert cache.path(KEY).parent.name == "ab" and cache.path(KEY).read_bytes()[:4] == b"\x89PNG"
    assert vars(cache.statistics) == {"found": 2, "missing": 1, "damaged": 0, "written": 1}


def test_other_settings_have_another_folder_that_says_what_they_are(cache, tmp_path):
    cache.put(KEY, MASK)
    other = MaskCache(tmp_path / "masks", "superpixel", {"regions": 8})
    assert other.folder != cache.folder and other.get(KEY) is None
    assert json.loads((other.folder / "settings.json").read_text())["regions"] == 8
    assert np.array_equal(MaskCache(tmp_path / "masks", "superpixel", {"regions": 7}).get(KEY), MASK)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another", "no image"])
def test_a_damaged_file_is_noticed_and_replaced(cache, said, damage):
    cache.put(KEY, MASK)
    whole = cache.path(KEY).read_bytes()
    broken = {
        "cut": whole[:-30],
        "flipped": encode(MASK[::-1], KEY).split(b"IDAT")[0][:-4] + whole[whole.index(b"IDAT") - 4 :],
        "empty": b"",
        "another": encode(MASK, "cd" * 32),
        "no image": b"<html>",
    }[damage]
    cache.path(KEY).write_bytes(broken)
    assert cache.get(KEY) is None and cache.statistics.damaged == 1
    assert len(said) == 1 and str(cache.path(KEY)) in said[0] and "made anew" in said[0]
    cache.put(KEY, MASK)
    assert np.array_equal(cache.get(KEY), MASK)


def test_every_flipped_bit_is_noticed():
    whole = encode(MASK, KEY)
    for place in range(0, len(whole) - 12):  # what follows is the end mark, which says nothing
        broken = bytearray(whole)
        broken[place] ^= 0x10
        try:
            assert np.array_equal(decode(bytes(broken), KEY), MASK)
        except ValueError:
            continue


def test_ids_beyond_16_bits_are_not_cut_off():
    with pytest.raises(ValueError, match="16 bits"):
        encode(MASK + 65_536, KEY)


def test_what_killed_processes_left_is_cleared_away_later(cache, tmp_path):
    old, new = (cache.folder / "ab" / f".{digit * 32}.tmp" for digit in "12")
    old.parent.mkdir()
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    MaskCache(tmp_path / "masks", "superpixel", {"regions": 7})
    assert not old.exists() and new.exists()


def test_a_folder_that_cannot_be_made_is_refused_with_the_flag(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--pipeline.datamanager.mask-cache"):
        MaskCache(tmp_path / "file" / "masks", "superpixel", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_masks_in_a_folder_that_cannot_be_written_to_are_used(cache, said, tmp_path):
    cache.put(KEY, MASK)
    folders = [cache.folder, cache.folder / "ab"]
    try:
        for folder in folders:
            folder.chmod(0o500)
        reader = MaskCache(tmp_path / "masks", "superpixel", {"regions": 7}, said.append)
        assert np.array_equal(reader.get(KEY), MASK) and not reader.put("cd" * 32, MASK)
        assert len(said) == 1 and "cannot be written to" in said[0]
    finally:
        for folder in folders:
            folder.chmod(0o700)


WRITER = """
import sys
from pathlib import Path
import numpy as np
from snd_nerfstudio.scenes.masks.cache import MaskCache
cache = MaskCache(Path(sys.argv[1]), "superpixel", {"regions": 7})
for turn in range(300):
    key = f"{turn % 5:064x}"
    found = cache.get(key)
    assert found is None or (found == turn % 5).all()
    cache.put(key, np.full((40, 60), turn % 5, np.int64))
assert cache.statistics.damaged == 0 and cache.statistics.written == 300, cache.statistics
"""


def test_two_processes_write_and_read_the_same_files(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    assert not list(tmp_path.rglob(".*.tmp"))
