import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from snd_nerfstudio import snd_inspect
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_data import COMMANDS, overview
from snd_nerfstudio.snd_inspect import Inspect

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(autouse=True)
def small_sheets(monkeypatch):
    """Pictures on the sheets are 84 pixels wide, so that drawing them takes no time."""
    monkeypatch.setattr("snd_nerfstudio.snd_inspect.SHEET_SIDE", 84)


@pytest.fixture(scope="module")
def two_rooms(tmp_path_factory) -> Path:
    """Rooms large enough for features to be found in them."""
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms

    folder = tmp_path_factory.mktemp("inspect") / "rooms"
    return generate_rooms(RoomsConfig(out=folder, scenes=2, seed=7, height=112, width=168, frames=20))


@pytest.fixture
def capture(two_rooms, tmp_path) -> Path:
    """One room as `ns-process-data` would write it, camera-to-world with OpenGL's axes."""
    scene, folder = two_rooms / "scenes" / "room_0000", tmp_path / "capture"
    for name in ("images", "depth", "instance_segmentation"):
        shutil.copytree(scene / name, folder / name)
    content = json.loads((scene / "transforms_train.json").read_text())
    for frame in content["frames"]:
        name = frame["file_path"]
        frame.update(file_path=f"images/{name}", depth_file_path=f"depth/{Path(name).stem}.png")
        frame["instance_path"] = f"instance_segmentation/{name}.png"
    content["camera_model"] = "OPENCV"
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


def rewrite(folder: Path, pose=None, depth=True, **changes) -> Path:
    """Change the transforms file: each pose by a function, values of the scene by name (a function or a value)."""
    file = folder / "transforms.json"
    content = json.loads(file.read_text())
    for frame in content["frames"]:
        if pose is not None:
            frame["transform_matrix"] = pose(np.array(frame["transform_matrix"])).tolist()
        if not depth:
            del frame["depth_file_path"]
    before = dict(content)
    for name, value in changes.items():
        content[name] = value(before) if callable(value) else value
    file.write_text(json.dumps(content))
    return folder


def inspect(folder: Path, **settings):
    settings = {
        "dataparser": NerfstudioScenesConfig(),
        "out": folder / "report",
        "pairs": 5,
        "sheet_pairs": 1,
        **settings,
    }
    return Inspect(data=folder, **settings).main()


def found(folder: Path) -> dict:
    """The last verdict on the only scene, from the file that was written."""
    return json.loads((folder / "report" / "inspect.json").read_text())["scenes"][0]["verdicts"][-1]


def scaled_positions(factor):
    def change(pose):
        pose[:3, 3] *= factor
        return pose

    return change


def reversed_poses(folder: Path) -> Path:
    file = folder / "transforms.json"
    content = json.loads(file.read_text())
    poses = [frame["transform_matrix"] for frame in content["frames"]]
    for frame, pose in zip(content["frames"], reversed(poses), strict=True):
        frame["transform_matrix"] = pose
    file.write_text(json.dumps(content))
    return folder


def robot(pose):
    """Camera axes x forward, y left, z up."""
    return pose @ np.array([[0, -1, 0, 0], [0, 0, 1, 0], [-1, 0, 0, 0], [0, 0, 0, 1.0]])


# ---------------------------------------------------------------------- what is right


