import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data_parsers.scannetpp import ScanNetppScenesConfig, to_mesh_world
from snd_nerfstudio.errors import InputError


def write_scene(root, name, frames, **extra):
    """A scene whose frames are (file name, keys) with an identity pose."""
    folder = root / "scenes" / name
    (folder / "images").mkdir(parents=True)
    listed = []
    for file, keys in frames:
        Image.new("RGB", (6, 4)).save(folder / "images" / file)
        listed.append({"file_path": file, "transform_matrix": np.eye(4).tolist(), "is_bad": False, **keys})
    content = {"fl_x": 5, "fl_y": 5, "cx": 3, "cy": 2, "w": 6, "h": 4, "camera_model": "PINHOLE", "frames": listed}
    (folder / "transforms_train.json").write_text(json.dumps({**content, **extra}))


def write_lists(root, train, val):
    (root / "metadata").mkdir(exist_ok=True)
    (root / "metadata" / "nvs_sem_train.txt").write_text("\n".join(train))
    (root / "metadata" / "nvs_sem_val.txt").write_text("\n".join(val))


def parse(root, split="train", **settings):
    return ScanNetppScenesConfig(data=root, **settings).setup().get_dataparser_outputs(split)


@pytest.fixture
def root(tmp_path):
    for name in ("aa", "bb", "cc"):
        write_scene(tmp_path, name, [(f"DSC{n:05d}.JPG", {}) for n in (9, 10, 11)])
    write_lists(tmp_path, ["bb", "aa", "not_downloaded"], ["cc"])
    return tmp_path


def test_all_scenes_of_the_split_come_in_one_list_with_their_files(root):
    outputs = parse(root)
    assert outputs.metadata["scene_names"] == ["bb", "aa"]
    assert outputs.metadata["scene_index"].tolist() == [0, 0, 0, 1, 1, 1]
    assert outputs.image_filenames[3] == root / "scenes/aa/images/DSC00009.JPG"
    assert outputs.metadata["instance_filenames"][3] == root / "scenes/aa/instance_segmentation/DSC00009.JPG.png"
    assert outputs.metadata["depth_filenames"] is None
    assert parse(root, "val").metadata["scene_names"] == ["cc"]
    assert parse(root, "all").metadata["scene_names"] == ["aa", "bb", "cc"]


def test_the_order_is_the_number_in_the_file_name(root):
    assert parse(root).metadata["frame_order"].tolist() == [9, 10, 11] * 2


def test_bad_frames_are_dropped_and_leave_a_gap(tmp_path):
    write_scene(tmp_path, "s", [("a1.JPG", {}), ("a2.JPG", {"is_bad": True}), ("a3.JPG", {})])
    write_scene(tmp_path, "t", [("a1.JPG", {})])
    assert parse(tmp_path).metadata["frame_order"].tolist() == [1, 3]
    assert parse(tmp_path, keep_bad_frames=True).metadata["frame_order"].tolist() == [1, 2, 3]


def test_test_frames_that_also_stand_in_frames_are_counted_once(tmp_path):
    frame = {"file_path": "a2.JPG", "transform_matrix": np.eye(4).tolist()}
    write_scene(tmp_path, "s", [("a1.JPG", {}), ("a2.JPG", {})], test_frames=[frame])
    assert len(parse(tmp_path, "all").image_filenames) == 2


def test_depth_is_found_where_there_is_a_depth_folder(root):
    (root / "scenes/bb/depth").mkdir()
    assert parse(root).metadata["depth_filenames"][:1] == [root / "scenes/bb/depth/DSC00009.png"]
    assert parse(root).metadata["depth_filenames"][3] is None


def test_without_lists_the_last_scene_is_held_out(root):
    shutil.rmtree(root / "metadata")
    assert parse(root).metadata["scene_names"] == ["aa", "bb"]
    assert parse(root, "val").metadata["scene_names"] == ["cc"]


def test_with_only_a_validation_list_all_other_scenes_are_trained_on(root):
    (root / "metadata" / "nvs_sem_train.txt").unlink()
    write_lists(root, [], ["aa"])
    assert parse(root).metadata["scene_names"] == ["bb", "cc"]
    assert parse(root, "val").metadata["scene_names"] == ["aa"]


