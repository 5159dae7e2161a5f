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


def changed(folder, frame=None, **changes):
    """transforms.json with other values, of the scene or of its first frame."""
    file = folder / "transforms.json"
    content = json.loads(file.read_text())
    (content if frame is None else content["frames"][frame]).update(changes)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("frame", [None, 0])
def test_distortion_as_one_list_is_read_as_nerfstudio_reads_it(tmp_path, frame):
    write_scene(tmp_path / "a", count=3)
    values = [-0.3, 0.1, 0.01, 0.02, 1e-3, 2e-3]
    changed(tmp_path / "a", frame, distortion_params=values)
    found = parse(tmp_path / "a", "all").cameras.distortion_params
    np.testing.assert_allclose(found[2], values, rtol=1e-6)  # frame 0 of the file is the last one
    assert frame is None or (found[:2] == 0).all()


@pytest.mark.parametrize(
    ("frame", "changes", "message"),
    [
        (None, {"distortion_params": [0.1]}, "`distortion_params` must be six numbers"),
        (None, {"is_fisheye": True}, "camera model with `is_fisheye` is not a perspective one"),
        (0, {"file_path": None}, "a frame has no `file_path`"),
        (0, {"depth_file_path": 7}, "`depth_file_path` 7 is no file name"),
        (None, {"depth_unit_scale_factor": "mm"}, "`depth_unit_scale_factor` 'mm' must be a number above 0"),
        (None, {"depth_unit_scale_factor": -0.001}, "must be a number above 0"),
        (0, {"file_path": "images/frame_1.png"}, "frame_1.png has two poses; keep one"),
    ],
)
def test_contents_that_cannot_be_right_are_named(tmp_path, frame, changes, message):
    write_scene(tmp_path / "a", count=3)
    changed(tmp_path / "a", 1, transform_matrix=(np.eye(4) + np.eye(4, k=3)).tolist())
    changed(tmp_path / "a", frame, **changes)
    with pytest.raises(InputError, match=message):
        parse(tmp_path / "a", "all")


def test_files_that_are_null_are_none_and_frames_that_stand_there_twice_count_once(tmp_path):
    write_scene(tmp_path / "a", count=3)
    changed(tmp_path / "a", 0, depth_file_path=None, depth_unit_scale_factor=None)
    content = json.loads((tmp_path / "a/transforms.json").read_text())
    content["frames"].append(content["frames"][1])
    (tmp_path / "a/transforms.json").write_text(json.dumps(content))
    outputs = parse(tmp_path / "a", "all")
    assert len(outputs.image_filenames) == 3
    assert [file is None for file in outputs.metadata["depth_filenames"]] == [False, False, True]


def test_coordinates_of_a_map_projection_are_refused_because_float32_would_lose_them(tmp_path):
    write_scene(tmp_path / "a", count=4)
    for origin, step, right in ((0.0, 0.1, True), (1e3, 0.1, True), (5e6, 0.1, False), (5e6, 100.0, True)):
        for frame in range(4):
            pose = np.eye(4)
            pose[0, 3] = origin + step * frame
            changed(tmp_path / "a", frame, transform_matrix=pose.tolist())
        if right:
            assert len(parse(tmp_path / "a", "all").image_filenames) == 4
        else:
            with pytest.raises(
                InputError, match="Scene a: cameras are 0.1 apart but up to 5e.06 .*subtract one offset"
            ):
                parse(tmp_path / "a", "all")
