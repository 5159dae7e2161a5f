import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_parsers.any_layout import parse_sides
from data_parsers.re10k import Re10kScenesConfig
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.image_files import open_bytes
from tests.scenes.chunk_files import CAMERA, jpeg, packed, scene, write_chunks


def parse(root, split="train", **settings):
    return Re10kScenesConfig(data=root, **settings).setup().get_dataparser_outputs(split)


def names(root, split="train", **settings) -> list[str]:
    return parse(root, split, **settings).metadata["scene_names"]


@pytest.fixture
def root(tmp_path):
    write_chunks(tmp_path / "train", [scene("c"), scene("a", 6)], [scene("b", 5)])
    write_chunks(tmp_path / "test", [scene("d", 3)])
    return tmp_path


def test_all_scenes_of_a_side_come_in_the_order_of_the_chunks(root):
    outputs = parse(root)
    assert outputs.metadata["scene_names"] == ["c", "a", "b"]
    assert outputs.metadata["scene_index"].tolist() == [0] * 4 + [1] * 6 + [2] * 5
    assert outputs.metadata["frame_order"].tolist() == [*range(4), *range(6), *range(5)]
    assert outputs.image_filenames[5] == root / "train/000000.torch/a/000001.jpg"
    assert outputs.image_filenames.exist().all()
    assert outputs.metadata["instance_filenames"] is None and outputs.metadata["depth_filenames"] is None
    assert names(root, "val") == names(root, "test") == ["d"]
    assert names(root, "all") == ["c", "a", "b", "d"]


def test_chunks_come_in_the_order_of_their_numbers(tmp_path):
    for number, key in ((10, "z"), (9, "y")):
        torch.save([scene(key)], tmp_path / f"{number}.torch")
    assert names(tmp_path, "all") == ["y", "z"]


def test_a_folder_of_chunks_alone_is_divided_like_other_layouts(root):
    assert names(root / "train") == ["c", "a"] and names(root / "train", "val") == ["b"]
    assert names(root / "train", "all") == ["c", "a", "b"]
    for file in (root / "test").iterdir():
        file.unlink()
    assert names(root) == ["c", "a"] and names(root, "val") == ["b"]


def test_of_a_single_scene_the_last_frames_are_held_out(tmp_path):
    write_chunks(tmp_path, [scene("s", 60)])
    assert parse(tmp_path).metadata["frame_order"].tolist() == list(range(44))
    assert parse(tmp_path, "val").metadata["frame_order"].tolist() == list(range(44, 60))


def test_scenes_can_be_limited_in_number_and_length(root):
    assert names(root, "all", max_scenes=2) == ["c", "a", "d"]
    assert names(root, min_frames=5) == ["a", "b"] and names(root, min_frames=5, max_scenes=1) == ["a"]
    (root / "train" / "000001.torch").write_bytes(b"damaged, and not looked at")
    assert names(root, max_scenes=2) == ["c", "a"]


def test_without_an_index_chunks_are_read_alike(root):
    (root / "train" / "index.json").unlink()
    (root / "test" / "index.json").unlink()
    assert names(root, "all") == ["c", "a", "b", "d"]


def test_cameras_are_those_of_the_file_in_pixels_and_opengl_axes(root):
    outputs = parse(root)
    camera = outputs.cameras[1]
    # 24x16 pixels: 0.9 * 24, 1.6 * 16, 0.5 * 24, 0.45 * 16
    found = [float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy, camera.width, camera.height)]
    assert found == pytest.approx([21.6, 25.6, 12.0, 7.2, 24, 16])
    assert outputs.cameras.distortion_params.abs().max() == 0
    # world-to-camera moves by (0.15, 0.2, 0.3), so the camera stands at minus that; y and z change sign
    expected = [[1, 0, 0, -0.15], [0, -1, 0, -0.2], [0, 0, -1, -0.3]]
    np.testing.assert_allclose(camera.camera_to_worlds.numpy(), expected, atol=1e-7)


def test_frames_come_in_the_order_of_their_timestamps(tmp_path):
    write_chunks(tmp_path, [scene("a", 4, timestamps=torch.tensor([30, 10, 40, 20])), scene("b")])
    outputs = parse(tmp_path)
    assert [file.name for file in outputs.image_filenames] == ["000001.jpg", "000003.jpg", "000000.jpg", "000002.jpg"]
    assert outputs.metadata["frame_order"].tolist() == [0, 1, 2, 3]
    centres = outputs.cameras.camera_to_worlds[:, 0, 3].tolist()
    assert centres == pytest.approx([-0.15, -0.25, -0.1, -0.2])


