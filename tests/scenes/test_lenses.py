import cv2
import numpy as np

from snd_nerfstudio.scenes.lenses import Lens

SIZE = (240, 320)
MATRIX = np.array([[250.0, 0, 163], [0, 245, 117], [0, 0, 1]])
DISTORTION = (-0.2, 0.05, 0.0, 0.0, 0.001, -0.002)
LENS = Lens(tuple(MATRIX.flatten()), DISTORTION, SIZE)


def seen_by_the_lens(points):
    """Pixel coordinates (centres at +0.5) of directions, by OpenCV's own projection."""
    k1, k2, k3, k4, p1, p2 = DISTORTION
    coefficients = np.array([k1, k2, p1, p2, k3, k4, 0, 0])
    return cv2.projectPoints(points, np.zeros(3), np.zeros(3), MATRIX, coefficients)[0][:, 0]


def directions(size):
    """Where the pixel centres of the pinhole's image of a size look."""
    scale = np.array([size[1] / SIZE[1], size[0] / SIZE[0], 1.0])
    columns, rows = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5)
    pixels = np.stack([columns, rows, np.ones_like(rows)], -1).reshape(-1, 3)
    return pixels @ np.linalg.inv(scale[:, None] * LENS.pinhole).T


def test_a_picked_value_is_that_of_the_pixel_the_direction_falls_into():
    values = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE)
    for size in (SIZE, (60, 80), (100, 161)):
        u, v = seen_by_the_lens(directions(size)).T
        clear = (np.abs(u % 1 - 0.5) < 0.49) & (np.abs(v % 1 - 0.5) < 0.49)  # not on a border between two pixels
        expected = np.floor(v).astype(int) * SIZE[1] + np.floor(u).astype(int)
        found = LENS.picked(values, size).ravel()
        np.testing.assert_array_equal(found[clear], expected[clear])
        assert clear.mean() > 0.9


def test_a_depth_map_of_another_size_is_looked_up_at_the_same_directions():
    rows = np.repeat(np.arange(120, dtype=np.float32)[:, None], 160, 1)  # half the image's size
    _, v = seen_by_the_lens(directions((48, 64))).T
    assert np.abs(LENS.picked(rows, (48, 64)).ravel() + 0.5 - v / 2).max() < 0.51


def test_an_image_decoded_at_half_its_size_is_undistorted_alike():
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    smooth = 128 + 60 * np.sin(rows / 20) * np.cos(columns / 25)
    image = np.repeat(smooth[..., None], 3, -1).astype(np.uint8)
    half = cv2.resize(image, (160, 120), interpolation=cv2.INTER_AREA)
    expected = cv2.resize(LENS.undistorted(image), (160, 120), interpolation=cv2.INTER_AREA).astype(float)
    # where colours run at up to 3 a pixel, half a pixel more or less would be seen
    assert np.abs(LENS.undistorted(half) - expected)[2:-2, 2:-2].max() < 1.5


def test_the_pinhole_sees_nothing_from_outside_the_image():
    assert (LENS.undistorted(np.full((*SIZE, 3), 255, np.uint8))[1:-1, 1:-1] > 250).all()
