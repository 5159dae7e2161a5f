import copy
import re
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from nerfstudio.engine.callbacks import TrainingCallbackAttributes, TrainingCallbackLocation
from PIL import Image

from snd_nerfstudio import snd_triplets
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.snd_pipeline import load_trained_model, strip_prefixes
from snd_nerfstudio.snd_triplet_pipeline import median_depth
from tests.test_snd_mvsplat_pipeline import turn_every_second_camera


def test_evaluation_needs_something_held_out(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    pipeline.datamanager.eval_indices = []
    with pytest.raises(InputError, match="Nothing is held out"):
        pipeline.get_average_eval_image_metrics()


def test_evaluation_does_not_disturb_training(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    undisturbed = float(pipeline.get_train_loss_dict(4)[1]["distillation"].detach())
    pipeline.get_average_eval_image_metrics()
    metrics, pictures = pipeline.get_eval_image_metrics_and_images(4)
    pipeline.get_eval_loss_dict(4)
    assert float(pipeline.get_train_loss_dict(4)[1]["distillation"].detach()) == undisturbed
    assert metrics["num_rays"] == 56 * 84 and pipeline.model.training
    assert all(picture.ndim == 3 and picture.shape[-1] == 3 for picture in pictures.values())


def test_evaluation_of_all_triplets_probes_the_student_and_the_backbone_it_was(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    results = pipeline.get_average_eval_image_metrics()
    for name in ("correspondence", "correspondence_5cm", "neighbour_depth"):
        # nothing was trained: adapters begin at zero
        assert results[name] == pytest.approx(results[f"{name}_original"], abs=1e-4) and 0 < results[name] < 1
    pipeline.config.probe_triplets = 0
    assert "correspondence" not in pipeline.get_average_eval_image_metrics()


def test_evaluation_gives_one_sheet_of_all_pictures_of_a_triplet(tiny_config, tmp_path):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    triplet = pipeline.datamanager.eval_triplet(0, with_depth=True)
    metrics, pictures = pipeline.evaluate(triplet)
    assert list(pictures) == ["features"]
    picture = pictures["features"]
    # eight pictures of at least 56 x 84 in two rows, with captions
    assert picture.shape[0] > 2 * 56 and picture.shape[1] > 4 * 84 and picture.shape[2] == 3
    assert torch.isfinite(picture).all() and picture.min() >= 0 and picture.max() <= 1
    assert {"loss", "kl", "cosine", "psnr", "ssim", "coverage", "depth_error"} <= set(metrics)
    pipeline.get_average_eval_image_metrics(output_path=tmp_path / "sheets")
    files = sorted(file.name for file in (tmp_path / "sheets").iterdir())
    assert files == [f"eval_{number:04d}_features.png" for number in range(3)]
    with Image.open(tmp_path / "sheets" / files[0]) as image:
        assert image.size == (picture.shape[1], picture.shape[0])


def test_evaluation_of_a_triplet_that_nothing_covers_still_has_its_sheet(tiny_config, monkeypatch):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    triplet = pipeline.datamanager.eval_triplet(0)
    reconstruct = pipeline.datamanager.reconstruct

    def nothing(views):
        gaussians = reconstruct(views)
        return replace(gaussians, opacities=torch.zeros_like(gaussians.opacities))

    monkeypatch.setattr(pipeline.datamanager, "reconstruct", nothing)
    metrics, pictures = pipeline.evaluate(triplet)
    assert metrics["learned_tokens"] == 0 and "cosine" not in metrics
    assert torch.isfinite(pictures["features"]).all()


def test_the_viewer_looks_again_at_the_tokens_every_ten_steps(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    pipeline.config.model.ema_every = 1000
    display = pipeline.model.display
    attributes = TrainingCallbackAttributes(optimizers=None, grad_scaler=None, pipeline=pipeline, trainer=None)
    callbacks = pipeline.get_training_callbacks(attributes)
    with torch.no_grad():
        before = display.context_tokens()
        kept = []
        for step in range(1, 22):
            for callback in callbacks:
                callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
            if display.context_tokens() is not before:
                kept.append(step)
                before = display.context_tokens()
    assert kept == [10, 20]


def test_the_viewer_s_start_is_before_what_is_shown(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    data = pipeline.datamanager
    for scene in data.shown_scenes:
        triplet = data.shown(data.shown_indices(scene)[0])
        pipeline.panel._show(triplet)
        assert pipeline._shown.triplet is triplet
        distance = pipeline.panel._start._distance()
        assert 0.7 < distance < 8 and distance == median_depth(pipeline._shown)
        assert torch.equal(pipeline.panel._start._camera().camera_to_world, triplet.target.camera_to_worlds[0])


def test_a_loss_that_is_not_finite_names_the_triplet(tiny_config):
    pipeline = tiny_config.pipeline.setup(device="cpu")
    with torch.no_grad():
        pipeline.model.student.head.mlp[0].bias.fill_(float("nan"))
    with pytest.raises(InputError, match=r"step 3 is not finite.*DSC"):
        pipeline.get_train_loss_dict(3)


def test_gaussians_that_cover_nothing_are_reported_before_training(tiny_config, monkeypatch):
    # depth read as micrometres: everything lies in front of the cameras' near plane

    class Shrunk(DepthReconstructor):
        def __call__(self, views):
            return super().__call__(replace(views, depths=views.depths * 1e-3))

    import snd_nerfstudio.snd_datamanager as module

    monkeypatch.setattr(module, "DepthReconstructor", Shrunk)
    with pytest.raises(InputError, match="cover nothing of the target views.*unit of the depth"):
        tiny_config.pipeline.setup(device="cpu")
    tiny_config.pipeline.setup(device="cpu", test_mode="test")  # looking at a run is still possible


def report_of(config, logged) -> str:
    logged()
    config.setup(device="cpu")
    return logged()


def test_the_reconstruction_is_measured_and_reported_before_training(tiny_config, logged):
    said = report_of(tiny_config.pipeline, logged)
    report = re.search(
        r"Reconstruction by `depth`, target views of 3 held-out triplets re-rendered: PSNR ([\d.]+) dB, SSIM "
        r"([\d.]+), coverage (\d+)%, depth off by ([\d.]+)% \((\d+)% within a quarter\)\.",
        said,
    )
    assert report, said
    psnr, ssim, coverage, error, right = (float(value) for value in report.groups())
    assert psnr > 15 and ssim > 0.4 and coverage > 90 and error < 0.1 and right == 100
    assert "Warning: this reconstruction" not in said


def test_a_bad_reconstruction_gives_a_loud_warning_that_names_the_ways_out(tiny_config, logged):
    tiny_config.pipeline.warn_below_psnr = 99.0
    said = report_of(tiny_config.pipeline, logged)
    assert "Warning: this reconstruction is bad (below 99 dB" in said
    for part in ("max-context-gap", "ns-train mvsplat", "--pipeline.warn-below-psnr"):
        assert part in said


def test_the_measurement_can_be_left_out_and_needs_nothing_held_out(tiny_config, logged):
    tiny_config.pipeline.checked_triplets = 0
    assert "Reconstruction by" not in report_of(tiny_config.pipeline, logged)
    tiny_config.pipeline.checked_triplets = 2
    pipeline = tiny_config.pipeline.setup(device="cpu")
    logged()
    pipeline.datamanager.eval_indices = []
    pipeline._check_reconstruction()
    assert "target views of 2 training triplets" in logged()


def test_depths_outside_near_and_far_are_warned_about(with_mvsplat, logged):
    assert "cannot be represented" not in report_of(with_mvsplat.pipeline, logged)
    with_mvsplat.pipeline.datamanager.far = 2.0
    said = report_of(with_mvsplat.pipeline, logged)
    found = re.search(r"(\d+)% of the measured depths are not between near 0\.7 and far 2, and cannot", said)
    assert found, said
    data = with_mvsplat.pipeline.setup(device="cpu").datamanager
    depths = torch.cat([data.eval_triplet(number, with_depth=True).context.depths.flatten() for number in range(3)])
    depths = depths[depths > 0]
    share = 100 * ((depths < 0.7) | (depths > 2.0)).float().mean()
    assert abs(int(found[1]) - float(share)) <= 0.51 and share > 5


def test_distilling_through_mvsplat_gives_a_loss_and_trains_the_student_alone(with_mvsplat):
    pipeline = with_mvsplat.pipeline.setup(device="cpu")
    network = pipeline.datamanager.reconstructor.network
    before = {name: value.clone() for name, value in network.named_parameters()}
    loss = pipeline.get_train_loss_dict(0)[1]["distillation"]
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.equal(value, before[name]) and value.grad is None for name, value in network.named_parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in pipeline.model.student.parameters())
    metrics, _ = pipeline.evaluate(pipeline.datamanager.eval_triplet(0, with_depth=True))
    assert {"cosine", "psnr", "ssim", "coverage", "depth_error", "depth_right"} <= set(metrics)


def test_pairs_that_cannot_be_matched_are_skipped_and_counted(with_mvsplat, tmp_path, logged, monkeypatch):
    monkeypatch.setattr(snd_triplets, "MAX_ANGLE", 180.0)  # or the flag would be refused
    turn_every_second_camera(with_mvsplat.pipeline, tmp_path / "rooms", "room_0001")
    with_mvsplat.pipeline.datamanager.triplets_per_step = 3
    pipeline = with_mvsplat.pipeline.setup(device="cpu")
    draws = {step: [t.scene for t in pipeline.datamanager.next_train(step)] for step in range(30)}
    mixed = next(step for step, scenes in draws.items() if scenes.count("room_0001") == 1)
    alone = next(step for step, scenes in draws.items() if scenes.count("room_0001") == 3)

    usable = [t for t in pipeline.datamanager.next_train(mixed) if t.scene != "room_0001"]
    expected = pipeline._step(usable, seed=3)["loss"]
    assert pipeline.skipped_pairs == 0
    assert torch.equal(pipeline._step(pipeline.datamanager.next_train(mixed), seed=3)["loss"], expected)
    said = logged()
    assert pipeline.skipped_pairs == 1 and said.count("Skipped room_0001: DSC") == 1
    assert "(1 so far)" in said and "opposite directions" in said

    _, losses, _ = pipeline.get_train_loss_dict(alone)
    losses["distillation"].backward()
    assert losses["distillation"] == 0 and pipeline.skipped_pairs == 4
    trained = [p for p in pipeline.model.student.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and (p.grad == 0).all() for p in trained)


def test_held_out_triplets_of_a_step_do_not_depend_on_what_was_evaluated_before(tiny_config):
    first, second = (tiny_config.pipeline.setup(device="cpu") for _ in range(2))
    first.get_eval_loss_dict(0)
    assert first._eval_triplet_of(40).describe() == second._eval_triplet_of(40).describe()
    assert len({first._eval_triplet_of(step).describe() for step in range(0, 400, 50)}) == 3


def test_a_checkpoint_that_was_trained_with_another_reconstructor_is_refused(with_mvsplat, tiny_config):
    pipeline = with_mvsplat.pipeline.setup(device="cpu", test_mode="test")
    state = {key: value.clone() for key, value in pipeline.state_dict().items()}
    pipeline.load_pipeline(state, 3)
    with torch.no_grad():  # as if the run that the flag names had been trained on
        pipeline.datamanager.reconstructor.network.encoder.stem.weight[0, 0, 0, 0] += 1e-3
    del vars(pipeline.datamanager)["reconstructor_fingerprint"]
    pipeline.reconstructor_fingerprint = pipeline.datamanager.reconstructor_fingerprint
    with pytest.raises(InputError, match="step 3 was trained with another reconstructor"):
        pipeline.load_pipeline(state, 3)
    with_mvsplat.pipeline.datamanager.reconstructor = "depth"
    with_mvsplat.pipeline.datamanager.reconstructor_checkpoint = None
    with pytest.raises(InputError, match="another reconstructor than --pipeline.datamanager.reconstructor depth"):
        with_mvsplat.pipeline.setup(device="cpu", test_mode="test").load_pipeline(state, 3)


def test_keys_of_a_distributed_checkpoint_are_recognised():
    state = {"_model.module.student.a": 1, "_model.teacher.b": 2}
    assert strip_prefixes(state) == {"student.a": 1, "teacher.b": 2}


def test_a_run_that_is_none_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_trained_model(tmp_path / "config.yml")
    (tmp_path / "config.yml").write_text("a: 1")
    with pytest.raises(InputError, match="is not of a run of"):
        load_trained_model(tmp_path / "config.yml")


def _gradients_of_one_rank(rank, config, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    pipeline = config.pipeline.setup(device="cpu", world_size=2, local_rank=rank)
    pipeline.get_train_loss_dict(0)[1]["distillation"].backward()
    named = pipeline.model.student.named_parameters()
    torch.save({name: p.grad for name, p in named if p.requires_grad}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(("trains", "preserve"), [pytest.param("lora", "none", marks=pytest.mark.slow), ("full", "l2")])
def test_two_processes_average_the_gradients_of_their_own_triplets(tiny_config, tmp_path, trains, preserve):
    tiny_config.pipeline.model.trains, tiny_config.pipeline.model.preserve = trains, preserve
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = copy.deepcopy(tiny_config)
    mp.spawn(_gradients_of_one_rank, args=(config, port, str(tmp_path)), nprocs=2)
    together = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = []
    for rank in (0, 1):
        pipeline = tiny_config.pipeline.setup(device="cpu", local_rank=rank)
        pipeline.get_train_loss_dict(0)[1]["distillation"].backward()
        alone.append({n: p.grad for n, p in pipeline.model.student.named_parameters() if p.requires_grad})
    name = "head.mlp.0.weight"
    assert not torch.allclose(alone[0][name], alone[1][name], rtol=1e-2)  # the ranks saw different triplets
    for name, gradient in together[0].items():
        torch.testing.assert_close(gradient, together[1][name], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-3, atol=1e-6)


def losses_of_training(config, profile, path, steps=15) -> list[float]:
    """The loss of each step of a training whose teacher moves every third one."""
    config = copy.deepcopy(config.pipeline)
    config.profile, config.model.supervision.path = profile, path
    config.model.ema_every, config.model.lora.dropout = 3, 0.1
    pipeline = config.setup(device="cpu").train()
    groups, rates = pipeline.get_param_groups(), {"backbone": 1e-3, "head": 2e-5}
    optimizer = torch.optim.Adam([{"params": groups[name], "lr": rate} for name, rate in rates.items()])
    attributes = TrainingCallbackAttributes(optimizers=None, grad_scaler=None, pipeline=pipeline, trainer=None)  # type: ignore
    callbacks = pipeline.get_training_callbacks(attributes)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = pipeline.get_train_loss_dict(step)[1]["distillation"]
        loss.backward()
        optimizer.step()
        for callback in callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("profile", ["fixed", "paper", "official"])
def test_training_is_the_same_on_tokens_and_on_maps_of_all_pixels(tiny_config, profile):
    dense, token = (losses_of_training(tiny_config, profile, path) for path in ("dense", "token"))
    assert token == pytest.approx(dense, abs=1e-4)
    assert len({round(loss, 4) for loss in dense}) > 10  # it moved
    if profile == "fixed":
        tiny_config.pipeline.datamanager.operator_cache = tiny_config.output_dir / "operators"
        for _ in range(2):
            assert losses_of_training(tiny_config, profile, "token") == pytest.approx(dense, abs=1e-4)
