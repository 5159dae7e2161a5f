import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.probing.padding import Padding, pad_images, patch_padding, sample_exactly, to_image

PATCH = 14


@pytest.mark.parametrize(
    ("size", "padded"),
    [
        ((416, 544), (420, 546)),
        ((480, 640), (490, 644)),
        ((480, 480), (490, 490)),
        ((584, 876), (588, 882)),
        ((352, 704), (364, 714)),
        ((352, 1216), (364, 1218)),
        ((512, 512), (518, 518)),
        ((484, 648), (490, 658)),
        ((518, 518), (518, 518)),
    ],
)
def test_images_are_padded_to_the_sizes_of_the_released_evaluation(size, padded):
    assert patch_padding(size, PATCH).padded(size) == padded
    # of these sizes only the last is a multiple of 14, and it is on both sides: the quirk never shows
    assert patch_padding(size, PATCH, extra_patch_quirk=True) == patch_padding(size, PATCH)


def test_an_odd_remainder_goes_to_the_right_and_below():
    # 617 = 44 * 14 + 1 lacks 13 = 6 + 7; 647 = 46 * 14 + 3 lacks 11 = 5 + 6
    assert patch_padding((617, 647), PATCH) == Padding(left=5, top=6, right=6, bottom=7)


def test_the_released_padding_gives_a_whole_patch_to_a_side_that_needs_none():
    # 490 = 35 * 14 needs nothing, 640 lacks 4
    assert patch_padding((490, 640), PATCH) == Padding(left=2, top=0, right=2, bottom=0)
    assert patch_padding((490, 640), PATCH, extra_patch_quirk=True) == Padding(left=2, top=7, right=2, bottom=7)
    assert patch_padding((640, 490), PATCH, extra_patch_quirk=True) == Padding(left=7, top=2, right=7, bottom=2)
    assert patch_padding((490, 644), PATCH, extra_patch_quirk=True) == Padding()


def test_normalised_images_are_padded_with_zeros():
    images = torch.full((1, 3, 2, 3), 5.0)
    padded = pad_images(images, Padding(left=1, top=2, right=3, bottom=0))
    assert padded.shape == (1, 3, 4, 7) and padded.sum() == images.sum()
    assert torch.equal(padded[:, :, 2:, 1:4], images)
    assert pad_images(images, Padding()) is images


def ramp(size, padding, step=PATCH):
    """A token map that says where in the image a token's centre lies: column, then row, pixels."""
    height, width = padding.padded(size)
    columns = (torch.arange(width // step, dtype=torch.float64) + 0.5) * step - padding.left
    rows = (torch.arange(height // step, dtype=torch.float64) + 0.5) * step - padding.top
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None]


def pixel_centres(size, out=None):
    out = out or size
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) * m / n for m, n in zip(size, out, strict=True))
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"))[None]


SIZES = [(480, 640), (480, 480), (617, 647), (352, 1216), (56, 70), (61, 42)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quarter", [False, True])
def test_exact_predictions_are_not_displaced(size, quarter):
    padding = patch_padding(size, PATCH)
    tokens = ramp(size, padding)
    out = (size[0] // 4, size[1] // 4) if quarter else size
    found = to_image(tokens, size, padding, "exact", out=out)
    # beyond the centres of the outermost tokens their values go on
    centres = pixel_centres(size, out)
    expected = torch.stack([c.clamp(t.min(), t.max()) for c, t in zip(centres[0], tokens[0], strict=True)])[None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize(("mode", "border", "error"), [("bilinear", 14, 1e-9), ("bicubic", 28, 0.2)])
def test_exact_predictions_are_not_displaced_after_two_enlargements_either(size, mode, border, error):
    padding = patch_padding(size, PATCH)
    fine = F.interpolate(ramp(size, padding), scale_factor=4, mode="bilinear")
    displaced = to_image(fine, size, padding, "exact", mode=mode) - pixel_centres(size)
    inside = displaced[..., border:-border, border:-border]
    # PyTorch's cubic kernel (a = -0.75) wiggles around a ramp by a twentieth of a sample, which is 3.5 pixels here
    assert inside.abs().max() < error and inside.mean(dim=(0, 2, 3)).abs().max() < 1e-3


def test_the_released_predictions_are_displaced_by_as_much_as_the_padding_is_wide():
    size = (617, 617)
    padding = patch_padding(size, PATCH)
    assert (padding.left, padding.right) == (6, 7)
    displaced = (to_image(ramp(size, padding), size, padding, "parity") - pixel_centres(size))[0, 0, 300]
    # column x shows x 630 / 617 - 6: 13 / 617 a column, and 6 too little at the left
    x = pixel_centres(size)[0, 0, 0]
    torch.testing.assert_close(displaced[7:-7], (x * 13 / 617 - 6)[7:-7], rtol=0, atol=1e-9)
    assert displaced[7] == pytest.approx(-5.84, abs=0.01) and displaced[-8] == pytest.approx(6.84, abs=0.01)
    exact = (to_image(ramp(size, padding), size, padding, "exact") - pixel_centres(size))[0, 0, 300]
    assert exact[7:-7].abs().max() < 1e-9


def test_without_padding_exact_and_parity_are_the_same():
    maps = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    exact, parity = (to_image(maps, (70, 84), Padding(), how) for how in ("exact", "parity"))
    assert torch.equal(exact, parity)
    assert torch.equal(parity, F.interpolate(maps, size=(70, 84), mode="bilinear", align_corners=False))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_cropping_and_sampling_agree(mode):
    size = (61, 73)
    padding = patch_padding(size, PATCH)
    maps = torch.randn(2, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cropped = to_image(maps, size, padding, "exact", mode=mode)
    torch.testing.assert_close(cropped, sample_exactly(maps, size, padding, size, mode=mode), rtol=0, atol=1e-9)


def test_exact_values_are_those_of_the_four_nearest_tokens_one_pixel_at_a_time():
    size = (16, 19)
    padding = patch_padding(size, PATCH)  # 28 x 28: 12 = 6 + 6 rows and 9 = 4 + 5 columns
    tokens = torch.randn(1, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = to_image(tokens, size, padding, "exact")[0, 0]
    (a, b), (c, d) = tokens[0, 0].tolist()
    for row in range(16):
        for column in range(19):
            # between the centres 7 and 21 of the tokens
            down = min(max((row + 0.5 + 6 - 7) / 14, 0), 1)
            right = min(max((column + 0.5 + 4 - 7) / 14, 0), 1)
            expected = (1 - down) * ((1 - right) * a + right * b) + down * ((1 - right) * c + right * d)
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-12)


def test_gradients_reach_the_map_either_way():
    for how in ("exact", "parity"):
        maps = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda m, how=how: to_image(m, (9, 10), Padding(1, 1, 1, 2), how), [maps])
