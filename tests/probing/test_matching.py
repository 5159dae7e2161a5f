import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import matching
from snd_nerfstudio.probing.matching import FeatureMap, locate, match, nearest, ratio_weights, sample


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_nearest(queries, candidates, k):
    """One query after the other, by Euclidean distance of unit vectors, as faiss does it."""
    queries, candidates = F.normalize(queries.double(), dim=1), F.normalize(candidates.double(), dim=1)
    found = []
    for query in queries:
        distances = [(float(((query - candidate) ** 2).sum()), place) for place, candidate in enumerate(candidates)]
        found.append([place for _, place in sorted(distances)[:k]])
    return torch.tensor(found)


@pytest.mark.parametrize(("block", "columns"), [(4_000_000, 65_536), (70, 13), (1, 1)])
def test_nearest_agrees_with_one_after_the_other_whatever_the_blocks(monkeypatch, block, columns):
    monkeypatch.setattr(matching, "BLOCK", block)
    monkeypatch.setattr(matching, "COLUMNS", columns)
    queries, candidates = random(23, 5), random(41, 5, seed=1)
    similarities, places = nearest(queries, candidates, 3)
    assert torch.equal(places, slow_nearest(queries, candidates, 3))
    cosines = torch.cosine_similarity(queries[:, None], candidates[places], dim=2)
    torch.testing.assert_close(similarities, cosines)


def test_memory_does_not_grow_with_the_number_of_features(monkeypatch):
    monkeypatch.setattr(matching, "BLOCK", 100)
    monkeypatch.setattr(matching, "COLUMNS", 50)
    largest = 0
    product = torch.Tensor.__matmul__

    def watched(self, other):
        nonlocal largest
        result = product(self, other)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    nearest(random(30, 4), random(500, 4, seed=1))
    assert 0 < largest <= 100


def test_the_length_of_a_feature_does_not_matter_and_double_stays_double():
    queries, candidates = random(6, 4), random(9, 4, seed=1)
    plain, scaled = nearest(queries, candidates), nearest(7 * queries, candidates * torch.arange(1, 10)[:, None])
    assert torch.equal(plain[1], scaled[1])
    assert nearest(queries.double(), candidates.double())[0].dtype == torch.float64
    assert nearest(queries.half(), candidates.half())[0].dtype == torch.float32


def test_fewer_candidates_than_asked_for_are_all_returned():
    similarities, places = nearest(random(4, 3), random(1, 3, seed=1), 2)
    assert places.tolist() == [[0], [0], [0], [0]] and similarities.shape == (4, 1)
    assert nearest(random(4, 3), random(0, 3))[1].shape == (4, 0)
    assert nearest(random(0, 3), random(5, 3))[1].shape == (0, 2)


def test_the_weight_is_one_minus_the_ratio_of_distances():
    # distances 0.1 and 0.4: 1 - 0.25; equal ones: 0; an exact match: 1 - 1e-9 / 0.5, which is 1 in float32
    weights = ratio_weights(torch.tensor([[0.9, 0.6], [0.3, 0.3], [1.0, 0.5]]))
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.0, 1.0]))
    # two exact matches: both distances are 1e-9, not 0 / 0; rounding beyond 1 is no negative distance
    torch.testing.assert_close(ratio_weights(torch.tensor([[1.0, 1.0], [1.0000001, 1.0]])), torch.zeros(2))
    assert ratio_weights(torch.tensor([[0.9]])).tolist() == [0.0]


