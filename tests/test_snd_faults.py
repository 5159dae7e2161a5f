"""Files that break in the middle of a run, and datasets that change under it."""

import json
import shutil

import pytest

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.faults import EMPTY_STEPS


@pytest.fixture
def own_rooms(rooms, tmp_path):
    return shutil.copytree(rooms, tmp_path / "rooms")


@pytest.fixture
def config(tiny_config, own_rooms, clean_writers):
    tiny_config.data = tiny_config.pipeline.datamanager.data = own_rooms
    tiny_config.pipeline.datamanager.workers = 1
    tiny_config.pipeline.datamanager.prefetch = 1
    tiny_config.save_config()
    return tiny_config


def started(config):
    trainer = config.setup()
    trainer.setup()
    return trainer


def break_image(data, step):
    """Damage the target image of a training step's first triplet."""
    file = data.train_frames.image_files[data.step_indices(step)[0].target]
    file.write_bytes(file.read_bytes()[:100])
    return file


def test_a_file_that_breaks_in_the_middle_of_a_run_is_named(config):
    trainer = started(config)
    file = break_image(trainer.pipeline.datamanager, 4)
    with pytest.raises(BrokenFileError, match=f"{file.name} cannot be decoded"):
        trainer.train()


def test_with_skip_it_is_left_out_counted_and_named_and_nothing_takes_its_place(config, capsys):
    config.pipeline.datamanager.on_error = "skip"
    config.pipeline.datamanager.triplets_per_step = 2
    trainer = started(config)
    data = trainer.pipeline.datamanager
    file = break_image(data, 4)
    broken = data.step_indices(4)[0].target
    trainer.train()
    steps = [data.step_indices(step) for step in range(6)]
    frames = [{*triplet.context, triplet.target} for step in steps for triplet in step]
    expected = sum(broken in used for used in frames)
    assert data.faults.triplets("training") == expected >= 1 and data.faults.files == 1
    assert "".join(capsys.readouterr().out.split()).count(file.name) == 1
    assert len(data.next_train(4)) == sum(broken not in {*t.context, t.target} for t in steps[4])


def test_a_step_of_one_broken_triplet_learns_nothing_and_the_run_goes_on(config):
    config.pipeline.datamanager.on_error = "skip"
    trainer = started(config)
    data = trainer.pipeline.datamanager
    break_image(data, 2)
    assert data.next_train(2) == []
    _, losses, metrics = trainer.pipeline.get_train_loss_dict(2)
    assert float(losses["distillation"]) == 0 and float(metrics["skipped"]) == 2
    losses["distillation"].backward()


def test_a_dataset_that_is_gone_ends_the_run_even_so(config):
    config.pipeline.datamanager.on_error = "skip"
    config.max_num_iterations = 2 * EMPTY_STEPS
    trainer = started(config)
    for folder in trainer.config.pipeline.datamanager.data.glob("scenes/*/images"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=f"last {EMPTY_STEPS} steps no triplet could be read.*does not exist"):
        trainer.train()


def test_a_run_starts_with_a_missing_file_only_where_that_is_allowed(config, own_rooms, capsys):
    missing = sorted((own_rooms / "scenes/room_0000/images").iterdir())[30]
    missing.unlink()
    with pytest.raises(InputError, match=f"Missing image .*{missing.name}"):
        started(config)
    config.pipeline.datamanager.on_error = "skip"
    trainer = started(config)
    assert missing.name in "".join(capsys.readouterr().out.split())
    assert trainer.pipeline.datamanager.faults.files == 1  # whatever is said of it


def test_a_dataset_that_lacks_many_files_is_refused_in_any_case(config, own_rooms):
    config.pipeline.datamanager.on_error = "skip"
    for image in sorted((own_rooms / "scenes/room_0000/images").iterdir())[:40]:
        image.unlink()
    with pytest.raises(InputError, match="40 of 120 are missing"):
        started(config)


