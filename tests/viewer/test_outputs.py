import torch

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.quality import gaussian_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import PinholeCamera, rasterize
from snd_nerfstudio.viewer.outputs import ShownScene, ray_lengths, without_gaps


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