def test_rooms_in_chunks_have_the_cameras_and_images_of_those_in_files(rooms, packed_rooms):
    for split, scenes in (("train", ["room_0000", "room_0001"]), ("val", ["room_0002"])):
        ours = parse(packed_rooms, split)
        other = ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs(split)
        assert ours.metadata["scene_names"] == other.metadata["scene_names"] == scenes
        # of either scene the first 24 of 60 frames are packed
        same = np.concatenate([60 * scene + np.arange(24) for scene in range(len(scenes))])
        cameras = other.cameras[torch.from_numpy(same)]
        assert len(ours.cameras) == len(same)
        assert (ours.cameras.camera_to_worlds - cameras.camera_to_worlds).abs().max() < 1e-6
        for name in ("fx", "fy", "cx", "cy"):
            torch.testing.assert_close(getattr(ours.cameras, name), getattr(cameras, name), rtol=1e-6, atol=0)
        assert torch.equal(ours.cameras.width, cameras.width) and torch.equal(ours.cameras.height, cameras.height)
        for number, place in enumerate(same.tolist()):
            with open_bytes(ours.image_filenames[number]) as stream:
                assert stream.read() == other.image_filenames[place].read_bytes()


def test_points_of_one_frame_fall_where_another_one_sees_them(rooms, packed_rooms):
    cameras, pair = parse(packed_rooms).cameras, (12, 16)
    depths = [
        np.asarray(Image.open(rooms / "scenes" / "room_0000" / "depth" / f"DSC{frame + 1:05d}.png")) / 1000
        for frame in pair
    ]
    fx, fy, cx, cy = (float(getattr(cameras, name)[0]) for name in ("fx", "fy", "cx", "cy"))
    height, width = depths[0].shape
    row, column = np.mgrid[:height, :width] + 0.5
    first, second = (cameras.camera_to_worlds[frame].double().numpy() for frame in pair)
    # OpenGL's axes: y up, and the camera looks along -z
    local = np.stack([(column - cx) / fx, -(row - cy) / fy, -np.ones_like(row)], -1) * depths[0][..., None]
    there = (local @ first[:, :3].T + first[:, 3] - second[:, 3]) @ second[:, :3]
    x = np.floor(fx * there[..., 0] / -there[..., 2] + cx).astype(int)
    y = np.floor(-fy * there[..., 1] / -there[..., 2] + cy).astype(int)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    seen = depths[1][y[inside], x[inside]]
    assert inside.mean() > 0.7
    assert np.median(np.abs(-there[inside][:, 2] - seen) / seen) < 0.01


def without_last(file: Path) -> None:
    content = torch.load(file, weights_only=True)
    torch.save(content[:-1], file)


def with_cameras(file: Path, change) -> None:
    content = torch.load(file, weights_only=True)
    change(content[1]["cameras"])
    torch.save(content, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: [file.unlink() for file in r.glob("*/*.torch")], "no chunks .* there nor in `train` and `test`"),
        (lambda r: (r / "train/000001.torch").unlink(), r"index.json names 000001.torch, .*\(1 of 2 chunks.*restore"),
        (lambda r: (r / "train/index.json").write_text("{"), "train/index.json is not valid JSON"),
        (lambda r: without_last(r / "train/000000.torch"), "scene a should be in 000000.torch, and is not"),
        (
            lambda r: torch.save([scene("b"), scene("a")], r / "train/000001.torch"),
            "000001.torch holds scene a, which .*000000.torch holds too",
        ),
        (
            lambda r: with_cameras(r / "train/000000.torch", lambda c: c[3].fill_(float("nan"))),
            "000000.torch: the camera of frame 3 of scene a holds NaN",
        ),
        (
            lambda r: with_cameras(r / "train/000000.torch", lambda c: c[2, 6:].fill_(0)),
            "000000.torch: the camera of frame 2 of scene a is not invertible",
        ),
        (
            lambda r: torch.save([scene("b", 1, images=packed([b"no image"]))], r / "train/000001.torch"),
            "000001.torch: no image of scene b can be decoded",
        ),
        (
            lambda r: torch.save([scene("b", 1, images=packed([b""]))], r / "train/000001.torch"),
            "000001.torch: image 0 of scene b is empty",
        ),
        (
            lambda r: (r / "train/000001.torch").write_bytes((r / "train/000001.torch").read_bytes()[:3000]),
            "000001.torch is damaged",
        ),
        (
            lambda r: (r / "test/index.json").write_text(json.dumps({"d": "000000.torch", "a": "000000.torch"})),
            "Scene a is in .*train and in .*test",
        ),
    ],
)
def test_what_is_wrong_with_a_dataset_is_named(root, damage, message):
    damage(root)
    with pytest.raises(InputError, match=message):
        parse(root, min_frames=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_scenes": 0}, "--max-scenes and --min-frames must be at least 1"),
        ({"min_frames": 0}, "--max-scenes and --min-frames must be at least 1"),
        ({"min_frames": 7}, "no scene has 7 frames: lower --min-frames"),
    ],
)
def test_settings_that_leave_nothing_are_named(root, settings, message):
    with pytest.raises(InputError, match=message):
        parse(root, **settings)


