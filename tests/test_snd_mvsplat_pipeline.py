import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from nerfstudio.engine.callbacks import TrainingCallbackAttributes

from snd_nerfstudio import snd_triplets
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import MVSplat
from snd_nerfstudio.snd_mvsplat_pipeline import MVSplatPipeline, MVSplatPipelineConfig, load_trained_network
from snd_nerfstudio.snd_pipeline import SnDPipelineConfig
from snd_nerfstudio.snd_triplet_pipeline import median_depth


@pytest.fixture
def pipeline(tiny_mvsplat_config) -> MVSplatPipeline:
    return tiny_mvsplat_config.pipeline.setup(device="cpu")


def turn_every_second_camera(config: MVSplatPipelineConfig | SnDPipelineConfig, folder: Path, room: str) -> None:
    """Let a config read the rooms such that no pair of one of them can be matched: the two look apart.

    Such pairs are left out unless a larger angle is asked for, as it is here.
    """
    data = config.datamanager
    shutil.copytree(data.data, folder)
    file = folder / "scenes" / room / "transforms_train.json"
    content = json.loads(file.read_text())
    for frame in sorted(content["frames"], key=lambda frame: frame["file_path"])[::2]:
        pose = np.array(frame["transform_matrix"])
        pose[:3, [0, 2]] *= -1  # about the vertical axis, where it stands
        frame["transform_matrix"] = pose.tolist()
    file.write_text(json.dumps(content))
    data.data, data.max_context_angle = folder, 180.0
    data.min_context_gap = data.max_context_gap = 9


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in pipeline.model.network.named_parameters()}


# ---------------------------------------------------------------------- steps


def test_a_step_gives_the_loss_and_what_it_is_made_of(pipeline):
    _, losses, metrics = pipeline.get_train_loss_dict(0)
    assert list(losses) == ["photometric"] and losses["photometric"].requires_grad
    assert set(metrics) == {"mse", "psnr", "coverage", "skipped_pairs"}
    assert not any(value.requires_grad for value in metrics.values())
    assert metrics["coverage"] > 0.9 and metrics["skipped_pairs"] == 0


def test_a_step_is_a_function_of_seed_and_step(tiny_mvsplat_config):
    first, second = (tiny_mvsplat_config.pipeline.setup(device="cpu") for _ in range(2))
    first.get_train_loss_dict(0)
    ours, theirs = (p.get_train_loss_dict(3)[1]["photometric"] for p in (first, second))
    assert torch.equal(ours, theirs) and not torch.equal(ours, first.get_train_loss_dict(4)[1]["photometric"])


def test_more_triplets_and_targets_are_averaged(tiny_mvsplat_config):
    tiny_mvsplat_config.pipeline.datamanager.triplets_per_step = 3
    tiny_mvsplat_config.pipeline.model.background = "black"
    pipeline = tiny_mvsplat_config.pipeline.setup(device="cpu")
    together = pipeline.get_train_loss_dict(2)[1]["photometric"]
    with torch.no_grad():
        alone = [pipeline.model([triplet])["loss"] for triplet in pipeline.datamanager.next_train(2)]
    assert len(alone) == 3 and len({float(loss) for loss in alone}) == 3
    torch.testing.assert_close(together.detach(), torch.stack(alone).mean(), rtol=1e-4, atol=0.0)


def test_pairs_that_cannot_be_matched_are_skipped_and_counted(tiny_mvsplat_config, tmp_path, logged, monkeypatch):
    monkeypatch.setattr(snd_triplets, "MAX_ANGLE", 180.0)  # or the flag would be refused
    turn_every_second_camera(tiny_mvsplat_config.pipeline, tmp_path / "rooms", "room_0001")
    tiny_mvsplat_config.pipeline.datamanager.triplets_per_step = 4
    pipeline = tiny_mvsplat_config.pipeline.setup(device="cpu")
    drawn = [[t.scene for t in pipeline.datamanager.next_train(step)] for step in range(12)]
    mixed = next(step for step, scenes in enumerate(drawn) if len(set(scenes)) == 2)
    _, losses, metrics = pipeline.get_train_loss_dict(mixed)
    apart = drawn[mixed].count("room_0001")
    assert 0 < apart < 4
    assert metrics["skipped_pairs"] == apart and losses["photometric"] > 0
    printed = logged()
    assert printed.count("Skipped room_0001: DSC") == apart and "opposite directions" in printed
    losses["photometric"].backward()
    assert pipeline.model.network.encoder.stem.weight.grad.abs().max() > 0


