import torch
import torch.nn.functional as F

from snd_nerfstudio.supervision.pooling import area_weights, pool


def test_whole_cells_are_plain_averages():
    maps = torch.randn(28, 42, 3)
    expected = F.avg_pool2d(maps.permute(2, 0, 1), 14).permute(1, 2, 0)
    torch.testing.assert_close(pool(maps, 2, 3), expected)


def test_a_cut_pixel_counts_in_both_cells():
    # three pixels in two cells of 1.5 pixels: (1 + 0.5 * 2) / 1.5 and (0.5 * 2 + 3) / 1.5
    weights = area_weights(2, 3, torch.float64)
    torch.testing.assert_close(
        weights @ torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), torch.tensor([4 / 3, 8 / 3], dtype=torch.float64)
    )
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_every_pixel_counts_the_same_over_all_cells():
    for cells, pixels in ((41, 576), (62, 880), (5, 7)):
        weights = area_weights(cells, pixels, torch.float64)
        torch.testing.assert_close(weights.sum(dim=0), torch.full((pixels,), cells / pixels, dtype=torch.float64))


def test_bilinear_is_pytorchs():
    maps = torch.randn(57, 88, 3)
    expected = F.interpolate(maps.permute(2, 0, 1)[None], size=(4, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(pool(maps, 4, 6, "bilinear"), expected[0].permute(1, 2, 0))
