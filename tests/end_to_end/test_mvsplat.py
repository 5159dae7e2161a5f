"""The real commands of MVSplat, one after the other, on small rooms: train, evaluate, export, use, look at."""

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings
from tests.conftest import SMALL_MVSPLAT
from tests.end_to_end.browser import chromium, difference, program, serving, time_limit, viewer_tab, wait_until
from tests.end_to_end.commands import curve, run, tiny_training

STEPS = 12
HEIGHT, WIDTH = 32, 48


def small_network() -> list[object]:
    """Flags that make the tiny network smaller still."""
    flags = [(f"--pipeline.model.sizes.{name.replace('_', '-')}", size) for name, size in SMALL_MVSPLAT.items()]
    return [word for flag in flags for word in flag]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def trained(rooms: Path, outputs: Path) -> tuple[Path, str]:
    """A finished run's folder, and what it printed."""
    command: list[object] = ["ns-train", "mvsplat-tiny", "--data", rooms, "--output-dir", outputs]
    command += ["--experiment-name", "e2e", "--timestamp", "run", "--vis", "tensorboard"]
    command += ["--machine.device-type", "cpu", "--max-num-iterations", STEPS, "--logging.steps-per-log", 1]
    command += ["--pipeline.datamanager.image-size", HEIGHT, WIDTH, "--pipeline.datamanager.eval-triplets", 3]
    command += ["--pipeline.datamanager.bounds", "scene", "--pipeline.datamanager.near", 0.5]
    command += ["--pipeline.steps-per-report", 5, *small_network()]
    printed = run(*command, "--pipeline.datamanager.far", "None")
    return outputs / "e2e" / "mvsplat-tiny" / "run", " ".join(printed.split())


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, str], outputs: Path) -> Path:
    """The run in the released layout."""
    run("snd-export", "snd-mvsplat", "--load-config", trained[0] / "config.yml", "--output-dir", outputs / "snd")
    return outputs / "snd" / "mvsplat.ckpt"


def test_training_says_what_it_does_and_writes_a_checkpoint_and_curves(trained):
    folder, printed = trained
    assert "depths from 0.5 to" in printed and "exact geometry" in printed
    assert "step 5: loss" in printed and "step 10: loss" in printed
    state = torch.load(folder / "nerfstudio_models" / f"step-{STEPS - 1:09d}.ckpt", weights_only=True)
    assert {key.split(".")[1] for key in state["pipeline"]} == {"network"}
    for tag in ("Train Metrics Dict/mse", "Train Metrics Dict/psnr", "Train Loss Dict/photometric"):
        assert sorted(curve(folder, tag)) == list(range(STEPS))


def test_evaluation_reports_the_quality_of_the_reconstruction(trained, tmp_path):
    run("ns-eval", "--load-config", trained[0] / "config.yml", "--output-path", tmp_path / "eval.json",
        "--render-output-path", tmp_path / "pictures")  # fmt: skip
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    for name in ("psnr", "psnr_covered", "ssim", "coverage", "depth_error", "depth_right"):
        assert {name, f"{name}_std"} <= set(results)
    assert results["psnr"] > 8 and results["coverage"] > 0.9 and 0 < results["depth_error"] < 2
    for name in ("target", "splatted", "depth"):
        assert len(list((tmp_path / "pictures").glob(f"eval_*_{name}.png"))) == 3


def test_the_network_is_exported_in_the_released_layout(trained, exported, tmp_path):
    printed = run("ns-export", "snd-mvsplat", "--load-config", trained[0] / "config.yml", "--output-dir", tmp_path)
    assert f"step {STEPS - 1}" in " ".join(printed.split())
    contents = [torch.load(file, weights_only=True) for file in (exported, tmp_path / "mvsplat.ckpt")]
    assert all(key.startswith("encoder.") for key in contents[0]["state_dict"])
    assert contents[0]["global_step"] == STEPS - 1 and contents[0].keys() == contents[1].keys()
    assert all(torch.equal(value, contents[1]["state_dict"][key]) for key, value in contents[0]["state_dict"].items())
    from_run, from_file = MVSplat.from_checkpoint(trained[0]), MVSplat.from_checkpoint(exported)
    assert from_run.settings == from_file.settings and from_run.settings.near == 0.5
    assert all(torch.equal(p, q) for p, q in zip(from_run.parameters(), from_file.parameters(), strict=True))
    names = {field.name for field in fields(MVSplatSettings)}
    assert names >= SMALL_MVSPLAT.keys() and from_file.settings.candidates == SMALL_MVSPLAT["candidates"]