def test_a_step_of_such_pairs_alone_trains_nothing(tiny_mvsplat_config, tmp_path, clean_writers, monkeypatch):
    monkeypatch.setattr(snd_triplets, "MAX_ANGLE", 180.0)  # or the flag would be refused
    config = tiny_mvsplat_config
    turn_every_second_camera(config.pipeline, tmp_path / "rooms", "room_0001")
    config.max_num_iterations = 1
    trainer = config.setup()
    trainer.setup()
    manager = trainer.pipeline.datamanager
    manager.seed = next(seed for seed in range(50) if manager.triplets.draw(seed, 0).context[0] >= 60)
    assert [triplet.scene for triplet in manager.next_train(0)] == ["room_0001"]
    before = weights(trainer.pipeline)
    trainer.train()
    assert trainer.pipeline.model.skipped_pairs == 1
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer.pipeline).items())
    assert (trainer.checkpoint_dir / "step-000000000.ckpt").is_file()


# ---------------------------------------------------------------------- near and far


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, (0.7, 8.0)), ({"near": 0.4}, (0.4, 8.0)), ({"near": 1.5, "far": 6.0}, (1.5, 6.0))],
)
def test_near_and_far_reach_the_network(tiny_mvsplat_config, flags, expected):
    for name, value in flags.items():
        setattr(tiny_mvsplat_config.pipeline.datamanager, name, value)
    settings = tiny_mvsplat_config.pipeline.setup(device="cpu").model.network.settings
    assert (settings.near, settings.far) == expected


def test_near_and_far_may_be_read_off_the_depth_maps(tiny_mvsplat_config):
    data = tiny_mvsplat_config.pipeline.datamanager
    data.near, data.far, data.bounds = None, None, "scene"
    pipeline = tiny_mvsplat_config.pipeline.setup(device="cpu")
    settings = pipeline.model.network.settings
    assert (settings.near, settings.far) == pipeline.datamanager.depth_range
    depths = pipeline.datamanager.eval_triplet(0, with_depth=True).context.depths
    assert ((depths > settings.near) & (depths < settings.far)).float().mean() > 0.95
    assert settings.far < 20  # it is not the default of 100


def test_pairs_too_close_for_the_plane_sweep_are_left_out(tiny_mvsplat_config, rooms, tmp_path):
    shutil.copytree(rooms, tmp_path / "rooms")
    file = tmp_path / "rooms" / "scenes" / "room_0001" / "transforms_train.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:
        for row in frame["transform_matrix"][:3]:
            row[3] *= 1e-4  # baselines of some 40 micrometres: less than a ten-thousandth of near
    file.write_text(json.dumps(content))
    tiny_mvsplat_config.pipeline.datamanager.data = tmp_path / "rooms"
    manager = tiny_mvsplat_config.pipeline.setup(device="cpu").datamanager
    assert manager.triplets.zero_baseline_pairs == 250 and manager.triplets.skipped_scenes == ["room_0001"]


def test_near_beyond_far_is_refused_before_training(tiny_mvsplat_config):
    tiny_mvsplat_config.pipeline.datamanager.near = 9.0
    with pytest.raises(InputError, match="near 9 and far 8: 0 < near < far is needed .--pipeline.datamanager.near"):
        tiny_mvsplat_config.pipeline.setup(device="cpu")


# ---------------------------------------------------------------------- evaluation


def test_evaluation_gives_metrics_and_pictures_and_does_not_disturb_training(pipeline):
    undisturbed = pipeline.get_train_loss_dict(4)[1]["photometric"]
    averaged = pipeline.get_average_eval_image_metrics(get_std=True)
    names = {"psnr", "psnr_covered", "ssim", "coverage", "depth_error", "depth_right"}
    assert set(averaged) == names | {f"{name}_std" for name in names}
    assert averaged["coverage"] > 0.9 and 0 < averaged["depth_error"] < 2 and -1 < averaged["ssim"] < 1
    metrics, pictures = pipeline.get_eval_image_metrics_and_images(4)
    assert names | {"num_rays"} == set(metrics) and metrics["num_rays"] == 32 * 48
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == {
        "target": (32, 48, 3),
        "splatted": (32, 48, 3),
        "depth": (32, 96, 3),  # measured beside predicted
    }
    assert all(picture.min() >= 0 and picture.max() <= 1 for picture in pictures.values())
    _, losses, _ = pipeline.get_eval_loss_dict(4)
    assert losses["photometric"] > 0 and not losses["photometric"].requires_grad
    assert torch.equal(pipeline.get_train_loss_dict(4)[1]["photometric"], undisturbed) and pipeline.model.training


