"""All frames of a dataset as arrays, and reading some of them as `Views`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, UnidentifiedImageError

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.file_list import FileList
from snd_nerfstudio.scenes.masks.maker import FramePixels, MaskMaker, MaskOrigin
from snd_nerfstudio.scenes.saved_ids import read_saved_ids
from snd_nerfstudio.scenes.views import Views

UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError)
"""What Pillow and numpy raise on files that are not what they should be."""
HEADERS_CHECKED = 10_000
"""Of larger datasets this many headers, evenly spread, are read before training."""
SAVED_IDS = ".pth"
"""Ending of instance ids that ScanNet++'s toolkit saves with torch."""
SHAPE_TOLERANCE = 5e-3
"""How much the aspect ratios of a depth map and its image may differ: ScanNet's 640x480 and 1296x968 do by 0.4 %."""
MASK_MODES = ("L", "P", "I", "I;16", "I;16B", "1")


@dataclass(frozen=True)
class Frames:
    """Every frame of every scene; arrays rather than objects, so that 100,000 frames stay small."""

    image_files: Sequence[Path]
    """RGB image of each frame."""
    camera_to_worlds: Float[np.ndarray, "frames 4 4"]
    """OpenCV camera-to-world."""
    intrinsics: Float[np.ndarray, "frames 3 3"]
    """In pixels of the image file; pixel centres at +0.5."""
    sizes: Int[np.ndarray, "frames 2"]
    """Height and width of the image file."""
    scene_index: Int[np.ndarray, "frames"]
    """Which scene a frame belongs to."""
    frame_order: Int[np.ndarray, "frames"]
    """Position of a frame in its scene's capture."""
    scene_names: tuple[str, ...]
    """Name of each scene."""
    distortion: Optional[Float[np.ndarray, "frames 6"]] = None
    """nerfstudio's k1 k2 k3 k4 p1 p2, or None for ideal pinholes."""
    mask_files: Optional[Sequence[Optional[Path]]] = None
    """Instance mask of each frame."""
    depth_files: Optional[Sequence[Optional[Path]]] = None
    """Depth map of each frame: 16-bit PNG or ``.npy``."""
    depth_scale: Optional[Float[np.ndarray, "frames"]] = None
    """World units per unit stored in a frame's depth file; None = millimetres."""

    def __len__(self) -> int:
        return len(self.image_files)

    def depth_unit(self, index: int) -> float:
        """Metres (world units) per stored depth value of a frame."""
        return 1e-3 if self.depth_scale is None else float(self.depth_scale[index])

    @cached_property
    def has_depth(self) -> bool:
        """Whether every frame has a depth map on disk; some alone count as none."""
        return self.depth_files is not None and bool(_on_disk(self.depth_files).all())


def depth_bounds(frames: Frames, looked_at: int = 48) -> tuple[float, float]:
    """A range of depths that holds nearly all of a dataset: its 0.5 % and 99.5 % quantiles, a tenth wider each.

    Args:
        frames: with depth maps.
        looked_at: how many of them, spread evenly.

    Returns:
        Near and far in world units.

    Raises:
        InputError: there are no depth maps, or nothing is measured in them.
    """
    if not frames.has_depth:
        raise InputError(
            "--pipeline.datamanager.bounds scene takes near and far from depth maps, and in this dataset not "
            "every frame has one: give --pipeline.datamanager.near and --pipeline.datamanager.far."
        )
    measured = []
    for index in np.unique(np.linspace(0, len(frames) - 1, looked_at).round().astype(int)).tolist():
        depth = _read_depth(frames.depth_files[index], frames.depth_unit(index), _stored_size(frames, index))  # type: ignore
        measured.append(depth[depth > 0][::7])
    values = np.concatenate(measured)
    if len(values) == 0:
        raise InputError("The depth maps have no valid pixel: give --pipeline.datamanager.near and ...far.")
    near, far = np.quantile(values, [0.005, 0.995])
    return float(near / 1.1), float(far * 1.1)


