import numpy as np
import pytest
import torch

from snd_nerfstudio.viewer import pca
from snd_nerfstudio.viewer.pca import PCABasis, fit_pca, follow_pca


def test_components_are_the_principal_axes_with_their_largest_loading_positive():
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    features = torch.randn(4000, 5, dtype=torch.float64) * torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1]) @ axes.T + 7
    basis = fit_pca(features)
    cosines = (basis.components @ axes[:, :3]).abs()
    assert (cosines.diagonal() > 0.99).all()
    largest = basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()
    torch.testing.assert_close(basis.mean, features.mean(0))


def test_the_basis_does_not_depend_on_the_order_of_the_rows():
    features = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    first, second = fit_pca(features), fit_pca(features.flip(0))
    torch.testing.assert_close(first.components, second.components, rtol=0, atol=1e-5)


def test_colours_lie_in_the_unit_interval_and_outliers_do_not_squeeze_them():
    features = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    basis = fit_pca(torch.cat([features, torch.full((2, 6), 1e4)]))
    colours = basis.colour(basis.project(features))
    assert colours.min() >= 0 and colours.max() <= 1 and (colours.std(0) > 0.1).all()


def test_degenerate_features_give_finite_colours():
    for features in (torch.zeros(10, 6), torch.ones(1, 2), torch.full((3, 4), float("nan"))):
        basis = fit_pca(features)
        assert basis.components.shape == (3, features.shape[1])
        assert torch.isfinite(basis.colour(basis.project(torch.zeros_like(features)))).all()


