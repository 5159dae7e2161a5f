"""Groups of features that point the same way."""

import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

MOST_ROWS = 20_000
"""Of more features so many, evenly spaced, are clustered."""
RESTARTS = 3
"""k-means starts anew this often and keeps the best."""
PALETTE = (
    "0096ff e1ff00 960000 007800 ff87e1 ff961e 69ffff 692d87 a569ff 5a4b2d "
    "ff4b5a 005a87 ffe1c3 c30087 b48787 00f087 b4c3ff 2d2dc3 a5b44b 3ca5a5"
).split()
"""Twenty colours, none of them very dark or glaring, placed as far from each other as they can be in the colour space
OKLab; each is the farthest of the rest from those before it."""


def palette_colour(numbers: Int64[Tensor, "..."]) -> Float[Tensor, "... 3"]:
    """Fixed colours for numbers from 0 on; every 20 they come again."""
    colours = torch.tensor([list(bytes.fromhex(code)) for code in PALETTE], device=numbers.device) / 255
    return colours[numbers % len(PALETTE)]


@dataclass(frozen=True)
class Clusters:
    """Directions that features are assigned to: each feature to the one with which its scalar product is largest."""

    centres: Float[Tensor, "k c"]
    """Unit vectors; the first has most members."""

    def scores(self, features: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        """Scalar products with the centres: linear, so this may be done before splatting."""
        return features @ self.centres.to(features.dtype).T

    def labels(self, scores: Float[Tensor, "... k"]) -> Int64[Tensor, "..."]:
        """The number of the centre with the largest score; a feature's length makes no difference."""
        return scores.argmax(dim=-1)

    def colour(self, labels: Int64[Tensor, "..."]) -> Float[Tensor, "... 3"]:
        """A fixed colour for each label (`palette_colour`)."""
        return palette_colour(labels)


def fit_clusters(features: Float[Tensor, "n c"], count: int = 8, seed: int = 0) -> Clusters:
    """Spherical k-means: k-means of the features' directions, with centres of length 1.

    On unit vectors ``|x - m|^2 = 2 - 2 x m`` for a unit centre ``m``, so the nearest centre is the one with the
    largest cosine. The same arguments give the same centres, ordered by their number of members.

    Args:
        features: rows that are zero or not finite are left out; of many rows some 20,000 are used, evenly spaced.
        count: how many clusters; fewer different directions give fewer.
        seed: where k-means starts.

    Returns:
        The centres, on the features' device. Without any usable row a single arbitrary one.

    Raises:
        ValueError: no cluster is asked for.
    """
    if count < 1:
        raise ValueError(f"{count} clusters: at least one is needed")
    rows = features[torch.isfinite(features).all(dim=1) & (features != 0).any(dim=1)].detach()
    rows = rows[:: max(len(rows) - 1, 0) // MOST_ROWS + 1].cpu().double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    if len(rows) == 0:
        rows = torch.eye(1, features.shape[1], dtype=torch.float64)
    means = _k_means(rows, min(count, len(rows)), seed)
    means = means[means.norm(dim=1) > 1e-6]  # opposite directions alone in a cluster have no mean
    centres = _without_repetition(F.normalize(means, dim=1)) if len(means) else rows[:1]
    sizes = (rows @ centres.T).argmax(dim=1).bincount(minlength=len(centres))
    order = sizes.argsort(descending=True, stable=True)
    return Clusters(centres[order][sizes[order] > 0].to(features))


def _k_means(rows: Float[Tensor, "n c"], count: int, seed: int) -> Float[Tensor, "k c"]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(limits=1, user_api="openmp"):
        # several threads would add up the means in an order that differs from run to run
        warnings.simplefilter("ignore", ConvergenceWarning)  # says that there are fewer directions than clusters
        fitted = KMeans(count, n_init=RESTARTS, random_state=seed).fit(rows.float().numpy())  # type: ignore
    return torch.from_numpy(fitted.cluster_centers_).double()


def _without_repetition(centres: Float[Tensor, "k c"]) -> Float[Tensor, "m c"]:
    """The centres that equal none before them, up to rounding."""
    same = (centres @ centres.T).tril(diagonal=-1) > 1 - 1e-9
    return centres[~same.any(dim=1)]
