import colorsys

import cv2
import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.augmentation import (
    IMAGENET_MEAN,
    DepthAugmentation,
    NormalsAugmentation,
    SegmentationAugmentation,
    augment_depth,
    augment_normals,
    augment_segmentation,
    balanced_crop,
    cut_border,
    distort_photometrically,
    flip_average,
    jitter_colours,
    rescaled_size,
    resize_nearest,
    slide,
    window_starts,
)

PLAIN = {"rotate_probability": 0.0, "flip_probability": 0.0, "colour_probability": 0.0}


def generator(seed=0):
    return np.random.default_rng(seed)


def coordinates(height, width):
    """An image that says where each pixel lies (row, column, 0), and a depth map that says the same."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    return image, (1 + rows * 1000 + columns).astype(np.float32)


def places(colours):
    return np.rint(colours * 255).astype(np.int64)


def test_a_depth_crop_is_the_same_part_of_image_and_depth():
    image, depth = coordinates(60, 90)
    starts = set()
    for seed in range(60):
        colours, cropped = augment_depth(image, depth, generator(seed), DepthAugmentation((50, 70), **PLAIN))
        assert colours.shape == (50, 70, 3) and colours.dtype == np.float32 and cropped.shape == (50, 70)
        where = places(colours)
        top, left = where[0, 0, :2]
        assert np.array_equal(where, image[top : top + 50, left : left + 70])
        assert np.array_equal(cropped, depth[top : top + 50, left : left + 70])
        starts.add((top, left))
    # from the first to the last possible row and column
    assert {min(starts)[0], max(starts)[0]} == {0, 10} and len(starts) > 40


def test_depth_is_mirrored_with_its_image_in_half_of_the_cases():
    image, depth = coordinates(20, 30)
    settings = DepthAugmentation((20, 30), rotate_probability=0.0, colour_probability=0.0)
    mirrored = 0
    for seed in range(200):
        colours, found = augment_depth(image, depth, generator(seed), settings)
        flipped = places(colours)[0, 0, 1] == 29
        mirrored += flipped
        assert np.array_equal(found, depth[:, ::-1] if flipped else depth)
    assert 70 < mirrored < 130


def test_depth_is_turned_with_its_image_by_small_angles_and_corners_stay_empty():
    # a smooth ramp in both: wherever depth is known, it says the colour, up to half a pixel
    rows, columns = np.meshgrid(np.arange(100), np.arange(120), indexing="ij")
    ramp = rows + columns
    image = np.repeat(ramp[..., None], 3, axis=2).astype(np.uint8)
    depth = ramp.astype(np.float32) + 1
    settings = DepthAugmentation((100, 120), flip_probability=0.0, colour_probability=0.0, rotate_probability=1.0)
    angles = []
    for seed in range(40):
        colours, found = augment_depth(image, depth, generator(seed), settings)
        assert np.array_equal(found, np.rint(found))  # no depth is mixed of two
        known = found > 0
        inner = cv2.erode(known.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0) > 0
        assert np.abs(colours[inner][:, 0] * 255 + 1 - found[inner]).max() <= 2
        # the slope along a row tells the angle: cos +- sin
        slope = np.polyfit(np.arange(80), places(colours)[50, 20:100, 0], 1)[0]
        angles.append(np.degrees(np.arcsin(np.clip((slope - 1), -1, 1))))
        if abs(angles[-1]) > 1:
            assert not known.all() and (colours[~known] < 1).all()
    assert 1.5 < max(angles) < 2.8 and -2.8 < min(angles) < -1.5


def test_gamma_acts_on_the_scale_to_255_and_is_a_gain():
    def colour(value, **settings):
        image = np.full((4, 4, 3), value, dtype=np.uint8)
        chosen = DepthAugmentation((4, 4), **{**PLAIN, "colour_probability": 1.0}, **settings)
        return augment_depth(image, np.ones((4, 4), np.float32), generator(), chosen)[0] * 255

    # 255^0.9 = 146.5
    assert colour(255, gamma=(0.9, 0.9), brightness=(1.0, 1.0), colour=(1.0, 1.0))[0, 0, 0] == pytest.approx(
        146.5, abs=0.1
    )
    # 10^2 * 0.5 = 50, and 30^2 * 0.5 = 450 is cut off
    assert colour(10, gamma=(2.0, 2.0), brightness=(0.5, 0.5), colour=(1.0, 1.0)).ravel() == pytest.approx(50)
    assert colour(30, gamma=(2.0, 2.0), brightness=(0.5, 0.5), colour=(1.0, 1.0)).ravel() == pytest.approx(255)
    # one factor for all channels, and one for each
    same = colour(100, gamma=(1.0, 1.0), colour=(1.0, 1.0))
    assert np.ptp(same) == 0 and 75 <= same.max() <= 125
    each = colour(100, gamma=(1.0, 1.0), brightness=(1.0, 1.0))
    assert (np.ptp(each, axis=(0, 1)) == 0).all() and np.ptp(each[0, 0]) > 1 and 90 <= each.min() <= each.max() <= 110


def test_colours_are_changed_in_half_of_the_cases_and_depth_never():
    image, depth = coordinates(20, 30)
    settings = DepthAugmentation((20, 30), rotate_probability=0.0, flip_probability=0.0)
    changed = 0
    for seed in range(200):
        colours, found = augment_depth(image, depth, generator(seed), settings)
        changed += not np.array_equal(places(colours), image)
        assert np.array_equal(found, depth)
    assert 70 < changed < 130


def test_the_same_seed_gives_the_same_sample():
    image = generator(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    depth = generator(2).random((60, 80), dtype=np.float32)
    labels = generator(3).integers(0, 5, (60, 80), dtype=np.uint8)
    normals = generator(4).random((60, 80, 3), dtype=np.float32)
    small = SegmentationAugmentation(long_side=160, short_side=40, crop=32)
    runs = [
        lambda g: augment_depth(image, depth, g, DepthAugmentation((50, 70))),
        lambda g: augment_segmentation(image, labels, g, small),
        lambda g: augment_normals(image, normals, depth, g, NormalsAugmentation()),
    ]
    for run in runs:
        samples = [run(generator(seed)) for seed in (5, 5, 6)]
        assert all(np.array_equal(a, b) for a, b in zip(samples[0], samples[1], strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(samples[0], samples[2], strict=True))


def test_borders_of_nyu_and_kitti_are_cut_off():
    image, _ = coordinates(480, 640)
    nyu = cut_border(image, "nyu")
    assert nyu.shape == (427, 565, 3) and np.array_equal(nyu, image[45:472, 43:608])
    _, depth = coordinates(375, 1242)
    kitti = cut_border(depth, "kitti")
    # the lowest 352 of 375 rows; (1242 - 1216) / 2 = 13
    assert np.array_equal(kitti, depth[23:, 13:1229]) and kitti.shape == (352, 1216)
    assert np.array_equal(cut_border(kitti, "kitti"), kitti) and cut_border(depth, "none") is depth


def test_images_that_are_too_small_or_do_not_fit_their_depth_are_refused():
    image, depth = coordinates(40, 50)
    with pytest.raises(InputError, match="40 x 50 pixels is smaller than the training crop of 416 x 544"):
        augment_depth(image, depth, generator(), DepthAugmentation())
    with pytest.raises(InputError, match="40 x 50 pixels has a depth map of 39 x 50: bring them to one size"):
        augment_depth(image, depth[1:], generator(), DepthAugmentation((20, 20)))
    with pytest.raises(InputError, match="40 x 50 pixels has a label map of 39 x 50: bring them to one size"):
        augment_segmentation(image, depth[1:].astype(np.uint8), generator(), SegmentationAugmentation())
    for border in ("nyu", "kitti"):
        with pytest.raises(InputError, match=f"too small for the border crop '{border}'"):
            cut_border(depth, border)


def test_a_part_of_the_normals_is_enlarged_with_its_image_and_depth():
    image, depth = coordinates(120, 120)
    normals = np.stack([depth, -depth, depth], axis=-1)
    settings = NormalsAugmentation(colour_probability=0.0, crop_probability=1.0)
    sides = []
    for seed in range(100):
        colours, found, metres = augment_normals(image, normals, depth, generator(seed), settings)
        where = places(colours)
        # nothing is mixed, and every pixel has the values of one place
        assert np.array_equal(metres, depth[where[..., 0], where[..., 1]])
        assert np.array_equal(found[..., 1], -metres)
        extent = np.ptp(where[..., 0]) + 1, np.ptp(where[..., 1]) + 1
        assert extent[0] == extent[1] and colours.shape == (120, 120, 3)
        sides.append(extent[0])
    # areas from 0.5 to 1: sides from 0.7071 * 120 = 84.9
    assert 85 <= min(sides) <= 88 and 117 <= max(sides) <= 120
    assert np.mean(np.square(sides)) / 120**2 == pytest.approx(0.75, abs=0.04)


def test_parts_of_images_that_are_not_square_stay_inside():
    image, depth = coordinates(60, 100)
    normals = np.repeat(depth[..., None], 3, axis=2)
    settings = NormalsAugmentation(colour_probability=0.0, crop_probability=1.0)
    for seed in range(20):
        colours, _, metres = augment_normals(image, normals, depth, generator(seed), settings)
        assert colours.shape == (60, 100, 3) and metres.min() >= 1


def test_normals_images_stay_as_they_are_without_augmentation():
    image, depth = coordinates(20, 20)
    normals = np.repeat(depth[..., None], 3, axis=2)
    colours, found, metres = augment_normals(image, normals, depth, generator(), NormalsAugmentation(0.0, 0.2, 0.0))
    assert np.array_equal(places(colours), image) and found is normals and metres is depth


def test_jitter_of_grey_changes_brightness_alone():
    grey = np.full((6, 6, 3), 0.5, dtype=np.float32)
    values = []
    for seed in range(200):
        found = jitter_colours(grey, generator(seed), 0.2)
        assert np.ptp(found) < 1e-6
        values.append(found[0, 0, 0])
    # 0.5 times 0.8 to 1.2
    assert 0.4 <= min(values) < 0.405 and 0.595 < max(values) <= 0.6 and abs(np.mean(values) - 0.5) < 0.02


def test_jitter_of_no_strength_changes_nothing_and_hue_turns_by_a_fifth_at_most():
    image = generator(1).random((8, 8, 3), dtype=np.float32)
    assert np.allclose(jitter_colours(image, generator(), 0.0), image, atol=1e-5)
    red = np.zeros((2, 2, 3), dtype=np.float32)
    red[..., 0] = 0.6
    turns = []
    for seed in range(200):
        hue = colorsys.rgb_to_hsv(*jitter_colours(red, generator(seed), 0.2)[0, 0].tolist())[0]
        turns.append((hue + 0.5) % 1 - 0.5)
    assert -0.2 <= min(turns) < -0.19 and 0.19 < max(turns) <= 0.2


@pytest.mark.parametrize(
    ("size", "ratio", "expected"),
    [
        ((584, 876), 1.0, (512, 768)),
        ((480, 640), 1.0, (512, 683)),
        ((640, 480), 1.0, (683, 512)),
        # the longer side has its bound too: 2048 / 3000 of 300 is 204.8
        ((300, 3000), 1.0, (205, 2048)),
        # 0.7 * 512 is 358.4, of which 358 are taken: 640 * 358 / 480 = 477.33
        ((480, 640), 0.7, (358, 477)),
        ((480, 640), 2.0, (1024, 1365)),
    ],
)
def test_images_keep_their_shape_when_they_are_resized(size, ratio, expected):
    assert rescaled_size(size, 2048, 512, ratio) == expected


@pytest.mark.parametrize(("old", "new"), [((48, 64), (51, 68)), ((48, 64), (35, 47)), ((30, 40), (60, 20))])
def test_labels_are_resized_as_opencv_does(old, new):
    labels = generator().integers(0, 256, old, dtype=np.uint8)
    found = resize_nearest(labels, new)
    assert np.array_equal(found, cv2.resize(labels, (new[1], new[0]), interpolation=cv2.INTER_NEAREST))
    wide = resize_nearest(labels.astype(np.int64), new)
    assert wide.dtype == np.int64 and np.array_equal(wide, found)


def dominated(labels, part, ignore=255):
    classes, counts = np.unique(labels[part], return_counts=True)
    counts = counts[classes != ignore]
    return len(counts) < 2 or counts.max() / counts.sum() >= 0.75


def test_crops_that_one_class_dominates_are_drawn_again():
    labels = np.zeros((200, 200), dtype=np.uint8)
    labels[150:, 150:] = 1
    labels[:20] = 255  # does not count
    settings = SegmentationAugmentation(crop=60)
    free = SegmentationAugmentation(crop=60, largest_class=1.0)
    shares = []
    for chosen in (settings, free):
        shares.append(np.mean([dominated(labels, balanced_crop(labels, generator(s), chosen)) for s in range(300)]))
    # a share q of single draws is bad, and q^11 remain: ten that are looked at, and one that is taken
    bad = shares[1]
    assert 0.85 < bad < 0.97 and shares[0] == pytest.approx(bad**11, abs=0.1)


def test_a_hopeless_image_gets_the_eleventh_crop():
    labels = np.zeros((50, 70), dtype=np.uint8)
    drawn, twin = generator(3), generator(3)
    rows, columns = balanced_crop(labels, drawn, SegmentationAugmentation(crop=32))
    for _ in range(11):
        top, left = int(twin.integers(50 - 32 + 1)), int(twin.integers(70 - 32 + 1))
    assert (rows.start, columns.start) == (top, left) and drawn.random() == twin.random()


def test_segmentation_samples_are_padded_with_the_mean_colour_and_ignored_labels():
    image = np.full((40, 60, 3), 200, dtype=np.uint8)
    labels = np.arange(40 * 60).reshape(40, 60) % 3
    settings = SegmentationAugmentation(long_side=240, short_side=40, ratio=(0.5, 0.5), crop=32, flip_probability=0.0)
    colours, found = augment_segmentation(image, labels, generator(), settings)
    # half of 40 x 60 in 32 x 32
    assert colours.shape == (32, 32, 3) and found.shape == (32, 32) and found.dtype == labels.dtype
    assert (found[20:] == 255).all() and (found[:, 30:] == 255).all() and (found[:20, :30] < 3).all()
    mean, deviation = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    assert np.abs((colours[20:] * 255 - mean) / deviation).max() < 1e-5
    assert np.allclose(IMAGENET_MEAN, [0.485, 0.456, 0.406], atol=1e-3)
    assert np.ptp(colours[:20, :30], axis=(0, 1)).max() == 0


def test_labels_stay_with_their_pixels_and_are_mirrored_in_half_of_the_cases():
    rows, columns = np.meshgrid(np.arange(64), np.arange(96), indexing="ij")
    labels = (rows // 16 * 6 + columns // 16).astype(np.uint8)  # 24 squares
    image = np.repeat(labels[..., None] * 10, 3, axis=2)
    mirrored = 0
    for seed in range(80):
        settings = SegmentationAugmentation(384, 64, ratio=(1.0, 1.0), crop=64, largest_class=1.0)
        colours, found = augment_segmentation(image, labels, generator(seed), settings)
        # brighter or darker, more or less contrast: what was brighter still is
        grey = places(colours).mean(axis=2)
        means = [grey[found == label].mean() for label in np.unique(found)]
        assert (np.diff(means) >= 0).all()
        mirrored += found[0, 0] > found[0, -1]
    assert 25 < mirrored < 55


def twin_of_distortion(image, draws):
    """The same changes in the same order by the standard library, pixel by pixel."""

    def scaled(values, factor, offset=0.0):
        return [[min(max(v * factor + offset, 0), 255) // 1 for v in pixel] for pixel in values]

    def in_hsv(values, change):
        found = []
        for pixel in values:
            hsv = change(*colorsys.rgb_to_hsv(*(v / 255 for v in pixel)))
            found.append([255 * v for v in colorsys.hsv_to_rgb(*hsv)])
        return found

    pixels = image.reshape(-1, 3).astype(float).tolist()
    if draws.integers(2):
        pixels = scaled(pixels, 1, draws.uniform(-32, 32))
    contrast = draws.uniform(0.5, 1.5) if draws.integers(2) else 1
    first = draws.integers(2)
    if first:
        pixels = scaled(pixels, contrast)
    if draws.integers(2):
        factor = draws.uniform(0.5, 1.5)
        pixels = in_hsv(pixels, lambda h, s, v: (h, min(s * factor, 1), v))
    if draws.integers(2):
        turn = draws.integers(-18, 18) / 180
        pixels = in_hsv(pixels, lambda h, s, v: ((h + turn) % 1, s, v))
    return pixels if first else scaled(pixels, contrast)


def test_photometric_distortion_is_what_it_says():
    image = generator(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    changed = 0
    for seed in range(64):
        found = distort_photometrically(image.copy(), generator(seed))
        expected = np.array(twin_of_distortion(image, generator(seed))).reshape(6, 8, 3)
        # OpenCV has 180 hues and rounds in between
        assert found.dtype == np.uint8 and np.abs(found - expected).max() < 13
        assert np.abs(found - expected).mean() < 2.5
        changed += not np.array_equal(found, image)
    # nothing at all in one of sixteen cases
    assert 52 <= changed <= 63


def test_windows_end_with_the_image():
    assert window_starts(768, 512, 341) == [0, 256] and window_starts(683, 512, 341) == [0, 171]
    assert window_starts(512, 512, 341) == [0] and window_starts(300, 512, 341) == [0]
    # 341 + 512 = 853 is covered by two
    assert window_starts(853, 512, 341) == [0, 341] and window_starts(854, 512, 341) == [0, 341, 342]
    assert window_starts(1400, 512, 341) == [0, 341, 682, 888]


def test_overlapping_windows_are_averaged():
    seen = []

    def predict(images):
        seen.append(tuple(images.shape[-2:]))
        return torch.full((1, 2, *images.shape[-2:]), float(len(seen)))

    found = slide(torch.zeros(1, 3, 6, 10), predict, window=6, stride=4)[0, 0]
    # two windows: columns 0 to 5 and 4 to 9
    assert seen == [(6, 6), (6, 6)]
    assert found[3].tolist() == [1, 1, 1, 1, 1.5, 1.5, 2, 2, 2, 2]


def test_windows_see_their_part_of_the_image_and_put_it_back_there():
    images = torch.randn(2, 3, 37, 53, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for window, stride in ((16, 11), (16, 16), (40, 30), (64, 42)):
        shapes = []
        found = slide(images, lambda x, shapes=shapes: shapes.append(x.shape[-2:]) or 2 * x, window, stride)
        torch.testing.assert_close(found, 2 * images)
        assert set(shapes) == {(min(window, 37), min(window, 53))}


def test_predictions_of_the_mirror_image_are_mirrored_back_and_averaged():
    images = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    # what depends on the image alone stays
    torch.testing.assert_close(flip_average(images, lambda x: x[:, 0]), images[:, 0])
    torch.testing.assert_close(flip_average(images, lambda x: x), images)
    # what depends on the place is averaged with its mirror image: columns 0 to 5 become 2.5
    columns = torch.arange(6.0).expand(2, 4, 6)
    assert (flip_average(images, lambda x: columns) == 2.5).all()
