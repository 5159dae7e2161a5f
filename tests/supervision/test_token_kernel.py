"""What the token operator's sums need, each part against a slow twin."""

import numba
import numpy as np
import pytest
import torch

from snd_nerfstudio.supervision.pooling import pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_builder import _base_and_fraction, _interpolation, compact_labels, pooling_axis
from snd_nerfstudio.supervision.token_kernel import _even, majority_labels, region_shares, uniform_reach
from snd_nerfstudio.supervision.upsampling import axis_weights, interpolation_weights, token_labels

AXES = [(1, 1), (1, 9), (3, 42), (4, 45), (5, 61), (8, 12), (13, 13), (7, 8), (41, 576)]
"""Tokens and pixels of an axis."""
AXIS_IDS = [f"{tokens} tokens of {pixels} pixels" for tokens, pixels in AXES]


def random_labels(height, width, count, seed=0):
    """Squares of three pixels and some noise, int64 ids below `count`."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, count, (-(-height // 3), -(-width // 3)), generator=random)
    labels = coarse.repeat_interleave(3, dim=0).repeat_interleave(3, dim=1)[:height, :width].clone()
    stray = torch.rand(height, width, generator=random) < 0.05
    labels[stray] = torch.randint(0, count, (int(stray.sum()),), generator=random)
    return labels


# ---------------------------------------------------------------------- reach


def brute_force_reach(labels):
    height, width = labels.shape
    reach = np.zeros((height, width), np.int64)
    for y in range(height):
        for x in range(width):
            side = 1
            while y + side < height and x + side < width:
                if (labels[y : y + side + 1, x : x + side + 1] != labels[y, x]).any():
                    break
                side += 1
            reach[y, x] = min(side, 255)
    return reach


@pytest.mark.parametrize("count", [1, 2, 5, 100])
@pytest.mark.parametrize("size", [(1, 1), (1, 20), (20, 1), (23, 31)], ids=str)
def test_the_reach_is_the_side_of_the_largest_square_of_one_label(size, count):
    labels = random_labels(*size, count).numpy().astype(np.int32)
    reach = uniform_reach(labels)
    assert reach.dtype == np.uint8
    np.testing.assert_array_equal(reach, brute_force_reach(labels))


def test_the_reach_stops_at_255():
    reach = uniform_reach(np.zeros((300, 290), np.int32))
    assert reach[0, 0] == reach[40, 30] == 255 and reach[200, 100] == 100 and reach[45, 36] == 254


# ---------------------------------------------------------------------- pooling


def axis_matrix(axis):
    """Tokens x pixels, dense."""
    matrix = np.zeros((len(axis.begin), len(axis.first)), axis.weights.dtype)
    for row, weights, begin, end in zip(matrix, axis.weights, axis.begin, axis.end, strict=True):
        row[begin:end] = weights[: end - begin]
        assert not weights[end - begin :].any()
    return matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", ["area", "bilinear"])
@pytest.mark.parametrize(("tokens", "pixels"), AXES, ids=AXIS_IDS)
def test_a_pooling_axis_has_the_very_weights_of_pool(tokens, pixels, method, dtype):
    axis = pooling_axis(tokens, pixels, method, dtype)
    matrix = axis_matrix(axis)
    units = torch.eye(pixels, dtype=dtype)[:, None, :]  # a map of one column, and a channel per pixel
    expected = pool(units, tokens, 1, method)[:, 0]
    assert torch.from_numpy(matrix).dtype == dtype
    torch.testing.assert_close(torch.from_numpy(matrix), expected, rtol=0, atol=0)
    for pixel in range(pixels):
        ends_after = [token for token in range(tokens) if axis.end[token] > pixel]
        assert axis.first[pixel] == min(ends_after, default=tokens)


@pytest.mark.parametrize("method", ["area", "bilinear"])
@pytest.mark.parametrize(("tokens", "pixels"), AXES, ids=AXIS_IDS)
def test_an_even_run_has_one_token_and_one_weight(tokens, pixels, method):
    axis = pooling_axis(tokens, pixels, method, torch.float64)
    matrix = axis_matrix(axis)
    for pixel, end in enumerate(_even(axis)):
        assert end > pixel
        if end > pixel + 1:
            assert (matrix[:, pixel] != 0).sum() == 1
            assert (matrix[:, pixel:end] == matrix[:, pixel : pixel + 1]).all()


@pytest.mark.parametrize("method", ["area", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("size", "grid", "count"),
    [((28, 42), (2, 3), 6), ((29, 45), (2, 3), 200), ((12, 10), (12, 10), 4), ((9, 70), (1, 5), 1)],
    ids=["whole cells", "many regions", "tokens of one pixel", "a single row and region"],
)
def test_region_shares_are_the_product_of_dense_matrices(size, grid, count, dtype, method):
    labels = random_labels(*size, count, seed=1)
    mass = torch.rand(size, generator=torch.Generator().manual_seed(2), dtype=dtype)
    mass[: size[0] // 2, : size[1] // 3] = 0  # a part without support
    rows, columns = (pooling_axis(t, p, method, dtype) for t, p in zip(grid, size, strict=True))
    starts, found, values = region_shares(
        *rows[:3], *columns[:3], labels.numpy().astype(np.int32), count, mass.numpy(), 3
    )
    tokens = grid[0] * grid[1]
    shares = np.zeros((tokens, count))
    for token in range(tokens):
        own = slice(starts[token], starts[token + 1])
        assert (np.diff(found[own]) > 0).all() and (values[own] > 0).all()
        shares[token, found[own]] = values[own]
    # Q = D diag(mass) [label = r], with D of the working dtype's weights
    member = torch.nn.functional.one_hot(labels, count).double() * mass.double()[..., None]
    pooling = [pool(torch.eye(p, dtype=dtype)[:, None], t, 1, method)[:, 0].double() for t, p in zip(grid, size)]
    expected = torch.einsum("hH,wW,HWr->hwr", *pooling, member).reshape(tokens, count)
    assert values.dtype == np.float64
    np.testing.assert_allclose(shares, expected.numpy(), rtol=0, atol=1e-13)


def test_region_shares_do_not_depend_on_the_number_of_chunks():
    labels = random_labels(40, 50, 9).numpy().astype(np.int32)
    mass = np.random.default_rng(0).random((40, 50))
    rows, columns = pooling_axis(3, 40, "area", torch.float64), pooling_axis(4, 50, "area", torch.float64)
    one, *others = (region_shares(*rows[:3], *columns[:3], labels, 9, mass, chunks) for chunks in (1, 2, 8, 50))
    for other in others:
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("size", "grid"),
    [((28, 42), (2, 3)), ((29, 45), (4, 5)), ((14, 70), (1, 5)), ((9, 13), (9, 13)), ((64, 96), (41, 62))],
    ids=str,
)
@pytest.mark.parametrize("spread", [1, 3], ids=["all ids", "ids with gaps"])
def test_the_majority_is_that_of_the_twin(size, grid, spread):
    for seed in range(5):
        mask = random_labels(*size, 4, seed) * spread + (spread - 1)
        expected = token_labels(mask, *grid).flatten().numpy()
        found = majority_labels(mask.numpy().astype(np.int32), int(mask.max()) + 1, *grid)
        np.testing.assert_array_equal(found, expected)


def test_of_equally_common_ids_the_smallest_is_the_majority():
    mask = torch.tensor([[7, 7, 3, 3], [3, 3, 5, 5], [9, 2, 4, 4], [2, 9, 4, 8]])
    found = majority_labels(mask.numpy().astype(np.int32), 10, 2, 2)
    # 7 7 3 3, then 3 3 5 5, then 9 2 2 9, then three times 4
    assert found.tolist() == token_labels(mask, 2, 2).flatten().tolist() == [3, 3, 2, 4]


@pytest.mark.parametrize(
    ("ids", "expected", "count"),
    [
        ([0, 1, 2], [0, 1, 2], 3),
        ([5, 9, 4095], [5, 9, 4095], 4096),
        ([5, 9, 4096], [0, 1, 2], 3),
        ([-1, 0, 7], [0, 1, 2], 3),
        ([-(2**63), 0, 2**63 - 1], [0, 1, 2], 3),
    ],
    ids=["compact", "small", "too large", "negative", "the ends of int64"],
)
def test_ids_are_renumbered_only_where_they_must_be(ids, expected, count):
    labels, found = compact_labels(torch.tensor([ids, ids[::-1]]))
    assert labels.dtype == torch.int32 and labels.is_contiguous()
    assert labels.tolist() == [expected, expected[::-1]] and found == count


# ---------------------------------------------------------------------- upsampling


@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
@pytest.mark.parametrize(("tokens", "pixels"), AXES, ids=AXIS_IDS)
def test_both_neighbours_of_every_pixel_exist(tokens, pixels, align_corners):
    base, fraction = _base_and_fraction(pixels, tokens, align_corners, torch.float64)
    step = min(tokens - 1, 1)
    assert base.min() >= 0 and base.max() + step < tokens
    found = np.zeros((pixels, tokens))
    np.add.at(found, (np.arange(pixels), base), 1 - fraction)
    np.add.at(found, (np.arange(pixels), base + step), fraction)
    neighbours, weights = axis_weights(pixels, tokens, align_corners, torch.device("cpu"), torch.float64)
    expected = torch.zeros(pixels, tokens, dtype=torch.float64).scatter_add_(1, neighbours, weights)
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "settings",
    [
        SupervisionSettings(),
        SupervisionSettings(isolated="zero"),
        SupervisionSettings(upsampling="bilinear"),
        SupervisionSettings(align_corners=True, token_label="sample", isolated="zero"),
    ],
    ids=["fixed", "isolated are zero", "bilinear", "official"],
)
@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((28, 42), (2, 3)),
        ((31, 45), (3, 4)),
        ((14, 40), (1, 3)),
        ((40, 14), (3, 1)),
        ((9, 9), (1, 1)),
        ((6, 8), (6, 8)),
    ],
    ids=str,
)
def test_corner_weights_are_the_upsampling_operator(size, grid, settings, dtype):
    masks = torch.stack([random_labels(*size, 5, seed) * 10 - 20 for seed in range(2)])
    found, isolated = _interpolation(masks, size, grid, 2, settings, dtype)
    pixels, tokens = size[0] * size[1], grid[0] * grid[1]
    assert found.base.dtype == np.int32
    places = torch.from_numpy(found.base[:, None] + found.offsets).long()
    weights = torch.from_numpy(found.weights)
    assert weights.dtype == dtype and 0 <= places.min() and places.max() < 2 * tokens
    expected = torch.zeros(2 * pixels, 2 * tokens, dtype=dtype)
    shares = []
    for view in range(2):
        twin = interpolation_weights(masks[view], size, grid, settings, dtype)
        expected[view * pixels : (view + 1) * pixels].scatter_add_(1, twin.tokens + view * tokens, twin.weights)
        shares.append(twin.isolated)
    matrix = torch.zeros_like(expected).scatter_add_(1, places, weights)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(isolated, torch.stack(shares).mean(), rtol=0, atol=1e-6)
    assert (isolated > 0) == (settings.upsampling == "mask" and (size, grid) != ((6, 8), (6, 8)))


def test_interpolation_does_not_depend_on_the_number_of_threads():
    masks = torch.stack([random_labels(28, 42, 5, seed) for seed in range(2)])
    threads = numba.get_num_threads()
    everything, share = _interpolation(masks, (28, 42), (2, 3), 2, SupervisionSettings(), torch.float32)
    try:
        numba.set_num_threads(1)
        alone, same_share = _interpolation(masks, (28, 42), (2, 3), 2, SupervisionSettings(), torch.float32)
    finally:
        numba.set_num_threads(threads)
    assert all(np.array_equal(a, b) for a, b in zip(everything, alone, strict=True)) and share == same_share
