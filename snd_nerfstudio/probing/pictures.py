"""Pictures of what probes predict and of what features match, as in the paper's figures 3 to 7 and 12 to 14.

Every picture is a float tensor ``[H, W, 3]`` with colours in [0, 1]; `viewer.pictures` writes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from snd_nerfstudio.probing.matching import FeatureMap, match, sample
from snd_nerfstudio.probing.pairs.base import PosedPair
from snd_nerfstudio.probing.samples import IGNORE
from snd_nerfstudio.snd_visualize import ShownSet, ShownView, fitting_size
from snd_nerfstudio.viewer.clusters import palette_colour
from snd_nerfstudio.viewer.pictures import GAP, heat, overlay_masks, sheet

MOST_ERROR = 0.5
"""Relative error of a depth that has the brightest colour."""
MOST_ANGLE = 60.0
"""Degrees between two normals that have the brightest colour."""
RIGHT, WRONG = (0, 150, 255), (255, 150, 30)
"""Colours of lines; they can be told apart by all."""
STRIDE = 4
"""Pixels of the depth maps between the points that are matched: a quarter of the resolution, as it is measured."""
SHEET_HEIGHT = 224
"""Pixels of a picture's height on a sheet."""


def as_picture(image: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "h w 3"]:
    """A decoded image as a picture."""
    return torch.from_numpy(np.array(image)).float() / 255


# ---------------------------------------------------------------------- features


def view_set(
    images: Sequence[UInt8[np.ndarray, "_h _w 3"]],
    names: Sequence[str],
    patch: int,
    title: str,
) -> ShownSet:
    """Views of one scene, to be drawn with one basis and one clustering (`snd_visualize.draw_set`; figures 12 to 14).

    Args:
        images: RGB; each is resized to whole patches with a bicubic antialiasing filter.
        names: of the views, for captions.
        patch: the backbones', pixels.
        title: above the sheet.
    """
    views = []
    for number, (image, name) in enumerate(zip(images, names, strict=True), start=1):
        height, width = fitting_size(image.shape[0], image.shape[1], patch)
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        tensor = as_picture(np.asarray(resized)).permute(2, 0, 1)
        views.append(ShownView(f"view_{number}", f"{number} {name}", tensor))
    return ShownSet("views", title, views)


# ---------------------------------------------------------------------- predictions


def depth_sheet(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Float[Tensor, "h w"],
    predictions: Mapping[str, Float[Tensor, "h w"]],
    title: str = "",
) -> Float[Tensor, "_H _W 3"]:
    """Image, measured depth, and each model's prediction and relative error (figures 3 and 8).

    All depths have one scale, from the 1st to the 99th hundredth of the measured ones; errors ``|p - t| / t`` go from
    0 to `MOST_ERROR`. What was not measured is grey.

    Args:
        image: RGB.
        truth: metres, 0 = none.
        predictions: metres, by the model's label.
        title: above the sheet.
    """
    truth = truth.float()
    known = truth > 0
    low, high = _range(truth[known])
    pictures = {"image": as_picture(image), "measured": heat(_only(truth, known), low, high)}
    for label, prediction in predictions.items():
        error = (prediction - truth).abs() / truth.clamp(min=1e-6)
        pictures[label] = heat(prediction.float(), low, high)
        mean = f"{float(error[known].mean()):.3f}" if bool(known.any()) else "-"
        pictures[f"{label}: relative error, mean {mean}"] = heat(_only(error.float(), known), 0.0, MOST_ERROR)
    return sheet(pictures, columns=2, height=SHEET_HEIGHT, title=title)


def normals_sheet(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Float[Tensor, "h w 3"],
    predictions: Mapping[str, Float[Tensor, "h w 3"]],
    title: str = "",
) -> Float[Tensor, "_H _W 3"]:
    """Image, measured normals, and each model's prediction and angular error up to `MOST_ANGLE` (figure 4).

    Args:
        image: RGB.
        truth: unit vectors in camera axes, zeros = none.
        predictions: of any length above 0, by the model's label.
        title: above the sheet.
    """
    known = truth.norm(dim=2) > 0.5
    pictures = {"image": as_picture(image), "measured": normal_colours(truth)}
    for label, prediction in predictions.items():
        unit = torch.nn.functional.normalize(prediction.float(), dim=2)
        angle = torch.rad2deg(torch.acos((unit * truth).sum(dim=2).clamp(-1, 1)))
        mean = f"{float(angle[known].mean()):.1f}" if bool(known.any()) else "-"
        pictures[label] = normal_colours(unit)
        pictures[f"{label}: error, mean {mean}°"] = heat(_only(angle, known), 0.0, MOST_ANGLE)
    return sheet(pictures, columns=2, height=SHEET_HEIGHT, title=title)


