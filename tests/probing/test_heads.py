import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snd_nerfstudio.probing.heads import DepthHead, LinearHead, NormalsHead, SegmentationHead, upsample
from snd_nerfstudio.probing.padding import patch_padding, to_image

SIZE = (48, 60)
PADDING = patch_padding(SIZE, 14)  # 56 x 70: 4 x 5 tokens


def tokens(channels=6, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, 5, channels, dtype=torch.float64, generator=generator)


def as_convolution(head):
    """The released order's layer: a 1x1 convolution with a head's weights."""
    outputs, inputs = head.linear.weight.shape
    convolution = nn.Conv2d(inputs, outputs, kernel_size=1).double()
    with torch.no_grad():
        convolution.weight.copy_(head.linear.weight[:, :, None, None])
        convolution.bias.copy_(head.linear.bias)
    return convolution


def features(tokens, class_token=None):
    maps = tokens.permute(0, 3, 1, 2)
    if class_token is None:
        return maps
    return torch.cat([maps, class_token[:, :, None, None].expand(-1, -1, *maps.shape[2:])], dim=1)


def test_enlarging_features_and_then_the_head_is_the_head_and_then_enlarging():
    head, x = LinearHead(6, 9).double(), tokens()
    slow = as_convolution(head)(F.interpolate(features(x), size=(16, 20), mode="bilinear", align_corners=False))
    torch.testing.assert_close(upsample(head(x)), slow)


@pytest.mark.parametrize("pad_crop", ["parity", "exact"])
def test_the_order_does_not_matter_for_the_step_to_the_image_either(pad_crop):
    head, x = LinearHead(6, 4).double(), tokens()
    for mode, aligned in (("bilinear", False), ("bicubic", True)):
        enlarged = to_image(upsample(features(x)), SIZE, PADDING, pad_crop, mode=mode, align_corners=aligned)
        slow = as_convolution(head)(enlarged)
        fast = to_image(upsample(head(x)), SIZE, PADDING, pad_crop, mode=mode, align_corners=aligned)
        torch.testing.assert_close(fast, slow)


def test_the_class_token_lies_beside_every_token():
    head, x = LinearHead(6, 9, class_channels=3).double(), tokens()
    class_token = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(x, class_token), as_convolution(head)(features(x, class_token)))
    with pytest.raises(ValueError, match="class token"):
        head(x)
    with pytest.raises(ValueError, match="class token"):
        LinearHead(6, 9).double()(x, class_token)


def test_heads_start_as_a_convolution_of_pytorch_does():
    for made in (
        lambda: DepthHead(768, 0.001, 10.0, class_channels=768),
        lambda: NormalsHead(384),
        lambda: SegmentationHead(384, 13),
    ):
        torch.manual_seed(3)
        head = made()
        torch.manual_seed(3)
        convolution = nn.Conv2d(head.linear.in_features, head.linear.out_features, kernel_size=1)
        assert torch.equal(head.linear.weight, convolution.weight[:, :, 0, 0])
        assert torch.equal(head.linear.bias, convolution.bias)


def test_tokens_in_half_precision_give_maps_in_single_precision():
    head = SegmentationHead(6, 3)
    half = tokens().half()
    assert head(half).dtype == torch.float32
    torch.testing.assert_close(head(half), head(half.float()))


def test_bins_are_spaced_evenly_and_include_both_ends():
    bins = DepthHead(4, 0.001, 10.0).bins
    assert len(bins) == 256 and bins[0] == pytest.approx(0.001) and bins[-1] == 10
    torch.testing.assert_close(bins.diff(), torch.full((255,), 9.999 / 255), rtol=0, atol=2e-6)


def test_depth_is_a_weighted_mean_of_the_bins():
    head = DepthHead(4, 1.0, 3.0, bins=3).double()  # 1, 2 and 3 metres
    logits = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    # without logits all weights are equal; negative ones are rectified
    torch.testing.assert_close(head.depth(logits), torch.full((1, 1, 8, 8), 2.0, dtype=torch.float64))
    logits[:, 2] = 0.7
    logits[:, 0] = -5
    # weights 0.1, 0.1, 0.8
    expected = 0.1 * 1 + 0.1 * 2 + 0.8 * 3
    torch.testing.assert_close(head.depth(logits), torch.full((1, 1, 8, 8), expected, dtype=torch.float64))


