"""Pictures made of pictures: enlarged tokens, coloured regions, contact sheets, marked points.

Every picture is a float tensor ``[H, W, 3]`` with colours in [0, 1].
"""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.viewer.clusters import palette_colour

BACKGROUND, INK = 0.1, 0.9
"""Grey of a sheet, and of the text on it."""
GAP = 4
"""Pixels between the pictures of a sheet."""
TEXT_SIZE = 14
"""Pixels, of a caption."""
NARROWEST = 96
"""Pixels: a column of a sheet is at least as wide, so that captions have room."""
MOST_LINES = 3
"""A caption that needs more of them is shortened."""
ELLIPSIS = "…"


def enlarge(colours: Float[Tensor, "h w c"], size: tuple[int, int]) -> Float[Tensor, "H W c"]:
    """Colours of tokens as flat squares.

    Args:
        colours: one for each token.
        size: height and width of the picture; each of its pixels gets the colour of the token that it lies in.
    """
    grown = F.interpolate(rearrange(colours, "h w c -> 1 c h w"), size=size, mode="nearest-exact")
    return rearrange(grown, "1 c h w -> h w c")


def overlay_masks(
    picture: Float[Tensor, "H W 3"], mask: Int[Tensor, "H W"], opacity: float = 0.5
) -> Float[Tensor, "H W 3"]:
    """Instance regions in a fixed colour per id, with borders one pixel wide that are drawn darker.

    Args:
        picture: what lies below.
        mask: instance ids; what is 0 or less is unlabelled and stays as it is.
        opacity: 0 shows the picture and the borders, 1 the colours alone.
    """
    labelled = mask > 0
    mixed = torch.lerp(picture, palette_colour((mask.long() - 1).clamp(min=0)).to(picture), opacity)
    border = torch.zeros_like(labelled)
    for axis in (0, 1):
        size = mask.shape[axis] - 1
        before, after = mask.narrow(axis, 0, size), mask.narrow(axis, 1, size)
        border.narrow(axis, 0, size).logical_or_(before != after)
        # beside what is unlabelled the border lies on the other side of the edge, for the unlabelled is not drawn on
        border.narrow(axis, 1, size).logical_or_((before != after) & (before <= 0))
    mixed = torch.where(border[..., None], 0.4 * mixed, mixed)
    return torch.where(labelled[..., None], mixed, picture)


def heat(values: Float[Tensor, "h w"], low: float, high: float) -> Float[Tensor, "h w 3"]:
    """Values in matplotlib's viridis, which is perceptually uniform.

    Args:
        values: what is NaN becomes grey.
        low: becomes the darkest colour, like everything below.
        high: becomes the brightest, like everything above.
    """
    from matplotlib import colormaps

    colours = torch.from_numpy(colormaps["viridis"](range(256))[:, :3]).to(values)
    share = ((values - low) / max(high - low, 1e-12)).clamp(0, 1)
    missing = torch.isnan(share)
    shown = colours[(share.masked_fill(missing, 0.0) * 255).round().long()]
    return torch.where(missing[..., None], 0.5, shown)


def sheet(
    pictures: Mapping[str, Float[Tensor, "_H _W 3"]],
    columns: int | None = None,
    height: int | None = None,
    title: str = "",
) -> Float[Tensor, "_H _W 3"]:
    """Pictures side by side on a dark ground, each below its caption.

    Text that is too long is wrapped, and ends in an ellipsis where three lines are not enough.

    Args:
        pictures: by caption, row by row; an empty caption leaves its strip empty.
        columns: pictures in a row. None: all of them.
        height: to which all are scaled, their shape kept. None: that of the highest picture.
        title: stands above everything.

    Raises:
        ValueError: there is no picture, or no column or pixel to put it in.
    """
    columns = len(pictures) if columns is None else min(columns, len(pictures))
    height = max((picture.shape[0] for picture in pictures.values()), default=0) if height is None else height
    if columns < 1 or height < 1:
        raise ValueError(f"{len(pictures)} pictures in {columns} columns, {height} pixels high: there must be some")
    scaled = [_scale(picture, height) for picture in pictures.values()]
    widths = [max([NARROWEST, *(p.shape[1] for p in scaled[column::columns])]) for column in range(columns)]
    lefts = [GAP + sum(widths[:column]) + column * GAP for column in range(columns)]
    total = lefts[-1] + widths[-1] + GAP
    strips = []  # each as wide as the sheet
    if title:
        strips += [_strip(GAP, total), _written(total, [(GAP, total - 2 * GAP, title)], TEXT_SIZE + 3)]
    captioned = list(zip(pictures, scaled, strict=True))
    for first in range(0, len(captioned), columns):
        cells = list(zip(lefts, widths, captioned[first : first + columns]))
        captions = _written(total, [(left, width, caption) for left, width, (caption, _) in cells], TEXT_SIZE)
        row = _strip(height, total)
        for left, _, (_, picture) in cells:
            row[:, left : left + picture.shape[1]] = picture
        strips += [_strip(GAP, total), captions, row]
    return torch.cat([*strips, _strip(GAP, total)])


def _strip(height: int, width: int) -> Float[Tensor, "_H _W 3"]:
    return torch.full((height, width, 3), BACKGROUND)


def _scale(picture: Float[Tensor, "_H _W 3"], height: int) -> Float[Tensor, "_H _W 3"]:
    """To a height, on the CPU: nearest neighbour upwards, averaging downwards."""
    picture = picture.detach().cpu().float()
    width = max(round(picture.shape[1] * height / picture.shape[0]), 1)
    if height >= picture.shape[0]:
        return enlarge(picture, (height, width))
    image = rearrange(picture, "h w c -> 1 c h w")
    smaller = F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)
    return rearrange(smaller, "1 c h w -> h w c")