def check_frames(frames: Frames, needs_masks: bool, needs_depth: bool) -> None:
    """Find what is wrong with a dataset before training starts, as far as that can be known without decoding it all.

    Args:
        frames: the dataset.
        needs_masks: whether every frame must have an instance mask.
        needs_depth: whether every frame must have a depth map.

    Raises:
        InputError: a pose is not finite or not invertible, intrinsics are unusable, a file is missing or by its header
            of another size than it should be, or the first frame of a scene cannot be read. The message names the file.
    """
    finite = np.isfinite(frames.camera_to_worlds).all(axis=(1, 2))
    if not finite.all():
        bad = int(np.flatnonzero(~finite)[0])
        raise InputError(
            f"{(~finite).sum()} camera poses are not finite, the first one of {frames.image_files[bad]}: mend or "
            "remove the frame in the scene's transforms file."
        )
    rotation = frames.camera_to_worlds[:, :3, :3]
    orthonormal = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2)) < 1e-2
    proper = orthonormal & (np.linalg.det(rotation) > 0)
    if not proper.all():
        bad = int(np.flatnonzero(~proper)[0])
        raise InputError(
            f"{(~proper).sum()} camera poses are not rigid (a right-handed rotation and a translation), the first one "
            f"of {frames.image_files[bad]}: the transform matrix must be an invertible camera-to-world without scale."
        )
    focal = frames.intrinsics[:, [0, 1], [0, 1]]
    if not (np.isfinite(frames.intrinsics).all() and (focal > 0).all()):
        bad = int(np.flatnonzero(~(np.isfinite(frames.intrinsics).all(axis=(1, 2)) & (focal > 0).all(axis=1)))[0])
        raise InputError(f"Camera intrinsics of {frames.image_files[bad]} are not positive finite numbers.")
    _check_files_exist(frames, needs_masks, needs_depth)
    _check_headers(frames, needs_masks)
    size = (int(frames.sizes[0, 0]), int(frames.sizes[0, 1]))
    for scene in np.unique(frames.scene_index):
        first = int(np.flatnonzero(frames.scene_index == scene)[0])
        load_views(frames, [first], size, with_masks=needs_masks, with_depth=needs_depth)


def _check_files_exist(frames: Frames, needs_masks: bool, needs_depth: bool) -> None:
    wanted: list[tuple[str, Optional[Sequence[Optional[Path]]], str]] = [
        ("image", frames.image_files, "restore it, or remove the frame from the scene's transforms file")
    ]
    if needs_masks:
        remedy = (
            "instance masks are needed; without them use --pipeline.datamanager.masks superpixel, which makes some, "
            "or --pipeline.datamanager.masks none"
        )
        wanted.append(("instance mask", frames.mask_files, remedy))
    if needs_depth:
        wanted.append(("depth map", frames.depth_files, "the `depth` reconstructor needs one for every frame"))
    for kind, files, remedy in wanted:
        if files is None:
            raise InputError(f"No {kind} is known for any frame, e.g. {frames.image_files[0]}: {remedy}.")
        present = _on_disk(files)
        if not present.all():
            bad = int(np.argmin(present))
            name = files[bad] if files[bad] is not None else f"for {frames.image_files[bad]}"
            count = int((~present).sum())
            raise InputError(f"Missing {kind} {name} ({count} of {len(present)} are missing): {remedy}.")


def _on_disk(files: Sequence[Optional[Path]]) -> Bool[np.ndarray, "n"]:
    """Whether each file exists."""
    return (files if isinstance(files, FileList) else FileList.of(files)).exist()


def _check_headers(frames: Frames, needs_masks: bool) -> None:
    """Compare the sizes that the headers of images and masks state, without decoding them."""

    def check(index: int) -> None:
        file = frames.image_files[index]
        _check_image_size(frames, index, _header_size(file, "Image"))
        mask_file = _file_of(frames.mask_files, index, file, "mask") if needs_masks else None
        if mask_file is not None and mask_file.suffix != SAVED_IDS:  # these have no header
            _check_mask_size(mask_file, _header_size(mask_file, "Instance mask"), _stored_size(frames, index))

    count = min(len(frames), HEADERS_CHECKED)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, np.linspace(0, len(frames) - 1, count).astype(int).tolist()))


