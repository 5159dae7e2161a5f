"""Procedural rooms: the same bytes for the same seed, and geometry that agrees with the mesh and between the views."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.scenes.rooms import Room, RoomsConfig, RoomsError, build_room, generate_rooms, render_view
from snd_nerfstudio.scenes.rooms.cameras import opencv_from_stored, pinhole, stored_from_opencv
from snd_nerfstudio.scenes.rooms.furniture import CLASSES
from snd_nerfstudio.scenes.rooms.rendering import RenderedView
from snd_nerfstudio.scenes.rooms.textures import pulse

HEIGHT, WIDTH, FRAMES = 56, 84, 4
SHELL = ("wall", "floor", "ceiling")

try:
    import open3d  # noqa: F401

    MISSING = ""
except (ImportError, OSError) as error:
    MISSING = f"open3d cannot be imported: {error}"
needs_open3d = pytest.mark.skipif(bool(MISSING), reason=MISSING)


def small(out: Path, **changes) -> RoomsConfig:
    """A configuration that is quick to write."""
    return RoomsConfig(**{"out": out, "scenes": 2, "frames": FRAMES, "height": HEIGHT, "width": WIDTH, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read(path: Path) -> np.ndarray:
    """An image file as an array."""
    return np.asarray(Image.open(path))


def unproject(depth: np.ndarray, pose: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
    """World points `[h w, 3]` of pixel centres, written out from the pinhole equations."""
    height, width = depth.shape
    row, column = np.mgrid[:height, :width] + 0.5
    x = (column - intrinsics[0, 2]) / intrinsics[0, 0] * depth
    y = (row - intrinsics[1, 2]) / intrinsics[1, 1] * depth
    return np.stack([x, y, depth], -1).reshape(-1, 3) @ pose[:3, :3].T + pose[:3, 3]


def reproject(first: RenderedView, poses: np.ndarray, second: RenderedView, intrinsics: np.ndarray):
    """For each pixel of `first`: its depth in `second`'s camera, its pixel there, and whether that is in the image."""
    points = unproject(first.depth.astype(np.float64), poses[0], intrinsics)
    local = (points - poses[1][:3, 3]) @ poses[1][:3, :3]
    column = np.floor(intrinsics[0, 0] * local[:, 0] / local[:, 2] + intrinsics[0, 2])
    row = np.floor(intrinsics[1, 1] * local[:, 1] / local[:, 2] + intrinsics[1, 2])
    height, width = second.depth.shape
    inside = (local[:, 2] > 0.05) & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    pixel = np.where(inside, row * width + column, 0).astype(int)
    return local[:, 2], pixel, inside


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Two written rooms."""
    return generate_rooms(small(tmp_path_factory.mktemp("rooms") / "tree"))


@pytest.fixture(scope="module")
def rooms() -> list[tuple[Room, list[RenderedView]]]:
    """Three rooms in memory with every second view of a path of 64 frames."""
    made = [build_room(7, index, 64) for index in range(3)]
    intrinsics = pinhole(HEIGHT, WIDTH)
    return [(r, [render_view(r, pose, intrinsics, HEIGHT, WIDTH) for pose in r.camera_to_worlds[::2]]) for r in made]


@needs_open3d
def test_same_seed_gives_same_bytes_and_another_seed_gives_others(tree, tmp_path):
    first, again = contents(tree), contents(generate_rooms(small(tmp_path / "again")))
    assert first == again
    other = contents(generate_rooms(small(tmp_path / "other", seed=1)))
    assert first.keys() == other.keys()
    constant = {name for name in first if "/masks/" in name} | {"metadata/semantic_classes.txt"}
    constant |= {"metadata/nvs_sem_train.txt", "metadata/nvs_sem_val.txt"}
    assert {name for name in first if first[name] == other[name]} == constant


@needs_open3d
def test_a_room_does_not_depend_on_how_many_others_there_are(tree, tmp_path):
    alone = generate_rooms(small(tmp_path / "alone", scenes=1))
    assert contents(alone / "scenes" / "room_0000") == contents(tree / "scenes" / "room_0000")


@needs_open3d
def test_the_tree_is_complete_and_readable(tree):
    assert (tree / "metadata" / "nvs_sem_train.txt").read_text() == "room_0000\n"
    assert (tree / "metadata" / "nvs_sem_val.txt").read_text() == "room_0001\n"
    assert (tree / "metadata" / "semantic_classes.txt").read_text().split() == list(CLASSES)
    assert not (tree / ".partial").exists()
    for scene in sorted((tree / "scenes").iterdir()):
        data = json.loads((scene / "transforms_train.json").read_text())
        assert (data["w"], data["h"], data["camera_model"]) == (WIDTH, HEIGHT, "PINHOLE")
        assert (data["cx"], data["cy"], data["fl_x"]) == (WIDTH / 2, HEIGHT / 2, data["fl_y"])
        assert [data[f"k{n}"] for n in (1, 2, 3, 4)] == [0, 0, 0, 0]
        assert len(data["frames"]) == FRAMES and data["test_frames"] == []
        for frame in data["frames"]:
            name = Path(frame["file_path"]).stem
            assert not frame["is_bad"] and frame["mask_path"] == f"{name}.png"
            expected = {
                f"images/{name}.JPG": ("uint8", (HEIGHT, WIDTH, 3)),
                f"masks/{name}.png": ("uint8", (HEIGHT, WIDTH)),
                f"instance_segmentation/{name}.JPG.png": ("uint16", (HEIGHT, WIDTH)),
                f"depth/{name}.png": ("uint16", (HEIGHT, WIDTH)),
                f"normals/{name}.png": ("uint8", (HEIGHT, WIDTH, 3)),
                f"semantics/{name}.png": ("uint8", (HEIGHT, WIDTH)),
            }
            # 16-bit PNGs are read as uint16 or int32, depending on Pillow's version.
            found = {file: read(scene / file) for file in expected}
            assert {file: array.shape for file, array in found.items()} == {f: s for f, (_, s) in expected.items()}
            assert (found[f"masks/{name}.png"] == 255).all()
            assert found[f"semantics/{name}.png"].max() < len(CLASSES)
            assert found[f"instance_segmentation/{name}.JPG.png"].min() >= 1


@needs_open3d
def test_depth_files_unproject_through_stored_poses_onto_the_mesh_file(tree):
    from open3d import core, io
    from open3d.t.geometry import RaycastingScene

    for scene in sorted((tree / "scenes").iterdir()):
        mesh = io.read_triangle_mesh(str(scene / "mesh.ply"))
        caster = RaycastingScene()
        vertices, triangles = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.triangles, np.uint32)
        caster.add_triangles(core.Tensor(vertices), core.Tensor(triangles))
        data = json.loads((scene / "transforms_train.json").read_text())
        intrinsics = np.array([[data["fl_x"], 0, data["cx"]], [0, data["fl_y"], data["cy"]], [0, 0, 1]])
        for frame in data["frames"]:
            depth = read(scene / "depth" / frame["mask_path"]) / 1000.0
            # Section 7.1 by hand: negate row 2, swap rows 0 and 1, negate columns 1 and 2.
            pose = np.array(frame["transform_matrix"])
            pose[2, :] *= -1
            pose[[0, 1], :] = pose[[1, 0], :]
            pose[:, 1:3] *= -1
            points = unproject(depth, pose, intrinsics)[depth.ravel() > 0]
            assert len(points) == HEIGHT * WIDTH
            assert caster.compute_distance(core.Tensor(points.astype(np.float32))).numpy().max() < 2e-3


@needs_open3d
def test_files_hold_what_render_view_returns(tree):
    room, intrinsics = build_room(0, 0, FRAMES), pinhole(HEIGHT, WIDTH)
    scene = tree / "scenes" / "room_0000"
    pose = room.camera_to_worlds[2]
    view = render_view(room, pose, intrinsics, HEIGHT, WIDTH)
    assert np.array_equal(read(scene / "instance_segmentation" / "DSC00003.JPG.png"), view.instances)
    assert np.array_equal(read(scene / "semantics" / "DSC00003.png"), view.semantics)
    assert np.abs(read(scene / "depth" / "DSC00003.png") / 1000.0 - view.depth).max() < 6e-4
    decoded = read(scene / "normals" / "DSC00003.png") / 255.0 * 2.0 - 1.0
    assert np.abs(decoded - view.normals @ pose[:3, :3]).max() < 0.005
    assert np.abs(read(scene / "images" / "DSC00003.JPG").astype(float) - view.image).mean() < 4.0


@needs_open3d
def test_normals_have_unit_length_and_face_the_camera(rooms):
    for room, views in rooms:
        for view, pose in zip(views, room.camera_to_worlds[::2]):
            assert np.allclose(np.linalg.norm(view.normals, axis=-1), 1.0, atol=1e-5)
            rays = unproject(view.depth, pose, pinhole(HEIGHT, WIDTH)) - pose[:3, 3]
            assert (np.sum(rays * view.normals.reshape(-1, 3), -1) < 1e-4).all()


@needs_open3d
def test_consecutive_views_agree_in_depth_colour_and_instances():
    height, width = 112, 168
    intrinsics = pinhole(height, width)
    for index in range(3):
        room = build_room(7, index, 64)
        for start in (0, 30):
            poses = room.camera_to_worlds[start : start + 2]
            first, second = (render_view(room, pose, intrinsics, height, width) for pose in poses)
            depth, pixel, inside = reproject(first, poses, second, intrinsics)
            seen = second.depth.ravel()[pixel]
            error = np.abs(depth - seen) / seen
            assert inside.mean() > 0.85
            assert np.median(error[inside]) < 0.01
            agree = inside & (error < 0.01)
            assert agree.mean() > 0.75
            assert (first.instances.ravel()[agree] == second.instances.ravel()[pixel[agree]]).mean() > 0.97
            assert (first.semantics.ravel()[agree] == second.semantics.ravel()[pixel[agree]]).mean() > 0.97
            colours = [view.image.reshape(-1, 3).astype(float) for view in (first, second)]
            difference = np.abs(colours[0][agree] - colours[1][pixel[agree]]).mean(-1)
            # Colours are compared at the nearest pixel, up to half a pixel off; random pixels are the yardstick.
            shuffled = np.random.default_rng(0).permutation(pixel[agree])
            chance = np.abs(colours[0][agree] - colours[1][shuffled]).mean()
            assert np.median(difference) < 8.0
            assert difference.mean() < 0.3 * chance


@needs_open3d
def test_every_room_shows_at_least_six_pieces_of_furniture(rooms):
    for room, views in rooms:
        pixels = np.bincount(np.concatenate([view.instances.ravel() for view in views]))
        visible = [room.instance_labels[i] for i in np.flatnonzero(pixels[1:] > 30) + 1]
        assert len([label for label in visible if label not in SHELL]) >= 6
        assert len(set(visible) - set(SHELL)) >= 4


@needs_open3d
def test_views_ten_frames_apart_see_mostly_the_same_surfaces(rooms):
    intrinsics = pinhole(HEIGHT, WIDTH)
    for room, views in rooms:
        poses, shares = room.camera_to_worlds[::2], []
        for start in range(0, len(views) - 5, 3):
            first, second = views[start], views[start + 5]
            depth, pixel, inside = reproject(first, poses[[start, start + 5]], second, intrinsics)
            shares.append((inside & (np.abs(depth - second.depth.ravel()[pixel]) < 0.05 * depth)).mean())
        assert np.mean(shares) > 0.6, np.mean(shares)


@needs_open3d
def test_baselines_and_rotations_suit_view_triplets():
    for index in range(8):
        poses = build_room(3, index, 64).camera_to_worlds
        for gap in (8, 10, 12):
            moved = np.linalg.norm(poses[gap:, :3, 3] - poses[:-gap, :3, 3], axis=-1)
            trace = np.einsum("nij,nij->n", poses[gap:, :3, :3], poses[:-gap, :3, :3])
            turned = np.degrees(np.arccos(np.clip(0.5 * (trace - 1), -1, 1)))
            assert 0.2 < moved.mean() < 0.8 and moved.min() > 0.1
            assert turned.max() < 25.0


@needs_open3d
def test_the_camera_keeps_clear_of_everything(rooms):
    for room, views in rooms:
        assert room.clearance(room.camera_to_worlds[:, :3, 3]).min() > 0.3
        assert min(view.depth.min() for view in views) > 0.3


@needs_open3d
def test_an_interrupted_run_leaves_no_half_scene_and_is_resumed(tree, tmp_path, monkeypatch):
    from snd_nerfstudio.scenes.rooms import writing

    original, calls = writing._write_view, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > FRAMES + 1:
            raise KeyboardInterrupt
        original(*arguments)

    config = small(tmp_path / "rooms")
    monkeypatch.setattr(writing, "_write_view", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_rooms(config)
    assert [scene.name for scene in (config.out / "scenes").iterdir()] == ["room_0000"]
    assert not (config.out / "metadata" / "nvs_sem_train.txt").exists()
    monkeypatch.setattr(writing, "_write_view", original)
    before = (config.out / "scenes" / "room_0000" / "mesh.ply").stat().st_mtime_ns
    generate_rooms(config)
    assert (config.out / "scenes" / "room_0000" / "mesh.ply").stat().st_mtime_ns == before
    assert contents(config.out) == contents(tree)


@needs_open3d
def test_other_arguments_are_refused_and_nothing_is_overwritten(tree):
    before = contents(tree)
    with pytest.raises(RoomsError, match=r"other arguments[\s\S]*--out") as caught:
        generate_rooms(small(tree, seed=5))
    assert str(tree) in str(caught.value)
    assert contents(tree) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RoomsError, match="not empty"):
        generate_rooms(small(tmp_path))
    assert contents(tmp_path) == {"mine.txt": b"keep"}


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RoomsError, match="Cannot write rooms to .*file"):
        generate_rooms(small(tmp_path / "file" / "rooms"))


@pytest.mark.parametrize("changes", [{"scenes": 0}, {"frames": 0}, {"seed": -1}, {"width": 1}, {"val_scenes": 3}])
def test_impossible_arguments_are_refused_by_name(tmp_path, changes):
    flag = "--" + next(iter(changes)).replace("_", "-")
    with pytest.raises(RoomsError, match=flag):
        generate_rooms(small(tmp_path / "rooms", **changes))
    assert not (tmp_path / "rooms").exists()


def test_default_split_keeps_a_fifth_for_validation_and_one_room_for_training():
    splits = {count: RoomsConfig(Path("x"), scenes=count).resolved_val_scenes() for count in (1, 2, 4, 5, 10, 23)}
    assert splits == {1: 0, 2: 1, 4: 1, 5: 1, 10: 2, 23: 4}


def test_stored_pose_of_the_identity_is_the_hand_computed_matrix():
    # Columns 1 and 2 negated, rows 0 and 1 swapped, row 2 negated.
    expected = [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert np.array_equal(stored_from_opencv(np.eye(4)), expected)
    pose = np.random.default_rng(0).normal(size=(4, 4))
    pose[3] = [0, 0, 0, 1]
    assert np.array_equal(opencv_from_stored(stored_from_opencv(pose)), pose)


def test_filtered_pulse_is_the_mean_of_the_pulse():
    x = np.linspace(-3.0, 3.0, 41)
    for width in (0.1, 0.7, 2.3):
        fine = x[:, None] + width * (np.arange(4000) + 0.5) / 4000 - width / 2
        assert np.allclose(pulse(x, np.full_like(x, width), 0.3), (fine % 1.0 < 0.3).mean(-1), atol=2e-3)


def test_importing_rooms_is_light():
    code = "import sys, snd_nerfstudio.scenes.rooms; print(*{m.split('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"open3d", "nerfstudio", "torch"} & set(loaded)


@needs_open3d
def test_the_command_line_writes_rooms_and_reports_errors_in_one_message(tmp_path):
    command = [sys.executable, "-m", "snd_nerfstudio.scenes.rooms", "--out", str(tmp_path / "rooms"), "--scenes", "1"]
    command += ["--frames", "1", "--height", "16", "--width", "24"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rooms" / "scenes" / "room_0000" / "images" / "DSC00001.JPG").exists()
    refused = subprocess.run([*command, "--seed", "9"], capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "other arguments" in refused.stderr and "Traceback" not in refused.stderr


@needs_open3d
def test_the_toolkit_layout_has_the_same_rooms_and_poses_seen_by_a_fisheye(tree, tmp_path):
    from snd_nerfstudio.scenes.rooms.toolkit_layout import DISTORTION

    root = generate_rooms(small(tmp_path / "toolkit", frames=10, layout="toolkit"))
    assert (root / "splits" / "nvs_sem_train.txt").read_text() == "room_0000\n"
    assert (root / "splits" / "nvs_sem_val.txt").read_text() == "room_0001\n"
    assert not (root / "scenes").exists() and not (root / "metadata" / "nvs_sem_train.txt").exists()
    for name in ("room_0000", "room_0001"):
        scene = root / "data" / name
        camera = json.loads((scene / "dslr/nerfstudio/transforms.json").read_text())
        assert camera["camera_model"] == "OPENCV_FISHEYE" and [camera[f"k{n}"] for n in (1, 2, 3, 4)] == [*DISTORTION]
        # a short side's half from the centre: the ray that a pinhole of 70 degrees across sees there
        angle = np.arctan(HEIGHT / WIDTH * np.tan(np.radians(35.0)))
        k1, k2, k3, k4 = DISTORTION
        lands = camera["fl_y"] * (angle + k1 * angle**3 + k2 * angle**5 + k3 * angle**7 + k4 * angle**9)
        assert lands == pytest.approx(HEIGHT / 2)
        frames = camera["frames"] + camera["test_frames"]
        assert [frame["file_path"] for frame in camera["test_frames"]] == ["DSC00010.JPG"]
        lists = json.loads((scene / "dslr/train_test_lists.json").read_text())
        assert lists["train"] + lists["test"] == [frame["file_path"] for frame in frames]
        own = json.loads((tree / "scenes" / name / "transforms_train.json").read_text())["frames"]
        assert [f["transform_matrix"] for f in frames[:FRAMES]] == [f["transform_matrix"] for f in own]
        assert (scene / "scans/mesh_aligned_0.05.ply").read_bytes() == (
            tree / "scenes" / name / "mesh.ply"
        ).read_bytes()
        masks = [read(scene / f"dslr/resized_anon_masks/DSC{n:05d}.png") for n in range(1, 11)]
        assert all((mask == 255).all() for mask in masks[:9]) and set(np.unique(masks[9])) == {0, 255}
        image = read(scene / "dslr/resized_images/DSC00010.JPG")
        assert image.shape == (HEIGHT, WIDTH, 3) and abs(image[masks[9] == 0].astype(int) - 128).mean() < 8
    with pytest.raises(RoomsError, match="other arguments"):
        generate_rooms(small(root, frames=10))


@needs_open3d
def test_every_vertex_of_the_toolkit_layout_belongs_to_a_segment_of_its_instance(tmp_path):
    root = generate_rooms(small(tmp_path / "toolkit", scenes=1, frames=1, layout="toolkit"))
    room = build_room(0, 0, 1)
    scans = root / "data/room_0000/scans"
    of_vertex = np.array(json.loads((scans / "segments.json").read_text())["segIndices"])
    groups = json.loads((scans / "segments_anno.json").read_text())["segGroups"]
    owner = {segment: group["objectId"] for group in groups for segment in group["segments"]}
    found = np.array([owner[segment] for segment in of_vertex])
    assert (found[room.faces] == room.face_instance[:, None]).all()
    assert {group["objectId"]: group["label"] for group in groups} == room.instance_labels
    assert len(owner) > len(groups)


@needs_open3d
def test_the_re10k_layout_packs_the_same_images_and_cameras(tree, tmp_path):
    import torch

    root = generate_rooms(small(tmp_path / "re10k", layout="re10k"))
    assert sorted(contents(root)) == [
        *("metadata/rooms.json", "test/000000.torch", "test/index.json", "train/000000.torch", "train/index.json")
    ]
    for side, name in (("train", "room_0000"), ("test", "room_0001")):
        assert json.loads((root / side / "index.json").read_text()) == {name: "000000.torch"}
        (scene,) = torch.load(root / side / "000000.torch", weights_only=True)
        assert scene["key"] == name and scene["timestamps"].tolist() == [0, 33_333, 66_666, 100_000]
        own = json.loads((tree / "scenes" / name / "transforms_train.json").read_text())
        fx, fy = own["fl_x"] / WIDTH, own["fl_y"] / HEIGHT
        assert scene["cameras"].dtype == torch.float32 and scene["cameras"].shape == (FRAMES, 18)
        for camera, image, frame in zip(scene["cameras"], scene["images"], own["frames"], strict=True):
            assert image.dtype == torch.uint8
            assert bytes(image.tolist()) == (tree / "scenes" / name / "images" / frame["file_path"]).read_bytes()
            assert camera[:6].tolist() == pytest.approx([fx, fy, 0.5, 0.5, 0.0, 0.0], rel=1e-6)
            world_to_camera = np.eye(4)
            world_to_camera[:3] = camera[6:].reshape(3, 4)
            pose = opencv_from_stored(np.array(frame["transform_matrix"]))
            assert np.abs(world_to_camera @ pose - np.eye(4)).max() < 1e-6


@needs_open3d
def test_an_interrupted_run_of_the_re10k_layout_keeps_its_chunks_and_is_resumed(tmp_path, monkeypatch):
    from snd_nerfstudio.scenes.rooms import re10k_layout

    monkeypatch.setattr(re10k_layout, "SCENES_PER_CHUNK", 2)
    config = small(tmp_path / "resumed", scenes=5, frames=1, layout="re10k")
    whole = generate_rooms(small(tmp_path / "whole", scenes=5, frames=1, layout="re10k"))
    original, calls = re10k_layout.jpeg, []

    def interrupted(image):
        calls.append(image)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(image)

    monkeypatch.setattr(re10k_layout, "jpeg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_rooms(config)
    assert [file.name for file in (config.out / "train").iterdir()] == ["000000.torch"]
    generate_rooms(config)
    assert len(calls) == 4 + 3  # two of the second chunk again, and the one for validation
    assert contents(config.out) == contents(whole)
    names = {"room_0000": "000000.torch", "room_0001": "000000.torch"}
    names |= {"room_0002": "000001.torch", "room_0003": "000001.torch"}
    assert json.loads((whole / "train" / "index.json").read_text()) == names