def test_right_rooms_are_consistent_and_described(two_rooms, tmp_path, logged):
    reports = Inspect(data=two_rooms, out=tmp_path, pairs=4).main()
    assert [report.verdicts[0].status for report in reports] == ["consistent", "consistent"]
    content = json.loads((tmp_path / "inspect.json").read_text())
    first, total = content["scenes"][0], content["total"]
    assert [scene["name"] for scene in content["scenes"]] == ["room_0000", "room_0001"]
    assert first["frames"] == 20 and total["frames"] == 40 and total["image_sizes"] == {"168x112": 40}
    assert first["pairs_by_gap"] == {str(gap): 20 - gap for gap in range(8, 13)}
    transforms = json.loads((two_rooms / "scenes" / "room_0000" / "transforms_train.json").read_text())
    centres = np.array([frame["transform_matrix"] for frame in transforms["frames"]])[:, :3, 3]
    between = [np.linalg.norm(centres[a] - centres[a + gap]) for gap in range(8, 13) for a in range(20 - gap)]
    np.testing.assert_allclose(first["baselines"], np.quantile(between, [0.05, 0.5, 0.95]), atol=1e-3)
    assert sum(first["overlap_histogram"]) == 20 * 19 // 2 and first["overlap_from"] == "depth"
    assert first["frames_with_mask"] == first["frames_with_depth"] == 1
    depth = np.array(Image.open(two_rooms / "scenes/room_0000/depth/DSC00001.png"))
    assert first["depths"][0] < np.median(depth) / 1000 < first["depths"][2]
    assert first["consistency"]["depth_error"] < 0.01 and first["consistency"]["colour_error"] < 0.05
    assert 0.97 < first["verdicts"][0]["depth_factor"] < 1.03
    sheet = np.asarray(Image.open(tmp_path / "room_0000.png"))
    assert sheet.shape[1] > 8 * 84 and sheet.std() > 20
    printed = logged()
    assert "room_0000: consistent: points reprojected with depth" in printed and "all 2" in printed


def test_one_scene_of_many_and_those_not_checked(two_rooms, tmp_path, logged):
    (report,) = Inspect(data=two_rooms, out=tmp_path / "one", pairs=3, scene="room_0001").main()
    assert report.statistics.name == "room_0001" and (tmp_path / "one" / "room_0001.png").is_file()
    reports = Inspect(data=two_rooms, out=tmp_path / "few", pairs=3, checked_scenes=1).main()
    assert len(reports) == 2 and reports[1].verdicts == [] and not (tmp_path / "few" / "room_0001.png").exists()
    assert "1 scenes were not checked: --checked-scenes 2 checks all" in logged()


def test_right_poses_without_depth_and_masks(capture):
    rewrite(capture, depth=False)
    shutil.rmtree(capture / "instance_segmentation")
    (report,) = inspect(capture)
    assert report.verdicts[0].status == "consistent" and not report.verdicts[0].with_depth
    assert "scale cannot be checked" in report.verdicts[0].sentence
    assert report.statistics.frames_with_mask == report.statistics.frames_with_depth == 0
    assert report.statistics.overlap_from == "frusta"


# ---------------------------------------------------------------------- what is wrong