def test_the_matches_with_the_highest_weights_are_kept_best_first():
    # angles of unit vectors in the plane, degrees; candidates at 0 and 90
    degrees = torch.tensor([45.0, 10.0, 80.0, 0.0, 30.0])
    queries = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    found = match(queries, torch.eye(2), most=3)
    # the further from 45, the higher: 0, then 10 and 80, equally far
    assert found.first[0] == 3 and set(found.first.tolist()) == {3, 1, 2} and len(found) == 3
    assert {int(a): int(b) for a, b in zip(found.first, found.second)} == {3: 0, 1: 0, 2: 1}
    # cos 10 = 0.98481, sin 10 = 0.17365: 1 - 0.01519 / 0.82635
    assert found.weights[1:].tolist() == pytest.approx([0.98162, 0.98162], abs=1e-4)
    assert len(match(queries, torch.eye(2), most=1000)) == 5


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
def test_without_features_there_are_no_matches(n, m):
    assert len(match(random(n, 3), random(m, 3))) == 0


def test_features_that_are_not_finite_are_refused():
    broken = random(5, 3)
    broken[2, 1] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        match(broken, random(5, 3))


# ---------------------------------------------------------------------- places in a map


def test_features_are_sampled_between_the_centres_of_tokens():
    values = torch.tensor([[[0.0, 1.0], [10.0, 11.0]]])
    places = torch.tensor([[0.25, 0.25], [0.5, 0.25], [0.5, 0.5], [0.625, 0.75], [0.0, 1.0]])
    # centres lie at 1/4 and 3/4; 0.625 is three quarters of the way; beyond the outermost centre nothing changes
    assert sample(values, places)[:, 0].tolist() == pytest.approx([0.0, 0.5, 5.5, 10.75, 10.0])


def test_features_of_half_precision_are_sampled_at_exact_places():
    # a place in half precision is known to 1/2000 of the map, a tenth of a token here
    values = torch.arange(200.0).expand(1, 3, 200)
    places = torch.tensor([[(150.25 + 0.5) / 200, 0.5], [(190.6 + 0.5) / 200, 0.5]])
    found = sample(values.half(), places)
    assert found.dtype == torch.float32 and found[:, 0].tolist() == pytest.approx([150.25, 190.6], abs=1e-3)


def test_padding_moves_places_by_half_of_it_rounded_down():
    # 9 rows padded to 14: 2 above and 3 below; 20 columns to 28: 4 on either side
    fmap = FeatureMap(torch.zeros(1, 1, 2), (9, 20), (14, 28))
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]])
    expected = torch.tensor([[4 / 28, 2 / 14], [24 / 28, 11 / 14], [14 / 28, 6.5 / 14]])
    torch.testing.assert_close(fmap.in_map(corners), expected)
    torch.testing.assert_close(fmap.in_image(expected), corners)


def test_a_feature_is_found_at_the_centre_of_its_token():
    values = F.normalize(random(8, 3, 5), dim=0)
    found = locate(values, values[:, [0, 2], [4, 1]].T)
    torch.testing.assert_close(found, torch.tensor([[4.5 / 5, 0.5 / 3], [1.5 / 5, 2.5 / 3]]))


def test_the_soft_place_is_the_weighted_mean_of_the_window_alone():
    # cosines 1 at column 1, 0.8 at its left, 0.6 at its right; another 0.99 outside of the window does not count
    cosine = torch.tensor([0.8, 1.0, 0.6, 0.0, 0.99])
    values = torch.stack([cosine, (1 - cosine**2).sqrt()])[:, None]
    found = locate(values, torch.tensor([[1.0, 0.0]]), window=1, temperature=0.2)
    # weights e^-1, 1, e^-2 = 0.36788, 1, 0.13534 at 0.5, 1.5, 2.5: (0.18394 + 1.5 + 0.33834) / 1.50321 = 1.34531
    torch.testing.assert_close(found, torch.tensor([[1.34531 / 5, 0.5]]), atol=1e-5, rtol=0)
    # at the border of the map the window is cut off: weights 1 at 0.5 and 0.36788 at 1.5: 1.05182 / 1.36788
    edge = locate(values[..., :2].flip(2), torch.tensor([[1.0, 0.0]]), window=1, temperature=0.2)
    torch.testing.assert_close(edge, torch.tensor([[1.05182 / 1.36788 / 2, 0.5]]), atol=1e-5, rtol=0)
