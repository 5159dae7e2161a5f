"""Images as the probes see them: random changes in training; windows and mirror images in testing.

Training images come as uint8 and go as float in [0, 1], both [H, W, 3] in RGB. Everything random is drawn from a
numpy generator, so that a sample is a function of what that was seeded with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Optional

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor

from snd_nerfstudio.errors import InputError

BorderCrop = Literal["none", "nyu", "kitti"]
IMAGENET_MEAN = (123.675 / 255, 116.28 / 255, 103.53 / 255)
"""Colour that is 0 once it is normalised."""


@dataclass
class DepthAugmentation:
    """Changes to the depth probe's training images (released code, after AdaBins)."""

    crop: Optional[tuple[int, int]] = (416, 544)
    """Rows and columns of the random crop; 352 704 for KITTI. None: whole images."""
    border_crop: BorderCrop = "none"
    """What is cut off first: NYUv2's white border, or KITTI's sky and sides."""
    rotate_probability: float = 0.5
    """Of turning an image and its depth."""
    rotate_degrees: float = 2.5
    """Turn by at most this angle either way."""
    flip_probability: float = 0.5
    """Of mirroring left and right."""
    colour_probability: float = 0.5
    """Of changing colours."""
    gamma: tuple[float, float] = (0.9, 1.1)
    """Exponents of colours on the scale from 0 to 255, so that it acts as a gain above all."""
    brightness: tuple[float, float] = (0.75, 1.25)
    """Factors on all channels; 0.9 1.1 for KITTI."""
    colour: tuple[float, float] = (0.9, 1.1)
    """Factors on each channel."""


@dataclass
class NormalsAugmentation:
    """Changes to the normals probe's training images (Probe3D)."""

    colour_probability: float = 0.8
    """Of changing colours."""
    colour_strength: float = 0.2
    """Of brightness, contrast, saturation (factors from 1 - this to 1 + this) and hue (turns, either way)."""
    crop_probability: float = 0.5
    """Of enlarging a random square part to the size of the image; normals are not turned with it."""
    crop_area: tuple[float, float] = (0.5, 1.0)
    """Share of the image that the part covers."""


