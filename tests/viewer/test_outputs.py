import math
from dataclasses import replace

import pytest
import torch

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.quality import gaussian_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import PinholeCamera, rasterize
from snd_nerfstudio.supervision.dense import dense_supervision, lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.outputs import (
    EMPTY,
    ShownScene,
    TargetPixels,
    ray_distance,
    ray_lengths,
    target_colours,
    target_pixels,
    without_gaps,
)
from snd_nerfstudio.viewer.pca import fit_pca


def wall():
    intrinsics = torch.tensor([[40.0, 0, 20], [0, 40, 14], [0, 0, 1]]).repeat(2, 1, 1)
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, 0, 3] = 0.1
    views = Views(torch.rand(2, 3, 28, 40), poses, intrinsics, None, torch.full((2, 28, 40), 3.0))
    target = Views(views.images[:1], poses[:1], intrinsics[:1])
    return ShownScene(ViewTriplet(views, target, "wall"), DepthReconstructor()(views))


def zoomed(scene, factor):
    camera = scene.triplet.target.camera(0)
    matrix = camera.intrinsics * torch.tensor([factor, factor, 1.0])[:, None]
    return PinholeCamera(camera.camera_to_world, matrix, round(28 * factor), round(40 * factor))


def test_at_training_resolution_and_below_the_gaussians_stay_as_they_are():
    scene = wall()
    for factor in (1.0, 0.5):
        torch.testing.assert_close(without_gaps(scene, zoomed(scene, factor)).scales, scene.gaussians.scales)


def test_an_enlarged_picture_has_no_gaps_between_the_gaussians():
    scene = wall()
    camera = zoomed(scene, 6.0)
    inner = (slice(18, -18), slice(18, -18))
    colours = gaussian_colours(scene.gaussians, scene.triplet.context, camera)
    holes = rasterize(scene.gaussians, camera, colours).alpha[inner].min()
    filled = rasterize(without_gaps(scene, camera), camera, colours).alpha[inner].min()
    assert holes < 0.7 and filled > 0.9


def test_a_ray_is_longer_than_the_depth_along_the_axis():
    camera = PinholeCamera(torch.eye(4), torch.tensor([[10.0, 0, 4], [0, 10, 3], [0, 0, 1]]), 6, 8)
    # pixel (row 2, column 6): direction (2.5 / 10, -0.5 / 10, 1)
    torch.testing.assert_close(ray_lengths(camera)[2, 6, 0], torch.tensor((1 + 0.0625 + 0.0025) ** 0.5))


# ---------------------------------------------------------------------- what the target view saw

BOX, WALL = 1, 2


def room():
    """A wall three away and a box half as far, seen from 0.45 left and right of the target.

    The box spans 0.6 x 0.5 about the axis. From the target it hides the wall within 0.6 of the axis; a context sees
    that wall again from 0.15 of the axis on.
    """
    xs = torch.tensor([-0.45, 0.45, 0.0])
    poses, matrix = torch.eye(4).repeat(3, 1, 1), torch.tensor([[40.0, 0, 20], [0, 40, 14], [0, 0, 1]])
    poses[:, 0, 3] = xs
    y, x = torch.meshgrid((torch.arange(28) + 0.5 - 14) / 40, (torch.arange(40) + 0.5 - 20) / 40, indexing="ij")
    box = ((xs[:, None, None] + 1.5 * x).abs() < 0.3) & ((1.5 * y).abs() < 0.25)
    depths = torch.where(box, 1.5, 3.0)
    place = torch.stack([xs[:, None, None] + depths * x, depths * y, depths], dim=1)  # what a pixel sees, world
    images = 0.5 + 0.4 * torch.sin(place * torch.tensor([1.5, 3.0, 2.0])[:, None, None])
    masks = torch.where(box, BOX, WALL)
    masks[:, :3] = 0  # nobody labelled the ceiling
    k = matrix.repeat(3, 1, 1)
    context = Views(images[:2], poses[:2], k[:2], masks[:2], depths[:2], ("left.jpg", "right.jpg"))
    target = Views(images[2:], poses[2:], k[2:], masks[2:], depths[2:], ("middle.jpg",))
    return ShownScene(ViewTriplet(context, target, "room"), DepthReconstructor(footprint=0.5)(context))


def moved(camera, x=0.0, y=0.0, z=0.0):
    pose = camera.camera_to_world.clone()
    pose[:3, 3] += torch.tensor([x, y, z])
    return replace(camera, camera_to_world=pose)


def seen_from(scene, camera):
    """Depth and coverage from a camera."""
    return rasterize(scene.gaussians, camera, scene.gaussians.means.new_zeros(len(scene.gaussians), 0))


def picture():
    """Something to draw in the target view, above 0 everywhere."""
    return 0.1 + torch.rand(28, 40, 3, generator=torch.Generator().manual_seed(1))


