"""Tracking points through a video by their features alone, measured as TAP-Vid does (Doersch et al. 2022).

A point's feature in the first frame is looked for in every later one. Nothing is learned and no motion is assumed, so
there is no prediction of occlusion either: only positions of visible points are measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Optional

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import FeatureMap, locate, sample
from snd_nerfstudio.probing.pairs.rooms import RoomViews

THRESHOLDS = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pixels of a frame of `RASTER`."""
RASTER = 256
"""Height and width that errors are counted in, whatever the size of the frames."""
DEPTH_TOLERANCE = 0.02
"""A point is visible where its depth differs by less than this share from the depth map's."""


@dataclass(frozen=True)
class PointTracks:
    """Points of a video and where they are in each frame; the first frame is the one they are queried in."""

    positions: Float[Tensor, "t n 2"]
    """Shares (x, y) of the frame's extent."""
    visible: Bool[Tensor, "t n"]
    """Whether the frame shows the point."""

    def __len__(self) -> int:
        return self.positions.shape[1]


@dataclass(frozen=True)
class TrackingResult:
    """Shares of visible points, in percent; each video counts the same, as in TAP-Vid."""

    average: Optional[float]
    """Mean over the thresholds (delta_avg); None if no point is ever visible again."""
    within: dict[str, Optional[float]]
    """By threshold, pixels of 256 x 256."""
    videos: int
    """Those with a visible point after the first frame."""
    points: int
    visible: int
    """Positions that were compared."""

    def plain(self) -> dict[str, Any]:
        """Numbers and dicts alone, as JSON has them."""
        return asdict(self)


def track(
    maps: Sequence[FeatureMap],
    queries: Float[Tensor, "n 2"],
    window: Optional[int] = None,
    temperature: float = 0.05,
) -> Float[Tensor, "t n 2"]:
    """Follow points of the first frame.

    Args:
        maps: features of each frame.
        queries: where the points are in the first frame, shares (x, y) of its extent.
        window: see `matching.locate`; None takes the centre of the best token, otherwise a soft-argmax around it.
        temperature: likewise.

    Returns:
        Shares (x, y) of the frame's extent; in the first frame the queries themselves.

    Raises:
        InputError: a feature is not finite.
    """
    features = sample(maps[0].values, maps[0].in_map(queries.to(maps[0].values.device).float()))
    found = [fmap.in_image(locate(fmap.values, features, window, temperature)) for fmap in maps[1:]]
    return torch.stack([queries.to(features.device).float(), *found])


def position_accuracy(
    predicted: Float[Tensor, "t n 2"], tracks: PointTracks, thresholds: Sequence[float] = THRESHOLDS
) -> tuple[list[Optional[float]], int]:
    """Shares of the visible points after the first frame whose error is below each threshold (TAP-Vid, section 3).

    Args:
        predicted: shares (x, y) of the frame's extent.
        tracks: the truth.
        thresholds: pixels of a frame of 256 x 256.

    Returns:
        Shares in [0, 1], None without visible points; and how many positions were compared.
    """
    error = RASTER * (predicted[1:].double() - tracks.positions[1:].to(predicted.device).double()).norm(dim=2)
    compared = error[tracks.visible[1:].to(predicted.device)]
    shares = [float((compared < threshold).double().mean()) if len(compared) else None for threshold in thresholds]
    return shares, len(compared)


def evaluate_tracking(
    videos: Sequence[tuple[Sequence[UInt8[np.ndarray, "h w 3"]], PointTracks]],
    encode: Callable[[UInt8[np.ndarray, "h w 3"]], FeatureMap],
    window: Optional[int] = None,
    temperature: float = 0.05,
) -> TrackingResult:
    """Track the points of some videos.

    Args:
        videos: frames and true tracks of each.
        encode: resizes and normalises an image and computes its features.
        window: see `track`.
        temperature: likewise.

    Raises:
        InputError: a feature is not finite.
    """
    shares, points, visible = [], 0, 0
    for frames, tracks in videos:
        with torch.no_grad():
            predicted = track([encode(frame) for frame in frames], tracks.positions[0], window, temperature)
        found, compared = position_accuracy(predicted, tracks)
        points, visible = points + len(tracks), visible + compared
        if compared:
            shares.append(found)
    means = [float(np.mean(column)) * 100 for column in zip(*shares)]
    return TrackingResult(
        average=float(np.mean(means)) if means else None,
        within={f"{threshold:g}": means[place] if means else None for place, threshold in enumerate(THRESHOLDS)},
        videos=len(shares),
        points=points,
        visible=visible,
    )


