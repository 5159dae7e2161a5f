import numpy as np
import pytest
import torch
from nerfstudio.configs.dataparser_configs import all_dataparsers

from data_parsers.any_layout import scene_worlds
from data_parsers.posed_video import VideoScenesConfig
from data_parsers.scannet import ScanNetScenesConfig
from data_parsers.scannetpp import ScanNetppScenesConfig
from data_parsers.scene_list import SceneListConfig, read_list, unique_names
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.frames import load_views
from snd_nerfstudio.scenes.rooms.cameras import pinhole
from snd_nerfstudio.snd_frames import to_frames
from snd_nerfstudio.snd_triplets import TripletDataManagerConfig
from tests.data_parsers.rooms_as import (
    SIZE,
    room_frames,
    write_capture,
    write_colmap,
    write_scannet,
    write_video,
)


def parse(file, split="train"):
    return SceneListConfig(data=file).setup().get_dataparser_outputs(split)


@pytest.fixture
def mixed(rooms, tmp_path):
    """A list of all kinds: our own rooms, a capture of theirs, ScanNet, COLMAP and nerfstudio's own dataparser."""
    original = room_frames(rooms, "room_0000")
    write_scannet(original, tmp_path / "scannet/scene0000_00")
    write_capture(original, tmp_path / "my captures/desk", with_masks=True)
    write_colmap(original, tmp_path / "garden")
    write_capture(original, tmp_path / "office")
    file = tmp_path / "scenes.txt"
    file.write_text(
        f"""# everything we have
scannetpp-scenes {rooms}
nerfstudio-scenes 'my captures'   # one of them

scannet-scenes scannet --every-nth 2
colmap garden --downscale-factor 1 --orientation-method none --center-method none
nerfstudio-data office --eval-mode all
"""
    )
    return file


def test_every_dataset_comes_with_its_own_scenes_frames_and_held_out_part(rooms, mixed):
    own = ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs("train")
    train, val = parse(mixed), parse(mixed, "val")
    assert train.metadata["scene_names"] == ["room_0000", "room_0001", "desk", "scene0000_00", "garden", "office"]
    assert val.metadata["scene_names"] == ["room_0002", "desk", "scene0000_00", "garden", "office"]
    counts = np.bincount(train.metadata["scene_index"])
    # 120 of two rooms; 44 of 60; 30 - round(0.15 * 30); colmap trains on 52 of 60, less 16; 44 of 60
    assert counts.tolist() == [60, 60, 44, 26, 36, 44]
    assert np.bincount(val.metadata["scene_index"]).tolist() == [60, 16, 4, 16, 16]
    assert not {str(f) for f in train.image_filenames} & {str(f) for f in val.image_filenames}
    assert train.image_filenames[:120] == own.image_filenames
    torch.testing.assert_close(train.cameras.camera_to_worlds[:120], own.cameras.camera_to_worlds)
    assert train.metadata["frame_order"][:120].tolist() == own.metadata["frame_order"].tolist()
    assert train.metadata["frame_order"][164:190].tolist() == list(range(26))
    everything = parse(mixed, "all")
    assert np.bincount(everything.metadata["scene_index"]).tolist() == [60, 60, 60, 60, 30, 52, 60]


