import json

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.pairs.rooms import read_room
from snd_nerfstudio.probing.tracking import (
    PointTracks,
    evaluate_tracking,
    position_accuracy,
    project_tracks,
    room_tracks,
    track,
)


def token_map(values):
    return FeatureMap(values, (8, 8), (8, 8))


def test_a_point_is_followed_to_where_its_feature_goes():
    # one-hot tokens on a grid of 4 x 4 that move one column to the right in each frame
    values = torch.eye(16).reshape(16, 4, 4)
    maps = [token_map(values.roll(shift, dims=2)) for shift in range(3)]
    found = track(maps, torch.tensor([[0.125, 0.125], [0.375, 0.875]]))
    expected = [[[0.125, 0.125], [0.375, 0.875]], [[0.375, 0.125], [0.625, 0.875]], [[0.625, 0.125], [0.875, 0.875]]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_soft_place_is_better_between_tokens():
    # a bump of features that moves by half a token
    x = torch.arange(12) + 0.5
    waves = torch.randn(16, generator=torch.Generator().manual_seed(0))

    def frame(shift):
        phase = waves[:, None] * (x - shift)
        return FeatureMap(torch.cat([phase.cos(), phase.sin()])[:, None], (1, 12), (1, 12))

    hard, soft = (
        track([frame(0.0), frame(0.5)], torch.tensor([[4.5 / 12, 0.5]]), window, 0.1)[1, 0, 0] * 12
        for window in (None, 2)
    )
    assert abs(soft - 5.0) < 0.1 < abs(hard - 5.0)


def test_shares_below_each_threshold_by_hand():
    # errors in pixels of 256 x 256: frame 1: 0.5, 3, hidden; frame 2: 4 exactly, 20, 1.5
    truth = torch.full((3, 3, 2), 0.5)
    error = torch.tensor([[9.0, 9, 9], [0.5, 3, 9], [4, 20, 1.5]])
    predicted = truth + torch.stack([error, 0 * error], dim=2) / 256
    visible = torch.tensor([[True] * 3, [True, True, False], [True, True, True]])
    found, compared = position_accuracy(predicted, PointTracks(truth, visible))
    # of 5 visible after the first frame: below 1: 0.5. 2: 1.5. 4: 3, not 4 itself. 8: 4. 16: no more
    assert found == pytest.approx([1 / 5, 2 / 5, 3 / 5, 4 / 5, 4 / 5]) and compared == 5
    upright = truth + torch.stack([0 * error, -error], dim=2) / 256
    assert position_accuracy(upright, PointTracks(truth, visible)) == (found, 5)
    hidden = PointTracks(truth, torch.tensor([[True] * 3, [False] * 3, [False] * 3]))
    assert position_accuracy(predicted, hidden) == ([None] * 5, 0)


def test_each_video_counts_the_same_and_one_without_visible_points_does_not_count():
    values = torch.eye(16).reshape(16, 4, 4)
    frames = [np.full((8, 8, 3), number, np.uint8) for number in range(3)]

    def encode(image):
        return token_map(values.roll(int(image[0, 0, 0]) % 2, dims=2))  # the second image has moved by a column

    still = torch.full((2, 1, 2), 0.125)
    right, wrong = PointTracks(still, torch.ones(2, 1, dtype=torch.bool)), torch.full((2, 9, 2), 0.125)
    videos = [
        ([frames[0], frames[2]], right),  # all within all thresholds
        ([frames[0], frames[1]], PointTracks(wrong, torch.ones(2, 9, dtype=torch.bool))),  # 64 pixels off
        ([frames[0], frames[1]], PointTracks(still, torch.tensor([[True], [False]]))),
    ]
    found = evaluate_tracking(videos, encode)
    assert (
        found.average == 50
        and set(found.within.values()) == {50.0}
        and list(found.within) == ["1", "2", "4", "8", "16"]
    )
    assert (found.videos, found.points, found.visible) == (2, 11, 10)
    assert json.loads(json.dumps(found.plain()))["average"] == 50
    assert evaluate_tracking(videos[2:], encode).average is None


# ---------------------------------------------------------------------- true tracks


def moved(x):
    pose = np.eye(4)
    pose[0, 3] = x
    return pose


def test_projected_points_by_hand():
    matrix = np.array([[10.0, 0, 10], [0, 10, 5], [0, 0, 1]])
    depths = [np.full((10, 20), 2.0), np.full((10, 20), 2.0)]
    depths[1][:, 8:] = 1.0  # something stands before the right half in the second frame
    points = np.array([[0.0, 0, 2], [-1, 0.4, 2], [-1.9, 0, 2], [0, 0, -2]])
    tracks = project_tracks(points, np.stack([moved(0.0), moved(0.2)]), matrix, depths)
    # x * 10 / 2 + 10 of 20 columns and y * 10 / 2 + 5 of 10 rows; then each is 1 pixel further left
    expected = [[[0.5, 0.5], [0.25, 0.7], [0.025, 0.5]], [[0.45, 0.5], [0.2, 0.7], [-0.025, 0.5]]]
    torch.testing.assert_close(tracks.positions[:, :3], torch.tensor(expected))
    # the first is hidden in the second frame, the third has left it, the last is behind the camera
    assert tracks.visible.tolist() == [[True, True, True, False], [False, True, False, False]]


def test_points_without_depth_around_them_are_not_visible():
    matrix = np.array([[10.0, 0, 10], [0, 10, 5], [0, 0, 1]])
    tracks = project_tracks(np.array([[0.0, 0, 2]]), np.eye(4)[None], matrix, [np.zeros((10, 20))])
    assert not tracks.visible.any()


@pytest.fixture(scope="module")
def room(rooms):
    return read_room(rooms / "scenes/room_0002")


def test_in_a_room_tracks_agree_with_the_ray_casting(rooms, room):
    """Whether a point is visible, by casting a ray to it through the room's own mesh."""
    pytest.importorskip("open3d")
    from open3d import core

    from snd_nerfstudio.scenes.rooms import build_room

    _, tracks = room_tracks(room, first=4, frames=12, count=200, seed=3)
    assert tracks.visible[0].all() and 0.3 < tracks.visible[-1].double().mean() < 1
    scene = build_room(7, 2, 60)
    poses = room.camera_to_worlds[4:16]
    depth, matrix = room.depth(4), room.intrinsics
    pixels = tracks.positions[0].double().numpy() * [84, 56]
    z = depth[pixels[:, 1].astype(int), pixels[:, 0].astype(int)]
    local = np.stack(
        [(pixels[:, 0] - matrix[0, 2]) / matrix[0, 0], (pixels[:, 1] - matrix[1, 2]) / matrix[1, 1], np.ones(200)]
    )
    points = (poses[0][:3, :3] @ (local * z)).T + poses[0][:3, 3]
    agree = []
    for number in range(1, 12):
        there = (points - poses[number][:3, 3]) @ poses[number][:3, :3]
        u, v = (there[:, :2] / there[:, 2:] @ matrix[:2, :2].T + matrix[:2, 2]).T
        inside = (there[:, 2] > 0) & (u >= 0) & (u < 84) & (v >= 0) & (v < 56)
        np.testing.assert_allclose(
            tracks.positions[number].numpy()[inside], np.stack([u / 84, v / 56], 1)[inside], atol=1e-4
        )
        rays = np.concatenate([np.tile(poses[number][:3, 3], (200, 1)), points - poses[number][:3, 3]], 1)
        hit = scene.raycaster.cast_rays(core.Tensor(rays.astype(np.float32)))["t_hit"].numpy()
        agree.append(tracks.visible[number].numpy() == (inside & (hit > 0.98)))
    assert np.mean(agree) > 0.96  # at the edges of things four pixels are not exact


def test_in_a_room_perfect_features_follow_every_visible_point(room):
    frames, tracks = room_tracks(room, first=10, frames=6, count=100)
    assert len(frames) == 6 and frames[0].shape == (56, 84, 3) and len(tracks) == 100
    known = {frame.tobytes(): world_map(room, 10 + number) for number, frame in enumerate(frames)}
    found = evaluate_tracking([(frames, tracks)], lambda image: known[image.tobytes()])
    # half a pixel of 84 x 56 is 1.5 and 2.3 of 256 x 256
    assert found.within["16"] > 97 and found.within["4"] > 90 and found.average > 60
    generator = torch.Generator().manual_seed(0)
    noise = evaluate_tracking(
        [(frames, tracks)], lambda image: FeatureMap(torch.randn(8, 56, 84, generator=generator), (56, 84), (56, 84))
    )
    # a circle of 16 pixels is 1.2 % of 256 x 256
    assert noise.within["16"] < 4


def world_map(room, index):
    """Unit vectors in four dimensions that stand for the points a view shows."""
    depth, matrix, pose = room.depth(index), room.intrinsics, room.camera_to_worlds[index]
    v, u = np.mgrid[:56, :84] + 0.5
    local = np.stack([(u - matrix[0, 2]) / matrix[0, 0] * depth, (v - matrix[1, 2]) / matrix[1, 1] * depth, depth])
    points = np.einsum("ij,jhw->ihw", pose[:3, :3], local) + pose[:3, 3, None, None]
    squared = (points**2).sum(axis=0, keepdims=True)
    features = np.concatenate([2 * points, squared - 1]) / (squared + 1)
    return FeatureMap(torch.from_numpy(features).float(), (56, 84), (56, 84))


def test_tracks_depend_on_the_seed_and_a_room_must_have_the_frames(room):
    one, two, other = (room_tracks(room, frames=2, count=20, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(one.positions, two.positions) and not torch.equal(one.positions, other.positions)
    for first, frames in ((50, 11), (0, 1), (-1, 5)):
        with pytest.raises(InputError, match=f"has 60 views, not {frames} from view {first} on"):
            room_tracks(room, first=first, frames=frames)