MISTAKES = {
    "opencv": (lambda f: rewrite(f, pose=lambda p: p @ FLIP), "flipped_axes", "camera axes are OpenCV's"),
    "opencv_without_depth": (
        lambda f: rewrite(f, pose=lambda p: p @ FLIP, depth=False),
        "flipped_axes",
        "negate the second and third column",
    ),
    "world_to_camera": (
        lambda f: rewrite(f, pose=lambda p: np.linalg.inv(p @ FLIP)),
        "world_to_camera_opencv",
        "world-to-camera matrices .OpenCV's axes.*invert every transform_matrix and then negate",
    ),
    "world_to_camera_without_depth": (
        lambda f: rewrite(f, pose=np.linalg.inv, depth=False),
        "world_to_camera_opengl",
        "world-to-camera matrices .OpenGL's axes.*invert every transform_matrix;",
    ),
    "robot": (lambda f: rewrite(f, pose=robot), "turned_axes", "the camera axes are turned"),
    "inches": (
        lambda f: rewrite(f, depth_unit_scale_factor=0.001 / 0.0254),
        "depth_unit",
        r"too large by a factor of 39.*inches are taken for metres.*depth_unit_scale_factor by 0.025",
    ),
    "poses_in_inches": (
        lambda f: rewrite(f, pose=scaled_positions(1 / 0.0254)),
        "pose_unit",
        r"positions are too large by a factor of 39.*inches are taken for metres.*by 0.025",
    ),
    "metres": (lambda f: rewrite(f, depth_unit_scale_factor=1.0), "depth_unit", "millimetres are taken for metres"),
    "opencv_and_feet": (
        lambda f: rewrite(f, pose=lambda p: p @ FLIP, depth_unit_scale_factor=0.001 / 0.3048),
        "flipped_axes_and_unit",
        "camera axes are OpenCV's.*besides, depth maps are too large.*feet are taken for metres",
    ),
    "swapped_size": (
        lambda f: rewrite(f, w=lambda c: c["h"], h=lambda c: c["w"]),
        None,
        "width and height are swapped: DSC00001.JPG has 168x112 pixels, its camera 112x168.*swap `w` and `h`",
    ),
    "swapped_centre": (
        lambda f: rewrite(f, cx=lambda c: c["cy"], cy=lambda c: c["cx"]),
        "swapped_centre",
        "cx and cy are swapped",
    ),
    "focal": (
        lambda f: rewrite(f, fl_x=lambda c: 2 * c["fl_x"], fl_y=lambda c: 2 * c["fl_y"]),
        "scaled_focal",
        "focal lengths are too large by a factor of 2",
    ),
    "resized": (
        lambda f: rewrite(f, **{k: lambda c, k=k: 2 * c[k] for k in ("fl_x", "fl_y", "cx", "cy")}),
        "scaled_intrinsics",
        "all intrinsics are too large by a factor of 2.*resized after calibration",
    ),
    "resized_size": (
        lambda f: rewrite(f, **{k: lambda c, k=k: 2 * c[k] for k in ("fl_x", "fl_y", "cx", "cy", "w", "h")}),
        None,
        "resized after calibration: DSC00001.JPG has 168x112 pixels, its camera 336x224.*by 0.5",
    ),
    "reversed": (reversed_poses, "reversed_order", "reverse order"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_with_its_remedy(capture, name):
    make, key, message = MISTAKES[name]
    make(capture)
    with pytest.raises(InputError, match=message) as caught:
        inspect(capture)
    assert "scene capture: " in str(caught.value) and "Remedy: " in str(caught.value)
    assert (capture / "report" / "capture.png").is_file()
    verdict = found(capture)
    if key is None:  # the size alone was wrong: with it mended all is well
        assert verdict["status"] == "consistent"
    else:
        assert verdict["key"].startswith(key) and verdict["status"] == "likely"
        assert verdict["error_without"] < 0.4 * verdict["error"]


def test_world_to_camera_is_recognised_in_a_world_that_the_parser_turns(two_rooms, tmp_path):
    shutil.copytree(two_rooms, tmp_path / "rooms")
    for file in (tmp_path / "rooms" / "scenes").glob("*/transforms_train.json"):
        content = json.loads(file.read_text())
        for frame in content["frames"]:
            frame["transform_matrix"] = np.linalg.inv(np.array(frame["transform_matrix"]) @ FLIP).tolist()
        file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"scene room_0000 \(and 1 more\): the poses are world-to-camera.*OpenCV"):
        Inspect(data=tmp_path / "rooms", out=tmp_path / "report", pairs=4).main()


def test_depth_along_the_ray_is_recognised(capture):
    content = json.loads((capture / "transforms.json").read_text())
    x, y = np.meshgrid((np.arange(168) + 0.5 - content["cx"]) / content["fl_x"],
                       (np.arange(112) + 0.5 - content["cy"]) / content["fl_y"])  # fmt: skip
    for file in (capture / "depth").glob("*.png"):
        depth = np.array(Image.open(file)) * np.sqrt(x**2 + y**2 + 1)
        Image.fromarray(depth.round().astype(np.uint16)).save(file)
    with pytest.raises(InputError, match="distance from the camera's centre"):
        inspect(capture)


def test_scrambled_poses_are_unexplained_and_grey_images_undecided(capture):
    file = capture / "transforms.json"
    content = json.loads(file.read_text())
    poses = [frame["transform_matrix"] for frame in content["frames"]]
    for place, frame in zip(np.random.default_rng(3).permutation(len(poses)), content["frames"], strict=True):
        frame["transform_matrix"] = poses[place]
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="poses and images do not agree.*no single mistake"):
        inspect(capture)
    for image in (capture / "images").iterdir():
        Image.new("RGB", (168, 112), (90, 90, 90)).save(image)
    (report,) = inspect(capture)
    assert report.verdicts[0].status == "undecided" and "only 0 points" in report.verdicts[0].sentence


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Path("/nowhere")}, "--data /nowhere: no such file"),
        ({"scene": "kitchen"}, "--scene kitchen: there is no such scene in .*; there are capture"),
        ({"pairs": 0}, "--pairs 0 must be at least 1"),
        ({"checked_scenes": 0}, "--checked-scenes 0 must be at least 1"),
        ({"gaps": (5, 4)}, "--gaps 5 4: need"),
    ],
)
def test_wrong_flags_are_refused(capture, settings, message):
    with pytest.raises(InputError, match=message):
        Inspect(
            **{"data": capture, "dataparser": NerfstudioScenesConfig(), "out": capture / "report", **settings}
        ).main()


