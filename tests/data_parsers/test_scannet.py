import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_parsers.multi_scene import places_in_capture
from data_parsers.scannet import ScanNetScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.frames import check_frames, load_views
from snd_nerfstudio.scenes.rooms.cameras import pinhole
from snd_nerfstudio.snd_frames import to_frames
from snd_nerfstudio.snd_triplets import TripletDataManagerConfig
from tests.data_parsers.rooms_as import SIZE, room_frames, write_matrix, write_scannet

LOST = np.full((4, 4), -np.inf)


def parse(root, split="train", **settings):
    return ScanNetScenesConfig(data=root, **settings).setup().get_dataparser_outputs(split)


def small_scene(folder, numbers=(0, 1, 2, 3), size=(6, 4)):
    """Frames of nothing with identity poses."""
    for number in numbers:
        write_matrix(folder / f"pose/{number}.txt", np.eye(4))
        (folder / "color").mkdir(exist_ok=True)
        Image.new("RGB", size).save(folder / f"color/{number}.jpg")
    matrix = np.diag([5.0, 5.0, 1.0, 1.0])
    matrix[:2, 2] = size[0] / 2 - 0.5, size[1] / 2 - 0.5
    write_matrix(folder / "intrinsic/intrinsic_color.txt", matrix)


@pytest.fixture
def exported(rooms, tmp_path) -> Path:
    """Two rooms as ScanNet would be exported, a third one in the naming of scannet_frames_25k."""
    write_scannet(room_frames(rooms, "room_0000"), tmp_path / "scene0000_00")
    write_scannet(room_frames(rooms, "room_0001"), tmp_path / "scene0001_00")
    last = tmp_path / "scene0002_00"
    write_scannet(room_frames(rooms, "room_0002")[:30], last, step=100, digits=6)
    for kind in ("color", "depth"):
        (last / f"intrinsic/intrinsic_{kind}.txt").rename(last / f"intrinsics_{kind}.txt")
    (last / "instance-filt").rename(last / "instance")
    return tmp_path


def test_cameras_depth_and_masks_are_those_of_the_generator(rooms, exported):
    frames = to_frames(parse(exported, "all"))
    assert frames.scene_names == ("scene0000_00", "scene0001_00", "scene0002_00")
    assert len(frames) == 150 and frames.frame_order[120:].tolist() == list(range(30))
    for scene, room in enumerate(("room_0000", "room_0001", "room_0002")):
        indices = np.flatnonzero(frames.scene_index == scene)
        original = room_frames(rooms, room)
        for place in (0, 7, 29):
            index, frame = int(indices[place]), original[place]
            np.testing.assert_allclose(frames.camera_to_worlds[index], frame.pose, atol=1e-6)
            np.testing.assert_allclose(frames.intrinsics[index], pinhole(*SIZE), rtol=1e-6)
            views = load_views(frames, [index], SIZE, with_masks=True, with_depth=True)
            depth = np.asarray(Image.open(frame.depth)) / 1000
            np.testing.assert_allclose(views.depths[0, ::2, ::2], depth[::2, ::2], rtol=1e-6)
            ids = np.asarray(Image.open(frame.mask))
            assert len(np.unique(ids)) == len(views.masks[0].unique())
            assert Image.open(frames.image_files[index]).size == SIZE[::-1]


def test_frames_where_tracking_failed_leave_their_place_empty_and_are_told(exported, logged):
    for number in (3, 4, 10):
        write_matrix(exported / f"scene0000_00/pose/{number}.txt", LOST)
    frames = to_frames(parse(exported / "scene0000_00", "all"))
    assert frames.frame_order.tolist() == [n for n in range(60) if n not in (3, 4, 10)]
    assert "3.jpg" not in {file.name for file in frames.image_files} and np.isfinite(frames.camera_to_worlds).all()
    parse(exported, "all")
    said = logged()  # the console breaks lines where it likes
    assert "(3 of them in scene0000_00)" in said and "147 are there" in said


def test_every_nth_frame_can_be_taken(exported):
    write_matrix(exported / "scene0000_00/pose/6.txt", LOST)
    outputs = parse(exported, "all", every_nth=3)
    frames = to_frames(outputs)
    names = [file.stem for file in frames.image_files]
    assert names[:4] == ["0", "3", "9", "12"] and frames.frame_order[:4].tolist() == [0, 1, 3, 4]
    # the naming of the 25k frames has every hundredth frame of the video
    assert names[-10:] == [f"{300 * n:06d}" for n in range(10)]
    assert frames.frame_order[-10:].tolist() == list(range(10))
    with pytest.raises(InputError, match="--every-nth 0 must be at least 1"):
        parse(exported, every_nth=0)


def test_places_count_in_steps_of_the_usual_distance():
    assert places_in_capture(np.array([0, 10, 20, 30])).tolist() == [0, 1, 2, 3]
    assert places_in_capture(np.array([5, 15, 26, 36, 136, 146])).tolist() == [0, 1, 2, 3, 13, 14]
    assert places_in_capture(np.array([4, 5, 6, 9])).tolist() == [0, 1, 2, 5]
    assert places_in_capture(np.array([7])).tolist() == [0] and places_in_capture(np.array([], int)).tolist() == []


def test_the_validation_list_is_held_out_wherever_it_lies(tmp_path):
    for name in ("scene0000_00", "scene0001_00", "scene0002_00"):
        small_scene(tmp_path / "scans" / name)
    (tmp_path / "scannetv2_train.txt").write_text("scene0001_00\nscene0002_00\nscene0500_00\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene0000_00\n")
    for _ in range(2):
        assert parse(tmp_path).metadata["scene_names"] == ["scene0001_00", "scene0002_00"]
        assert parse(tmp_path, "val").metadata["scene_names"] == ["scene0000_00"]
        if not (tmp_path / "splits").is_dir():
            (tmp_path / "splits").mkdir()
            for kind in ("train", "val"):
                (tmp_path / f"scannetv2_{kind}.txt").rename(tmp_path / f"splits/scannetv2_{kind}.txt")


