"""The fisheye camera against OpenCV's, and undistorted images against those of the pinhole they are to look like."""

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.scenes.toolkit.fisheye import FisheyeCamera, Undistortion

SCANNETPP = FisheyeCamera(
    intrinsics=np.array([[790.0, 0.0, 880.0], [0.0, 792.0, 580.0], [0.0, 0.0, 1.0]]),
    distortion=np.array([-0.03, -0.006, -0.001, 0.0003]),
    height=1168,
    width=1752,
)
"""Of the size of a real one, with the principal point off the middle."""


def points(count: int = 500) -> np.ndarray:
    """Points in front of the camera, up to 68 degrees off its axis."""
    rng = np.random.default_rng(0)
    return np.column_stack([rng.uniform(-1.8, 1.8, (count, 2)), np.ones(count)]) * rng.uniform(0.5, 4.0, (count, 1))


def test_points_land_where_opencv_puts_them_half_a_pixel_further():
    cv2 = pytest.importorskip("cv2")
    # its pixel centres are whole numbers; with the principal point shifted it answers in its own coordinates
    matrix = SCANNETPP.intrinsics - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    expected, _ = cv2.fisheye.projectPoints(points()[:, None], np.zeros(3), np.zeros(3), matrix, SCANNETPP.distortion)
    np.testing.assert_allclose(SCANNETPP.project(points()), expected[:, 0] + 0.5, atol=1e-6)


def test_directions_undo_the_projection():
    found = SCANNETPP.directions(SCANNETPP.project(points()))
    np.testing.assert_allclose(found, points() / points()[:, 2:], atol=1e-9)


def test_the_principal_point_looks_straight_ahead():
    np.testing.assert_allclose(SCANNETPP.directions(np.array([[880.0, 580.0]])), [[0.0, 0.0, 1.0]], atol=1e-12)


def test_the_pinhole_has_its_principal_point_in_the_middle_and_follows_the_size():
    large, small = Undistortion(SCANNETPP, 1168, 1752).intrinsics, Undistortion(SCANNETPP, 584, 876).intrinsics
    assert large[:2, 2].tolist() == [876.0, 584.0] and small[:2, 2].tolist() == [438.0, 292.0]
    np.testing.assert_allclose(small[[0, 1], [0, 1]], 0.5 * large[[0, 1], [0, 1]], rtol=1e-9)


def waves(rays: np.ndarray, axis: int) -> np.ndarray:
    """A grey value for each ray, with some 20 waves across the image."""
    return 128 + 100 * np.sin(25 * rays[:, axis] / rays[:, 2])


@pytest.mark.parametrize(("height", "width"), [(292, 438), (146, 219)])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ray_has_its_colour_in_the_undistorted_image_where_the_pinhole_puts_it(height, width, axis):
    camera = SCANNETPP.resized(292, 438)
    row, column = np.mgrid[:292, :438] + 0.5
    drawn = waves(camera.directions(np.stack([column.ravel(), row.ravel()], -1)), axis).reshape(292, 438)
    undistortion = Undistortion(camera, height, width)
    found = undistortion.image(np.repeat(np.round(drawn).astype(np.uint8)[..., None], 3, -1))[..., 0].astype(float)

    def error(shift: float) -> float:
        row, column = np.mgrid[:height, :width] + 0.5
        pixels = np.stack([column.ravel() + shift, row.ravel() + shift, np.ones(found.size)])
        wanted = waves((np.linalg.inv(undistortion.intrinsics) @ pixels).T, axis).reshape(height, width)
        inside = (slice(height // 4, -height // 4), slice(width // 4, -width // 4))
        return float(np.sqrt(((found - wanted)[inside] ** 2).mean()))

    # a quarter of a pixel is seen
    assert error(0.0) < 0.5 * min(error(0.25), error(-0.25))


def test_a_pixel_that_mixes_an_anonymised_one_is_anonymised():
    camera = SCANNETPP.resized(80, 120)
    mask = np.full((80, 120), 255, np.uint8)
    assert (Undistortion(camera, 40, 60).mask(mask) == 255).all()
    mask[40, 60] = 0
    small = Undistortion(camera, 40, 60).mask(mask)
    assert set(np.unique(small)) == {0, 255} and 1 <= (small == 0).sum() <= 9
    # the pixel's own ray, seen by the pinhole
    (ray,) = camera.directions(np.array([[60.5, 40.5]]))
    x, y, _ = Undistortion(camera, 40, 60).intrinsics @ ray
    assert small[int(y), int(x)] == 0
    # grey is not whole either
    assert (Undistortion(camera, 40, 60).mask(np.where(mask == 0, 200, 255).astype(np.uint8)) == small).all()


def test_undistorted_rooms_look_like_those_of_a_pinhole(tmp_path):
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    from snd_nerfstudio.scenes.rooms import RoomsConfig, build_room, generate_rooms, render_view
    from snd_nerfstudio.scenes.rooms.toolkit_layout import fisheye

    config = RoomsConfig(tmp_path / "rooms", 1, seed=3, frames=2, height=168, width=252, layout="toolkit")
    root = generate_rooms(config)
    room = build_room(3, 0, 2)
    undistortion = Undistortion(fisheye(168, 252), 84, 126)
    stored = np.asarray(Image.open(root / "data/room_0000/dslr/resized_images/DSC00002.JPG"))
    found = undistortion.image(stored).astype(float)
    intrinsics = undistortion.intrinsics
    wanted = render_view(room, room.camera_to_worlds[1], intrinsics, 84, 126).image.astype(float)

    def difference(image: np.ndarray, dx: int, dy: int) -> float:
        return float(((np.roll(image, (dy, dx), (0, 1)) - wanted)[4:-4, 4:-4] ** 2).mean())

    here = difference(found, 0, 0)
    assert 10 * np.log10(255**2 / here) > 28
    # and better here than a pixel away on either side, evenly: nothing is shifted by half a pixel
    for first, second in (((1, 0), (-1, 0)), ((0, 1), (0, -1))):
        before, after = difference(found, *first), difference(found, *second)
        assert min(before, after) > 2 * here and 0.7 < before / after < 1.4
