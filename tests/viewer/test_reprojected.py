import numpy as np
import pytest
import torch

from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.viewer.reprojected import consistency, draw_epipolar_lines, pair_pictures, reproject


@pytest.fixture
def wall() -> Views:
    """A wall 2 away, 8 x 8 pixels of 0.25 each; the second camera is 0.5 to the right, so that it moves by 2 pixels."""
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, 0, 3] = 0.5
    intrinsics = torch.tensor([[8.0, 0, 4], [0, 8, 4], [0, 0, 1]]).repeat(2, 1, 1)
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, :, :, :6] = images[0, :, :, 2:]
    masks = torch.arange(8).repeat(2, 8, 1)
    return Views(images, poses, intrinsics, masks, torch.full((2, 8, 8), 2.0), ("a.png", "b.png"))


def test_points_fall_where_the_camera_s_motion_says(wall):
    colours, depth = reproject(wall, 0, 1)
    torch.testing.assert_close(colours[:, :6], wall.images[0, :, :, 2:].permute(1, 2, 0))
    assert (colours[:, 6:] == 0.05).all() and (depth[:, 6:] == 0).all() and (depth[:, :6] == 2).all()
    other, _ = reproject(wall, 0, 1, torch.ones(8, 8, 3))
    assert (other[:, :6] == 1).all()


def test_the_nearest_point_wins(wall):
    wall.depths[0, :, 4] = 1.0  # half as far: it moves by 4 pixels and hides what moves by 2 from column 2 to column 0
    colours, depth = reproject(wall, 0, 1)
    torch.testing.assert_close(colours[:, 0], wall.images[0, :, :, 4].T)
    assert (depth[:, 0] == 1).all()


def test_consistency_of_right_and_wrong_depth(wall):
    right = consistency(wall, 0, 1)
    assert right["depth_error"] == pytest.approx(0, abs=1e-6) and right["visible"] == 1
    assert right["colour_error"] == pytest.approx(0, abs=1e-6)
    wall.depths[1] = 3.0  # a third off
    wrong = consistency(wall, 0, 1)
    assert wrong["depth_error"] == pytest.approx(1 / 3) and wrong["visible"] == 0 and np.isnan(wrong["colour_error"])


def test_epipolar_lines_of_a_sideways_motion_are_horizontal(wall):
    matches = np.array([[[5.5, 3.5]], [[3.5, 3.5]]])
    _, second = draw_epipolar_lines(wall, matches)
    changed = (second - wall.images[1].permute(1, 2, 0)).abs().amax(dim=-1) > 0.02
    assert changed[3, 7] and not changed[0].any() and not changed[7].any()


def test_a_row_shows_what_there_is(wall):
    row = pair_pictures(wall, np.zeros((2, 0, 2)), ("a", "b"))
    assert len(row) == 8 and all(picture.shape == (8, 8, 3) for picture in row.values())
    bare = Views(wall.images, wall.camera_to_worlds, wall.intrinsics)
    assert list(pair_pictures(bare, np.zeros((2, 0, 2)), ("a", "b"))) == [
        "A: a", "B: b", "matches in a", "the same in b, with their epipolar lines",
    ]  # fmt: skip
