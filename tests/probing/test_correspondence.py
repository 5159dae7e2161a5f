import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import correspondence
from snd_nerfstudio.probing.correspondence import (
    NAVI,
    PROTOCOLS,
    CorrespondenceSettings,
    PairErrors,
    evaluate_pairs,
    pair_errors,
    rotation_angle,
    summarize,
)
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings

WALL = 2.0
"""Distance of the wall that the cameras face, metres."""


def pinhole(height, width, focal):
    return torch.tensor([[focal, 0.0, width / 2], [0.0, focal, height / 2], [0.0, 0.0, 1.0]])


def moved(x=0.0, y=0.0, z=0.0, turn=0.0):
    pose = torch.eye(4, dtype=torch.float64)
    angle = np.radians(turn)
    pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    pose[:3, 3] = torch.tensor([x, y, z])
    return pose


def one_hot_map(height, width, pixels):
    """Each of height x width tokens has a feature of its own."""
    return FeatureMap(torch.eye(height * width).reshape(-1, height, width), (pixels, pixels), (pixels, pixels))


def on_sphere(points):
    """Points of space on the unit sphere in four dimensions: different points, different directions."""
    squared = (points**2).sum(dim=-1, keepdim=True)
    return torch.cat([2 * points, squared - 1], dim=-1) / (squared + 1)


