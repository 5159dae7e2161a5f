"""How much two views of a scene see of the same surfaces.

With depth maps: the share of one view's pixels that the other one sees too, by projecting them there and comparing
depths. Without: the share of what lies in one view's frustum, between near and far, that lies in the other's.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Optional

import numpy as np
from jaxtyping import Bool, Float, Int

from snd_nerfstudio.errors import BrokenFileError
from snd_nerfstudio.scenes.frames import Frames, Note, load_depth, raise_it

GRID = (48, 64)
"""Rows and columns at which depth maps are kept for comparing."""
SAMPLED = 4
"""Every so many rows and columns of the grid are projected: 12 x 16 pixels of a view."""
TOLERANCE = 0.1
"""Depths that differ by less than this share are of the same surface; a cell of the grid is not flat."""
FEWEST_SAMPLES = 8
"""A view in which fewer samples can be compared with another has no overlap with it."""
DEPTHS_OF_FRUSTUM = 5
"""Depths, in equal ratios from near to far, at which pixels are projected where no depth is known."""
NEAR_FAR_OF_EXTENT = (0.25, 4.0)
"""Near and far, where nobody says, as multiples of how far the cameras are spread."""
BLOCK = 4_000_000
"""Projections made at once: bounds the memory to some 100 MB, however many views there are."""


@dataclass(frozen=True)
class ViewGeometry:
    """Where the cameras of one scene are, and perhaps what they measure."""

    camera_to_worlds: Float[np.ndarray, "n 4 4"]
    """OpenCV camera-to-world."""
    intrinsics: Float[np.ndarray, "n 3 3"]
    """Of images that are one unit wide and high: x by the width, y by the height."""
    depths: Optional[Float[np.ndarray, "n rows columns"]] = None
    """Depth along the optical axis at the centres of a grid of cells; 0 = no value. None: not known."""
    near: Optional[float] = None
    """Nearest surface, world units, where depth is not known. None: a quarter of the cameras' extent."""
    far: Optional[float] = None
    """Farthest surface, world units, where depth is not known. None: four times the cameras' extent."""

    def __len__(self) -> int:
        return len(self.camera_to_worlds)


def scene_geometry(
    frames: Frames,
    indices: Int[np.ndarray, "n"],
    near: Optional[float] = None,
    far: Optional[float] = None,
    with_depth: bool = True,
    note: Note = raise_it,
) -> ViewGeometry:
    """What overlaps need of some frames; their depth maps are decoded, and kept at a low resolution.

    Lens distortion is not taken into account.

    Args:
        frames: the dataset.
        indices: frames of one scene.
        near: see `ViewGeometry`; not used with depth maps.
        far: likewise.
        with_depth: use depth maps if each of these frames has one.
        note: called with each depth map that cannot be read; raises the error, or does not, and then the frame
            overlaps nothing.

    Raises:
        InputError: a depth map is missing or cannot be decoded.
    """
    intrinsics = frames.intrinsics[indices].astype(np.float64)
    intrinsics[:, 0] /= frames.sizes[indices, 1, None]
    intrinsics[:, 1] /= frames.sizes[indices, 0, None]
    depths = None
    files = frames.depth_files
    if with_depth and files is not None and all(files[index] is not None for index in indices):

        def depth_of(index: int) -> Float[np.ndarray, "h w"]:
            try:
                return load_depth(frames, index, GRID)
            except BrokenFileError as error:
                note(error, "this frame from pairs by overlap")
                return np.zeros(GRID, dtype=np.float32)

        with ThreadPoolExecutor(4) as pool:  # decoding releases the interpreter
            depths = np.stack(list(pool.map(depth_of, indices.tolist())))
    return ViewGeometry(frames.camera_to_worlds[indices], intrinsics, depths, near, far)