def test_evaluation_counts_what_it_leaves_out(config):
    config.pipeline.datamanager.on_error = "skip"
    trainer = started(config)
    data = trainer.pipeline.datamanager
    file = data.eval_frames.image_files[data.eval_indices[0].target]
    file.write_bytes(b"")
    results = trainer.pipeline.get_average_eval_image_metrics()
    used = [{*index.context, index.target} for index in data.eval_indices]
    assert results["skipped"] == sum(data.eval_indices[0].target in frames for frames in used) >= 1


def test_a_dataset_in_which_every_file_is_wrong_is_refused_in_any_case(config, own_rooms):
    config.pipeline.datamanager.on_error = "skip"
    for file in own_rooms.glob("scenes/*/transforms_train.json"):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "w": content["h"], "h": content["w"]}))
    with pytest.raises(InputError, match=r"was calibrated for 56x84.*120 of the 120 that were looked at are wrong"):
        started(config)


def test_the_viewer_shows_grey_where_a_frame_cannot_be_read(config, own_rooms):
    config.pipeline.datamanager.on_error = "skip"
    trainer = started(config)
    data = trainer.pipeline.datamanager
    data.train_dataset.image_filenames[0].write_bytes(b"")
    assert (data.train_dataset[0]["image"] == 0.5).all() and data.train_dataset[0]["image"].shape == (56, 84, 3)
    assert data.train_dataset[1]["image"].std() > 0.05 and data.faults.files == 1
    data.faults.on_error = "raise"
    with pytest.raises(BrokenFileError, match="cannot be decoded"):
        data.train_dataset[0]


def test_a_broken_depth_map_is_left_out_of_bounds_and_overlaps(config, own_rooms):
    broken = sorted((own_rooms / "scenes/room_0000/depth").iterdir())[0]
    broken.write_bytes(b"")
    data = config.pipeline.datamanager
    data.reconstructor, data.pairs, data.on_error = "depth", "overlap", "skip"
    pipeline = config.pipeline.setup(device="cpu")
    assert pipeline.datamanager.faults.files == 1 and pipeline.datamanager.triplets.num_pairs > 100
    assert all(
        0 not in {*index.context, index.target} for s in range(50) for index in pipeline.datamanager.step_indices(s)
    )
    data.on_error = "raise"
    with pytest.raises(BrokenFileError, match=broken.name):
        config.pipeline.setup(device="cpu")


def finish(config):
    trainer = started(config)
    trainer.train()
    config.load_dir, config.timestamp = trainer.checkpoint_dir, "resumed"
    config.max_num_iterations += 2
    return trainer


def test_a_changed_dataset_is_noticed_when_its_run_is_resumed(config, own_rooms, logged):
    config.max_num_iterations = 2
    finish(config)
    file = own_rooms / "scenes/room_0001/transforms_train.json"
    content = json.loads(file.read_text())
    content["frames"].pop()
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="has changed since the run .*frames: 120 then, 119 now.*changed-data warn"):
        started(config)
    config.pipeline.datamanager.changed_data = "warn"
    resumed = started(config)
    assert "going on with it as it is now" in logged()
    resumed.train()


def test_depth_maps_that_come_or_go_are_noticed_when_a_run_is_resumed(config, own_rooms, mvsplat_file, tmp_path):
    data = config.pipeline.datamanager
    data.pairs, data.masks, data.reconstructor = "overlap", "none", "mvsplat"
    data.reconstructor_checkpoint, config.pipeline.checked_triplets = mvsplat_file, 0
    with_depth = config.pipeline.setup(device="cpu").datamanager
    for scene in (own_rooms / "scenes").iterdir():
        (scene / "depth").rename(scene / "elsewhere")
    data.near, data.far = 0.5, 8.0
    without = config.pipeline.setup(device="cpu").datamanager
    for now, then in ((with_depth, without), (without, with_depth)):
        with pytest.raises(InputError, match="has changed since the run .*other training: depth"):
            now.check_unchanged(then.summary, tmp_path / "run" / "config.yml")
        now.check_unchanged(now.summary, tmp_path / "run" / "config.yml")


def test_an_unchanged_dataset_elsewhere_is_resumed(config, own_rooms, tmp_path):
    config.max_num_iterations = 2
    finish(config)
    config.data = config.pipeline.datamanager.data = own_rooms.rename(tmp_path / "moved")
    started(config).train()