def test_cameras_and_depth_of_every_dataset_are_the_generators_up_to_what_its_dataparser_did(rooms, mixed):
    outputs = parse(mixed, "all")
    frames, worlds = to_frames(outputs), scene_worlds(outputs)
    assert len(worlds) == len(frames.scene_names) == 7
    original = {frame.stem: frame for frame in room_frames(rooms, "room_0000")}
    scannetpp_turn = np.linalg.inv(worlds[0][0])
    for scene, name in enumerate(frames.scene_names):
        if name in ("room_0001", "room_0002"):
            continue
        first = int(np.flatnonzero(frames.scene_index == scene)[3])
        stem = frames.image_files[first].stem
        frame = original[f"DSC{int(stem) + 1:05d}" if name.startswith("scene") else stem]
        world, scale = worlds[scene]
        world = world @ scannetpp_turn if name == "room_0000" else world
        centre = scale * (world[:3, :3] @ frame.pose[:3, 3] + world[:3, 3])
        np.testing.assert_allclose(frames.camera_to_worlds[first, :3, 3], centre, atol=1e-4, err_msg=name)
        turned = world[:3, :3] @ frame.pose[:3, :3]
        np.testing.assert_allclose(frames.camera_to_worlds[first, :3, :3], turned, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(frames.intrinsics[first], pinhole(*SIZE), rtol=1e-5, err_msg=name)
        if name == "garden":
            assert frames.depth_files[first] is None and frames.mask_files[first] is None
            continue
        depth = load_views(frames, [first], SIZE, with_masks=False, with_depth=True).depths[0]
        reference = ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs("train")
        place = [file.stem for file in reference.image_filenames[:60]].index(frame.stem)
        truth = load_views(to_frames(reference), [place], SIZE, with_masks=False, with_depth=True).depths[0]
        np.testing.assert_allclose(depth[::2, ::2], scale * truth[::2, ::2], rtol=1e-5, err_msg=name)
    assert worlds[6][1] != 1.0 and frames.distortion.shape == (len(frames), 6) and not frames.distortion.any()


def test_a_list_is_trained_on_and_where_masks_are_missing_they_are_asked_for(mixed):
    settings = {"data": mixed, "dataparser": SceneListConfig(), "image_size": (28, 42)}
    with pytest.raises(InputError, match="Missing instance mask for .*DSC00002.JPG .80 of 270 .*masks superpixel"):
        resolve(TripletDataManagerConfig(**settings), "fixed").setup(device="cpu")
    config = resolve(TripletDataManagerConfig(**settings, masks="superpixel"), "fixed")
    data = config.setup(device="cpu", seed=5)
    assert len({data.next_train(step)[0].scene for step in range(12)}) > 3
    assert (mixed.parent / ".snd_masks").is_dir() and data.summary["name"] == "scenes.txt"
    assert {data.eval_triplet(n).scene for n in range(data.num_eval_triplets)} >= {"room_0002", "desk", "garden"}


def test_training_on_a_list(rooms, tmp_path, tiny_config, clean_writers):
    original = room_frames(rooms, "room_0000")
    write_capture(original, tmp_path / "desk", with_masks=True)
    write_video(original, tmp_path / "walk")
    (tmp_path / "scenes.txt").write_text("nerfstudio-scenes desk\nvideo-scenes walk\n")
    tiny_config.data = tiny_config.pipeline.datamanager.data = tmp_path / "scenes.txt"
    tiny_config.pipeline.datamanager.dataparser = SceneListConfig()
    tiny_config.max_num_iterations = tiny_config.steps_per_save = 2
    trainer = tiny_config.setup(local_rank=0, world_size=1)
    trainer.setup()
    trainer.train()
    assert trainer.pipeline.datamanager.train_frames.scene_names == ("desk", "walk")
    assert list((tiny_config.get_base_dir() / "nerfstudio_models").glob("*.ckpt"))


def test_options_are_those_of_the_layout(tmp_path):
    write = "colmap /data/x --colmap-path sparse/0 --load-3D-points False\nscannet-scenes y --every-nth=7\n"
    (tmp_path / "scenes.txt").write_text(write + "video-scenes ~/z")
    colmap, scannet, video = (entry.config for entry in read_list(tmp_path / "scenes.txt"))
    assert str(colmap.colmap_path) == "sparse/0" and not colmap.load_3D_points and str(colmap.data) == "/data/x"
    assert isinstance(scannet, ScanNetScenesConfig) and scannet.every_nth == 7 and scannet.data == tmp_path / "y"
    assert isinstance(video, VideoScenesConfig) and video.data.is_absolute() and "~" not in str(video.data)
    assert str(all_dataparsers["colmap"].colmap_path) == "colmap/sparse/0"  # the registered ones stay as they are


def test_equal_names_are_told_apart_by_folders_and_then_by_numbers():
    assert unique_names([["a", "b"], ["b", "c"]], ["x", "y"]) == ["a", "x_b", "y_b", "c"]
    assert unique_names([["a"], ["a"], ["a"]], ["x", "y", "x"]) == ["1_x_a", "y_a", "3_x_a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("polycam here", "line 2: there is no layout polycam; there are .*blender-data.*nerfstudio-scenes"),
        ("nerfstudio-scenes nowhere", "line 2: --data .*/nowhere: no such file or folder"),
        ("nerfstudio-scenes", "line 2: `nerfstudio-scenes` is not `<layout> <path>"),
        ("nerfstudio-scenes --depth-unit-scale-factor 1", "line 2: .* is not `<layout> <path>"),
        ("nerfstudio-scenes desk", "line 2: desk was there in line 1 already"),
        ("nerfstudio-scenes desk/part", "line 2: desk/part and line 1 lie one in the other; name one of them"),
        ("nerfstudio-scenes .", "line 2: . and line 1 lie one in the other"),
        ("nerfstudio-scenes ./empty", "line 2: --data .*/empty: no transforms.json"),
        ("nerfstudio-scenes 'desk", "line 2: nerfstudio-scenes 'desk has an open quote"),
        ("nerfstudio-scenes empty --colour red", "line 2: nerfstudio-scenes does not take the options `--colour red`"),
        ("scannet-scenes empty --data desk", "line 2: the path stands behind the layout"),
        ("scene-list scenes.txt", "line 2: a list cannot hold another list"),
        ("colmap empty", "line 2: --data .*/empty: nerfstudio's ColmapDataParser cannot read it .AssertionError"),
    ],
)
def test_a_wrong_line_is_named_with_its_number(rooms, tmp_path, line, message):
    write_capture(room_frames(rooms, "room_0000")[:20], tmp_path / "desk")
    (tmp_path / "empty").mkdir()
    (tmp_path / "scenes.txt").write_text(f"nerfstudio-scenes desk\n{line}\n")
    with pytest.raises(InputError, match=f"{tmp_path}/scenes.txt, {message}"):
        parse(tmp_path / "scenes.txt")


@pytest.mark.parametrize("content", ["", "# nothing\n\n"])
def test_a_list_of_nothing_is_refused(tmp_path, content):
    (tmp_path / "scenes.txt").write_text(content)
    with pytest.raises(InputError, match="scenes.txt names no dataset"):
        parse(tmp_path / "scenes.txt")


def test_a_folder_is_no_list_and_a_list_no_folder(tmp_path):
    with pytest.raises(InputError, match="cannot be read as a list of datasets"):
        parse(tmp_path)
    (tmp_path / "scenes.txt").write_text("nerfstudio-scenes desk\n")
    with pytest.raises(InputError, match="scenes.txt is a file: if it lists datasets, .* `scene-list`"):
        ScanNetppScenesConfig(data=tmp_path / "scenes.txt").setup().get_dataparser_outputs("train")


def test_fisheye_cameras_in_a_list_are_named(rooms, tmp_path):
    write_capture(room_frames(rooms, "room_0000")[:20], tmp_path / "desk")
    write_colmap(room_frames(rooms, "room_0000")[:20], tmp_path / "garden", model="OPENCV_FISHEYE")
    (tmp_path / "scenes.txt").write_text("nerfstudio-scenes desk\ncolmap garden --downscale-factor 1\n")
    with pytest.raises(InputError, match="garden/images/DSC00002.JPG .*not perspective"):
        to_frames(parse(tmp_path / "scenes.txt"))
