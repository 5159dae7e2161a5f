"""Depth without training: that of the most similar tokens of some images whose depth is known."""

from dataclasses import dataclass
from typing import Literal, Optional

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import nearest


@dataclass(frozen=True)
class NearestDepthSettings:
    """How depth is taken from similar tokens."""

    neighbours: int = 16
    """Number of most similar tokens."""
    average: Literal["median", "mean"] = "median"
    """How their depths become one."""
    most_tokens: Optional[int] = 200_000
    """Of more tokens so many are kept, drawn with the seed; None keeps all."""
    seed: int = 0
    """Seed of which tokens are kept."""


@dataclass(frozen=True)
class TokenBank:
    """Tokens whose depth is known."""

    tokens: Float[Tensor, "n c"]
    depths: Float[Tensor, "n"]
    """Metres, all above 0."""
    settings: NearestDepthSettings = NearestDepthSettings()

    def __len__(self) -> int:
        return len(self.depths)


def token_depths(depth: Float[Tensor, "H W"], grid: tuple[int, int]) -> Float[Tensor, "h w"]:
    """Depth of each token: the median of the pixels with a depth in its cell (the lower one of two), 0 without any.

    Args:
        depth: metres, 0 = none.
        grid: rows and columns of tokens that cover the map; cells that are not whole pixels take every pixel whose
            centre lies in them.

    Raises:
        InputError: there are more tokens than pixels on an axis.
    """
    if depth.shape[0] < grid[0] or depth.shape[1] < grid[1]:
        raise InputError(
            f"A depth map of {depth.shape[1]}x{depth.shape[0]} pixels is too small for {grid[1]}x{grid[0]} tokens: "
            "give it at the resolution of the image."
        )
    if all(length % cells == 0 for length, cells in zip(depth.shape, grid)):
        cells = rearrange(depth, "(h y) (w x) -> h w (y x)", h=grid[0], w=grid[1])
        return cells.masked_fill(cells <= 0, torch.nan).nanmedian(dim=2).values.nan_to_num(0.0)
    rows, columns = (
        torch.tensor_split(index, _edges(length, cells))
        for index, length, cells in zip((torch.arange(n) for n in depth.shape), depth.shape, grid)
    )
    found = [[_median(depth[row[0] : row[-1] + 1, column[0] : column[-1] + 1]) for column in columns] for row in rows]
    return torch.stack([torch.stack(row) for row in found])


def make_bank(
    tokens: Float[Tensor, "n c"], depths: Float[Tensor, "n"], settings: NearestDepthSettings = NearestDepthSettings()
) -> TokenBank:
    """Keep the tokens whose depth is known.

    Args:
        tokens: of all training images.
        depths: one per token, metres; 0 = none.
        settings: how many are kept.

    Raises:
        InputError: no token has a depth, or a number in the settings is below 1.
    """
    if settings.neighbours < 1 or (settings.most_tokens is not None and settings.most_tokens < 1):
        raise InputError(
            f"neighbours is {settings.neighbours} and most_tokens {settings.most_tokens}: both must be at least 1."
        )
    known = torch.nonzero(depths > 0)[:, 0]
    if len(known) == 0:
        raise InputError("No token of the training images has a depth: check their depth maps.")
    if settings.most_tokens is not None and len(known) > settings.most_tokens:
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(known), generator=generator)[: settings.most_tokens]
        known = known[order.sort().values.to(known.device)]
    return TokenBank(tokens[known], depths[known], settings)


def nearest_depth(bank: TokenBank, tokens: Float[Tensor, "m c"]) -> Float[Tensor, "m"]:
    """Depth of tokens: median (the lower one of two) or mean of those of the most similar ones by cosine, metres.

    Args:
        bank: tokens whose depth is known.
        tokens: whose depth is wanted.

    Raises:
        InputError: a token is not finite.
    """
    _, places = nearest(tokens, bank.tokens.to(tokens.device), bank.settings.neighbours)
    depths = bank.depths.to(tokens.device)[places]
    return depths.median(dim=1).values if bank.settings.average == "median" else depths.mean(dim=1)


def _edges(length: int, cells: int) -> list[int]:
    """First pixel of each cell but the first: pixel i is in cell ``floor((i + 0.5) * cells / length)``."""
    cell = ((torch.arange(length, dtype=torch.float64) + 0.5) * cells / length).floor().long()
    return [int(torch.searchsorted(cell, number)) for number in range(1, cells)]


def _median(values: Float[Tensor, "h w"]) -> Float[Tensor, ""]:
    known = values[values > 0]
    return known.median() if len(known) else values.new_zeros(())
