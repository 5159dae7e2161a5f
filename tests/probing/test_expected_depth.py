import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.probing.expected_depth import expected_depth


def slow(logits, bins, floor, factor):
    """All at once."""
    weights = F.relu(F.interpolate(logits, scale_factor=factor, mode="bilinear", align_corners=False)) + floor
    return torch.einsum("bkhw,k->bhw", weights, bins)[:, None] / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_few_rows_at_a_time_give_what_all_at_once_gives(rows, channels_last):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, 5, 4, dtype=torch.float64, generator=generator)
    if channels_last:
        logits = logits.contiguous(memory_format=torch.channels_last)
    logits.requires_grad_()
    bins = torch.linspace(1, 3, 6, dtype=torch.float64)
    wanted = slow(logits, bins, 0.1, 4)
    # a row of tokens makes 4 rows of 16 pixels for each of 6 bins
    found = expected_depth(logits, bins, 0.1, 4, slab=rows * 6 * 4 * 16)
    torch.testing.assert_close(found, wanted)
    towards = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
    gradients = [torch.autograd.grad(depth, logits, towards)[0] for depth in (found, wanted)]
    torch.testing.assert_close(*gradients)


def test_its_gradient_is_that_of_small_differences():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 3, 3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    bins = torch.linspace(1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: expected_depth(x, bins, 0.1, 2, slab=1), (logits,))


def test_equal_logits_give_the_middle_of_the_bins():
    # 3 bins of weight 2 + 0.1: (1 + 2 + 6) / 3 = 3; below zero all have weight 0.1
    bins = torch.tensor([1.0, 2.0, 6.0])
    for value in (2.0, -5.0):
        depth = expected_depth(torch.full((1, 3, 2, 2), value), bins, 0.1, 4)
        torch.testing.assert_close(depth, torch.full((1, 1, 8, 8), 3.0))