def normal_colours(normals: Float[Tensor, "h w 3"]) -> Float[Tensor, "h w 3"]:
    """Right is red, up is green, towards the camera is blue: ``(x, -y, -z) / 2 + 1/2``; grey where there is none.

    Args:
        normals: unit vectors or zeros, in camera axes (x right, y down, z forward).
    """
    return normals * normals.new_tensor([0.5, -0.5, -0.5]) + 0.5


def segmentation_sheet(
    image: UInt8[np.ndarray, "h w 3"],
    truth: Integer[Tensor, "h w"],
    predictions: Mapping[str, Integer[Tensor, "h w"]],
    title: str = "",
) -> Float[Tensor, "_H _W 3"]:
    """Image, labels, and each model's classes and what of them is wrong (figure 6).

    Args:
        image: RGB.
        truth: class index, `IGNORE` = none.
        predictions: class index, by the model's label.
        title: above the sheet.
    """
    ground = as_picture(image)
    known = truth != IGNORE
    labelled = torch.where(known, truth.long() + 1, 0)
    pictures = {"image": ground, "labels": overlay_masks(ground, labelled, 0.8)}
    grey = ground.mean(dim=2, keepdim=True).expand_as(ground)
    for label, prediction in predictions.items():
        wrong = known & (prediction.long() != truth.long())
        share = f"{100 * float((~wrong)[known].float().mean()):.1f} % right" if bool(known.any()) else "no labels"
        pictures[label] = overlay_masks(ground, prediction.long() + 1, 0.8)
        colour = torch.tensor(WRONG) / 255
        pictures[f"{label}: {share}"] = torch.where(wrong[..., None], torch.lerp(grey, colour, 0.7), grey)
    return sheet(pictures, columns=2, height=SHEET_HEIGHT, title=title)


def _range(values: Float[Tensor, "n"]) -> tuple[float, float]:
    if len(values) == 0:
        return 0.0, 1.0
    ordered = values.sort().values
    last = len(ordered) - 1
    return float(ordered[round(0.01 * last)]), float(ordered[round(0.99 * last)])


