from collections import Counter

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.triplets import (
    NoTripletError,
    TripletIndex,
    TripletSampler,
    frames_by_scene,
    growing_gap,
)


def sampler(counts=(30, 20), min_gap=8, max_gap=12, order=None, positions=None, rotations=None, **settings):
    scene_index = np.repeat(np.arange(len(counts)), counts)
    if order is None:
        order = np.concatenate([np.arange(n) for n in counts])
    if positions is None:
        positions = np.stack([np.arange(len(order)) * 0.1, np.zeros(len(order)), np.zeros(len(order))], axis=1)
    poses = np.tile(np.eye(4), (len(order), 1, 1))
    poses[:, :3, 3] = positions
    if rotations is not None:
        poses[:, :3, :3] = rotations
    names = [f"s{i}" for i in range(len(counts))]
    return TripletSampler(scene_index, order, poses, names, min_gap, max_gap, **settings)


def turned(degrees):
    """Rotations about the y axis, the cameras' x axes in the plane of their z axes."""
    angles = np.radians(degrees)
    zero, one = np.zeros(len(angles)), np.ones(len(angles))
    rows = [[np.cos(angles), zero, np.sin(angles)], [zero, one, zero], [-np.sin(angles), zero, np.cos(angles)]]
    return np.array(rows).transpose(2, 0, 1)


def draws_of(chosen, **settings):
    return [chosen.draw(0, step, **settings) for step in range(200)]


def test_contexts_are_of_one_scene_the_gap_apart_and_the_target_strictly_between():
    chosen = sampler()
    for step in range(500):
        triplet = chosen.draw(seed=1, step=step)
        left, right = triplet.context
        assert 8 <= right - left <= 12 and left < triplet.target < right
        assert right < 30 or left >= 30


def test_a_draw_depends_on_seed_step_rank_and_item_alone():
    first, second = sampler(), sampler()
    for _ in range(5):
        second.draw(seed=3, step=99)
    assert first.draw(seed=3, step=7) == second.draw(seed=3, step=7)
    draws = {
        first.draw(3, 7),
        *(first.draw(3, 7, rank=rank) for rank in (1, 2)),
        *(first.draw(3, 7, item=item) for item in (1, 2)),
        first.draw(4, 7),
        first.draw(3, 8),
    }
    assert len(draws) > 5


def test_gaps_and_scenes_are_drawn_evenly_however_long_the_scenes_are():
    chosen = sampler(counts=(100, 20))
    draws = [chosen.draw(0, step) for step in range(4000)]
    gaps = Counter(d.context[1] - d.context[0] for d in draws)
    assert set(gaps) == {8, 9, 10, 11, 12} and min(gaps.values()) > 700
    assert 1800 < sum(d.context[0] < 100 for d in draws) < 2200


def test_all_pairs_of_a_path_are_enumerated():
    # 30 frames: 22 + 21 + 20 + 19 + 18 pairs
    assert sampler(counts=(30,)).num_pairs == 100


def test_dropped_frames_leave_gaps_in_the_capture_and_not_closer_neighbours():
    order = np.array([0, 1, 2, 3, 8, 9, 10, 11])  # frames 4..7 are gone
    chosen = sampler(counts=(8,), min_gap=8, max_gap=8, order=order)
    pairs = {chosen.draw(0, step).context for step in range(200)}
    assert pairs == {(0, 4), (1, 5), (2, 6), (3, 7)}


def test_a_pair_without_a_frame_between_is_no_pair():
    order = np.array([0, 8, 20, 24, 28])
    assert sampler(counts=(5,), min_gap=8, max_gap=8, order=order).draw(0, 0).context == (2, 4)


def test_the_other_target_views():
    with_contexts = sampler(min_gap=8, max_gap=8, target_view="between_or_context")
    places = Counter()
    for step in range(2000):
        triplet = with_contexts.draw(0, step)
        places[triplet.target - triplet.context[0]] += 1
    assert set(places) == set(range(9)) and min(places.values()) > 150
    contexts_only = sampler(target_view="context")
    assert all(d.target in d.context for d in (contexts_only.draw(0, step) for step in range(100)))


