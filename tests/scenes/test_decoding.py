import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.decoding import (
    compact,
    compact_by_sorting,
    header_size,
    nearest,
    read_depth,
    read_image,
    read_mask,
    resized,
)


def photo(height, width, seed=0):
    """Smooth colours with edges and some texture, as photographs have them."""
    rows, columns = np.mgrid[:height, :width]
    waves = [np.sin(rows / 31 + phase) + np.cos(columns / (23 + 9 * phase)) for phase in range(3)]
    image = np.stack(waves, -1) * 45 + 128
    image[height // 3 : height // 2, width // 4 : width // 2] += 50
    image += np.random.default_rng(seed).normal(0, 3, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def by_pillow(file, size):
    """The slow twin: decode everything, then Pillow's bicubic filter."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("stored", "wanted", "reduction"),
    [
        ((448, 672), (112, 168), 4),
        ((448, 672), (56, 84), 8),
        ((448, 672), (100, 150), 4),
        ((448, 672), (113, 168), 2),  # 112 would be below
        ((448, 672), (225, 168), 1),
        ((450, 672), (112, 168), 2),  # 4 does not divide 450
        ((449, 673), (112, 168), 1),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_size_that_is_enough(tmp_path, stored, wanted, reduction):
    Image.fromarray(photo(*stored)).save(tmp_path / "i.jpg", quality=95)
    image = read_image(tmp_path / "i.jpg", wanted)
    assert image.reduction == reduction and image.stored_size == stored
    assert image.pixels.shape == (stored[0] // reduction, stored[1] // reduction, 3)


def test_other_formats_are_decoded_whole(tmp_path):
    Image.fromarray(photo(80, 120)).save(tmp_path / "i.png")
    image = read_image(tmp_path / "i.png", (10, 15))
    assert image.reduction == 1 and image.pixels.shape == (80, 120, 3)


@pytest.mark.parametrize("size", [(112, 168), (150, 210), (56, 84)])
def test_reduced_decoding_looks_like_pillows_decoding_and_resizing(tmp_path, size):
    Image.fromarray(photo(448, 672)).save(tmp_path / "i.jpg", quality=95)
    expected = by_pillow(tmp_path / "i.jpg", size).astype(float)
    fast = read_image(tmp_path / "i.jpg", size)
    assert fast.reduction > 1
    difference = resized(fast.pixels, size).transpose(1, 2, 0) - expected
    assert np.sqrt((difference**2).mean()) < 2.5  # of 255: above 40 dB
    assert abs(difference.mean()) < 0.2


def test_reduced_decoding_shifts_nothing(tmp_path):
    # a ramp of 0.25 a pixel: a shift by a tenth of a stored pixel would change values by 0.025; rows begin at 20 to 24,
    # so that rounding to whole numbers averages out
    rows, columns = np.mgrid[:400, :800]
    ramp = columns * 0.25 + rows / 100 + 20
    Image.fromarray(np.repeat(ramp.round().astype(np.uint8)[..., None], 3, -1)).save(tmp_path / "i.jpg", quality=100)
    image = read_image(tmp_path / "i.jpg", (100, 200))
    assert image.reduction == 4
    rows, columns = ((np.arange(size) + 0.5) * 4 - 0.5 for size in (100, 200))
    error = (image.pixels[..., 0] - (columns * 0.25 + rows[:, None] / 100 + 20))[:, 4:-4]
    assert abs(error.mean()) < 0.025


@pytest.mark.parametrize("size", [(30, 50), (100, 151), (160, 200)])
def test_resizing_is_pillows_to_within_a_step(size):
    image = photo(100, 150)
    expected = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(resized(image, size).transpose(1, 2, 0).astype(int) - expected).max() <= 1


def test_grey_and_transparent_images_become_colours(tmp_path):
    Image.fromarray(photo(40, 60)[..., 0]).save(tmp_path / "grey.jpg")
    Image.fromarray(photo(40, 60)).convert("RGBA").save(tmp_path / "clear.png")
    Image.fromarray(photo(40, 60)).convert("CMYK").save(tmp_path / "print.jpg")
    for name in ("grey.jpg", "clear.png", "print.jpg"):
        assert read_image(tmp_path / name, (10, 15)).pixels.shape[-1] == 3


def test_a_truncated_jpeg_is_refused_at_any_size(tmp_path):
    Image.fromarray(photo(448, 672)).save(tmp_path / "i.jpg", quality=95)
    contents = (tmp_path / "i.jpg").read_bytes()
    (tmp_path / "i.jpg").write_bytes(contents[: len(contents) // 2])
    for size in ((448, 672), (56, 84)):
        with pytest.raises(InputError, match=r"i\.jpg cannot be decoded"):
            read_image(tmp_path / "i.jpg", size)


@pytest.mark.parametrize("top", [60, 70_000, 1 << 40])
def test_ids_are_renumbered_alike_with_a_table_and_by_sorting(top):
    ids = np.random.default_rng(0).integers(0, top, (20, 30))
    ids[:5] = 0
    numbers = compact(ids)
    np.testing.assert_array_equal(numbers, compact_by_sorting(ids))
    assert numbers.dtype == np.int64
    expected = {value: place for place, value in enumerate(sorted({0, *ids.ravel().tolist()}))}
    np.testing.assert_array_equal(numbers, np.vectorize(expected.get)(ids))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.uint32, np.int32, np.uint64])
def test_ids_of_any_type_are_renumbered(kind):
    np.testing.assert_array_equal(compact(np.array([[7, 0], [200, 7]], kind)), [[1, 0], [2, 1]])


def test_a_mask_without_unlabelled_pixels_has_no_zero():
    np.testing.assert_array_equal(compact(np.array([[5, 9]])), [[1, 2]])


def test_nearest_takes_the_pixel_under_each_centre():
    np.testing.assert_array_equal(nearest(np.arange(4)[None], (1, 2)), [[1, 3]])  # centres at 1.0 and 3.0
    np.testing.assert_array_equal(nearest(np.arange(2)[None], (1, 4)), [[0, 0, 1, 1]])


def test_masks_keep_their_type_and_depth_its_units(tmp_path):
    Image.fromarray(np.array([[0, 40_000]], np.uint16)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[0, 40_000]]
    np.save(tmp_path / "d.npy", np.array([[1500.0, np.nan], [-3.0, np.inf]]))
    np.testing.assert_allclose(read_depth(tmp_path / "d.npy", 1e-3, (2, 2)), [[1.5, 0], [0, 0]])


def test_several_arrays_in_one_file_are_refused(tmp_path):
    np.savez(tmp_path / "several", a=np.zeros((2, 2)), b=np.zeros(3))
    (tmp_path / "several.npz").rename(tmp_path / "d.npy")
    for read in (lambda file: read_depth(file, 1.0, (2, 2)), read_mask, lambda file: header_size(file, "Depth map")):
        with pytest.raises(BrokenFileError, match=r"d\.npy cannot be decoded") as caught:
            read(tmp_path / "d.npy")
        assert caught.value.file == tmp_path / "d.npy"


def test_what_is_said_of_a_file_that_is_no_image_is_the_same_each_time(tmp_path):
    (tmp_path / "i.jpg").write_bytes(b"not an image")
    said = set()
    for _ in range(3):
        with pytest.raises(BrokenFileError) as caught:
            read_image(tmp_path / "i.jpg", (1, 1), b"not an image either")
        said.add(str(caught.value))
    assert len(said) == 1 and "it is no image" in said.pop()