def _only(values: Float[Tensor, "h w"], known: Bool[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    return values.masked_fill(~known, torch.nan)


# ---------------------------------------------------------------------- correspondence


@dataclass(frozen=True)
class ShownMatches:
    """Matches between two images that are drawn as lines."""

    first: Float[Tensor, "n 2"]
    """Shares (x, y) of the first image's extent."""
    second: Float[Tensor, "n 2"]
    """Likewise of the second."""
    right: Bool[Tensor, "n"]
    """Whether the point is where its match is, as far as the threshold."""
    recall: float
    """Percent of all the matches that some are shown of."""


def pair_matches(
    maps: tuple[FeatureMap, FeatureMap], pair: PosedPair, count: int = 40, most: int = 1000, threshold: float = 10.0
) -> ShownMatches:
    """Which matches are right, as protocol `fixed` measures them, and some of them spread over the image.

    Args:
        maps: features of both images.
        pair: their depth and poses.
        count: how many are shown.
        most: how many are measured, the best by the ratio test.
        threshold: pixels of a quarter of the depth maps' resolution.

    Raises:
        InputError: a feature is not finite.
    """
    pixels, features = [], []
    for fmap, depth in zip(maps, pair.depths, strict=True):
        rows, columns = (torch.arange(length // STRIDE) * STRIDE + STRIDE // 2 for length in depth.shape)
        known = torch.from_numpy(depth[rows.numpy()[:, None], columns.numpy()] > 0)
        row, column = torch.nonzero(known, as_tuple=True)
        pixels.append(torch.stack([columns[column], rows[row]], dim=1) + 0.5)
        places = pixels[-1] / pixels[-1].new_tensor([depth.shape[1], depth.shape[0]])
        features.append(sample(fmap.values, fmap.in_map(places.to(fmap.values.device))))
    found = match(features[0], features[1], most)
    first, second = pixels[0][found.first.cpu()], pixels[1][found.second.cpu()]
    error = (_where(pair, first) - second).norm(dim=1) / STRIDE
    right = error < threshold
    # in the order of the image, not of the weights, so that the shown ones are spread over it
    order = found.first.cpu().argsort()
    chosen = order[torch.linspace(0, max(len(order) - 1, 0), min(count, len(order))).round().long()]
    sizes = [first.new_tensor([depth.shape[1], depth.shape[0]]) for depth in pair.depths]
    recall = 100 * float(right.float().mean()) if len(right) else 0.0
    return ShownMatches(first[chosen] / sizes[0], second[chosen] / sizes[1], right[chosen], recall)


def _where(pair: PosedPair, pixels: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    """Where pixels of the first depth map are in the second."""
    depth = torch.from_numpy(np.array(pair.depths[0])).double()
    z = depth[pixels[:, 1].long(), pixels[:, 0].long()]
    first, second, pose = (torch.from_numpy(array).double() for array in (*pair.intrinsics, pair.relative_pose))
    homogeneous = torch.cat([pixels.double(), torch.ones(len(pixels), 1, dtype=torch.float64)], dim=1)
    local = homogeneous @ torch.linalg.inv(first).T * z[:, None]
    projected = (local @ pose[:3, :3].T + pose[:3, 3]) @ second.T
    return (projected[:, :2] / projected[:, 2:].clamp(min=1e-9)).to(pixels.dtype)


def lines_picture(
    images: tuple[UInt8[np.ndarray, "h0 w0 3"], UInt8[np.ndarray, "h1 w1 3"]],
    matches: ShownMatches,
    height: int = SHEET_HEIGHT,
) -> Float[Tensor, "_H _W 3"]:
    """Two images beside each other, a line from each point to its match: blue if right, orange if not.

    Args:
        images: RGB.
        matches: wrong ones are drawn first, so that no right one is hidden.
        height: of the picture, pixels.
    """
    scaled = []
    for image in images:
        width = max(round(image.shape[1] * height / image.shape[0]), 1)
        scaled.append(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    start = scaled[0].width + GAP
    canvas = Image.new("RGB", (start + scaled[1].width, height), (26, 26, 26))
    canvas.paste(scaled[0], (0, 0))
    canvas.paste(scaled[1], (start, 0))
    drawing = ImageDraw.Draw(canvas)
    for number in matches.right.long().argsort(stable=True).tolist():
        colour = RIGHT if bool(matches.right[number]) else WRONG
        (x0, y0), (x1, y1) = matches.first[number].tolist(), matches.second[number].tolist()
        ends = (x0 * scaled[0].width, y0 * height), (start + x1 * scaled[1].width, y1 * height)
        drawing.line(ends, fill=colour, width=1)
        for x, y in ends:
            drawing.ellipse((x - 2, y - 2, x + 2, y + 2), fill=colour)
    return as_picture(np.asarray(canvas))


def correspondence_sheet(
    pair: PosedPair, maps: Mapping[str, tuple[FeatureMap, FeatureMap]], count: int = 40, title: str = ""
) -> Float[Tensor, "_H _W 3"]:
    """A row of lines for each model (figure 5).

    Args:
        pair: two images with depth and poses.
        maps: features of both, by the model's label.
        count: lines in a row.
        title: above the sheet.

    Raises:
        InputError: a feature is not finite.
    """
    rows = {}
    for label, both in maps.items():
        found = pair_matches(both, pair, count)
        rows[f"{label}: {found.recall:.1f} % of the matches are right"] = lines_picture(pair.images, found)
    return sheet(rows, columns=1, title=title)


def recall_chart(
    recalls: Mapping[str, Sequence[Optional[float]]], bins: Sequence[str], title: str = ""
) -> Float[Tensor, "_H _W 3"]:
    """Recall by the angle between the cameras, a group of bars for each bin (figure 7).

    Args:
        recalls: percent in each bin, by the model's label; None where a bin has no pair.
        bins: what each is called.
        title: above the chart.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / max(len(recalls), 1)
    for number, (label, values) in enumerate(recalls.items()):
        places = np.arange(len(bins)) + (number + 0.5) * width - 0.4
        heights = [0.0 if value is None else value for value in values]
        colour = palette_colour(torch.tensor(number)).tolist()
        axes.bar(places, heights, width, label=label, color=colour)
    axes.set_xticks(range(len(bins)), bins)
    axes.set_xlabel("angle between the cameras, degrees")
    axes.set_ylabel("recall, %")
    axes.set_ylim(0, 100)
    axes.set_title(title)
    axes.legend()
    canvas.draw()
    return as_picture(np.asarray(canvas.buffer_rgba())[..., :3])
