"""A short look at what tokens know of 3D, on triplets with depth: for every evaluation of a training run.

Not a benchmark: few views, no head is trained. Before and after training are compared on the same views.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.probing.correspondence import PROTOCOLS, pair_errors, summarize
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.nearest import NearestDepthSettings, make_bank, nearest_depth, token_depths
from snd_nerfstudio.scenes.views import ViewTriplet

Tokens = Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b h w c"]]

ROWS = 60
"""Pixels are matched at about this many rows; a half of what the paper's probe does on ScanNet, a quarter of the
pixels and a sixteenth of the time."""
TOLERANCE = 10 / 120
"""A match is right within this share of the height: 10 of the 120 rows that the paper's probe matches."""
CENTIMETRES = 5.0


def correspondence(tokens: Tokens, triplets: Sequence[ViewTriplet]) -> dict[str, float]:
    """How many pixels of the first context find their place in the second one, by their most similar feature.

    The best 1,000 matches of each pair count, as in the paper's probe (section 5.4).

    Args:
        tokens: of images, on a grid that covers them.
        triplets: with depth maps.

    Returns:
        ``correspondence``, the share of matches that are right in the image, and ``correspondence_5cm``, in space;
        without the one there is nothing to say about. Nothing where no pair has a match.
    """
    settings = replace(PROTOCOLS["fixed"], centimetres=(CENTIMETRES,))
    errors = []
    for triplet in triplets:
        views = triplet.context
        if views.depths is None:
            continue
        height, width = views.height, views.width
        scale = min(1.0, ROWS / height)
        settings = replace(settings, scale=scale, pixels=(TOLERANCE * scale * height,))
        grids = rearrange(tokens(views.images), "v h w c -> v c h w")
        maps = [FeatureMap(grid, (height, width), (height, width)) for grid in grids]
        relative = torch.linalg.inv(views.camera_to_worlds[1].double()) @ views.camera_to_worlds[0].double()
        errors.append(
            pair_errors(
                (maps[0], maps[1]),
                (views.depths[0], views.depths[1]),
                (views.intrinsics[0], views.intrinsics[1]),
                relative.float(),
                settings,
            )
        )
    if not errors:
        return {}
    result = summarize(errors, settings)
    found = {
        "correspondence": next(iter(result.pixels.values())),
        f"correspondence_{CENTIMETRES:g}cm": next(iter(result.centimetres.values())),
    }
    return {name: value / 100 for name, value in found.items() if value is not None}


def depth_error(tokens: Tokens, known: Sequence[ViewTriplet], held_out: Sequence[ViewTriplet]) -> dict[str, float]:
    """Relative error of the depth that the most similar tokens of other views have.

    Args:
        tokens: of images, on a grid that covers them.
        known: triplets whose targets' depth is looked up in.
        held_out: triplets whose targets' depth is guessed.

    Returns:
        ``neighbour_depth``, the mean over tokens of ``|guess - depth| / depth``; nothing where there is no depth.
    """

    def described(triplets: Sequence[ViewTriplet]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n"]]:
        features, depths = [], []
        for triplet in triplets:
            view = triplet.target
            grid = tokens(view.images[:1])[0]
            features.append(rearrange(grid, "h w c -> (h w) c"))
            assert view.depths is not None
            depths.append(token_depths(view.depths[0].cpu(), (grid.shape[0], grid.shape[1])).flatten().to(grid.device))
        return torch.cat(features), torch.cat(depths)

    with_depth = [[one for one in triplets if one.target.depths is not None] for triplets in (known, held_out)]
    if not all(with_depth):
        return {}
    bank_tokens, bank_depths = described(with_depth[0])
    wanted_tokens, wanted_depths = described(with_depth[1])
    valid = wanted_depths > 0
    if not (bank_depths > 0).any() or not valid.any():
        return {}
    bank = make_bank(bank_tokens, bank_depths, NearestDepthSettings(most_tokens=20_000))
    guess = nearest_depth(bank, wanted_tokens[valid])
    return {"neighbour_depth": float(((guess - wanted_depths[valid]).abs() / wanted_depths[valid]).mean())}


@torch.no_grad()
def held_out_probes(
    models: dict[str, Tokens], known: Sequence[ViewTriplet], held_out: Sequence[ViewTriplet]
) -> dict[str, float]:
    """Correspondence and depth for several models on the same views.

    Args:
        models: by the ending that their metrics get, "" for none.
        known: training triplets with depth maps.
        held_out: held-out triplets with depth maps.
    """
    results: dict[str, float] = {}
    for ending, tokens in models.items():
        measured = {**correspondence(tokens, held_out), **depth_error(tokens, known, held_out)}
        results |= {f"{name}{ending}": value for name, value in measured.items()}
    return results
