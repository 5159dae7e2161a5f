from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.reconstruction.depth import unproject
from snd_nerfstudio.splatting import rasterize
from snd_nerfstudio.supervision.dense import lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.matching import HIT, Picked, at_depth, match_views, pick, projected, ray_camera
from tests.viewer.test_outputs import room, seen_from, with_a_hole

SETTINGS = SupervisionSettings()
BACKWARDS = torch.tensor([0.0, 0.0, -1.0])


def some_tokens(views=2, channels=16, seed=0):
    return torch.randn(views, 7, 10, channels, generator=torch.Generator().manual_seed(seed))


def tokens_of_places(views, channels=16):
    """Tokens that are a function of the place that their middle sees, so that both views agree."""
    places = unproject(views.depths, views.intrinsics, views.camera_to_worlds)[:, 2::4, 2::4]
    generator = torch.Generator().manual_seed(0)
    waves, phases = 2 * torch.randn(3, channels, generator=generator), 6 * torch.rand(channels, generator=generator)
    return torch.sin(places @ waves + phases)


def ray(camera, x, y):
    """Origin and direction of the ray through a pixel position."""
    origin = camera.camera_to_world[:3, 3]
    return origin, 0.7 * (at_depth(camera, x, y, 1.0) - origin)


# ---------------------------------------------------------------------- rays


@pytest.mark.parametrize("direction", [(0, 0, 1), (0, 0, -1), (1, 0, 0), (0, -2, 0), (0.3, -0.5, 0.2), (1e-4, 1, 1e-4)])
def test_the_middle_of_a_ray_s_picture_is_the_ray(direction):
    direction, origin = torch.tensor(direction, dtype=torch.float32), torch.tensor([1.0, 2.0, 3.0])
    camera = ray_camera(origin, direction, focal=40.0, pixels=5)
    rotation = camera.camera_to_world[:3, :3]
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(3), rtol=0, atol=1e-5)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1.0, abs=1e-5)
    found = at_depth(camera, 2.5, 2.5, 2.0)
    torch.testing.assert_close(found, origin + 2.0 * F.normalize(direction, dim=0), rtol=0, atol=1e-5)


def test_a_point_at_a_depth_is_where_the_pixel_s_is_unprojected_and_projects_back():
    views = room().triplet.context
    points = unproject(views.depths, views.intrinsics, views.camera_to_worlds)
    for number, row, column in ((0, 3, 5), (1, 14, 20), (1, 27, 39)):
        depth = float(views.depths[number, row, column])
        point = at_depth(views.camera(number), column + 0.5, row + 0.5, depth)
        torch.testing.assert_close(point, points[number, row, column], rtol=1e-5, atol=1e-5)
        assert projected(views, number, point) == pytest.approx((column + 0.5, row + 0.5), abs=1e-3)


def test_a_point_outside_the_picture_or_behind_the_camera_projects_to_nothing():
    target = room().triplet.target
    corners = {(20.0, 14.0): True, (0.1, 0.1): True, (39.9, 27.9): True, (-0.1, 14.0): False, (40.1, 14.0): False}
    corners |= {(20.0, -0.1): False, (20.0, 28.1): False}
    for (x, y), inside in corners.items():
        assert (projected(target, 0, at_depth(target.camera(0), x, y, 2.0)) is not None) == inside, (x, y)
    assert projected(target, 0, torch.tensor([0.0, 0.0, -2.0])) is None


# ---------------------------------------------------------------------- picking


@pytest.mark.parametrize("weighting", ["coverage", "none"])
@pytest.mark.parametrize(("column", "row"), [(20, 14), (4, 20), (35, 6), (17, 11)])
def test_a_ray_through_a_pixel_hits_what_is_seen_there(column, row, weighting):
    scene, settings = room(), replace(SETTINGS, weighting=weighting)
    tokens = tokens_of_places(scene.triplet.context)
    camera = scene.triplet.target.camera(0)
    picked = pick(scene, tokens, settings, *ray(camera, column + 0.5, row + 0.5))
    depth = float(scene.target_splat.depth[row, column])
    torch.testing.assert_close(picked.point, at_depth(camera, column + 0.5, row + 0.5, depth), rtol=0, atol=0.04)
    features = lift(tokens, scene.triplet.context.masks, (28, 40), settings).features
    splat = rasterize(scene.gaussians, camera, features)
    seen = splat.features / splat.alpha[..., None].clamp(min=1e-3)
    similarity = F.cosine_similarity(seen, picked.feature, dim=-1)
    assert similarity[row, column] > 0.98
    assert similarity[row, (column + 12) % 40] < 0.9