# ---------------------------------------------------------------------- text


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # with a size it is Pillow's own scalable font
    return font


def _written(width: int, texts: Sequence[tuple[int, int, str]], size: int) -> Float[Tensor, "_H _W 3"]:
    """A strip of some width, as high as the texts on it need.

    Args:
        width: of the strip.
        texts: left end, room and words of each.
        size: of the letters.
    """
    font = _font(size)
    line_height = sum(font.getmetrics())
    wrapped = [wrap(text, room, font) for _, room, text in texts]
    ink = Image.new("L", (width, line_height * max(len(lines) for lines in wrapped) + GAP))
    drawing = ImageDraw.Draw(ink)
    for (left, _, _), lines in zip(texts, wrapped, strict=True):
        for number, line in enumerate(lines):
            drawing.text((left, number * line_height), line, fill=255, font=font)
    return torch.lerp(_strip(ink.height, width), torch.tensor(INK), _share(ink))


def _share(drawn: Image.Image) -> Float[Tensor, "h w 1"]:
    """How much of each pixel was drawn on."""
    values = torch.frombuffer(bytearray(drawn.tobytes()), dtype=torch.uint8).float() / 255
    return values.view(drawn.height, drawn.width, 1)


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont, most_lines: int = MOST_LINES) -> list[str]:
    """Lines that are no wider than a number of pixels; words that are wider alone are broken.

    Args:
        text: any white space in it is a place to break.
        width: in pixels.
        font: measures it.
        most_lines: the last of them ends in an ellipsis if that is not enough.

    Returns:
        At least one line, perhaps an empty one.
    """

    def fits(line: str) -> bool:
        return font.getlength(line) <= width

    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if fits(longer):
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and not fits(lines[-1] + letter):
                lines.append("")
            lines[-1] += letter
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and not fits(last + ELLIPSIS):
            last = last[:-1]
        lines = [*lines[: most_lines - 1], last.rstrip() + ELLIPSIS]
    return lines


def mark(
    picture: Float[Tensor, "H W 3"], points: Sequence[tuple[float, float]], labels: Sequence[str]
) -> Float[Tensor, "H W 3"]:
    """Crosses with a text beside each: white with a black rim, to be seen on any ground.

    Args:
        picture: is left as it is.
        points: pixel positions (x, y); (0.5, 0.5) is the centre of the upper left pixel. Points outside the picture,
            or not finite, are left out.
        labels: of each point, one line; shortened with an ellipsis where the picture is too narrow.

    Raises:
        ValueError: points and labels differ in number.
    """
    height, width = picture.shape[:2]
    rim, ink = Image.new("L", (width, height)), Image.new("L", (width, height))
    on_rim, on_ink = ImageDraw.Draw(rim), ImageDraw.Draw(ink)
    font = _font(min(max(height // 24, 10), 32))
    arm = max(min(height, width) // 50, 3)
    for (x, y), label in zip(points, labels, strict=True):
        if not (0 <= x < width and 0 <= y < height):  # not true for NaN either
            continue
        column, row = int(x), int(y)
        on_rim.rectangle((column - arm - 1, row - 1, column + arm + 1, row + 1), fill=255)
        on_rim.rectangle((column - 1, row - arm - 1, column + 1, row + arm + 1), fill=255)
        on_ink.line((column - arm, row, column + arm, row), fill=255)
        on_ink.line((column, row - arm, column, row + arm), fill=255)
        (text,) = wrap(label, width - 4, font, most_lines=1)
        if not text:
            continue
        left, upper, right, lower = font.getbbox(text)
        box = (math.floor(left), math.floor(upper), math.ceil(right), math.ceil(lower))
        place = _beside((column, row), arm + 3, box, (width, height))
        on_rim.text(place, text, fill=255, font=font, stroke_width=1)
        on_ink.text(place, text, fill=255, font=font)
    marked = picture * (1 - _share(rim).to(picture))
    return torch.lerp(marked, torch.ones_like(marked), _share(ink).to(picture))


def _beside(
    point: tuple[int, int], distance: int, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[int, int]:
    """Where to draw a text: to the lower right of a point, or to the other side where that would leave the picture.

    Args:
        point: column and row.
        distance: of the text's box from the point, along both axes.
        box: left, upper, right and lower end of what the text covers when it is drawn at (0, 0).
        size: width and height of the picture.
    """
    place = []
    for at, low, high, end in zip(point, box[:2], box[2:], size, strict=True):
        start = at + distance
        if start + high - low > end - 1:
            start = at - distance - (high - low)
        place.append(max(min(start, end - 1 - (high - low)), 1) - low)  # the rim is one pixel wide
    return place[0], place[1]


# ---------------------------------------------------------------------- files


def save_png(picture: Float[Tensor, "H W 3"], path: Path) -> None:
    """Write a picture, whole or not at all; the folder is made if it is not there.

    Args:
        picture: colours outside [0, 1] are cut off, what is not finite becomes black.
        path: of the PNG file; one that is there is replaced.

    Raises:
        InputError: the file cannot be written.
    """
    finite = torch.nan_to_num(picture.detach().cpu().float(), nan=0.0, posinf=0.0, neginf=0.0)
    pixels = (finite.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path} cannot be written ({error.strerror or error}): choose another folder.") from error
