import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_parsers.posed_video import VideoScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.frames import load_views
from snd_nerfstudio.scenes.rooms.cameras import pinhole
from snd_nerfstudio.snd_frames import to_frames
from snd_nerfstudio.snd_triplets import TripletDataManagerConfig
from tests.data_parsers.rooms_as import SIZE, room_frames, write_video


def parse(root, split="train", **settings):
    return VideoScenesConfig(data=root, **settings).setup().get_dataparser_outputs(split)


def changed(folder, change):
    content = json.loads((folder / "transforms.json").read_text())
    change(content)
    (folder / "transforms.json").write_text(json.dumps(content))


def error(first, second) -> float:
    return float(np.abs(np.asarray(first, np.float64) - np.asarray(second, np.float64)).mean())


@pytest.fixture
def walk(rooms, tmp_path) -> Path:
    """A room as a video of 180 frames of which every third has a pose; the others are black."""
    write_video(room_frames(rooms, "room_0000"), tmp_path / "walk", step=3)
    return tmp_path / "walk"


def test_decoded_frames_are_those_that_the_poses_are_of(rooms, walk):
    original = room_frames(rooms, "room_0000")
    frames = to_frames(parse(walk, "all"))
    assert frames.scene_names == ("walk",) and frames.frame_order.tolist() == list(range(60))
    for place in (0, 1, 17, 59):
        np.testing.assert_allclose(frames.camera_to_worlds[place], original[place].pose, atol=1e-6)
        np.testing.assert_allclose(frames.intrinsics[place], pinhole(*SIZE), rtol=1e-6)
        decoded = Image.open(frames.image_files[place])
        assert error(decoded, Image.open(original[place].image)) < 2  # of 255: a JPEG of high quality
        neighbour = original[place - 1 if place else 1]
        assert error(decoded, Image.open(neighbour.image)) > 8
        views = load_views(frames, [place], SIZE, with_masks=True, with_depth=True)
        depth = np.asarray(Image.open(original[place].depth)) / 1000
        np.testing.assert_allclose(views.depths[0], depth, rtol=1e-6)
        assert len(views.masks.unique()) == len(np.unique(np.asarray(Image.open(original[place].mask))))


def test_a_compressed_format_is_decoded_to_the_same_frames(rooms, tmp_path):
    original = room_frames(rooms, "room_0000")[:40]
    write_video(original, tmp_path / "walk", name="walk.MP4", code="mp4v")
    changed(tmp_path / "walk", lambda content: content.update(frames=content["frames"][1::13]))
    files = parse(tmp_path / "walk", "all").image_filenames
    assert [file.name for file in files] == ["000001.jpg", "000014.jpg", "000027.jpg"]
    for file, place in zip(files, (1, 14, 27), strict=True):
        distances = [error(Image.open(file), Image.open(frame.image)) for frame in original]
        assert int(np.argmin(distances)) == place


def test_only_frames_with_poses_are_kept_and_only_once(walk):
    files = parse(walk, "train").image_filenames
    kept = files[0].parent
    assert kept.parent == walk / ".snd_frames" and len(list(kept.iterdir())) == 60  # held-out frames come along
    assert {file.name for file in kept.iterdir()} == {f"{3 * place:06d}.jpg" for place in range(60)}
    times = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    (kept / "000030.jpg").unlink()
    parse(walk, "val")
    again = {file: file.stat().st_mtime_ns for file in kept.iterdir()}
    assert set(again) == set(times) and [file.name for file in times if times[file] != again[file]] == ["000030.jpg"]


def test_a_changed_video_is_decoded_anew(rooms, walk):
    before = parse(walk, "all").image_filenames[5]
    first = np.asarray(Image.open(before))
    turned = room_frames(rooms, "room_0000")[::-1]
    shutil.move(walk / "transforms.json", walk.parent / "kept.json")
    (walk / "walk.avi").unlink()
    write_video(turned, walk.parent / "other", step=3)
    shutil.move(walk.parent / "other/walk.avi", walk / "walk.avi")
    shutil.move(walk.parent / "kept.json", walk / "transforms.json")
    after = parse(walk, "all").image_filenames[5]
    assert not before.exists() and error(Image.open(after), first) > 5
    assert error(Image.open(after), Image.open(turned[5].image)) < 2


