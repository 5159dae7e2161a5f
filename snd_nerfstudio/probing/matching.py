"""Finding one image's features in another's: exact nearest neighbours, the ratio test, places in a feature map."""

from dataclasses import dataclass
from typing import Optional

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.errors import InputError

BLOCK = 4_000_000
"""Similarities that are held at once: 16 MB, however many features there are."""
COLUMNS = 65_536
"""Candidates that are compared at once."""
LEAST_DISTANCE = 1e-9
"""Distances are at least this before they are divided."""


@dataclass(frozen=True)
class FeatureMap:
    """The features of one image, and which part of the map is image and which is padding."""

    values: Float[Tensor, "c h w"]
    """One feature per token."""
    image_size: tuple[int, int]
    """Height and width that the backbone was given, before padding, pixels."""
    padded_size: tuple[int, int]
    """Height and width that the map covers, pixels: half of the padding, rounded down, lies left of and above the
    image."""

    def in_map(self, places: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Shares (x, y) of the map's extent, of places that are shares of the image's."""
        image, padded, before = self._extents(places)
        return (places * image + before) / padded

    def in_image(self, places: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
        """Shares (x, y) of the image's extent, of places that are shares of the map's; the inverse of `in_map`."""
        image, padded, before = self._extents(places)
        return (places * padded - before) / image

    def _extents(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        before = [(padded - image) // 2 for image, padded in zip(self.image_size, self.padded_size)]
        image, padded, offset = (like.new_tensor(pair[::-1]) for pair in (self.image_size, self.padded_size, before))
        return image, padded, offset


@dataclass(frozen=True)
class FeatureMatches:
    """Features of a first image, each with its most similar one of a second; best first."""

    first: Int[Tensor, "m"]
    """Places in the list of the first image's features."""
    second: Int[Tensor, "m"]
    """Places in the list of the second image's features."""
    weights: Float[Tensor, "m"]
    """Of the ratio test, in [0, 1]: 0 where the second best is as near as the best."""

    def __len__(self) -> int:
        return len(self.first)


def nearest(
    queries: Float[Tensor, "n c"], candidates: Float[Tensor, "m c"], k: int = 2
) -> tuple[Float[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The most similar candidates of each query by cosine: exact, by comparing all with all, block by block.

    For features of unit length, Euclidean and cosine distance order alike: ``|a - b|^2 = 2 - 2 a.b``. Where several
    are equally similar, which of them are returned is not defined.

    Args:
        queries: of any length and floating type.
        candidates: likewise.
        k: how many; all of them if there are fewer.

    Returns:
        Cosines, largest first (float32, or float64 if that is given), and places in the list of candidates.

    Raises:
        InputError: a feature is not finite.
    """
    queries, candidates = _unit(queries), _unit(candidates)
    k = min(k, len(candidates))
    columns = max(min(len(candidates), COLUMNS, BLOCK), 1)
    rows = max(BLOCK // columns, 1)
    similarities = queries.new_empty(len(queries), k)
    places = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    for row in range(0, len(queries), rows) if k else ():
        block = queries[row : row + rows]
        best, where = queries.new_empty(len(block), 0), places.new_empty(len(block), 0)
        for column in range(0, len(candidates), columns):
            product = block @ candidates[column : column + columns].T
            some, at = product.topk(min(k, product.shape[1]), dim=1)
            best, where = torch.cat([best, some], dim=1), torch.cat([where, at + column], dim=1)
            best, order = best.topk(min(k, best.shape[1]), dim=1)
            where = where.gather(1, order)
        similarities[row : row + rows], places[row : row + rows] = best, where
    return similarities, places


def ratio_weights(similarities: Float[Tensor, "n k"]) -> Float[Tensor, "n"]:
    """Lowe's ratio test as a weight: ``1 - d1 / d2`` with ``d = max(1 - cosine, 1e-9)`` (released code, Probe3D).

    Args:
        similarities: cosines of the best and the second best candidate; with one candidate alone all weights are 0.
    """
    if similarities.shape[1] < 2:
        return similarities.new_zeros(len(similarities))
    distance = (1 - similarities[:, :2]).clamp_min(LEAST_DISTANCE)
    return 1 - distance[:, 0] / distance[:, 1]


def match(first: Float[Tensor, "n c"], second: Float[Tensor, "m c"], most: int = 1000) -> FeatureMatches:
    """Each feature's nearest neighbour in the other image, of which those with the highest weights are kept.

    From the first image to the second only, without a mutual check, as the released code does.

    Args:
        first: features of the first image.
        second: features of the second image.
        most: how many are kept; all of them if there are fewer.

    Raises:
        InputError: a feature is not finite.
    """
    similarities, places = nearest(first, second, 2)
    if similarities.shape[1] == 0:
        none = places.new_zeros(0)
        return FeatureMatches(none, none, similarities.new_zeros(0))
    weights, chosen = ratio_weights(similarities).topk(min(most, len(first)))
    return FeatureMatches(chosen, places[chosen, 0], weights)


def sample(values: Float[Tensor, "c h w"], places: Float[Tensor, "n 2"]) -> Float[Tensor, "n c"]:
    """Features at places of a map, bilinearly between the tokens' centres.

    Args:
        values: one feature per token.
        places: shares (x, y) of the map's extent; (0, 0) is its upper left corner, not a token's centre.

    Returns:
        float32, or float64 if the map is.
    """
    values = _at_least_float32(values)
    grid = 2 * places[None, None].to(values) - 1
    # beyond the outermost centres: zeros there, as the released code has, would change lengths but not directions
    found = F.grid_sample(values[None], grid, padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def locate(
    values: Float[Tensor, "c h w"],
    queries: Float[Tensor, "n c"],
    window: Optional[int] = None,
    temperature: float = 0.05,
) -> Float[Tensor, "n 2"]:
    """Where in a map the features most similar to some queries are.

    Args:
        values: one feature per token.
        queries: what to look for.
        window: None: the centre of the most similar token. Otherwise the mean of the tokens' centres within so many
            rows and columns of it, weighted by ``softmax(cosine / temperature)``.
        temperature: smaller is sharper.

    Returns:
        Shares (x, y) of the map's extent.

    Raises:
        InputError: a feature is not finite.
    """
    rows, columns = values.shape[1:]
    tokens = values.flatten(1).T
    best = nearest(queries, tokens, 1)[1][:, 0]
    row, column = best // columns, best % columns
    size = torch.tensor([columns, rows], dtype=torch.float32, device=values.device)
    if window is None:
        return (torch.stack([column, row], dim=1) + 0.5) / size
    step = torch.arange(-window, window + 1, device=values.device)
    dy, dx = (shift.flatten() for shift in torch.meshgrid(step, step, indexing="ij"))
    y, x = row[:, None] + dy, column[:, None] + dx
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    there = torch.where(inside, y * columns + x, best[:, None])
    similarity = torch.einsum("nkc,nc->nk", _unit(tokens)[there], _unit(queries))
    weights = (similarity / temperature).masked_fill(~inside, -torch.inf).softmax(dim=1)
    centres = torch.stack([x, y], dim=2) + 0.5
    return torch.einsum("nk,nkd->nd", weights.float(), centres.float()) / size


def _unit(features: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
    if not bool(features.isfinite().all()):
        raise InputError(
            "Some features are not finite: the backbone's weights or its precision (try float32) are not usable."
        )
    return F.normalize(_at_least_float32(features), dim=1)


def _at_least_float32(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()