# ---------------------------------------------------------------------- true tracks


def project_tracks(
    points: Float[np.ndarray, "n 3"],
    camera_to_worlds: Float[np.ndarray, "t 4 4"],
    intrinsics: Float[np.ndarray, "3 3"],
    depths: Sequence[Float[np.ndarray, "h w"]],
    tolerance: float = DEPTH_TOLERANCE,
) -> PointTracks:
    """Where points of a still scene are in each frame, and whether they can be seen there.

    A point is visible if it lies before the camera and inside the frame, and one of the four pixels around it has a
    depth that differs from its own by no more than the tolerance. Of one pixel alone, a slanted surface would hide
    itself.

    Args:
        points: world, metres.
        camera_to_worlds: OpenCV camera-to-world.
        intrinsics: in pixels of the depth maps, centres at +0.5.
        depths: metres along the optical axis, 0 = none.
        tolerance: share of the depth.
    """
    positions, visible = [], []
    for pose, depth in zip(camera_to_worlds, depths, strict=True):
        height, width = depth.shape
        local = (points - pose[:3, 3]) @ pose[:3, :3]
        z = local[:, 2]
        ahead = z > 1e-6
        image = local @ intrinsics.T
        pixel = image[:, :2] / np.where(ahead, z, 1.0)[:, None]
        inside = ahead & (pixel >= 0).all(axis=1) & (pixel < [width, height]).all(axis=1)
        corner = np.floor(np.where(inside[:, None], pixel, 0.0) - 0.5).astype(int)
        agrees = np.zeros(len(points), dtype=bool)
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            column, row = np.clip(corner[:, 0] + dx, 0, width - 1), np.clip(corner[:, 1] + dy, 0, height - 1)
            agrees |= np.abs(depth[row, column] - z) <= tolerance * z  # where there is no depth, 0 is too far off
        positions.append(np.where(ahead[:, None], pixel / [width, height], -1.0))
        visible.append(inside & agrees)
    return PointTracks(torch.from_numpy(np.stack(positions)).float(), torch.from_numpy(np.stack(visible)))


def room_tracks(
    room: RoomViews, first: int = 0, frames: int = 24, count: int = 128, seed: int = 0
) -> tuple[list[UInt8[np.ndarray, "h w 3"]], PointTracks]:
    """Frames of a procedural room and exact tracks of random points of the first of them.

    Args:
        room: from `pairs.rooms.read_room`.
        first: frame in which the points are queried.
        frames: how many, that one included.
        count: points; fewer if the first frame has fewer pixels with a depth.
        seed: of the points.

    Raises:
        InputError: the room has fewer frames, or a file cannot be read.
    """
    if frames < 2 or first < 0 or first + frames > len(room.names):
        raise InputError(
            f"{room.folder} has {len(room.names)} views, not {frames} from view {first} on: take fewer (at least 2), "
            "or write rooms with more."
        )
    chosen = range(first, first + frames)
    depths = [room.depth(index) for index in chosen]
    rows, columns = np.nonzero(depths[0] > 0)
    some = np.random.default_rng(seed).permutation(len(rows))[:count]
    pixels = np.stack([columns[some] + 0.5, rows[some] + 0.5, np.ones(len(some))], axis=1)
    local = pixels @ np.linalg.inv(room.intrinsics).T * depths[0][rows[some], columns[some], None]
    poses = room.camera_to_worlds[first : first + frames]
    points = local @ poses[0, :3, :3].T + poses[0, :3, 3]
    tracks = project_tracks(points, poses, room.intrinsics, depths)
    return [room.image(index) for index in chosen], tracks
