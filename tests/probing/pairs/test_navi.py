import json

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs import NaviPairs, NaviSettings, check_pairs, open_pairs
from snd_nerfstudio.probing.pairs.navi import PAIR_LISTS, decode_depth, rotation_of
from snd_nerfstudio.probing.pairs.rooms import read_room
from tests.probing.pairs.trees import quaternion_of, write_navi

FRAMES = (0, 5, 10, 15, 20)


@pytest.fixture(scope="module")
def views(rooms):
    return read_room(rooms / "scenes/room_0002")


@pytest.fixture
def tree(views, tmp_path):
    return write_navi(tmp_path, views, FRAMES)


def test_depth_is_stored_as_its_inverse():
    # 655350 / 1000 mm = 655.35; 0 is not the object
    assert decode_depth(np.array([[655.35, 0.0, 65535.0]], np.float32))[0].tolist() == pytest.approx([1.0, 0.0, 0.01])


def test_quaternions_begin_with_the_real_part():
    # a quarter turn about z: cos 45, 0, 0, sin 45; of any length
    turn = rotation_of(np.array([2**0.5, 0, 0, 2**0.5]))
    np.testing.assert_allclose(turn, [[0, -1, 0], [1, 0, 0], [0, 0, 1]], atol=1e-12)
    generator = np.random.default_rng(0)
    for _ in range(5):
        rotation = np.linalg.qr(generator.normal(size=(3, 3)))[0]
        rotation *= np.linalg.det(rotation)
        np.testing.assert_allclose(rotation_of(np.array(quaternion_of(rotation))), rotation, atol=1e-12)


def test_points_of_the_crops_are_where_the_poses_say(tree, views):
    """Lifted with what a pair holds, and found again in the original images with the original cameras."""
    pairs = NaviPairs(tree, NaviSettings(every=1, size=128))
    assert len(pairs) == 5
    for pair, (first, second) in zip(pairs, pairs.chosen):
        original = [FRAMES[int(image.stem)] for image in (first, second)]
        rows, columns = np.nonzero(pair.depths[0])
        some = np.random.default_rng(0).permutation(len(rows))[:50]
        pixels = np.stack([columns[some] + 0.5, rows[some] + 0.5, np.ones(50)])
        local = np.linalg.inv(pair.intrinsics[0]) @ pixels * pair.depths[0][rows[some], columns[some]]
        # in the first original image they are at the pixels whose depth they have, up to what 16 bits can hold
        back = views.intrinsics @ (local / local[2])
        there = views.depth(original[0])[back[1].astype(int), back[0].astype(int)]
        assert (np.abs(there - local[2]) < 0.02 * there).mean() > 0.9
        # and in the second camera where its pose puts them
        poses = [views.camera_to_worlds[view] for view in original]
        world = poses[0][:3, :3] @ local + poses[0][:3, 3:]
        expected = poses[1][:3, :3].T @ (world - poses[1][:3, 3:])
        moved = pair.relative_pose[:3, :3] @ local + pair.relative_pose[:3, 3:]
        np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_the_crop_is_a_square_around_the_object(tree, views):
    pair = NaviPairs(tree, NaviSettings(size=64))[0]
    # depth is in rows 10 to 45 and columns 20 to 63, 44 wide: a square of 44 from column 20 and row 6
    assert pair.images[0].shape == (64, 64, 3) and pair.depths[0].shape == (64, 64)
    factor = 64 / 44
    focal = views.intrinsics[0, 0] * factor
    np.testing.assert_allclose(
        pair.intrinsics[0], [[focal, 0, (42 - 20) * factor], [0, focal, (28 - 6) * factor], [0, 0, 1]], rtol=1e-9
    )
    rows = np.flatnonzero(pair.depths[0].any(axis=1))
    # the object begins at row 4 of 44 and ends before row 40
    assert (rows[0], rows[-1]) == (round(4 * factor), round(40 * factor) - 1)
    assert (pair.depths[0].any(axis=0)).all()


def test_a_square_larger_than_the_image_is_black_around_it(views, tmp_path):
    pair = NaviPairs(write_navi(tmp_path, views, FRAMES, margin=(0, 0)), NaviSettings(size=84))[0]
    # 84 wide and 56 high: 14 rows above and below are not image
    assert (pair.images[0][:12] == 0).all() and (pair.images[0][72:] == 0).all() and pair.images[0][20:64].mean() > 20
    assert (pair.depths[0][:14] == 0).all() and (pair.depths[0][14:70] > 0).all() and (pair.depths[0][70:] == 0).all()
    np.testing.assert_allclose(pair.intrinsics[0][:2, 2], [42, 42])


