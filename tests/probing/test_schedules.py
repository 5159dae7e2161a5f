import math

import pytest
import torch

from snd_nerfstudio.probing.schedules import depth_betas, depth_rate, normals_rate, segmentation_rate


def one_parameter(**settings):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **settings)


def test_the_depth_probe_s_rate_at_its_landmarks():
    assert depth_rate(0) == pytest.approx(0.001)
    # half of the warm-up: 1 - 0.5 * 0.999 = 0.5005, and the cosine has begun: (1 + cos(pi / 48)) / 2 = 0.99893
    assert depth_rate(6_400) == pytest.approx(0.5005 * 0.99893, rel=1e-5)
    # after it: (1 + cos(pi / 24)) / 2 = 0.99572
    assert depth_rate(12_800) == pytest.approx(0.99572, rel=1e-5)
    assert depth_rate(153_600) == pytest.approx(0.5)
    assert depth_rate(307_200) == pytest.approx(1e-8) == depth_rate(400_000)


def test_the_depth_probe_s_rate_is_a_cosine_annealed_one_with_a_warm_up():
    optimizer = one_parameter(lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=240, eta_min=1e-8)
    for step in range(240):
        warm = 0.001 + 0.999 * step / 10 if step < 10 else 1
        assert depth_rate(step, 240) == pytest.approx(warm * optimizer.param_groups[0]["lr"], rel=1e-6)
        optimizer.step()
        cosine.step()


@pytest.mark.parametrize("total", [10, 240, 1000])
def test_the_depth_probe_s_first_beta_goes_one_cycle_like_pytorchs(total):
    optimizer = one_parameter(lr=1.0, momentum=0.9)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=total, pct_start=0.3, base_momentum=0.85, max_momentum=0.95
    )
    for step in range(total):
        first, second = depth_betas(step, total)
        assert first == pytest.approx(optimizer.param_groups[0]["momentum"], abs=1e-12) and second == 0.999
        optimizer.step()
        if step < total - 1:
            cycle.step()


def test_the_depth_probe_s_first_beta_at_its_landmarks():
    assert depth_betas(0)[0] == pytest.approx(0.95) and depth_betas(307_199)[0] == pytest.approx(0.95)
    # 30 % of 307 200 are 92 160 steps; half way down it is in the middle
    assert depth_betas(92_159)[0] == pytest.approx(0.85) and depth_betas(46_080)[0] == pytest.approx(0.9, abs=1e-5)


def test_the_normals_probe_s_rate_at_its_landmarks():
    steps = 10 * 100
    assert normals_rate(0, steps) == pytest.approx(0.01)
    assert normals_rate(75, steps) == pytest.approx(0.505)  # half of 1.5 epochs
    assert normals_rate(150, steps) == pytest.approx(1.0)
    # a third of a quarter turn is 30 degrees, half of it 45: still high where half a cosine would be at 0.5
    assert normals_rate(150 + 425, steps) == pytest.approx(0.99 * math.cos(math.pi / 4) + 0.01)
    assert normals_rate(1000, steps) == pytest.approx(0.01) == normals_rate(2000, steps)


def test_the_segmentation_probe_s_rate_at_its_landmarks():
    assert segmentation_rate(0) == pytest.approx(1e-6)
    # half of the warm-up, of a line that has begun to fall
    assert segmentation_rate(750) == pytest.approx((0.5 + 0.5e-6) * (1 - 750 / 320_000))
    assert segmentation_rate(1_500) == pytest.approx(1 - 1_500 / 320_000)
    assert segmentation_rate(160_000) == pytest.approx(0.5)
    assert segmentation_rate(320_000) == 0.0 == segmentation_rate(400_000)


@pytest.mark.parametrize(
    ("rate", "long"), [(depth_rate, 307_200), (segmentation_rate, 320_000), (lambda *a: depth_betas(*a)[0], 307_200)]
)
def test_a_shorter_run_has_the_same_shape(rate, long):
    for share in (0.002, 0.01, 0.03, 0.1, 0.3, 0.7, 0.97):
        assert rate(int(share * 32_000), 32_000) == pytest.approx(rate(int(share * long), long), abs=2e-3)


def test_factors_are_python_floats_and_tiny_runs_are_possible():
    for total in (1, 2, 3, 4, 7):
        for step in range(total + 1):
            values = [f(step, total) for f in (depth_rate, normals_rate, segmentation_rate)]
            values += depth_betas(step, total)
            assert all(type(value) is float and 0 <= value <= 1 for value in values)
            assert 0.85 - 1e-12 <= depth_betas(step, total)[0] <= 0.95 + 1e-12
