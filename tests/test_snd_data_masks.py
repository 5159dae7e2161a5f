"""Masks made ahead of training: all frames, once, in one process or several, and found by training."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from snd_nerfstudio import snd_data
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.masks.sam import SamSettings
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSettings
from snd_nerfstudio.snd_data_masks import MasksConfig, MaskTally, make_masks
from tests.conftest import SHARED
from tests.scenes.masks.test_sam import small_sam, spread_out
from tests.test_snd_triplets import capture, manager  # noqa: F401

SMALL = SuperpixelSettings(regions=30)


@pytest.fixture
def bare_rooms(rooms, tmp_path) -> Path:
    """The rooms without their mask files."""
    folder = tmp_path / "bare"
    shutil.copytree(rooms, folder)
    for masks in folder.glob("scenes/*/instance_segmentation"):
        shutil.rmtree(masks)
    return folder


def config_of(data: Path, **settings) -> MasksConfig:
    return MasksConfig(**{"data": data, "image_size": (56, 84), "superpixels": SMALL, "processes": 1, **settings})


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_a_second_run_makes_nothing_and_an_interrupted_one_goes_on(capture):  # noqa: F811
    config = config_of(capture, dataparser=NerfstudioScenesConfig())
    tally = make_masks(config)
    files = files_in(capture / ".snd_masks")
    assert tally == MaskTally(made=60) and len(files) == 60
    assert make_masks(config) == MaskTally(found=60) and files_in(capture / ".snd_masks") == files
    gone, damaged = list(files)[:2]
    gone.unlink()
    damaged.write_bytes(b"")
    assert make_masks(config) == MaskTally(made=2, found=58)
    assert set(files_in(capture / ".snd_masks")) == set(files)


def test_training_finds_what_several_processes_made(bare_rooms):
    assert make_masks(config_of(bare_rooms, processes=2)) == MaskTally(made=180)
    data = manager(bare_rooms, masks="superpixel", superpixels=SMALL)
    for step in range(4):
        assert data.next_train(step)[0].target.masks.shape == (1, 56, 84)
    data.eval_triplet(0)
    statistics = data.mask_maker.cache.statistics
    assert statistics.found >= 15 and (statistics.missing, statistics.damaged, statistics.written) == (0, 0, 0)


def test_a_frame_that_cannot_be_read_is_left_out_and_named(capture, logged):  # noqa: F811
    image, depth = sorted((capture / "images").iterdir())[3], sorted((capture / "depth").iterdir())[9]
    image.write_bytes(image.read_bytes()[:100])
    depth.write_bytes(b"none")
    tally = make_masks(config_of(capture, dataparser=NerfstudioScenesConfig()))
    assert tally.made == 58 and len(tally.skipped) == 2
    assert str(image) in tally.skipped[0] and str(depth) in tally.skipped[1]
    assert "2 frames left out" in logged()


def test_sam_ahead_of_training(capture, tmp_path_factory):  # noqa: F811
    where = tmp_path_factory.mktemp("sam")
    spread_out(small_sam()).save_pretrained(where)
    for image in sorted((capture / "images").iterdir())[20:]:
        image.unlink()
    loose = {"points_per_side": 3, "min_score": 0.0, "min_stability": 0.0, "device": "cpu"}
    sam = SamSettings(model=str(where), **loose)
    config = config_of(capture, dataparser=NerfstudioScenesConfig(), masks="sam", sam=sam)
    assert make_masks(config).made == 20
    assert make_masks(config).found == 20
    broken = where / "model.safetensors"
    broken.write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be loaded"):  # no frame's fault
        make_masks(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Path("/nowhere")}, "--data /nowhere"),
        ({"processes": 0}, "--processes 0"),
        ({"image_size": (0, 84)}, "--image-size"),
        ({"superpixels": SuperpixelSettings(regions=0)}, "superpixels.regions 0"),
    ],
)
def test_what_is_wrong_is_said(rooms, settings, message):
    with pytest.raises(InputError, match=message):
        make_masks(config_of(**{"data": rooms, **settings}))


class Deadly(MasksConfig):
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_a_process_that_dies_is_an_error_without_a_traceback(bare_rooms):
    with pytest.raises(InputError, match="fewer --processes than 2"):
        make_masks(Deadly(**vars(config_of(bare_rooms, processes=2))))


def test_the_command_lists_its_subcommands_and_refuses_others(capsys):
    snd_data.main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("scannetpp", "masks", "inspect"))
    with pytest.raises(InputError, match="snd-data has no command `mask`: choose from scannetpp, masks, inspect"):
        snd_data.main(["mask"])


def test_the_command_as_a_user_types_it(capture):  # noqa: F811
    command = [sys.executable, "-m", "snd_nerfstudio.snd_data", "masks", "--data", str(capture), "--image-size", "28"]
    command += ["42", "--processes", "1", "--superpixels.regions", "12", "nerfstudio-scenes"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "60 masks made" in " ".join(result.stdout.split()), result.stderr[-2000:]
    command[command.index("--superpixels.regions") + 1] = "0"
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0 and "superpixels.regions 0" in result.stderr and "Traceback" not in result.stderr


def train(config, data: Path, dataparser=None):
    """Two steps and an evaluation; the loss of the last step."""
    config = copy.deepcopy(config)
    config.pipeline.checked_triplets = 0
    config.pipeline.datamanager.masks = "superpixel"
    config.pipeline.datamanager.data = data
    if dataparser is not None:
        config.pipeline.datamanager.dataparser = dataparser
    pipeline = config.pipeline.setup(device="cpu", test_mode="val", local_rank=0)
    for step in range(2):
        _, losses, metrics = pipeline.get_train_loss_dict(step)
        assert all(torch.isfinite(loss) for loss in losses.values())
    pipeline.get_eval_loss_dict(0)
    return pipeline, metrics


def test_training_on_rooms_whose_mask_files_are_gone(tiny_config, bare_rooms):
    pipeline, metrics = train(tiny_config, bare_rooms)
    assert pipeline.datamanager.mask_maker.cache.statistics.written > 3
    assert float(metrics["learned_tokens"]) > 0.3


def test_training_on_a_capture_without_masks(tiny_config, capture):  # noqa: F811
    pipeline, _ = train(tiny_config, capture, NerfstudioScenesConfig())
    assert pipeline.datamanager.with_masks and (capture / ".snd_masks").is_dir()


def test_training_on_a_capture_by_a_head_mounted_camera(tiny_config, tmp_path):
    data = SHARED / "data" / "hololens_office"
    if not data.is_dir():
        pytest.skip("the capture is not at hand")
    tiny_config.pipeline.datamanager.image_size = (84, 126)
    tiny_config.pipeline.datamanager.mask_cache = tmp_path / "masks"
    pipeline, _ = train(tiny_config, data, NerfstudioScenesConfig())
    masks = pipeline.datamanager.next_train(0)[0].target.masks
    assert masks.shape == (1, 84, 126) and masks.max() > 60
    assert all(Image.open(file).size == (126, 84) for file in (tmp_path / "masks").rglob("*.png"))
