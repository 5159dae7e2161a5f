"""Three colours for many channels."""

from dataclasses import dataclass

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


def fit_pca(features: Float[Tensor, "n c"], robust: float = 0.01) -> PCABasis:
    """Principal components with a deterministic sign and a robust range.

    The sign makes each component's largest loading positive; the range runs from the ``robust`` to the
    ``1 - robust`` quantile of each projection. With fewer than three directions of variance the rest are zero.

    Args:
        features: at least one row; rows that are not finite are left out.
        robust: share of values cut off at either end.
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
    projected = (rows - mean) @ components.T
    bounds = torch.quantile(
        projected, torch.tensor([robust, 1 - robust], dtype=torch.float64, device=rows.device), dim=0
    )
    dtype = features.dtype
    return PCABasis(mean.to(dtype), components.to(dtype), bounds[0].to(dtype), bounds[1].to(dtype))
