"""The real commands, one after the other, on small rooms."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.end_to_end.commands import curve, folder_of, run, start, tiny_training

STEPS = 32


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def trained(rooms: Path, outputs: Path) -> Path:
    """A finished run's folder."""
    run(*tiny_training(rooms, outputs, "whole", STEPS))
    return folder_of(outputs, "whole")


def test_training_writes_checkpoints_that_open_without_pickle(trained):
    files = sorted(f.name for f in (trained / "nerfstudio_models").iterdir())
    assert files == [f"step-{n:09d}.ckpt" for n in (10, 20, 30, 31)]
    state = torch.load(trained / "nerfstudio_models" / files[-1], weights_only=True)
    assert set(state) == {"step", "pipeline", "optimizers", "schedulers", "scalers"}
    assert not list(trained.glob(".*partial"))


def test_the_loss_falls(trained):
    kl = curve(trained, "Train Metrics Dict/kl")
    assert sorted(kl) == list(range(STEPS))
    assert sum(kl[s] for s in range(STEPS - 8, STEPS)) < 0.8 * sum(kl[s] for s in range(8))


def test_the_learning_rate_warms_up_and_ends_near_zero(trained):
    rate = curve(trained, "learning_rate/backbone")
    assert max(rate.values()) == pytest.approx(1e-3, rel=0.02) and rate[STEPS - 1] < 1e-5


def test_a_killed_run_resumes_exactly(trained, rooms, outputs):
    killed = start(*tiny_training(rooms, outputs, "killed", STEPS))
    checkpoint = folder_of(outputs, "killed") / "nerfstudio_models" / "step-000000010.ckpt"
    try:
        for _ in range(1200):
            if checkpoint.exists() or killed.poll() is not None:
                break
            time.sleep(0.1)
    finally:
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
    assert checkpoint.exists() and killed.returncode == -signal.SIGKILL
    run(
        *tiny_training(rooms, outputs, "resumed", STEPS),
        "--load-dir",
        checkpoint.parent,
        "--load-step",
        10,
    )
    whole, resumed = (curve(folder, "Train Loss") for folder in (trained, folder_of(outputs, "resumed")))
    assert sorted(resumed) == list(range(11, STEPS))  # the rest, and not as many steps again
    for step, loss in resumed.items():
        assert loss == pytest.approx(whole[step], abs=1e-6)


@pytest.mark.slow
def test_a_finished_run_has_nothing_left_to_do(trained, rooms, outputs):
    printed = run(*tiny_training(rooms, outputs, "again", STEPS), "--load-dir", trained / "nerfstudio_models", expect=1)
    assert "nothing left to do" in printed and "Traceback" not in printed


def test_evaluation_reports_every_metric_over_the_held_out_triplets(trained, tmp_path):
    run("ns-eval", "--load-config", trained / "config.yml", "--output-path", tmp_path / "eval.json",
        "--render-output-path", tmp_path / "pictures")  # fmt: skip
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    for name in ("cosine", "coverage", "psnr", "psnr_covered", "kl", "teacher_entropy", "learned_tokens"):
        assert {name, f"{name}_std"} <= set(results)
    for name in ("correspondence", "neighbour_depth"):
        assert 0 < results[name] < 1 and 0 < results[f"{name}_original"] < 1
    assert 0.5 < results["cosine"] < 1 and results["coverage"] > 0.9 and results["psnr"] > 15
    assert len(list((tmp_path / "pictures").glob("eval_*_features.png"))) == 3


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="nerfstudio renders nothing without ffmpeg")
def test_a_video_of_features_is_rendered_along_the_cameras(trained, tmp_path):
    import cv2

    file = tmp_path / "features.mp4"
    poses = ["--pose-source", "train", "--interpolation-steps", 1]
    names = ["--rendered-output-names", "rgb", "splatted_pca"]
    run("ns-render", "interpolate", "--load-config", trained / "config.yml", "--output-path", file, *poses, *names)
    video, frames = cv2.VideoCapture(str(file)), []
    while (read := video.read())[0]:
        frames.append(read[1])
    assert len(frames) >= 10 and frames[0].shape == (56, 2 * 84, 3)
    colours, features = (np.stack([frame[:, part] for frame in frames]) for part in (slice(84), slice(84, 168)))
    assert np.abs(colours.astype(float) - features.astype(float)).mean() > 15
    assert features.std() > 20 and np.abs(np.diff(features[:10].astype(float), axis=0)).mean() > 0.5


def test_the_backbone_is_exported_in_every_format(trained, tmp_path):
    from snd_nerfstudio.exporting.formats import FORMATS
    from snd_nerfstudio.snd_pipeline import load_trained_model

    folder = tmp_path / "backbone"
    student = ["--which", "student", "--format", "all"]
    printed = run(
        "ns-export", "snd-backbone", "--load-config", trained / "config.yml", "--output-dir", folder, *student
    )
    assert "Left out" not in printed and sorted(entry.name for entry in folder.iterdir()) == sorted(FORMATS)
    # against the model itself, adapters not merged
    _, model, _ = load_trained_model(trained / "config.yml")
    image = torch.rand(1, 3, 112, 168, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, teachers = model.student_tokens(image), model.teacher_tokens(image)
        assert (own - teachers).abs().max() > 1e-3
        for name, layout in FORMATS.items():
            tokens = layout.read(folder / name, model.student.backbone.spec)(image).patches
            assert (tokens - own).abs().max() < 1e-4
            manifest = json.loads((folder / name / "manifest.json").read_text())
            assert manifest["which"] == "student" and manifest["step"] == STEPS - 1
            assert manifest["data"]["scenes"] == 2 and manifest["training"]["pipeline"]["profile"] == "fixed"


@pytest.mark.slow
def test_the_command_without_open3d_exports_the_teacher_which_can_be_trained_on(trained, rooms, outputs, tmp_path):
    folder = tmp_path / "backbone"
    run("snd-export", "snd-backbone", "--load-config", trained / "config.yml", "--output-dir", folder)
    assert json.loads((folder / "timm" / "manifest.json").read_text())["which"] == "teacher"
    again = [*tiny_training(rooms, outputs, "again", 2), "--pipeline.model.weights", folder / "timm"]
    assert "62 tensors matched" in run(*again)


def test_ns_export_lists_our_command_beside_its_own():
    printed = run("ns-export", "--help")
    assert "snd-backbone" in printed and "gaussian-splat" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(["--pipeline.profile", "best"], "fixed", marks=pytest.mark.slow),
        (["--data", "/nowhere"], "--data /nowhere: no such file or folder"),
    ],
)
def test_a_wrong_flag_ends_in_one_clear_error(rooms, outputs, change, message):
    process = start(*tiny_training(rooms, outputs, "wrong", 2), *change)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and message in printed and "Traceback" not in printed


@pytest.mark.slow
def test_an_unwritable_output_folder_ends_in_one_clear_error(rooms, tmp_path):
    (tmp_path / "outputs").write_text("a file where the folder should be")
    process = start(*tiny_training(rooms, tmp_path / "outputs", "wrong", 2))
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "--output-dir" in printed and "Traceback" not in printed


def test_the_help_of_a_method_names_its_flags_and_the_dataparsers():
    printed = run("ns-train", "snd", "--help")
    for name in ("--pipeline.profile", "--pipeline.model.ema-momentum", "scannetpp-scenes", "nerfstudio-scenes"):
        assert name in printed