def test_no_progress_bar_outlives_an_error(rooms, tmp_path):
    data = shutil.copytree(rooms, tmp_path / "rooms")
    first = sorted((data / "scenes/room_0000/images").iterdir())[0]
    first.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        Inspect(data, out=tmp_path / "out").main()
    # its thread, joined by the garbage collector inside another bar's thread, would wait for ever
    alive = [thread for thread in threading.enumerate() if type(thread).__module__.startswith("rich")]
    assert caught.value is not None and not alive


def test_damaged_files_and_poses_are_named(capture):
    (capture / "blocked").write_text("")
    with pytest.raises(InputError, match="--out .*blocked/report cannot be made"):
        inspect(capture, out=capture / "blocked" / "report")
    (capture / "depth" / "DSC00001.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="DSC00001.png cannot be decoded"):
        inspect(capture)
    (capture / "images" / "DSC00001.JPG").write_bytes(b"no image")
    with pytest.raises(InputError, match="DSC00001.JPG cannot be decoded"):
        inspect(capture)
    rewrite(capture, pose=lambda pose: np.diag([1.0, 1.0, -1.0, 1.0]) @ pose)
    with pytest.raises(InputError, match="20 camera poses are not rigid.*DSC00001.JPG"):
        inspect(capture)


def test_the_command_ends_with_one_sentence(capture, tmp_path):
    rewrite(capture, pose=lambda p: p @ FLIP)
    program = "import sys; from snd_nerfstudio.snd_data import main; main()"
    flags = ["--data", str(capture), "--out", str(tmp_path / "out"), "--pairs", "3"]
    arguments = ["inspect", *flags, "nerfstudio-scenes"]
    result = subprocess.run([sys.executable, "-c", program, *arguments], check=False, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith(f"Error: --data {capture}, scene capture: the camera")
    assert "inspect" in overview() and set(COMMANDS) >= {"inspect"}
    unknown = subprocess.run([sys.executable, "-c", program, "dance"], check=False, capture_output=True, text=True)
    assert unknown.returncode == 1 and "snd-data has no command `dance`: choose from scannetpp" in unknown.stderr


def test_options_of_a_layout_are_spelt_as_in_training(two_rooms, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Inspect, "main", lambda self: seen.append(self.dataparser))
    snd_inspect.main(["--data", str(two_rooms), "scannetpp-scenes", "--keep-bad-frames", "True"])
    assert seen[0].keep_bad_frames is True
