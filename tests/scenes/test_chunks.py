import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes import chunks
from snd_nerfstudio.scenes.chunks import chunk_index, is_packed, packed_names, read_chunk, read_packed
from snd_nerfstudio.scenes.file_list import FileList
from tests.scenes.chunk_files import packed, scene, write_chunks


@pytest.fixture
def chunk(tmp_path) -> Path:
    return write_chunks(tmp_path, [scene("aa", 3), scene("b.b", 2)]) / "000000.torch"


def of(file: Path) -> list[dict]:
    return torch.load(file, weights_only=True)


def rewrite(file: Path, change) -> None:
    content = of(file)
    torch.save(change(content) or content, file)


def test_every_image_is_read_as_it_was_packed(chunk):
    for one in of(chunk):
        for number, image in enumerate(one["images"]):
            assert read_packed(chunk / one["key"] / f"{number:06d}.jpg") == image.numpy().tobytes()


def test_what_a_chunk_says_of_its_scenes_is_read_in_their_order(chunk):
    found, content = read_chunk(chunk), of(chunk)
    assert found.index.keys == ("aa", "b.b") and found.index.bounds.tolist() == [0, 3, 5]
    assert found.index.frames("b.b") == range(3, 5)
    assert found.cameras.dtype == np.float32 and found.timestamps.dtype == np.int64
    assert np.array_equal(found.cameras, torch.cat([one["cameras"] for one in content]).numpy())
    assert found.timestamps.tolist() == [0, 33_333, 66_666, 0, 33_333]
    assert found.index.lengths.tolist() == [len(image) for one in content for image in one["images"]]


def test_offsets_are_where_the_files_bytes_are(chunk):
    index, whole = chunk_index(chunk), chunk.read_bytes()
    images = [image.numpy().tobytes() for one in of(chunk) for image in one["images"]]
    assert index.offsets is not None and index.contents is None
    for offset, length, image in zip(index.offsets, index.lengths, images, strict=True):
        assert whole[offset : offset + length] == image


def test_chunks_in_any_form_that_torch_writes_give_the_same_images(chunk, tmp_path):
    content = of(chunk)
    # one storage for all images of a scene; tensors that torch pads; images first in the file
    shared = torch.cat(content[0]["images"])
    ends = np.cumsum([0, *map(len, content[0]["images"])])
    views = [shared[start:end] for start, end in zip(ends, ends[1:])]
    other = [{**content[0], "images": views}, {**content[1], "first": torch.zeros(5000)}]
    torch.save([dict(reversed(one.items())) for one in other], tmp_path / "views.torch")
    torch.save(content, tmp_path / "old.torch", _use_new_zipfile_serialization=False)
    for name, has_offsets in (("views.torch", True), ("old.torch", False)):
        file = tmp_path / name
        assert (chunk_index(file).offsets is not None) == has_offsets
        for one in content:
            for number, image in enumerate(one["images"]):
                assert read_packed(file / one["key"] / f"{number:06d}.jpg") == image.numpy().tobytes()


def test_where_offsets_cannot_be_told_the_mapped_tensors_are_sliced(chunk, tmp_path):
    # every second byte of a storage is no stretch of the file
    content = of(chunk)
    wanted = content[1]["images"][0].numpy().tobytes()
    content[1]["images"][0] = torch.repeat_interleave(content[1]["images"][0], 2)[::2]
    torch.save(content, chunk)
    assert chunk_index(chunk).offsets is None
    assert read_packed(chunk / "b.b" / "000000.jpg") == wanted


def rchar() -> int:
    """Bytes that this process has read with system calls."""
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def resident() -> int:
    """Bytes of files that this process has mapped and touched."""
    fields = Path("/proc/self/status").read_text().split("RssFile:")[1].split()
    return 1024 * int(fields[0])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="Linux counts what a process reads")
def test_reading_a_frame_reads_its_bytes_and_not_the_chunk(tmp_path):
    generator = np.random.default_rng(0)
    images = [torch.from_numpy(generator.integers(0, 255, 1_000_000, dtype=np.uint8)) for _ in range(40)]
    write_chunks(tmp_path, [scene("large", 40, images=images)])
    file = tmp_path / "000000.torch"
    chunk_index(write_chunks(tmp_path / "warm", [scene("a")]) / "000000.torch")  # what torch imports the first time
    before, mapped = rchar(), resident()
    assert chunk_index(file).offsets is not None
    # three images are compared with the file
    assert rchar() - before < 5e6 and resident() - mapped < 8e6
    tracemalloc.start()
    before, mapped = rchar(), resident()
    content = read_packed(file / "large" / "000023.jpg")
    read, peak = rchar() - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert content == images[23].numpy().tobytes()
    assert 1_000_000 <= read < 1_100_000 and peak < 1_200_000 and resident() - mapped < 1e6


def test_an_index_is_kept_until_its_file_changes(chunk):
    first = chunk_index(chunk)
    assert chunk_index(chunk) is first
    rewrite(chunk, lambda content: [scene("cc", 5)])
    os.utime(chunk, ns=(1, 1))
    assert chunk_index(chunk).keys == ("cc",)
    assert read_packed(chunk / "cc" / "000004.jpg") == of(chunk)[0]["images"][4].numpy().tobytes()


def test_indices_used_least_are_forgotten_when_there_are_too_many(tmp_path, monkeypatch):
    folder = write_chunks(tmp_path, *([scene(f"s{number}")] for number in range(4)))
    files = sorted(folder.glob("*.torch"))
    size = chunk_index(files[0]).memory
    monkeypatch.setattr(chunks, "_CACHED_BYTES", 2 * size)
    monkeypatch.setattr(chunks, "_indices", chunks._Indices())
    first, second = chunk_index(files[0]), chunk_index(files[1])
    assert chunk_index(files[0]) is first
    chunk_index(files[2])
    assert chunk_index(files[0]) is first and chunk_index(files[1]) is not second


