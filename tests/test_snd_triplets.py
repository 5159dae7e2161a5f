import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from data_parsers.re10k import Re10kScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.frames import load_views
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSettings
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.snd_mvsplat_pipeline import MVSplatDataManagerConfig
from snd_nerfstudio.snd_triplets import VIEWER_TRIPLETS, TripletDataManagerConfig


def manager(data: Path, **settings):
    config = TripletDataManagerConfig(data=data, **{"image_size": (56, 84), "eval_triplets": 4, **settings})
    return resolve(config, "fixed").setup(device="cpu", seed=5)


def test_a_step_is_a_function_of_seed_step_and_rank(rooms):
    first, second = manager(rooms), manager(rooms)
    for step in (0, 1, 2):
        first.next_train(step)
    (a,), (b,) = first.next_train(17), second.next_train(17)
    assert a.describe() == b.describe() and torch.equal(a.context.images, b.context.images)
    config = resolve(TripletDataManagerConfig(data=rooms, image_size=(56, 84)), "fixed")
    other = config.setup(device="cpu", seed=5, local_rank=1)
    assert any(other.next_train(s)[0].describe() != second.next_train(s)[0].describe() for s in range(3))


def test_triplets_carry_images_and_masks_of_the_wanted_size(rooms):
    (triplet,) = manager(rooms, image_size=(28, 42)).next_train(0)
    assert triplet.context.images.shape == (2, 3, 28, 42) and triplet.target.masks.shape == (1, 28, 42)
    assert len(triplet.context.masks.unique()) > 3


def test_depth_is_read_when_it_is_asked_for_and_not_for_training(rooms):
    data = manager(rooms)
    for triplet in (*data.next_train(0), data.eval_triplet(1), *data.train_triplets(2)):
        assert triplet.context.depths is None and triplet.target.depths is None
    for triplet in (data.eval_triplet(1, with_depth=True), *data.train_triplets(2, with_depth=True)):
        assert triplet.context.depths.shape == (2, 56, 84) and triplet.target.depths.shape == (1, 56, 84)
        assert (triplet.target.depths > 0).float().mean() > 0.9
    assert data.eval_triplet(1, with_depth=True).describe() == data.eval_triplet(1).describe()


def test_held_out_triplets_are_of_the_held_out_scene(rooms):
    data = manager(rooms)
    assert data.num_eval_triplets == 4
    assert {data.eval_triplet(n).scene for n in range(4)} == {"room_0002"}
    assert {data.next_train(s)[0].scene for s in range(12)} == {"room_0000", "room_0001"}


def test_the_viewer_is_given_one_scene_of_few_frames(rooms):
    data = manager(rooms)
    shown = data.train_dataset
    assert len(shown) == 32 and {f.parts[-3] for f in shown.image_filenames} == {"room_0000"}
    assert shown[3]["image"].shape == (56, 84, 3)
    assert shown.cameras.height.flatten().tolist() == [56] * 32
    assert data.shown_triplet.scene == "room_0000"


def test_the_viewer_is_offered_every_training_scene_and_triplets_along_its_path(rooms):
    data = manager(rooms)
    assert data.shown_scenes == ["room_0000", "room_0001"]
    for number, scene in enumerate(data.shown_scenes):
        indices = data.shown_indices(scene)
        assert 8 <= len(indices) <= VIEWER_TRIPLETS + 1 and len(set(indices)) == len(indices)
        assert indices[0] == data.triplets.spread_over(number, 1)[0]
        frames = [frame for index in indices for frame in (*index.context, index.target)]
        assert {data.train_frames.scene_names[data.train_frames.scene_index[frame]] for frame in frames} == {scene}
        lefts = [min(index.context) for index in indices[1:]]
        assert lefts == sorted(lefts) and max(lefts) - min(lefts) > 30
        middle = data.shown(indices[0])
        order = data.train_frames.frame_order[list(indices[0].context)]
        assert middle.scene == scene and 20 < order.mean() < 40
        assert {f.parts[-3] for f in data.scene_images(scene).image_filenames} == {scene}
    assert data.shown_triplet.describe() == data.shown(data.shown_indices("room_0000")[0]).describe()


