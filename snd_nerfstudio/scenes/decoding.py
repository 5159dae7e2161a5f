"""Files of images, masks and depth maps to arrays, and arrays to the size that is trained at."""

import io
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Integer, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from snd_nerfstudio.errors import BrokenFileError
from snd_nerfstudio.scenes.image_files import open_bytes
from snd_nerfstudio.scenes.saved_ids import read_saved_ids

UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError)
"""What Pillow and numpy raise on files that are not what they should be."""
SAVED_IDS = ".pth"
"""Ending of instance ids that ScanNet++'s toolkit saves with torch."""
SHAPE_TOLERANCE = 5e-3
"""How much the aspect ratios of a depth map and its image may differ: ScanNet's 640x480 and 1296x968 do by 0.4 %."""
MASK_MODES = ("L", "P", "I", "I;16", "I;16B", "1")
REDUCTIONS = (8, 4, 2)
"""By which JPEG's cosine transform can be decoded at a smaller size."""
DENSE_IDS = 1 << 20
"""Ids below this are renumbered with a table, which is much quicker than sorting them."""


class DecodedImage(NamedTuple):
    """An image, and how much smaller than its file it was decoded."""

    pixels: UInt8[np.ndarray, "h w 3"]
    stored_size: tuple[int, int]
    """Height and width in the file."""
    reduction: int
    """``stored_size`` divided by the size of ``pixels``: 1, 2, 4 or 8."""