def test_frames_can_be_kept_elsewhere(walk, tmp_path):
    write_other = tmp_path / "more" / "walk"
    shutil.copytree(walk, write_other)
    folders = {parse(folder, "all", frames_folder=tmp_path / "cache").image_filenames[0].parent for folder in
               (walk, write_other)}  # fmt: skip
    assert len(folders) == 2 and not (walk / ".snd_frames").exists()
    assert all(folder.parents[1] == tmp_path / "cache" and len(list(folder.iterdir())) == 60 for folder in folders)


def test_a_video_that_is_shown_turned_is_told_from_one_of_the_wrong_size(rooms, tmp_path):
    write_video(room_frames(rooms, "room_0000")[:5], tmp_path / "walk", name="walk.mp4", code="mp4v")
    file = tmp_path / "walk/walk.mp4"
    content = bytearray(file.read_bytes())
    # ISO/IEC 14496-12: the matrix of a track begins 40 bytes behind the name of its header box; this one turns by 90
    matrix = content.index(b"tkhd") + 4 + 40
    one, minus, unit = b"\0\1\0\0", b"\xff\xff\0\0", b"\x40\0\0\0"
    content[matrix : matrix + 36] = b"".join([bytes(4), one, bytes(4), minus, bytes(4 * 4), unit])
    file.write_bytes(content)
    with pytest.raises(InputError, match="frame 0 has 56x84 pixels.*say 84x56. It is shown turned"):
        parse(tmp_path / "walk")
    changed(tmp_path / "walk", lambda c: c.update(w=56, h=84, cx=28, cy=42))
    assert Image.open(parse(tmp_path / "walk", "all").image_filenames[0]).size == (56, 84)


def of_first_frame(key, value):
    return lambda folder: changed(folder, lambda content: content["frames"][0].update({key: value}))


def without_index(folder):
    changed(folder, lambda content: content["frames"][4].pop("frame_index"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "walk.avi").unlink(), "walk holds no video; one is needed"),
        (lambda f: shutil.copy(f / "walk.avi", f / "b.mov"), r"2 videos \(b.mov, walk.avi\)"),
        (lambda f: (f / "walk.avi").write_text("no video"), "walk.avi cannot be opened"),
        (lambda f: (f / "transforms.json").unlink(), "no transforms.json"),
        (without_index, "a frame has no `frame_index`.*nerfstudio-scenes"),
        (of_first_frame("frame_index", 180), "walk.avi has no frame 180: it ends, or is damaged, after 180 frames"),
        (of_first_frame("frame_index", -1), "`frame_index` -1 is no number of a video frame"),
        (of_first_frame("frame_index", "7"), "`frame_index` '7' is no number of a video frame"),
        (of_first_frame("frame_index", 9), "video frame 9 has two poses"),
        (of_first_frame("transform_matrix", [1]), "`transform_matrix` of frame 0 is not a 4x4 matrix"),
        (lambda f: changed(f, lambda content: content.update(w=80)), "frame 0 has 84x56 pixels, but .* 80x56[.]$"),
        (lambda f: changed(f, lambda content: content.update(frames=[])), "transforms.json has no frames"),
        (lambda f: (f / ".snd_frames").write_text("in the way"), "cannot be written to.*--frames-folder"),
    ],
)
def test_what_is_wrong_with_a_video_is_named(walk, damage, message):
    damage(walk)
    with pytest.raises(InputError, match=message):
        parse(walk)


def test_an_interruption_leaves_no_half_frames(walk, monkeypatch):
    def break_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", break_off)
    with pytest.raises(KeyboardInterrupt):
        parse(walk, "all")
    monkeypatch.undo()
    files = parse(walk, "all").image_filenames
    assert len(files) == 60 and all(Image.open(file).size == (84, 56) for file in files)


def test_triplets_for_training_come_from_every_video(rooms, tmp_path):
    for number in range(3):
        write_video(room_frames(rooms, f"room_000{number}"), tmp_path / f"walk{number}")
    config = TripletDataManagerConfig(data=tmp_path, dataparser=VideoScenesConfig(), image_size=(28, 42))
    data = resolve(config, "fixed").setup(device="cpu", seed=5)
    assert {data.next_train(step)[0].scene for step in range(8)} == {"walk0", "walk1"}
    assert len(data.next_train(0)[0].context.masks.unique()) > 3 and data.eval_triplet(0).scene == "walk2"
