import subprocess
import sys

import numpy as np
import pytest
import torch

from snd_nerfstudio.viewer.clusters import PALETTE, fit_clusters, palette_colour


def blobs(sizes, channels=16, noise=0.05, seed=0):
    """Features about as many orthogonal directions as sizes, of lengths from 1 to 5, shuffled; and which."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(channels, channels, generator=generator))[0]
    which = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    which = which[torch.randperm(len(which), generator=generator)]
    features = axes[which] + noise * torch.randn(len(which), channels, generator=generator)
    return features * (1 + 4 * torch.rand(len(which), 1, generator=generator)), which, axes[: len(sizes)]


def test_separated_groups_are_found_the_largest_first():
    features, which, axes = blobs([50, 400, 150, 300])
    clusters = fit_clusters(features, count=4)
    order = torch.tensor([1, 3, 2, 0])  # by size: 400, 300, 150, 50
    assert ((clusters.centres * axes[order]).sum(1) > 0.99).all()
    labels = clusters.labels(clusters.scores(features))
    assert torch.equal(order[labels], which)
    torch.testing.assert_close(clusters.centres.norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_centres_are_ordered_by_the_members_that_the_labels_give_them(seed):
    features = torch.randn(700, 12, generator=torch.Generator().manual_seed(seed))
    clusters = fit_clusters(features, count=9, seed=seed)
    sizes = clusters.labels(clusters.scores(features)).bincount(minlength=9)
    assert sizes.sum() == 700 and (sizes > 0).all() and torch.equal(sizes, sizes.sort(descending=True).values)


def test_the_same_arguments_give_the_same_bits_and_another_seed_may_not():
    features = torch.randn(3000, 24, generator=torch.Generator().manual_seed(0))
    first, again = fit_clusters(features, 8, seed=3).centres, fit_clusters(features.clone(), 8, seed=3).centres
    assert torch.equal(first, again)
    assert not torch.equal(first, fit_clusters(features, 8, seed=4).centres)


def test_neither_the_global_generators_nor_the_features_are_touched():
    features = blobs([30, 20])[0].requires_grad_()
    before = features.detach().clone()
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    clusters = fit_clusters(features, 2)
    assert (torch.rand(1), np.random.rand()) == expected
    assert torch.equal(features, before) and not clusters.centres.requires_grad


def test_only_directions_count():
    features, _, _ = blobs([60, 40, 30])
    factors = torch.logspace(-3, 3, len(features))[:, None]
    torch.testing.assert_close(fit_clusters(features, 3).centres, fit_clusters(features * factors, 3).centres)


def test_a_centre_is_the_direction_of_the_mean_of_its_members_directions():
    features, which, _ = blobs([120, 80], noise=0.2)
    clusters = fit_clusters(features, 2)
    for number in (0, 1):
        mean = (features / features.norm(dim=1, keepdim=True))[which == number].mean(0)
        torch.testing.assert_close(clusters.centres[number], mean / mean.norm(), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- what may be splatted


def test_scores_are_linear_and_labels_are_those_of_the_nearest_direction():
    features = torch.randn(2, 5, 7, 16, generator=torch.Generator().manual_seed(0))
    clusters = fit_clusters(blobs([60, 40, 30])[0], 3)
    scores = clusters.scores(features)
    assert scores.shape == (2, 5, 7, 3)
    mixed = clusters.scores(0.3 * features[0] - 2 * features[1])
    torch.testing.assert_close(mixed, 0.3 * scores[0] - 2 * scores[1])
    labels = clusters.labels(scores)
    assert labels.shape == (2, 5, 7) and labels.dtype == torch.int64
    distances = torch.cdist(torch.nn.functional.normalize(features, dim=-1).reshape(-1, 16), clusters.centres)
    assert torch.equal(labels.flatten(), distances.argmin(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_are_taken_and_given_back(dtype):
    features = blobs([60, 40])[0].to(dtype)
    clusters = fit_clusters(features, 2)
    assert clusters.centres.dtype == dtype and clusters.scores(features).dtype == dtype
    assert clusters.scores(features.float()).dtype == torch.float32


# ---------------------------------------------------------------------- few, many and unusable features


@pytest.mark.parametrize("copies", [1, 3])
def test_fewer_directions_than_clusters_give_fewer_centres(copies):
    three = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0.1, 3]])
    lengths = torch.tensor([1.0, 3.0, 0.7])[:copies, None, None]  # 3 x and x round to slightly other directions
    clusters = fit_clusters((lengths * three).reshape(-1, 3), count=8)
    assert clusters.centres.shape == (3, 3)
    assert torch.equal(clusters.labels(clusters.scores(three)).sort().values, torch.arange(3))


def test_equal_features_give_one_centre():
    clusters = fit_clusters(torch.tensor([[3.0, 4.0]]).repeat(20, 1), count=5)
    torch.testing.assert_close(clusters.centres, torch.tensor([[0.6, 0.8]]))


def test_opposite_features_in_one_cluster_still_give_a_unit_centre():
    clusters = fit_clusters(torch.tensor([[0.0, 2.0], [0.0, -2.0]]), count=1)
    torch.testing.assert_close(clusters.centres.abs(), torch.tensor([[0.0, 1.0]]))


def test_rows_that_are_zero_or_not_finite_are_left_out():
    features, _, _ = blobs([60, 40])
    spoilt = features.repeat_interleave(2, dim=0)
    spoilt[::2] = 0
    spoilt[0], spoilt[2], spoilt[4, 3] = float("nan"), float("inf"), float("-inf")
    assert torch.equal(fit_clusters(spoilt, 2).centres, fit_clusters(features, 2).centres)


@pytest.mark.parametrize("features", [torch.zeros(4, 3), torch.full((2, 3), float("nan")), torch.zeros(0, 3)])
def test_without_a_usable_row_everything_has_one_label(features):
    clusters = fit_clusters(features)
    assert clusters.centres.shape == (1, 3) and clusters.centres.norm() == 1
    assert not clusters.labels(clusters.scores(torch.randn(5, 3))).any()


def test_of_many_rows_some_are_used_evenly_spaced(monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.viewer.clusters.MOST_ROWS", 100)
    features = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_clusters(features, 3).centres, fit_clusters(features[::10], 3).centres)
    assert torch.equal(fit_clusters(features[:100], 3).centres, fit_clusters(features[:100].clone(), 3).centres)
    assert not torch.equal(fit_clusters(features, 3).centres, fit_clusters(features[:100], 3).centres)


def test_no_cluster_at_all_is_refused():
    with pytest.raises(ValueError, match="0 clusters"):
        fit_clusters(torch.randn(5, 3), 0)


# ---------------------------------------------------------------------- colours


def lab(colours):
    """CIELAB of sRGB colours, D65."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).T
    f = xyz / [0.9505, 1.0, 1.089]
    f = np.where(f > (6 / 29) ** 3, np.cbrt(f), f / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_the_twenty_colours_differ_clearly_from_each_other_and_from_a_dark_ground():
    colours = palette_colour(torch.arange(20))
    places = lab(np.concatenate([colours.double().numpy(), np.full((1, 3), 0.1), np.zeros((1, 3))]))
    distances = np.linalg.norm(places[:20, None] - places[None], axis=2)
    distances[np.arange(20), np.arange(20)] = np.inf
    assert distances.min() > 20  # 2 is what one just notices


def test_colours_are_fixed_and_come_again_after_twenty():
    clusters = fit_clusters(blobs([60, 40])[0], 2)
    labels = torch.tensor([[0, 1, 19], [20, 21, 39]])
    colours = clusters.colour(labels)
    assert colours.shape == (2, 3, 3) and torch.equal(colours[0], colours[1])
    torch.testing.assert_close(colours[0, 0] * 255, torch.tensor([0.0, 150.0, 255.0]))  # 0096ff
    assert PALETTE[0] == "0096ff" and len(PALETTE) == 20


def test_importing_is_light():
    program = """
import sys, snd_nerfstudio.viewer.clusters, snd_nerfstudio.viewer.pictures, snd_nerfstudio.snd_visualize
print([name for name in ("sklearn", "matplotlib", "timm", "peft", "nerfstudio", "numba") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"
