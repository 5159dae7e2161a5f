"""Whether poses, intrinsics and depth agree with what the images show: matched points, and where they should lie.

Matches are found in the images alone (SIFT, Lowe 2004, kept if one fundamental matrix explains them), so they are
right even where the poses are wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import UNREADABLE
from snd_nerfstudio.scenes.frames import Frames, load_depth
from snd_nerfstudio.scenes.image_files import open_bytes

LONGEST_SIDE = 640
"""Pixels of the images that features are found in."""
GAPS = (8, 4, 12, 2, 1)
"""Frames between those that are matched, the first that gives enough matches."""
ENOUGH = 24
"""Matches of a pair that count as enough."""
MOST = 250
"""Matches that are kept of a pair."""
LOWE_RATIO = 0.8
"""A match is kept if the second best is this much worse."""
PARALLAX = 1.0
"""Degrees between two rays from which on a point can be triangulated."""
DEPTH_EDGE = 0.05
"""Where depth varies more than this share around a pixel it is not used: a match may lie on either side."""


@dataclass(frozen=True)
class Cameras:
    """What is believed of the frames of one scene, rightly or not."""

    camera_to_worlds: Float[np.ndarray, "n 4 4"]
    """OpenCV camera-to-world."""
    intrinsics: Float[np.ndarray, "n 3 3"]
    """In pixels of the image file."""
    distortion: Optional[Float[np.ndarray, "n 6"]] = None
    """nerfstudio's k1 k2 k3 k4 p1 p2."""


@dataclass(frozen=True)
class Matches:
    """Points of one scene that were found in two frames each."""

    first: Int[np.ndarray, "m"]
    """Place of the frame of one end in the scene's list."""
    second: Int[np.ndarray, "m"]
    """Place of the frame of the other end."""
    points: Float[np.ndarray, "2 m 2"]
    """Pixel positions (x, y) in the image files, centres at +0.5, at either end."""
    depths: Float[np.ndarray, "2 m"]
    """Measured depth at either end, 0 = none."""
    pairs: tuple[tuple[int, int], ...]
    """The pairs of frames with enough matches."""
    diagonal: float
    """Of an image, in pixels of the image file."""

    def __len__(self) -> int:
        return len(self.first)

    @property
    def has_depth(self) -> bool:
        """Whether depth is known at half of the points at least."""
        return len(self) > 0 and float((self.depths > 0).mean()) >= 0.5

    @property
    def motion(self) -> float:
        """Median distance that a point moves between the images, pixels of the image file."""
        return float(np.median(np.linalg.norm(self.points[1] - self.points[0], axis=1))) if len(self) else 0.0


