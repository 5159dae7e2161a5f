import jaxtyping
import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.supervision.blending import blend


def test_two_regions_by_hand():
    features = torch.tensor([[[1.0], [3.0]], [[10.0], [30.0]]])
    mask = torch.tensor([[0, 0], [7, 7]])
    # means are 2 and 20; a quarter of the pixel and three quarters of its mean
    expected = torch.tensor([[[1.75], [2.25]], [[17.5], [22.5]]])
    torch.testing.assert_close(blend(features, mask, 0.25), expected)


def test_with_coverage_holes_do_not_darken_the_mean():
    coverage = torch.tensor([[1.0, 0.5, 0.0]])
    colour = torch.tensor([[[4.0], [1.0], [9.0]]])
    premultiplied = colour * coverage[..., None]
    # mean = (4 + 0.5) / 1.5 = 3; result = half of F plus half of A * 3
    expected = torch.tensor([[[3.5], [1.0], [0.0]]])
    torch.testing.assert_close(blend(premultiplied, torch.zeros(1, 3, dtype=torch.long), 0.5, coverage), expected)


@pytest.mark.parametrize(
    ("case", "alpha"),
    [
        ("a_same_res", 0.5),
        ("b_mask_2x", 0.5),
        ("c_mask_smaller", 0.25),
        ("d_mask_odd_uint8", 0.5),
        ("e_alpha0", 0.0),
        ("f_alpha1", 1.0),
        ("g_negative_label", 0.5),
    ],
)
def test_matches_the_released_code(golden, case, alpha):
    vectors = golden("snd_blend")
    features, masks, expected = (vectors[f"{case}.{name}"] for name in ("features", "masks", "out"))
    size = features.shape[-2:]
    for batch in range(2):
        for view in range(2):
            mask = masks[batch, view].long()
            # the released code resizes masks inside; here they are of the right size before they come
            mask = F.interpolate(mask[None, None].double(), size=size, mode="nearest")[0, 0].long()
            result = blend(features[batch, view].permute(1, 2, 0), mask, alpha).permute(2, 0, 1)
            torch.testing.assert_close(result, expected[batch, view], rtol=0, atol=2e-6)


def test_an_empty_region_mean_is_finite():
    mask = torch.tensor([[0, 1]])
    result = blend(torch.zeros(1, 2, 3), mask, 0.5, torch.zeros(1, 2))
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_strength_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(ValueError, match="blending strength"):
        blend(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.long), alpha)


def test_a_mask_of_another_size_is_refused():
    # jaxtyping's check, on while tests run, comes first
    with pytest.raises((ValueError, jaxtyping.TypeCheckError), match="differ in size|parameter 'mask'"):
        blend(torch.zeros(1, 2, 3), torch.zeros(2, 2, dtype=torch.long), 0.5)