def test_the_length_of_a_ray_s_direction_makes_no_difference():
    scene, tokens = room(), some_tokens()
    origin, direction = ray(scene.triplet.target.camera(0), 9.5, 8.5)
    short, long = (pick(scene, tokens, SETTINGS, origin, factor * direction) for factor in (0.01, 100.0))
    torch.testing.assert_close(short.point, long.point, rtol=0, atol=1e-4)
    torch.testing.assert_close(short.feature, long.feature, rtol=0, atol=1e-4)


def test_a_ray_starts_where_it_is_said_to():
    scene, tokens = room(), some_tokens()
    behind_the_box = pick(scene, tokens, SETTINGS, torch.tensor([0.35, 0.0, 2.0]), -BACKWARDS)
    torch.testing.assert_close(behind_the_box.point, torch.tensor([0.35, 0.0, 3.0]), rtol=0, atol=0.02)


def test_a_ray_into_the_void_hits_nothing():
    scene, tokens = room(), some_tokens()
    camera = scene.triplet.target.camera(0)
    origin = camera.camera_to_world[:3, 3]
    assert pick(scene, tokens, SETTINGS, origin, BACKWARDS) is None
    assert pick(scene, tokens, SETTINGS, origin, torch.tensor([5.0, 0.0, 1.0])) is None
    scene = with_a_hole(scene)
    row, column = divmod(int(seen_from(scene, camera).alpha.flatten().argmin()), 40)
    assert seen_from(scene, camera).alpha[row, column] < HIT
    assert pick(scene, tokens, SETTINGS, *ray(camera, column + 0.5, row + 0.5)) is None


# ---------------------------------------------------------------------- matches


@pytest.mark.parametrize("view", [0, 1, 2])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (6, 9)])
def test_the_token_that_a_feature_was_copied_from_is_its_match(view, row, column):
    scene, tokens = room(), some_tokens(views=3)
    matches = match_views(scene, tokens, Picked(torch.tensor([0.0, 0.0, 3.0]), 2.5 * tokens[view, row, column]))
    assert [match.view for match in matches] == ["context 1", "context 2", "target"]
    found = matches[view]
    assert found.pixel == pytest.approx((4 * column + 2, 4 * row + 2))
    assert found.similarity == pytest.approx(1.0, abs=1e-5)
    assert all(match.similarity < 0.95 for place, match in enumerate(matches) if place != view)
    if view < 2:
        depths, camera = scene.triplet.context.depths[view], scene.triplet.context.camera(view)
    else:
        depths, camera = scene.target_splat.depth, scene.triplet.target.camera(0)
    u, v = 4 * column + 2, 4 * row + 2
    expected = at_depth(camera, u + 0.5, v + 0.5, float(depths[v, u]))
    torch.testing.assert_close(found.point, expected, rtol=0, atol=1e-4)


def test_where_the_picked_point_itself_is_in_each_view():
    scene, tokens = room(), some_tokens(views=3)
    # 20 pixels of half a width at a focal length of 40; the contexts stand 0.45 to either side
    for x, inside in ((0.0, (True, True, True)), (1.3, (False, True, True)), (-1.8, (True, False, False))):
        matches = match_views(scene, tokens, Picked(torch.tensor([x, 0.3, 3.0]), tokens[0, 0, 0]))
        assert tuple(match.expected is not None for match in matches) == inside
        for match, place in zip(matches, (-0.45, 0.45, 0.0), strict=True):
            if match.expected is not None:
                assert match.expected == pytest.approx((20 + 40 * (x - place) / 3, 14 + 4), abs=1e-3)


def test_what_nothing_is_known_about_has_no_place():
    scene, tokens = room(), some_tokens(views=3)
    empty = replace(scene.gaussians, opacities=torch.zeros(len(scene.gaussians)))
    matches = match_views(replace(scene, gaussians=empty), tokens, Picked(torch.zeros(3), tokens[1, 2, 3]))
    assert [match.point for match in matches] == [None, None, None]
    assert matches[1].pixel == pytest.approx((14, 10))


def test_tokens_of_another_size_than_the_pictures_still_have_their_centres_inside():
    scene = room()
    for rows, columns in ((1, 1), (28, 40), (5, 7)):
        tokens = torch.randn(3, rows, columns, 4, generator=torch.Generator().manual_seed(0))
        matches = match_views(scene, tokens, Picked(torch.zeros(3), tokens[2, -1, -1]))
        assert matches[2].pixel == pytest.approx((40 - 20 / columns, 28 - 14 / rows))