def _header_size(file: Path, kind: str) -> tuple[int, int]:
    """Height and width that an image file states."""
    try:
        if file.suffix == ".npy":
            height, width = np.load(file, mmap_mode="r", allow_pickle=False).shape[:2]
            return height, width
        with Image.open(file) as image:
            return image.height, image.width
    except UNREADABLE as error:
        raise InputError(f"{kind} {file} cannot be decoded ({error}): restore it or remove the frame.") from error


def _stored_size(frames: Frames, index: int) -> tuple[int, int]:
    return int(frames.sizes[index, 0]), int(frames.sizes[index, 1])


def _check_image_size(frames: Frames, index: int, size: tuple[int, ...]) -> None:
    height, width = _stored_size(frames, index)
    if size != (height, width):
        raise InputError(
            f"{frames.image_files[index]} has {size[1]}x{size[0]} pixels but its camera was calibrated for "
            f"{width}x{height}: correct `w` and `h` in the transforms file or restore the image."
        )


def _check_mask_size(file: Path, size: tuple[int, ...], image_size: tuple[int, ...]) -> None:
    if size != image_size:
        raise InputError(
            f"{file} has {size[1]}x{size[0]} pixels but its image has {image_size[1]}x{image_size[0]}: a mask must "
            "have its image's size."
        )


def load_views(
    frames: Frames,
    indices: Sequence[int],
    size: tuple[int, int],
    with_masks: bool,
    with_depth: bool,
    mask_maker: Optional[MaskMaker] = None,
) -> Views:
    """Decode and resize some frames.

    Images are resized with a bicubic antialiasing filter, masks and depth maps by nearest neighbour; the intrinsics
    follow. Lens distortion is removed first. The aspect ratio may change: the two focal lengths then differ.

    Args:
        frames: the dataset.
        indices: which frames.
        size: height and width to resize to.
        with_masks: read the dataset's instance masks.
        with_depth: read depth maps.
        mask_maker: makes instance masks instead, at the size that is resized to.

    Returns:
        Views on the CPU, float32.

    Raises:
        InputError: a file is missing, corrupt, of another kind or size than it should be; the message names it.
    """
    height, width = size
    images, intrinsics, masks, depths = [], [], [], []
    for index in indices:
        image_file = frames.image_files[index]
        image = _read_image(image_file)
        _check_image_size(frames, index, image.shape[:2])
        mask = None
        if with_masks:
            mask_file = _file_of(frames.mask_files, index, image_file, "mask")
            mask = read_mask(mask_file)
            _check_mask_size(mask_file, mask.shape, image.shape[:2])
        depth = None
        if with_depth:
            depth_file = _file_of(frames.depth_files, index, image_file, "depth")
            depth = _read_depth(depth_file, frames.depth_unit(index), image.shape)
        matrix = frames.intrinsics[index].astype(np.float64)
        if _is_distorted(frames, index):
            image, mask, depth, matrix = _undistort(image, mask, depth, matrix, frames.distortion[index])  # type: ignore
        resizing = np.array([width / image.shape[1], height / image.shape[0], 1.0])
        intrinsics.append(torch.from_numpy((resizing[:, None] * matrix).astype(np.float32)))
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
        images.append(torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1).float() / 255)
        if mask_maker is not None:
            mask = _made_mask(frames, index, size, mask_maker, np.asarray(resized))
        if mask is not None:
            masks.append(torch.from_numpy(_compact(_nearest(mask, height, width))))
        if depth is not None:
            depths.append(torch.from_numpy(_nearest(depth, height, width)))
    poses = frames.camera_to_worlds[np.asarray(indices)]
    return Views(
        images=torch.stack(images),
        camera_to_worlds=torch.from_numpy(np.ascontiguousarray(poses)).float(),
        intrinsics=torch.stack(intrinsics),
        masks=torch.stack(masks) if masks else None,
        depths=torch.stack(depths) if depths else None,
        names=tuple(frames.image_files[index].name for index in indices),
    )