def test_evaluation_triplets_are_fixed_distinct_and_spread_over_scenes():
    chosen = sampler(counts=(60, 60, 60)).spread(9)
    assert len(set(chosen)) == 9 and chosen == sampler(counts=(60, 60, 60)).spread(9)
    assert Counter(t.target // 60 for t in chosen) == {0: 3, 1: 3, 2: 3}


def test_pairs_without_baseline_are_left_out_and_counted():
    positions = np.zeros((30, 3))
    positions[15:] = 1.0
    chosen = sampler(counts=(30,), positions=positions)
    assert chosen.zero_baseline_pairs > 0
    for step in range(100):
        left, right = chosen.draw(0, step).context
        assert left < 15 <= right
    with pytest.raises(InputError, match="same camera position"):
        sampler(counts=(30,), positions=np.zeros((30, 3)))


def test_contexts_that_look_in_opposite_directions_are_left_out_and_counted():
    rotations = turned(np.where(np.arange(30) < 15, 0.0, 100.0))
    chosen = sampler(counts=(30,), rotations=rotations, max_angle=90.0)
    for step in range(100):
        left, right = chosen.draw(0, step).context
        assert (left < 15) == (right < 15)
    # as many pairs of a gap cross the middle as the gap is long
    assert chosen.opposite_pairs == 8 + 9 + 10 + 11 + 12 and chosen.num_pairs == 100 - 50
    unlimited = sampler(counts=(30,), rotations=rotations)
    assert unlimited.opposite_pairs == 0 and unlimited.num_pairs == 100


def test_the_largest_angle_itself_is_allowed():
    # four degrees a frame, gaps 8 to 12: 32, 36, 40, 44 and 48 degrees apart
    rotations = turned(4.0 * np.arange(30))
    gaps = {d.context[1] - d.context[0] for d in draws_of(sampler(counts=(30,), rotations=rotations, max_angle=40.0))}
    assert gaps == {8, 9, 10}
    # 22.5 degrees a frame: 8 frames are 180 degrees and 12 are 270, which is 90 the other way
    rotations = turned(22.5 * np.arange(30))
    gaps = {d.context[1] - d.context[0] for d in draws_of(sampler(counts=(30,), rotations=rotations, max_angle=90.0))}
    assert gaps == {12}


def test_rolling_about_the_viewing_direction_is_no_turn():
    angle = np.pi * np.arange(30) / 10  # upside down after 10 frames
    zero, one = np.zeros(30), np.ones(30)
    rows = [[np.cos(angle), -np.sin(angle), zero], [np.sin(angle), np.cos(angle), zero], [zero, zero, one]]
    chosen = sampler(counts=(30,), rotations=np.array(rows).transpose(2, 0, 1), max_angle=1.0)
    assert chosen.num_pairs == 100 and chosen.opposite_pairs == 0


def test_when_all_pairs_look_apart_the_message_says_so():
    rotations = turned(10.0 * np.arange(30))
    with pytest.raises(NoTripletError, match=r"^100 context pairs look more than 60 degrees apart:.*max-context-angle"):
        sampler(counts=(30,), rotations=rotations, max_angle=60.0)
    positions = np.zeros((30, 3))
    positions[0] = 1.0  # the five pairs of the first frame alone have a baseline
    with pytest.raises(NoTripletError, match=r"^5 context pairs.* apart, the other 95 have the same camera position"):
        sampler(counts=(30,), positions=positions, rotations=rotations, max_angle=60.0)


def test_a_draw_stays_what_it_was_in_earlier_versions():
    # a run that is resumed after an update must see the triplets it would have seen
    chosen = sampler()
    assert chosen.draw(42, 0) == TripletIndex((12, 23), 17)
    assert chosen.draw(42, 1, rank=1) == TripletIndex((12, 22), 17)
    assert chosen.draw(7, 49_999, item=3) == TripletIndex((34, 45), 38)


def test_several_targets_are_different_frames_strictly_between_the_contexts():
    chosen = sampler()
    for triplet in draws_of(chosen, targets=4):
        targets = [triplet.target, *triplet.more_targets]
        assert len(set(targets)) == len(targets) == 4
        assert all(triplet.context[0] < target < triplet.context[1] for target in targets)
    for triplet in draws_of(chosen, targets=20):  # as many as there are
        assert {triplet.target, *triplet.more_targets} == set(range(triplet.context[0] + 1, triplet.context[1]))


def test_all_places_between_the_contexts_are_drawn_as_further_targets():
    chosen = sampler(counts=(30,), min_gap=8, max_gap=8)
    places = Counter(frame - t.context[0] for t in draws_of(chosen, targets=3) for frame in t.more_targets)
    assert set(places) == set(range(1, 8)) and min(places.values()) > 25


def test_further_targets_leave_contexts_and_first_target_as_they_are():
    chosen = sampler()
    alone, several = draws_of(chosen), draws_of(chosen, targets=3)
    assert all(triplet.more_targets == () for triplet in alone)
    assert [(t.context, t.target) for t in several] == [(t.context, t.target) for t in alone]
    assert draws_of(chosen, targets=3) == several and draws_of(chosen, targets=1) == alone


@pytest.mark.parametrize(("target_view", "most"), [("context", 2), ("between_or_context", 9)])
def test_further_targets_of_the_other_target_views(target_view, most):
    chosen = sampler(min_gap=8, max_gap=8, target_view=target_view)
    for triplet in draws_of(chosen, targets=20):
        targets = {triplet.target, *triplet.more_targets}
        assert len(targets) == most and set(triplet.context) <= targets


def test_the_largest_gap_of_a_draw_can_be_lowered():
    chosen = sampler()
    assert {d.context[1] - d.context[0] for d in draws_of(chosen, max_gap=9)} == {8, 9}
    assert draws_of(chosen, max_gap=12) == draws_of(chosen)


def test_a_scene_without_a_pair_within_the_largest_gap_gives_its_smallest():
    order = np.arange(0, 30, 5)
    chosen = sampler(counts=(6,), min_gap=8, max_gap=20, order=order)  # pairs are 10, 15 or 20 apart
    assert {order[d.context[1]] - order[d.context[0]] for d in draws_of(chosen, max_gap=8)} == {10}


def test_the_largest_gap_grows_evenly_and_then_stays():
    gaps = [growing_gap(step, initial=8, final=12, warmup_steps=100) for step in range(0, 201)]
    assert [gaps[step] for step in (0, 24, 25, 49, 50, 75, 99, 100, 200)] == [8, 8, 9, 9, 10, 11, 11, 12, 12]
    assert gaps == sorted(gaps)


def test_a_scene_that_is_too_short_is_named_or_skipped():
    with pytest.raises(NoTripletError, match=r"s0, has 8 usable frames.*min-context-gap"):
        sampler(counts=(8,))
    assert sampler(counts=(30, 4)).skipped_scenes == ["s1"]


@pytest.mark.parametrize(("low", "high"), [(1, 5), (9, 8), (0, 0)])
def test_impossible_gaps_are_refused(low, high):
    with pytest.raises(InputError, match="min-context-gap"):
        sampler(min_gap=low, max_gap=high)


def test_frames_of_each_scene_are_those_that_a_look_at_each_scene_finds():
    generator = np.random.default_rng(0)
    scene_index, order = generator.integers(0, 7, 200), generator.integers(0, 50, 200)
    scene_index[scene_index == 4] = 5  # a scene without frames
    found = frames_by_scene(scene_index, order, 8)
    assert len(found) == 8
    for scene, frames in enumerate(found):
        expected = np.flatnonzero(scene_index == scene)
        np.testing.assert_array_equal(frames, expected[np.argsort(order[expected], kind="stable")])