@dataclass
class SegmentationAugmentation:
    """Changes to the segmentation probe's training images (MMSegmentation)."""

    long_side: int = 2048
    """Pixels that the longer side may have at ratio 1."""
    short_side: int = 512
    """Pixels that the shorter side may have at ratio 1."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """Random factor on both."""
    crop: int = 512
    """Side of the random crop; smaller images are padded."""
    largest_class: float = 0.75
    """Crops in which one class covers this share of the labelled pixels are drawn again."""
    crop_tries: int = 10
    """How many crops are looked at."""
    flip_probability: float = 0.5
    """Of mirroring left and right."""
    ignore: int = 255
    """The label that has no class."""


def cut_border(array: Shaped[np.ndarray, "H W *c"], border_crop: BorderCrop) -> Shaped[np.ndarray, "H2 W2 *c"]:
    """Cut an image's or a map's border off.

    Args:
        array: rows and columns first.
        border_crop: ``nyu``: rows 45:472 and columns 43:608; ``kitti``: the lowest 352 rows and, of the columns, the
            middle 1216.

    Raises:
        InputError: the array is smaller than that.
    """
    if border_crop == "none":
        return array
    height, width = array.shape[:2]
    needed = (472, 608) if border_crop == "nyu" else (352, 1216)
    if height < needed[0] or width < needed[1]:
        raise InputError(
            f"An image of {height} x {width} is too small for the border crop '{border_crop}', which needs "
            f"{needed[0]} x {needed[1]}: use 'none'."
        )
    if border_crop == "nyu":
        return array[45:472, 43:608]
    left = (width - 1216) // 2
    return array[height - 352 :, left : left + 1216]


def augment_depth(
    image: UInt8[np.ndarray, "H W 3"],
    depth: Float[np.ndarray, "H2 W2"],
    generator: np.random.Generator,
    settings: DepthAugmentation,
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, "h w"]]:
    """Cut the border off, turn, mirror, crop and colour an image with its depth.

    Args:
        image: 0 to 255.
        depth: metres, 0 = not measured; where turning leaves a corner empty it is 0.
        generator: of all that is random.
        settings: what to do.

    Raises:
        InputError: image and depth map differ in size, or are smaller than a crop.
    """
    import cv2

    _check_sizes(image, depth, "depth")
    image, depth = cut_border(image, settings.border_crop), cut_border(depth, settings.border_crop)
    height, width = depth.shape
    if generator.random() < settings.rotate_probability:
        angle = generator.uniform(-settings.rotate_degrees, settings.rotate_degrees)
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        image = cv2.warpAffine(image, turn, (width, height), flags=cv2.INTER_LINEAR)
        depth = cv2.warpAffine(depth, turn, (width, height), flags=cv2.INTER_NEAREST)
    if generator.random() < settings.flip_probability:
        image, depth = image[:, ::-1], depth[:, ::-1]
    rows, columns = settings.crop or (height, width)
    if height < rows or width < columns:
        raise InputError(
            f"An image of {height} x {width} pixels is smaller than the training crop of {rows} x {columns}: use a "
            "smaller crop."
        )
    top, left = int(generator.integers(height - rows + 1)), int(generator.integers(width - columns + 1))
    image, depth = image[top : top + rows, left : left + columns], depth[top : top + rows, left : left + columns]
    colours = image.astype(np.float64)
    if generator.random() < settings.colour_probability:
        gains = generator.uniform(*settings.brightness) * generator.uniform(*settings.colour, size=3)
        colours = np.clip(colours ** generator.uniform(*settings.gamma) * gains, 0, 255)
    return (colours / 255).astype(np.float32), np.ascontiguousarray(depth)


def augment_normals(
    image: UInt8[np.ndarray, "H W 3"],
    normals: Float[np.ndarray, "H W 3"],
    depth: Float[np.ndarray, "H W"],
    generator: np.random.Generator,
    settings: NormalsAugmentation,
) -> tuple[Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W 3"], Float[np.ndarray, "H W"]]:
    """Colour an image, and enlarge a part of it with its normals and depth, all by nearest neighbours.

    Args:
        image: 0 to 255.
        normals: of length 1.
        depth: metres, 0 = not measured.
        generator: of all that is random.
        settings: what to do.
    """
    colours = image.astype(np.float32) / 255
    if generator.random() < settings.colour_probability:
        colours = jitter_colours(colours, generator, settings.colour_strength)
    if generator.random() < settings.crop_probability:
        size = (image.shape[0], image.shape[1])
        side = round(float(np.sqrt(generator.uniform(*settings.crop_area) * size[0] * size[1])))
        side = min(side, *size)  # of an image that is not square
        top, left = int(generator.integers(size[0] - side + 1)), int(generator.integers(size[1] - side + 1))
        part = (slice(top, top + side), slice(left, left + side))
        colours, normals, depth = (resize_nearest(array[part], size) for array in (colours, normals, depth))
    return colours, normals, depth


def augment_segmentation(
    image: UInt8[np.ndarray, "H W 3"],
    labels: Shaped[np.ndarray, "H2 W2"],
    generator: np.random.Generator,
    settings: SegmentationAugmentation,
) -> tuple[Float[np.ndarray, "h w 3"], Shaped[np.ndarray, "h w"]]:
    """Resize, crop, mirror, colour and pad an image with its labels.

    Args:
        image: 0 to 255.
        labels: classes, or the one to be ignored.
        generator: of all that is random.
        settings: what to do.

    Returns:
        An image and labels of the crop's size. Padding lies at the right and below, is ignored, and has the mean
        colour: 0 once it is normalised.

    Raises:
        InputError: image and labels differ in size.
    """
    import cv2

    _check_sizes(image, labels, "label")
    ratio = generator.uniform(*settings.ratio)
    size = rescaled_size(labels.shape, settings.long_side, settings.short_side, ratio)  # type: ignore
    image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)  # type: ignore
    labels = resize_nearest(labels, size)
    part = balanced_crop(labels, generator, settings)
    image, labels = image[part], labels[part]
    if generator.random() < settings.flip_probability:
        image, labels = image[:, ::-1], labels[:, ::-1]
    image = distort_photometrically(np.ascontiguousarray(image), generator)
    padded = np.empty((settings.crop, settings.crop, 3), dtype=np.float32)
    padded[:] = IMAGENET_MEAN
    padded[: image.shape[0], : image.shape[1]] = image.astype(np.float32) / 255
    classes = np.full((settings.crop, settings.crop), settings.ignore, dtype=labels.dtype)
    classes[: image.shape[0], : image.shape[1]] = labels
    return padded, classes


def _check_sizes(image: np.ndarray, values: np.ndarray, kind: str) -> None:
    if image.shape[:2] != values.shape:
        raise InputError(
            f"An image of {image.shape[0]} x {image.shape[1]} pixels has a {kind} map of {values.shape[0]} x "
            f"{values.shape[1]}: bring them to one size first."
        )


def rescaled_size(size: tuple[int, int], long_side: int, short_side: int, ratio: float = 1.0) -> tuple[int, int]:
    """Rows and columns of an image that keeps its shape and fits both bounds, as MMSegmentation rounds them.

    ``f = min(floor(ratio long_side) / longer side, floor(ratio short_side) / shorter side)``; each side becomes
    ``floor(side f + 1/2)``. Test images have ratio 1.
    """
    factor = min(int(long_side * ratio) / max(size), int(short_side * ratio) / min(size))
    return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)


def resize_nearest(array: Shaped[np.ndarray, "H W *c"], size: tuple[int, int]) -> Shaped[np.ndarray, "h w *c"]:
    """Resize without mixing values: row ``i`` of ``n`` is row ``floor(i H / n)``, as in OpenCV and PyTorch."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, array.shape[:2], strict=True))
    return array[rows[:, None], columns]


