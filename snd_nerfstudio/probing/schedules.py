"""Learning rates and betas of the probes as functions of the step.

Warm-ups are shares of the whole, so that a shorter run has the same shape. All values are Python floats: numpy's in
an optimiser's state make checkpoints unreadable for ``torch.load(weights_only=True)``.
"""

import math

DEPTH_STEPS = 307_200
"""Of the depth probe, batch 2 (paper appendix A.4)."""
DEPTH_WARMUP = 12_800 / DEPTH_STEPS
"""Share of the depth probe's steps that is warm-up (released code)."""
NORMALS_WARMUP = 1.5 / 10
"""Share of the normals probe's steps that is warm-up: 1.5 of 10 epochs (released code)."""
SEGMENTATION_STEPS = 320_000
"""Of the segmentation probe, batch 2 (paper appendix A.4)."""
SEGMENTATION_WARMUP = 1_500 / SEGMENTATION_STEPS
"""Share of the segmentation probe's steps that is warm-up (released code)."""


def depth_rate(step: int, total: int = DEPTH_STEPS, warmup: float = DEPTH_WARMUP) -> float:
    """Factor on the depth probe's learning rate: half a cosine to 1e-8, times a linear warm-up from 0.001.

    ``w (e + (1 - e) (1 + cos(pi t / T)) / 2)`` with ``e = 1e-8``, and ``w = 1 - (1 - t / W) (1 - 0.001)`` for
    ``t < W``, else 1 (released code). The cosine goes on during the warm-up.

    Args:
        step: t, from 0; beyond the last the factor stays.
        total: T.
        warmup: W as a share of T.
    """
    end = 1e-8
    cosine = end + (1 - end) * 0.5 * (1 + math.cos(math.pi * min(step / total, 1.0)))
    return _warmed_up(cosine, step, warmup * total, 0.001)


def depth_betas(step: int, total: int = DEPTH_STEPS) -> tuple[float, float]:
    """AdamW's betas for the depth probe: the first falls from 0.95 to 0.85 and rises again, the second is 0.999.

    The released code changes the first one step by step as "one cycle" schedules do, in half cosines: down during
    the first 30 % of the steps, up during the rest. (The paper says 0.9.)

    Args:
        step: from 0; beyond the last the betas stay.
        total: number of steps.
    """
    high, low = 0.95, 0.85
    turn, last = max(0.3 * total - 1, 0.0), max(total - 1.0, 0.0)
    if step <= turn:
        return _half_cosine(high, low, step / turn if turn else 1.0), 0.999
    return _half_cosine(low, high, min((step - turn) / (last - turn), 1.0) if last > turn else 1.0), 0.999


def normals_rate(step: int, total: int, warmup: float = NORMALS_WARMUP) -> float:
    """Factor on the normals probe's learning rate: linear from 0.01 to 1, then a quarter of a cosine to 0.01.

    ``0.01 + 0.99 t / W`` up to ``t = W``, then ``0.01 + 0.99 cos(pi / 2 (t - W) / (T - W))`` (Probe3D).

    Args:
        step: t, from 0; beyond the last the factor stays.
        total: T, steps of all epochs.
        warmup: W as a share of T.
    """
    start = 0.01
    if step <= warmup * total:
        return start + (1 - start) * (step / (warmup * total) if warmup else 1.0)
    progress = min((step - warmup * total) / (total - warmup * total), 1.0)
    return start + (1 - start) * math.cos(0.5 * math.pi * progress)


def segmentation_rate(step: int, total: int = SEGMENTATION_STEPS, warmup: float = SEGMENTATION_WARMUP) -> float:
    """Factor on the segmentation probe's learning rate: linear to 0, times a linear warm-up from 1e-6.

    ``w (1 - t / T)`` with ``w = 1 - (1 - t / W) (1 - 1e-6)`` for ``t < W``, else 1 (released code).

    Args:
        step: t, from 0; beyond the last the factor stays.
        total: T.
        warmup: W as a share of T.
    """
    return _warmed_up(max(1 - step / total, 0.0), step, warmup * total, 1e-6)


def _warmed_up(factor: float, step: int, warmup: float, start: float) -> float:
    return factor * (1 - (1 - step / warmup) * (1 - start)) if step < warmup else factor


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
