"""All frames of a dataset as arrays, and reading some of them as `Views`."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped, UInt8

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.decoding import (
    SAVED_IDS,
    compact,
    header_size,
    nearest,
    read_bytes,
    read_depth,
    read_image,
    read_mask,
    resized,
)
from snd_nerfstudio.scenes.file_list import FileList
from snd_nerfstudio.scenes.frame_cache import FrameCache
from snd_nerfstudio.scenes.lenses import Lens
from snd_nerfstudio.scenes.masks.maker import FramePixels, MaskMaker, MaskOrigin
from snd_nerfstudio.scenes.views import Views

Note = Callable[[BrokenFileError, str], Any]
"""Is told of a broken file and what has to be left out for it; raises the error, or does not."""
HEADERS_CHECKED = 10_000
"""Of larger datasets this many headers, evenly spread, are read before training."""
FIRST_FRAME_SIZE = (64, 96)
"""At which a scene's first frame is looked at."""
MOST_MISSING = 0.1
"""A dataset that lacks more of its files is an error in any case."""
THREADS = 8
"""That look at files before training."""


def raise_it(error: BrokenFileError, what: str) -> None:
    """A `Note` that leaves nothing out.

    Raises:
        BrokenFileError: the one that it is told of.
    """
    raise error


NARROWEST_FOCAL = 0.1
"""Focal length in widths of the image below which no pinhole camera is: 157 degrees."""


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
    def depth_on_disk(self) -> Bool[np.ndarray, "frames"]:
        """Which frames have a depth map on disk, when this was first asked for."""
        return np.zeros(len(self), dtype=bool) if self.depth_files is None else _on_disk(self.depth_files)

    @cached_property
    def has_depth(self) -> bool:
        """Whether every frame has a depth map on disk; some alone count as none."""
        return bool(self.depth_on_disk.all())


def depth_bounds(frames: Frames, looked_at: int = 48, note: Note = raise_it) -> tuple[float, float]:
    """A range of depths that holds nearly all of a dataset: its 0.5 % and 99.5 % quantiles, a tenth wider each.

    Args:
        frames: with depth maps.
        looked_at: how many of them, spread evenly.
        note: called with each map that cannot be read; raises the error, or does not.

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
        try:
            depth = read_depth(frames.depth_files[index], frames.depth_unit(index), _stored_size(frames, index))  # type: ignore
        except BrokenFileError as error:
            note(error, "a depth map of those that say near and far")
            continue
        measured.append(depth[depth > 0][::7])
    values = np.concatenate(measured) if measured else np.zeros(0)
    if len(values) == 0:
        raise InputError("The depth maps have no valid pixel: give --pipeline.datamanager.near and ...far.")
    near, far = np.quantile(values, [0.005, 0.995])
    return float(near / 1.1), float(far * 1.1)


def check_frames(frames: Frames, needs_masks: bool, needs_depth: bool, note: Note = raise_it) -> None:
    """Find what is wrong with a dataset before training starts, as far as that can be known without decoding it all.

    Args:
        frames: the dataset.
        needs_masks: whether every frame must have an instance mask.
        needs_depth: whether every frame must have a depth map.
        note: called with each file that is missing or damaged, and what it is; raises the error, or does not.

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
    wide = focal[:, 0] < NARROWEST_FOCAL * frames.sizes[:, 1]
    if wide.any():
        bad = int(np.flatnonzero(wide)[0])
        raise InputError(
            f"The focal length of {frames.image_files[bad]} is {focal[bad, 0]:g}, but it has {frames.sizes[bad, 1]} "
            "columns: intrinsics must be in pixels. If they are shares of the image, multiply them by its width and "
            "height; undistort fisheye images to pinholes first."
        )
    _check_files_exist(frames, needs_masks, needs_depth, note)
    _check_headers(frames, needs_masks, note)
    _check_first_frames(frames, needs_masks, needs_depth, note)


def _check_files_exist(frames: Frames, needs_masks: bool, needs_depth: bool, note: Note) -> None:
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
            missing = int((~present).sum())
            message = f"Missing {kind} {name} ({missing} of {len(present)} are missing): {remedy}."
            error = BrokenFileError(message, files[bad])
            if missing > MOST_MISSING * len(present):
                raise error
            note(error, "triplets with these files")


def _on_disk(files: Sequence[Optional[Path]]) -> Bool[np.ndarray, "n"]:
    """Whether each file exists."""
    return (files if isinstance(files, FileList) else FileList.of(files)).exist()


def _check_headers(frames: Frames, needs_masks: bool, note: Note) -> None:
    """Compare the sizes that the headers of images and masks state, without decoding them."""

    def check(index: int) -> None:
        file = frames.image_files[index]
        _check_image_size(frames, index, header_size(file, "Image"))
        mask_file = _file_of(frames.mask_files, index, file, "mask") if needs_masks else None
        if mask_file is not None and mask_file.suffix != SAVED_IDS:  # these have no header
            _check_mask_size(mask_file, header_size(mask_file, "Instance mask"), _stored_size(frames, index))

    count = min(len(frames), HEADERS_CHECKED)
    _check_each(np.linspace(0, len(frames) - 1, count).astype(int), check, note)