def test_scans_of_one_space_are_held_out_together(tmp_path):
    for name in ("scene0000_00", "scene0001_00", "scene0002_00", "scene0002_01", "scene0002_02"):
        small_scene(tmp_path / name)
    assert parse(tmp_path).metadata["scene_names"] == ["scene0000_00", "scene0001_00"]
    assert parse(tmp_path, "val").metadata["scene_names"] == ["scene0002_00", "scene0002_01", "scene0002_02"]


def test_scans_of_the_only_space_are_told_apart_by_name(tmp_path):
    for name in ("scene0000_00", "scene0000_01"):
        small_scene(tmp_path / name)
    assert parse(tmp_path).metadata["scene_names"] == ["scene0000_00"]
    assert parse(tmp_path, "val").metadata["scene_names"] == ["scene0000_01"]


def test_scannets_own_sizes_of_colour_and_depth_go_together(tmp_path, capsys, logged):
    folder = tmp_path / "scene0000_00"
    small_scene(folder, (0, 1, 2), size=(1296, 968))
    colour, depth = np.eye(4), np.eye(4)
    colour[[0, 1, 0, 1], [0, 1, 2, 2]] = 1170.187988, 1170.187988, 647.75, 483.75
    depth[[0, 1, 0, 1], [0, 1, 2, 2]] = 577.870605, 577.870605, 319.5, 239.5
    write_matrix(folder / "intrinsic/intrinsic_color.txt", colour)
    write_matrix(folder / "intrinsic/intrinsic_depth.txt", depth)
    (folder / "depth").mkdir()
    millimetres = np.tile(np.arange(480, dtype=np.uint16)[:, None] + 1000, (1, 640))
    for number in range(3):
        Image.fromarray(millimetres).save(folder / f"depth/{number}.png")
    frames = to_frames(parse(folder, "all"))
    check_frames(frames, needs_masks=False, needs_depth=True)
    views = load_views(frames, [0], (480, 640), with_masks=False, with_depth=True)
    np.testing.assert_allclose(views.depths[0] * 1000, millimetres, rtol=1e-6)
    # cx: 647.75 counted from pixel centres is 648.25 from corners
    np.testing.assert_allclose(views.intrinsics[0, 0], [1170.187988 * 640 / 1296, 0, 648.25 * 640 / 1296], rtol=1e-6)
    assert "disagree" not in capsys.readouterr().out
    depth[0, 2] += 8  # of 640 pixels: 1.25 %, and 0.25 of 1296 were off before
    write_matrix(folder / "intrinsic/intrinsic_depth.txt", depth)
    parse(folder, "all")
    assert "up to 1.2%" in logged()


def test_images_resized_after_the_export_need_the_size_they_had(exported):
    folder = exported / "scene0000_00"
    for file in (folder / "color").iterdir():
        Image.open(file).resize((42, 28)).save(file)
    with pytest.raises(InputError, match=r"intrinsic_color.txt.* not of images of 42x28.*--calibrated-size 1296 968"):
        parse(folder)
    frames = to_frames(parse(folder, calibrated_size=(84, 56)))
    np.testing.assert_allclose(frames.intrinsics[0], pinhole(28, 42), rtol=1e-6)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no <scene>/color there nor in scans/"),
        (remove("pose/2.txt"), r"pose/2.txt does not exist"),
        (remove("intrinsic/intrinsic_color.txt"), "intrinsic/intrinsic_color.txt does not exist"),
        (lambda f: (f / "pose/1.txt").write_text("1 0 0 0"), "pose/1.txt holds 4 numbers, not a 4x4 matrix"),
        (lambda f: (f / "pose/1.txt").write_text("a pose"), "pose/1.txt is no text file of numbers"),
        (lambda f: [write_matrix(f / f"pose/{n}.txt", LOST) for n in range(4)], "none of the 4 poses is finite"),
        (
            lambda f: [image.write_text("no picture") for image in (f / "color").iterdir()],
            "color/0.jpg cannot be decoded",
        ),
        (lambda f: [file.rename(file.with_stem(f"x{file.stem}")) for file in (f / "color").iterdir()], "no numbered"),
    ],
)
def test_what_is_wrong_with_a_scene_is_named(tmp_path, damage, message):
    small_scene(tmp_path / "scene0000_00")
    damage(tmp_path / "scene0000_00")
    with pytest.raises(InputError, match=message):
        parse(tmp_path)


def test_the_size_is_that_of_the_first_image_that_can_be_read(tmp_path):
    small_scene(tmp_path / "scene0000_00", size=(6, 4))
    (tmp_path / "scene0000_00/color/0.jpg").write_text("no picture")
    assert parse(tmp_path, "all").cameras.width.tolist() == [[6]] * 4


def test_triplets_for_training_come_from_every_scene(exported):
    config = TripletDataManagerConfig(data=exported, dataparser=ScanNetScenesConfig(), image_size=(28, 42))
    data = resolve(config, "fixed").setup(device="cpu", seed=5)
    assert {data.next_train(step)[0].scene for step in range(8)} == {"scene0000_00", "scene0001_00"}
    (triplet,) = data.train_triplets(1, with_depth=True)
    assert triplet.context.depths.shape == (2, 28, 42) and len(triplet.context.masks.unique()) > 3
    assert data.num_eval_triplets > 0 and data.eval_triplet(0).scene == "scene0002_00"