def test_a_tree_of_validation_scenes_alone_is_not_trained_on(root):
    write_lists(root, ["not_downloaded"], ["aa", "bb", "cc"])
    with pytest.raises(InputError, match="every scene on disk is listed in metadata/nvs_sem_val.txt"):
        parse(root)
    assert len(parse(root, "val").metadata["scene_names"]) == len(parse(root, "all").metadata["scene_names"]) == 3


def test_a_scene_in_both_lists_is_held_out_and_one_listed_twice_is_read_once(root):
    write_lists(root, ["aa", "aa", "bb"], ["bb", "cc"])
    assert parse(root).metadata["scene_names"] == ["aa"]
    assert parse(root, "val").metadata["scene_names"] == ["bb", "cc"]


def test_a_single_scene_of_two_frames_is_too_short(tmp_path):
    write_scene(tmp_path, "s", [("a1.JPG", {}), ("a2.JPG", {})])
    with pytest.raises(InputError, match="Scene s has 2 usable frames"):
        parse(tmp_path)


def test_of_a_single_scene_the_last_frames_are_held_out(tmp_path):
    write_scene(tmp_path, "s", [(f"a{n:03d}.JPG", {}) for n in range(60)])
    assert parse(tmp_path).metadata["frame_order"].tolist() == list(range(44))
    assert parse(tmp_path, "val").metadata["frame_order"].tolist() == list(range(44, 60))


def test_the_pose_conversion_goes_back_to_the_mesh_world():
    # the way there, in steps: columns 1 and 2 to OpenGL, then swap rows 0 and 1, then negate row 2
    mesh_world = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = mesh_world, [1.0, 2.0, 3.0]
    stored = pose[[1, 0, 2, 3]] * np.array([1.0, 1.0, -1.0, 1.0])[:, None]
    np.testing.assert_allclose(to_mesh_world(stored), pose)


def test_rooms_written_in_this_layout_agree_with_their_mesh(rooms):
    o3d = pytest.importorskip("open3d")
    outputs = parse(rooms)
    scene = o3d.t.geometry.RaycastingScene()
    mesh = o3d.io.read_triangle_mesh(str(rooms / "scenes" / outputs.metadata["scene_names"][0] / "mesh.ply"))
    scene.add_triangles(o3d.t.geometry.TriangleMesh.from_legacy(mesh))
    depth = np.asarray(Image.open(outputs.metadata["depth_filenames"][5])).astype(np.float32) / 1000
    pose = outputs.cameras.camera_to_worlds[5].numpy()
    fx, fy = float(outputs.cameras.fx[5]), float(outputs.cameras.fy[5])
    height, width = depth.shape
    x, y = np.meshgrid(np.arange(width) + 0.5 - width / 2, np.arange(height) + 0.5 - height / 2)
    opengl = np.stack([x / fx * depth, -y / fy * depth, -depth], -1)
    points = opengl @ pose[:, :3].T + pose[:, 3]
    distance = scene.compute_distance(points[depth > 0].astype(np.float32)).numpy()
    assert np.quantile(distance, 0.99) < 2e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: shutil.rmtree(r / "scenes"), "no folder `scenes`.*nerfstudio-scenes"),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text("{"),
            "bb/transforms_train.json is not valid JSON",
        ),
        (lambda r: (r / "scenes/bb/transforms_train.json").write_text("{}"), "has no frames"),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text(
                (r / "scenes/bb/transforms_train.json").read_text().replace("1.0", "NaN", 1)
            ),
            "DSC00009.JPG holds NaN",
        ),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text(
                (r / "scenes/bb/transforms_train.json").read_text().replace("1.0", "0.0", 1)
            ),
            "DSC00009.JPG is not invertible",
        ),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text(
                (r / "scenes/bb/transforms_train.json").read_text().replace("PINHOLE", "OPENCV_FISHEYE")
            ),
            "OPENCV_FISHEYE is not a perspective",
        ),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text(
                (r / "scenes/bb/transforms_train.json").read_text().replace('"fl_x"', '"focal"')
            ),
            "`fl_x` is missing",
        ),
        (
            lambda r: (r / "scenes/bb/transforms_train.json").write_text(
                (r / "scenes/bb/transforms_train.json").read_text().replace("false", "true")
            ),
            "all 3 frames are marked `is_bad`",
        ),
    ],
)
def test_what_is_wrong_with_a_tree_is_named(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message):
        parse(root)