def balanced_crop(
    labels: Shaped[np.ndarray, "H W"], generator: np.random.Generator, settings: SegmentationAugmentation
) -> tuple[slice, slice]:
    """Rows and columns of a random crop that no class dominates, if one is found.

    A crop is good if it has two classes at least and none with ``largest_class`` of the labelled pixels or more.
    After ``crop_tries`` bad ones a further one is taken as it is.
    """
    rooms = [max(side - settings.crop, 0) + 1 for side in labels.shape]
    for attempt in range(settings.crop_tries + 1):
        top, left = int(generator.integers(rooms[0])), int(generator.integers(rooms[1]))
        part = (slice(top, top + settings.crop), slice(left, left + settings.crop))
        if attempt == settings.crop_tries or settings.largest_class >= 1:
            break
        classes, counts = np.unique(labels[part], return_counts=True)
        counts = counts[classes != settings.ignore]
        if len(counts) > 1 and counts.max() / counts.sum() < settings.largest_class:
            break
    return part


def distort_photometrically(
    image: UInt8[np.ndarray, "H W 3"], generator: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """Change brightness (+-32), contrast, saturation (0.5 to 1.5) and hue (+-18 of 180), each in half of the cases.

    Contrast comes before or after saturation and hue, as likely. Colours are rounded down to 8 bits after every
    change (MMSegmentation).
    """
    import cv2

    def change(array: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> np.ndarray:
        return np.clip(array.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    def maybe() -> bool:
        return bool(generator.integers(2))

    if maybe():
        image = change(image, offset=generator.uniform(-32, 32))
    contrast = generator.uniform(0.5, 1.5) if maybe() else 1.0
    contrast_first = maybe()
    if contrast_first:
        image = change(image, contrast)
    if maybe():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = change(hsv[..., 1], generator.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if maybe():
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int64) + generator.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else change(image, contrast)


def jitter_colours(
    image: Float[np.ndarray, "H W 3"], generator: np.random.Generator, strength: float
) -> Float[np.ndarray, "H W 3"]:
    """Change brightness, contrast, saturation and hue in a random order (torchvision's ``ColorJitter``)."""
    from torchvision.transforms import functional

    changes: tuple[Callable[[Any, float], Any], ...] = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    amounts = [*(1 + generator.uniform(-strength, strength, size=3)), generator.uniform(-strength, strength)]
    changed = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    for place in generator.permutation(4):
        changed = changes[place](changed, float(amounts[place]))
    return np.ascontiguousarray(changed.numpy().transpose(1, 2, 0))


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """First rows of windows that cover a length; the last is moved back so that it ends with it.

    Args:
        length: rows, or columns.
        window: rows of a window; one window covers all of a shorter length.
        stride: rows between windows.
    """
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(number * stride, length - window), 0) for number in range(count)]


def slide(
    images: Float[Tensor, "b 3 H W"],
    predict: Callable[[Tensor], Tensor],
    window: int = 512,
    stride: int = 341,
) -> Float[Tensor, "b k H W"]:
    """Predict in overlapping windows, and average where they overlap (MMSegmentation).

    Args:
        images: whatever ``predict`` takes.
        predict: [b, 3, h, w] to [b, k, h, w], of any size up to that of a window.
        window: side of a window, pixels; a shorter side of the image is taken whole.
        stride: pixels between windows.
    """
    height, width = images.shape[-2:]
    total: Optional[Tensor] = None
    count = images.new_zeros(height, width)
    for top in window_starts(height, window, stride):
        for left in window_starts(width, window, stride):
            part = (slice(top, top + window), slice(left, left + window))
            logits = predict(images[:, :, part[0], part[1]])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[:, :, part[0], part[1]] += logits
            count[part] += 1
    assert total is not None  # there is always a window
    return total / count


def flip_average(images: Float[Tensor, "b 3 H W"], predict: Callable[[Tensor], Tensor]) -> Float[Tensor, "b *k H W"]:
    """Mean of the predictions of images and of their mirror images, mirrored back.

    Args:
        images: whatever ``predict`` takes.
        predict: gives maps whose last axis are columns, of values that mirroring leaves alone, such as depth.
    """
    return (predict(images) + predict(images.flip(-1)).flip(-1)) / 2