def world_features(depth, intrinsics, camera_to_world):
    """The best features there are: for each pixel, where what it shows is in the world."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width] + 0.5
    rays = np.linalg.inv(intrinsics.double().numpy()) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
    local = rays * depth.double().numpy().ravel()
    points = camera_to_world[:3, :3] @ torch.from_numpy(local) + camera_to_world[:3, 3:]
    features = on_sphere(points.T).T.reshape(4, height, width).float()
    return FeatureMap(features, (height, width), (height, width))


def wall_pair(height=24, width=32, shift=0.2, focal=30.0):
    """Two cameras side by side before a wall; at scale 1 a point moves by focal * shift / 2 pixels."""
    depth, matrix = torch.full((height, width), WALL), pinhole(height, width, focal)
    maps = tuple(world_features(depth, matrix, moved(x)) for x in (0.0, shift))
    return maps, (depth, depth), (matrix, matrix), moved(-shift)


EVERY_PIXEL = CorrespondenceSettings(scale=1.0, matches=400)


# ---------------------------------------------------------------------- one pair


def test_the_errors_of_matches_between_the_same_pixels_by_hand():
    # 8 x 8 depth maps on a grid of 2 x 2; every token matches the one at its own place, but the camera has moved by
    # half a metre: the focal length 16 is 4 there, so a point at depth 2 is 4 * 0.5 / 2 = 1 pixel of the grid off
    maps = one_hot_map(2, 2, 8), one_hot_map(2, 2, 8)
    depth, matrix = torch.full((8, 8), 2.0), pinhole(8, 8, 16.0)
    found = pair_errors(maps, (depth, depth), (matrix, matrix), moved(x=-0.5))
    assert found.pixels.tolist() == pytest.approx([1.0] * 4) and found.metres.tolist() == pytest.approx([0.5] * 4)
    assert found.points == (4, 4) and found.angle == 0
    # twice as large in the pixels of half the resolution
    half = replace(PROTOCOLS["fixed"], scale=0.5)
    maps = one_hot_map(4, 4, 8), one_hot_map(4, 4, 8)
    found = pair_errors(maps, (depth, depth), (matrix, matrix), moved(x=-0.5), half)
    assert found.pixels.tolist() == pytest.approx([2.0] * 16)


def test_the_pose_leads_from_the_first_camera_to_the_second():
    # forward by one metre: a point at depth 2 and (u - cx) = 1 of the first image, with focal length 2 at x = 1, is
    # then at depth 1 and x / z = 1, that is (u - cx) = 2: one pixel further out in x and in y, sqrt 2 in all
    maps = one_hot_map(2, 2, 2), one_hot_map(2, 2, 2)
    depth, matrix = torch.full((2, 2), 2.0), pinhole(2, 2, 1.0)
    settings = CorrespondenceSettings(scale=1.0)
    found = pair_errors(maps, (depth, depth), (matrix, matrix), moved(z=-1.0), settings)
    # pixels are half a pixel from the middle: 0.5 becomes 1, off by 0.5 in x and y
    assert found.pixels.tolist() == pytest.approx([0.5**0.5] * 4)
    assert found.metres.tolist() == pytest.approx([1.0] * 4)


def test_a_point_behind_the_second_camera_is_never_right():
    maps = one_hot_map(2, 2, 2), one_hot_map(2, 2, 2)
    depth, matrix = torch.full((2, 2), 2.0), pinhole(2, 2, 1.0)
    found = pair_errors(maps, (depth, depth), (matrix, matrix), moved(z=-3.5), CorrespondenceSettings(scale=1.0))
    assert found.pixels.isfinite().all() and (found.pixels > 1e6).all()


@pytest.mark.parametrize(("resize", "corner", "middle"), [("parity", 0, 0.5), ("exact", 2, 0.625)])
def test_depth_of_which_of_sixteen_pixels_is_taken_and_where_it_is(resize, corner, middle):
    # 480 x 640 becomes 120 x 160; only pixels at multiples of four, plus 0 or plus 2, have depth
    depth = torch.zeros(480, 640)
    depth[corner::4, corner::4] = 3.0
    settings = CorrespondenceSettings(depth_resize=resize)
    where, points, scaled = correspondence._lift(depth, pinhole(480, 640, 577.0), settings)
    assert len(where) == 120 * 160 == 19200
    assert where[0].tolist() == [middle, middle] and where[-1].tolist() == [159 + middle, 119 + middle]
    # focal length 577 / 4, principal point 80, 60; the third row is not scaled
    torch.testing.assert_close(scaled, torch.tensor([[144.25, 0, 80], [0, 144.25, 60], [0, 0, 1.0]]))
    expected = [3 * (middle - 80) / 144.25, 3 * (middle - 60) / 144.25, 3.0]
    assert points[0].tolist() == pytest.approx(expected, rel=1e-5)
    other = CorrespondenceSettings(depth_resize="exact" if resize == "parity" else "parity")
    assert len(correspondence._lift(depth, pinhole(480, 640, 577.0), other)[0]) == 0


def test_padding_is_left_out_or_taken_for_image_as_in_the_released_code():
    # 480 x 640 padded to 490 x 644: 5 rows above, 2 columns left. Features are the padded image's own coordinates
    y, x = torch.meshgrid((torch.arange(35) + 0.5) * 14, (torch.arange(46) + 0.5) * 14, indexing="ij")
    fmap = FeatureMap(torch.stack([x, y]), (480, 640), (490, 644))
    where = torch.tensor([[80.0, 60.0], [10.0, 10.0], [150.0, 110.0]])  # in the 120 x 160 grid
    exact = correspondence._sample(fmap, where, (480, 640), CorrespondenceSettings(pad_crop="exact"))
    torch.testing.assert_close(exact, 4 * where + torch.tensor([2.0, 5.0]))
    parity = correspondence._sample(fmap, where, (480, 640), CorrespondenceSettings(pad_crop="parity"))
    torch.testing.assert_close(parity, where * torch.tensor([644 / 160, 490 / 120]))
    # the middle is right, towards the borders up to 2 and 5 pixels are missing
    assert (parity - exact)[0].abs().max() < 1e-3 and (parity - exact)[1].tolist() == pytest.approx(
        [-1.75, -25 / 6], 1e-3
    )


def test_pixels_without_depth_take_no_part():
    maps, depths, matrices, pose = wall_pair()
    holes = depths[0].clone()
    holes[:12] = 0
    found = pair_errors(maps, (holes, depths[1]), matrices, pose, replace(EVERY_PIXEL, matches=10_000))
    assert found.points == (12 * 32, 24 * 32) and len(found.pixels) == 12 * 32


def test_perfect_features_find_every_point_that_both_see():
    # the wall moves by 30 * 0.2 / 2 = 3 whole pixels: 29 of 32 columns are in both images, and match exactly
    maps, depths, matrices, pose = wall_pair()
    errors = pair_errors(maps, depths, matrices, pose, replace(EVERY_PIXEL, matches=24 * 29))
    assert errors.pixels.max() < 1e-3 and errors.metres.max() < 1e-4 and len(errors.pixels) == 24 * 29
    result = summarize([errors], EVERY_PIXEL)
    assert result.pixels == {"5": 100.0, "10": 100.0, "20": 100.0}
    assert result.centimetres == {"1": 100.0, "2": 100.0, "5": 100.0}


def test_a_mirrored_map_and_a_shifted_map_are_punished():
    maps, depths, matrices, pose = wall_pair()
    settings = replace(EVERY_PIXEL, matches=24 * 20)
    mirrored = replace(maps[1], values=maps[1].values.flip(2))
    found = summarize([pair_errors((maps[0], mirrored), depths, matrices, pose, settings)], settings)
    # right only within 5 pixels if the mirror image is, that is within 2.5 of the middle: 5 of some 29 columns
    assert found.pixels["5"] < 30 and found.centimetres["5"] < 10
    shifted = replace(maps[1], values=maps[1].values.roll(7, dims=2))
    errors = pair_errors((maps[0], shifted), depths, matrices, pose, settings)
    found = summarize([errors], settings)
    assert errors.pixels.median() == pytest.approx(7, abs=1e-3)
    assert found.pixels["5"] < 5 and found.pixels["10"] > 90 and found.centimetres["5"] < 5


def test_fewer_points_than_wanted_matches_are_all_kept_and_no_depth_is_no_match():
    maps = one_hot_map(4, 4, 16), one_hot_map(4, 4, 16)
    depth, matrix = torch.full((16, 16), 2.0), pinhole(16, 16, 16.0)
    few = pair_errors(maps, (depth, depth), (matrix, matrix), moved())
    assert len(few.pixels) == 16 < PROTOCOLS["paper"].matches
    none = pair_errors(maps, (depth, torch.zeros(16, 16)), (matrix, matrix), moved())
    assert len(none.pixels) == 0 and none.points == (16, 0)
    single = torch.zeros(16, 16)
    single[2, 2] = 2.0
    assert len(pair_errors(maps, (depth, single), (matrix, matrix), moved()).pixels) == 16
    result = summarize([few, none], PROTOCOLS["paper"])
    assert (result.pairs, result.pairs_with_fewer_matches, result.pairs_without_matches) == (2, 1, 1)
    assert result.matches == 16 and [pair.recall for pair in result.each] == [100.0, None]


def test_a_thousand_matches_are_kept():
    depth, matrix = torch.full((120, 160), 2.0), pinhole(120, 160, 100.0)
    values = torch.randn(8, 30, 40, generator=torch.Generator().manual_seed(0))
    fmap = FeatureMap(values, (120, 160), (120, 160))
    found = pair_errors((fmap, fmap), (depth, depth), (matrix, matrix), moved(), PROTOCOLS["paper"])
    assert found.points == (1200, 1200) and len(found.pixels) == 1000


def slow_errors(maps, depths, matrices, pose, settings):
    """One pixel after the other, in double precision and without torch."""
    scale, parity = settings.scale, settings.pad_crop == "parity"
    pixels = []
    for fmap, depth, matrix in zip(maps, depths, matrices):
        values, inverse = fmap.values.double().numpy(), np.linalg.inv(matrix.double().numpy())
        (image_h, image_w), (padded_h, padded_w) = fmap.image_size, fmap.padded_size
        found = []
        for row in range(int(depth.shape[0] * scale)):
            for column in range(int(depth.shape[1] * scale)):
                u, v = (column + 0.5) / scale, (row + 0.5) / scale  # pixels of the depth map
                z = float(depth[int(row / scale), int(column / scale)])
                if settings.depth_resize == "exact":
                    z = float(depth[int(v), int(u)])
                    u, v = int(u) + 0.5, int(v) + 0.5
                if z <= 0:
                    continue
                x, y = u / depth.shape[1] * padded_w, v / depth.shape[0] * padded_h
                if not parity:
                    x = u / depth.shape[1] * image_w + (padded_w - image_w) // 2
                    y = v / depth.shape[0] * image_h + (padded_h - image_h) // 2
                feature = bilinear(values, x / padded_w * values.shape[2] - 0.5, y / padded_h * values.shape[1] - 0.5)
                found.append((np.array([u, v]) * scale, inverse @ [u, v, 1.0] * z, feature / np.linalg.norm(feature)))
        pixels.append(found)
    matched = []
    for _, point, feature in pixels[0]:
        distances = [max(1 - feature @ other, 1e-9) for _, _, other in pixels[1]]
        best, second = np.argsort(distances)[:2]
        moved_point = pose[:3, :3].numpy() @ point + pose[:3, 3].numpy()
        image = matrices[1].double().numpy() @ moved_point
        where = image[:2] / max(image[2], 1e-9) * scale
        weight = 1 - distances[best] / distances[second]
        error = np.linalg.norm(where - pixels[1][best][0])
        matched.append((-weight, error, np.linalg.norm(moved_point - pixels[1][best][1])))
    return np.array(sorted(matched)[: settings.matches])


def bilinear(values, x, y):
    """With tokens' centres at whole numbers, and zeros around the map as the released code has."""
    total = np.zeros(len(values))
    for row in (int(np.floor(y)), int(np.floor(y)) + 1):
        for column in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= row < values.shape[1] and 0 <= column < values.shape[2]:
                total += values[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@pytest.mark.parametrize("protocol", ["paper", "fixed"])
def test_agrees_with_one_pixel_after_the_other(protocol):
    generator = torch.Generator().manual_seed(0)
    # 45 x 62 pixels given to the backbone, padded to 56 x 70: 5 rows above and 6 below, 4 columns on either side
    maps = tuple(FeatureMap(torch.randn(6, 4, 5, generator=generator), (45, 62), (56, 70)) for _ in range(2))
    depths = tuple(1 + 3 * torch.rand(size, generator=generator) for size in ((48, 64), (40, 72)))
    depths[0][:10, :10] = 0
    matrices = pinhole(48, 64, 50.0), pinhole(40, 72, 60.0)
    pose = moved(0.3, -0.1, 0.2, turn=20.0)
    settings = replace(PROTOCOLS[protocol], matches=100)
    found = pair_errors(maps, depths, matrices, pose, settings)
    slow = slow_errors(maps, depths, matrices, pose, settings)
    assert len(found.pixels) == 100
    # sorted: pixels beyond the outermost tokens' centres have the same features, and so no order among each other
    np.testing.assert_allclose(np.sort(found.pixels), np.sort(slow[:, 1]), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.sort(found.metres), np.sort(slow[:, 2]), rtol=1e-3, atol=1e-4)
    # the protocols do differ
    other = replace(PROTOCOLS["fixed" if protocol == "paper" else "paper"], matches=100)
    others = slow_errors(maps, depths, matrices, pose, other)
    assert not np.allclose(np.sort(slow[:, 1]), np.sort(others[:, 1]), rtol=0.01)


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": 2.0}, {"matches": 0}, {"bins": (0.0,)}, {"bins": (30.0, 15.0)}]
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(InputError, match="scale is|bins are"):
        CorrespondenceSettings(**wrong)


# ---------------------------------------------------------------------- many pairs


@pytest.mark.parametrize("degrees", [0.0, 14.999, 15.0, 30.0, 60.0, 90.0, 180.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_angle_of_a_rotation(degrees, dtype):
    assert rotation_angle(moved(1.0, 2.0, 3.0, turn=degrees).to(dtype)) == pytest.approx(
        degrees, abs=1e-4 if degrees else 0.03
    )


def errors_of(values, angle, metres=0.0, **names):
    values = torch.tensor(values)
    return PairErrors(values, torch.full_like(values, metres), angle, (len(values), len(values)), **names)


def test_recalls_by_hand():
    pairs = [errors_of([1.0, 7.0, 12.0, 30.0], 5.0), errors_of([5.0, 9.999], 5.0), errors_of([10.0, 20.0], 70.0)]
    found = summarize(pairs, PROTOCOLS["paper"])
    # below 5: 1; an error on a threshold does not count. Below 10: 1, 7, 5, 9.999. Below 20: 12 and 10 as well. Of 8
    assert found.pixels == {"5": 12.5, "10": 50.0, "20": 75.0}
    # by pair at 10: 2 of 4, 2 of 2, 0 of 2; the first two are in one bin: the mean of 50 and 100, not 4 of 6
    assert [(b.low, b.high, b.pairs, b.recall) for b in found.bins] == [
        (0.0, 15.0, 2, 75.0), (15.0, 30.0, 0, None), (30.0, 60.0, 0, None), (60.0, 180.0, 1, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("degrees", "place"), [(0.0, 0), (14.99, 0), (15.0, 1), (29.99, 1), (30.0, 2), (60.0, 3), (179.9, 3)]
)
def test_a_bin_holds_its_lower_edge(degrees, place):
    angle = rotation_angle(moved(turn=degrees))
    found = summarize([errors_of([1.0], angle)], PROTOCOLS["paper"])
    assert [b.pairs for b in found.bins] == [int(number == place) for number in range(4)]
    assert found.pairs_outside_bins == 0


def test_what_is_in_no_bin_is_counted():
    assert summarize([errors_of([1.0], 180.0)], PROTOCOLS["paper"]).pairs_outside_bins == 1
    assert summarize([errors_of([1.0], 130.0)], NAVI).pairs_outside_bins == 1


def test_navi_is_binned_by_two_centimetres_and_the_distance_is_in_metres():
    pairs = [errors_of([0.0, 0.0], 40.0, metres=0.019), errors_of([0.0], 40.0, metres=0.021)]
    found = summarize(pairs, NAVI)
    assert found.centimetres == {"1": 0.0, "2": pytest.approx(200 / 3), "5": 100.0}
    assert (found.bins[1].low, found.bins[1].recall) == (30.0, 50.0)
    assert [4 * threshold for threshold in NAVI.pixels] == [5, 25, 50]


def test_without_pairs_there_is_no_number_and_results_are_plain_json():
    nothing = summarize([], PROTOCOLS["fixed"]).plain()
    assert nothing["pixels"] == {"5": None, "10": None, "20": None} and nothing["pairs"] == 0
    text = json.dumps(
        summarize([errors_of([1.0], 5.0, name="a-b", scene="a")], PROTOCOLS["paper"]).plain(), allow_nan=False
    )
    assert json.loads(text)["each"][0]["name"] == "a-b" and json.loads(text)["settings"]["norm"] == "half"


def test_the_protocols_differ_in_what_was_mended():
    paper, fixed = PROTOCOLS["paper"], PROTOCOLS["fixed"]
    assert (paper.scale, paper.matches, paper.pixels) == (0.25, 1000, (5, 10, 20))
    assert (paper.bins, paper.binned_by, paper.binned_threshold) == ((0, 15, 30, 60, 180), "pixels", 10)
    assert replace(fixed, pad_crop="parity", depth_resize="parity", norm="half") == paper
    assert (fixed.pad_crop, fixed.depth_resize, fixed.norm) == ("exact", "exact", "imagenet")


# ---------------------------------------------------------------------- rooms


@pytest.fixture(scope="module")
def room_pairs(rooms):
    return RoomPairs(rooms, RoomPairsSettings(pairs=6, min_overlap=0.4))


def encoder(pairs, make):
    """Looks up what `make` gives for each image of each pair."""
    known = {}
    for index, (room, *ends) in enumerate(pairs.chosen):
        views, pair = pairs.rooms[room], pairs[index]
        for end, view in enumerate(ends):
            pose = torch.from_numpy(views.camera_to_worlds[view])
            known[pair.images[end].tobytes()] = make(
                torch.from_numpy(pair.depths[end]), torch.from_numpy(pair.intrinsics[end]), pose
            )
    return lambda image: known[image.tobytes()]


def test_in_rooms_perfect_features_are_right_and_random_ones_are_chance(room_pairs):
    settings = CorrespondenceSettings(scale=1.0, matches=250)
    perfect = evaluate_pairs(room_pairs, encoder(room_pairs, world_features), settings)
    assert perfect.pixels == {"5": 100.0, "10": 100.0, "20": 100.0} and perfect.matches == 6 * 250
    assert perfect.centimetres["5"] == 100 and perfect.centimetres["1"] > 60  # a pixel is some 3 cm wide
    generator = torch.Generator().manual_seed(0)

    def noise(depth, intrinsics, pose):
        return FeatureMap(torch.randn(16, *depth.shape, generator=generator), depth.shape, depth.shape)

    # all pixels, so that the choice of the best does not matter: each is matched with any other one as likely
    every = replace(settings, matches=100_000)
    found = evaluate_pairs(room_pairs, encoder(room_pairs, noise), every)
    for threshold in ("5", "10", "20"):
        chance, spread = chance_of(room_pairs, float(threshold))
        assert found.pixels[threshold] == pytest.approx(100 * chance, abs=100 * 3 * spread)
        assert found.pixels[threshold] < perfect.pixels[threshold] / 3


def chance_of(pairs, threshold):
    """How often a random pixel of the second image is near enough, from a sample, and the estimate's deviation."""
    near = []
    generator = np.random.default_rng(0)
    for pair in pairs:
        depth, matrix = pair.depths[0], pair.intrinsics[0]
        rows, columns = generator.integers(0, depth.shape[0], 4000), generator.integers(0, depth.shape[1], 4000)
        rays = np.linalg.inv(matrix) @ np.stack([columns + 0.5, rows + 0.5, np.ones(4000)])
        there = (pair.relative_pose @ np.vstack([rays * depth[rows, columns], np.ones(4000)]))[:3]
        image = (matrix @ there)[:2] / np.maximum(there[2], 1e-9)
        guess = generator.random((2, 4000)) * np.array([[depth.shape[1]], [depth.shape[0]]])
        near.append(np.linalg.norm(image - (np.floor(guess) + 0.5), axis=0) < threshold)
    near = np.concatenate(near)
    # matches of neighbouring features are not quite independent (many take the same one): allow for twice as much
    return near.mean(), 2 * near.std() / np.sqrt(len(near))


def test_each_pair_is_reported_with_its_names_and_counts(room_pairs):
    seen = []
    settings = CorrespondenceSettings()
    found = evaluate_pairs(room_pairs[:2], encoder(room_pairs, world_features), settings, seen.append)
    # 56 x 84 at a quarter is 14 x 21: fewer than 1000 pixels
    assert [pair.points for pair in found.each] == [(294, 294)] * 2 and found.pairs_with_fewer_matches == 2
    assert [pair.name for pair in seen] == [pair.name for pair in found.each] == [room_pairs[i].name for i in (0, 1)]
    assert found.each[0].scene == "room_0002" and sum(b.pairs for b in found.bins) == 2
