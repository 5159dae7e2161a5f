import math

import numpy as np
import pytest
import torch

from snd_nerfstudio.probing.metrics.normals import (
    NORMALS_METRICS,
    NormalsScores,
    angles,
    normals_errors,
    valid_normals,
)


def turned(degrees):
    """Predictions that are so many degrees away from a normal along z, of various lengths; one row of pixels."""
    radians = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    lengths = torch.linspace(0.5, 3, len(degrees), dtype=torch.float64)
    prediction = lengths * torch.stack([radians.sin(), torch.zeros_like(radians), radians.cos()])
    normals = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[:, None].expand(3, len(degrees))
    return prediction[:, None].float(), normals[:, None].float()


def test_angles_by_hand():
    prediction, normals = turned([0.0, 0.01, 5.0, 90.0, 135.0, 180.0])
    found = angles(prediction, normals, torch.ones(1, 6, dtype=torch.bool))
    assert found.tolist() == pytest.approx([0, 0.01, 5, 90, 135, 180], abs=1e-3)


def test_only_valid_pixels_count():
    prediction, normals = turned([1.0, 20.0, 40.0])
    found = angles(prediction, normals, torch.tensor([[True, False, True]]))
    assert found.tolist() == pytest.approx([1, 40], abs=1e-3)


def test_errors_of_an_image_by_hand():
    errors = normals_errors(torch.tensor([10.0, 12.0, 25.0, 40.0], dtype=torch.float64))
    assert set(errors) == set(NORMALS_METRICS)
    assert (errors["d1"], errors["d2"], errors["d3"]) == (0.25, 0.5, 0.75)
    # squares 100 + 144 + 625 + 1600 = 2469
    assert errors["rmse"] == pytest.approx(math.sqrt(2469 / 4)) and errors["mean"] == pytest.approx(87 / 4)
    assert errors["median"] == pytest.approx(18.5)
    assert normals_errors(torch.tensor([3.0, 1.0, 80.0], dtype=torch.float64))["median"] == 3


def test_the_thresholds_are_excluded():
    errors = normals_errors(torch.tensor([11.25, 22.5, 30.0], dtype=torch.float64))
    assert (errors["d1"], errors["d2"], errors["d3"]) == pytest.approx((0, 1 / 3, 2 / 3))


def test_the_papers_rmse_is_a_mean_over_images_and_not_that_of_the_pixels():
    first, normals = turned([10.0, 10.0, 10.0, 10.0])
    second, _ = turned([50.0, 50.0, 50.0, 50.0])
    scores = NormalsScores()
    valid = torch.ones(2, 1, 4, dtype=torch.bool)
    valid[1, 0, 1:] = False
    scores.update(torch.stack([first, second]), normals.expand(2, -1, -1, -1), valid)
    found = scores.compute()
    assert found["rmse"] == pytest.approx(30, abs=1e-3) and found["mean"] == pytest.approx(30, abs=1e-3)
    # (4 * 10^2 + 50^2) / 5 = 580
    assert found["rmse_pooled"] == pytest.approx(math.sqrt(580), abs=1e-3)
    assert found["d1"] == pytest.approx(0.5)


def test_batches_may_be_of_any_size_and_the_fourth_channel_is_left_out():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(5, 4, 6, 7, generator=generator)
    normals = torch.nn.functional.normalize(torch.randn(5, 3, 6, 7, generator=generator), dim=1)
    valid = torch.rand(5, 6, 7, generator=generator) > 0.4
    together, apart = NormalsScores(), NormalsScores()
    together.update(prediction, normals, valid)
    for number in range(5):
        part = slice(number, number + 1)
        apart.update(prediction[part, :3], normals[part], valid[part])
    assert together.compute() == pytest.approx(apart.compute(), rel=1e-12)
    # an independent way: numpy, all of one image at once
    rmses, squares = [], []
    for p, n, v in zip(prediction.double().numpy(), normals.double().numpy(), valid.numpy(), strict=True):
        cosine = (p[:3] * n).sum(0) / np.linalg.norm(p[:3], axis=0) / np.linalg.norm(n, axis=0)
        error = np.degrees(np.arccos(cosine))[v]
        rmses.append(np.sqrt((error**2).mean()))
        squares.append(error**2)
    assert together.compute()["rmse"] == pytest.approx(np.mean(rmses), rel=1e-9)
    assert together.compute()["rmse_pooled"] == pytest.approx(np.sqrt(np.concatenate(squares).mean()), rel=1e-9)


def test_a_pixel_with_depth_and_without_a_normal_is_wrong_by_ninety_degrees_unless_masked():
    prediction, normals = turned([0.0, 0.0, 0.0, 0.0])
    normals = normals.clone()
    normals[:, 0, 1] = 0
    depth = torch.tensor([[2.0, 2.0, 0.0, 2.0]])
    released, masked = (valid_normals(depth, normals, need_normal=need) for need in (False, True))
    assert released.tolist() == [[True, True, False, True]] and masked.tolist() == [[True, False, False, True]]
    assert angles(prediction, normals, released).tolist() == pytest.approx([0, 90, 0], abs=1e-3)
    assert angles(prediction, normals, masked).tolist() == pytest.approx([0, 0], abs=1e-3)
    batched = valid_normals(depth[None], normals[None], need_normal=True)
    assert torch.equal(batched[0], masked)


def test_images_without_a_valid_pixel_are_left_out():
    prediction, normals = turned([20.0, 20.0])
    scores = NormalsScores()
    valid = torch.tensor([[[True, True]], [[False, False]]])
    scores.update(prediction.expand(2, -1, -1, -1), normals.expand(2, -1, -1, -1), valid)
    assert scores.compute()["rmse"] == pytest.approx(20, abs=1e-3) and len(scores.images) == 2
    assert NormalsScores().compute() == {}
