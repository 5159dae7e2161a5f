import math

import numba
import pytest
import torch

from snd_nerfstudio.probing.expected_depth import expected_depth, plain_expected_depth


def both(logits, bins, factor=4, seed=0):
    """Depth and gradients of the logits: compiled and plain."""
    results = []
    for function in (expected_depth, plain_expected_depth):
        leaf = logits.clone(memory_format=torch.preserve_format).requires_grad_()
        depth = function(leaf, bins, 0.1, factor)
        towards = torch.randn(depth.shape, dtype=depth.dtype, generator=torch.Generator().manual_seed(seed))
        towards[..., :3] = 0  # pixels that nothing is known of
        results.append((depth.detach(), torch.autograd.grad(depth, leaf, towards)[0]))
    return results


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 4), (8, 3), (9, 2), (17, 3), (32, 1)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("factor", [2, 4])
def test_the_loop_gives_what_all_logits_at_once_give(size, channels_last, factor):
    logits = torch.randn(2, 6, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    found, wanted = both(logits, torch.linspace(1, 3, 6, dtype=torch.float64), factor)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_single_precision_is_as_good_as_plain_single_precision():
    logits = torch.randn(2, 256, 16, 24, generator=torch.Generator().manual_seed(0))
    bins = torch.linspace(1e-3, 10, 256)
    found, plain = both(logits, bins)
    _, exact = both(logits.double(), bins.double())
    for fast, slow, true in zip(found, plain, exact, strict=True):
        assert fast.dtype == torch.float32
        assert (fast - true).abs().max() <= 2 * (slow - true).abs().max()


def test_threads_change_no_bit():
    logits, bins = torch.randn(3, 32, 20, 7), torch.linspace(1, 3, 32)
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = both(logits, bins)[0]
    finally:
        numba.set_num_threads(threads)
    several = both(logits, bins)[0]
    assert all(torch.equal(*pair) for pair in zip(one, several, strict=True))


def test_its_gradient_is_that_of_small_differences():
    logits = torch.randn(1, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bins = torch.linspace(1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: expected_depth(x, bins, 0.1, 2), (logits,))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_is_not_hidden(broken):
    logits = torch.randn(1, 4, 3, 3)
    logits[0, 1, 1, 1] = broken
    found, plain = both(logits, torch.linspace(1, 3, 4))
    assert torch.equal(found[0].isnan(), plain[0].isnan()) and found[0].isnan().any() and found[1].isnan().any()


def test_equal_logits_give_the_middle_of_the_bins():
    # 3 bins of weight 2 + 0.1: (1 + 2 + 6) / 3 = 3; below zero all have weight 0.1
    bins = torch.tensor([1.0, 2.0, 6.0])
    for value in (2.0, -5.0):
        depth = expected_depth(torch.full((1, 3, 2, 2), value), bins, 0.1, 4)
        torch.testing.assert_close(depth, torch.full((1, 1, 8, 8), 3.0))
