from dataclasses import replace

import numpy as np
import pytest
import torch

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.quality import (
    context_depths,
    depth_errors,
    gaussian_colours,
    psnr,
    reconstruction_quality,
    splat_colours,
    ssim,
)
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import rasterize
from snd_nerfstudio.splatting.harmonics import harmonic_colours


def test_psnr_by_hand():
    # mean squared error 0.01 is 20 dB; colours beyond white count as white
    assert psnr(torch.full((4, 3), 0.4), torch.full((4, 3), 0.5)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.full((4, 3), 1.7), torch.full((4, 3), 0.9)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.full((4, 3), -0.7), torch.full((4, 3), 0.1)) == pytest.approx(20.0, abs=1e-4)
    assert psnr(torch.full((4, 3), 0.4), torch.full((4, 3), 0.4)) == pytest.approx(100.0)


def pictures(height=24, width=30):
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(height, width, 3, generator=generator)
    return (truth + 0.2 * torch.randn(height, width, 3, generator=generator)).clamp(0, 1), truth


def test_ssim_as_its_definition_has_it():
    image, truth = pictures(9, 12)
    axis = np.arange(11) - 5
    window = np.exp(-(axis**2) / (2 * 1.5**2))
    window = np.outer(window, window) / window.sum() ** 2
    # beyond the border the picture is mirrored
    border = ((5, 5), (5, 5), (0, 0))
    x, y = (np.pad(t.numpy().astype(np.float64), border, mode="reflect") for t in (image, truth))
    values = []
    for row in range(9):
        for column in range(12):
            for channel in range(3):
                a, b = (p[row : row + 11, column : column + 11, channel] for p in (x, y))
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                variance_a, variance_b = (window * a * a).sum() - mean_a**2, (window * b * b).sum() - mean_b**2
                covariance = (window * a * b).sum() - mean_a * mean_b
                value = (2 * mean_a * mean_b + 0.01**2) * (2 * covariance + 0.03**2)
                values.append(value / ((mean_a**2 + mean_b**2 + 0.01**2) * (variance_a + variance_b + 0.03**2)))
    assert ssim(image, truth) == pytest.approx(np.mean(values), abs=1e-4)


def test_ssim_of_equal_pictures_is_one_and_colours_beyond_white_count_as_white():
    image, truth = pictures()
    assert ssim(truth, truth) == pytest.approx(1.0, abs=1e-6) and ssim(image, truth) < 0.95
    assert ssim(truth * 0 + 1.7, truth * 0 + 1) == pytest.approx(1.0, abs=1e-6)


def test_depth_errors_by_hand():
    measured = torch.tensor([[2.0, 0.0, 4.0], [1.0, 10.0, 0.0]])
    predicted = torch.tensor([[2.2, 9.0, 3.0], [1.0, 14.0, 0.1]])
    errors = depth_errors(predicted, measured)
    # 0.2 / 2, 1 / 4, 0 and 4 / 10; the ratios 1.1, 1.33, 1 and 1.4; four of six pixels
    assert errors.relative == pytest.approx((0.1 + 0.25 + 0 + 0.4) / 4)
    assert errors.right == pytest.approx(0.5) and errors.measured == pytest.approx(4 / 6)
    assert depth_errors(predicted, torch.zeros_like(measured)) is None


def test_a_depth_behind_the_camera_counts_as_wrong():
    errors = depth_errors(torch.tensor([-2.0, 2.0]), torch.tensor([2.0, 2.0]))
    assert errors.right == 0.5 and errors.relative == pytest.approx(1.0)


def pair(depth=3.0, seed=0):
    """Two views turned and moved against each other, and a target between them."""
    generator = torch.Generator().manual_seed(seed)
    poses = torch.eye(4).repeat(3, 1, 1)
    for number, angle in enumerate((0.0, 0.1, 0.05)):
        sine, cosine = np.sin(angle), np.cos(angle)
        poses[number, :3, :3] = torch.tensor([[cosine, 0, sine], [0, 1, 0], [-sine, 0, cosine]])
        poses[number, :3, 3] = torch.tensor([0.3 * number, 0.1, -0.2 * number])
    matrix = torch.tensor([[40.0, 0, 20], [0, 40, 14], [0, 0, 1]]).repeat(3, 1, 1)
    depths = depth * (0.5 + torch.rand(3, 28, 40, generator=generator))
    views = Views(torch.rand(3, 3, 28, 40, generator=generator), poses, matrix, None, depths)

    def part(chosen):
        return replace(views, **{name: value[chosen] for name, value in vars(views).items() if torch.is_tensor(value)})

    return ViewTriplet(part(slice(0, 2)), part(slice(2, 3)), "s")


