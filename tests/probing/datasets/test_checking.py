import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import DATASETS, check_dataset, open_dataset
from snd_nerfstudio.probing.datasets.checking import NOTE
from snd_nerfstudio.probing.datasets.checking import check_dataset as check_some
from tests.probing.datasets import writers

WRITERS = {
    "scannetpp": writers.write_scannetpp,
    "scannet": writers.write_scannet_probe,
    "ade20k": writers.write_ade20k,
    "voc2012": writers.write_voc2012,
    "kitti": writers.write_kitti,
}


def problems(found):
    return [text for text in found if not text.startswith(NOTE)]


@pytest.mark.parametrize("name", WRITERS)
def test_a_small_but_sound_dataset_has_notes_only(rooms, tmp_path, name):
    found = check_dataset(name, WRITERS[name](rooms, tmp_path / "data"))
    assert problems(found) == []
    # numbers of samples that differ from the published ones, where there are some
    published = [text for text in found if "the published split has" in text]
    assert len(published) == len(DATASETS[name].counts) and len(found) == len(set(found))


def test_nothing_is_wrong_with_rooms(rooms):
    assert check_dataset("rooms", rooms) == []


def test_all_of_nyu(rooms, tmp_path):
    pytest.importorskip("h5py")
    writers.write_nyu_depth(rooms, tmp_path)
    writers.write_nyu_semantics(rooms, tmp_path)
    frames = writers.write_geonet(rooms, tmp_path)
    writers.write_labelled(rooms, tmp_path)
    assert problems(check_dataset("nyuv2", tmp_path)) == []
    (tmp_path / "nyu_geonet" / writers.geonet_name(frames[0])).write_bytes(b"")
    found = check_some("nyuv2", tmp_path, tasks=["normals"])
    assert found[0].startswith("normals, train: 1 of 4 files in ") and writers.geonet_name(frames[0]) in found[0]
    (tmp_path / "nyu_geonet" / "bad_frames.txt").write_text(writers.geonet_name(frames[0]))
    found = check_some("nyuv2", tmp_path, tasks=["normals"])
    assert found[0] == (
        f"{NOTE}normals, train: 1 bad frames in {tmp_path} are left out: {writers.geonet_name(frames[0])}."
    )


def test_scenes_on_both_sides_are_noted(rooms, tmp_path):
    root = writers.write_scannet_probe(rooms, tmp_path / "scannet_probe")
    noted = [text for text in check_dataset("scannet", root) if "scenes are trained and tested on" in text]
    assert [text.partition(":")[2].split(":")[0].strip() for text in noted] == ["depth", "segmentation"]
    assert not any("scenes are" in text for text in check_some("scannet", root, protocol="fixed"))


def test_images_on_both_sides_are_a_problem(rooms, tmp_path):
    root = writers.write_scannetpp(rooms, tmp_path)
    train, test = root / "scannetpp_train.txt", root / "scannetpp_val.txt"
    train.write_text(train.read_text() + test.read_text())
    found = problems(check_dataset("scannetpp", root))
    assert len(found) == 1 and found[0].startswith("depth: 2 images are trained and tested on, the first one")


def test_an_empty_folder_lacks_everything(tmp_path):
    for name, known in DATASETS.items():
        found = check_dataset(name, tmp_path)
        assert len(found) >= len(known.tasks) and problems(found) == found
        assert all(str(tmp_path) in text for text in found)
    assert check_dataset("nyuv2", tmp_path / "none") == [
        f"Folder {tmp_path / 'none'} does not exist: give the folder of nyuv2."
    ]
    assert "There is no dataset cityscapes: choose one of scannetpp" in check_dataset("cityscapes", tmp_path)[0]


def test_missing_files_are_counted_once(rooms, tmp_path):
    root = writers.write_scannetpp(rooms, tmp_path)
    removed = sorted((root / "depth").rglob("*.png"))
    for file in removed[:2]:
        file.unlink()
    found = problems(check_dataset("scannetpp", root))
    counted = f"depth, train: 2 of 8 files are missing, the first one {removed[0]}: unpack them again."
    assert counted in found and all("depth, train" in text for text in found)
    shutil.rmtree(root / "annotations" / "validation")
    assert any("annotations/validation is missing" in text for text in problems(check_dataset("scannetpp", root)))


@pytest.mark.parametrize("factor", [0.02, 10])
def test_depth_of_another_unit_is_found(rooms, tmp_path, factor):
    root = writers.write_scannetpp(rooms, tmp_path)
    for file in (root / "depth").rglob("*.png"):
        stored = np.asarray(Image.open(file)).astype(np.float64)
        Image.fromarray(np.minimum(stored * factor, 65535).astype(np.uint16)).save(file)
    found = problems(check_some("scannetpp", root, tasks=["depth"]))
    assert len(found) == 2 and all("which is not between 0.2 and 10 m" in text for text in found)
    assert "must be stored in steps of 1 mm, export it again" in found[0]


def test_depth_of_nyu_times_ten_thousand_is_found(rooms, tmp_path):
    found = problems(check_some("nyuv2", writers.write_nyu_depth(rooms, tmp_path, scale=10), tasks=["depth"]))
    assert len(found) == 2  # one for each split, since nothing can be read
    assert all("nothing is farther than 10 m" in text for text in found)


def test_millimetres_in_kitti_are_found(rooms, tmp_path):
    root = writers.write_kitti(rooms, tmp_path)
    for file in (root / "depth").iterdir():
        stored = np.asarray(Image.open(file)).astype(np.float64)
        Image.fromarray(np.minimum(stored / 256 * 1000 * 8, 65535).astype(np.uint16)).save(file)
    assert "steps of 1/256 m" in problems(check_dataset("kitti", root))[0]


def test_images_without_any_label_or_depth_are_noted(rooms, tmp_path):
    root = writers.write_scannetpp(rooms, tmp_path)
    for folder, kind in (("annotations", np.uint8), ("depth", np.uint16)):
        for file in (root / folder).rglob("*.png"):
            Image.fromarray(np.zeros((56, 84), kind)).save(file)
    found = check_dataset("scannetpp", root)
    assert problems(found) == []
    assert any("no pixel of" in t and "has a label" in t for t in found) and any("has depth" in t for t in found)


def test_what_cannot_be_opened_is_refused(rooms):
    with pytest.raises(InputError, match="Dataset kitti has no normals: it has depth"):
        open_dataset("kitti", rooms, "normals", "train")
    with pytest.raises(InputError, match="There is no dataset coco"):
        open_dataset("coco", rooms, "depth", "train")


def test_opening_a_dataset_loads_nothing_heavy(rooms):
    program = f"""
import sys, pathlib
from snd_nerfstudio.probing.datasets import open_dataset
open_dataset("rooms", pathlib.Path({str(rooms)!r}), "depth", "train")[0]
print([m for m in ("torch", "nerfstudio", "timm", "peft", "scipy", "h5py", "cv2", "open3d") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_split_or_protocol_of_another_name_is_refused(rooms):
    program = f"""
import pathlib
from snd_nerfstudio.probing.datasets import open_dataset
open_dataset("rooms", pathlib.Path({str(rooms)!r}), "depth", "val")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "InputError: Split val or protocol fixed is unknown: give train or test" in result.stderr
