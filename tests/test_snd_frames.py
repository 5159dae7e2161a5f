from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_frames import scene_images, to_frames


@pytest.fixture
def outputs(rooms: Path) -> DataparserOutputs:
    """The training rooms as nerfstudio describes them."""
    return ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs(split="train")


def test_poses_become_opencv_exactly_once(outputs):
    frames = to_frames(outputs)
    opengl = outputs.cameras.camera_to_worlds[0].numpy()
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 0], opengl[:, 0])
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 1:3], -opengl[:, 1:3])
    np.testing.assert_allclose(frames.camera_to_worlds[0, :3, 3], opengl[:, 3])


def test_fisheye_cameras_are_refused(outputs):
    outputs.cameras.camera_type = torch.full_like(outputs.cameras.camera_type, CameraType.FISHEYE.value)
    with pytest.raises(InputError, match="not perspective"):
        to_frames(replace(outputs))


def test_some_frames_of_a_scene_with_cameras_of_their_size(outputs):
    frames = to_frames(outputs)
    shown = scene_images(frames, outputs, 1, (28, 84), most=7)
    assert len(shown) == 7 and {file.parts[-3] for file in shown.image_filenames} == {"room_0001"}
    assert shown.image_filenames[0] == frames.image_files[60] and shown.image_filenames[-1] == frames.image_files[119]
    assert shown[3]["image"].shape == (28, 84, 3)
    # the rooms are 56x84: half as high, as wide as before, and the dataset's own cameras stay as they are
    assert shown.cameras.height.flatten().tolist() == [28] * 7 and outputs.cameras.height[0] == 56
    torch.testing.assert_close(shown.cameras.fy[0], outputs.cameras.fy[60] / 2)
    torch.testing.assert_close(shown.cameras.fx[0], outputs.cameras.fx[60])