def near_and_far(geometry: ViewGeometry) -> tuple[float, float]:
    """The range of depths of a frustum: what is given, else multiples of how far the cameras are spread.

    A capture that walks around what it shows, or through a room, is about as large as its depths; one that hardly
    moves is much smaller, and near and far should then be given.
    """
    centres = geometry.camera_to_worlds[:, :3, 3]
    extent = 2 * float(np.linalg.norm(centres - centres.mean(axis=0), axis=1).mean()) or 1.0
    near = NEAR_FAR_OF_EXTENT[0] * extent if geometry.near is None else geometry.near
    far = NEAR_FAR_OF_EXTENT[1] * extent if geometry.far is None else geometry.far
    return near, max(far, near)


def viewing_angles(first: Float[np.ndarray, "a 4 4"], second: Float[np.ndarray, "b 4 4"]) -> Float[np.ndarray, "a b"]:
    """Angles between optical axes, in degrees."""
    cosine = first[:, :3, 2] @ second[:, :3, 2].T
    return np.degrees(np.arccos(np.clip(cosine, -1, 1)))


def overlap_matrix(
    geometry: ViewGeometry, max_angle: Optional[float] = None, tolerance: float = TOLERANCE
) -> Float[np.ndarray, "n n"]:
    """Overlap of all pairs of views: the smaller of both shares, so that it says something about either view.

    With depth, the share of view a in view b is ``consistent / comparable`` over a grid of a's pixels that have a
    depth: each is lifted, ``X = R_a K_a^-1 (u, v, 1) z + t_a``, and projected into b. It is comparable unless it
    falls on a pixel of b without depth, and consistent if it falls into b's image, in front of b, and its depth there
    differs from b's by less than ``tolerance``. So what b does not see because something stands before it does not
    count.

    Without depth, each pixel is lifted to several depths from near to far in equal ratios, and the share is of all
    these points those that lie in b's image and between near and far of b. Occlusion is not known: two cameras that
    look at each other overlap although they see opposite sides; a limit on the angle leaves such pairs out.

    Memory does not grow beyond ``2 n^2`` bytes and one block; views are compared only if their axes are not further
    apart than the largest angle and at least one of a dozen of one view's samples falls into the other's image.

    Args:
        geometry: of ``n`` views of one scene.
        max_angle: pairs whose viewing directions are further apart, in degrees, have overlap 0.
        tolerance: share of the depth.

    Returns:
        Symmetric, float16, in [0, 1], 1 on the diagonal.
    """
    count = len(geometry)
    points, known = _samples(geometry)
    projections = _projections(geometry)
    limits = None if geometry.depths is not None else near_and_far(geometry)
    coarse = np.linspace(0, points.shape[1] - 1, 12).round().astype(int)
    shares = np.zeros((count, count), dtype=np.float16)
    for rows in _blocks(count, points.shape[1] * count):
        near_enough = np.ones((len(rows), count), dtype=bool)
        if max_angle is not None:
            angles = viewing_angles(geometry.camera_to_worlds[rows], geometry.camera_to_worlds)
            near_enough = angles <= max_angle + 1e-6
        x, y, z = _project(points[rows][:, coarse], projections)
        near_enough &= (_inside(x, y, z) & known[rows][:, coarse, None]).any(axis=1)
        columns = np.flatnonzero(near_enough.any(axis=0))
        if len(columns) == 0:
            continue
        x, y, z = _project(points[rows], projections[columns])
        inside = _inside(x, y, z) & known[rows][..., None]
        total = known[rows].sum(axis=1, keepdims=True).astype(np.int64)
        if geometry.depths is not None:
            there = _look_up(geometry.depths[columns], x, y, inside)
            unknown = inside & (there <= 0)
            total = total - unknown.sum(axis=1)
            inside &= np.abs(z - there) <= tolerance * np.maximum(there, 1e-9)
        elif limits is not None:
            inside &= (z >= limits[0] * (1 - 1e-6)) & (z <= limits[1] * (1 + 1e-6))
        share = np.where(total >= FEWEST_SAMPLES, inside.sum(axis=1) / np.maximum(total, 1), 0.0)
        shares[rows[:, None], columns] = np.where(near_enough[:, columns], share, 0.0)
    overlaps = np.minimum(shares, shares.T)
    np.fill_diagonal(overlaps, 1.0)
    return overlaps


