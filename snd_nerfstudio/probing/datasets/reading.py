"""Decoding of images, depth maps, labels and normals; whatever is not as it should be is refused."""

from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8
from PIL import Image, UnidentifiedImageError

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.samples import IGNORE

UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError)
"""What Pillow raises on files that are not what they should be."""
SIXTEEN_BIT = ("I", "I;16", "I;16B", "I;16L")
"""Modes in which Pillow opens images of more than eight bits."""
ONE_CHANNEL = ("L", "P", "1", *SIXTEEN_BIT)


def _opened(file: Path, kind: str) -> Image.Image:
    """A decoded image of any mode."""
    try:
        image = Image.open(file)
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"{kind} {file} is missing: restore it, or remove it from its list.") from error
    except UNREADABLE as error:
        raise InputError(f"{kind} {file} cannot be decoded ({error}): download it again.") from error
    return image


def read_image(file: Path) -> UInt8[np.ndarray, "H W 3"]:
    """An image as RGB; grey and palette images are given three channels, an alpha channel is dropped.

    A rotation in the EXIF header is not applied: labels are drawn on the pixels as stored.

    Raises:
        InputError: the file is missing, cannot be decoded, or has more than eight bits per channel.
    """
    image = _opened(file, "Image")
    if image.mode in (*SIXTEEN_BIT, "F"):
        raise InputError(f"Image {file} has more than 8 bits per channel: is it a depth map? Give 8-bit images.")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB")).copy()


def read_depth(file: Path, unit: float) -> Float32[np.ndarray, "H W"]:
    """A depth map from a 16-bit PNG.

    Args:
        file: holds integers, 0 = none.
        unit: metres of one stored step: 1/1000, or 1/256 for KITTI.

    Returns:
        Metres, 0 = none.

    Raises:
        InputError: the file is missing, cannot be decoded, or is not of one 16-bit channel.
    """
    image = _opened(file, "Depth map")
    if image.mode not in SIXTEEN_BIT:
        raise InputError(f"Depth map {file} is no 16-bit PNG of one channel (mode {image.mode}): export it as one.")
    stored = np.asarray(image)
    if stored.min() < 0:
        raise InputError(f"Depth map {file} has negative values: export it as unsigned 16-bit PNG.")
    return (stored.astype(np.float64) * unit).astype(np.float32)


def read_ids(file: Path, kind: str = "Label map") -> Int64[np.ndarray, "H W"]:
    """What is stored in a one-channel PNG of integers, palette indices included.

    Raises:
        InputError: the file is missing, cannot be decoded, or has colours instead of numbers.
    """
    image = _opened(file, kind)
    if image.mode not in ONE_CHANNEL:
        raise InputError(f"{kind} {file} has colours (mode {image.mode}): it must hold numbers in one channel.")
    return np.asarray(image).astype(np.int64)


def to_classes(
    ids: Int64[np.ndarray, "H W"], classes: int, zero_is_none: bool, file: Path, hint: str = ""
) -> UInt8[np.ndarray, "H W"]:
    """Class indices from stored ids: v -> v - 1 and 0 -> `IGNORE` where 0 means none, else unchanged; 255 = none.

    Ids are compared before they become bytes: cast first, as the released code does, 256 would turn into 0.

    Args:
        ids: as stored.
        classes: how many there are.
        zero_is_none: whether class 0 is stored as 1.
        file: for the message.
        hint: what to do about ids that are too large.

    Raises:
        InputError: an id is none of the classes.
    """
    first = 1 if zero_is_none else 0
    known = (ids >= first) & (ids < first + classes)
    wrong = ids[~known & (ids != IGNORE) & ~(zero_is_none & (ids == 0))]
    if len(wrong):
        raise InputError(
            f"Label map {file} holds the id {int(wrong[0])}, but its classes are {first} to {first + classes - 1}: "
            f"{hint or 'give the labels of this dataset'}."
        )
    return np.where(known, ids - first, IGNORE).astype(np.uint8)


def unit_normals(vectors: Shaped[np.ndarray, "H W 3"]) -> Float32[np.ndarray, "H W 3"]:
    """Vectors brought to unit length; zeros where they are shorter than 1/2, as "none" is in files."""
    vectors = vectors.astype(np.float32)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0.5, vectors / np.maximum(length, 0.5), 0).astype(np.float32)


def read_normals(file: Path) -> Float32[np.ndarray, "H W 3"]:
    """Normals from an 8-bit RGB image that stores 255 (n/2 + 1/2); black and grey = none.

    Raises:
        InputError: the file is missing, cannot be decoded, or is no RGB image.
    """
    image = _opened(file, "Normal map")
    if image.mode != "RGB":
        raise InputError(f"Normal map {file} is no 8-bit RGB image (mode {image.mode}): export it as one.")
    stored = np.asarray(image)
    decoded = stored.astype(np.float32) * (2 / 255) - 1
    return unit_normals(np.where((stored > 0).any(axis=-1, keepdims=True), decoded, 0))


def check_size(file: Path, array: np.ndarray, image_file: Path, image: np.ndarray) -> None:
    """Raises `InputError` if a map is not of its image's size."""
    if array.shape[:2] != image.shape[:2]:
        raise InputError(
            f"{file} has {array.shape[1]}x{array.shape[0]} pixels but its image {image_file.name} has "
            f"{image.shape[1]}x{image.shape[0]}: both must have one size."
        )


def resized_image(image: UInt8[np.ndarray, "a b 3"], height: int, width: int) -> UInt8[np.ndarray, "c d 3"]:
    """An image averaged over areas."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)).copy()