def test_the_pictured_depth_is_the_measured_one_beside_the_predicted_one(pipeline):
    triplet = pipeline.datamanager.eval_triplet(0, with_depth=True)
    _, pictures = pipeline.evaluate(triplet)
    measured, predicted = pictures["depth"][..., 0].split(48, dim=1)
    near_is_bright = torch.stack([measured.flatten(), triplet.context.depths[0].flatten()])
    assert torch.corrcoef(near_is_bright)[0, 1] < -0.7
    assert not torch.allclose(measured, predicted, atol=0.05)


def test_without_depth_maps_evaluation_has_no_depth_error(pipeline):
    metrics, pictures = pipeline.evaluate(pipeline.datamanager.eval_triplet(0))
    assert set(metrics) == {"psnr", "psnr_covered", "ssim", "coverage"} and pictures["depth"].shape == (32, 48, 3)


# ---------------------------------------------------------------------- the real trainer


@pytest.fixture
def finished(tiny_mvsplat_config, clean_writers):
    """A six-step run with a checkpoint every two steps."""
    tiny_mvsplat_config.steps_per_save = 2
    tiny_mvsplat_config.save_only_latest_checkpoint = False
    trainer = tiny_mvsplat_config.setup()
    trainer.setup()
    (trainer.base_dir / "config.yml").write_text(yaml.dump(tiny_mvsplat_config))
    trainer.train()
    return trainer


def resume(config, trainer, **settings):
    config = copy.deepcopy(config)
    config.load_dir = trainer.checkpoint_dir
    config.timestamp = "resumed"
    for name, value in settings.items():
        setattr(config, name, value)
    resumed = config.setup()
    resumed.setup()
    return resumed


def test_resuming_ends_in_the_same_weights_and_the_same_optimiser(tiny_mvsplat_config, finished):
    start = MVSplat.from_checkpoint(finished.checkpoint_dir / "step-000000002.ckpt")
    resumed = resume(tiny_mvsplat_config, finished, load_step=2)
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), resumed.pipeline.model.network.parameters()))
    resumed.train()
    assert resumed.step == finished.step == 5
    ours, theirs = weights(resumed.pipeline), weights(finished.pipeline)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert any(not torch.equal(p, theirs[name]) for name, p in start.named_parameters())
    checkpoints = [torch.load(t.checkpoint_dir / "step-000000005.ckpt", weights_only=True) for t in (finished, resumed)]
    first, second = (c["optimizers"]["network"]["state"] for c in checkpoints)
    assert first.keys() == second.keys() and len(first) == len(theirs)
    assert all(torch.equal(first[n]["exp_avg_sq"], second[n]["exp_avg_sq"]) for n in first)
    assert (
        checkpoints[0]["schedulers"]["network"]["last_epoch"] == checkpoints[1]["schedulers"]["network"]["last_epoch"]
    )


def test_a_checkpoint_opens_without_pickle_and_holds_no_more_than_is_needed(finished):
    state = torch.load(finished.checkpoint_dir / "step-000000005.ckpt", weights_only=True)
    assert set(state) == {"step", "pipeline", "optimizers", "schedulers", "scalers"} and state["step"] == 5
    names = {f"_model.network.{name}" for name in weights(finished.pipeline)}
    assert set(state["pipeline"]) == names | {"_model.network._extra_state"}
    settings = state["pipeline"]["_model.network._extra_state"]
    assert settings == finished.pipeline.model.network.settings.to_dict() and settings["near"] == 0.7


def test_gradients_are_limited_and_the_rate_ends_at_zero(finished):
    optimizer = finished.config.optimizers["network"]["optimizer"]
    assert optimizer.max_norm == 0.5 and optimizer.lr == 5e-4
    assert finished.optimizers.schedulers["network"].get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)