def any_depth(splat, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return replace(splat, depth=10 * torch.rand(splat.depth.shape, generator=generator))


def test_from_the_target_s_own_place_its_pictures_come_back_whatever_the_depth():
    scene = room()
    camera = scene.triplet.target.camera(0)
    splat = seen_from(scene, camera)
    for found in (splat, any_depth(splat), replace(splat, alpha=torch.zeros_like(splat.alpha))):
        pixels = target_pixels(scene, camera, found)
        assert pixels.seen.all()
        torch.testing.assert_close(pixels.take(picture()), picture(), rtol=0, atol=1e-5)
        assert torch.equal(pixels.take(picture(), flat=True), picture())


@pytest.mark.parametrize("covered", [0.0, 0.3])
def test_from_the_target_s_own_place_its_pictures_come_back_where_little_is_covered(covered):
    scene = room()
    opacities = scene.gaussians.opacities.clone().view(2, 28, 40)
    opacities[:, round(covered * 28) :] = 0
    scene = replace(scene, gaussians=replace(scene.gaussians, opacities=opacities.flatten()))
    camera = scene.triplet.target.camera(0)
    pixels = target_pixels(scene, camera, seen_from(scene, camera))
    assert pixels.seen.all() and torch.equal(pixels.take(picture(), flat=True), picture())


def test_other_intrinsics_at_the_target_s_place_crop_its_picture():
    scene = room()
    camera = scene.triplet.target.camera(0)
    matrix = camera.intrinsics - torch.tensor([[0.0, 0, 7], [0, 0, 5], [0, 0, 0]])
    crop = PinholeCamera(camera.camera_to_world, matrix, 12, 20)
    pixels = target_pixels(scene, crop, any_depth(seen_from(scene, crop)))
    assert pixels.seen.all()
    torch.testing.assert_close(pixels.take(picture()), picture()[5:17, 7:27], rtol=0, atol=1e-5)


def test_a_turned_camera_at_the_target_s_place_sees_what_it_saw_whatever_the_depth():
    scene = room()
    camera, angle = scene.triplet.target.camera(0), 0.2
    turned = camera.camera_to_world.clone()
    turned[:3, :3] = torch.tensor(
        [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    )
    camera = replace(camera, camera_to_world=turned)
    pixels = target_pixels(scene, camera, any_depth(seen_from(scene, camera)))
    # the middle pixel's ray leaves the target's picture at 40 tan(angle) right of its centre
    middle = (pixels.places[14, 20, 0] + 1) / 2 * 40
    assert float(middle) == pytest.approx(20 + 40 * math.tan(angle + math.atan(0.5 / 40)), abs=1e-3)
    assert pixels.seen[14, :30].all() and not pixels.seen[14, -5:].any()


def test_what_lies_beside_the_target_s_picture_it_did_not_see():
    scene = room()
    camera = scene.triplet.target.camera(0)
    wide = PinholeCamera(camera.camera_to_world, camera.intrinsics * torch.tensor([[0.5], [0.5], [1]]), 28, 40)
    pixels = target_pixels(scene, wide, seen_from(scene, wide))
    assert pixels.seen[:14, :20].all() and not pixels.seen[14:].any() and not pixels.seen[:, 20:].any()
    drawn = pixels.take(picture())
    assert (drawn[pixels.seen] > 0).all() and (drawn[~pixels.seen] == 0).all()


@pytest.mark.parametrize("shift", [0.3, -0.45])
def test_from_beside_the_target_its_picture_moves_with_the_surface(shift):
    scene = wall()
    camera = moved(scene.triplet.target.camera(0), x=shift)
    pixels = target_pixels(scene, camera, seen_from(scene, camera))
    columns = round(shift / 3 * 40)  # three away, 40 pixels of focal length
    drawn, expected = pixels.take(picture()), picture().roll(-columns, dims=1)
    inner = torch.zeros(28, 40, dtype=torch.bool)
    inner[3:-3, 3 + max(-columns, 0) : 37 - max(columns, 0)] = True
    assert pixels.seen[inner].all()
    torch.testing.assert_close(drawn[inner], expected[inner], rtol=0, atol=0.02)
    outside = pixels.seen[:, -columns:] if columns > 0 else pixels.seen[:, :-columns]
    assert not outside.any() and (drawn[~pixels.seen] == 0).all()


def test_what_a_box_hid_from_the_target_it_did_not_see():
    scene = room()
    camera = moved(scene.triplet.target.camera(0), x=0.9)
    splat = seen_from(scene, camera)
    pixels = target_pixels(scene, camera, splat)
    columns, rows = (torch.arange(40) + 0.5 - 20) / 40, (torch.arange(28) + 0.5 - 14) / 40
    x = (0.9 + 3 * columns)[None].expand(28, 40)  # of the wall, where a pixel sees it
    is_wall = splat.depth > 2.9
    shadow = is_wall & (x > 0.25) & (x < 0.5) & ((3 * rows).abs() < 0.4)[:, None]
    beside = is_wall & (x > 0.7) & (x < 1.35) & ((3 * rows).abs() < 0.75)[:, None]
    assert shadow.sum() > 20 and not pixels.seen[shadow].any()
    assert beside.sum() > 100 and pixels.seen[beside].all()
    labels = pixels.take_labels(scene.triplet.target.masks[0])
    assert (labels[beside] == WALL).all() and (labels[shadow] == 0).all()
    box = pixels.seen & (splat.depth < 1.6) & (splat.alpha > 0.5)
    assert box.sum() > 20 and (labels[box] == BOX).float().mean() > 0.9


def test_nothing_behind_a_camera_is_seen():
    scene = room()
    camera = scene.triplet.target.camera(0)
    pose = camera.camera_to_world.clone()
    pose[:3, [0, 2]] *= -1
    # such that one pixel looks exactly away from what the target looks at
    matrix = camera.intrinsics + torch.tensor([[0.0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
    for place in (0.0, 0.5):
        away = moved(PinholeCamera(pose, matrix, 28, 40), x=place)
        pixels = target_pixels(scene, away, seen_from(scene, away))
        assert not pixels.seen.any() and torch.isfinite(pixels.take(picture())).all()


def test_labels_are_not_mixed_and_large_ones_stay_whole():
    labels = torch.tensor([[3, 2**24 - 1], [7, 3]])
    places = torch.stack(torch.meshgrid(torch.linspace(-0.9, 0.9, 9), torch.linspace(-0.9, 0.9, 9), indexing="xy"), -1)
    taken = TargetPixels(places, torch.ones(9, 9, dtype=torch.bool)).take_labels(labels)
    assert taken.dtype == labels.dtype and set(taken.flatten().tolist()) == {3, 7, 2**24 - 1}
    assert taken[0, 0] == 3 and taken[0, -1] == 2**24 - 1 and taken[-1, 0] == 7


# ---------------------------------------------------------------------- blended features


def with_a_hole(scene):
    """The same, with nothing at all known of a corner."""
    opacities = scene.gaussians.opacities.clone().view(2, 28, 40)
    opacities[:, 15:, :18] = 0
    return replace(scene, gaussians=replace(scene.gaussians, opacities=opacities.flatten()))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("blending", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("weighting", ["coverage", "none"])
def test_three_blended_coordinates_have_the_colours_of_all_blended_channels(weighting, blending, masked):
    torch.manual_seed(0)
    scene, settings = with_a_hole(room()), SupervisionSettings(weighting=weighting, footprint="squared")
    context, target = scene.triplet.context, scene.triplet.target
    if not masked:
        target = replace(target, masks=None)
        scene = replace(scene, triplet=replace(scene.triplet, target=target))
    tokens = 3 + torch.randn(2, 7, 10, 12)
    basis = fit_pca(tokens.flatten(0, 2))
    slow = dense_supervision(
        tokens, context.masks, (28, 40), scene.gaussians, target.camera(0), target.mask(0),
        replace(settings, blending=blending),
    )  # fmt: skip
    values = lift(basis.project(tokens), context.masks, (28, 40), settings).features
    splatted, blended = target_colours(scene, values, basis, settings, blending)
    alpha = slow.alpha[..., None]
    covered = (alpha > 10 * EMPTY).expand(-1, -1, 3)
    assert 0.05 < float((~covered).float().mean()) < 0.5

    def coloured(features):
        return basis.colour(basis.project(features / alpha.clamp(min=EMPTY))) * alpha

    torch.testing.assert_close(splatted[covered], coloured(slow.splatted)[covered], rtol=0, atol=1e-4)
    if weighting == "coverage":
        torch.testing.assert_close(blended[covered], coloured(slow.blended)[covered], rtol=0, atol=1e-4)
        assert (blended[~covered] <= 10 * EMPTY).all()
    else:
        torch.testing.assert_close(blended, basis.colour(basis.project(slow.blended)), rtol=0, atol=1e-4)
    assert torch.equal(splatted, blended) == (weighting == "coverage" and (blending == 1 or not masked))


def test_the_splat_of_the_target_view_is_made_once():
    scene = room()
    assert scene.target_splat is scene.target_splat
    torch.testing.assert_close(scene.target_splat.depth, seen_from(scene, scene.triplet.target.camera(0)).depth)


def test_what_is_not_covered_is_behind_everything_else():
    scene = with_a_hole(room())
    camera = scene.triplet.target.camera(0)
    splat = seen_from(scene, camera)
    distance = ray_distance(splat, camera)[..., 0]
    z = distance / ray_lengths(camera)[..., 0]
    empty = splat.alpha <= EMPTY
    assert empty.sum() > 50 and (z[empty] >= splat.depth.max() - 1e-4).all()
    torch.testing.assert_close(z[~empty], splat.depth[~empty])