def test_images_that_probe3d_made_smaller_are_taken_with_the_right_focal_length(tree, views):
    folder = tree / "ball_room/wild_set"
    before = NaviPairs(tree, NaviSettings(every=1, size=64))[0]
    for kind in ("images", "depth"):
        for file in list((folder / kind).iterdir()):
            with Image.open(file) as image:
                half = image.resize((42, 28), Image.Resampling.NEAREST)
            half.save(file.with_name(f"downsampled_{file.name}"))
            file.unlink()
    after = NaviPairs(tree, NaviSettings(every=1, size=64))[0]
    assert check_pairs("navi", tree) == []
    np.testing.assert_allclose(after.intrinsics[0], before.intrinsics[0], rtol=0.05)


def test_partners_are_within_the_angle_and_the_seed_decides(views, tmp_path):
    tree = write_navi(tmp_path, views, range(0, 60, 3))
    narrow = NaviPairs(tree, NaviSettings(every=2, max_angle=20.0))
    for first, second in narrow.chosen:
        cosine = (np.trace(first.pose[:3, :3] @ second.pose[:3, :3].T) - 1) / 2
        assert first is not second and 0 < np.degrees(np.arccos(cosine)) <= 20
    assert [int(first.stem) for first, _ in narrow.chosen] == list(range(0, 20, 2))

    def partners(seed):
        return [second.stem for _, second in NaviPairs(tree, NaviSettings(every=1, seed=seed)).chosen]

    assert partners(1) == partners(1) != partners(2)
    assert len(open_pairs("navi", tree)) == 5  # every fourth
    with pytest.raises(InputError, match="no two images of one object within 0.001"):
        NaviPairs(tree, NaviSettings(max_angle=0.001))


def test_the_list_of_the_data_set_is_followed(tree):
    with pytest.raises(InputError, match="list of pairs .*pairs-wild_set.txt cannot be read"):
        NaviPairs(tree, NaviSettings(pairs="listed"))
    file = tree / PAIR_LISTS / "pairs-wild_set.txt"
    file.parent.mkdir(parents=True)
    file.write_text(
        "ball_room/wild_set/images/001.jpg ball_room/wild_set/images/003.jpg 12.5\n"
        "/ball_room/wild_set/004.jpg ball_room/wild_set/000.jpg 30\n"
    )
    pairs = NaviPairs(tree, NaviSettings(pairs="listed"))
    assert [pair.name for pair in pairs] == ["ball_room/wild_set/001-003", "ball_room/wild_set/004-000"]
    file.write_text("ball_room/wild_set/001.jpg ball_room/wild_set/033.jpg 3")
    with pytest.raises(InputError, match="line 1: .*033.jpg 3 names an unknown image"):
        NaviPairs(tree, NaviSettings(pairs="listed"))


def test_what_is_missing_or_damaged_is_named(tree):
    assert check_pairs("navi", tree) == []
    assert "wild_set*/annotations.json" in check_pairs("navi", tree / "ball_room")[0]
    (tree / "ball_room/wild_set/depth/002.png").unlink()
    (found,) = check_pairs("navi", tree)
    assert "1 of 5 depth maps are missing" in found and "002.png" in found
    file = tree / "ball_room/wild_set/annotations.json"
    entries = json.loads(file.read_text())
    del entries[1]["camera"]["focal_length"]
    file.write_text(json.dumps(entries))
    with pytest.raises(InputError, match="annotations.json cannot be read .KeyError: 'focal_length'"):
        NaviPairs(tree)


def test_depth_of_another_shape_and_empty_depth_are_refused(tree):
    file = tree / "ball_room/wild_set/depth/000.png"
    pairs = NaviPairs(tree, NaviSettings(every=5))
    assert pairs.chosen[0][0].stem == "000"
    Image.fromarray(np.zeros((56, 84), np.uint16)).save(file)
    with pytest.raises(InputError, match="000.png is empty"):
        pairs[0]
    Image.fromarray(np.ones((84, 56), np.uint16)).save(file)
    with pytest.raises(InputError, match="56x84 pixels, its image 84x56"):
        pairs[0]
