import math

import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.probing.losses import angular_loss, gradient_loss, segmentation_loss, sig_loss


def depths(*g):
    """Predictions and a depth whose logarithms, with the offset, differ by g."""
    depth = torch.full((len(g),), 2.0, dtype=torch.float64)
    return (depth + 1e-3) * torch.tensor(g, dtype=torch.float64).exp() - 1e-3, depth


def test_sig_loss_by_hand():
    prediction, depth = depths(0.1, 0.3)
    # unbiased variance 2 * 0.1^2 / (2 - 1) = 0.02; 0.15 * 0.2^2 = 0.006
    assert float(sig_loss(prediction, depth, step=100)) == pytest.approx(math.sqrt(0.026), rel=1e-9)


def test_in_its_first_hundred_steps_sig_loss_is_the_mean_alone():
    prediction, depth = depths(0.1, 0.3)
    # sqrt(0.15 * 0.2^2)
    assert float(sig_loss(prediction, depth, step=0)) == pytest.approx(math.sqrt(0.006), rel=1e-9)
    assert float(sig_loss(prediction, depth, step=99)) == pytest.approx(math.sqrt(0.006), rel=1e-9)
    # errors that cancel are not seen yet
    prediction, depth = depths(-0.2, 0.2)
    assert float(sig_loss(prediction, depth, step=99)) == pytest.approx(0, abs=1e-12)
    assert float(sig_loss(prediction, depth, step=100)) == pytest.approx(math.sqrt(0.08), rel=1e-9)
    assert float(sig_loss(prediction, depth, step=5, mean_only_steps=5)) == pytest.approx(math.sqrt(0.08), rel=1e-9)


def test_sig_loss_counts_what_is_measured_however_far_and_pools_the_batch():
    prediction, depth = depths(0.1, 0.3)
    pad = torch.tensor([7.0, 9.0], dtype=torch.float64)
    prediction, depth = torch.cat([prediction, pad]), torch.cat([depth, torch.zeros(2, dtype=torch.float64)])
    assert float(sig_loss(prediction, depth, 100)) == pytest.approx(math.sqrt(0.026), rel=1e-9)
    assert float(sig_loss(prediction.view(2, 2), depth.view(2, 2), 100)) == pytest.approx(math.sqrt(0.026), rel=1e-9)
    depth[3] = 500.0
    assert float(sig_loss(prediction, depth, 100)) > 1


def test_sig_loss_without_measured_depth_is_zero_and_harmless():
    prediction = torch.ones(4, requires_grad=True)
    loss = sig_loss(prediction, torch.zeros(4), 100)
    loss.backward()
    assert loss == 0 and (prediction.grad == 0).all()


@pytest.mark.parametrize("step", [0, 100])
def test_a_perfect_or_lonely_prediction_has_a_finite_gradient(step):
    prediction = torch.full((4,), 2.0, requires_grad=True)
    sig_loss(prediction, torch.full((4,), 2.0), step).backward()
    assert torch.isfinite(prediction.grad).all()
    lonely = torch.full((1,), 3.0, dtype=torch.float64, requires_grad=True)
    loss = sig_loss(lonely, torch.full((1,), 2.0, dtype=torch.float64), step)
    loss.backward()
    # sqrt(0.15) log(3.001 / 2.001)
    assert loss.item() == pytest.approx(math.sqrt(0.15) * math.log(3.001 / 2.001)) and lonely.grad > 0