def _check_first_frames(frames: Frames, needs_masks: bool, needs_depth: bool, note: Note) -> None:
    """Decode the first frame of each scene."""
    _, firsts = np.unique(frames.scene_index, return_index=True)

    def check(index: int) -> None:
        load_views(frames, [index], FIRST_FRAME_SIZE, with_masks=needs_masks, with_depth=needs_depth)

    _check_each(firsts, check, note)


def _check_each(indices: Int[np.ndarray, "n"], check: Callable[[int], None], note: Note) -> None:
    def fault(index: int) -> Optional[BrokenFileError]:
        try:
            check(index)
        except BrokenFileError as error:
            return error
        return None

    with ThreadPoolExecutor(THREADS) as pool:  # both wait for the disk, and decoding leaves the interpreter free
        errors = [error for error in pool.map(fault, indices.tolist()) if error is not None]
    if len(errors) > max(MOST_MISSING * len(indices), 1):
        raise BrokenFileError(f"{errors[0]} ({len(errors)} of the {len(indices)} that were looked at are wrong.)")
    for error in errors:
        note(error, "triplets with this frame")


def _stored_size(frames: Frames, index: int) -> tuple[int, int]:
    return int(frames.sizes[index, 0]), int(frames.sizes[index, 1])


def _check_image_size(frames: Frames, index: int, size: tuple[int, ...]) -> None:
    height, width = _stored_size(frames, index)
    if size != (height, width):
        raise BrokenFileError(
            f"{frames.image_files[index]} has {size[1]}x{size[0]} pixels but its camera was calibrated for "
            f"{width}x{height}: correct the calibration's size (`w` and `h` in transforms.json) or restore the image.",
            frames.image_files[index],
        )


def _check_mask_size(file: Path, size: tuple[int, ...], image_size: tuple[int, ...]) -> None:
    if size != image_size:
        raise BrokenFileError(
            f"{file} has {size[1]}x{size[0]} pixels but its image has {image_size[1]}x{image_size[0]}: a mask must "
            "have its image's size.",
            file,
        )


def load_views(
    frames: Frames,
    indices: Sequence[int],
    size: tuple[int, int],
    with_masks: bool,
    with_depth: bool,
    mask_maker: Optional[MaskMaker] = None,
    frame_cache: Optional[FrameCache] = None,
) -> Views:
    """Decode and resize some frames.

    Images are resized with a bicubic antialiasing filter, JPEGs from the nearest larger size that they can be decoded
    at; masks and depth maps by nearest neighbour; the intrinsics follow. Lens distortion is removed. The aspect ratio
    may change: the two focal lengths then differ.

    Args:
        frames: the dataset.
        indices: which frames.
        size: height and width to resize to.
        with_masks: read the dataset's instance masks.
        with_depth: read depth maps.
        mask_maker: makes instance masks instead, at the size that is resized to.
        frame_cache: keeps images as they are resized to.

    Returns:
        Views on the CPU, float32.

    Raises:
        InputError: a file is missing, corrupt, of another kind or size than it should be; the message names it.
    """
    images, intrinsics, masks, depths = [], [], [], []
    for index in indices:
        image_file, lens = frames.image_files[index], _lens(frames, index)
        stored = _stored_size(frames, index)

        def at_size(values: Shaped[np.ndarray, "h w"], lens: Optional[Lens] = lens) -> Shaped[np.ndarray, "H W"]:
            return nearest(values, size) if lens is None else lens.picked(values, size)

        image, image_hash = _image_at(frames, index, size, lens, frame_cache, mask_maker is not None)
        images.append(torch.from_numpy(image))
        intrinsics.append(torch.from_numpy(_intrinsics_at(frames, index, size, lens).astype(np.float32)))
        if mask_maker is not None:
            colours = np.ascontiguousarray(rearrange(image, "c h w -> h w c"))
            masks.append(compact(_made_mask(frames, index, size, mask_maker, colours, image_hash)))
        elif with_masks:
            mask_file = _file_of(frames.mask_files, index, image_file, "mask")
            mask = read_mask(mask_file)
            _check_mask_size(mask_file, mask.shape, stored)
            masks.append(compact(at_size(mask)))
        if with_depth:
            depth_file = _file_of(frames.depth_files, index, image_file, "depth")
            depths.append(at_size(read_depth(depth_file, frames.depth_unit(index), stored)))
    poses = frames.camera_to_worlds[np.asarray(indices)]
    return Views(
        images=torch.stack(images).float().div_(255),
        camera_to_worlds=torch.from_numpy(np.ascontiguousarray(poses)).float(),
        intrinsics=torch.stack(intrinsics),
        masks=torch.from_numpy(np.stack(masks)) if masks else None,
        depths=torch.from_numpy(np.stack(depths)) if depths else None,
        names=tuple(frames.image_files[index].name for index in indices),
    )


