"""What a scene holds, in numbers: frames, baselines, angles, overlaps, masks, depth."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
from jaxtyping import Int

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import UNREADABLE, read_mask
from snd_nerfstudio.scenes.frames import Frames, load_depth
from snd_nerfstudio.scenes.image_files import open_bytes
from snd_nerfstudio.scenes.mistakes import Verdict
from snd_nerfstudio.scenes.overlap import overlap_matrix, scene_geometry

QUANTILES = (0.05, 0.5, 0.95)
OVERLAP_FRAMES = 200
"""Of a longer scene so many frames, evenly spread, are compared with each other."""
DEPTH_SIZE = (120, 160)
"""Rows and columns that depth maps are looked at in."""


@dataclass(frozen=True)
class SceneStatistics:
    """One scene; quantiles are 5 %, 50 % and 95 %."""

    name: str
    frames: int
    image_sizes: dict[str, int]
    """Frames by width x height of the image file."""
    pairs_by_gap: dict[int, int]
    """Context pairs by their gap, those with a frame between."""
    baselines: list[float]
    """Quantiles of the distance between contexts, world units."""
    neighbour_distance: float
    """Median distance between consecutive frames, world units."""
    angles: list[float]
    """Quantiles of the angle between the contexts' viewing directions, degrees."""
    overlaps: list[float]
    """Quantiles of the contexts' overlap."""
    overlap_histogram: list[int]
    """All pairs of frames by their overlap, in tenths."""
    overlap_from: str
    """`depth` or `frusta`."""
    frames_with_mask: float
    """Share of the frames whose mask file exists."""
    labelled_pixels: Optional[float]
    """Mean share of the pixels of a mask that are labelled."""
    regions: Optional[list[float]]
    """Quantiles of the number of regions in a mask."""
    frames_with_depth: float
    """Share of the frames whose depth map exists."""
    pixels_with_depth: Optional[float]
    """Mean share of the pixels of a depth map that have a value."""
    depths: Optional[list[float]]
    """Quantiles of the depth, world units."""


def frames_of_scene(frames: Frames, scene: int) -> Int[np.ndarray, "n"]:
    """Frames of a scene in the order of its capture."""
    indices = np.flatnonzero(frames.scene_index == scene)
    return indices[np.argsort(frames.frame_order[indices], kind="stable")]


def scene_statistics(
    frames: Frames, scene: int, gaps: tuple[int, int] = (8, 12), looked_at: int = 24
) -> SceneStatistics:
    """Measure one scene.

    Args:
        frames: the dataset.
        scene: number of the scene.
        gaps: smallest and largest gap between contexts.
        looked_at: masks and depth maps that are decoded, spread evenly.

    Raises:
        InputError: a mask or depth map cannot be decoded.
    """
    indices = frames_of_scene(frames, scene)
    poses, order = frames.camera_to_worlds[indices], frames.frame_order[indices]
    pairs = {gap: _pairs_with_gap(order, gap) for gap in range(gaps[0], gaps[1] + 1)}
    contexts = np.concatenate(list(pairs.values()))
    distance = np.linalg.norm(poses[contexts[:, 0], :3, 3] - poses[contexts[:, 1], :3, 3], axis=1)
    cosine = (poses[contexts[:, 0], :3, 2] * poses[contexts[:, 1], :3, 2]).sum(axis=1)
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    sizes, counts = np.unique(frames.sizes[indices], axis=0, return_counts=True)
    few = indices[np.unique(np.linspace(0, len(indices) - 1, looked_at).round().astype(int))]
    with_mask, with_depth = (_present(files, indices) for files in (frames.mask_files, frames.depth_files))
    compared = np.unique(np.linspace(0, len(indices) - 1, OVERLAP_FRAMES).round().astype(int))
    geometry = scene_geometry(frames, indices[compared], with_depth=bool(with_depth.all()))
    overlaps = overlap_matrix(geometry, None if geometry.depths is not None else 90.0)
    place = np.full(len(indices), -1)
    place[compared] = np.arange(len(compared))
    both = (place[contexts] >= 0).all(axis=1)
    of_contexts = overlaps[place[contexts[both, 0]], place[contexts[both, 1]]]
    histogram = np.histogram(overlaps[np.triu_indices(len(compared), 1)], bins=10, range=(0, 1))[0]
    return SceneStatistics(
        name=frames.scene_names[scene],
        frames=len(indices),
        image_sizes={f"{w}x{h}": int(n) for (h, w), n in zip(sizes, counts)},
        pairs_by_gap={gap: len(found) for gap, found in pairs.items()},
        baselines=_quantiles(distance),
        neighbour_distance=float(np.median(steps)) if len(steps) else 0.0,
        angles=_quantiles(np.degrees(np.arccos(np.clip(cosine, -1, 1)))),
        overlaps=_quantiles(of_contexts.astype(np.float64)),
        overlap_histogram=histogram.tolist(),
        overlap_from="depth" if geometry.depths is not None else "frusta",
        frames_with_mask=float(with_mask.mean()),
        frames_with_depth=float(with_depth.mean()),
        **_mask_facts(frames, [int(i) for i in few if with_mask[indices == i].any()]),
        **_depth_facts(frames, [int(i) for i in few if with_depth[indices == i].any()]),
    )


def _pairs_with_gap(order: Int[np.ndarray, "n"], gap: int) -> Int[np.ndarray, "p 2"]:
    partner = np.searchsorted(order, order + gap)
    found = (partner < len(order)) & (order[np.minimum(partner, len(order) - 1)] == order + gap)
    found &= partner - np.arange(len(order)) > 1
    return np.stack([np.flatnonzero(found), partner[found]], axis=1)


