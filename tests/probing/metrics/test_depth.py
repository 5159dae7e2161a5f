import math

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.metrics.depth import (
    DEPTH_METRICS,
    depth_errors,
    evaluated_pixels,
    evaluation_window,
    mean_of_images,
)


def test_every_error_by_hand():
    depth = torch.tensor([[1.0, 2.0], [4.0, 0.0]])
    prediction = torch.tensor([[1.2, 2.0], [2.0, 9.0]])
    errors = depth_errors(prediction, depth, 0.001, 10.0)
    assert set(errors) == set(DEPTH_METRICS)
    # three measured pixels with errors 0.2, 0 and -2, and ratios 1.2, 1 and 2 (1.25^3 = 1.953)
    assert errors["abs_rel"] == pytest.approx((0.2 + 0 + 0.5) / 3, rel=1e-6)
    assert errors["sq_rel"] == pytest.approx((0.04 + 0 + 1) / 3, rel=1e-6)
    assert errors["rmse"] == pytest.approx(math.sqrt((0.04 + 0 + 4) / 3), rel=1e-6)
    assert errors["d1"] == errors["d2"] == errors["d3"] == pytest.approx(2 / 3)
    assert errors["log10"] == pytest.approx((math.log10(1.2) + math.log10(2)) / 3, rel=1e-6)
    a, b = math.log(1.2), -math.log(2)
    assert errors["rmse_log"] == pytest.approx(math.sqrt((a * a + b * b) / 3), rel=1e-6)
    assert errors["silog"] == pytest.approx(100 * math.sqrt((a * a + b * b) / 3 - ((a + b) / 3) ** 2), rel=1e-6)


def test_the_thresholds_are_powers_of_one_and_a_quarter_and_excluded():
    depth = torch.ones(1, 6, dtype=torch.float64)
    prediction = torch.tensor([[1.2, 1.25, 1 / 1.5, 1.5625, 1.9, 1.96]], dtype=torch.float64)
    errors = depth_errors(prediction, depth, 0.001, 10.0)
    assert (errors["d1"], errors["d2"], errors["d3"]) == pytest.approx((1 / 6, 3 / 6, 5 / 6))


def pair(seed=0, height=60, width=80):
    generator = torch.Generator().manual_seed(seed)
    depth = 11 * torch.rand(height, width, generator=generator)
    depth[torch.rand(height, width, generator=generator) < 0.3] = 0
    return depth.clamp(min=0.3) * (0.7 + 0.6 * torch.rand(height, width, generator=generator)), depth


def test_errors_agree_with_the_numpy_formulas_of_the_released_code():
    prediction, depth = pair()
    found = depth_errors(prediction, depth, 0.001, 10.0)
    inside = (depth > 0.001) & (depth < 10)
    assert 0.3 < inside.float().mean() < 0.8
    p, t = prediction[inside].numpy().astype(np.float64), depth[inside].numpy().astype(np.float64)
    logs = np.log(p) - np.log(t)
    expected = {
        "abs_rel": np.mean(np.abs(p - t) / t),
        "rmse": np.sqrt(np.mean((p - t) ** 2)),
        "d1": np.mean(np.maximum(p / t, t / p) < 1.25),
        "d2": np.mean(np.maximum(p / t, t / p) < 1.25**2),
        "d3": np.mean(np.maximum(p / t, t / p) < 1.25**3),
        "log10": np.mean(np.abs(np.log10(p) - np.log10(t))),
        "rmse_log": np.sqrt(np.mean(logs**2)),
        "silog": 100 * np.std(logs),
        "sq_rel": np.mean((p - t) ** 2 / t),
    }
    assert found == pytest.approx(expected, rel=1e-9)


def test_errors_agree_with_torchmetrics_where_it_has_them():
    from torchmetrics.functional import mean_absolute_percentage_error, mean_squared_error

    prediction, depth = pair(1)
    found = depth_errors(prediction, depth, 0.001, 10.0)
    inside = (depth > 0.001) & (depth < 10)
    p, t = prediction[inside].double(), depth[inside].double()
    assert found["abs_rel"] == pytest.approx(float(mean_absolute_percentage_error(p, t)), rel=1e-6)
    assert found["rmse"] == pytest.approx(float(mean_squared_error(p, t, squared=False)), rel=1e-6)
    assert found["rmse_log"] == pytest.approx(float(mean_squared_error(p.log(), t.log(), squared=False)), rel=1e-6)


