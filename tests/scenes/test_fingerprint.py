import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_parsers.any_layout import parse
from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.scenes.fingerprint import dataset_fingerprint
from snd_nerfstudio.snd_frames import to_frames


def of(root, config=ScanNetppScenesConfig):
    return dataset_fingerprint(to_frames(parse(config(data=root), "train")), with_masks=True, with_depth=True)


@pytest.fixture
def copied(rooms, tmp_path):
    return shutil.copytree(rooms, tmp_path / "rooms")


def test_it_stays_where_only_the_place_changes(rooms, copied, monkeypatch):
    assert of(rooms) == of(copied)
    monkeypatch.chdir(copied)
    assert of(rooms) == of(copied.relative_to(copied))  # --data .


def test_a_single_capture_may_be_called_otherwise(rooms, tmp_path):
    scene = shutil.copytree(rooms / "scenes/room_0000", tmp_path / "desk")
    content = json.loads((scene / "transforms_train.json").read_text())
    frames = [{**frame, "file_path": f"images/{frame['file_path']}"} for frame in content["frames"]]
    (scene / "transforms.json").write_text(json.dumps({**content, "frames": frames}))
    before = of(scene, NerfstudioScenesConfig)
    assert of(scene.rename(tmp_path / "table"), NerfstudioScenesConfig) == before


def test_it_is_the_same_for_lists_of_paths(rooms):
    frames = to_frames(parse(ScanNetppScenesConfig(data=rooms), "train"))
    plain = replace(frames, image_files=list(frames.image_files))
    assert dataset_fingerprint(plain, True, True) == dataset_fingerprint(frames, True, True)


def test_what_is_not_used_does_not_count(rooms):
    frames = to_frames(parse(ScanNetppScenesConfig(data=rooms), "train"))
    assert set(dataset_fingerprint(frames, False, False)) == {"cameras", "images"}
    assert set(dataset_fingerprint(frames, True, True)) == {"cameras", "images", "masks", "depth"}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ("pose", {"cameras"}),
        ("content", {"images"}),
        ("gone", {"images"}),
        ("frames", {"cameras", "images", "masks", "depth"}),
        ("masks", {"masks"}),
    ],
)
def test_it_follows_poses_contents_and_the_list_of_frames(rooms, copied, change, changed):
    scene = copied / "scenes/room_0000"
    first, mask = (sorted((scene / kind).iterdir())[0] for kind in ("images", "instance_segmentation"))
    if change == "pose":
        file = scene / "transforms_train.json"
        content = json.loads(file.read_text())
        content["frames"][3]["transform_matrix"][0][3] += 1e-3
        file.write_text(json.dumps(content))
    elif change == "content":
        first.write_bytes(first.read_bytes() + b"\0")
    elif change == "gone":
        first.unlink()
    elif change == "frames":
        shutil.rmtree(copied / "scenes/room_0001")
    else:
        mask.write_bytes(mask.read_bytes() + b"\0")
    before, after = of(rooms), of(copied)
    assert {kind for kind in before if before[kind] != after[kind]} == changed


def test_lists_of_the_same_files_in_another_order_differ(rooms):
    frames = to_frames(parse(ScanNetppScenesConfig(data=rooms), "train"))
    turned = replace(frames, frame_order=np.ascontiguousarray(frames.frame_order[::-1]))
    assert dataset_fingerprint(turned, True, True) != dataset_fingerprint(frames, True, True)
