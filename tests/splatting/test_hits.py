"""What all CPU paths have in common: projection, tiles, the order of depths, and the weights."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.splatting.hits import (
    Footprints,
    depth_bits,
    falloff,
    find_tiles,
    footprints_of,
    front_to_back,
    project_footprints,
    tile_areas,
)
from snd_nerfstudio.splatting.projection import FAR, MAX_ALPHA, MIN_ALPHA, MIN_TRANSMITTANCE, NEAR, project_gaussians

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
SCENES = {
    "ordinary": {"n": 3000, "height": 61, "width": 93},
    "large Gaussians": {"n": 500, "size": 12.0, "seed": 1},
    "tiny Gaussians": {"n": 2000, "size": 0.01, "seed": 2},
    "opaque": {"n": 1000, "opacity": 1.0, "seed": 3},
    "at the edge of visibility": {"n": 1000, "opacity": 1.001 / 255, "seed": 4},
    "a single pixel": {"n": 300, "height": 1, "width": 1, "size": 3.0, "seed": 5},
    "fewer than a block": {"n": 5, "seed": 6},
}


def box_set(footprints):
    return footprints.boxes[:, 2] > footprints.boxes[:, 0]


def projected_by_torch(gaussians, camera):
    twin = project_gaussians(gaussians, camera)
    return footprints_of(twin.means2d, twin.conics, twin.depths, twin.boxes, gaussians.opacities)


# ---------------------------------------------------------------------- projection


@DTYPES
@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_the_compiled_projection_is_the_differentiable_one(random_scene, scene, dtype):
    gaussians, camera, _ = random_scene(**scene, dtype=dtype)
    found, twin = project_footprints(gaussians, camera, NEAR, FAR), projected_by_torch(gaussians, camera)
    assert found.records.dtype == twin.records.dtype and found.boxes.dtype == twin.boxes.dtype == np.int32
    visible = box_set(found) & box_set(twin)
    assert visible.sum() > 0
    np.testing.assert_array_equal(found.records[visible], twin.records[visible])
    # A margin is rounded to the other side now and then: a column more or less, in which nothing is hit.
    difference = np.abs(found.boxes[visible] - twin.boxes[visible])
    assert difference.max() <= 1 and (difference > 0).any(axis=1).mean() < 0.01
    assert (box_set(found) != box_set(twin)).mean() < 0.01
    hidden = ~box_set(found)
    assert hidden.any() or len(gaussians) < 10
    assert not found.boxes[hidden].any()


@DTYPES
def test_boxes_lie_within_the_image(random_scene, dtype):
    gaussians, camera, _ = random_scene(n=2000, size=5.0, dtype=dtype)
    boxes = project_footprints(gaussians, camera, NEAR, FAR).boxes
    assert (boxes >= 0).all() and (boxes[:, 2] <= camera.width).all() and (boxes[:, 3] <= camera.height).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()


@DTYPES
def test_one_thread_and_all_threads_project_to_the_same_bits(random_scene, dtype):
    gaussians, camera, _ = random_scene(n=1001, dtype=dtype)
    threads = numba.get_num_threads()
    everything = project_footprints(gaussians, camera, NEAR, FAR)
    try:
        numba.set_num_threads(1)
        alone = project_footprints(gaussians, camera, NEAR, FAR)
    finally:
        numba.set_num_threads(threads)
    assert np.array_equal(everything.boxes, alone.boxes)
    assert np.array_equal(everything.records, alone.records, equal_nan=True)


def frontal(means, camera_size=(20, 30), scales=0.05, opacities=0.5, quats=(1.0, 0, 0, 0)):
    """Gaussians before an unrotated camera at the origin with a focal length of 25 pixels."""
    means = torch.tensor(means, dtype=torch.float64)
    n = len(means)
    height, width = camera_size
    intrinsics = torch.tensor([[25.0, 0, width / 2], [0, 25.0, height / 2], [0, 0, 1]], dtype=torch.float64)
    gaussians = Gaussians(
        means,
        torch.tensor(quats, dtype=torch.float64).expand(n, 4),
        torch.full((n, 3), scales, dtype=torch.float64),
        torch.full((n,), opacities, dtype=torch.float64),
    )
    return gaussians, PinholeCamera(torch.eye(4, dtype=torch.float64), intrinsics, height, width)


def test_what_cannot_be_seen_has_an_empty_box():
    gaussians, camera = frontal(
        [[0, 0, 2.0], [0, 0, -2.0], [0, 0, 0.005], [0, 0, 0.0], [0, 0, 50.0], [9.0, 0, 2.0], [0, -9.0, 2.0]]
    )
    boxes = project_footprints(gaussians, camera, NEAR, 40.0).boxes
    assert (boxes[0, 2:] > boxes[0, :2]).all() and not boxes[1:].any()


def test_a_zero_quaternion_means_no_rotation_and_length_does_not_matter():
    base, camera = frontal([[0.1, 0.2, 2.0]])
    expected = project_footprints(base, camera, NEAR, FAR)
    for quats in ([0.0, 0, 0, 0], [-1.0, 0, 0, 0], [0.25, 0, 0, 0]):
        gaussians, _ = frontal([[0.1, 0.2, 2.0]], quats=quats)
        assert np.array_equal(project_footprints(gaussians, camera, NEAR, FAR).records, expected.records)


def test_an_overflow_or_a_nan_hides_a_gaussian():
    gaussians, camera = frontal([[0, 0, 2.0]] * 4)
    gaussians.scales[1] = 1e160
    gaussians.means[2, 0] = float("nan")
    gaussians.opacities[3] = float("nan")
    boxes = project_footprints(gaussians, camera, NEAR, FAR).boxes
    assert boxes[0].any() and not boxes[1:].any()


@pytest.mark.parametrize("opacity", [0.0, 0.5 / 255, 0.999 / 255], ids=str)
def test_a_gaussian_fainter_than_a_grey_level_has_an_empty_box(opacity):
    gaussians, camera = frontal([[0, 0, 2.0]], opacities=opacity)
    assert not project_footprints(gaussians, camera, NEAR, FAR).boxes.any()


# ---------------------------------------------------------------------- tiles


def random_boxes(n, height, width, seed=0):
    """One in five is empty."""
    random = np.random.default_rng(seed)
    first_x, first_y = random.integers(0, width, n), random.integers(0, height, n)
    end_x = first_x + 1 + random.integers(0, width - first_x)
    end_y = first_y + 1 + random.integers(0, height - first_y)
    boxes = np.stack([first_x, first_y, end_x, end_y], axis=1).astype(np.int32)
    boxes[random.random(n) < 0.2] = 0
    return boxes


@pytest.mark.parametrize("threads", ["all threads", "one thread"])
@pytest.mark.parametrize("tile_size", [16, 48])
@pytest.mark.parametrize(
    ("n", "height", "width"), [(500, 61, 93), (500, 16, 16), (3, 50, 97), (200, 1, 70), (0, 20, 20)], ids=str
)
def test_a_tile_holds_the_gaussians_whose_boxes_overlap_it(n, height, width, tile_size, threads):
    boxes = random_boxes(n, height, width)
    footprints = Footprints(np.zeros((n, 8), np.float32), boxes)
    before = numba.get_num_threads()
    try:
        if threads == "one thread":
            numba.set_num_threads(1)
        tiles = find_tiles(footprints, height, width, tile_size)
    finally:
        numba.set_num_threads(before)
    areas = tile_areas(*tiles, boxes, height, width, tile_size)
    across, down = -(-width // tile_size), -(-height // tile_size)
    assert tiles.starts.shape == (across * down + 1,) and tiles.starts[0] == 0
    assert tiles.starts[-1] == len(tiles.gaussians)
    inside = np.zeros((n, height, width), bool)
    for g, (first_x, first_y, end_x, end_y) in enumerate(boxes):
        inside[g, first_y:end_y, first_x:end_x] = True
    for tile in range(across * down):
        y, x = tile // across * tile_size, tile % across * tile_size
        pixels = inside[:, y : y + tile_size, x : x + tile_size].sum(axis=(1, 2))
        members = tiles.gaussians[tiles.starts[tile] : tiles.starts[tile + 1]]
        np.testing.assert_array_equal(members, np.flatnonzero(pixels))  # ascending
        assert areas[tile] == pixels.sum()


# ---------------------------------------------------------------------- the order of depths


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("depths", ["any", "many ties", "all equal", "nearly equal", "none"])
def test_depths_are_sorted_front_to_back_and_ties_by_index(depths, dtype):
    random = np.random.default_rng(0)
    values = {
        "any": 10.0 ** random.uniform(-2, 10, 4000),
        "many ties": random.integers(1, 20, 4000) / 3,
        "all equal": np.full(50, 1.7),
        "nearly equal": 2.0 + np.finfo(dtype).eps * 2 * random.integers(0, 50, 4000),
        "none": np.zeros(0),
    }[depths].astype(dtype)
    records = np.zeros((len(values), 8), dtype)
    records[:, 7] = values
    bits = depth_bits(Footprints(records, np.zeros((len(values), 4), np.int32)))
    assert bits.itemsize == values.itemsize
    np.testing.assert_array_equal(front_to_back(bits[:, 7].copy()), np.argsort(values, kind="stable"))


# ---------------------------------------------------------------------- weights


@numba.njit
def _falloffs(exponents):
    values = np.empty_like(exponents)
    for i in range(exponents.size):
        values[i] = falloff(exponents[i])
    return values


@pytest.mark.parametrize(
    ("limit", "error"),
    [(0.5, 3e-7), (math.log(255), 6e-7), (10.0, 7e-7)],
    ids=["small exponents", "all that an alpha can have", "up to 10"],
)
def test_in_float32_the_falloff_is_the_exponential_but_for_rounding(limit, error):
    # The polynomial is good to 2e-7; rounding of exponent / ln 2 is worth half a unit in its last place more.
    exponents = np.concatenate([np.linspace(0, limit, 300_001), np.geomspace(1e-30, limit, 10_001)])
    exponents = exponents.astype(np.float32)
    found, expected = _falloffs(exponents), np.exp(-exponents.astype(np.float64))
    assert found.dtype == np.float32
    assert np.abs(found / expected - 1).max() < error


def test_in_float64_the_falloff_is_the_exponential():
    exponents = np.linspace(0, 80, 10_001)
    np.testing.assert_allclose(_falloffs(exponents), np.exp(-exponents), rtol=1e-15)
    assert falloff(1.5) == math.exp(-1.5)


def composited_one_by_one(records, order, y, x):
    """Weights of all Gaussians at one pixel in Python floats, from their records alone; no box, no tile."""
    transmittance, weights = 1.0, np.zeros(len(records))
    for g in order:
        mean_x, mean_y, half_xx, xy, half_yy, opacity, _, _ = (float(value) for value in records[g])
        dx, dy = mean_x - x, mean_y - y
        alpha = min(MAX_ALPHA, opacity * math.exp(-(half_xx * dx * dx + xy * dx * dy + half_yy * dy * dy)))
        if alpha < MIN_ALPHA:
            continue
        if transmittance * (1 - alpha) <= MIN_TRANSMITTANCE:
            break  # for good: not even a fainter one is taken afterwards
        weights[g] = alpha * transmittance
        transmittance *= 1 - alpha
    return weights


@pytest.mark.parametrize(
    "scene",
    [
        {"n": 200, "height": 20, "width": 37, "size": 0.7},
        {"n": 300, "height": 17, "width": 35, "size": 1.0, "opacity": 0.98, "seed": 1},
        {"n": 100, "height": 33, "width": 20, "opacity": 1.0, "size": 0.3, "seed": 2},
    ],
    ids=["any opacity", "finished pixels", "fully opaque"],
)
def test_the_engines_weights_are_those_of_compositing_one_by_one(random_scene, scene):
    gaussians, camera, _ = random_scene(**scene)
    footprints = project_footprints(gaussians, camera, NEAR, FAR)
    boxes = footprints.boxes
    seen = np.flatnonzero(box_set(footprints))
    order = seen[np.argsort(footprints.records[seen, 7], kind="stable")]
    weights = rasterize(gaussians, camera, torch.eye(len(gaussians), dtype=torch.float64)).features.numpy()
    for y in range(0, camera.height, 3):
        for x in range(camera.width):
            # gsplat's rule of 16-pixel tiles is part of the boxes, not of the records
            within = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
            expected = composited_one_by_one(footprints.records, order[within[order]], y, x)
            np.testing.assert_allclose(weights[y, x], expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_functions_are_not_taken_from_before_a_change_of_what_is_compiled_into_them(tmp_path):
    """numba itself looks at the file of the outer function alone."""
    package = Path(__file__).parents[2] / "snd_nerfstudio"
    copy = tmp_path / "snd_nerfstudio"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numpy as np\n"
        "from snd_nerfstudio.splatting import hits\n"
        "import snd_nerfstudio.supervision.token_kernel as kernel\n"
        "labels = np.zeros((3, 3), np.int32)\n"
        "print(hits.SHARED_SOURCES[:8], kernel.uniform_reach(labels)[0, 0])\n"
        "print(sum(kernel.uniform_reach.stats.cache_hits.values()))\n"
    )

    def run() -> list[str]:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
        return done.stdout.split()

    first, again = run(), run()
    assert first[:2] == again[:2] and first[2] == "0" and again[2] == "1"
    file = copy / "splatting" / "hits.py"
    file.write_text(file.read_text() + "\n# changed\n")
    changed = run()
    assert changed[0] != first[0] and changed[1] == first[1] and changed[2] == "0"