def _quantiles(values: np.ndarray) -> list[float]:
    return [round(float(q), 4) for q in np.quantile(values, QUANTILES)] if len(values) else []


def _present(files: Any, indices: Int[np.ndarray, "n"]) -> np.ndarray:
    if files is None:
        return np.zeros(len(indices), dtype=bool)
    with ThreadPoolExecutor(8) as pool:
        chosen = [files[int(index)] for index in indices]
        return np.array(list(pool.map(lambda file: file is not None and Path(file).is_file(), chosen)))


def _mask_facts(frames: Frames, few: list[int]) -> dict[str, Any]:
    if not few:
        return {"labelled_pixels": None, "regions": None}
    masks = [read_mask(frames.mask_files[index]) for index in few]  # type: ignore
    regions = np.array([len(np.unique(mask[mask != 0])) for mask in masks])
    return {"labelled_pixels": float(np.mean([(mask != 0).mean() for mask in masks])), "regions": _quantiles(regions)}


def _depth_facts(frames: Frames, few: list[int]) -> dict[str, Any]:
    if not few:
        return {"pixels_with_depth": None, "depths": None}
    maps = np.stack([load_depth(frames, index, DEPTH_SIZE) for index in few])
    return {"pixels_with_depth": float((maps > 0).mean()), "depths": _quantiles(maps[maps > 0])}


# ---------------------------------------------------------------------- sizes


def mend_sizes(frames: Frames, indices: Int[np.ndarray, "n"], looked_at: int = 16) -> tuple[Frames, Optional[Verdict]]:
    """Compare the sizes that cameras were calibrated for with those of the image files.

    Args:
        frames: the dataset.
        indices: frames of one scene.
        looked_at: headers that are read, spread evenly.

    Returns:
        The dataset with sizes and intrinsics of the scene as its files want them, and a verdict if they were not so.

    Raises:
        InputError: an image cannot be decoded.
    """
    from PIL import Image

    few = indices[np.unique(np.linspace(0, len(indices) - 1, looked_at).round().astype(int))]
    factors = []
    for index in few.tolist():
        try:
            with open_bytes(frames.image_files[index]) as stream, Image.open(stream) as image:
                stored = np.array([image.height, image.width])
        except InputError:
            raise
        except UNREADABLE as error:
            raise InputError(
                f"Image {frames.image_files[index]} cannot be decoded ({error}): restore it or remove the frame."
            ) from error
        factors.append(stored / frames.sizes[index])
    median = np.median(factors, axis=0)
    if np.allclose(factors, 1.0):
        return frames, None
    first = int(few[int(np.argmax(np.abs(np.log(factors)).max(axis=1)))])
    height, width = (int(n) for n in frames.sizes[first])
    wanted = np.round(median * frames.sizes[first]).astype(int)
    sizes, intrinsics = frames.sizes.copy(), frames.intrinsics.copy()
    found = f"{frames.image_files[first].name} has {wanted[1]}x{wanted[0]} pixels, its camera {width}x{height}"
    if (wanted == [width, height]).all():
        sizes[indices] = sizes[indices][:, ::-1]
        verdict = Verdict(
            "likely",
            f"width and height are swapped: {found}",
            "swapped_size",
            "swap `w` and `h` in the transforms file (or undo the turn of the images)",
        )
    else:
        sizes[indices] = np.round(sizes[indices] * median).astype(sizes.dtype)
        intrinsics[indices] *= np.array([median[1], median[0], 1.0])[:, None]
        uniform = abs(np.log(median[0] / median[1])) < 0.01
        verdict = Verdict(
            "likely",
            f"the images were {'resized' if uniform else 'resized or cropped'} after calibration: {found}",
            "resized_images",
            f"multiply fl_x, fl_y, cx, cy, w and h by {median[1]:.4g}"
            if uniform
            else "give the intrinsics of the images as they are",
        )
    return replace(frames, sizes=sizes, intrinsics=intrinsics), verdict


def statistics_table(statistics: list[SceneStatistics]) -> dict[str, Any]:
    """All scenes as one, for the last row: sums of counts, means of shares weighted by frames."""
    total = sum(scene.frames for scene in statistics)

    def mean(name: str) -> Optional[float]:
        held = [(getattr(scene, name), scene.frames) for scene in statistics if getattr(scene, name) is not None]
        return sum(value * count for value, count in held) / sum(count for _, count in held) if held else None

    def middle(name: str) -> list[float]:
        held = [getattr(scene, name) for scene in statistics if getattr(scene, name)]
        return [round(float(np.median(column)), 4) for column in zip(*held)]

    sizes: dict[str, int] = {}
    gaps: dict[int, int] = {}
    for scene in statistics:
        for size, count in scene.image_sizes.items():
            sizes[size] = sizes.get(size, 0) + count
        for gap, count in scene.pairs_by_gap.items():
            gaps[gap] = gaps.get(gap, 0) + count
    merged = asdict(statistics[0]) | {
        "name": f"all {len(statistics)}",
        "frames": total,
        "image_sizes": sizes,
        "pairs_by_gap": gaps,
        "overlap_histogram": np.sum([scene.overlap_histogram for scene in statistics], axis=0).tolist(),
        "overlap_from": "/".join(sorted({scene.overlap_from for scene in statistics})),
    }
    shares = ("frames_with_mask", "labelled_pixels", "frames_with_depth", "pixels_with_depth")
    for name in ("neighbour_distance", *shares):
        merged[name] = mean(name)
    for name in ("baselines", "angles", "overlaps", "regions", "depths"):
        merged[name] = middle(name)
    return merged