def released_depth(head, x, class_token):
    """Enlarge, convolve, rectify, normalise, and only then resize to the image: pixel by pixel."""
    maps = F.interpolate(features(x, class_token), size=(16, 20), mode="bilinear", align_corners=False)
    logits = as_convolution(head)(maps)
    depth = torch.zeros(len(x), 1, 16, 20, dtype=torch.float64)
    for image in range(len(x)):
        for row in range(16):
            for column in range(20):
                weights = [max(value, 0.0) + 0.1 for value in logits[image, :, row, column].tolist()]
                mean = sum(w * b for w, b in zip(weights, head.bins.tolist(), strict=True)) / sum(weights)
                depth[image, 0, row, column] = mean
    return depth


def test_depth_is_that_of_the_released_order():
    head = DepthHead(6, 0.001, 10.0, class_channels=3, bins=16).double()
    with torch.no_grad():
        head.linear.weight *= 20  # else hardly any bin stands out
    x = tokens()
    class_token = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits = head(x, class_token)
    slow = released_depth(head, x, class_token)
    torch.testing.assert_close(head.depth(logits), slow)
    resized = F.interpolate(slow, size=SIZE, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head.at_pixels(logits, SIZE, PADDING, "parity"), resized)
    padded = F.interpolate(slow, size=(56, 70), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(head.at_pixels(logits, SIZE, PADDING, "exact"), padded[:, 4:52, 5:65])
    # normalising first and enlarging afterwards would be something else
    weights = F.relu(logits) + 0.1
    early = torch.einsum("bkhw,k->bhw", weights / weights.sum(dim=1, keepdim=True), head.bins)[:, None]
    assert (upsample(early) - slow).abs().max() > 0.1


def test_depth_never_leaves_the_bins():
    head = DepthHead(6, 0.5, 4.0).double()
    logits = torch.full((1, 256, 4, 5), -1e9, dtype=torch.float64)
    logits[:, 0, :, :2] = 1e9
    logits[:, -1, :, 3:] = 1e9
    depth = head.at_pixels(logits, SIZE, PADDING, "exact")
    # nothing remains of the other bins' 25.5
    assert 0 <= depth.min() - 0.5 < 1e-6 and 0 <= 4 - depth.max() < 1e-6


def test_normals_are_enlarged_twice_with_the_released_conventions():
    head, x = NormalsHead(6).double(), tokens()
    assert head.linear.out_features == 4
    enlarged = F.interpolate(head(x), size=(16, 20), mode="bilinear", align_corners=False)
    parity = F.interpolate(enlarged, size=SIZE, mode="bicubic", align_corners=True)
    torch.testing.assert_close(head.at_pixels(head(x), SIZE, PADDING, "parity"), parity)
    exact = F.interpolate(enlarged, size=(56, 70), mode="bicubic", align_corners=False)[:, :, 4:52, 5:65]
    torch.testing.assert_close(head.at_pixels(head(x), SIZE, PADDING, "exact"), exact)


def test_classes_are_enlarged_once():
    head, x = SegmentationHead(6, 5).double(), tokens()
    slow = as_convolution(head)(F.interpolate(features(x), size=SIZE, mode="bilinear", align_corners=False))
    torch.testing.assert_close(head.at_pixels(head(x), SIZE, PADDING, "parity"), slow)


def test_the_released_segmentation_head_has_a_linear_layer_and_nothing_else():
    assert {name for name, _ in SegmentationHead(6, 5).named_parameters()} == {"linear.weight", "linear.bias"}
    assert not list(SegmentationHead(6, 5).buffers())


def test_batch_normalisation_is_that_of_maps():
    head, x = SegmentationHead(6, 5, head_norm="batch", init="normal").double(), 3 + 2 * tokens()
    twin = nn.BatchNorm2d(6).double()
    convolution = as_convolution(head)
    for _ in range(3):
        torch.testing.assert_close(head(x), convolution(twin(features(x))))
    head.eval(), twin.eval()
    torch.testing.assert_close(head(x), convolution(twin(features(x))))
    assert (head.norm.running_mean > 0.5).all()  # it has seen the features' mean of 3


def test_the_initialisation_of_dinov2_is_narrow():
    torch.manual_seed(0)
    head = SegmentationHead(384, 150, init="normal")
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.02) and (head.linear.bias == 0).all()
    # uniform within 1 / sqrt(384): a deviation of 1 / sqrt(3 * 384)
    assert SegmentationHead(384, 150).linear.weight.std().item() == pytest.approx(0.02946, rel=0.02)