def test_a_shown_triplet_is_called_by_its_frames(rooms):
    data = manager(rooms)
    index = data.shown_indices("room_0001")[2]
    triplet = data.shown(index)
    left, right = (Path(name).stem for name in triplet.context.names)
    assert data.shown_name(index) == f"{left}, {right} -> {Path(triplet.target.names[0]).stem}"
    names = [data.shown_name(other) for other in data.shown_indices("room_0001")]
    assert len(set(names)) == len(names)


def test_triplets_are_spread_over_one_scene_as_over_all_of_them(rooms):
    sampler = manager(rooms).triplets
    assert sampler.spread(10) == [*sampler.spread_over(0, 5), *sampler.spread_over(1, 5)]
    assert sampler.spread_over(0, 0) == []
    every = sampler.spread_over(0, 10**6)
    assert len(every) == len(set(every)) < 60


@pytest.fixture
def capture(rooms, tmp_path) -> Path:
    """One room as `ns-process-data` would write it."""
    scene = rooms / "scenes" / "room_0000"
    shutil.copytree(scene / "images", tmp_path / "images")
    shutil.copytree(scene / "depth", tmp_path / "depth")
    content = json.loads((scene / "transforms_train.json").read_text())
    for frame in content["frames"]:
        name = frame["file_path"]
        frame.update(file_path=f"images/{name}", depth_file_path=f"depth/{Path(name).stem}.png")
        frame.pop("mask_path", None)
    content["camera_model"] = "OPENCV"
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    return tmp_path


def test_a_single_capture_without_masks(capture):
    data = manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")
    (triplet,) = data.next_train(0)
    assert triplet.context.masks is None and data.num_eval_triplets == 4


def test_a_capture_without_masks_is_given_superpixels_that_are_kept_beside_it(capture):
    data = manager(capture, dataparser=NerfstudioScenesConfig(), masks="superpixel")
    assert data.with_masks and data.summary["mask_source"] == "superpixel"
    (triplet,) = data.next_train(0)
    assert triplet.context.masks.shape == (2, 56, 84) and 50 < triplet.target.masks.max() < 250
    assert triplet.target.masks.min() == 1
    wanted = {name for index in (0, 1) for name in data.next_train(index)[0].context.names}
    again = manager(capture, dataparser=NerfstudioScenesConfig(), masks="superpixel")
    (same,) = again.next_train(0)
    assert torch.equal(same.context.masks, triplet.context.masks) and again.mask_maker.cache.statistics.found >= 3
    assert len(list((capture / ".snd_masks").rglob("*.png"))) >= len(wanted)