def mask_origin(frames: Frames, index: int, size: tuple[int, int], uses_depth: bool) -> MaskOrigin:
    """What the mask of a frame is made of, where masks are not stored.

    Args:
        frames: the dataset.
        index: which frame.
        size: height and width at which it is trained.
        uses_depth: whether masks follow depth maps; a frame without one does without.
    """
    depth_file = frames.depth_files[index] if uses_depth and frames.depth_files is not None else None
    if depth_file is not None and not depth_file.is_file():
        depth_file = None
    camera: list[float] = []
    distorted = _is_distorted(frames, index)
    if distorted or depth_file is not None:
        camera += frames.intrinsics[index].flatten().tolist()
    if distorted:
        camera += frames.distortion[index].tolist()  # type: ignore
    if depth_file is not None:
        camera.append(frames.depth_unit(index))
    return MaskOrigin(frames.image_files[index], size, depth_file, tuple(float(value) for value in camera))


def _made_mask(
    frames: Frames, index: int, size: tuple[int, int], maker: MaskMaker, image: UInt8[np.ndarray, "h w 3"]
) -> Int[np.ndarray, "h w"]:
    """A frame's mask from the maker's cache, or of its image as it is trained and, where there is one, its depth."""
    origin = mask_origin(frames, index, size, maker.uses_depth)

    def pixels() -> FramePixels:
        height, width = _stored_size(frames, index)
        matrix, depth = frames.intrinsics[index].astype(np.float64), None
        if origin.depth_file is not None:
            depth = _read_depth(origin.depth_file, frames.depth_unit(index), (height, width))
        if _is_distorted(frames, index):
            blank = np.zeros((height, width, 3), np.uint8)  # the image is undistorted already
            _, _, depth, matrix = _undistort(blank, None, depth, matrix, frames.distortion[index])  # type: ignore
        scaled = np.array([size[1] / width, size[0] / height, 1.0])[:, None] * matrix
        return FramePixels(image, scaled, None if depth is None else _nearest(depth, *size))

    return maker.mask(origin, pixels)


def _is_distorted(frames: Frames, index: int) -> bool:
    return frames.distortion is not None and bool(np.abs(frames.distortion[index]).max() > 0)


def _file_of(files: Optional[Sequence[Optional[Path]]], index: int, image_file: Path, kind: str) -> Path:
    file = None if files is None else files[index]
    if file is None:
        raise InputError(f"{image_file} has no {kind} file.")
    return file


def _read_image(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"Image {file} does not exist.") from error
    except UNREADABLE as error:
        raise InputError(f"Image {file} cannot be decoded ({error}): restore it or remove the frame.") from error


def read_mask(file: Path) -> Int[np.ndarray, "h w"]:
    """Read instance ids from a single-channel 8-, 16- or 32-bit image, from a ``.npy`` file of whole numbers, or from
    what ScanNet++'s toolkit saves (``.pth``).

    Raises:
        InputError: the file is missing, corrupt or has colour channels.
    """
    if file.suffix == SAVED_IDS:
        return read_saved_ids(file)
    try:
        if file.suffix == ".npy":
            ids = np.load(file, allow_pickle=False)
            if ids.ndim != 2 or ids.dtype.kind not in "iub":
                raise InputError(
                    f"Instance mask {file} has shape {ids.shape} and type {ids.dtype}: it must have one channel of "
                    "integer ids."
                )
            return ids.astype(np.int64)
        with Image.open(file) as image:
            if image.mode not in MASK_MODES:
                raise InputError(
                    f"Instance mask {file} has mode {image.mode}: it must have one channel of integer ids, not colours."
                )
            return np.asarray(image).astype(np.int64)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"Instance mask {file} does not exist.") from error
    except UNREADABLE as error:
        raise InputError(f"Instance mask {file} cannot be decoded ({error}).") from error


