"""Operators to files and back, and a folder of them that is damaged, full, or used by several at once."""

import json
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load as load_safetensors

from snd_nerfstudio.cache_files import ABANDONED_AFTER, COUNT_EVERY
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.supervision.operator_cache import (
    OperatorCache,
    content_digest,
    decode,
    encode,
    operator_key,
)
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_operator import SparseRows, TokenOperator

GRID = (3, 4)
PLENTY = 1e9
LIMIT_FLAG = "--pipeline.datamanager.operator-cache-limit"
OF_A_VALUE = 1 / 131070 + 2**-22
"""Half a step of 1/65,535, and what float32 makes of it, as a share of the row's largest."""


def sparse(height, width, random, total=None, most=8):
    """Rows of 0 to 8 entries, the first and the last of them empty; of any size, or with a given sum."""
    counts = torch.randint(1, most + 1, (height,), generator=random)
    counts[[0, -1]] = 0
    columns = [torch.randperm(width, generator=random)[:count].sort().values for count in counts.tolist()]
    values = [torch.rand(count, generator=random) + 1e-3 for count in counts.tolist()]
    if total is None:
        values = [row * 10 ** (9 * torch.rand((), generator=random) - 6) for row in values]
    else:
        values = [total * row / row.sum() for row in values]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    return SparseRows(starts, torch.cat(columns).int(), torch.cat(values), width)


def make_operator(seed=0, width=24, regions=5, black=True, total=None):
    random = torch.Generator().manual_seed(seed)
    h, w = GRID
    return TokenOperator(
        points=sparse(h * w, width, random, total),
        regions=sparse(regions, width, random, total) if regions else None,
        shares=sparse(h * w, regions, random, total, most=regions) if regions else None,
        context_shape=(2, *GRID) if width == 24 else (1, 1, width),
        coverage=torch.rand(GRID, generator=random),
        isolated=torch.rand((), generator=random),
        black=torch.rand(GRID, generator=random) < 0.5 if black else None,
    )


def key_of(number):
    """The name of some operator."""
    return operator_key(f"triplet {number}", "reconstructor", GRID, SupervisionSettings(), False)


def assert_same(decoded, operator):
    """Equal but for the rounding of values."""
    for name in ("points", "regions", "shares"):
        rows, expected = getattr(decoded, name), getattr(operator, name)
        assert (rows is None) == (expected is None), name
        if rows is None:
            continue
        assert rows.width == expected.width and torch.equal(rows.starts, expected.starts), name
        assert rows.columns.dtype == torch.int32 and torch.equal(rows.columns, expected.columns), name
        assert rows.values.dtype == torch.float32
        bounds = expected.starts.tolist()
        for start, end in zip(bounds, bounds[1:], strict=False):
            largest = expected.values[start:end].max() if end > start else 0.0
            error = (rows.values[start:end].double() - expected.values[start:end].double()).abs()
            assert (error <= float(largest) * OF_A_VALUE).all(), name
    assert decoded.context_shape == operator.context_shape and decoded.blendable
    for name in ("coverage", "isolated", "black"):
        value, expected = getattr(decoded, name), getattr(operator, name)
        assert (value is None) == (expected is None), name
        if value is not None:
            assert value.shape == expected.shape and value.dtype == expected.dtype and torch.equal(value, expected)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("black", [True, False])
@pytest.mark.parametrize("regions", [5, 0])
@pytest.mark.parametrize("width", [24, 65_536, 65_537, 70_000])
def test_what_is_read_is_what_was_written_but_for_the_rounding_of_values(width, regions, black):
    operator = make_operator(width=width, regions=regions, black=black)
    last = operator.points.starts.diff().nonzero()[-1]
    operator.points.columns[operator.points.starts[last + 1] - 1] = width - 1  # the largest column that there may be
    assert_same(decode(encode(operator, "key"), "key"), operator)


def test_columns_take_two_bytes_wherever_that_is_enough(tmp_path):
    for width, expected in ((65_536, np.uint16), (65_537, np.uint32)):
        file = tmp_path / f"{width}.safetensors"
        file.write_bytes(encode(make_operator(width=width), "key"))
        with safe_open(file, framework="numpy") as opened:
            assert opened.get_tensor("points.columns").dtype == expected
            assert opened.get_tensor("shares.columns").dtype == opened.get_tensor("points.values").dtype == np.uint16