def read_image(file: Path, at_least: tuple[int, int], contents: Optional[bytes] = None) -> DecodedImage:
    """Decode an image, a JPEG at the smallest of its sizes that is not below ``at_least``.

    A JPEG is stored as the cosine transforms of 8x8 blocks; leaving out high frequencies gives the image at a half, a
    quarter or an eighth of its size, antialiased, in a fraction of the time. Only sides that the reduction divides are
    reduced, so that pixels stay where they are.

    Args:
        file: in any format that Pillow reads.
        at_least: height and width that the image will be resized to.
        contents: of the file, where they have been read already.

    Raises:
        BrokenFileError: the file is missing or cannot be decoded.
    """
    try:
        with open_bytes(file) if contents is None else io.BytesIO(contents) as stream, Image.open(stream) as image:
            width, height = image.size
            reduction = _reduction((height, width), at_least) if image.format == "JPEG" else 1
            if reduction > 1:
                image.draft(None, (width // reduction, height // reduction))
            pixels = np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UNREADABLE as error:
        raise _unreadable("Image", file, error) from error
    return DecodedImage(pixels, (height, width), height // pixels.shape[0])


def read_bytes(file: Path) -> bytes:
    """The contents of an image's file.

    Raises:
        BrokenFileError: it is missing or cannot be read.
    """
    try:
        with open_bytes(file) as stream:
            return stream.read()
    except UNREADABLE as error:
        raise _unreadable("Image", file, error) from error


def _unreadable(kind: str, file: Path, error: Exception) -> BrokenFileError:
    """What is said of a file that cannot be read."""
    if isinstance(error, BrokenFileError):
        return error
    if isinstance(error, FileNotFoundError):
        return BrokenFileError(f"{kind} {file} does not exist.", file)
    # Pillow's text for what is no image at all has the address of an object in it
    reason = "it is no image" if isinstance(error, UnidentifiedImageError) else str(error)
    return BrokenFileError(f"{kind} {file} cannot be decoded ({reason}): restore it or remove the frame.", file)


def _array(file: Path) -> np.ndarray:
    """A ``.npy`` file's array.

    Raises:
        ValueError: it holds several arrays.
    """
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise ValueError("it holds several arrays")
    return array


def _reduction(stored: tuple[int, int], at_least: tuple[int, int]) -> int:
    for factor in REDUCTIONS:
        if all(side % factor == 0 and side // factor >= least for side, least in zip(stored, at_least, strict=True)):
            return factor
    return 1


def header_size(file: Path, kind: str) -> tuple[int, int]:
    """Height and width that an image file states.

    Args:
        file: an image or a ``.npy`` array.
        kind: what it is, for messages.

    Raises:
        BrokenFileError: it cannot be read.
    """
    try:
        if file.suffix == ".npy":
            height, width = np.lib.format.open_memmap(file, mode="r").shape[:2]
            return height, width
        with open_bytes(file) as stream, Image.open(stream) as image:
            return image.height, image.width
    except UNREADABLE as error:
        raise _unreadable(kind, file, error) from error


def read_mask(file: Path) -> Integer[np.ndarray, "h w"]:
    """Read instance ids from a single-channel 8-, 16- or 32-bit image, from a ``.npy`` file of whole numbers, or from
    what ScanNet++'s toolkit saves (``.pth``).

    Returns:
        Ids in the type they are stored in.

    Raises:
        BrokenFileError: the file is missing, corrupt or has colour channels.
    """
    if file.suffix == SAVED_IDS:
        return read_saved_ids(file)
    try:
        if file.suffix == ".npy":
            ids = _array(file)
            if ids.ndim != 2 or ids.dtype.kind not in "iub":
                raise BrokenFileError(
                    f"Instance mask {file} has shape {ids.shape} and type {ids.dtype}: it must have one channel of "
                    "integer ids.",
                    file,
                )
        else:
            with Image.open(file) as image:
                if image.mode not in MASK_MODES:
                    raise BrokenFileError(
                        f"Instance mask {file} has mode {image.mode}: it must have one channel of integer ids, not "
                        "colours.",
                        file,
                    )
                ids = np.asarray(image)
    except UNREADABLE as error:
        raise _unreadable("Instance mask", file, error) from error
    return ids.astype(np.uint8) if ids.dtype.kind == "b" else ids


def read_depth(file: Path, unit: float, image_size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Read a depth map at its own size.

    Args:
        file: a 16-bit image or a ``.npy`` array.
        unit: world units per stored value.
        image_size: height and width of the image it belongs to, whose shape it must have.

    Returns:
        World units, float32; 0 = no value, also where the file has NaN, infinity or negative values.

    Raises:
        BrokenFileError: the file is missing, corrupt or of another shape than its image; the message names it.
    """
    try:
        if file.suffix == ".npy":
            stored = _array(file)
        else:
            with Image.open(file) as image:
                stored = np.asarray(image)
        depth = stored.astype(np.float32) * unit
    except UNREADABLE as error:
        raise _unreadable("Depth map", file, error) from error
    if depth.ndim != 2:
        raise BrokenFileError(f"Depth map {file} has shape {depth.shape}: it must have one channel.", file)
    height, width = image_size
    difference = abs(depth.shape[0] * width - depth.shape[1] * height)
    if difference > max(height, width, SHAPE_TOLERANCE * depth.shape[0] * width):
        raise BrokenFileError(
            f"Depth map {file} has {depth.shape[1]}x{depth.shape[0]} pixels, another shape than its image "
            f"({width}x{height}): depth must be registered to the image.",
            file,
        )
    return np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)


def resized(image: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "3 H W"]:
    """Resize with a bicubic filter that does not alias: Pillow's result to within one step, several times as fast.

    Returns:
        The planes of red, green and blue, as networks want them.
    """
    planes = rearrange(torch.from_numpy(np.require(image, requirements=["C", "W"])), "h w c -> 1 c h w")
    if image.shape[:2] != size:
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True, align_corners=False)
    return planes[0].contiguous().numpy()


def nearest(values: Shaped[np.ndarray, "h w"], size: tuple[int, int]) -> Shaped[np.ndarray, "H W"]:
    """Nearest-neighbour resize at pixel centres."""
    if values.shape == size:
        return values
    rows = ((np.arange(size[0]) + 0.5) * values.shape[0] / size[0]).astype(np.int64)
    columns = ((np.arange(size[1]) + 0.5) * values.shape[1] / size[1]).astype(np.int64)
    return np.ascontiguousarray(values[rows[:, None], columns])


def compact(mask: Integer[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Renumber the ids of one image 1, 2, ... in order of size of id; 0 stays unlabelled. Returns int64."""
    if mask.min() < 0 or mask.max() >= DENSE_IDS:
        return compact_by_sorting(mask)
    present = np.bincount(mask.ravel().astype(np.int64)) > 0
    present[0] = False
    return np.where(present, np.cumsum(present), 0)[mask]


def compact_by_sorting(mask: Integer[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """`compact` for ids of any size."""
    ids, place = np.unique(mask, return_inverse=True)
    numbers = np.where(ids == 0, 0, np.cumsum(ids != 0))
    return numbers[place].reshape(mask.shape)