def _read_depth(file: Path, scale: float, image_shape: tuple[int, ...]) -> Float[np.ndarray, "h w"]:
    try:
        if file.suffix == ".npy":
            depth = np.load(file, allow_pickle=False).astype(np.float32) * scale
        else:
            with Image.open(file) as image:
                depth = np.asarray(image).astype(np.float32) * scale
    except FileNotFoundError as error:
        raise InputError(f"Depth map {file} does not exist.") from error
    except UNREADABLE as error:
        raise InputError(f"Depth map {file} cannot be decoded ({error}).") from error
    if depth.ndim != 2:
        raise InputError(f"Depth map {file} has shape {depth.shape}: it must have one channel.")
    height, width = image_shape[:2]
    difference = abs(depth.shape[0] * width - depth.shape[1] * height)
    if difference > max(height, width, SHAPE_TOLERANCE * depth.shape[0] * width):
        raise InputError(
            f"Depth map {file} has {depth.shape[1]}x{depth.shape[0]} pixels, another shape than its image "
            f"({width}x{height}): depth must be registered to the image."
        )
    depth = np.where(np.isfinite(depth) & (depth > 0), depth, 0).astype(np.float32)
    return _nearest(depth, height, width)


def load_depth(frames: Frames, index: int, size: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Decode the depth map of one frame and resize it by nearest neighbour; lens distortion stays.

    Args:
        frames: the dataset.
        index: which frame.
        size: height and width to resize to.

    Returns:
        World units, 0 = no value.

    Raises:
        InputError: the file is missing, corrupt or of another shape than its image; the message names it.
    """
    file = _file_of(frames.depth_files, index, frames.image_files[index], "depth")
    return _nearest(_read_depth(file, frames.depth_unit(index), _stored_size(frames, index)), *size)


def _nearest(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Nearest-neighbour resize at pixel centres."""
    if values.shape == (height, width):
        return values
    rows = ((np.arange(height) + 0.5) * values.shape[0] / height).astype(np.int64)
    columns = ((np.arange(width) + 0.5) * values.shape[1] / width).astype(np.int64)
    return np.ascontiguousarray(values[rows[:, None], columns])


def _compact(mask: Int[np.ndarray, "h w"]) -> Int[np.ndarray, "h w"]:
    """Renumber the ids of one image 1, 2, ... in order of size of id; 0 stays unlabelled."""
    ids, compact = np.unique(mask, return_inverse=True)
    numbers = np.arange(1, len(ids) + 1)
    if 0 in ids:
        zero = int(np.flatnonzero(ids == 0)[0])
        numbers = np.where(np.arange(len(ids)) < zero, numbers, numbers - 1)
        numbers[zero] = 0
    return numbers[compact].reshape(mask.shape).astype(np.int64)


def _undistort(
    image: UInt8[np.ndarray, "h w 3"],
    mask: Optional[Int[np.ndarray, "h w"]],
    depth: Optional[Float[np.ndarray, "h w"]],
    matrix: Float[np.ndarray, "3 3"],
    distortion: Float[np.ndarray, "6"],
) -> tuple[np.ndarray, Optional[np.ndarray], Optional[np.ndarray], Float[np.ndarray, "3 3"]]:
    """Resample to an ideal pinhole of the same size that shows no pixel from outside the original image."""
    import cv2

    k1, k2, k3, k4, p1, p2 = (float(k) for k in distortion)
    coefficients = np.array([k1, k2, p1, p2, k3, k4, 0.0, 0.0])
    height, width = image.shape[:2]
    half = np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
    # OpenCV puts pixel centres at whole numbers, we put them at +0.5
    new_matrix, _ = cv2.getOptimalNewCameraMatrix(matrix - half, coefficients, (width, height), 0)
    maps = cv2.initUndistortRectifyMap(matrix - half, coefficients, None, new_matrix, (width, height), cv2.CV_32FC1)  # type: ignore
    image = cv2.remap(image, *maps, interpolation=cv2.INTER_LINEAR)
    if mask is not None:
        mask = cv2.remap(mask.astype(np.float64), *maps, interpolation=cv2.INTER_NEAREST).astype(np.int64)
    if depth is not None:
        depth = cv2.remap(depth, *maps, interpolation=cv2.INTER_NEAREST)
    return image, mask, depth, new_matrix + half