def test_many_threads_read_at_once(tmp_path):
    folder = write_chunks(tmp_path, *([scene(f"s{number}", 6)] for number in range(4)))
    wanted = {
        folder / f"{number:06d}.torch" / f"s{number}" / f"{place:06d}.jpg": image.numpy().tobytes()
        for number in range(4)
        for place, image in enumerate(of(folder / f"{number:06d}.torch")[0]["images"])
    }
    wrong = []

    def read(seed: int) -> None:
        paths = list(wanted)
        for choice in np.random.default_rng(seed).permutation(len(paths)):
            if read_packed(paths[choice]) != wanted[paths[choice]]:
                wrong.append(paths[choice])

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_paths_through_chunks_are_told_from_files(chunk, tmp_path):
    (tmp_path / "folder.torch" / "s").mkdir(parents=True)
    assert is_packed(chunk / "aa" / "000000.jpg")
    assert not is_packed(tmp_path / "folder.torch" / "s" / "000000.jpg")
    assert not is_packed(chunk) and not is_packed(Path("a.jpg")) and not is_packed(tmp_path / "aa" / "0.jpg")


def test_a_list_of_files_knows_which_images_chunks_have(chunk, tmp_path):
    (tmp_path / "plain.jpg").touch()
    names = ["aa/000000.jpg", "aa/000002.jpg", "aa/000003.jpg", "b.b/000001.jpg", "b.b/1.jpg", "cc/000000.jpg"]
    files = [*(chunk / name for name in names), tmp_path / "plain.jpg", tmp_path / "gone.torch/aa/000000.jpg", None]
    assert FileList.of(files).exist().tolist() == [True, True, False, True, False, False, True, False, False]
    assert packed_names(chunk / "aa") == {b"000000.jpg", b"000001.jpg", b"000002.jpg"}


class Touch:
    """What a hostile chunk may hold: unpickled, it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_chunk_with_an_object_is_refused_and_nothing_is_executed(chunk, tmp_path, zipped):
    hostile = [*of(chunk), {**scene("zz"), "url": Touch(tmp_path / "touched")}]
    torch.save(hostile, chunk, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"000000.torch holds more than tensors .*open.*is not opened"):
        chunk_index(chunk)
    assert not (tmp_path / "touched").exists()


def with_scene(**changes):
    return lambda file: rewrite(file, lambda content: [content[0], {**scene("b.b", 2), **changes}])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:2000]), "000000.torch is damaged, or is no chunk"),
        (lambda f: f.write_bytes(b"no such thing"), "000000.torch is damaged, or is no chunk"),
        (lambda f: f.write_bytes(b""), "000000.torch is damaged, or is no chunk"),
        (lambda f: torch.save({"aa": 1}, f), "000000.torch holds dict; expected a list of scenes"),
        (lambda f: torch.save([3], f), "scene 0 of the list is int"),
        (lambda f: rewrite(f, lambda c: c[0].pop("cameras") is None or c), "scene aa has no `cameras`"),
        (lambda f: rewrite(f, lambda c: [c[0], c[1], c[0]]), "holds scene aa twice"),
        (with_scene(key="a/b"), "scene 1 of the list has key 'a/b'"),
        (with_scene(key=7), "scene 1 of the list has key 7"),
        (with_scene(key=".."), r"scene 1 of the list has key '\.\.'"),
        (with_scene(cameras=torch.zeros(2, 16)), r"`cameras` of scene b.b must be a tensor \[2, 18\]"),
        (with_scene(cameras=torch.zeros(3, 18)), r"`cameras` of scene b.b must be a tensor \[2, 18\]"),
        (with_scene(timestamps=torch.zeros(3)), "`timestamps` of scene b.b must be .* 2 images"),
        (with_scene(images=torch.zeros(2)), "`images` of scene b.b is Tensor"),
        (with_scene(images=[torch.zeros(4), torch.zeros(4)]), "image 0 of scene b.b is no tensor uint8"),
        (with_scene(images=packed([b"image", b""])), "image 1 of scene b.b is empty"),
    ],
)
def test_what_is_wrong_with_a_chunk_is_named(chunk, damage, message):
    damage(chunk)
    with pytest.raises(InputError, match=message):
        chunk_index(chunk)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("cc/000000.jpg", "000000.torch has no scene cc"),
        ("aa/000003.jpg", "scene aa has 3 images, and no 000003.jpg"),
        ("aa/1.jpg", "scene aa has 3 images, and no 1.jpg"),
        ("aa/first.jpg", "no first.jpg"),
    ],
)
def test_an_image_that_a_chunk_does_not_have_is_named(chunk, path, message):
    with pytest.raises(InputError, match=message):
        read_packed(chunk / path)


def test_a_chunk_that_is_not_there_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_packed(tmp_path / "000000.torch" / "aa" / "000000.jpg")


def test_a_chunk_cut_short_under_its_index_is_named(chunk):
    index = chunk_index(chunk)
    os.truncate(chunk, int(index.offsets[-1]) + 10)
    with pytest.raises(InputError, match="000000.torch has become shorter"):
        index.read(4)


def test_an_empty_chunk_has_no_scenes(tmp_path):
    torch.save([], tmp_path / "000000.torch")
    found = read_chunk(tmp_path / "000000.torch")
    assert found.index.keys == () and found.cameras.shape == (0, 18) and found.timestamps.shape == (0,)
