"""What `rasterize` promises, for every engine that runs on a CPU; expected pixels are worked out in the comments."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from snd_nerfstudio.splatting import Gaussians, available_engines, rasterize

both_engines = pytest.mark.parametrize("engine", ["numba", "reference"])


@both_engines
def test_one_gaussian_has_its_opacity_at_its_centre_and_falls_off_with_the_blurred_variance(
    engine, frontal_camera, on_axis
):
    # Standard deviation 0.1 at depth 2, focal length 10: variance 0.25 px^2, with the blur 0.55.
    features = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    out = rasterize(on_axis((2.0, 0.1, 0.8)), frontal_camera, features, engine=engine)
    beside, diagonal = 0.8 * math.exp(-0.5 / 0.55), 0.8 * math.exp(-0.5 * 2 / 0.55)
    assert out.alpha[5, 5].item() == pytest.approx(0.8, abs=1e-12)
    for row, column in [(4, 5), (6, 5), (5, 4), (5, 6)]:
        assert out.alpha[row, column].item() == pytest.approx(beside, abs=1e-12)
    assert out.alpha[4, 6].item() == pytest.approx(diagonal, abs=1e-12)
    # Two pixels to the side: 0.8 exp(-2 / 0.55) = 0.0211, one further exp(-4.5 / 0.55) * 0.8 = 0.0002 < 1/255.
    assert out.alpha[5, 7].item() == pytest.approx(0.8 * math.exp(-2 / 0.55), abs=1e-12)
    assert out.alpha[5, 8].item() == 0
    # Premultiplied: not divided by alpha.
    assert out.features[5, 5].tolist() == pytest.approx([0.8, -1.6])
    assert out.depth[5, 5].item() == pytest.approx(2.0)
    assert out.depth[0, 0].item() == 0


@both_engines
def test_the_nearer_gaussian_covers_the_farther_one_whatever_their_order(engine, frontal_camera, on_axis):
    # Weights 0.5 and (1 - 0.5) 0.8 = 0.4; depth (0.5 * 1 + 0.4 * 3) / 0.9.
    features = torch.tensor([[10.0], [1.0]], dtype=torch.float64)
    for order in ([0, 1], [1, 0]):
        rows = [[(1.0, 0.1, 0.5), (3.0, 0.1, 0.8)][i] for i in order]
        out = rasterize(on_axis(*rows), frontal_camera, features[order], engine=engine)
        assert out.features[5, 5].item() == pytest.approx(0.5 * 10 + 0.4 * 1)
        assert out.alpha[5, 5].item() == pytest.approx(0.9)
        assert out.depth[5, 5].item() == pytest.approx(1.7 / 0.9)


@both_engines
def test_at_equal_depth_the_lower_index_is_in_front(engine, frontal_camera, on_axis):
    features = torch.eye(3, dtype=torch.float64)
    out = rasterize(on_axis(*[(1.0, 0.1, 0.5)] * 3), frontal_camera, features, engine=engine)
    assert out.features[5, 5].tolist() == pytest.approx([0.5, 0.25, 0.125])


@both_engines
def test_alpha_is_capped_at_0_999(engine, frontal_camera, on_axis):
    features = torch.eye(2, dtype=torch.float64)
    out = rasterize(on_axis((1.0, 0.1, 1.0), (2.0, 0.1, 0.5)), frontal_camera, features, engine=engine)
    assert out.features[5, 5].tolist() == pytest.approx([0.999, 0.0005])


@both_engines
def test_a_gaussian_fainter_than_one_255th_is_skipped(engine, frontal_camera, on_axis):
    for opacity, expected in [(1.01 / 255, 1.01 / 255), (0.99 / 255, 0.0)]:
        out = rasterize(on_axis((1.0, 0.1, opacity)), frontal_camera, torch.ones(1, 1).double(), engine=engine)
        assert out.alpha[5, 5].item() == pytest.approx(expected)


@both_engines
def test_a_pixel_ends_before_the_gaussian_that_would_take_its_transmittance_to_1e_4(engine, frontal_camera, on_axis):
    # 1 -> 0.1 -> 0.01 -> 0.001 -> (0.0001 would end it); the faint one behind, alone harmless, is not taken either.
    rows = [(1.0, 0.1, 0.9), (2.0, 0.2, 0.9), (3.0, 0.3, 0.9), (4.0, 0.4, 0.91), (5.0, 0.5, 0.1)]
    out = rasterize(on_axis(*rows), frontal_camera, torch.eye(5, dtype=torch.float64), engine=engine)
    assert out.features[5, 5].tolist() == pytest.approx([0.9, 0.09, 0.009, 0, 0])
    assert out.alpha[5, 5].item() == pytest.approx(0.999)


@both_engines
def test_a_gaussian_is_cut_off_at_the_tiles_that_its_square_of_three_sigma_overlaps(engine, frontal_camera, on_axis):
    # Standard deviation 2 at depth 2: variance 100.3 px^2, v1 = 100.4, radius ceil(30.06) = 31: up to x = 36.5, so the
    # tile of columns 32 to 47 is the last. alpha = 1/255 lies at sqrt(2 ln(255) 100.3) = 33.3 px: column 38.
    camera = replace(frontal_camera, width=64)
    ones = torch.ones(1, 1, dtype=torch.float64)
    wide = on_axis((2.0, 2.0, 1.0))
    alpha = rasterize(wide, camera, ones, engine=engine).alpha[5]
    assert alpha[38].item() == pytest.approx(math.exp(-0.5 * 33**2 / 100.3))
    assert alpha[39].item() == 0
    # With the axis 5 px further left the square ends at 31.5: column 32, 32 px away, is cut off.
    shifted = torch.tensor([[10.0, 0, 0.5], [0, 10.0, 5.5], [0, 0, 1]], dtype=torch.float64)
    alpha = rasterize(wide, replace(camera, intrinsics=shifted), ones, engine=engine).alpha[5]
    assert alpha[31].item() == pytest.approx(math.exp(-0.5 * 31**2 / 100.3))
    assert math.exp(-0.5 * 32**2 / 100.3) > 1 / 255 and alpha[32].item() == 0


@both_engines
def test_features_of_one_give_alpha_and_depths_as_features_give_depth(engine, random_scene):
    gaussians, camera, _ = random_scene()
    depths = (gaussians.means - camera.camera_to_world[:3, 3]) @ camera.camera_to_world[:3, 2]
    features = torch.stack([torch.ones_like(depths), depths], dim=1)
    out = rasterize(gaussians, camera, features, engine=engine)
    torch.testing.assert_close(out.features[..., 0], out.alpha, atol=1e-12, rtol=0)
    torch.testing.assert_close(out.features[..., 1], out.depth * out.alpha, atol=1e-12, rtol=0)
    assert (out.alpha == 0).any() and out.alpha.max() <= 1
    assert (out.depth[out.alpha == 0] == 0).all()


@both_engines
def test_splatting_is_linear_in_the_features(engine, random_scene):
    gaussians, camera, f = random_scene(seed=1)
    g = torch.flip(f, dims=[0])
    combined = rasterize(gaussians, camera, 2.5 * f - 0.5 * g, engine=engine).features
    separate = [rasterize(gaussians, camera, part, engine=engine).features for part in (f, g)]
    torch.testing.assert_close(combined, 2.5 * separate[0] - 0.5 * separate[1], atol=1e-12, rtol=0)


@both_engines
def test_all_channels_at_once_equal_channel_by_channel(engine, random_scene):
    gaussians, camera, features = random_scene(channels=37, n=120)
    together = rasterize(gaussians, camera, features, engine=engine).features
    for channel in (0, 17, 36):
        alone = rasterize(gaussians, camera, features[:, channel : channel + 1], engine=engine).features[..., 0]
        torch.testing.assert_close(together[..., channel], alone, atol=1e-14, rtol=0)


@both_engines
def test_the_squared_footprint_uses_squared_scales(engine, random_scene):
    gaussians, camera, features = random_scene(n=100)
    squared = rasterize(gaussians, camera, features, engine=engine, footprint="squared")
    expected = rasterize(replace(gaussians, scales=gaussians.scales**2), camera, features, engine=engine)
    exact = rasterize(gaussians, camera, features, engine=engine)
    assert torch.equal(squared.features, expected.features)
    assert not torch.equal(squared.features, exact.features)


@both_engines
def test_nothing_to_splat_gives_an_empty_view(engine, frontal_camera, on_axis):
    none = Gaussians(*(torch.zeros(shape, dtype=torch.float64) for shape in [(0, 3), (0, 4), (0, 3), (0,)]))
    behind = on_axis((-1.0, 0.1, 1.0))
    for gaussians in (none, behind):
        out = rasterize(gaussians, frontal_camera, torch.ones(len(gaussians), 3).double(), engine=engine)
        assert out.features.shape == (11, 11, 3)
        assert not out.features.any() and not out.alpha.any() and not out.depth.any()


@both_engines
def test_no_channels_still_give_alpha_and_depth(engine, frontal_camera, on_axis):
    out = rasterize(on_axis((2.0, 0.1, 0.8)), frontal_camera, torch.zeros(1, 0).double(), engine=engine)
    assert out.features.shape == (11, 11, 0)
    assert out.alpha[5, 5].item() == pytest.approx(0.8)
    assert out.depth[5, 5].item() == pytest.approx(2.0)


def test_auto_chooses_numba_for_cpu_tensors(random_scene):
    scene = random_scene(n=50)
    assert torch.equal(rasterize(*scene).features, rasterize(*scene, engine="numba").features)
    assert available_engines()[-2:] == ("numba", "reference")


def test_the_camera_takes_the_dtype_of_the_gaussians(random_scene):
    gaussians, camera, features = random_scene(n=50, dtype=torch.float32)
    assert rasterize(gaussians, camera.to(dtype=torch.float64), features).features.dtype == torch.float32


def test_the_inputs_are_left_as_they_were(random_scene):
    gaussians, camera, features = random_scene(n=50)
    before = [t.clone() for t in (gaussians.means, gaussians.scales, gaussians.opacities, features)]
    rasterize(gaussians, camera, features, footprint="squared")
    assert all(map(torch.equal, before, (gaussians.means, gaussians.scales, gaussians.opacities, features)))


def test_inputs_that_are_views_with_strides_are_read_correctly(random_scene):
    gaussians, camera, features = random_scene(n=60)
    strided = replace(gaussians, means=gaussians.means.T.contiguous().T, scales=gaussians.scales.T.contiguous().T)
    out = rasterize(strided, camera, features.T.contiguous().T)
    assert torch.equal(out.features, rasterize(gaussians, camera, features).features)


def test_features_of_the_wrong_count_or_dtype_are_an_error(random_scene):
    gaussians, camera, features = random_scene(n=50)
    with pytest.raises(ValueError, match=r"features need shape \(50, c\)"):
        rasterize(gaussians, camera, features[:49])
    with pytest.raises(ValueError, match="features are torch.float32"):
        rasterize(gaussians, camera, features.float())


def test_half_precision_is_an_error(random_scene):
    gaussians, camera, features = random_scene(n=50)
    with pytest.raises(ValueError, match="float32 or float64"):
        rasterize(gaussians.to(dtype=torch.float16), camera, features.half())


@pytest.mark.parametrize("field", ["means", "quats", "scales", "opacities"])
def test_gaussians_that_are_not_finite_are_counted_in_the_error(random_scene, field):
    gaussians, camera, features = random_scene(n=50)
    broken = getattr(gaussians, field).clone()
    broken[3], broken[7] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="2 of 50 Gaussians"):
        rasterize(replace(gaussians, **{field: broken}), camera, features)


def test_a_camera_that_is_not_finite_or_has_skew_is_an_error(random_scene):
    gaussians, camera, features = random_scene(n=50)
    with pytest.raises(ValueError, match="pose or intrinsics"):
        rasterize(gaussians, replace(camera, camera_to_world=camera.camera_to_world * float("nan")), features)
    skewed = camera.intrinsics.clone()
    skewed[0, 1] = 0.5
    with pytest.raises(ValueError, match="skew"):
        rasterize(gaussians, replace(camera, intrinsics=skewed), features)


@pytest.mark.usefixtures("without_shape_checker")
@pytest.mark.parametrize(
    "wrong", [{"engine": "opengl"}, {"footprint": "round"}, {"near": 0.0}, {"near": 2.0, "far": 1.0}]
)
def test_unknown_or_impossible_options_are_errors(random_scene, wrong):
    with pytest.raises(ValueError):
        rasterize(*random_scene(n=10), **wrong)


def test_importing_the_package_imports_neither_engine():
    code = "import sys, snd_nerfstudio.splatting; print('numba' in sys.modules, 'gsplat' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]