def test_masks_are_kept_where_the_user_says(capture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    data = manager(capture, dataparser=NerfstudioScenesConfig(), masks="superpixel", mask_cache=folder / "masks")
    data.next_train(0)
    assert list((folder / "masks").rglob("*.png")) and not (capture / ".snd_masks").exists()


def test_frames_are_kept_where_the_user_says_and_are_the_same_when_they_are_found(rooms, tmp_path):
    plain = manager(rooms).next_train(0)[0]
    first = manager(rooms, frame_cache=tmp_path / "frames")
    assert torch.equal(first.next_train(0)[0].context.images, plain.context.images)
    second = manager(rooms, frame_cache=tmp_path / "frames")
    assert torch.equal(second.next_train(0)[0].context.images, plain.context.images)
    assert second.frame_cache.statistics.found >= 3 and not second.frame_cache.statistics.damaged


def test_a_dataset_that_cannot_be_written_to_names_the_flag(capture):
    (capture / ".snd_masks").write_text("in the way")
    with pytest.raises(InputError, match="--pipeline.datamanager.mask-cache"):
        manager(capture, dataparser=NerfstudioScenesConfig(), masks="superpixel")


def test_chunks_give_the_triplets_that_the_same_frames_give_as_files(rooms, packed_rooms, tmp_path):
    data = manager(packed_rooms, dataparser=Re10kScenesConfig(), masks="none")
    assert [data.train_frames.scene_names, data.eval_frames.scene_names] == [("room_0000", "room_0001"), ("room_0002",)]
    files = manager(rooms, masks="none").train_frames
    for step in range(3):
        (triplet,) = data.next_train(step)
        number = int(triplet.scene[-1])
        for views in (triplet.context, triplet.target):
            places = [60 * number + int(Path(name).stem) for name in views.names]
            same = load_views(files, places, (56, 84), with_masks=False, with_depth=False)
            assert torch.equal(views.images, same.images)
            torch.testing.assert_close(views.camera_to_worlds, same.camera_to_worlds, rtol=0, atol=2e-6)
            torch.testing.assert_close(views.intrinsics, same.intrinsics)
    assert data.eval_triplet(0).scene == "room_0002" and not data.train_frames.has_depth


def test_frames_in_chunks_are_given_superpixels(packed_rooms, tmp_path):
    settings = {"dataparser": Re10kScenesConfig(), "masks": "superpixel", "mask_cache": tmp_path / "masks"}
    data = manager(packed_rooms, **settings)
    (triplet,) = data.next_train(0)
    assert 50 < triplet.target.masks.max() < 250 and triplet.target.masks.min() == 1
    again = manager(packed_rooms, **settings)
    assert torch.equal(again.next_train(0)[0].context.masks, triplet.context.masks)
    assert again.mask_maker.cache.statistics.found >= 3
    with pytest.raises(InputError, match="--pipeline.datamanager.masks superpixel"):
        manager(packed_rooms, dataparser=Re10kScenesConfig())


def test_any_other_dataparser_is_one_scene_whose_depth_follows_its_scaling(capture):
    parser = NerfstudioDataParserConfig()
    data = manager(capture, dataparser=parser, masks="none")
    ours = manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")
    scale = data.train_dataparser_outputs.dataparser_scale
    assert scale != 1.0 and data.num_eval_triplets > 0
    (triplet,) = data.train_triplets(1, with_depth=True)
    v: Views = triplet.context
    baseline = (v.camera_to_worlds[0, :3, 3] - v.camera_to_worlds[1, :3, 3]).norm()
    names = [f.name for f in ours.train_frames.image_files]
    there = [names.index(name) for name in v.names]
    metric = np.linalg.norm(np.diff(ours.train_frames.camera_to_worlds[there, :3, 3], axis=0))
    assert float(baseline) == pytest.approx(metric * scale, rel=1e-3)
    reference = load_views(ours.train_frames, there, (56, 84), with_masks=False, with_depth=True)
    torch.testing.assert_close(v.depths, reference.depths * scale)


def test_too_few_frames_to_hold_some_out_is_said_and_not_fatal(capture, capsys):
    content = json.loads((capture / "transforms.json").read_text())
    content["frames"] = sorted(content["frames"], key=lambda f: f["file_path"])[:20]
    (capture / "transforms.json").write_text(json.dumps(content))
    data = manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")
    assert data.eval_dataset is None and data.num_eval_triplets == 0
    assert "Nothing is held out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masks": "stored"}, "--pipeline.datamanager.masks superpixel.*--pipeline.datamanager.masks none"),
        ({"masks": "superpixel", "superpixels": SuperpixelSettings(regions=0)}, "superpixels.regions 0: give"),
        ({"image_size": (7, 84)}, "image-size"),
        ({"workers": 0}, "--pipeline.datamanager.workers must be at least 1"),
        ({"triplet_pool": 0}, "--pipeline.datamanager.triplet-pool must be at least 1"),
        ({"triplet_pool": -3}, "--pipeline.datamanager.triplet-pool must be at least 1"),
        (
            {"triplet_pool": 9, "initial_max_context_gap": 9, "gap_warmup_steps": 9},
            "--pipeline.datamanager.triplet-pool and --pipeline.datamanager.gap-warmup-steps: .*leave one",
        ),
        ({"max_context_angle": 0.0}, "--pipeline.datamanager.max-context-angle 0: give degrees"),
        ({"max_context_angle": float("nan")}, "--pipeline.datamanager.max-context-angle nan"),
        ({"max_context_angle": 1e-3}, "pairs look more than 0.001 degrees apart"),
        ({"initial_max_context_gap": 9}, "gap-warmup-steps 0: give both"),
        ({"gap_warmup_steps": 9}, "initial-max-context-gap None.*give both"),
        ({"initial_max_context_gap": 9, "gap_warmup_steps": -1}, "gap-warmup-steps -1: give both"),
        ({"initial_max_context_gap": 7, "gap_warmup_steps": 9}, r"gap 7: it must lie between .*min-context-gap \(8\)"),
        ({"initial_max_context_gap": 13, "gap_warmup_steps": 9}, r"gap 13: it must .*max-context-gap \(12\)"),
        ({"min_context_gap": 50, "max_context_gap": 70}, "has 44 usable frames"),
        ({"data": Path("/nowhere")}, "--data /nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_said_before_training(capture, settings, message):
    with pytest.raises(InputError, match=message):
        manager(**{"data": capture, "dataparser": NerfstudioScenesConfig(), "masks": "none", **settings})


def gap(data, triplet) -> int:
    order = {file.name: int(place) for file, place in zip(data.train_frames.image_files, data.train_frames.frame_order)}
    left, right = (order[name] for name in triplet.context.names)
    return right - left


def test_gaps_grow_while_training_and_are_the_same_after_resuming(rooms):
    growing = {"initial_max_context_gap": 4, "gap_warmup_steps": 40, "min_context_gap": 4, "max_context_gap": 24}
    never = {**growing, "initial_max_context_gap": None, "gap_warmup_steps": 0}
    data, resumed, usual = manager(rooms, **growing), manager(rooms, **growing), manager(rooms, **never)
    assert [data.max_context_gap(step) for step in (0, 1, 2, 20, 39, 40, 1000)] == [4, 4, 5, 14, 23, 24, 24]
    assert [gap(data, data.next_train(step)[0]) for step in (0, 1)] == [4, 4]
    assert all(4 <= gap(data, data.next_train(step)[0]) <= 4 + step // 2 for step in range(2, 10))
    assert data.next_train(9)[0].describe() == resumed.next_train(9)[0].describe()
    assert data.next_train(60)[0].describe() == usual.next_train(60)[0].describe()
    # what is evaluated does not change with the step
    assert data.eval_triplet(0).describe() == usual.eval_triplet(0).describe()


def test_contexts_that_look_in_opposite_directions_are_left_out_where_they_are_matched(capture, logged):
    content = json.loads((capture / "transforms.json").read_text())
    for frame in sorted(content["frames"], key=lambda frame: frame["file_path"])[20:]:
        pose = np.array(frame["transform_matrix"])
        pose[:3, [0, 2]] *= -1  # turned about the vertical axis, where it stands
        frame["transform_matrix"] = pose.tolist()
    (capture / "transforms.json").write_text(json.dumps(content))
    settings = {"data": capture, "dataparser": NerfstudioScenesConfig(), "masks": "none", "image_size": (56, 84)}
    matched = resolve(MVSplatDataManagerConfig(**settings), "fixed").setup(device="cpu")
    # as many pairs of a gap cross the turn as the gap is long: 8 + 9 + 10 + 11 + 12
    assert matched.triplets.opposite_pairs == 50
    printed = logged()
    assert "50 context pairs that look more than 90 degrees apart are left out." in printed
    # without matching, as with the `depth` reconstructor, they stay
    config = TripletDataManagerConfig(**settings)
    other = resolve(config, "fixed").setup(device="cpu")
    assert other.triplets.opposite_pairs == 0 and other.triplets.num_pairs == matched.triplets.num_pairs + 50
    config.max_context_angle = 90.0
    assert resolve(config, "fixed").setup(device="cpu").triplets.num_pairs == matched.triplets.num_pairs


@pytest.mark.parametrize("damage", ["all", "one"])
def test_without_depth_everything_else_goes_on(capture, damage):
    content = json.loads((capture / "transforms.json").read_text())
    frames = sorted(content["frames"], key=lambda frame: frame["file_path"])
    for frame in frames if damage == "all" else frames[:1]:
        del frame["depth_file_path"]
    (capture / "transforms.json").write_text(json.dumps(content))
    data = manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")
    assert not data.train_frames.has_depth
    (triplet,) = data.train_triplets(1, with_depth=True)
    assert triplet.context.depths is None and triplet.target.depths is None
    # the first frame is not among the held-out ones, which may still have theirs
    held_out = data.eval_triplet(0, with_depth=True)
    assert data.eval_frames.has_depth == (damage == "one") == (held_out.target.depths is not None)


def several(data: Path, targets: int, **settings):
    settings = {"image_size": (28, 42), "eval_triplets": 4, "targets_per_pair": targets, **settings}
    return resolve(MVSplatDataManagerConfig(data=data, **settings), "fixed").setup(device="cpu", seed=5)


def test_a_pair_may_have_several_targets_in_training_and_has_one_in_evaluation(rooms):
    data, alone = several(rooms, 3), several(rooms, 1)
    order = {str(file): int(p) for file, p in zip(data.train_frames.image_files, data.train_frames.frame_order)}
    for step in range(6):
        (triplet,), (single,) = data.next_train(step), alone.next_train(step)
        scene = data.train_frames.image_files[0].parents[2] / triplet.scene / "images"
        left, right = (order[str(scene / name)] for name in triplet.context.names)
        places = [order[str(scene / name)] for name in triplet.target.names]
        assert len(set(places)) == 3 and all(left < place < right for place in places)
        assert triplet.target.images.shape == (3, 3, 28, 42) and triplet.target.camera_to_worlds.shape == (3, 4, 4)
        assert len(triplet.target.images.unique(dim=0)) == 3
        assert single.context.names == triplet.context.names and single.target.names == triplet.target.names[:1]
        assert torch.equal(single.target.images[0], triplet.target.images[0])
    assert len(data.eval_triplet(0).target) == len(data.shown_triplet.target) == 1
    with pytest.raises(InputError, match="--pipeline.datamanager.targets-per-pair must be at least 1"):
        several(rooms, 0)


def test_masks_are_not_read_where_they_are_not_used(rooms):
    (triplet,) = several(rooms, 2).next_train(0)
    assert triplet.context.masks is None and triplet.context.depths is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (None, None)),
        ({"near": 0.3}, (0.3, None)),
        ({"far": 7.0}, (None, 7.0)),
        ({"near": 0.3, "far": 7.0, "bounds": "scene"}, (0.3, 7.0)),
    ],
)
def test_near_and_far_are_unknown_unless_they_are_given(rooms, settings, expected):
    assert several(rooms, 1, **settings).depth_range == expected