def distil(rooms: Path, outputs: Path, timestamp: str, checkpoint: Path, *more: object) -> str:
    command = tiny_training(rooms, outputs, timestamp, 3, *more)
    command += ["--pipeline.datamanager.reconstructor", "mvsplat"]
    return " ".join(run(*command, "--pipeline.datamanager.reconstructor-checkpoint", checkpoint).split())


def test_distillation_goes_through_the_trained_network_and_is_evaluated(trained, rooms, outputs, tmp_path):
    printed = distil(rooms, outputs, "by-run", trained[0], "--pipeline.warn-below-psnr", 99)
    for part in ("Reconstruction by `mvsplat`", "PSNR", "coverage", "depth off by", "Warning: this reconstruction"):
        assert part in printed
    folder = outputs / "e2e" / "snd-tiny" / "by-run"
    assert (folder / "nerfstudio_models" / "step-000000002.ckpt").is_file()
    run("ns-eval", "--load-config", folder / "config.yml", "--output-path", tmp_path / "eval.json")
    results = json.loads((tmp_path / "eval.json").read_text())["results"]
    assert {"cosine", "kl", "psnr", "ssim", "coverage", "depth_error"} <= set(results) and results["coverage"] > 0.9


@pytest.mark.slow
def test_distillation_by_the_exported_file_is_the_same(trained, exported, rooms, outputs):
    printed = distil(rooms, outputs, "by-file", exported, "--pipeline.warn-below-psnr", 1)
    assert "Reconstruction by `mvsplat`" in printed and "Warning: this reconstruction" not in printed
    folders = [outputs / "e2e" / "snd-tiny" / name for name in ("by-run", "by-file")]
    if folders[0].is_dir():  # by the test before
        losses = [curve(folder, "Train Loss") for folder in folders]
        assert sorted(losses[1]) == [0, 1, 2] and losses[1] == pytest.approx(losses[0], abs=1e-6)


# ---------------------------------------------------------------------- viewer


@pytest.mark.skipif(chromium() is None, reason="no Chromium on this system")
def test_the_viewer_shows_colours_and_depth_while_the_network_is_trained(rooms, tmp_path):
    pytest.importorskip("playwright.sync_api", reason="playwright is missing", exc_type=ImportError)
    command = [program("ns-train"), "mvsplat-tiny", "--data", str(rooms), "--vis", "viewer+tensorboard"]
    command += ["--max-num-iterations", "1000000", "--output-dir", str(tmp_path / "runs")]
    command += map(str, ["--pipeline.datamanager.image-size", HEIGHT, WIDTH, *small_network()])
    window = viewer_tab([tmp_path], size=(960, 600))
    with time_limit(300), serving(command, tmp_path) as running, window as tab:
        tab.connect(running.port)
        tab.click("Fast")
        colours = tab.settle()
        step = tab.step
        assert [name for name in tab.output_types if name in ("rgb", "depth", "accumulation")] == [
            "rgb",
            "depth",
            "accumulation",
        ]
        assert tab.output == "rgb" and (colours.max(axis=2) < 10).mean() < 0.2 and colours.std() > 10
        tab.choose_output("depth")
        depth = tab.settle(colours)
        assert difference(depth, colours) > 8 and len(np.unique(depth.reshape(-1, 3), axis=0)) > 20
        wait_until(lambda: tab.step > step, "the page shows a later step", 60)
        assert running.alive
        for complaint in ("Rendering failed", "Viewer failed", "Traceback", "Exception in thread"):
            assert complaint not in running.output