def test_a_file_is_what_safetensors_reads_and_holds_no_pickle(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nothing is pickled")

    for name in ("load", "loads", "dump", "dumps", "Unpickler", "Pickler"):
        monkeypatch.setattr(pickle, name, never)
    operator = make_operator()
    contents = encode(operator, "the key")
    decode(contents, "the key")
    file = tmp_path / "operator.safetensors"
    file.write_bytes(contents)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["key"] == "the key"
        assert torch.equal(opened.get_tensor("coverage"), operator.coverage)
        assert opened.get_tensor("points.counts").long().tolist() == operator.points.starts.diff().tolist()
    size = int.from_bytes(contents[:8], "little")
    spans = [value["data_offsets"] for name, value in json.loads(contents[8 : 8 + size]).items() if name[0] != "_"]
    assert max(end for _, end in spans) == len(contents) - 8 - size  # a header, arrays, and nothing else


def arrays_of(operator):
    """What a file holds; the order of what safetensors writes of our metadata is by chance."""
    return {name: (array.dtype, array.tolist()) for name, array in load_safetensors(encode(operator, "key")).items()}


def test_rows_without_entries_and_a_matrix_of_nothing_but_such_rows_come_back():
    operator = make_operator()
    nothing = SparseRows(torch.zeros(13, dtype=torch.long), torch.zeros(0, dtype=torch.int32), torch.zeros(0), 24)
    for points in (nothing, replace(nothing, values=torch.zeros(0, dtype=torch.float64))):
        decoded = decode(encode(replace(operator, points=points), "key"), "key")
        assert_same(decoded, replace(operator, points=points))
        assert (decoded(torch.ones(2, 3, 4, 5), 1.0) == 0).all()


def test_values_of_nothing_but_zeros_and_of_very_large_and_small_numbers_come_back():
    for values in (torch.zeros(4), torch.tensor([3e37, 0.0, 1e37, 1.0]), torch.full((4,), 1e-30)):
        rows = SparseRows(torch.tensor([0] + 12 * [4]), torch.arange(4, dtype=torch.int32), values, 24)
        operator = replace(make_operator(), points=rows)
        assert_same(decode(encode(operator, "key"), "key"), operator)


def test_how_tensors_lie_in_memory_makes_no_difference():
    operator = make_operator()
    scattered = replace(
        operator,
        points=replace(operator.points, values=operator.points.values.repeat_interleave(2)[::2]),
        coverage=operator.coverage.T.contiguous().T,
        black=operator.black.T.contiguous().T,
    )
    assert not any(part.is_contiguous() for part in (scattered.points.values, scattered.coverage, scattered.black))
    assert arrays_of(scattered) == arrays_of(operator)
    assert_same(decode(encode(scattered, "key"), "key"), operator)


def test_values_of_double_precision_come_back_as_single():
    operator = make_operator()
    doubled = replace(operator, points=replace(operator.points, values=operator.points.values.double()))
    assert arrays_of(doubled) == arrays_of(operator)


def test_an_operator_without_its_regions_is_no_use_to_other_strengths_and_not_kept():
    operator = replace(make_operator(regions=0), blendable=False)
    with pytest.raises(ValueError, match="built for no blending"):
        encode(operator, "key")
    assert encode(replace(operator, blendable=True), "key")  # without masks there is nothing to blend with


@pytest.mark.parametrize("blending", [0.0, 0.5, 1.0])
def test_tokens_of_a_decoded_operator_are_those_of_the_original(blending):
    random = torch.Generator().manual_seed(1)
    for seed in range(5):
        operator = make_operator(seed, total=1.0)  # as rows of means are
        tokens = torch.randn(2, 3, 4, 96, generator=random)
        decoded = decode(encode(operator, "key"), "key")
        expected = operator(tokens, blending)
        assert expected.abs().max() > 0.3
        torch.testing.assert_close(decoded(tokens, blending), expected, rtol=0, atol=1e-4)


def test_what_is_decoded_may_be_written_to(recwarn):
    decoded = decode(encode(make_operator(), "key"), "key")
    decoded.coverage.zero_()
    decoded.points.values.zero_()
    decoded.black.fill_(True)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


def test_no_flipped_byte_and_no_truncation_goes_unnoticed():
    contents = encode(make_operator(), "key")
    generator = np.random.default_rng(0)
    for place in range(len(contents)):
        bit = 1 << int(generator.integers(8))
        for change in (0xFF, bit):
            damaged = contents[:place] + bytes([contents[place] ^ change]) + contents[place + 1 :]
            with pytest.raises(ValueError):
                decode(damaged, "key")
    for length in range(len(contents)):
        with pytest.raises(ValueError):
            decode(contents[:length], "key")
    for more in (b"\0", contents):
        with pytest.raises(ValueError):
            decode(contents + more, "key")


@pytest.mark.parametrize("header", [{}, {"__metadata__": {}}, {"__metadata__": {"key": "key"}}])
def test_some_other_safetensors_file_is_no_operator(header):
    text = json.dumps(header).encode()
    with pytest.raises(ValueError):
        decode(len(text).to_bytes(8, "little") + text, "key")


def test_a_file_whose_metadata_are_null_is_no_operator():
    text = b'{"__metadata__":null}'
    with pytest.raises(ValueError):
        decode(len(text).to_bytes(8, "little") + text, "key")


def test_the_file_of_another_operator_is_refused():
    with pytest.raises(ValueError, match="another operator"):
        decode(encode(make_operator(), "one"), "another")


# ---------------------------------------------------------------------- names


def make_triplet(**target):
    random = torch.Generator().manual_seed(0)

    def views(count, **more):
        return Views(
            images=torch.rand(count, 3, 6, 8, generator=random),
            camera_to_worlds=torch.rand(count, 4, 4, generator=random),
            intrinsics=torch.rand(count, 3, 3, generator=random),
            masks=torch.randint(0, 9, (count, 6, 8), generator=random),
            depths=torch.rand(count, 6, 8, generator=random),
            **more,
        )

    return ViewTriplet(views(2, names=("a", "b")), replace(views(1, names=("c",)), **target), "scene")


def with_change(triplet, side, part, view):
    """One number of one view's tensor changed."""
    views = getattr(triplet, side)
    tensor = getattr(views, part).clone()
    tensor[view].view(-1)[3] += 1
    return replace(triplet, **{side: replace(views, **{part: tensor})})


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("part", ["images", "camera_to_worlds", "intrinsics", "masks", "depths"])
def test_the_digest_changes_with_every_part_of_every_context(part, view):
    triplet = make_triplet()
    changed = with_change(triplet, "context", part, view)
    assert content_digest(triplet) != content_digest(changed)
    assert content_digest(changed) == content_digest(with_change(make_triplet(), "context", part, view))


@pytest.mark.parametrize("part", ["camera_to_worlds", "intrinsics", "masks"])
def test_the_digest_changes_with_the_target_s_camera_and_mask(part):
    triplet = make_triplet()
    assert content_digest(triplet) != content_digest(with_change(triplet, "target", part, 0))


def test_the_digest_changes_with_the_target_s_size_alone():
    plain = make_triplet(masks=None, depths=None)
    sizes = ((6, 8), (8, 6), (6, 9), (7, 8), (4, 12))
    triplets = [replace(plain, target=replace(plain.target, images=torch.zeros(1, 3, *size))) for size in sizes]
    assert len({content_digest(triplet) for triplet in triplets}) == len(sizes)


def test_the_digest_changes_with_what_is_there_at_all_and_with_the_order_of_the_contexts():
    triplet = make_triplet()
    without = [
        replace(triplet, **{side: replace(getattr(triplet, side), masks=None)}) for side in ("context", "target")
    ]
    without.append(replace(triplet, context=replace(triplet.context, depths=None)))
    swapped = {name: value.flip(0) for name, value in vars(triplet.context).items() if torch.is_tensor(value)}
    others = [*without, replace(triplet, context=replace(triplet.context, **swapped))]
    assert len({content_digest(other) for other in (triplet, *others)}) == 5


def test_the_digest_does_not_change_with_what_the_operator_does_not_depend_on():
    triplet = make_triplet()
    digest = content_digest(triplet)
    assert digest == content_digest(make_triplet())
    assert digest == content_digest(with_change(triplet, "target", "images", 0))
    assert digest == content_digest(with_change(triplet, "target", "depths", 0))
    assert digest == content_digest(replace(triplet, target=replace(triplet.target, depths=None)))
    assert digest == content_digest(replace(triplet, scene="elsewhere", digest="x"))
    assert digest == content_digest(replace(triplet, context=replace(triplet.context, names=())))
    images = triplet.context.images
    scattered = images.to(memory_format=torch.channels_last)
    assert not scattered.is_contiguous()
    assert digest == content_digest(replace(triplet, context=replace(triplet.context, images=scattered)))


def other_values():
    """A changed setting for every field."""
    settings, kinds = SupervisionSettings(), get_type_hints(SupervisionSettings)
    for field in fields(SupervisionSettings):
        value = getattr(settings, field.name)
        if isinstance(value, bool):
            yield field.name, not value
        elif isinstance(value, float):
            yield field.name, value / 2
        else:
            yield from ((field.name, other) for other in get_args(kinds[field.name]) if other != value)


@pytest.mark.parametrize(("name", "value"), list(other_values()))
def test_the_key_changes_with_every_setting_but_the_strength_of_blending(name, value):
    settings = SupervisionSettings()
    keys = {operator_key("d", "r", GRID, s, True) for s in (settings, replace(settings, **{name: value}))}
    assert len(keys) == (1 if name == "blending" else 2)


def test_the_key_changes_with_triplet_reconstructor_grid_and_black_tokens_and_is_a_file_name():
    arguments = ("d", "r", (3, 4), SupervisionSettings(), False)
    changes = {0: "e", 1: "s", 2: (4, 3), 4: True}
    keys = [operator_key(*arguments)]
    for place, value in changes.items():
        keys.append(operator_key(*arguments[:place], value, *arguments[place + 1 :]))
    assert len(set(keys)) == 5 and all(len(key) == 64 and int(key, 16) >= 0 for key in keys)
    assert operator_key(*arguments) == keys[0]
    # where one part ends and the next begins matters
    assert operator_key("ab", "c", *arguments[2:]) != operator_key("a", "bc", *arguments[2:])


# ---------------------------------------------------------------------- a folder


def open_cache(folder, limit=PLENTY):
    said = []
    return OperatorCache(folder, limit, said.append), said


def files_in(folder):
    """Every file below a folder, hidden ones too."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def test_an_operator_is_found_again_by_its_key_alone_and_by_whoever_opens_the_folder(tmp_path):
    cache, said = open_cache(tmp_path / "deep" / "cache")
    assert cache.get(key_of(0)) is None and not cache.path(key_of(0)).exists() and cache.size == 0
    assert cache.put(key_of(0), make_operator(0)) and cache.put(key_of(1), make_operator(1))
    for opened in (cache, open_cache(cache.folder)[0]):
        assert opened.path(key_of(0)).is_file() and not opened.path(key_of(2)).exists()
        assert_same(opened.get(key_of(0)), make_operator(0))
        assert_same(opened.get(key_of(1)), make_operator(1))
        assert opened.get(key_of(2)) is None
        assert opened.size == sum(path.stat().st_size for path in files_in(cache.folder))
        assert opened.statistics.found == 2 and opened.statistics.damaged == 0
    assert cache.statistics.written == 2 and cache.statistics.missing == 2 and not said
    assert files_in(cache.folder) == sorted([cache.path(key_of(0)), cache.path(key_of(1))])


def flip(path: Path, key):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "a flipped bit": flip,
    "half of it": lambda path, key: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "all but one byte": lambda path, key: path.write_bytes(path.read_bytes()[:-1]),
    "more than all": lambda path, key: path.write_bytes(path.read_bytes() + b" "),
    "empty": lambda path, key: path.write_bytes(b""),
    "another operator's": lambda path, key: path.write_bytes(encode(make_operator(), key_of(99))),
    "text": lambda path, key: path.write_text("This is not an operator at all.\n" * 20),
    "zeros": lambda path, key: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_reported_deleted_and_written_anew(tmp_path, damage):
    cache, said = open_cache(tmp_path)
    cache.put(key_of(0), make_operator(0))
    cache.put(key_of(1), make_operator(1))
    path = cache.path(key_of(0))
    DAMAGES[damage](path, key_of(0))
    assert cache.get(key_of(0)) is None
    assert len(said) == 1 and str(path) in said[0] and "damaged" in said[0] and "built anew" in said[0]
    assert not path.exists() and cache.statistics.damaged == 1 and cache.statistics.missing == 0
    assert cache.get(key_of(0)) is None and cache.statistics.missing == 1  # now it is simply not there
    assert cache.put(key_of(0), make_operator(0))
    assert_same(cache.get(key_of(0)), make_operator(0))
    assert_same(cache.get(key_of(1)), make_operator(1))
    assert len(said) == 1


@pytest.mark.parametrize("limit", [PLENTY, 1.0])
def test_what_is_kept_is_what_will_be_read_whether_there_is_room_or_not(tmp_path, limit):
    cache, _ = open_cache(tmp_path, limit=limit)
    operator = make_operator()
    kept = cache.keep(key_of(0), operator)
    assert_same(kept, operator)
    assert not torch.equal(kept.points.values, operator.points.values)
    read = cache.get(key_of(0)) if limit == PLENTY else decode(encode(operator, key_of(0)), key_of(0))
    assert read is not None and torch.equal(kept.points.values, read.points.values)
    assert len(files_in(tmp_path)) == (limit == PLENTY)


def test_a_folder_that_others_have_emptied_has_room_again(tmp_path, monkeypatch):
    size = len(encode(make_operator(), key_of(0)))
    cache, said = open_cache(tmp_path, limit=1.5 * size)
    assert cache.put(key_of(0), make_operator()) and not cache.put(key_of(1), make_operator())
    cache.path(key_of(0)).unlink()
    monkeypatch.setattr("snd_nerfstudio.cache_files.RECOUNT_AFTER", -1.0)
    assert cache.put(key_of(1), make_operator()) and cache.size == size and len(said) == 1


def test_a_full_cache_says_so_once_and_serves_what_it_has(tmp_path):
    size = len(encode(make_operator(), key_of(0)))
    operators = [make_operator() for _ in range(5)]
    cache, said = open_cache(tmp_path, limit=2.5 * size)
    assert [cache.put(key_of(number), operators[number]) for number in range(5)] == [True, True, False, False, False]
    assert len(said) == 1 and LIMIT_FLAG in said[0] and str(tmp_path) in said[0] and "is full" in said[0]
    assert cache.statistics.turned_away == 3 and cache.statistics.written == 2
    assert [cache.get(key_of(number)) is not None for number in range(5)] == [True, True, False, False, False]
    assert len(files_in(tmp_path)) == 2 and cache.size == 2 * size <= cache.limit
    # who opens it later counts what is there
    again, said = open_cache(tmp_path, limit=2.5 * size)
    assert not said and not again.put(key_of(2), operators[2]) and len(said) == 1
    assert_same(again.get(key_of(0)), operators[0])
    # and with a larger limit it goes on
    larger, said = open_cache(tmp_path, limit=3.0 * size)
    assert larger.put(key_of(2), operators[2]) and not larger.put(key_of(3), operators[3]) and len(said) == 1


def test_what_other_processes_write_counts_too_in_the_long_run(tmp_path, monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.cache_files.COUNT_EVERY", 3)
    assert COUNT_EVERY > 3
    size = len(encode(make_operator(), key_of(0)))
    cache, _ = open_cache(tmp_path, limit=7.0 * size)
    other, _ = open_cache(tmp_path)
    assert all(other.put(key_of(number), make_operator()) for number in range(3))
    written = [cache.put(key_of(number), make_operator()) for number in range(3, 13)]
    # after three of its own it counts, finds six, and has room for one
    assert written == [True] * 4 + [False] * 6 and len(files_in(tmp_path)) == 7


def test_an_operator_that_is_written_again_counts_once(tmp_path):
    size = len(encode(make_operator(), key_of(0)))
    cache, said = open_cache(tmp_path, limit=2.5 * size)
    assert all(cache.put(key_of(0), make_operator()) for _ in range(5)) and not said
    assert cache.size == size


def test_a_damaged_operator_makes_room_for_the_one_that_takes_its_place(tmp_path):
    size = len(encode(make_operator(), key_of(0)))
    cache, said = open_cache(tmp_path, limit=1.5 * size)
    cache.put(key_of(0), make_operator())
    flip(cache.path(key_of(0)), key_of(0))
    assert cache.get(key_of(0)) is None and cache.put(key_of(0), make_operator())
    assert_same(cache.get(key_of(0)), make_operator())
    assert len(said) == 1  # that it was damaged


@pytest.mark.parametrize("place", ["taken", "taken/cache"])
def test_a_folder_that_cannot_be_written_to_names_the_flag(tmp_path, place):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache .*taken.*Give another folder"):
        OperatorCache(tmp_path / place, PLENTY)
    assert files_in(tmp_path) == [tmp_path / "taken"]


def test_an_operator_that_cannot_be_written_is_said_once_and_leaves_nothing(tmp_path):
    cache, said = open_cache(tmp_path)
    keys = [key_of(0), key_of(0)[:2] + key_of(1)[2:]]
    (tmp_path / key_of(0)[:2]).write_text("a file where the folder should be")
    assert [cache.put(key, make_operator()) for key in keys] == [False, False]
    assert len(said) == 1 and "cannot be written to" in said[0] and str(tmp_path) in said[0]
    assert cache.statistics.turned_away == 2 and cache.size == 0
    assert files_in(tmp_path) == [tmp_path / key_of(0)[:2]]


@pytest.mark.parametrize("obstacle", ["a folder", "a file above"])
def test_what_cannot_be_read_is_as_good_as_missing(tmp_path, obstacle):
    cache, _ = open_cache(tmp_path)
    path = cache.path(key_of(0))
    if obstacle == "a folder":
        path.mkdir(parents=True)
    else:
        path.parent.write_text("a file")
    assert cache.get(key_of(0)) is None


def temporary(folder: Path, name, age):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"half an operator")
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_only_temporary_files_that_are_old_are_removed(tmp_path):
    cache, _ = open_cache(tmp_path)
    cache.put(key_of(0), make_operator())
    os.utime(cache.path(key_of(0)), (time.time() - 10 * ABANDONED_AFTER,) * 2)
    names = [f".{number:032x}.tmp" for number in range(4)]
    old = [temporary(folder, name, ABANDONED_AFTER + 60) for folder, name in ((tmp_path, names[0]),)]
    old.append(temporary(tmp_path / "ab", names[1], ABANDONED_AFTER + 60))
    new = [temporary(tmp_path, names[2], 0), temporary(tmp_path / "ab", names[3], ABANDONED_AFTER - 60)]
    assert cache.size == open_cache(tmp_path)[0].size
    assert not any(path.exists() for path in old) and all(path.exists() for path in new)
    assert_same(cache.get(key_of(0)), make_operator())


def test_temporary_files_of_others_are_left_alone(tmp_path):
    mine = temporary(tmp_path / "project", ".notes.tmp", 10 * ABANDONED_AFTER)
    open_cache(tmp_path)
    assert mine.exists()


# ---------------------------------------------------------------------- several at once


def use(folder, seed, rounds=12, keys=6):
    """Write and read the same operators as others do; what went wrong."""
    cache, said = open_cache(folder)
    problems = []
    order = np.random.default_rng(seed)
    for _ in range(rounds):
        for number in order.permutation(keys).tolist():
            found = cache.get(key_of(number))
            if found is not None and not torch.equal(found.coverage, make_operator(number).coverage):
                problems.append(f"{number} is another one")
            if not cache.put(key_of(number), make_operator(number)):
                problems.append(f"{number} was turned away")
    return [*problems, *said, *(f"{cache.statistics.damaged} damaged" for _ in range(cache.statistics.damaged))]


def assert_whole(folder, keys=6):
    cache, said = open_cache(folder)
    for number in range(keys):
        assert_same(cache.get(key_of(number)), make_operator(number))
    assert not said and len(files_in(folder)) == keys


def test_threads_that_share_a_cache_see_whole_operators_only(tmp_path):
    cache, said = open_cache(tmp_path)

    def work(seed):
        problems = []
        for number in np.random.default_rng(seed).integers(6, size=80).tolist():
            found = cache.get(key_of(number))
            if found is not None and not torch.equal(found.coverage, make_operator(number).coverage):
                problems.append(number)
            cache.put(key_of(number), make_operator(number))
        return problems

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [[], []]
    assert not said and cache.statistics.damaged == 0 and cache.statistics.written == 160
    assert cache.statistics.found + cache.statistics.missing == 160
    assert_whole(tmp_path)


def test_threads_with_a_cache_each_see_whole_operators_only(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda seed: use(tmp_path, seed), range(2))) == [[], []]
    assert_whole(tmp_path)


def test_processes_that_share_a_folder_see_whole_operators_only(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(use, [(tmp_path, seed, 40) for seed in range(2)], chunksize=1)
    assert results == [[], []]
    assert_whole(tmp_path)