def test_depth_at_the_bounds_does_not_count():
    depth = torch.tensor([[0.5, 0.500001, 3.0, 3.999, 4.0, 7.0, 0.0]])
    assert evaluated_pixels(depth, 0.5, 4.0, "none").tolist() == [[False, True, True, True, False, False, False]]


@pytest.mark.parametrize(
    ("size", "crop", "window"),
    [
        ((480, 640), "none", (0, 480, 0, 640)),
        ((480, 640), "eigen", (45, 471, 41, 601)),
        # fixed, whatever the size
        ((968, 1296), "eigen", (45, 471, 41, 601)),
        ((427, 565), "eigen", (45, 427, 41, 565)),
        # shares of 352 and 1216
        ((352, 1216), "garg", (143, 349, 43, 1172)),
        ((375, 1242), "garg", (153, 371, 44, 1197)),
    ],
)
def test_evaluation_crops_are_those_of_the_released_code(size, crop, window):
    rows, columns = evaluation_window(size, crop)
    assert (rows.start, rows.stop, columns.start, columns.stop) == window
    inside = evaluated_pixels(torch.ones(size), 0.001, 10.0, crop)
    assert int(inside.sum()) == (window[1] - window[0]) * (window[3] - window[2])
    assert inside[window[0], window[2]] and inside[window[1] - 1, window[3] - 1]


def test_only_the_crop_counts():
    depth = torch.ones(480, 640)
    prediction = torch.full((480, 640), 3.0)
    prediction[45:471, 41:601] = 1.5
    assert depth_errors(prediction, depth, 0.001, 10.0, "eigen")["abs_rel"] == pytest.approx(0.5)
    assert depth_errors(prediction, depth, 0.001, 10.0)["abs_rel"] > 0.7


def test_a_crop_beside_the_image_is_refused():
    for size in ((45, 640), (480, 41), (30, 40)):
        with pytest.raises(InputError, match="'eigen': use the crop 'none'"):
            evaluation_window(size, "eigen")


def test_images_without_depth_are_left_out_of_the_mean():
    depth = torch.zeros(4, 4)
    empty = depth_errors(torch.ones(4, 4), depth, 0.001, 10.0)
    assert set(empty) == set(DEPTH_METRICS) and all(math.isnan(value) for value in empty.values())
    images = [{"rmse": 1.0, "d1": 0.5}, {"rmse": math.nan, "d1": math.nan}, {"rmse": 4.0, "d1": 1.0}]
    assert mean_of_images(images) == {"rmse": 2.5, "d1": 0.75}
    assert math.isnan(mean_of_images([empty, empty])["rmse"]) and mean_of_images([]) == {}


def test_every_image_counts_the_same_however_much_of_it_is_measured():
    depth = torch.ones(2, 2, 4)
    depth[1, :, 1:] = 0
    prediction = torch.tensor([1.1, 1.5])[:, None, None].expand(2, 2, 4)
    images = [depth_errors(p, d, 0.001, 10.0) for p, d in zip(prediction, depth, strict=True)]
    # (0.1 + 0.5) / 2; of the pixels together it would be (8 * 0.1 + 2 * 0.5) / 10
    assert mean_of_images(images)["abs_rel"] == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_predictions_that_have_no_logarithm_are_refused_and_do_not_vanish(bad):
    prediction = torch.ones(3, 3)
    prediction[1, 1] = bad
    with pytest.raises(ValueError, match="finite and positive"):
        depth_errors(prediction, torch.ones(3, 3), 0.001, 10.0)
    # where nothing is measured it does not matter
    depth = torch.ones(3, 3)
    depth[1, 1] = 0
    assert depth_errors(prediction, depth, 0.001, 10.0)["rmse"] == 0


def test_a_constant_factor_has_no_scale_invariant_error():
    _, depth = pair(2)
    errors = depth_errors(2 * depth.clamp(min=0.01), depth, 0.01, 10.0)
    assert errors["silog"] == pytest.approx(0, abs=1e-4) and errors["abs_rel"] == pytest.approx(1.0, rel=1e-6)