def points(rows=300, channels=6, spread=(5.0, 3.0, 1.0), seed=0):
    """Features with three directions of clearly different variance and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    strengths = torch.tensor([*spread, *[0.05] * (channels - 3)])
    return torch.randn(rows, channels, generator=generator) * strengths @ axes.T + 4


def rotation(channels, seed):
    return torch.linalg.qr(torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed)))[0]


def colours_of(basis, features):
    return basis.colour(basis.project(features))


# ---------------------------------------------------------------------- range


def test_a_joint_range_is_the_least_and_greatest_projection_on_any_component():
    features = points().double()
    basis = fit_pca(features, scale="joint")
    centred = (features - features.mean(0)).numpy()
    axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
    axes *= np.sign(axes[np.arange(3), np.abs(axes).argmax(1)])[:, None]
    projected = centred @ axes.T
    expected = (projected - projected.min()) / (projected.max() - projected.min())
    np.testing.assert_allclose(colours_of(basis, features).numpy(), expected, atol=1e-9)
    # nothing is cut off, and a weak component has a weak colour
    ranges = [float(np.ptp(expected[:, channel])) for channel in range(3)]
    assert ranges[0] > ranges[1] > ranges[2] and ranges[2] < 0.4


def test_the_default_range_is_that_of_the_quantiles_of_each_component():
    features = points().double()
    basis = fit_pca(features)
    projected = basis.project(features).numpy()
    np.testing.assert_allclose(basis.low.numpy(), np.quantile(projected, 0.01, axis=0), atol=1e-12)
    np.testing.assert_allclose(basis.high.numpy(), np.quantile(projected, 0.99, axis=0), atol=1e-12)


def test_more_rows_than_torch_takes_quantiles_of_give_nearly_the_same_range(monkeypatch):
    features = points(rows=20_000)
    whole = fit_pca(features)
    monkeypatch.setattr(pca, "QUANTILE_LIMIT", 6000)  # leaves about every eleventh row
    part = fit_pca(features)
    assert not torch.equal(part.low, whole.low)
    torch.testing.assert_close(part.high - part.low, whole.high - whole.low, rtol=0.1, atol=0)


@pytest.mark.parametrize("rows", [1999, 2000, 2001, 4000, 4001])
def test_torch_is_never_given_as_many_values_as_it_may_refuse(monkeypatch, rows):
    given, quantile = [], torch.quantile

    def counted(values, *more, **named):
        given.append(values.numel())
        return quantile(values, *more, **named)

    monkeypatch.setattr(pca, "QUANTILE_LIMIT", 6000)
    monkeypatch.setattr(torch, "quantile", counted)
    fit_pca(points(rows=rows))
    assert len(given) == 1 and 2000 < given[0] < 6000


# ---------------------------------------------------------------------- following features


def test_with_full_momentum_nothing_changes():
    old = fit_pca(points())
    new = follow_pca(old, points(seed=1), 1.0)
    assert all(torch.equal(vars(new)[name], value) for name, value in vars(old).items())


def test_without_momentum_the_new_span_mean_and_range_are_taken_over():
    old, features = fit_pca(points()), points(seed=1)
    new, fresh = follow_pca(old, features, 0.0), fit_pca(features)
    torch.testing.assert_close(new.mean, fresh.mean)
    torch.testing.assert_close(
        new.components.T @ new.components, fresh.components.T @ fresh.components, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(new.components @ new.components.T, torch.eye(3), atol=1e-5, rtol=0)
    projected = new.project(features).numpy()
    np.testing.assert_allclose(new.low.numpy(), np.quantile(projected, 0.01, axis=0), atol=1e-4)
    np.testing.assert_allclose(new.high.numpy(), np.quantile(projected, 0.99, axis=0), atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_features_that_stay_keep_their_colours(momentum):
    features = points()
    old = fit_pca(features)
    new = follow_pca(old, features, momentum)
    for name, value in vars(old).items():
        torch.testing.assert_close(vars(new)[name], value, atol=2e-4, rtol=0)


def test_no_orthogonal_map_among_the_components_brings_them_nearer():
    old, features = fit_pca(points()), points(seed=1)
    new = follow_pca(old, features, 0.0)
    distance = (new.components - old.components).norm()
    for seed in range(50):
        turned = rotation(3, seed) @ new.components
        assert (turned - old.components).norm() >= distance - 1e-6
    flipped = new.components * torch.tensor([[1.0], [1.0], [-1.0]])  # a reflection
    assert (flipped - old.components).norm() >= distance - 1e-6


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_colours_do_not_depend_on_how_channels_are_turned(momentum):
    first, second = points(), points(seed=0, spread=(4.0, 3.5, 1.5)) + 0.3
    turn = rotation(6, 5)
    old = fit_pca(first)
    turned_old = PCABasis(old.mean @ turn, old.components @ turn, old.low, old.high)
    plain = colours_of(follow_pca(old, second, momentum), second)
    turned = colours_of(follow_pca(turned_old, second @ turn, momentum), second @ turn)
    torch.testing.assert_close(turned, plain, atol=2e-3, rtol=0)


def test_colours_stay_nearly_the_same_while_two_components_change_places():
    # 3.0 against 2.97, then the other way round: a new fit swaps them, and colours with them
    before, after = points(rows=5000, spread=(3.0, 2.97, 1.0)), points(rows=5000, spread=(2.97, 3.0, 1.0))
    assert (before - after).abs().max() < 0.2
    old = fit_pca(before)
    seen = colours_of(old, before)
    assert (colours_of(fit_pca(after), after) - seen).abs().mean() > 0.1
    for momentum in (0.0, 0.5):
        assert (colours_of(follow_pca(old, after, momentum), after) - seen).abs().max() < 0.05


def test_what_is_mixed_lies_between_and_stays_orthonormal():
    features = points()
    old, turned = fit_pca(features), points() @ torch.matrix_exp(torch.tensor(0.3) * skew()) + 1
    halfway, end = follow_pca(old, turned, 0.5), follow_pca(old, turned, 0.0)
    torch.testing.assert_close(halfway.mean, (old.mean + end.mean) / 2)
    torch.testing.assert_close(halfway.low, (old.low + end.low) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(halfway.high, (old.high + end.high) / 2, atol=1e-4, rtol=0)
    torch.testing.assert_close(halfway.components @ halfway.components.T, torch.eye(3), atol=1e-5, rtol=0)
    whole = (end.components - old.components).norm()
    assert whole > 0.1
    for other in (old, end):
        assert (halfway.components - other.components).norm() < whole


def skew():
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    return (matrix - matrix.T) / 4


def test_followed_again_and_again_the_basis_arrives():
    basis, features = fit_pca(points()), points(seed=0, spread=(1.0, 5.0, 3.0)) + 2
    for _ in range(60):
        basis = follow_pca(basis, features, 0.8)
    end = follow_pca(basis, features, 0.0)
    torch.testing.assert_close(colours_of(basis, features), colours_of(end, features), atol=1e-2, rtol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("scale", ["robust", "joint"])
def test_components_without_variance_stay_zero_or_come_back(momentum, scale):
    flat = points() * 0 + 2
    line = torch.outer(torch.linspace(-1, 1, 50), torch.tensor([1.0, 2, 0, 0, 0, 0]))
    whole = points()
    for first, second in ((flat, flat), (flat, whole), (whole, flat), (line, whole), (whole, line), (line, line)):
        basis = follow_pca(fit_pca(first, scale=scale), second, momentum, scale=scale)
        assert all(torch.isfinite(value).all() for value in vars(basis).values())
        assert torch.isfinite(colours_of(basis, second)).all()
    assert not follow_pca(fit_pca(flat), flat, momentum).components.any()
    found = follow_pca(fit_pca(flat), whole, momentum).components
    torch.testing.assert_close(found @ found.T, torch.eye(3), atol=1e-5, rtol=0)
    alone = follow_pca(fit_pca(line), line, momentum)
    torch.testing.assert_close(colours_of(alone, line), colours_of(fit_pca(line), line), atol=1e-4, rtol=0)


def test_rows_that_are_not_finite_are_left_out_and_nothing_else_changes_nothing():
    old, features = fit_pca(points()), points(seed=1)
    spoilt = torch.cat([features, torch.full((2, 6), float("nan")), torch.full((1, 6), float("inf"))])
    for name, value in vars(follow_pca(old, features, 0.5)).items():
        torch.testing.assert_close(vars(follow_pca(old, spoilt, 0.5))[name], value)
    assert follow_pca(old, spoilt[-3:], 0.5) is old


def test_fewer_than_three_channels_can_be_followed():
    features = points()[:, :2]
    basis = follow_pca(fit_pca(features), features + 0.1, 0.5)
    assert basis.components.shape == (3, 2) and torch.isfinite(colours_of(basis, features)).all()


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_that_is_none_is_refused(momentum):
    with pytest.raises(ValueError, match="momentum"):
        follow_pca(fit_pca(points()), points(), momentum)