def _blocks(count: int, cost: int) -> Iterator[Int[np.ndarray, "n"]]:
    """Consecutive view numbers, as many at once as a block of memory holds; ``cost`` is of one view."""
    size = max(BLOCK // max(cost, 1), 1)
    for first in range(0, count, size):
        yield np.arange(first, min(first + size, count))


def _samples(geometry: ViewGeometry) -> tuple[Float[np.ndarray, "n s 4"], Bool[np.ndarray, "n s"]]:
    """Homogeneous world points of each view, and which of them exist."""
    rows, columns = GRID if geometry.depths is None else geometry.depths.shape[1:]
    picked_rows = np.arange(min(SAMPLED // 2, rows - 1), rows, SAMPLED)
    picked_columns = np.arange(min(SAMPLED // 2, columns - 1), columns, SAMPLED)
    y, x = np.meshgrid((picked_rows + 0.5) / rows, (picked_columns + 0.5) / columns, indexing="ij")
    pixels = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1)
    rays = np.einsum("nij,sj->nsi", np.linalg.inv(geometry.intrinsics), pixels)
    if geometry.depths is not None:
        depths = geometry.depths[:, picked_rows[:, None], picked_columns].reshape(len(geometry), -1)
    else:
        levels = np.geomspace(*near_and_far(geometry), DEPTHS_OF_FRUSTUM)
        rays = np.repeat(rays, len(levels), axis=1)
        depths = np.tile(levels, (len(geometry), len(pixels)))
    local = rays * depths[..., None]
    world = np.einsum("nij,nsj->nsi", geometry.camera_to_worlds[:, :3, :3], local)
    world += geometry.camera_to_worlds[:, None, :3, 3]
    return np.concatenate([world, np.ones_like(world[..., :1])], axis=2).astype(np.float32), depths > 0


def _projections(geometry: ViewGeometry) -> Float[np.ndarray, "n 3 4"]:
    """World to homogeneous image coordinates, ``K [R | t]``."""
    return (geometry.intrinsics @ np.linalg.inv(geometry.camera_to_worlds)[:, :3]).astype(np.float32)


def _project(
    points: Float[np.ndarray, "a s 4"], projections: Float[np.ndarray, "b 3 4"]
) -> tuple[Float[np.ndarray, "a s b"], Float[np.ndarray, "a s b"], Float[np.ndarray, "a s b"]]:
    """Image coordinates x and y and depth of each point in each view."""
    a, s = points.shape[:2]
    rows = projections.transpose(1, 0, 2).reshape(-1, 4)  # all x rows, all y rows, all z rows
    homogeneous = (points.reshape(-1, 4) @ rows.T).reshape(a, s, 3, -1)
    z = homogeneous[:, :, 2]
    safe = np.where(z > 0, z, 1.0)
    return homogeneous[:, :, 0] / safe, homogeneous[:, :, 1] / safe, z


def _inside(
    x: Float[np.ndarray, "a s b"], y: Float[np.ndarray, "a s b"], z: Float[np.ndarray, "a s b"]
) -> Bool[np.ndarray, "a s b"]:
    return (z > 0) & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)


def _look_up(
    depths: Float[np.ndarray, "b rows columns"],
    x: Float[np.ndarray, "a s b"],
    y: Float[np.ndarray, "a s b"],
    inside: Bool[np.ndarray, "a s b"],
) -> Float[np.ndarray, "a s b"]:
    """Depth of the cell that each point falls into; 0 outside the image."""
    count, rows, columns = depths.shape
    row = (np.where(inside, y, 0) * rows).astype(np.int32)
    column = (np.where(inside, x, 0) * columns).astype(np.int32)
    # float32 rounding can put a coordinate just below 1 on the border
    cell = np.minimum(row, rows - 1) * columns + np.minimum(column, columns - 1)
    found = depths.reshape(-1)[cell + (np.arange(count, dtype=np.int64) * rows * columns)]
    return np.where(inside, found, 0)