def test_the_unused_numbers_of_a_camera_may_be_anything(tmp_path):
    cameras = torch.tensor(CAMERA).repeat(4, 1)
    cameras[:, 4:6] = float("nan")
    write_chunks(tmp_path, [scene("a", 4, cameras=cameras), scene("b")])
    assert torch.isfinite(parse(tmp_path).cameras.camera_to_worlds).all()


def test_a_scene_held_out_and_trained_on_is_an_error_of_the_whole_dataset(root):
    write_chunks(root / "test", [scene("d"), scene("a")], index=False)
    with pytest.raises(InputError, match="test/000000.torch holds scene a, which .*train/000000.torch holds too"):
        parse(root, "all")


def test_a_scene_of_both_sides_is_found_without_an_index(tmp_path):
    write_chunks(tmp_path / "train", [scene("c"), scene("a", 6)], index=False)
    write_chunks(tmp_path / "test", [scene("a", 6)], index=False)
    with pytest.raises(InputError, match=r"Scene a is in .*train and in .*test"):
        parse_sides(Re10kScenesConfig(data=tmp_path), all_scenes=False)


def test_undivided_chunks_are_looked_through_once_for_both_sides(root):
    parser = Re10kScenesConfig(data=root / "train").setup()
    assert parser.get_dataparser_outputs("train").metadata["scene_names"] == ["c", "a"]
    for file in (root / "train").glob("*.torch"):
        file.write_bytes(b"")
    assert parser.get_dataparser_outputs("val").metadata["scene_names"] == ["b"]


def test_a_first_image_that_cannot_be_decoded_leaves_the_others(tmp_path):
    images = packed([b"no image", jpeg(1), jpeg(2)])
    write_chunks(tmp_path, [scene("a", 3, images=images)])
    assert parse(tmp_path, "all").cameras.width.tolist() == [[24]] * 3


def test_a_model_is_trained_on_chunks_with_superpixels_and_mvsplat(
    tiny_config, packed_rooms, mvsplat_file, tmp_path, clean_writers
):
    datamanager = tiny_config.pipeline.datamanager
    tiny_config.data = datamanager.data = packed_rooms
    datamanager.dataparser = Re10kScenesConfig()
    datamanager.masks, datamanager.mask_cache = "superpixel", tmp_path / "masks"
    datamanager.reconstructor, datamanager.reconstructor_checkpoint = "mvsplat", mvsplat_file
    tiny_config.max_num_iterations = 2
    trainer = tiny_config.setup()
    trainer.setup()
    before = [
        parameter.detach().clone() for parameter in trainer.pipeline.model.parameters() if parameter.requires_grad
    ]
    trainer.train()
    after = [parameter for parameter in trainer.pipeline.model.parameters() if parameter.requires_grad]
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert np.isfinite(float(trainer.pipeline.get_train_loss_dict(3)[1]["distillation"].detach()))
    assert trainer.pipeline.datamanager.eval_triplet(0).scene == "room_0002"
    assert list((tmp_path / "masks").rglob("*.png"))


def test_the_reconstructor_that_needs_depth_is_refused(tiny_config, packed_rooms):
    datamanager = tiny_config.pipeline.datamanager
    tiny_config.data = datamanager.data = packed_rooms
    datamanager.dataparser, datamanager.masks = Re10kScenesConfig(), "none"
    datamanager.reconstructor, datamanager.reconstructor_checkpoint = "depth", None
    with pytest.raises(InputError, match="No depth map is known for any frame, .*`depth` reconstructor"):
        tiny_config.pipeline.setup(device="cpu")