def read_picture(file: Path, longest: int = LONGEST_SIDE) -> Image.Image:
    """An image in colour, its longest side no longer than so many pixels.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        with open_bytes(file) as stream, Image.open(stream) as image:
            image.draft("RGB", (longest, longest))
            picture = image.convert("RGB")
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"Image {file} does not exist: restore it or remove the frame.") from error
    except UNREADABLE as error:
        raise InputError(f"Image {file} cannot be decoded ({error}): restore it or remove the frame.") from error
    factor = min(longest / max(picture.size), 1.0)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture if size == picture.size else picture.resize(size, Image.Resampling.BOX)


def match_frames(frames: Frames, indices: Int[np.ndarray, "n"], most_pairs: int = 12) -> Matches:
    """Match frames that lie near to each other in the capture, or else whose cameras are near.

    Args:
        frames: the dataset; its sizes must be those of the image files.
        indices: frames of one scene in the order of the capture.
        most_pairs: how many pairs, spread evenly over the capture.

    Raises:
        InputError: an image or depth map cannot be decoded.
    """
    import cv2

    cv2.setRNGSeed(0)  # of the fundamental matrices
    finder = cv2.SIFT_create(nfeatures=1500, contrastThreshold=0.02)  # type: ignore
    features: dict[int, tuple[np.ndarray, Any]] = {}

    def described(place: int) -> tuple[np.ndarray, Any]:
        if place not in features:
            index = int(indices[place])
            grey = np.asarray(read_picture(frames.image_files[index]).convert("L"))
            keys, vectors = finder.detectAndCompute(grey, None)
            # OpenCV's pixel centres lie at whole numbers
            points = np.array([key.pt for key in keys], dtype=np.float64).reshape(-1, 2) + 0.5
            features[place] = points * (frames.sizes[index, ::-1] / [grey.shape[1], grey.shape[0]]), vectors
        return features[place]

    found: list[tuple[int, int, np.ndarray, np.ndarray]] = []
    anchors = np.unique(np.linspace(0, len(indices) - 1, most_pairs + 1).round().astype(int))[:-1]
    for anchor in anchors.tolist():
        for other in _partners(frames.camera_to_worlds[indices], anchor):
            a, b = _match(described(anchor), described(other), float(frames.sizes[indices[anchor]].max()))
            if len(a) >= ENOUGH:
                found.append((anchor, other, a, b))
                break
    depth_of = {place for a, b, *_ in found for place in (a, b)} if _with_depth(frames, indices) else set()
    maps = {
        place: load_depth(frames, int(indices[place]), tuple(frames.sizes[indices[place]].tolist()))
        for place in depth_of
    }
    height, width = frames.sizes[indices[0]]
    return _gather(found, maps, float(np.hypot(height, width)))


def _gather(
    found: Sequence[tuple[int, int, np.ndarray, np.ndarray]], maps: dict[int, np.ndarray], diagonal: float
) -> Matches:
    none = np.zeros((0, 2))
    points = np.stack([np.concatenate([none, *(entry[2 + end] for entry in found)]) for end in (0, 1)])
    places = np.array([np.concatenate([np.zeros(0), *(np.full(len(e[2]), e[k]) for e in found)]) for k in (0, 1)])
    depths = np.zeros(points.shape[:2])
    for end in (0, 1):
        for place, depth in maps.items():
            chosen = places[end] == place
            depths[end, chosen] = _depth_at(depth, points[end, chosen])
    pairs = tuple((entry[0], entry[1]) for entry in found)
    return Matches(places[0].astype(np.int64), places[1].astype(np.int64), points, depths, pairs, diagonal)


def _with_depth(frames: Frames, indices: Int[np.ndarray, "n"]) -> bool:
    files = frames.depth_files
    return files is not None and all(files[i] is not None and files[i].is_file() for i in indices)  # type: ignore


def _partners(poses: Float[np.ndarray, "n 4 4"], anchor: int) -> list[int]:
    """Frames to match one with: later ones in the capture, then those whose cameras are nearest."""
    later = [anchor + gap for gap in GAPS if anchor + gap < len(poses)]
    distance = np.linalg.norm(poses[:, :3, 3] - poses[anchor, :3, 3], axis=1)
    distance[anchor] = np.inf
    nearest = np.argsort(distance, kind="stable")[: min(6, len(poses) - 1)].tolist()
    return list(dict.fromkeys([*later, *nearest]))


def _match(
    first: tuple[np.ndarray, Any], second: tuple[np.ndarray, Any], side: float
) -> tuple[Float[np.ndarray, "m 2"], Float[np.ndarray, "m 2"]]:
    """Points of two images that are each other's best match and agree with one fundamental matrix."""
    import cv2

    none = np.zeros((0, 2))
    if first[1] is None or second[1] is None or min(len(first[0]), len(second[0])) < ENOUGH:
        return none, none
    matcher = cv2.BFMatcher(cv2.NORM_L2)
    good = [m[0] for m in matcher.knnMatch(first[1], second[1], k=2) if m[0].distance < LOWE_RATIO * m[1].distance]
    back = {m.queryIdx: m.trainIdx for m in matcher.match(second[1], first[1])}
    good = [m for m in good if back.get(m.trainIdx) == m.queryIdx]
    if len(good) < ENOUGH:
        return none, none
    a, b = first[0][[m.queryIdx for m in good]], second[0][[m.trainIdx for m in good]]
    threshold = max(side / LONGEST_SIDE, 1.0) * 1.0
    _, kept = cv2.findFundamentalMat(a, b, cv2.FM_RANSAC, threshold, 0.999, 2000)
    if kept is None:
        return none, none
    inside = np.flatnonzero(kept.ravel())
    # few exact matches on strong texture should not outweigh the rest: an even choice
    inside = inside[np.unique(np.linspace(0, len(inside) - 1, min(len(inside), MOST)).round().astype(int))]
    return a[inside], b[inside]


