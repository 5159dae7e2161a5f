"""Pictures of predictions and matches."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from snd_nerfstudio.probing.correspondence import PROTOCOLS, pair_errors
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings
from snd_nerfstudio.probing.pictures import (
    MOST_ERROR,
    RIGHT,
    SHEET_HEIGHT,
    WRONG,
    ShownMatches,
    as_picture,
    correspondence_sheet,
    depth_sheet,
    lines_picture,
    normal_colours,
    normals_sheet,
    pair_matches,
    recall_chart,
    segmentation_sheet,
    view_set,
)
from snd_nerfstudio.snd_visualize import Colouring, feature_pictures
from snd_nerfstudio.viewer.pictures import GAP, NARROWEST, heat

SIZE = (SHEET_HEIGHT, NARROWEST)
"""Pictures of this size are not scaled on a sheet."""


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*SIZE, 3), dtype=np.uint8)


def lowest(sheet, column):
    """The picture of a column in the lowest row of a sheet."""
    left = GAP + column * (NARROWEST + GAP)
    return sheet[-GAP - SHEET_HEIGHT : -GAP, left : left + NARROWEST]


# ---------------------------------------------------------------------- predictions


def test_depth_is_shown_in_the_range_of_the_measured_one_and_errors_are_relative():
    truth = torch.full(SIZE, 2.0)
    truth[:, :48] = 4.0
    truth[:20] = 0.0
    prediction = torch.full(SIZE, 2.5)
    picture = depth_sheet(noise(), truth, {"model": prediction})
    # 2.5 of a range from 2 to 4, and errors of 1.5 / 4 on the left and 0.5 / 2 on the right
    assert torch.equal(lowest(picture, 0), heat(prediction, 2.0, 4.0))
    error = torch.full(SIZE, 0.25)
    error[:, :48] = 0.375
    error[:20] = torch.nan
    torch.testing.assert_close(lowest(picture, 1), heat(error, 0.0, MOST_ERROR))
    assert torch.equal(lowest(picture, 1)[:20], torch.full((20, NARROWEST, 3), 0.5))


def test_without_any_measured_depth_a_picture_is_made_all_the_same():
    picture = depth_sheet(noise(), torch.zeros(SIZE), {"model": torch.ones(SIZE)})
    assert torch.equal(lowest(picture, 1), torch.full((*SIZE, 3), 0.5)) and picture.isfinite().all()


def test_normals_towards_the_camera_are_blue_and_none_is_grey():
    normals = torch.tensor([[[0, 0, -1.0], [1, 0, 0], [0, -1, 0], [0, 0, 0]]])
    expected = torch.tensor([[[0.5, 0.5, 1.0], [1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 0.5]]])
    assert torch.equal(normal_colours(normals), expected)


def test_errors_of_normals_are_angles_whatever_their_length():
    truth = torch.zeros(*SIZE, 3)
    truth[..., 2] = -1.0
    truth[:10] = 0.0
    turned = torch.tensor([0.0, -3.0, -3.0]).expand(*SIZE, 3)  # by 45 degrees, three times sqrt 2 long
    picture = normals_sheet(noise(), truth, {"model": turned})
    angle = torch.full(SIZE, 45.0)
    angle[:10] = torch.nan
    torch.testing.assert_close(lowest(picture, 1), heat(angle, 0.0, 60.0), atol=1e-2, rtol=0)


def test_wrong_classes_are_marked_and_unlabelled_pixels_are_not():
    truth = torch.zeros(SIZE, dtype=torch.uint8)
    truth[:50] = 3
    truth[:10] = 255
    prediction = torch.zeros(SIZE, dtype=torch.int64)
    image = noise()
    marked = lowest(segmentation_sheet(image, truth, {"model": prediction}), 1)
    grey = as_picture(image).mean(dim=2, keepdim=True).expand(*SIZE, 3)
    different = (marked != grey).any(dim=2)
    assert different[10:50].all() and not different[:10].any() and not different[50:].any()
    torch.testing.assert_close(marked[10:50], 0.3 * grey[10:50] + 0.7 * torch.tensor(WRONG) / 255)


# ---------------------------------------------------------------------- correspondence


def on_sphere(points):
    """Points of space as directions in four dimensions: different points, different directions."""
    squared = (points**2).sum(axis=-1, keepdims=True)
    return np.concatenate([2 * points, squared - 1], axis=-1) / (squared + 1)


@pytest.fixture(scope="module")
def pair(rooms):
    return RoomPairs(rooms, RoomPairsSettings(pairs=1, min_overlap=0.5, rotation_edges=(0.0, 20.0)))[0]


@pytest.fixture(scope="module")
def perfect(pair):
    """For each pixel of either image where in the second camera's space it is."""
    maps = []
    for depth, matrix, pose in zip(pair.depths, pair.intrinsics, (pair.relative_pose, np.eye(4)), strict=True):
        height, width = depth.shape
        v, u = np.mgrid[:height, :width] + 0.5
        rays = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(matrix).T
        points = (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]
        values = torch.from_numpy(on_sphere(points)).permute(2, 0, 1).float()
        maps.append(FeatureMap(values, depth.shape, depth.shape))
    return tuple(maps)