def maps(batch, height=20, width=26, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction = 1 + 4 * torch.rand(batch, height, width, dtype=torch.float64, generator=generator)
    depth = 1 + 4 * torch.rand(batch, height, width, dtype=torch.float64, generator=generator)
    return prediction, depth * (torch.rand(batch, height, width, generator=generator) > 0.3)


def error(prediction, depth, place):
    return math.log(float(prediction[place]) + 1e-3) - math.log(float(depth[place]) + 1e-3)


def test_gradient_loss_as_its_definition_has_it():
    prediction, depth = maps(2)
    total = 0.0
    for stride in (1, 2, 4, 6):
        found, measured = 0.0, 0
        for image in range(2):
            for row in range(0, 20, stride):
                for column in range(0, 26, stride):
                    here = (image, row, column)
                    measured += int(depth[here] > 0)
                    for there in ((image, row + 2 * stride, column), (image, row, column + 2 * stride)):
                        if there[1] < 20 and there[2] < 26 and depth[here] > 0 and depth[there] > 0:
                            found += abs(error(prediction, depth, here) - error(prediction, depth, there))
        total += found / measured
    assert float(gradient_loss(prediction, depth)) == pytest.approx(total, rel=1e-9)


def released_gradient_loss(prediction, depth):
    """What the released code computes: it slices the axes 0 and 1 of [batch, 1, height, width]."""
    prediction, depth = prediction[:, None], depth[:, None]
    total = 0.0
    for stride in (1, 2, 4, 6):
        # every stride-th image, and never a second channel
        images = [image for image in range(len(prediction)) if image % stride == 0]
        measured = sum(int((depth[image] > 0).sum()) for image in images)
        found = 0.0
        for first, second in zip(images[:-2], images[2:], strict=True):
            both = (depth[first] > 0) & (depth[second] > 0)
            g = [torch.log(prediction[i] + 1e-3) - torch.log(depth[i] + 1e-3) for i in (first, second)]
            found += float((g[0] - g[1])[both].abs().sum())
        total += found / measured
    return total


def test_the_released_gradient_loss_is_zero_in_batches_of_two_and_mixes_images_in_larger_ones():
    assert released_gradient_loss(*maps(1)) == 0 and released_gradient_loss(*maps(2)) == 0
    assert released_gradient_loss(*maps(3)) > 0.1 and released_gradient_loss(*maps(4)) > 0.1
    for batch in (1, 2, 3):
        assert gradient_loss(*maps(batch)) > 0.1


def test_gradient_loss_does_not_see_scale_but_sees_edges():
    _, depth = maps(2)
    depth = depth.clamp(min=1)
    # with the offset of 0.001 m logarithms are shifted by nearly the same
    assert gradient_loss(3 * depth, depth) < 2e-3
    step = torch.ones(1, 12, 12, dtype=torch.float64)
    edge = step.clone()
    edge[:, :, 6:] = math.e * 1.001 - 0.001
    # errors of 1 between the columns 4 | 6 and 5 | 7: 24 for 144 pixels; at stride 2 between 4 | 8 and 2 | 6: 12
    # for 36; at stride 4 between 0 | 8: 3 for 9; at stride 6 there are no three columns
    assert float(gradient_loss(edge, step)) == pytest.approx(24 / 144 + 12 / 36 + 3 / 9, rel=1e-9)
    assert gradient_loss(step, torch.zeros_like(step)) == 0


def constant(direction, s, size=(2, 3)):
    values = torch.tensor([*direction, s], dtype=torch.float64)
    return values[None, :, None, None].expand(1, 4, *size).clone()


def truth(size=(2, 3)):
    return torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)[None, :, None, None].expand(1, 3, *size).clone()


def test_angular_loss_by_hand():
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    # at a right angle, s = 0: kappa = 1.01
    likelihood = math.log(1 + math.exp(-1.01 * math.pi)) - math.log(1.01**2 + 1) + 1.01 * math.pi / 2
    assert float(angular_loss(constant((5, 0, 0), 0.0), truth(), valid)) == pytest.approx(likelihood, rel=1e-9)
    # s = -1: kappa = exp(-1) - 1 + 1.01; the same direction counts as acos(1 - 1e-4)
    kappa, angle = math.exp(-1) + 0.01, math.acos(1 - 1e-4)
    likelihood = math.log(1 + math.exp(-kappa * math.pi)) - math.log(kappa**2 + 1) + kappa * angle
    assert float(angular_loss(constant((0, 0, 0.2), -1.0), truth(), valid)) == pytest.approx(likelihood, rel=1e-9)
    # the opposite one as acos(-1 + 1e-4)
    kappa, angle = 3.01, math.acos(-1 + 1e-4)
    likelihood = math.log(1 + math.exp(-kappa * math.pi)) - math.log(kappa**2 + 1) + kappa * angle
    assert float(angular_loss(constant((0, 0, -7), 2.0), truth(), valid)) == pytest.approx(likelihood, rel=1e-9)


