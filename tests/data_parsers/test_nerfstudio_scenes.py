import json

import numpy as np
import pytest

from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from snd_nerfstudio.errors import InputError


def write_scene(folder, count=60, **extra):
    folder.mkdir(parents=True)
    frames = [
        {
            "file_path": f"images/frame_{n}.png",
            "depth_file_path": f"depth/{n}.png",
            "transform_matrix": np.eye(4).tolist(),
        }
        for n in range(count)
    ]
    content = {"fl_x": 5, "fl_y": 6, "cx": 3, "cy": 2, "w": 6, "h": 4, "frames": frames[::-1]}
    (folder / "transforms.json").write_text(json.dumps({**content, **extra}))


def parse(root, split="train", **settings):
    return NerfstudioScenesConfig(data=root, **settings).setup().get_dataparser_outputs(split)


def test_one_scene_is_ordered_naturally_and_its_tail_held_out(tmp_path):
    write_scene(tmp_path / "office")
    train, val = parse(tmp_path / "office"), parse(tmp_path / "office", "val")
    assert [f.name for f in train.image_filenames[:3]] == ["frame_0.png", "frame_1.png", "frame_2.png"]
    assert train.image_filenames[10].name == "frame_10.png"
    assert len(train.image_filenames) == 44 and val.image_filenames[0].name == "frame_44.png"
    assert train.metadata["scene_names"] == ["office"]
    assert train.metadata["depth_filenames"][2] == tmp_path / "office/depth/2.png"
    assert train.metadata["instance_filenames"] is None


def test_a_folder_of_scenes_is_read_whole_and_its_last_scenes_held_out(tmp_path):
    for number in (1, 2, 10):
        write_scene(tmp_path / f"scene{number}", count=3)
    assert parse(tmp_path).metadata["scene_names"] == ["scene1", "scene2"]
    assert parse(tmp_path, "val").metadata["scene_names"] == ["scene10"]
    assert len(parse(tmp_path, "all").image_filenames) == 9


def test_the_depth_unit_of_the_file_wins_over_the_flag(tmp_path):
    write_scene(tmp_path / "a", count=3, depth_unit_scale_factor=0.5)
    write_scene(tmp_path / "b", count=3)
    scales = parse(tmp_path, "all", depth_unit_scale_factor=0.25).metadata["depth_scale"]
    assert scales.tolist() == [0.5] * 3 + [0.25] * 3


def test_a_frames_own_intrinsics_and_distortion_win(tmp_path):
    frame = {"file_path": "x.png", "transform_matrix": np.eye(4)[:3].tolist(), "fl_x": 7.0, "k1": 0.1, "p2": 0.2}
    write_scene(tmp_path / "a", count=0, frames=[frame, {**frame, "file_path": "y.png", "instance_path": "m/y.png"}])
    outputs = parse(tmp_path / "a", "all")
    assert outputs.cameras.fx.flatten().tolist() == [7.0, 7.0] and outputs.cameras.fy.flatten().tolist() == [6.0, 6.0]
    np.testing.assert_allclose(outputs.cameras.distortion_params[0], [0.1, 0, 0, 0, 0, 0.2])
    assert outputs.metadata["instance_filenames"] == [None, tmp_path / "a/m/y.png"]


def test_a_folder_without_transforms_is_refused(tmp_path):
    with pytest.raises(InputError, match="no transforms.json"):
        parse(tmp_path)


def test_a_scene_without_frames_is_refused(tmp_path):
    write_scene(tmp_path / "a", count=0)
    with pytest.raises(InputError, match="a/transforms.json has no frames"):
        parse(tmp_path / "a")