def test_poses_are_float32_cameras_with_whole_sizes(root):
    cameras = parse(root).cameras
    assert cameras.camera_to_worlds.shape == (6, 3, 4) and cameras.camera_to_worlds.dtype == torch.float32
    assert cameras.height.flatten().tolist() == [4] * 6 and cameras.width.flatten().tolist() == [6] * 6


def test_masks_are_also_found_by_the_images_stem_and_as_the_toolkit_saves_them(root):
    folder = root / "scenes/bb/instance_segmentation"
    folder.mkdir()
    Image.new("L", (6, 4)).save(folder / "DSC00009.png")
    (root / "obj_ids/bb").mkdir(parents=True)
    for number in ("00009", "00010"):
        torch.save(np.ones((4, 6), np.int32), root / f"obj_ids/bb/DSC{number}.JPG.pth")
    first, second, third = parse(root).metadata["instance_filenames"][:3]
    assert first == folder / "DSC00009.png" and second == root / "obj_ids/bb/DSC00010.JPG.pth"
    assert third == folder / "DSC00011.JPG.png"
    Image.new("L", (6, 4)).save(folder / "DSC00009.JPG.png")
    assert parse(root).metadata["instance_filenames"][0] == folder / "DSC00009.JPG.png"
    (root / "obj_ids").rename(root / "elsewhere")
    assert parse(root, obj_ids=root / "elsewhere").metadata["instance_filenames"][1].parent == root / "elsewhere/bb"


@pytest.fixture
def download(tmp_path):
    """ScanNet++ as downloaded, without its scans: fisheye images of three scenes."""
    for name in ("aa", "bb", "cc"):
        write_scene(tmp_path, name, [(f"DSC{n:05d}.JPG", {}) for n in (9, 10, 11)])
        dslr = tmp_path / "data" / name / "dslr"
        (dslr / "nerfstudio").mkdir(parents=True)
        (tmp_path / "scenes" / name / "images").rename(dslr / "resized_images")
        (tmp_path / "scenes" / name / "transforms_train.json").rename(dslr / "nerfstudio/transforms.json")
    shutil.rmtree(tmp_path / "scenes")
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits/nvs_sem_train.txt").write_text("aa\nbb\n")
    (tmp_path / "splits/nvs_sem_val.txt").write_text("cc\n")
    return tmp_path


def test_a_download_with_fisheye_images_is_answered_with_the_command_that_converts_it(download):
    command = rf"`snd-data scannetpp --data {download} --out {download}_snd`"
    with pytest.raises(InputError, match=f"ScanNet\\+\\+ as downloaded.*{command}, then train with --data"):
        parse(download)


@pytest.mark.parametrize("images", ["undistorted_images", "resized_undistorted_images"])
def test_a_download_that_the_toolkit_has_undistorted_is_read_as_it_is(download, images):
    for name in ("aa", "cc"):
        dslr = download / "data" / name / "dslr"
        shutil.copytree(dslr / "resized_images", dslr / images)
        shutil.copy(dslr / "nerfstudio/transforms.json", dslr / "nerfstudio/transforms_undistorted.json")
    (download / "obj_ids/aa").mkdir(parents=True)
    torch.save(np.ones((4, 6), np.int64), download / "obj_ids/aa/DSC00009.JPG.pth")
    outputs = parse(download)
    # bb is on the list of training scenes, but not undistorted
    assert outputs.metadata["scene_names"] == ["aa"] and parse(download, "val").metadata["scene_names"] == ["cc"]
    assert outputs.image_filenames[0] == download / "data/aa/dslr" / images / "DSC00009.JPG"
    assert outputs.metadata["instance_filenames"][0] == download / "obj_ids/aa/DSC00009.JPG.pth"
    assert outputs.metadata["instance_filenames"][1].parent == download / "data/aa/dslr/instance_segmentation"
    assert outputs.metadata["depth_filenames"] is None
    np.testing.assert_allclose(outputs.cameras.camera_to_worlds[0].numpy(), to_mesh_world(np.eye(4))[:3])


def test_prepared_scenes_come_before_what_lies_beside_them(download):
    write_scene(download, "dd", [(f"DSC{n:05d}.JPG", {}) for n in range(9)])
    assert parse(download, "all").metadata["scene_names"] == ["dd"]
