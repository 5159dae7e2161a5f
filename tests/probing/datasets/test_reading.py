import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.reading import (
    check_size,
    read_depth,
    read_ids,
    read_image,
    read_normals,
    resized_image,
    to_classes,
    unit_normals,
)


def saved(tmp_path, array, name="file.png", mode=None):
    file = tmp_path / name
    Image.fromarray(array, mode).save(file)
    return file


def test_grey_palette_and_transparent_images_have_three_channels(tmp_path):
    grey = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    np.testing.assert_array_equal(read_image(saved(tmp_path, grey)), np.stack([grey] * 3, axis=-1))
    colour = np.stack([grey, grey + 1, grey + 2], axis=-1)
    with_alpha = np.concatenate([colour, np.full((2, 3, 1), 7, np.uint8)], axis=-1)
    np.testing.assert_array_equal(read_image(saved(tmp_path, with_alpha)), colour)
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    palette.putpalette([1, 2, 3, 4, 5, 6])
    palette.save(tmp_path / "p.png", transparency=0)
    np.testing.assert_array_equal(read_image(tmp_path / "p.png")[0], [[1, 2, 3], [4, 5, 6]])


def test_a_rotation_in_the_header_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.zeros((8, 16, 3), np.uint8)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (8, 16, 3)


def test_what_is_no_image_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=r"Image .*none.jpg is missing: restore it"):
        read_image(tmp_path / "none.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"Image .*broken.jpg cannot be decoded"):
        read_image(tmp_path / "broken.jpg")
    full = saved(tmp_path, np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    full.write_bytes(full.read_bytes()[:2000])
    with pytest.raises(InputError, match=r"file.png cannot be decoded"):
        read_image(full)
    with pytest.raises(InputError, match=r"is it a depth map"):
        read_image(saved(tmp_path, np.full((4, 4), 1000, np.uint16)))


def test_depth_is_metres_of_the_unit(tmp_path):
    file = saved(tmp_path, np.array([[0, 1, 1500], [65535, 256, 2]], np.uint16))
    found = read_depth(file, 1e-3)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.float32([[0, 0.001, 1.5], [65.535, 0.256, 0.002]]))
    np.testing.assert_array_equal(read_depth(file, 1 / 256)[1], np.float32([65535 / 256, 1, 1 / 128]))


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)]
)
def test_depth_of_eight_bits_or_in_colours_is_refused(tmp_path, wrong):
    with pytest.raises(InputError, match=r"file.png is no 16-bit PNG of one channel"):
        read_depth(saved(tmp_path, wrong), 1e-3)


def test_ids_are_read_from_any_one_channel_and_not_from_colours(tmp_path):
    ids = np.array([[0, 3], [255, 7]])
    np.testing.assert_array_equal(read_ids(saved(tmp_path, ids.astype(np.uint8))), ids)
    np.testing.assert_array_equal(read_ids(saved(tmp_path, (ids * 100).astype(np.uint16))), ids * 100)
    palette = Image.fromarray(ids.astype(np.uint8), mode="P")
    palette.putpalette([5] * 768)  # every colour is the same: the indices count
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_ids(tmp_path / "p.png"), ids)
    with pytest.raises(InputError, match=r"Label map .*file.png has colours \(mode RGB\)"):
        read_ids(saved(tmp_path, np.zeros((4, 4, 3), np.uint8)))


def test_class_indices_where_zero_means_none_and_where_it_does_not(tmp_path):
    ids = np.array([[0, 1, 2], [3, 255, 3]])
    # 0 -> 255, v -> v - 1, 255 stays
    np.testing.assert_array_equal(to_classes(ids, 3, True, tmp_path), [[255, 0, 1], [2, 255, 2]])
    np.testing.assert_array_equal(to_classes(ids, 4, False, tmp_path), [[0, 1, 2], [3, 255, 3]])
    assert to_classes(ids, 4, False, tmp_path).dtype == np.uint8


def test_ids_that_are_no_class_are_refused_instead_of_wrapping(tmp_path):
    file = tmp_path / "a.png"
    with pytest.raises(InputError, match=r"a.png holds the id 41, but its classes are 1 to 40: map them"):
        to_classes(np.array([[1, 41]]), 40, True, file, "map them")
    with pytest.raises(InputError, match="id 40, but its classes are 0 to 39"):
        to_classes(np.array([[1, 40]]), 40, False, file)
    with pytest.raises(InputError, match="id 256"):  # as a byte it would be 0
        to_classes(np.array([[1, 256]]), 40, True, file)
    with pytest.raises(InputError, match="id -1"):
        to_classes(np.array([[-1]]), 40, True, file)


def test_normals_have_unit_length_or_are_none(tmp_path):
    found = unit_normals(np.array([[[0, 0, -2.0], [0.3, 0.3, 0.1], [0, 0, 0], [0, 0.6, 0.0]]]))
    # 0.3, 0.3, 0.1 has the length 0.44
    np.testing.assert_allclose(found[0], [[0, 0, -1], [0, 0, 0], [0, 0, 0], [0, 1, 0]])
    stored = np.array([[[0, 0, 0], [128, 127, 128], [255, 128, 128], [128, 128, 0]]], np.uint8)
    found = read_normals(saved(tmp_path, stored))
    np.testing.assert_array_equal(found[0, :2], np.zeros((2, 3)))  # black and grey
    np.testing.assert_allclose(found[0, 2:], [[1, 0, 0], [0, 0, -1]], atol=1 / 255)
    np.testing.assert_allclose(np.linalg.norm(found[0, 2:], axis=1), 1, atol=1e-6)
    with pytest.raises(InputError, match=r"no 8-bit RGB image \(mode L\)"):
        read_normals(saved(tmp_path, stored[..., 0]))


def test_a_size_other_than_the_images_is_named(tmp_path):
    check_size(tmp_path / "a.png", np.zeros((2, 3)), tmp_path / "b.png", np.zeros((2, 3, 3)))
    with pytest.raises(InputError, match=r"a.png has 3x2 pixels but its image b.png has 2x3"):
        check_size(tmp_path / "a.png", np.zeros((2, 3)), tmp_path / "b.png", np.zeros((3, 2, 3)))


def test_a_smaller_image_is_the_mean_of_its_areas():
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    expected = image.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(resized_image(image, 2, 2) - expected).max() <= 0.5
