import json
import shutil

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings, check_pairs, open_pairs
from snd_nerfstudio.probing.pairs.rooms import read_room, rotation_angles


@pytest.fixture(scope="module")
def pairs(rooms):
    return RoomPairs(rooms, RoomPairsSettings(pairs=24))


def shared(pair):
    """Share of the first image's pixels that the second one sees, pixel by pixel."""
    depth, matrix = pair.depths[0], pair.intrinsics[0]
    seen = total = 0
    for row in range(1, depth.shape[0], 3):
        for column in range(1, depth.shape[1], 3):
            local = np.linalg.inv(matrix) @ [column + 0.5, row + 0.5, 1.0] * depth[row, column]
            x, y, z = (pair.relative_pose @ [*local, 1.0])[:3]
            u, v, _ = pair.intrinsics[1] @ [x / z, y / z, 1.0] if z > 0 else (-1, -1, 0)
            total += 1
            if 0 <= u < depth.shape[1] and 0 <= v < depth.shape[0]:
                seen += abs(pair.depths[1][int(v), int(u)] - z) < 0.1 * z
    return seen / total


def test_poses_and_depth_of_the_pairs_agree(pairs):
    # a point that both views see lies at the depth that the second one measures: nothing of this would fit otherwise
    for pair in pairs.spread(6):
        assert shared(pair) > 0.2


def test_pairs_overlap_as_asked(rooms):
    much = RoomPairs(rooms, RoomPairsSettings(pairs=8, min_overlap=0.8))
    little = RoomPairs(rooms, RoomPairsSettings(pairs=8, min_overlap=0.1, max_overlap=0.4))
    assert np.mean([shared(pair) for pair in much.spread(4)]) > 0.75
    assert np.mean([shared(pair) for pair in little.spread(4)]) < 0.6


def test_each_bin_of_angles_gives_as_many_pairs_while_it_has_some(rooms):
    settings = RoomPairsSettings(pairs=30, split="all", min_overlap=0.3, rotation_edges=(5.0, 15.0, 30.0, 45.0))
    pairs = RoomPairs(rooms, settings)
    angles = []
    for room, first, second in pairs.chosen:
        poses = pairs.rooms[room].camera_to_worlds
        # by hand: the rotation between the two cameras
        relative = poses[second][:3, :3].T @ poses[first][:3, :3]
        angles.append(np.degrees(np.arccos((np.trace(relative) - 1) / 2)))
    assert np.histogram(angles, settings.rotation_edges)[0].tolist() == [10, 10, 10]


def test_the_seed_decides_and_either_view_may_be_first(rooms, pairs):
    again, other = (RoomPairs(rooms, RoomPairsSettings(pairs=24, seed=seed)) for seed in (0, 1))
    assert again.chosen == pairs.chosen != other.chosen
    assert len({(room, *sorted(views)) for room, *views in pairs.chosen}) == 24
    forward = [first < second for _, first, second in pairs.chosen]
    assert 4 < sum(forward) < 20


def test_the_split_decides_which_rooms(rooms, pairs):
    assert {pair.scene for pair in pairs} == {"room_0002"}
    train = RoomPairs(rooms, RoomPairsSettings(split="train", pairs=6))
    assert {pair.scene for pair in train} == {"room_0000", "room_0001"}
    assert isinstance(open_pairs("rooms", rooms), RoomPairs)


def test_few_pairs_are_all_given_and_none_is_an_error(rooms):
    rare = RoomPairs(rooms, RoomPairsSettings(pairs=100_000, min_overlap=0.9))
    assert 0 < len(rare) < 60 * 59 / 2
    with pytest.raises(InputError, match="no two views of a room overlap"):
        RoomPairs(rooms, RoomPairsSettings(rotation_edges=(170.0, 180.0)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RoomPairsSettings(min_overlap=0.9, max_overlap=0.5), "0 <= min <= max <= 1"),
        (RoomPairsSettings(rotation_edges=(30.0, 15.0)), "rotation_edges"),
        (RoomPairsSettings(pairs=0), "pairs is 0"),
    ],
)
def test_settings_that_nothing_can_fulfil_are_refused(rooms, settings, message):
    with pytest.raises(InputError, match=message):
        RoomPairs(rooms, settings)


def test_angles_of_turned_cameras():
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[1, :2, :2] = [[0, -1], [1, 0]]
    poses[2, :2, :2] = [[-1, 0], [0, -1]]
    np.testing.assert_allclose(rotation_angles(poses), [[0, 90, 180], [90, 0, 90], [180, 90, 0]], atol=1e-5)


def test_check_names_what_is_missing(rooms, tmp_path):
    assert check_pairs("rooms", rooms) == []
    assert "nvs_sem_train.txt cannot be read" in check_pairs("rooms", tmp_path)[0]
    for folder in ("metadata", "scenes/room_0002"):
        shutil.copytree(rooms / folder, tmp_path / folder)
    (tmp_path / "scenes/room_0002/depth/DSC00003.png").unlink()
    found = check_pairs("rooms", tmp_path)
    assert len(found) == 3 and "room_0000" in found[0] and "room_0001" in found[1]
    assert found[2].startswith("1 of 60 depth maps are missing") and "DSC00003.png" in found[2]
    with pytest.raises(InputError, match=r"Depth map .*DSC00003.png does not exist"):
        RoomPairs(tmp_path)


def test_a_transforms_file_that_is_something_else_is_named(rooms, tmp_path):
    content = json.loads((rooms / "scenes/room_0002/transforms_train.json").read_text())
    file = tmp_path / "transforms_train.json"
    for broken in ("{", "[]", json.dumps({**content, "frames": []}), json.dumps({**content, "fl_x": None})):
        file.write_text(broken)
        with pytest.raises(InputError, match="transforms_train.json"):
            read_room(tmp_path)
    content["frames"][1]["transform_matrix"][0][0] = 7.0
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="the pose of DSC00002 is not"):
        read_room(tmp_path)
