import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor, unproject
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import rasterize


def views(depths):
    count, height, width = depths.shape
    poses = torch.eye(4).repeat(count, 1, 1)
    poses[0, :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    poses[0, :3, :3] = torch.tensor([[0.0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # looks along world x
    intrinsics = torch.tensor([[20.0, 0, width / 2], [0, 40.0, height / 2], [0, 0, 1]]).repeat(count, 1, 1)
    return Views(torch.rand(count, 3, height, width), poses, intrinsics, None, depths, ("a", "b")[:count])


def test_a_pixel_is_unprojected_by_hand():
    v = views(torch.full((1, 4, 6), 2.0))
    points = unproject(v.depths, v.intrinsics, v.camera_to_worlds)
    # pixel (row 3, column 0): camera point ((0.5 - 3) / 20 * 2, (3.5 - 2) / 40 * 2, 2) = (-0.25, 0.075, 2)
    # world = R x + t = (2, 0.075, 0.25) + (1, 2, 3)
    torch.testing.assert_close(points[0, 3, 0], torch.tensor([3.0, 2.075, 3.25]))


def test_gaussians_keep_the_order_of_pixels_and_hide_those_without_depth():
    depths = torch.full((2, 4, 6), 2.0)
    depths[1, 2, 5] = 0
    gaussians = DepthReconstructor()(views(depths))
    hidden = (1 * 4 + 2) * 6 + 5
    assert len(gaussians) == 48
    assert (gaussians.opacities == 0).nonzero().flatten().tolist() == [hidden]
    assert torch.isfinite(gaussians.means).all()
    # three tenths of a pixel: 0.3 * 2 m * (1 / 20 + 1 / 40) / 2
    torch.testing.assert_close(gaussians.scales[0], torch.full((3,), 0.0225))


def test_a_view_is_reproduced_from_its_own_gaussians():
    depths = torch.full((1, 24, 36), 2.0)
    v = views(depths)
    coarse = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(24, 36), mode="bilinear")
    gaussians = DepthReconstructor()(v)
    splat = rasterize(gaussians, v.camera(0), smooth[0].permute(1, 2, 0).reshape(-1, 3))
    inner = (slice(2, -2), slice(2, -2))
    assert splat.alpha[inner].min() > 0.9
    difference = (splat.features / splat.alpha[..., None] - smooth[0].permute(1, 2, 0))[inner]
    assert difference.abs().mean() < 0.025  # what is left is the footprint's blur
    torch.testing.assert_close(splat.depth[inner], torch.full_like(splat.depth[inner], 2.0), rtol=1e-4, atol=0)


def test_no_depth_at_all_is_refused():
    from dataclasses import replace

    with pytest.raises(InputError, match="needs depth maps"):
        DepthReconstructor()(replace(views(torch.ones(1, 4, 6)), depths=None))
    with pytest.raises(InputError, match="no valid pixel"):
        DepthReconstructor()(views(torch.zeros(1, 4, 6)))