def test_near_and_far_of_the_scene_are_those_of_its_depth_maps(rooms, logged):
    data = several(rooms, 1, bounds="scene")
    frames = data.train_frames
    values = []
    for index in np.linspace(0, len(frames) - 1, 48).round().astype(int):
        depth = np.asarray(Image.open(frames.depth_files[index])).astype(np.float32) / 1000
        values.append(depth[depth > 0][::7])
    near, far = np.quantile(np.concatenate(values), [0.005, 0.995])
    assert data.depth_range == pytest.approx((near / 1.1, far * 1.1), rel=1e-5)
    assert f"near {near / 1.1:.2f}, far {far * 1.1:.2f}" in logged()
    assert several(rooms, 1, bounds="scene", near=0.01).depth_range == pytest.approx((0.01, far * 1.1), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"near": 8.0, "far": 8.0}, "near 8.0 and --pipeline.datamanager.far 8.0: 0 < near < far"),
        ({"near": -1.0}, "near -1.0"),
        ({"far": 0.001, "bounds": "scene"}, "far 0.001: 0 < near < far"),
    ],
)
def test_near_and_far_out_of_order_are_refused(rooms, settings, message):
    with pytest.raises(InputError, match=message):
        several(rooms, 1, **settings).depth_range


def test_bounds_of_a_scene_without_depth_name_the_flags(capture):
    content = json.loads((capture / "transforms.json").read_text())
    for frame in content["frames"]:
        del frame["depth_file_path"]
    (capture / "transforms.json").write_text(json.dumps(content))
    data = several(capture, 1, dataparser=NerfstudioScenesConfig(), bounds="scene")
    with pytest.raises(InputError, match="bounds scene.*--pipeline.datamanager.near and --pipeline.datamanager.far"):
        data.depth_range
    given = several(capture, 1, dataparser=NerfstudioScenesConfig(), bounds="scene", near=1.0, far=2.0)
    assert given.depth_range == (1.0, 2.0)


