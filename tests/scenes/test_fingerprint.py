import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_parsers.any_layout import parse
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.scenes.fingerprint import dataset_fingerprint
from snd_nerfstudio.snd_frames import to_frames


def of(root):
    return dataset_fingerprint(to_frames(parse(ScanNetppScenesConfig(data=root), "train")), root)


@pytest.fixture
def copied(rooms, tmp_path):
    return shutil.copytree(rooms, tmp_path / "rooms")


def test_it_stays_where_only_the_place_changes(rooms, copied):
    assert of(rooms) == of(copied)


def test_it_is_the_same_for_lists_of_paths(rooms):
    frames = to_frames(parse(ScanNetppScenesConfig(data=rooms), "train"))
    plain = replace(frames, image_files=list(frames.image_files))
    assert dataset_fingerprint(plain, rooms) == dataset_fingerprint(frames, rooms)


@pytest.mark.parametrize("change", ["pose", "content", "frames", "masks"])
def test_it_follows_poses_contents_and_the_list_of_frames(rooms, copied, change):
    scene = copied / "scenes/room_0000"
    if change == "pose":
        file = scene / "transforms_train.json"
        content = json.loads(file.read_text())
        content["frames"][3]["transform_matrix"][0][3] += 1e-3
        file.write_text(json.dumps(content))
    elif change == "content":
        first = sorted((scene / "images").iterdir())[0]
        first.write_bytes(first.read_bytes() + b"\0")
    elif change == "frames":
        shutil.rmtree(copied / "scenes/room_0001")
    else:
        first = sorted((scene / "instance_segmentation").iterdir())[0]
        first.write_bytes(first.read_bytes() + b"\0")
    assert of(copied) != of(rooms)


def test_lists_of_the_same_files_in_another_order_differ(rooms):
    frames = to_frames(parse(ScanNetppScenesConfig(data=rooms), "train"))
    turned = replace(frames, frame_order=np.ascontiguousarray(frames.frame_order[::-1]))
    assert dataset_fingerprint(turned, rooms) != dataset_fingerprint(frames, rooms)