def _image_at(
    frames: Frames,
    index: int,
    size: tuple[int, int],
    lens: Optional[Lens],
    cache: Optional[FrameCache],
    with_hash: bool,
) -> tuple[UInt8[np.ndarray, "3 h w"], Optional[str]]:
    """A frame's image as it is trained, from the cache where it is in it, and if wanted the hash of its file.

    The file is read once: what is kept under a hash is what was hashed.
    """
    file = frames.image_files[index]
    contents, image_hash, key = None, None, None
    if cache is not None or with_hash:
        contents = read_bytes(file)
        image_hash = hashlib.sha256(contents).hexdigest()
    if cache is not None and image_hash is not None:
        height, width = _stored_size(frames, index)
        camera = (float(height), float(width), *(() if lens is None else (*lens.matrix, *lens.distortion)))
        key = cache.key(image_hash, size, camera)
        found = cache.get(key, size)
        if found is not None:
            return found, image_hash
    decoded = read_image(file, size, contents)
    _check_image_size(frames, index, decoded.stored_size)
    image = resized(decoded.pixels if lens is None else lens.undistorted(decoded.pixels), size)
    if cache is not None and key is not None:
        cache.put(key, image)
    return image, image_hash


def mask_origin(
    frames: Frames, index: int, size: tuple[int, int], uses_depth: bool, image_hash: Optional[str] = None
) -> MaskOrigin:
    """What the mask of a frame is made of, where masks are not stored.

    Args:
        frames: the dataset.
        index: which frame.
        size: height and width at which it is trained.
        uses_depth: whether masks follow depth maps; a frame that had none from the start does without.
        image_hash: SHA-256 of the image's file, where it is known.
    """
    depth_file = frames.depth_files[index] if uses_depth and frames.depth_files is not None else None
    if depth_file is not None and not frames.depth_on_disk[index]:
        depth_file = None
    camera: list[float] = []
    distorted = _is_distorted(frames, index)
    if distorted or depth_file is not None:
        camera += frames.intrinsics[index].flatten().tolist()
    if distorted:
        camera += frames.distortion[index].tolist()  # type: ignore
    if depth_file is not None:
        camera.append(frames.depth_unit(index))
    numbers = tuple(float(value) for value in camera)
    return MaskOrigin(frames.image_files[index], size, depth_file, numbers, image_hash)


def _made_mask(
    frames: Frames,
    index: int,
    size: tuple[int, int],
    maker: MaskMaker,
    image: UInt8[np.ndarray, "h w 3"],
    image_hash: Optional[str],
) -> Int[np.ndarray, "h w"]:
    """A frame's mask from the maker's cache, or of its image as it is trained and, where there is one, its depth."""
    origin = mask_origin(frames, index, size, maker.uses_depth, image_hash)

    def pixels() -> FramePixels:
        depth, lens = None, _lens(frames, index)
        if origin.depth_file is not None:
            depth = read_depth(origin.depth_file, frames.depth_unit(index), _stored_size(frames, index))
            depth = nearest(depth, size) if lens is None else lens.picked(depth, size)
        return FramePixels(image, _intrinsics_at(frames, index, size, lens), depth)

    return maker.mask(origin, pixels)


def _is_distorted(frames: Frames, index: int) -> bool:
    return frames.distortion is not None and bool(np.abs(frames.distortion[index]).max() > 0)


def _lens(frames: Frames, index: int) -> Optional[Lens]:
    """What bends a frame's image; None for an ideal pinhole."""
    if not _is_distorted(frames, index):
        return None
    matrix, distortion = frames.intrinsics[index].flatten().tolist(), frames.distortion[index].tolist()  # type: ignore
    return Lens(tuple(matrix), tuple(distortion), _stored_size(frames, index))


def _intrinsics_at(frames: Frames, index: int, size: tuple[int, int], lens: Optional[Lens]) -> Float[np.ndarray, "3 3"]:
    """Intrinsics of a frame as it is trained: without distortion, and resized."""
    height, width = _stored_size(frames, index)
    matrix = frames.intrinsics[index].astype(np.float64) if lens is None else lens.pinhole
    return np.array([size[1] / width, size[0] / height, 1.0])[:, None] * matrix


def _file_of(files: Optional[Sequence[Optional[Path]]], index: int, image_file: Path, kind: str) -> Path:
    file = None if files is None else files[index]
    if file is None:
        raise BrokenFileError(f"{image_file} has no {kind} file.")
    return file


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
    return nearest(read_depth(file, frames.depth_unit(index), _stored_size(frames, index)), size)