def _depth_at(depth: Float[np.ndarray, "H W"], points: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m"]:
    """Depth at pixels, 0 where it is unknown or changes abruptly."""
    height, width = depth.shape
    column = np.clip(points[:, 0].astype(int), 0, width - 1)
    row = np.clip(points[:, 1].astype(int), 0, height - 1)
    around = np.stack(
        [
            depth[np.clip(row + dy, 0, height - 1), np.clip(column + dx, 0, width - 1)]
            for dy in (-1, 0, 1)
            for dx in (-1, 0, 1)
        ]
    )
    middle = depth[row, column]
    smooth = (around.min(axis=0) > 0) & (around.max(axis=0) - around.min(axis=0) <= DEPTH_EDGE * middle)
    return np.where(smooth, middle, 0.0)


# ---------------------------------------------------------------------- geometry


def rays_of(
    cameras: Cameras, places: Int[np.ndarray, "m"], points: Float[np.ndarray, "m 2"]
) -> Float[np.ndarray, "m 3"]:
    """Directions ``(x, y, 1)`` of pixels in camera axes, lens distortion removed."""
    matrix = cameras.intrinsics[places]
    rays = np.ones((len(points), 3))
    rays[:, 0] = (points[:, 0] - matrix[:, 0, 2]) / matrix[:, 0, 0]
    rays[:, 1] = (points[:, 1] - matrix[:, 1, 2]) / matrix[:, 1, 1]
    if cameras.distortion is not None and len(points) and np.abs(cameras.distortion[places]).max() > 0:
        import cv2

        for place in np.unique(places).tolist():
            chosen = places == place
            k1, k2, k3, k4, p1, p2 = (float(k) for k in cameras.distortion[place])
            bent = np.ascontiguousarray(rays[chosen, None, :2])
            straight = cv2.undistortPoints(bent, np.eye(3), np.array([k1, k2, p1, p2, k3, k4, 0.0, 0.0]))
            rays[chosen, :2] = straight[:, 0]
    return rays


def _relative(cameras: Cameras, matches: Matches) -> Float[np.ndarray, "m 4 4"]:
    """From the first camera's axes to the second's."""
    poses = cameras.camera_to_worlds
    return np.linalg.inv(poses)[matches.second] @ poses[matches.first]


def triangulate(cameras: Cameras, matches: Matches) -> tuple[Float[np.ndarray, "2 m"], Float[np.ndarray, "m"]]:
    """Depths of the matched points along both optical axes, and the angles between their rays.

    The rays' nearest points: ``min |R r_1 z_1 + t - r_2 z_2|`` over ``z_1, z_2``.

    Returns:
        Depths, negative behind a camera; angles in degrees.
    """
    relative = _relative(cameras, matches)
    first = np.einsum("mij,mj->mi", relative[:, :3, :3], rays_of(cameras, matches.first, matches.points[0]))
    second = rays_of(cameras, matches.second, matches.points[1])
    offset = relative[:, :3, 3]
    aa, bb, ab = (first * first).sum(1), (second * second).sum(1), (first * second).sum(1)
    at, bt = (first * offset).sum(1), (second * offset).sum(1)
    determinant = np.maximum(aa * bb - ab * ab, 1e-15)
    z_first = (ab * bt - bb * at) / determinant
    z_second = (aa * bt - ab * at) / determinant
    angle = np.degrees(np.arctan2(np.linalg.norm(np.cross(first, second), axis=1), ab))
    return np.stack([z_first, z_second]), angle


def epipolar_errors(cameras: Cameras, matches: Matches) -> Float[np.ndarray, "m"]:
    """How far matches are from their epipolar lines (Sampson's distance), in pixels of the image file.

    ``|r_2' E r_1| / |(E r_1)_xy, (E' r_2)_xy|`` times the focal length, ``E = [t]x R`` (Hartley and Zisserman,
    equation 11.9, here with normalised coordinates). Points that would have to lie behind a camera get the error of
    their whole motion, and so do points of cameras at the same place beyond what the rotation explains.
    """
    relative = _relative(cameras, matches)
    rotation, offset = relative[:, :3, :3], relative[:, :3, 3]
    first = rays_of(cameras, matches.first, matches.points[0])
    second = rays_of(cameras, matches.second, matches.points[1])
    focal = cameras.intrinsics[matches.second][:, [0, 1], [0, 1]].mean(axis=1)
    line = np.cross(offset, np.einsum("mij,mj->mi", rotation, first))
    back = np.einsum("mji,mj->mi", rotation, np.cross(second, offset))
    size = np.sqrt((line[:, :2] ** 2).sum(1) + (back[:, :2] ** 2).sum(1))
    distance = np.linalg.norm(offset, axis=1)
    turned = np.einsum("mij,mj->mi", rotation, first)
    ahead = turned[:, 2] > 1e-6
    still = np.linalg.norm(turned[:, :2] / np.where(ahead, turned[:, 2], 1)[:, None] - second[:, :2], axis=1)
    still = np.where(ahead, still * focal, matches.diagonal)
    sampson = np.abs((second * line).sum(1)) / np.maximum(size, 1e-12) * focal
    depths, angle = triangulate(cameras, matches)
    motion = np.linalg.norm(matches.points[1] - matches.points[0], axis=1)
    sampson = np.where((depths.min(axis=0) <= 0) & (angle > PARALLAX), np.maximum(sampson, motion), sampson)
    return np.minimum(np.where(distance > 1e-9, sampson, still), matches.diagonal)


def depth_rays(cameras: Cameras, matches: Matches, end: int, along_ray: bool = False) -> Float[np.ndarray, "m 3"]:
    """Matched points in camera axes from the measured depth at one end; zero where it is unknown.

    Args:
        cameras: of the scene.
        matches: of the scene.
        end: 0 or 1.
        along_ray: take depth for the distance from the camera's centre, not along its axis.
    """
    places = (matches.first, matches.second)[end]
    rays = rays_of(cameras, places, matches.points[end])
    if along_ray:
        rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
    return rays * matches.depths[end][:, None]


def reprojection_errors(
    cameras: Cameras, matches: Matches, factor: float = 1.0, along_ray: bool = False
) -> Float[np.ndarray, "k"]:
    """How far points that are lifted with their depth fall from their match in the other image, both ways, in pixels.

    Args:
        cameras: of the scene.
        matches: of the scene; those without depth are left out.
        factor: that depths are multiplied by.
        along_ray: see `depth_rays`.

    Returns:
        One for each end with a depth; at most the image's diagonal, which is also that of points behind the camera.
    """
    errors = []
    poses = cameras.camera_to_worlds
    inverse = np.linalg.inv(poses)
    for end in (0, 1):
        known = matches.depths[end] > 0
        local = factor * depth_rays(cameras, matches, end, along_ray)
        own, other = (matches.first, matches.second)[:: 1 - 2 * end]
        transform = inverse[other] @ poses[own]
        moved = np.einsum("mij,mj->mi", transform[:, :3, :3], local) + transform[:, :3, 3]
        there = rays_of(cameras, other, matches.points[1 - end])
        ahead = moved[:, 2] > 1e-9
        fallen = moved[:, :2] / np.where(ahead, moved[:, 2], 1.0)[:, None]
        focal = cameras.intrinsics[other][:, [0, 1], [0, 1]]
        error = np.linalg.norm((fallen - there[:, :2]) * focal, axis=1)
        errors.append(np.minimum(np.where(ahead, error, matches.diagonal), matches.diagonal)[known])
    return np.concatenate(errors)


def depth_ratios(cameras: Cameras, matches: Matches, along_ray: bool = False) -> Float[np.ndarray, "k"]:
    """Triangulated over measured depth of the matches that can be triangulated."""
    depths, angle = triangulate(cameras, matches)
    good: Bool[np.ndarray, "m"] = (angle > PARALLAX) & (depths.min(axis=0) > 0)
    ratios = []
    for end in (0, 1):
        measured = depth_rays(cameras, matches, end, along_ray)[:, 2]
        known = good & (measured > 0)
        ratios.append(depths[end][known] / measured[known])
    return np.concatenate(ratios)
