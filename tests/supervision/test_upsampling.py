import pytest
import torch

from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.upsampling import interpolation_weights, token_labels, upsample

OFFICIAL = SupervisionSettings(align_corners=True, token_label="sample", isolated="zero")
FIXED = SupervisionSettings()


def brute_force(tokens, mask, settings):
    """Equations 2 and 3, one pixel and one neighbour at a time, in Python floats (the slow twin)."""
    h, w, channels = tokens.shape
    height, width = mask.shape
    label = {}
    for row in range(h):
        for column in range(w):
            votes = {}
            for y in range(height):
                for x in range(width):
                    if int((y + 0.5) * h / height) == row and int((x + 0.5) * w / width) == column:
                        votes[int(mask[y, x])] = votes.get(int(mask[y, x]), 0) + 1
            label[row, column] = min(votes, key=lambda k: (-votes[k], k))
    out = torch.zeros(height, width, channels, dtype=tokens.dtype)
    for y in range(height):
        for x in range(width):
            ty = min(max((y + 0.5) * h / height - 0.5, 0.0), h - 1.0)
            tx = min(max((x + 0.5) * w / width - 0.5, 0.0), w - 1.0)
            near = {}
            for row in {int(ty), min(int(ty) + 1, h - 1)}:
                for column in {int(tx), min(int(tx) + 1, w - 1)}:
                    near[row, column] = max(0.0, 1 - abs(ty - row)) * max(0.0, 1 - abs(tx - column))
            same = {v: b for v, b in near.items() if label[v] == int(mask[y, x])}
            total = sum(same.values())
            chosen = same if total > 0 and settings.upsampling == "mask" else near
            for v, b in chosen.items():
                out[y, x] += b / sum(chosen.values()) * tokens[v]
    return out


@pytest.mark.parametrize("size", [(12, 18), (13, 17), (7, 9)])
@pytest.mark.parametrize("upsampling", ["mask", "bilinear"])
def test_matches_the_equations_evaluated_pixel_by_pixel(size, upsampling):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    mask = torch.randint(0, 4, size, generator=generator)
    settings = SupervisionSettings(upsampling=upsampling)
    torch.testing.assert_close(
        upsample(tokens, mask, size, settings), brute_force(tokens, mask, settings), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "case",
    [
        "a_4x6_to_16x24",
        "b_7x9_to_30x41",
        "c_isolated",
        "d_one_label",
        "e_same_size",
        "f_downsample",
        "g_1x1",
        "h_uint8",
        "i_41x62_to_576x880",
    ],
)
def test_the_official_variant_matches_the_released_code(golden, case):
    vectors = golden("snd_mask_upsample")
    tokens = vectors[f"{case}.feats"].permute(1, 2, 0).contiguous()
    mask = vectors[f"{case}.mask"].long()
    result = upsample(tokens, mask, tuple(mask.shape), OFFICIAL).permute(2, 0, 1)
    torch.testing.assert_close(result, vectors[f"{case}.out"], rtol=0, atol=2e-5)


def test_without_a_mask_it_is_pytorchs_bilinear_interpolation():
    tokens = torch.randn(5, 6, 3, dtype=torch.float64)
    for align in (False, True):
        settings = SupervisionSettings(align_corners=align)
        ours = upsample(tokens, None, (35, 47), settings)
        theirs = torch.nn.functional.interpolate(
            tokens.permute(2, 0, 1)[None], size=(35, 47), mode="bilinear", align_corners=align
        )[0].permute(1, 2, 0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_weights_sum_to_one_and_never_cross_a_mask_border():
    mask = torch.zeros(28, 42, dtype=torch.long)
    mask[:, 21:] = 5  # the border runs through the middle token column
    tokens = torch.zeros(2, 3, 1)
    tokens[:, 2] = 1.0
    labels = token_labels(mask, 2, 3)
    assert labels.tolist() == [[0, 0, 5], [0, 0, 5]]  # seven columns each: of equally common ids the smallest
    operator = interpolation_weights(mask, (28, 42), (2, 3), FIXED)
    torch.testing.assert_close(operator.weights.sum(dim=1), torch.ones(28 * 42))
    result = upsample(tokens, mask, (28, 42), FIXED)[..., 0]
    torch.testing.assert_close(result, (mask == 5).float())


def test_a_thin_object_falls_back_to_bilinear_or_to_zero():
    mask = torch.zeros(28, 28, dtype=torch.long)
    mask[:, 13:15] = 1  # two pixels wide: owns no token
    tokens = torch.ones(2, 2, 4)
    filled = upsample(tokens, mask, (28, 28), FIXED)
    torch.testing.assert_close(filled, torch.ones(28, 28, 4))
    zeroed = upsample(tokens, mask, (28, 28), SupervisionSettings(isolated="zero"))
    torch.testing.assert_close(zeroed, (mask == 0).float()[..., None].expand(-1, -1, 4))
    share = interpolation_weights(mask, (28, 28), (2, 2), FIXED).isolated
    assert float(share) == pytest.approx(2 / 28)
