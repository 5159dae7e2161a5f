"""Mixing every pixel with the mean of its instance region (paper section 3.4, equation 4)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def blend(
    features: Float[Tensor, "H W c"],
    mask: Int[Tensor, "H W"],
    alpha: float,
    coverage: Float[Tensor, "H W"] | None = None,
) -> Float[Tensor, "H W c"]:
    """Blend splatted features within the target's instance masks.

    ``B(u) = alpha F(u) + (1 - alpha) mean_{v in M_u} F(v)`` over all pixels with the same id, id 0 among them.

    With ``coverage`` the features are premultiplied by it, as splatting makes them, and so is the result:
    ``B(u) = alpha F(u) + (1 - alpha) A(u) sum_{v in M_u} F(v) / sum_{v in M_u} A(v)``. Holes then neither darken the
    mean nor receive it.

    Args:
        features: splatted features.
        mask: instance ids of the target view, any integers.
        alpha: weight of the pixel itself, in [0, 1].
        coverage: accumulated alpha of every pixel.

    Returns:
        Blended features; premultiplied if ``coverage`` is given.

    Raises:
        ValueError: alpha is outside [0, 1] or the mask is of another size.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"blending strength {alpha} is not in [0, 1]")
    if mask.shape != features.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)} and features {tuple(features.shape[:2])} differ in size")
    if alpha == 1:
        return features
    ids, region = torch.unique(mask, return_inverse=True)
    region = region.flatten()
    flat = features.reshape(-1, features.shape[-1])
    weight = torch.ones_like(flat[:, 0]) if coverage is None else coverage.reshape(-1)
    sums = torch.zeros(len(ids), flat.shape[1], device=flat.device, dtype=flat.dtype).index_add_(0, region, flat)
    mass = torch.zeros(len(ids), device=flat.device, dtype=flat.dtype).index_add_(0, region, weight)
    means = sums / mass.clamp(min=torch.finfo(flat.dtype).tiny)[:, None]
    spread = means[region] if coverage is None else means[region] * weight[:, None]
    return torch.lerp(spread, flat, alpha).view_as(features)
