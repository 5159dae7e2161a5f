import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation, label

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.masks.superpixels import (
    SuperpixelSegmenter,
    SuperpixelSettings,
    fill_depth,
    superpixels,
    surface_normals,
)

INTRINSICS = np.array([[60.0, 0, 42], [0, 60.0, 28], [0, 0, 1]])
SMALL = SuperpixelSettings(regions=24)


def achievable_accuracy(regions, instances):
    """Share of the pixels that are right if every region gets the instance that most of its pixels have."""
    pairs, counts = np.unique(regions * 100_000 + instances, return_counts=True)
    best = {}
    for region, count in zip(pairs // 100_000, counts, strict=True):
        best[region] = max(best.get(region, 0), count)
    return sum(best.values()) / instances.size


def borders(ids):
    found = np.zeros(ids.shape, bool)
    found[:, :-1] |= ids[:, :-1] != ids[:, 1:]
    found[:-1] |= ids[:-1] != ids[1:]
    return found


def boundary_recall(regions, instances, reach=1):
    """Share of the instances' borders that lie on a region's border, within some pixels."""
    wanted = borders(instances)
    return (binary_dilation(borders(regions), iterations=reach) & wanted).sum() / wanted.sum()


def cells(height, width, count):
    """Plain grid cells, about so many."""
    rows = round((count * height / width) ** 0.5)
    columns = round(count / rows)
    return (np.arange(height) * rows // height)[:, None] * columns + np.arange(width) * columns // width + 1


def test_regions_keep_to_an_edge_of_colour():
    image = np.full((56, 84, 3), 90, np.uint8)
    image[:, 37:] = (160, 60, 60)  # no grid line of 6 columns of 14 pixels
    sides = np.zeros((56, 84), np.int64)
    sides[:, 37:] = 1
    regions = superpixels(image, None, INTRINSICS, SMALL)
    assert achievable_accuracy(regions, sides) > 0.98 and boundary_recall(regions, sides) == 1
    sharp = superpixels(image, None, INTRINSICS, replace(SMALL, smoothing=0.0))
    assert achievable_accuracy(sharp, sides) == 1
    assert achievable_accuracy(cells(56, 84, 24), sides) < 0.97


def step_in_depth():
    image = np.full((56, 84, 3), 120, np.uint8)
    depth = np.full((56, 84), 2.0)
    depth[:, 37:] = 3.0
    return image, depth, (depth > 2.5).astype(np.int64)


def test_regions_keep_to_an_edge_of_depth_where_colours_are_alike():
    image, depth, sides = step_in_depth()
    assert achievable_accuracy(superpixels(image, depth, INTRINSICS, SMALL), sides) > 0.95
    blind = superpixels(image, None, INTRINSICS, SMALL)
    unweighted = superpixels(image, depth, INTRINSICS, replace(SMALL, depth_weight=0.0, normal_weight=0.0))
    assert np.array_equal(blind, unweighted) and achievable_accuracy(blind, sides) < 0.94


def test_holes_in_depth_are_no_edges():
    image, depth, sides = step_in_depth()
    depth[np.random.default_rng(0).random(depth.shape) < 0.3] = 0
    assert achievable_accuracy(superpixels(image, depth, INTRINSICS, SMALL), sides) > 0.94
    nothing = superpixels(image, np.zeros_like(depth), INTRINSICS, SMALL)
    assert np.array_equal(nothing, superpixels(image, None, INTRINSICS, SMALL))


def test_regions_keep_to_a_crease_that_only_normals_show():
    # two walls meet in column 37: depth is continuous, its slope is not
    image = np.full((56, 84, 3), 120, np.uint8)
    columns = np.abs(np.arange(84) + 0.5 - 37)
    depth = np.broadcast_to(2.5 / (1 + 0.012 * columns), (56, 84)).copy()
    sides = np.broadcast_to((np.arange(84) >= 37).astype(np.int64), (56, 84))
    with_normals = superpixels(image, depth, INTRINSICS, replace(SMALL, depth_weight=0.0, normal_weight=30.0))
    assert achievable_accuracy(with_normals, sides) > 0.98
    assert achievable_accuracy(superpixels(image, depth, INTRINSICS, replace(SMALL, normal_weight=0.0)), sides) < 0.94


def test_normals_of_a_slanted_plane():
    # the plane n . x = -2 with the normal n = (0.6, 0, -0.8): z = -2 / (n . ray)
    columns, rows = np.meshgrid(np.arange(84) + 0.5, np.arange(56) + 0.5)
    rays = np.stack([(columns - 42) / 60, (rows - 28) / 60, np.ones_like(rows)], axis=-1)
    normal = np.array([0.6, 0.0, -0.8])
    found = surface_normals(-2 / (rays @ normal), INTRINSICS)
    np.testing.assert_allclose(found[2:-2, 2:-2], np.broadcast_to(normal, (52, 80, 3)), atol=1e-6)


def test_holes_are_filled_from_the_nearest_measurement():
    depth = np.zeros((20, 20))
    depth[:, :8], depth[:, 14:] = 1.0, 3.0
    filled = fill_depth(depth)
    assert (filled[:, :10] == 1).all() and (filled[:, 12:] == 3).all()


def test_regions_follow_the_instances_of_rooms(rooms):
    scene = rooms / "scenes" / "room_0000"
    content = json.loads((scene / "transforms_train.json").read_text())
    matrix = np.array([[content["fl_x"], 0, content["cx"]], [0, content["fl_y"], content["cy"]], [0, 0, 1]])
    scores = []
    for name in ("DSC00001", "DSC00020", "DSC00040"):
        (photo,) = (scene / "images").glob(f"{name}.*")
        image = np.asarray(Image.open(photo))
        instances = np.asarray(Image.open(scene / "instance_segmentation" / f"{photo.name}.png")).astype(np.int64)
        depth = np.asarray(Image.open(scene / "depth" / f"{name}.png")) / 1000
        regions = superpixels(image, depth, matrix, SuperpixelSettings(regions=80))
        plain = cells(*instances.shape, len(np.unique(regions)))
        scores.append([f(ids, instances) for ids in (regions, plain) for f in (achievable_accuracy, boundary_recall)])
    accuracy, recall, plain_accuracy, plain_recall = np.mean(scores, axis=0)
    assert accuracy > 0.85 and recall > 0.7, (accuracy, recall)
    assert plain_accuracy < 0.8 and plain_recall < 0.55, (plain_accuracy, plain_recall)


def blobs():
    few = np.random.default_rng(2).integers(0, 255, (7, 11, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(few).resize((84, 56), Image.Resampling.BICUBIC))


def test_regions_are_connected_numbered_from_one_and_always_the_same():
    segmenter = SuperpixelSegmenter(SMALL)
    regions = segmenter.segment(blobs(), None, INTRINSICS)
    assert np.array_equal(np.unique(regions), np.arange(1, regions.max() + 1)) and 10 < regions.max() <= 30
    assert all(label(regions == region)[1] == 1 for region in range(1, regions.max() + 1))
    assert np.array_equal(regions, segmenter.segment(blobs(), None, INTRINSICS))
    flat = segmenter.segment(np.full((56, 84, 3), 7, np.uint8), None, INTRINSICS)
    assert flat.max() > 10  # nothing to follow: a grid


def test_more_regions_and_more_even_ones():
    few, many = (superpixels(blobs(), None, INTRINSICS, SuperpixelSettings(regions=n)) for n in (20, 80))
    assert many.max() > 2 * few.max()
    loose, tight = (superpixels(blobs(), None, INTRINSICS, replace(SMALL, compactness=c)) for c in (3.0, 60.0))
    uneven = [np.std(sizes) / np.mean(sizes) for sizes in (np.bincount(ids.ravel())[1:] for ids in (loose, tight))]
    assert uneven[1] < 0.7 * uneven[0]


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"regions": 1}, "superpixels.regions 1"),
        ({"regions": 70_000}, "superpixels.regions 70000"),
        ({"compactness": 0.0}, "superpixels.compactness 0"),
        ({"depth_weight": -1.0}, "superpixels.depth-weight -1"),
        ({"smoothing": float("nan")}, "superpixels.smoothing nan"),
    ],
)
def test_settings_without_sense_are_refused_by_name(wrong, named):
    with pytest.raises(InputError, match=named):
        SuperpixelSegmenter(SuperpixelSettings(**wrong))


def test_nothing_heavy_is_imported_before_it_is_needed():
    import subprocess
    import sys

    heavy = ("skimage", "transformers", "scipy")
    program = f"import sys, snd_nerfstudio.scenes.masks.maker; print([m for m in {heavy} if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert printed.strip() == "[]"
