from collections import Counter

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes import overlap
from snd_nerfstudio.scenes.overlap import ViewGeometry, near_and_far, overlap_matrix, viewing_angles
from snd_nerfstudio.scenes.overlap_triplets import OverlapSampler, PairLimits
from snd_nerfstudio.scenes.triplets import NoTripletError


def poses(positions, degrees=None):
    """Cameras that look along +z, turned about the vertical axis."""
    made = np.tile(np.eye(4), (len(positions), 1, 1))
    made[:, :3, 3] = positions
    if degrees is not None:
        angle = np.radians(degrees)
        made[:, 0, 0], made[:, 0, 2], made[:, 2, 0], made[:, 2, 2] = (
            np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle),
        )  # fmt: skip
    return made


def walls(positions, depth=2.0, **settings):
    """Cameras with a field of view of 90 degrees in front of a wall that faces them."""
    positions = np.asarray(positions, dtype=float)
    intrinsics = np.tile(np.array([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1.0]]), (len(positions), 1, 1))
    depths = None if depth is None else np.full((len(positions), 48, 64), depth) - positions[:, 2, None, None]
    return ViewGeometry(poses(positions), intrinsics, depths, **settings)


def test_before_a_wall_the_overlap_is_what_the_images_share():
    # at depth 2 an image of 90 degrees spans 4: moved by 1 it shares 3/4, by 2 half, by 5 nothing
    found = overlap_matrix(walls([[0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 0, 0]]))
    expected = [[1, 0.75, 0.5, 0], [0.75, 1, 0.75, 0], [0.5, 0.75, 1, 0.25], [0, 0, 0.25, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_smaller_of_both_shares_counts():
    # one metre before the wall the image spans 2 of the 4 that the other one sees, in both directions: a quarter
    found = overlap_matrix(walls([[0, 0, 0], [0, 0, 1]]))
    assert found[0, 1] == found[1, 0] == pytest.approx(0.25, abs=0.02)


def test_what_is_hidden_does_not_count():
    geometry = walls([[0, 0, 0], [0.2, 0, 0]])
    assert overlap_matrix(geometry)[0, 1] > 0.9
    geometry.depths[1, :, :32] = 1.0  # something stands before the left half of the second view
    assert overlap_matrix(geometry)[0, 1] == pytest.approx(0.5, abs=0.07)


def test_pixels_without_depth_are_neither_shared_nor_missing():
    geometry = walls([[0, 0, 0], [1, 0, 0]])
    geometry.depths[0, :24] = 0
    geometry.depths[1, 24:] = 0
    assert overlap_matrix(geometry)[0, 1] == 0  # nothing can be compared
    geometry.depths[1, 12:] = 2.0
    geometry.depths[1, :12] = 0
    # of 9 rows of samples in the second view a quarter falls outside, and three quarters of 3 on what has no depth:
    # three quarters of 6 of the remaining 9 - 2.25 are seen
    assert overlap_matrix(geometry)[0, 1] == pytest.approx(4.5 / 6.75, abs=0.01)


def test_frusta_between_near_and_far():
    # one depth only: as before a wall there; cameras back to back share nothing
    found = overlap_matrix(walls([[0, 0, 0], [1, 0, 0], [5, 0, 0]], depth=None, near=2.0, far=2.0))
    np.testing.assert_allclose(found, [[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]], atol=0.02)
    back = ViewGeometry(poses([[0, 0, 0], [0, 0, -0.1]], [0.0, 180.0]), walls([[0, 0, 0]] * 2).intrinsics)
    assert overlap_matrix(back)[0, 1] == 0
    # cameras 4 apart are on average 2 from their centre: twice that, times 1/4 and 4
    assert near_and_far(walls([[0, 0, 0], [4, 0, 0]], depth=None)) == pytest.approx((1.0, 16.0))


def test_views_beyond_the_angle_do_not_overlap():
    turned = poses(np.zeros((3, 3)), [0.0, 30.0, 60.0])
    geometry = ViewGeometry(turned, walls(np.zeros((3, 3))).intrinsics)
    found = overlap_matrix(geometry, max_angle=45.0)
    assert found[0, 1] > 0.3 and found[0, 2] == 0 and overlap_matrix(geometry)[0, 2] > 0
    np.testing.assert_allclose(viewing_angles(turned, turned)[0], [0, 30, 60], atol=1e-6)


def slow_share(geometry, a, b, tolerance=0.1):
    """One pixel after the other."""
    seen = total = 0
    for row in range(2, 48, 4):
        for column in range(2, 64, 4):
            z = geometry.depths[a, row, column]
            if z <= 0:
                continue
            ray = np.linalg.inv(geometry.intrinsics[a]) @ [(column + 0.5) / 64, (row + 0.5) / 48, 1]
            world = geometry.camera_to_worlds[a] @ [*(ray * z), 1]
            local = np.linalg.inv(geometry.camera_to_worlds[b]) @ world
            total += 1
            if local[2] <= 0:
                continue
            x, y, _ = geometry.intrinsics[b] @ (local[:3] / local[2])
            if not (0 <= x < 1 and 0 <= y < 1):
                continue
            there = geometry.depths[b, int(y * 48), int(x * 64)]
            if there <= 0:
                total -= 1
            elif abs(there - local[2]) <= tolerance * there:
                seen += 1
    return seen / total if total >= 8 else 0.0


def test_agrees_with_one_pixel_after_the_other_whatever_the_blocks(rooms, monkeypatch):
    from data_parsers.scannetpp import ScanNetppScenesConfig
    from snd_nerfstudio.snd_frames import to_frames

    frames = to_frames(ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs(split="train"))
    geometry = overlap.scene_geometry(frames, np.arange(0, 60, 12))
    assert geometry.depths.shape == (5, 48, 64)
    found = overlap_matrix(geometry)
    slow = np.array([[slow_share(geometry, a, b) for b in range(5)] for a in range(5)])
    slow = np.minimum(slow, slow.T)
    np.fill_diagonal(slow, 1)
    np.testing.assert_allclose(found, slow, atol=0.012)  # float32: two samples of 192 may fall on the other side
    assert 0.2 < found[0, 1] < 1
    monkeypatch.setattr(overlap, "BLOCK", 1)
    np.testing.assert_array_equal(found, overlap_matrix(geometry))
    frusta = overlap_matrix(overlap.scene_geometry(frames, np.arange(0, 60, 12), 0.7, 8.0, with_depth=False))
    assert np.corrcoef(found[np.triu_indices(5, 1)], frusta[np.triu_indices(5, 1)])[0, 1] > 0.8


def test_views_around_an_object_all_have_the_same_neighbours():
    around = np.linspace(0, 2 * np.pi, 200, endpoint=False)
    circle = np.stack([3 * np.sin(around), np.zeros(200), 3 * np.cos(around)], axis=1)
    intrinsics = walls(circle).intrinsics
    found = overlap_matrix(ViewGeometry(poses(circle, np.degrees(around) + 180), intrinsics, None, 1.0, 5.0), 60.0)
    np.testing.assert_allclose(found[0, 1:100], found[0, :100:-1], atol=0.03)
    np.testing.assert_allclose(found[0], np.roll(found[50], -50), atol=0.03)
    assert (found[0, 34:167] == 0).all() and (found[0, 1:30] > 0.1).all()  # 60 degrees are 33 views


# ---------------------------------------------------------------------- triplets


def sampler(positions, limits=PairLimits(), counts=None, **settings):
    positions = np.asarray(positions, dtype=float)
    counts = (len(positions),) if counts is None else counts
    geometry = walls(positions)

    def part(indices):
        return ViewGeometry(geometry.camera_to_worlds[indices], geometry.intrinsics[indices], geometry.depths[indices])

    scene_index = np.repeat(np.arange(len(counts)), counts)
    order = np.concatenate([np.arange(n) for n in counts])
    return OverlapSampler(scene_index, order, part, [f"s{n}" for n in range(len(counts))], limits, **settings)


def shuffled_row(count=30, step=0.2, seed=0):
    """Cameras side by side before a wall, in no order; the share two of them see is 1 - distance / 4."""
    positions = np.zeros((count, 3))
    positions[:, 0] = np.random.default_rng(seed).permutation(count) * step
    return positions


def test_contexts_overlap_within_the_limits_and_the_target_is_between_them_whatever_the_order():
    positions = shuffled_row()
    chosen = sampler(positions, PairLimits(0.5, 0.8))
    distances = Counter()
    for step in range(300):
        triplet = chosen.draw(1, step)
        left, right = (positions[frame, 0] for frame in triplet.context)
        distances[round(abs(left - right), 3)] += 1
        assert 0.8 - 0.25 < abs(left - right) < 2.0 + 0.25  # the samples are a quarter of a metre apart
        assert min(left, right) - 0.25 < positions[triplet.target, 0] < max(left, right) + 0.25
        assert triplet.target not in triplet.context and triplet.context[0] < triplet.context[1]
    assert len(distances) >= 6


def test_a_draw_depends_on_seed_step_rank_and_item_alone():
    first, second = (sampler(shuffled_row()) for _ in range(2))
    for _ in range(5):
        second.draw(3, 99)
    assert first.draw(3, 7) == second.draw(3, 7)
    draws = {first.draw(3, 7), first.draw(4, 7), first.draw(3, 8), first.draw(3, 7, rank=1), first.draw(3, 7, item=1)}
    assert len(draws) == 5


def test_scenes_count_the_same_and_those_without_a_pair_are_left_out():
    far = np.arange(5)[:, None] * [100.0, 0, 0]
    positions = np.concatenate([shuffled_row(30), shuffled_row(12), far])
    chosen = sampler(positions, counts=(30, 12, 5))
    assert chosen.skipped_scenes == ["s2"] and chosen.usable_scenes.tolist() == [0, 1]
    scenes = Counter(chosen.draw(0, step).target >= 30 for step in range(400))
    assert abs(scenes[True] - 200) < 50
    spread = chosen.spread(6)
    assert len(set(spread)) == 6 and spread == [*chosen.spread_over(0, 3), *chosen.spread_over(1, 3)]
    assert chosen.spread_over(0, 0) == []
    # the target of an evaluation triplet is the one that shares most with both contexts
    for triplet in spread:
        middle = positions[list(triplet.context), 0].mean()
        assert abs(positions[triplet.target, 0] - middle) <= 0.3
        assert chosen.overlap(*triplet.context) == pytest.approx(
            1 - abs(np.diff(positions[list(triplet.context), 0])[0]) / 4, abs=0.05
        )


def test_more_targets_are_different_and_the_first_stays():
    chosen = sampler(shuffled_row())
    for step in range(50):
        one, three = chosen.draw(0, step), chosen.draw(0, step, targets=3)
        assert one.target == three.target and one.context == three.context
        assert len({three.target, *three.more_targets}) == 1 + len(three.more_targets) <= 3


@pytest.mark.parametrize("target_view", ["between_or_context", "context"])
def test_targets_at_the_contexts(target_view):
    chosen = sampler(shuffled_row(), target_view=target_view)
    at_context = [(t := chosen.draw(0, step)).target in t.context for step in range(100)]
    assert all(at_context) if target_view == "context" else 0 < sum(at_context) < 100


def test_baseline_and_angle_limit_the_pairs():
    positions = shuffled_row()
    limits = PairLimits(0.3, 1.0, min_baseline=0.5, max_baseline=1.0)
    chosen = sampler(positions, limits)
    distances = [abs(np.diff(positions[list(chosen.draw(0, step).context), 0])[0]) for step in range(200)]
    assert 0.5 <= min(distances) and max(distances) <= 1.0 + 1e-9
    # 29 neighbours 0.2 apart and 28 pairs 0.4 apart
    assert chosen.zero_baseline_pairs == 57


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (PairLimits(0.0, 0.5), "--pipeline.datamanager.min-overlap 0 .*0 < min <= max <= 1"),
        (PairLimits(0.6, 0.5), "max-overlap 0.5"),
        (PairLimits(0.5, 1.5), "max-overlap 1.5"),
        (PairLimits(float("nan"), 0.5), "min-overlap nan"),
        (PairLimits(min_baseline=2.0, max_baseline=1.0), "--pipeline.datamanager.max-context-baseline 1.0"),
    ],
)
def test_limits_that_no_pair_can_keep_are_refused(limits, message):
    with pytest.raises(InputError, match=message):
        sampler(shuffled_row(), limits)


def test_without_a_triplet_the_message_says_why():
    with pytest.raises(NoTripletError, match=r"largest overlap of two frames: 0.00.*Lower .*min-overlap"):
        sampler(np.arange(5)[:, None] * [100.0, 0, 0])
    with pytest.raises(NoTripletError, match="1 without a frame between"):
        sampler([[0, 0, 0], [1, 0, 0], [100, 0, 0]])
    with pytest.raises(NoTripletError, match="No scene has two frames"):
        sampler([[0, 0, 0], [1, 0, 0]])
