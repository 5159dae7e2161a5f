"""Pictures of how well two posed views fit: one's points in the other's image, matches and epipolar lines."""

import colorsys
from typing import Optional

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from snd_nerfstudio.reconstruction.depth import unproject
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.viewer.pictures import heat, overlay_masks

LINES = 10
"""Matches that are drawn with their epipolar lines."""
NOTHING = 0.05
"""Grey of pixels that nothing falls on."""


def reproject(
    views: Views, source: int, target: int, picture: Optional[Float[Tensor, "H W 3"]] = None
) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W"]]:
    """What one view's points look like from another: each in its own colour, the nearest wins.

    Args:
        views: with depth maps.
        source: the view whose pixels are lifted.
        target: the view that they are projected into.
        picture: other colours of the source's pixels than its image has.

    Returns:
        Colours, dark grey where nothing falls; depth along the target's axis, 0 there.
    """
    assert views.depths is not None
    depths = views.depths[source : source + 1]
    points = unproject(depths, views.intrinsics[source : source + 1], views.camera_to_worlds[source : source + 1])[0]
    world_to_camera = torch.linalg.inv(views.camera_to_worlds[target])
    local = points @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    z = local[..., 2]
    pixels = local @ views.intrinsics[target].T
    column = torch.floor(pixels[..., 0] / z.clamp(min=1e-9))
    row = torch.floor(pixels[..., 1] / z.clamp(min=1e-9))
    seen = (depths[0] > 0) & (z > 0) & (row >= 0) & (row < views.height) & (column >= 0) & (column < views.width)
    order = torch.argsort(z[seen], descending=True)
    # numpy writes duplicates in order, so that the nearest comes last and stays
    cells = (row[seen].long() * views.width + column[seen].long())[order].numpy()
    colours = np.full((views.height * views.width, 3), NOTHING, dtype=np.float32)
    depth = np.zeros(views.height * views.width, dtype=np.float32)
    picture = views.images[source].permute(1, 2, 0) if picture is None else picture
    colours[cells] = picture[seen][order].numpy()
    depth[cells] = z[seen][order].numpy()
    shape = (views.height, views.width)
    return torch.from_numpy(colours).view(*shape, 3), torch.from_numpy(depth).view(shape)


def consistency(views: Views, source: int, target: int, tolerance: float = 0.1) -> dict[str, float]:
    """How well one view's points fit another view: depth and colour where both are known.

    Args:
        views: with depth maps.
        source: see `reproject`.
        target: see `reproject`.
        tolerance: share of the depth by which a visible point may be off.

    Returns:
        ``depth_error``, the median of ``|z - d| / d``; ``visible``, the share of points that are no further off than
        the tolerance; ``colour_error``, the mean difference of their colours, 0 to 1. NaN where nothing can be
        compared.
    """
    assert views.depths is not None
    colours, z = reproject(views, source, target)
    there = views.depths[target]
    both = (z > 0) & (there > 0)
    error = ((z - there).abs() / there.clamp(min=1e-9))[both]
    visible = both.clone()
    visible[both] = error <= tolerance
    difference = (colours - views.images[target].permute(1, 2, 0)).abs().mean(dim=-1)[visible]
    return {
        "depth_error": float(error.median()) if len(error) else float("nan"),
        "visible": float(visible.sum() / both.sum()) if both.any() else float("nan"),
        "colour_error": float(difference.mean()) if len(difference) else float("nan"),
    }


def pair_pictures(
    views: Views, matches: Float[np.ndarray, "2 m 2"], names: tuple[str, str]
) -> dict[str, Float[Tensor, "H W 3"]]:
    """A row of a contact sheet: two views, masks, depth, the first one's points in the second, matches with lines.

    What the views lack is left out.

    Args:
        views: two of them.
        matches: pixel positions (x, y) of points that are seen in both.
        names: of the views, for captions.
    """
    first, second = (views.images[view].permute(1, 2, 0) for view in (0, 1))
    row: dict[str, Tensor] = {f"A: {names[0]}": first}
    masks = None if views.masks is None else overlay_masks(first, views.masks[0])
    if masks is not None:
        row[f"masks of {names[0]}"] = masks
    if views.depths is not None:
        depth = views.depths[0]
        known = depth[depth > 0]
        low, high = (float(known.quantile(q)) for q in (0.02, 0.98)) if len(known) else (0.0, 1.0)
        values = torch.where(depth > 0, depth, torch.nan)
        row[f"depth of {names[0]}, {low:.2f} to {high:.2f}"] = heat(values, low, high)
        row[f"points of {names[0]} seen from B"] = reproject(views, 0, 1)[0]
        if masks is not None:
            row[f"masks of {names[0]} seen from B"] = reproject(views, 0, 1, masks)[0]
    row[f"B: {names[1]}"] = second
    chosen = np.unique(np.linspace(0, matches.shape[1] - 1, LINES).round().astype(int)) if matches.shape[1] else []
    drawn = draw_epipolar_lines(views, matches[:, chosen] if len(chosen) else matches)
    row[f"matches in {names[0]}"] = drawn[0]
    row[f"the same in {names[1]}, with their epipolar lines"] = drawn[1]
    return row


def draw_epipolar_lines(
    views: Views, matches: Float[np.ndarray, "2 m 2"]
) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W 3"]]:
    """Matches as dots of the same colour in both views, and in the second the line that each should lie on.

    ``l = K_2^-T [t]x R K_1^-1 x_1``; with right poses every line passes through its dot.
    """
    pictures = [Image.fromarray((image.permute(1, 2, 0) * 255).byte().numpy()) for image in views.images]
    drawings = [ImageDraw.Draw(picture) for picture in pictures]
    poses = views.camera_to_worlds.double().numpy()
    inverse = np.linalg.inv(views.intrinsics.double().numpy())
    relative = np.linalg.inv(poses[1]) @ poses[0]
    radius = max(views.width // 90, 2)
    for number, (one, other) in enumerate(zip(matches[0], matches[1], strict=True)):
        colour = tuple(int(255 * c) for c in colorsys.hsv_to_rgb(number / max(matches.shape[1], 1), 0.9, 1.0))
        ray = relative[:3, :3] @ (inverse[0] @ [one[0], one[1], 1.0])
        a, b, c = inverse[1].T @ np.cross(relative[:3, 3], ray)
        ends = _line_ends(a, b, c, views.width, views.height)
        if len(ends) == 2:
            drawings[1].line([*ends[0], *ends[1]], fill=colour, width=max(radius // 2, 1))
        for drawing, (x, y) in zip(drawings, (one, other), strict=True):
            box = (x - radius, y - radius, x + radius, y + radius)
            drawing.ellipse(box, fill=colour, outline=(0, 0, 0))
    made = [torch.from_numpy(np.asarray(picture).copy()).float() / 255 for picture in pictures]
    return made[0], made[1]


def _line_ends(a: float, b: float, c: float, width: int, height: int) -> list[tuple[float, float]]:
    """Where ``a x + b y + c = 0`` crosses an image's border; none if it passes by."""
    ends = []
    if abs(b) > 1e-15:
        ends += [(x, -(a * x + c) / b) for x in (0.0, float(width))]
    if abs(a) > 1e-15:
        ends += [(-(b * y + c) / a, y) for y in (0.0, float(height))]
    inside = [(x, y) for x, y in ends if -1e-6 <= x <= width + 1e-6 and -1e-6 <= y <= height + 1e-6]
    return inside[:2] if len(inside) >= 2 else []