# ---------------------------------------------------------------------- a fixed list of triplets


def ranked(data: Path, rank: int = 0, seed: int = 5, **settings):
    config = TripletDataManagerConfig(data=data, image_size=(56, 84), eval_triplets=4, **settings)
    return resolve(config, "fixed").setup(device="cpu", seed=seed, local_rank=rank)


@pytest.mark.parametrize("items", [1, 3])
def test_every_epoch_visits_each_triplet_of_the_pool_once_in_another_order(rooms, items):
    data = ranked(rooms, triplet_pool=7, triplets_per_step=items)
    pool = [data.pool_index(number) for number in range(7)]
    assert len(set(pool)) == 7  # none was drawn twice here
    visited = [index for step in range(42 // items) for index in data.step_indices(step)]
    epochs = [visited[7 * epoch : 7 * (epoch + 1)] for epoch in range(6)]
    assert all(set(epoch) == set(pool) and len(epoch) == 7 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


def test_a_step_s_triplets_of_a_pool_are_a_function_of_seed_step_and_rank(rooms):
    def steps_of(order, **settings):
        data = ranked(rooms, triplet_pool=5, triplets_per_step=2, **settings)
        found = {step: data.step_indices(step) for step in order}
        return [found[step] for step in range(12)]

    usual = steps_of(range(12))
    assert usual == steps_of(reversed(range(12))) == steps_of(range(12), workers=1, prefetch=1)
    for other in (steps_of(range(12), rank=1), steps_of(range(12), seed=6)):
        assert other != usual
        # another list, not only another order
        assert {index for step in other for index in step} != {index for step in usual for index in step}


def test_what_is_loaded_is_what_the_pool_says(rooms):
    data = ranked(rooms, triplet_pool=3, triplets_per_step=2)
    for step in (0, 1, 2, 7):
        loaded = [triplet.describe() for triplet in data.next_train(step)]
        assert loaded == [data.load(data.train_frames, index).describe() for index in data.step_indices(step)]
    assert len({data.next_train(step)[0].describe() for step in range(12)}) == 3


def test_a_larger_pool_begins_with_the_smaller_one_and_a_pool_of_one_is_one_triplet(rooms):
    small, large, single = (ranked(rooms, triplet_pool=size) for size in (4, 9, 1))
    assert [small.pool_index(n) for n in range(4)] == [large.pool_index(n) for n in range(4)]
    assert {single.step_indices(step)[0] for step in range(5)} == {small.pool_index(0)}


def test_without_a_pool_every_step_draws_anew(rooms):
    data = ranked(rooms, triplets_per_step=2)
    assert len({index for step in range(20) for index in data.step_indices(step)}) > 30
    assert data.step_indices(3) == [data.triplets.draw(5, 3, 0, item) for item in range(2)]


def test_a_pool_may_have_several_targets_per_pair(rooms):
    data = several(rooms, 3, triplet_pool=4)
    assert all(len(index.more_targets) == 2 for step in range(8) for index in data.step_indices(step))
    (triplet,) = data.next_train(0)
    assert triplet.target.images.shape == (3, 3, 28, 42)
    assert len({data.step_indices(step)[0] for step in range(8)}) == 4


# ---------------------------------------------------------------------- contexts chosen by overlap


@pytest.fixture
def unordered(capture) -> Path:
    """The capture under names that say nothing about its order."""
    content = json.loads((capture / "transforms.json").read_text())
    places = np.random.default_rng(0).permutation(len(content["frames"]))
    for place, frame in zip(places, content["frames"], strict=True):
        name = f"images/photo_{place:03d}.JPG"
        (capture / frame["file_path"]).rename(capture / name)
        frame["file_path"] = name
    (capture / "transforms.json").write_text(json.dumps(content))
    return capture


def by_overlap(data: Path, **settings):
    settings = {"dataparser": NerfstudioScenesConfig(), "masks": "none", "pairs": "overlap", **settings}
    return manager(data, **settings)


def test_pairs_by_overlap_need_no_order(unordered, logged):
    data, again = by_overlap(unordered), by_overlap(unordered)
    for step in (0, 1, 2):
        (triplet,), (same,) = data.next_train(step), again.next_train(step)
        assert triplet.describe() == same.describe()
    poses = data.train_frames.camera_to_worlds
    for step in range(40):
        (index,) = data.step_indices(step)
        left, right = index.context
        assert 0.3 - 1e-2 <= data.triplets.overlap(left, right) <= 0.8 + 1e-2
        assert (poses[left, :3, 2] * poses[right, :3, 2]).sum() >= 0
        own = data.triplets.overlap(left, right)
        assert min(data.triplets.overlap(frame, index.target) for frame in index.context) >= own
    assert data.num_eval_triplets == 4 and data.shown_indices(data.shown_scenes[0])[0]
    printed = logged()
    assert "Training on 44 frames of 1 scenes" in printed and "frusta" not in printed


def test_pairs_by_overlap_of_frusta_where_there_is_no_depth(unordered, capsys, logged):
    content = json.loads((unordered / "transforms.json").read_text())
    for frame in content["frames"]:
        del frame["depth_file_path"]
    (unordered / "transforms.json").write_text(json.dumps(content))
    assert by_overlap(unordered).triplets.num_pairs > 50
    assert "overlaps are those of frusta, and near and far are guessed" in logged()
    given = by_overlap(unordered, near=0.7, far=8.0)
    assert given.triplets.num_pairs > 50 and "guessed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_overlap": 0.9}, "min-overlap 0.9 and --pipeline.datamanager.max-overlap 0.8"),
        ({"min_context_baseline": 50.0}, "largest overlap of two frames: .*raise --pipeline.datamanager.max-overlap"),
        ({"min_context_baseline": -1.0}, "--pipeline.datamanager.min-context-baseline -1: give a distance"),
        ({"min_context_baseline": 2.0, "max_context_baseline": 1.0}, "0 <= min < max"),
        ({"initial_max_context_gap": 9, "gap_warmup_steps": 5}, "are of gaps: leave them out"),
        ({"pairs": "gap", "max_context_baseline": 1.0}, "add --pipeline.datamanager.pairs overlap"),
    ],
)
def test_what_is_wrong_with_the_limits_of_overlap_is_said(unordered, settings, message):
    with pytest.raises(InputError, match=message):
        by_overlap(unordered, **settings)


def test_training_with_pairs_by_overlap(unordered, tiny_config, clean_writers):
    tiny_config.data = tiny_config.pipeline.datamanager.data = unordered
    datamanager = tiny_config.pipeline.datamanager
    datamanager.dataparser, datamanager.masks, datamanager.pairs = NerfstudioScenesConfig(), "none", "overlap"
    tiny_config.max_num_iterations = 2
    tiny_config.steps_per_save = 2
    trainer = tiny_config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    assert trainer.pipeline.datamanager.triplets.num_pairs > 50
    assert list((tiny_config.get_base_dir() / "nerfstudio_models").glob("*.ckpt"))
