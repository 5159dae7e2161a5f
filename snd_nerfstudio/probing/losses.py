"""What the probes are trained on."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Integer
from torch import Tensor

LOG_OFFSET = 1e-3
"""Added to depths before their logarithm is taken, metres."""
MEAN_WEIGHT = 0.15
"""Of the squared mean in `sig_loss`."""
MEAN_ONLY_STEPS = 100
"""Steps in which `sig_loss` looks at the mean alone."""
MIN_KAPPA = 0.01
"""The least concentration of `angular_loss`."""

PixelMean = Literal["all", "valid"]


def sig_loss(
    prediction: Float[Tensor, "*pixels"],
    depth: Float[Tensor, "*pixels"],
    step: int,
    mean_only_steps: int = MEAN_ONLY_STEPS,
) -> Float[Tensor, ""]:
    """Scale-invariant loss of depth: ``sqrt(var(g) + 0.15 mean(g)^2)`` (AdaBins; DINOv2's probes).

    ``g = log(prediction + 0.001) - log(depth + 0.001)`` over all measured pixels of the batch together, variance with
    ``n - 1``. In the first steps it is ``sqrt(0.15) |mean(g)|``. The paper calls it a classification loss over bins.

    Args:
        prediction: metres, positive.
        depth: metres, 0 = not measured.
        step: of the training, from 0.
        mean_only_steps: how many of the first steps look at the mean alone.

    Returns:
        The loss; 0 without a gradient where no pixel is measured (the released code gives nan there).
    """
    measured = depth > 0
    if not measured.any():
        return (prediction * 0).sum()
    # masked and not picked out: picking takes several times as long
    count = measured.sum()
    g = torch.log(prediction + LOG_OFFSET) - torch.log(depth + LOG_OFFSET)
    mean = g.where(measured, 0).sum() / count
    if step < mean_only_steps:
        return math.sqrt(MEAN_WEIGHT) * mean.abs()
    variance = (g - mean).where(measured, 0).square().sum() / (count - 1).clamp(min=1)
    # the square root has no gradient at 0
    return (variance + MEAN_WEIGHT * mean.square()).clamp(min=1e-12).sqrt()


def gradient_loss(
    prediction: Float[Tensor, "b H W"], depth: Float[Tensor, "b H W"], strides: Sequence[int] = (1, 2, 4, 6)
) -> Float[Tensor, ""]:
    """How much the errors of log depth differ between neighbours, at several scales (MegaDepth, Li and Snavely 2018).

    ``sum_s 1 / N_s sum |g(p) - g(q)|`` over the pixels ``p, q`` that are measured and two apart in a row or a column
    of every ``s``-th pixel, ``g`` as in `sig_loss`, ``N_s`` the measured pixels of that scale.

    The code released by DINOv2, FiT3D and the paper slices batch and channel in place of rows and columns. Its value
    is therefore 0 up to a batch of two, which the depth probe has; so the paper's protocol is without this loss.

    Args:
        prediction: metres, positive.
        depth: metres, 0 = not measured.
        strides: of the scales.
    """
    total = (prediction * 0).sum()
    for stride in strides:
        truth = depth[:, ::stride, ::stride]
        measured = truth > 0
        if not measured.any():
            continue
        g = torch.log(prediction[:, ::stride, ::stride] + LOG_OFFSET) - torch.log(truth + LOG_OFFSET)
        rows = (g[:, 2:] - g[:, :-2])[measured[:, 2:] & measured[:, :-2]]
        columns = (g[:, :, 2:] - g[:, :, :-2])[measured[:, :, 2:] & measured[:, :, :-2]]
        total = total + (rows.abs().sum() + columns.abs().sum()) / measured.sum()
    return total


def angular_loss(
    prediction: Float[Tensor, "b 4 H W"], normals: Float[Tensor, "b 3 H W"], valid: Bool[Tensor, "b H W"]
) -> Float[Tensor, ""]:
    """Negative log-likelihood of an angular distribution whose width is predicted (Bae et al. 2021; Probe3D).

    ``log(1 + exp(-pi k)) - log(k^2 + 1) + k a`` with the angle ``a = acos(clamp(cosine, -1 + 1e-4, 1 - 1e-4))`` and
    ``k = elu(s) + 1.01``; averaged over the valid pixels of the batch.

    Args:
        prediction: a direction of any length, and s.
        normals: of length 1; where it is 0 the angle is 90 degrees.
        valid: which pixels count.

    Returns:
        The loss; 0 without a gradient where no pixel is valid.
    """
    if not valid.any():
        return (prediction * 0).sum()
    cosine = F.cosine_similarity(prediction[:, :3], normals, dim=1)[valid]
    angle = cosine.clamp(-1 + 1e-4, 1 - 1e-4).acos()
    kappa = F.elu(prediction[:, 3][valid]) + 1 + MIN_KAPPA
    return (torch.log1p(torch.exp(-math.pi * kappa)) - torch.log(kappa.square() + 1) + kappa * angle).mean()


def segmentation_loss(
    logits: Float[Tensor, "b k H W"], labels: Integer[Tensor, "b H W"], over: PixelMean, ignore: int = 255
) -> Float[Tensor, ""]:
    """Cross-entropy of classes, nats.

    Args:
        logits: of k classes.
        labels: classes from 0, or ``ignore``.
        over: divide the sum by ``all`` pixels, those to be ignored and those of padding too (released code), or by
            the ``valid`` ones (PyTorch's mean, but 0 where there are none).
        ignore: the label that has no loss.
    """
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore, reduction="sum")
    pixels = labels.numel() if over == "all" else (labels != ignore).sum().clamp(min=1)
    return total / pixels