def measured(maps, pair, most, threshold):
    """What the measurement itself says."""
    depths = tuple(torch.from_numpy(depth) for depth in pair.depths)
    matrices = tuple(torch.from_numpy(matrix).float() for matrix in pair.intrinsics)
    settings = replace(PROTOCOLS["fixed"], matches=most)
    errors = pair_errors(maps, depths, matrices, torch.from_numpy(pair.relative_pose), settings).pixels
    return 100 * float((errors < threshold).float().mean())


@pytest.mark.parametrize("threshold", [0.5, 2.0])
def test_the_recall_of_a_picture_is_the_one_that_is_measured(pair, perfect, threshold):
    mirrored = (perfect[0], replace(perfect[1], values=perfect[1].values.flip(2)))
    for maps in (perfect, mirrored):
        found = pair_matches(maps, pair, most=100, threshold=threshold)
        assert found.recall == pytest.approx(measured(maps, pair, 100, threshold))
    assert pair_matches(perfect, pair, most=100, threshold=2.0).recall > 95
    assert pair_matches(mirrored, pair, most=100, threshold=2.0).recall < 50


def test_lines_are_spread_over_the_image_and_end_where_the_match_is(pair, perfect):
    found = pair_matches(perfect, pair, count=12, most=100)
    assert found.first.shape == found.second.shape == (12, 2) and found.right.shape == (12,)
    rows = found.first[:, 1].tolist()
    assert rows == sorted(rows) and rows[-1] - rows[0] > 0.3
    assert ((found.second > 0) & (found.second < 1)).all()
    assert len(pair_matches(perfect, pair, count=500, most=20).first) == 20


def test_images_without_depth_have_no_matches(pair, perfect):
    empty = replace(pair, depths=tuple(np.zeros_like(depth) for depth in pair.depths))
    found = pair_matches(perfect, empty)
    assert len(found.first) == 0 and found.recall == 0
    assert torch.equal(lines_picture(pair.images, found), lines_picture(pair.images, found))


def test_right_lines_are_blue_and_wrong_ones_orange():
    black = np.zeros((100, 100, 3), np.uint8)
    matches = ShownMatches(torch.tensor([[0.2, 0.2], [0.2, 0.8]]), torch.tensor([[0.5, 0.2], [0.5, 0.8]]),
                           torch.tensor([True, False]), 50.0)  # fmt: skip
    picture = (lines_picture((black, black), matches, height=100) * 255).round()
    assert picture.shape == (100, 204, 3)
    # both lines run level, from x = 20 to x = 100 + 4 + 50
    for row, colour in ((20, RIGHT), (80, WRONG)):
        assert (picture[row, 20:155] == torch.tensor(colour, dtype=torch.float32)).all()
        assert not (picture[row, :15] == torch.tensor(colour)).all(dim=-1).any()
        assert not (picture[row, 160:] == torch.tensor(colour)).all(dim=-1).any()


def test_a_sheet_has_a_row_for_each_model(pair, perfect):
    one = correspondence_sheet(pair, {"a": perfect}, title="pair")
    two = correspondence_sheet(pair, {"a": perfect, "b": perfect}, title="pair")
    assert two.shape[1] == one.shape[1] and two.shape[0] - one.shape[0] >= SHEET_HEIGHT


def test_higher_recall_makes_a_higher_bar_and_a_bin_without_pairs_none():
    def blue(picture):  # the first colour of the palette
        return ((picture * 255).round() == torch.tensor([0.0, 150.0, 255.0])).all(dim=2)

    low, high = (recall_chart({"model": [value, None]}, ["0-15", "15-30"]) for value in (20.0, 80.0))
    assert low.shape == high.shape
    legend = int(blue(recall_chart({"model": [None, None]}, ["0-15", "15-30"])).sum())
    assert int(blue(high).sum()) - legend == pytest.approx(4 * (int(blue(low).sum()) - legend), rel=0.05)


# ---------------------------------------------------------------------- features


def test_views_are_resized_to_whole_patches_and_named():
    shown = view_set([noise()[:60, :90], noise()[:56]], ["a.jpg", "b.jpg"], 14, "both")
    assert [tuple(view.image.shape) for view in shown.views] == [(3, 56, 84), (3, 56, 98)]
    assert [view.caption for view in shown.views] == ["1 a.jpg", "2 b.jpg"] and shown.title == "both"


def test_the_same_point_has_the_same_colour_in_both_views():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 6, 12, generator=generator)
    second = first.flip(1)
    for kind, (left, right) in feature_pictures([first, second], [(4, 6)] * 2, Colouring(clusters=4)).items():
        torch.testing.assert_close(left, right.flip(1), msg=kind)
        assert len(left.flatten(0, 1).unique(dim=0)) > 3
