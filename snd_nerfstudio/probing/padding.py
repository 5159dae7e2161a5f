"""Images whose sides are no multiple of the patch: padding them, and taking predictions back to the image.

The released evaluation pads with zeros and then squeezes the prediction of the padded image into the image, borders
included: what it says is displaced by as much as the padding is wide (``parity``). ``exact`` leaves the padding out.
"""

from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

PadCrop = Literal["parity", "exact"]
Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True)
class Padding:
    """Pixels added at the sides of an image."""

    left: int = 0
    """Columns before the first."""
    top: int = 0
    """Rows above the first."""
    right: int = 0
    """Columns after the last."""
    bottom: int = 0
    """Rows below the last."""

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image of ``size`` (rows, columns) once it is padded."""
        return size[0] + self.top + self.bottom, size[1] + self.left + self.right


def patch_padding(size: tuple[int, int], patch: int, extra_patch_quirk: bool = False) -> Padding:
    """Padding to the next multiple of the patch, half of it (rounded down) at the left and at the top.

    Args:
        size: rows and columns of the image.
        patch: side of a patch, pixels.
        extra_patch_quirk: what Probe3D does, and the released evaluation of normals and correspondence with it: if
            one side is a multiple of the patch and the other is not, the first gets a whole patch of padding.
    """
    short = [-side % patch for side in size]
    if extra_patch_quirk and any(short):
        short = [missing or patch for missing in short]
    top, left = short[0] // 2, short[1] // 2
    return Padding(left, top, short[1] - left, short[0] - top)


def pad_images(images: Float[Tensor, "b c H W"], padding: Padding) -> Float[Tensor, "b c H2 W2"]:
    """Add zeros at the sides of images that are normalised already, so that they are padded with the mean colour."""
    if padding == Padding():
        return images
    return F.pad(images, (padding.left, padding.right, padding.top, padding.bottom))


def to_image(
    maps: Float[Tensor, "b k h w"],
    size: tuple[int, int],
    padding: Padding,
    pad_crop: PadCrop,
    mode: Interpolation = "bilinear",
    align_corners: bool = False,
    out: Optional[tuple[int, int]] = None,
) -> Float[Tensor, "b k H W"]:
    """Resample maps of a padded image at the pixels of the image.

    ``exact``: the centre of row ``i`` of ``n`` lies at ``(i + 1/2) H / n + top`` in the padded image of ``H'`` rows,
    that is at ``((i + 1/2) H / n + top) h / H' - 1/2`` in a map of ``h``; likewise for columns. Beyond the outermost
    samples of a map its border goes on. ``parity``: the map is stretched over the image as it is.

    Args:
        maps: token maps, or finer ones, over the padded image.
        size: rows and columns of the image without padding.
        padding: what was added to it.
        pad_crop: see above.
        mode: how values between samples are found.
        align_corners: with ``parity`` only, as of ``F.interpolate``: the outermost samples lie on the outermost
            pixels.
        out: rows and columns wanted, if not those of the image.
    """
    out = size if out is None else out
    if pad_crop == "parity":
        return F.interpolate(maps, size=out, mode=mode, align_corners=align_corners)
    if out == size:  # the same as below; a cubic one takes a third of the time in training
        wide = F.interpolate(maps, size=padding.padded(size), mode=mode, align_corners=False)
        return wide[:, :, padding.top : padding.top + size[0], padding.left : padding.left + size[1]]
    return sample_exactly(maps, size, padding, out, mode)


def sample_exactly(
    maps: Float[Tensor, "b k h w"],
    size: tuple[int, int],
    padding: Padding,
    out: tuple[int, int],
    mode: Interpolation = "bilinear",
) -> Float[Tensor, "b k H W"]:
    """What `to_image` gives with ``exact``, for any ``out``."""
    full = padding.padded(size)
    axes = []
    for side, wanted, before, whole in zip(size, out, (padding.top, padding.left), full, strict=True):
        centres = (torch.arange(wanted, dtype=torch.float64) + 0.5) * (side / wanted) + before
        axes.append((2 * centres / whole - 1).to(maps.dtype).to(maps.device))
    grid = torch.stack(torch.meshgrid(axes[1], axes[0], indexing="xy"), dim=-1)
    grid = grid.expand(len(maps), -1, -1, -1)
    return F.grid_sample(maps, grid, mode=mode, padding_mode="border", align_corners=False)
