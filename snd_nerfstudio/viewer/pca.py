"""Three colours for many channels."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PCABasis:
    """An affine map from features to colours, fitted once and then kept, so that colours mean the same everywhere."""

    mean: Float[Tensor, "c"]
    components: Float[Tensor, "3 c"]
    low: Float[Tensor, "3"]
    """Projection that becomes colour 0."""
    high: Float[Tensor, "3"]
    """Projection that becomes colour 1."""

    def project(self, features: Float[Tensor, "... c"]) -> Float[Tensor, "... 3"]:
        """Coordinates along the components; linear up to the mean, so it may be done before splatting."""
        return (features - self.mean) @ self.components.T

    def colour(self, projected: Float[Tensor, "... 3"]) -> Float[Tensor, "... 3"]:
        """Projected features to colours in [0, 1]."""
        return ((projected - self.low) / (self.high - self.low).clamp(min=1e-12)).clamp(0, 1)


QUANTILE_LIMIT = 2**24
"""In older versions of torch, torch.quantile refuses more elements than this."""


def fit_pca(
    features: Float[Tensor, "n c"], robust: float = 0.01, scale: Literal["robust", "joint"] = "robust"
) -> PCABasis:
    """Principal components with a deterministic sign, and the range that the colours cover.

    The sign makes each component's largest loading positive. With fewer than three directions of variance the rest
    are zero.

    Args:
        features: at least one row; rows that are not finite are left out.
        robust: share of values cut off at either end of a robust range.
        scale: ``robust`` runs from the ``robust`` to the ``1 - robust`` quantile of each projection; ``joint`` is one
            global minimum and maximum over all three, as in the released SnD code and FiT3D's figures.
    """
    rows = features[torch.isfinite(features).all(dim=1)].double()
    channels = features.shape[1]
    if len(rows) == 0:
        rows = torch.zeros(1, channels, dtype=torch.float64, device=features.device)
    mean = rows.mean(dim=0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :3].T  # eigh sorts ascending
    components = components * (values.flip(0)[:3, None] > 1e-12 * values.sum().clamp(min=1e-30))
    if channels < 3:
        components = torch.cat([components, components.new_zeros(3 - channels, channels)])
    largest = components.gather(1, components.abs().argmax(dim=1, keepdim=True))
    components = components * torch.where(largest < 0, -1.0, 1.0)
    low, high = _range((rows - mean) @ components.T, robust, scale)
    dtype = features.dtype
    return PCABasis(mean.to(dtype), components.to(dtype), low.to(dtype), high.to(dtype))


def follow_pca(
    basis: PCABasis,
    features: Float[Tensor, "n c"],
    momentum: float,
    robust: float = 0.01,
    scale: Literal["robust", "joint"] = "robust",
) -> PCABasis:
    """The basis of features that have changed a little, with colours that change as little as they can.

    Components fitted anew may swap or turn among themselves from one fit to the next although the features hardly
    moved. So the new ones are brought as near to the old ones as an orthogonal map among the three can bring them:
    ``R = argmin |R new - old|`` is ``U V^T`` with ``old new^T = U S V^T`` (Procrustes; reflections are allowed). Then
    ``momentum * old + (1 - momentum) * aligned`` of everything, and the mixed components are made orthonormal again
    by their polar decomposition. Components that are zero, for want of variance, are no direction that is kept.

    Args:
        basis: the old one.
        features: the new ones; rows that are not finite are left out, and without any other row nothing changes.
        momentum: from 0, which gives the aligned new basis, to 1, which gives the old one.
        robust: see `fit_pca`.
        scale: see `fit_pca`.

    Raises:
        ValueError: the momentum is not in [0, 1].
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"the momentum {momentum} is not in [0, 1]")
    rows = features[torch.isfinite(features).all(dim=1)]
    if momentum == 1 or len(rows) == 0:
        return basis
    fitted = fit_pca(rows.double(), robust, scale)
    old = {name: value.to(rows.device).double() for name, value in vars(basis).items()}
    left, _, right = torch.linalg.svd(old["components"] @ fitted.components.T)
    aligned = left @ right @ fitted.components
    low, high = _range((rows.double() - fitted.mean) @ aligned.T, robust, scale)
    new = {"mean": fitted.mean, "components": aligned, "low": low, "high": high}
    mixed = {name: momentum * old[name] + (1 - momentum) * new[name] for name in new}
    mixed["components"] = _orthonormal(mixed["components"])
    dtype = features.dtype
    return PCABasis(**{name: value.to(dtype) for name, value in mixed.items()})


def _range(projected: Float[Tensor, "n 3"], robust: float, scale: str) -> tuple[Tensor, Tensor]:
    """What becomes colour 0 and colour 1."""
    if scale == "joint":
        return projected.min().expand(3).clone(), projected.max().expand(3).clone()
    step = projected.numel() // QUANTILE_LIMIT + 1
    ends = torch.tensor([robust, 1 - robust], dtype=projected.dtype, device=projected.device)
    low, high = torch.quantile(projected[::step].contiguous(), ends, dim=0)
    return low, high


def _orthonormal(components: Float[Tensor, "3 c"]) -> Float[Tensor, "3 c"]:
    """The nearest orthonormal rows: the polar factor ``U V^T``; directions of no length stay without length."""
    left, lengths, right = torch.linalg.svd(components, full_matrices=False)
    return (left * (lengths > 1e-6)) @ right
