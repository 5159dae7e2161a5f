import json
import sys

import numpy as np
import pytest
from nerfstudio.configs.dataparser_configs import all_dataparsers
from nerfstudio.data.dataparsers.base_dataparser import DataParser
from nerfstudio.data.dataparsers.blender_dataparser import BlenderDataParserConfig
from nerfstudio.data.dataparsers.colmap_dataparser import ColmapDataParserConfig
from nerfstudio.data.dataparsers.nerfstudio_dataparser import NerfstudioDataParserConfig
from PIL import Image

from data_parsers.any_layout import parse, scene_worlds
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.scenes.rooms.cameras import pinhole
from snd_nerfstudio.snd_frames import to_frames
from snd_nerfstudio.snd_triplets import TripletDataManagerConfig
from tests.data_parsers.rooms_as import SIZE, opengl, room_frames, write_capture, write_colmap

UNCHANGED = {"orientation_method": "none", "center_method": "none", "auto_scale_poses": False, "eval_mode": "all"}


@pytest.fixture
def original(rooms):
    return room_frames(rooms, "room_0000")


def write_blender(frames, folder):
    """The layout of NeRF's synthetic scenes, with a single field of view."""
    (folder / "train").mkdir(parents=True)
    described = []
    for frame in frames:
        Image.open(frame.image).convert("RGBA").save(folder / "train" / f"{frame.stem}.png")
        described.append({"file_path": f"./train/{frame.stem}", "transform_matrix": opengl(frame.pose)})
    angle = 2 * np.arctan(SIZE[1] / 2 / pinhole(*SIZE)[0, 0])
    (folder / "transforms_train.json").write_text(json.dumps({"camera_angle_x": angle, "frames": described}))


def layouts(original, folder):
    write_capture(original, folder / "capture")
    write_colmap(original, folder / "garden")
    write_blender(original, folder / "lego")
    colmap = ColmapDataParserConfig(
        data=folder / "garden", downscale_factor=1, assume_colmap_world_coordinate_convention=False, **UNCHANGED
    )
    return {
        "nerfstudio-data": NerfstudioDataParserConfig(data=folder / "capture", downscale_factor=1, **UNCHANGED),
        "colmap": colmap,
        "blender-data": BlenderDataParserConfig(data=folder / "lego"),
    }


def test_cameras_of_other_dataparsers_are_the_generators_in_every_layout(original, tmp_path):
    for name, config in layouts(original, tmp_path).items():
        frames = to_frames(parse(config, "all"))
        assert len(frames) == 60 and [file.stem for file in frames.image_files] == [f.stem for f in original], name
        expected = np.stack([frame.pose for frame in original])
        np.testing.assert_allclose(frames.camera_to_worlds, expected, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(frames.intrinsics, np.tile(pinhole(*SIZE), (60, 1, 1)), rtol=1e-5, err_msg=name)
        assert frames.sizes.tolist() == [[56, 84]] * 60 and frames.frame_order.tolist() == list(range(60)), name
        train, val = parse(config, "train"), parse(config, "val")
        assert len(train.image_filenames) == 44 and val.image_filenames[0].stem == original[44].stem, name


@pytest.mark.parametrize("name", ["nerfstudio-data", "colmap", "blender-data"])
def test_triplets_for_training_come_from_other_dataparsers_as_they_are_listed(original, tmp_path, name):
    config = layouts(original, tmp_path)[name]
    parser = type(config)(data=config.data)
    if name == "colmap":
        parser.downscale_factor = 1
    wanted = TripletDataManagerConfig(data=config.data, dataparser=parser, image_size=(28, 42), masks="none")
    data = resolve(wanted, "fixed").setup(device="cpu", seed=5)
    (triplet,) = data.next_train(0)
    assert triplet.context.images.shape == (2, 3, 28, 42) and data.num_eval_triplets > 0
    places = [int(name.split(".")[0].removeprefix("DSC")) for name in (*triplet.context.names, *triplet.target.names)]
    assert places[0] < places[2] < places[1]


def test_what_a_dataparser_did_to_the_world_is_known(original, tmp_path):
    write_colmap(original, tmp_path / "garden")
    outputs = parse(ColmapDataParserConfig(data=tmp_path / "garden", downscale_factor=1, eval_mode="all"), "all")
    ((world, scale),) = scene_worlds(outputs)
    poses = to_frames(outputs).camera_to_worlds
    centres = np.stack([frame.pose for frame in original])[:, :3, 3]
    np.testing.assert_allclose(poses[:, :3, 3], scale * (centres @ world[:3, :3].T + world[:3, 3]), atol=1e-4)
    assert scale != 1.0


def test_fisheye_cameras_are_refused_by_the_name_of_an_image(original, tmp_path):
    write_colmap(original, tmp_path / "garden", model="OPENCV_FISHEYE")
    config = ColmapDataParserConfig(data=tmp_path / "garden", downscale_factor=1)
    with pytest.raises(InputError, match=r"images/DSC00002.JPG \(and others\) are not perspective ones: undistort"):
        to_frames(parse(config, "all"))


def without(key):
    def damage(folder):
        content = json.loads((folder / "transforms.json").read_text())
        del content[key]
        (folder / "transforms.json").write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("fl_x"), r"NerfstudioDataParser cannot read it \(AssertionError: fx not specified in frame\)"),
        (without("frames"), r"NerfstudioDataParser cannot read it \(KeyError: 'frames'\)"),
        (lambda f: (f / "transforms.json").unlink(), r"FileNotFoundError.*or end the command with the layout"),
        (lambda f: (f / "transforms.json").write_text("{"), "JSONDecodeError"),
    ],
)
def test_the_error_of_another_dataparser_is_passed_on_with_its_name(original, tmp_path, damage, message):
    write_capture(original[:5], tmp_path / "capture")
    damage(tmp_path / "capture")
    with pytest.raises(InputError, match=f"--data {tmp_path}/capture: nerfstudio's .*{message}"):
        parse(NerfstudioDataParserConfig(data=tmp_path / "capture"), "train")


def test_a_dataparser_that_ends_the_process_does_not(tmp_path):
    class Leaving(DataParser):
        def _generate_dataparser_outputs(self, split="train", **kwargs):
            sys.exit(1)

    config = NerfstudioDataParserConfig(_target=Leaving, data=tmp_path)
    with pytest.raises(InputError, match=r"NerfstudioDataParser cannot read it \(SystemExit: 1\)"):
        parse(config, "train")


def test_a_missing_colmap_model_is_named_with_the_place_where_it_was_looked_for(original, tmp_path):
    write_colmap(original[:5], tmp_path / "garden")
    (tmp_path / "garden/colmap").rename(tmp_path / "garden/model")
    with pytest.raises(InputError, match="ColmapDataParser cannot read it .*Colmap path .*colmap/sparse/0 does not"):
        parse(all_dataparsers["colmap"].__class__(data=tmp_path / "garden"), "train")


def test_two_frames_are_no_triplet(original, tmp_path):
    write_capture(original[:2], tmp_path / "capture")
    with pytest.raises(InputError, match="2 training frames; a triplet needs at least three"):
        parse(NerfstudioDataParserConfig(data=tmp_path / "capture", eval_mode="all"), "train")