def test_angular_loss_is_the_mean_over_valid_pixels_of_the_batch():
    prediction = torch.cat([constant((1, 0, 0), 0.0), constant((0, 0, 1), 0.0)])
    normals = truth().expand(2, -1, -1, -1)
    valid = torch.zeros(2, 2, 3, dtype=torch.bool)
    valid[0, :, :2] = True
    valid[1, 0, 0] = True
    everywhere = torch.ones(1, 2, 3, dtype=torch.bool)
    parts = [angular_loss(prediction[n : n + 1], normals[n : n + 1], everywhere) for n in (0, 1)]
    # four pixels of the first and one of the second, not the mean of two images
    expected = (4 * float(parts[0]) + float(parts[1])) / 5
    assert float(angular_loss(prediction, normals, valid)) == pytest.approx(expected, rel=1e-9)
    assert angular_loss(prediction, normals, torch.zeros_like(valid)) == 0


def test_a_valid_pixel_without_a_normal_counts_as_ninety_degrees():
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    missing = angular_loss(constant((0, 0, 1), 0.0), torch.zeros_like(truth()), valid)
    torch.testing.assert_close(missing, angular_loss(constant((1, 0, 0), 0.0), truth(), valid))


def test_a_right_direction_has_a_finite_gradient_and_certainty_pays_only_when_right():
    valid = torch.ones(1, 2, 3, dtype=torch.bool)
    prediction = constant((0, 0, 1), 0.0).requires_grad_()
    angular_loss(prediction, truth(), valid).backward()
    assert torch.isfinite(prediction.grad).all() and (prediction.grad[:, 3] < 0).all()
    wrong = constant((1, 0, 0), 2.0).requires_grad_()
    angular_loss(wrong, truth(), valid).backward()
    assert (wrong.grad[:, 3] > 0).all() and (wrong.grad[:, 2] < 0).all()


def test_the_released_cross_entropy_keeps_ignored_pixels_in_its_denominator():
    logits = torch.zeros(2, 4, 3, 2)
    labels = torch.full((2, 3, 2), 255)
    labels[0, 0] = 1
    labels[1, 2, 0] = 3
    # ln 4 at three of twelve pixels
    assert float(segmentation_loss(logits, labels, over="all")) == pytest.approx(math.log(4) * 3 / 12)
    assert float(segmentation_loss(logits, labels, over="valid")) == pytest.approx(math.log(4))


def test_over_valid_pixels_it_is_pytorchs_mean():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, 7, generator=generator)
    labels = torch.randint(0, 5, (2, 6, 7), generator=generator)
    labels[0, :3] = 9
    mean = F.cross_entropy(logits, labels, ignore_index=9)
    torch.testing.assert_close(segmentation_loss(logits, labels, over="valid", ignore=9), mean)
    torch.testing.assert_close(segmentation_loss(logits, labels, over="all", ignore=9), mean * 63 / 84)


def test_a_batch_of_nothing_but_ignored_pixels_has_no_loss():
    logits = torch.randn(1, 4, 3, 2, requires_grad=True)
    for over in ("all", "valid"):
        loss = segmentation_loss(logits, torch.full((1, 3, 2), 255), over=over)
        loss.backward()
        assert loss == 0 and (logits.grad == 0).all()