def test_the_depths_of_the_gaussians_are_those_they_were_made_from():
    context = pair().context
    depths = context_depths(DepthReconstructor()(context), context)
    torch.testing.assert_close(depths, context.depths, rtol=1e-5, atol=1e-5)


def test_colours_are_the_reconstructors_own_or_else_those_of_the_context_pixels():
    triplet = pair()
    gaussians, camera = DepthReconstructor()(triplet.context), triplet.target.camera(0)
    colours = gaussian_colours(gaussians, triplet.context, camera)
    assert torch.equal(colours[28 * 40 + 5 * 40 + 7], triplet.context.images[1, :, 5, 7])
    coefficients = torch.randn(len(gaussians), 3, 4, generator=torch.Generator().manual_seed(1))
    own = replace(gaussians, harmonics=coefficients)
    seen = gaussian_colours(own, triplet.context, camera)
    assert torch.equal(seen, harmonic_colours(own, camera.camera_to_world[:3, 3]))
    elsewhere = gaussian_colours(own, triplet.context, triplet.context.camera(0))
    assert not torch.allclose(seen, colours) and not torch.allclose(seen, elsewhere)
    splat = splat_colours(own, triplet.context, camera)
    assert torch.equal(splat.features, rasterize(own, camera, seen).features)


@pytest.fixture(scope="module")
def held_out(rooms):
    from snd_nerfstudio.profiles import resolve
    from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig

    config = SnDDataManagerConfig(data=rooms, image_size=(56, 84), eval_triplets=4, reconstructor="depth")
    data = resolve(config, "fixed").setup(device="cpu")
    return [data.eval_triplet(number, with_depth=True) for number in range(4)]


def test_on_rooms_measured_depth_gives_a_good_reconstruction(held_out):
    for triplet in held_out:
        metrics, shown = reconstruction_quality(DepthReconstructor()(triplet.context), triplet)
        assert metrics["psnr"] > 18 and metrics["ssim"] > 0.5 and metrics["coverage"] > 0.9
        assert metrics["psnr_covered"] >= metrics["psnr"] - 0.5
        assert metrics["depth_error"] < 1e-4 and metrics["depth_right"] == 1.0
        assert shown["target"].shape == shown["splatted"].shape == (56, 84, 3)
        assert torch.equal(shown["target"], triplet.target.images[0].permute(1, 2, 0))


def test_on_rooms_wrong_depth_is_noticed(held_out):
    triplet = held_out[0]
    good, _ = reconstruction_quality(DepthReconstructor()(triplet.context), triplet)
    far = replace(triplet.context, depths=2 * triplet.context.depths)
    bad, _ = reconstruction_quality(DepthReconstructor()(far), triplet)
    assert bad["psnr"] < good["psnr"] - 2 and bad["ssim"] < good["ssim"]
    assert bad["depth_error"] == pytest.approx(1.0, abs=1e-3) and bad["depth_right"] == 0.0


def test_without_measured_depth_there_is_no_depth_error(held_out):
    triplet = held_out[0]
    gaussians = DepthReconstructor()(triplet.context)
    for depths in (None, torch.zeros_like(triplet.context.depths)):
        blind = replace(triplet, context=replace(triplet.context, depths=depths))
        metrics, _ = reconstruction_quality(gaussians, blind)
        assert set(metrics) == {"psnr", "psnr_covered", "ssim", "coverage"}


def test_holes_count_as_black_but_not_among_the_covered_pixels():
    triplet = pair()
    gaussians = DepthReconstructor()(triplet.context)
    nothing = replace(gaussians, opacities=torch.zeros_like(gaussians.opacities))
    metrics, shown = reconstruction_quality(nothing, triplet)
    expected = float(-10 * torch.log10(triplet.target.images.square().mean()))
    assert metrics["psnr"] == pytest.approx(expected, abs=1e-3)
    assert metrics["psnr_covered"] == 0.0 and metrics["coverage"] == 0.0 and (shown["splatted"] == 0).all()
