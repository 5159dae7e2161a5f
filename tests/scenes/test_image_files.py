from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.file_list import FileList
from snd_nerfstudio.scenes.frames import Frames, check_frames, load_views, mask_origin
from snd_nerfstudio.scenes.image_files import open_bytes
from snd_nerfstudio.scenes.masks.maker import MaskMaker
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSegmenter, SuperpixelSettings
from snd_nerfstudio.scenes.reprojection import read_picture
from snd_nerfstudio.scenes.statistics import mend_sizes
from tests.scenes.chunk_files import jpeg, packed, scene, write_chunks

IMAGES = [jpeg(number, width=24, height=16) for number in (10, 90, 170)]


def frames_of(files: list[Path]) -> Frames:
    count = len(files)
    return Frames(
        image_files=FileList.of(files),  # type: ignore
        camera_to_worlds=np.tile(np.eye(4), (count, 1, 1)),
        intrinsics=np.tile(np.array([[20.0, 0, 12], [0, 20.0, 8], [0, 0, 1]]), (count, 1, 1)),
        sizes=np.tile([16, 24], (count, 1)),
        scene_index=np.zeros(count, int),
        frame_order=np.arange(count),
        scene_names=("s",),
    )


@pytest.fixture
def chunk(tmp_path) -> Path:
    return write_chunks(tmp_path / "packed", [scene("s", 3, images=packed(IMAGES))]) / "000000.torch"


@pytest.fixture
def inside(chunk) -> Frames:
    """Three frames in a chunk."""
    return frames_of([chunk / "s" / f"{number:06d}.jpg" for number in range(3)])


@pytest.fixture
def beside(tmp_path) -> Frames:
    """The same three frames as files."""
    files = [tmp_path / f"{number:06d}.jpg" for number in range(3)]
    for file, image in zip(files, IMAGES, strict=True):
        file.write_bytes(image)
    return frames_of(files)


def test_bytes_are_the_same_from_a_file_and_from_a_chunk(inside, beside):
    for frames in (inside, beside):
        for file, image in zip(frames.image_files, IMAGES, strict=True):
            with open_bytes(file) as stream:
                assert stream.read() == image


def test_views_are_the_same_from_files_and_from_a_chunk(inside, beside):
    views = [load_views(frames, [2, 0], (8, 12), with_masks=False, with_depth=False) for frames in (inside, beside)]
    assert torch.equal(views[0].images, views[1].images) and views[0].images.std() > 0.05
    assert views[0].names == views[1].names == ("000002.jpg", "000000.jpg")


def test_images_in_a_chunk_pass_the_checks_before_training(inside):
    check_frames(inside, needs_masks=False, needs_depth=False)
    with pytest.raises(InputError, match="000000.jpg has 24x16 pixels but its camera was calibrated for 24x18"):
        check_frames(replace(inside, sizes=np.tile([18, 24], (3, 1))), needs_masks=False, needs_depth=False)


def test_masks_are_kept_under_the_same_name_for_a_file_and_an_image_in_a_chunk(inside, beside, tmp_path):
    maker = MaskMaker(SuperpixelSegmenter(SuperpixelSettings(regions=4)), tmp_path / "cache")
    keys = [[maker.key(mask_origin(frames, n, (8, 12), False)) for n in range(3)] for frames in (inside, beside)]
    assert keys[0] == keys[1] and len(set(keys[0])) == 3


def test_inspection_reads_images_in_a_chunk(inside, beside):
    pictures = [np.asarray(read_picture(frames.image_files[1])) for frames in (inside, beside)]
    assert np.array_equal(*pictures) and pictures[0].shape == (16, 24, 3)
    assert mend_sizes(inside, np.arange(3))[1] is None
    assert mend_sizes(replace(inside, sizes=np.tile([8, 12], (3, 1))), np.arange(3))[1] is not None


def reading(frames: Frames) -> None:
    load_views(frames, [1], (8, 12), with_masks=False, with_depth=False)


def headers(frames: Frames) -> None:
    check_frames(frames, needs_masks=False, needs_depth=False)


def picture(frames: Frames) -> None:
    read_picture(frames.image_files[1])


def sizes(frames: Frames) -> None:
    mend_sizes(frames, np.arange(3))


@pytest.mark.parametrize("use", [reading, headers, picture, sizes])
def test_a_damaged_chunk_is_named_wherever_an_image_is_read(inside, chunk, use):
    chunk.write_bytes(chunk.read_bytes()[:1000])
    with pytest.raises(InputError, match="^[^ ]*000000.torch is damaged"):
        use(inside)


@pytest.mark.parametrize("use", [reading, headers, picture])
def test_an_image_that_is_no_image_is_named_by_its_path_through_the_chunk(inside, chunk, use):
    broken = packed([IMAGES[0], b"no image", IMAGES[2]])
    write_chunks(chunk.parent, [scene("s", 3, images=broken)])
    with pytest.raises(InputError, match="000000.torch/s/000001.jpg cannot be decoded"):
        use(inside)


def test_images_of_a_chunk_that_is_gone_are_missing(inside, chunk):
    chunk.unlink()
    with pytest.raises(InputError, match=r"Missing image .*000000.jpg \(3 of 3 are missing\)"):
        headers(inside)
    with pytest.raises(InputError, match="000001.jpg does not exist"):
        reading(inside)
