import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig

from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig, to_frames
from snd_nerfstudio.splatting import rasterize


def manager(data: Path, **settings):
    config = SnDDataManagerConfig(data=data, **{"image_size": (56, 84), "eval_triplets": 4, **settings})
    return resolve(config, "fixed").setup(device="cpu", seed=5)


def test_a_step_is_a_function_of_seed_step_and_rank(rooms):
    first, second = manager(rooms), manager(rooms)
    for step in (0, 1, 2):
        first.next_train(step)
    (a,), (b,) = first.next_train(17), second.next_train(17)
    assert a.describe() == b.describe() and torch.equal(a.context.images, b.context.images)
    config = resolve(SnDDataManagerConfig(data=rooms, image_size=(56, 84)), "fixed")
    other = config.setup(device="cpu", seed=5, local_rank=1)
    assert any(other.next_train(s)[0].describe() != second.next_train(s)[0].describe() for s in range(3))


def test_triplets_carry_masks_and_depth_of_the_wanted_size(rooms):
    (triplet,) = manager(rooms, image_size=(28, 42)).next_train(0)
    assert triplet.context.images.shape == (2, 3, 28, 42) and triplet.context.depths.shape == (2, 28, 42)
    assert triplet.target.masks.shape == (1, 28, 42) and triplet.target.depths is None
    assert len(triplet.context.masks.unique()) > 3


def test_held_out_triplets_are_of_the_held_out_scene(rooms):
    data = manager(rooms)
    assert data.num_eval_triplets == 4
    assert {data.eval_triplet(n).scene for n in range(4)} == {"room_0002"}
    assert {data.next_train(s)[0].scene for s in range(12)} == {"room_0000", "room_0001"}


def test_the_reconstruction_explains_the_target_view(rooms):
    data = manager(rooms)
    triplet = data.eval_triplet(0)
    gaussians = data.reconstruct(triplet.context)
    colours = triplet.context.images.permute(0, 2, 3, 1).reshape(-1, 3)
    splat = rasterize(gaussians, triplet.target.camera(0), colours)
    truth = triplet.target.images[0].permute(1, 2, 0)
    mean_error = (splat.features / splat.alpha[..., None].clamp(min=1e-6) - truth).abs()[splat.alpha > 0.5].mean()
    assert splat.alpha.mean() > 0.95 and mean_error < 0.06
    # splatting from a wrong place is far worse, so the comparison can fail
    elsewhere = rasterize(gaussians, triplet.context.camera(0), colours)
    assert (elsewhere.features - truth).abs().mean() > 1.5 * mean_error


def test_the_viewer_is_given_one_scene_of_few_frames(rooms):
    data = manager(rooms)
    shown = data.train_dataset
    assert len(shown) == 32 and {f.parts[-3] for f in shown.image_filenames} == {"room_0000"}
    assert shown[3]["image"].shape == (56, 84, 3)
    assert shown.cameras.height.flatten().tolist() == [56] * 32
    assert data.shown_triplet.scene == "room_0000"


def test_poses_become_opencv_exactly_once(rooms):
    outputs = manager(rooms).train_dataparser_outputs
    frames = to_frames(outputs)
    opengl = outputs.cameras.camera_to_worlds[0].numpy()
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 0], opengl[:, 0])
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 1:3], -opengl[:, 1:3])
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 3], opengl[:, 3])


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


def test_any_other_dataparser_is_one_scene_whose_depth_follows_its_scaling(capture):
    parser = NerfstudioDataParserConfig()
    data = manager(capture, dataparser=parser, masks="none")
    ours = manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")
    scale = data.train_dataparser_outputs.dataparser_scale
    assert scale != 1.0 and data.num_eval_triplets > 0
    (triplet,) = data.next_train(0)
    v: Views = triplet.context
    baseline = (v.camera_to_worlds[0, :3, 3] - v.camera_to_worlds[1, :3, 3]).norm()
    names = [f.name for f in ours.train_frames.image_files]
    there = [names.index(name) for name in v.names]
    metric = np.linalg.norm(np.diff(ours.train_frames.camera_to_worlds[there, :3, 3], axis=0))
    assert float(baseline) == pytest.approx(metric * scale, rel=1e-3)
    from snd_nerfstudio.scenes.frames import load_views

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
        ({"masks": "stored"}, "--pipeline.datamanager.masks none"),
        ({"image_size": (7, 84)}, "image-size"),
        ({"workers": 0}, "--pipeline.datamanager.workers must be at least 1"),
        ({"min_context_gap": 50, "max_context_gap": 70}, "has 44 usable frames"),
        ({"data": Path("/nowhere")}, "--data /nowhere: no such file"),
    ],
)
def test_what_is_wrong_is_said_before_training(capture, settings, message):
    with pytest.raises(InputError, match=message):
        manager(**{"data": capture, "dataparser": NerfstudioScenesConfig(), "masks": "none", **settings})


def test_a_capture_without_depth_names_the_way_out(capture):
    content = json.loads((capture / "transforms.json").read_text())
    for frame in content["frames"]:
        del frame["depth_file_path"]
    (capture / "transforms.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="`depth` reconstructor needs"):
        manager(capture, dataparser=NerfstudioScenesConfig(), masks="none")


def test_fisheye_cameras_are_refused(rooms):
    from nerfstudio.cameras.cameras import CameraType

    outputs = manager(rooms).train_dataparser_outputs
    outputs.cameras.camera_type = torch.full_like(outputs.cameras.camera_type, CameraType.FISHEYE.value)
    with pytest.raises(InputError, match="not perspective"):
        to_frames(replace(outputs))
