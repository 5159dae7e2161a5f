"""The learning rate as a function of the step."""

import math


def warmup_cosine(step: int, horizon: int, warmup_share: float = 0.01, start: float = 0.04, end: float = 0.0) -> float:
    """Factor on the peak learning rate: linear warm-up, then half a cosine.

    The paper says cosine (appendix A.3); the warm-up, 1 % of the steps from 1/25 of the peak, is the released code's.

    Args:
        step: from 0; beyond the horizon the factor stays at ``end``.
        horizon: steps in all.
        warmup_share: share of the horizon that is warm-up.
        start: factor at step 0.
        end: factor at the horizon.

    Returns:
        A Python float: numpy scalars in an optimiser's state make checkpoints unreadable for
        ``torch.load(weights_only=True)``.
    """
    warmup = warmup_share * horizon
    if step < warmup:
        return float(start + (1.0 - start) * step / warmup)
    progress = min((step - warmup) / max(horizon - warmup, 1e-9), 1.0)
    return float(end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress)))