def test_near_and_far_of_the_checkpoint_are_taken_over_and_other_sizes_refused(tiny_mvsplat_config, finished):
    tiny_mvsplat_config.pipeline.datamanager.near = 0.1
    resumed = resume(tiny_mvsplat_config, finished)
    assert resumed.pipeline.model.network.settings == finished.pipeline.model.network.settings
    tiny_mvsplat_config.pipeline.model.sizes = copy.copy(tiny_mvsplat_config.pipeline.model.sizes)
    object.__setattr__(tiny_mvsplat_config.pipeline.model.sizes, "candidates", 16)
    with pytest.raises(InputError, match="other settings: candidates 8 instead of 16"):
        resume(tiny_mvsplat_config, finished)


def test_a_run_is_loaded_without_its_dataset_and_as_weights(tiny_mvsplat_config, finished):
    file = finished.base_dir / "config.yml"
    _, model, step = load_trained_network(file)
    trained = weights(finished.pipeline)
    assert step == 5 and not model.training
    assert all(torch.equal(value, trained[name]) for name, value in model.network.named_parameters())
    tiny_mvsplat_config.pipeline.model.weights = str(finished.base_dir)
    tiny_mvsplat_config.pipeline.datamanager.far = 9.0
    further = tiny_mvsplat_config.pipeline.setup(device="cpu").model.network
    assert (further.settings.near, further.settings.far) == (0.7, 9.0)
    assert all(torch.equal(value, trained[name]) for name, value in further.named_parameters())


def test_a_run_is_exported_and_imported_again(finished, tmp_path, capsys):
    from snd_nerfstudio.exporting.cli import ExportMVSplat

    ExportMVSplat(finished.base_dir / "config.yml", tmp_path / "export").main()
    assert "step 5" in capsys.readouterr().out
    exported = MVSplat.from_checkpoint(tmp_path / "export" / "mvsplat.ckpt")
    assert exported.settings == finished.pipeline.model.network.settings
    trained = weights(finished.pipeline)
    assert all(torch.equal(value, trained[name]) for name, value in exported.named_parameters())


def test_a_run_fine_tuned_from_weights_that_are_gone_is_still_loaded(tiny_mvsplat_config, mvsplat_file, tmp_path):
    weights_file = tmp_path / "start.ckpt"
    shutil.copy(mvsplat_file, weights_file)
    tiny_mvsplat_config.pipeline.model.weights = str(weights_file)
    model = tiny_mvsplat_config.pipeline.setup(device="cpu").model
    folder = tmp_path / "run" / "nerfstudio_models"
    folder.mkdir(parents=True)
    state = {f"_model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"step": 1, "pipeline": state}, folder / "step-000000001.ckpt")
    (tmp_path / "run" / "config.yml").write_text(yaml.dump(tiny_mvsplat_config))
    assert load_trained_network(tmp_path / "run" / "config.yml")[2] == 1
    weights_file.unlink()
    assert load_trained_network(tmp_path / "run" / "config.yml")[2] == 1


def test_a_run_of_another_method_is_named(tiny_config, tmp_path):
    (tmp_path / "config.yml").write_text(yaml.dump(tiny_config))
    with pytest.raises(InputError, match="is not of a run of `ns-train mvsplat`"):
        load_trained_network(tmp_path / "config.yml")


# ---------------------------------------------------------------------- viewer


def test_the_viewer_shows_the_network_as_it_is_after_the_last_step(pipeline):
    display = pipeline.model.display
    before = display.scene().gaussians.means
    assert display.scene().gaussians.means is before
    attributes = TrainingCallbackAttributes(optimizers=None, grad_scaler=None, pipeline=pipeline, trainer=None)
    _, changed = pipeline.get_training_callbacks(attributes)
    with torch.no_grad():
        pipeline.model.network.depth.cost_output.bias += torch.arange(8.0)
    assert display.scene().gaussians.means is before
    changed.run_callback(step=0)
    assert not torch.equal(display.scene().gaussians.means, before)
    assert display.triplet is pipeline.datamanager.shown_triplet


def test_another_triplet_is_reconstructed_when_it_is_shown_and_the_viewer_starts_before_it(pipeline):
    data, display = pipeline.datamanager, pipeline.model.display
    means = display.scene().gaussians.means
    triplet = data.shown(data.shown_indices("room_0001")[0])
    pipeline.panel._show(triplet)
    assert pipeline.panel._triplet is triplet and display.scene().triplet is triplet
    assert not torch.equal(display.scene().gaussians.means, means)
    start = pipeline.panel._start
    assert torch.equal(start._camera().camera_to_world, triplet.target.camera_to_worlds[0])
    assert start._distance() == median_depth(display.scene()) > 0.1
