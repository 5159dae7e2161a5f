"""Rooms in the toolkit's tree, converted, against the same rooms as the generator writes them itself."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms
from snd_nerfstudio.scenes.rooms.furniture import CLASSES
from snd_nerfstudio.scenes.toolkit import conversion
from snd_nerfstudio.scenes.toolkit.conversion import Settings, convert_scannetpp

pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
FRAMES = 10
SETTINGS = Settings(56, 84, list(CLASSES))


@pytest.fixture(scope="module")
def download(tmp_path_factory) -> Path:
    """Two rooms as the toolkit has them, twice as large as they will be."""
    out = tmp_path_factory.mktemp("toolkit") / "scannetpp"
    config = RoomsConfig(out=out, scenes=2, seed=7, height=112, width=168, frames=FRAMES, layout="toolkit")
    return generate_rooms(config)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """The same rooms as the generator writes them for training."""
    out = tmp_path_factory.mktemp("snd") / "rooms"
    return generate_rooms(RoomsConfig(out=out, scenes=2, seed=7, height=56, width=84, frames=FRAMES))


@pytest.fixture(scope="module")
def converted(download, tmp_path_factory) -> Path:
    """The download, converted by two processes."""
    out = tmp_path_factory.mktemp("converted") / "out"
    report = convert_scannetpp(download, out, SETTINGS, processes=2)
    assert report.done == 2 * FRAMES and sorted(report.scenes) == ["room_0000", "room_0001"]
    assert not report.skipped_frames and not report.skipped_scenes
    return out


@pytest.fixture
def copy(download, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(download, tmp_path / "copy"))


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.int64)


def frames_of(scene: Path) -> list[dict]:
    content = json.loads((scene / "transforms_train.json").read_text())
    return sorted(content["frames"] + content["test_frames"], key=lambda frame: frame["file_path"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("name", ["room_0000", "room_0001"])
def test_cameras_depth_instances_and_classes_are_the_generators_own(converted, own, name):
    found, wanted = converted / "scenes" / name, own / "scenes" / name
    cameras = [json.loads((scene / "transforms_train.json").read_text()) for scene in (found, wanted)]
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h", "k1", "k2", "k3", "k4"):
        assert cameras[0][key] == pytest.approx(cameras[1][key], abs=1e-6)
    poses = [[frame["transform_matrix"] for frame in frames_of(scene)] for scene in (found, wanted)]
    np.testing.assert_array_equal(*poses)
    off, same, same_class = [], [], []
    for number in range(1, FRAMES + 1):
        file = f"DSC{number:05d}"
        shown = read(found / f"masks/{file}.png") == 255
        pairs = {
            kind: (read(found / kind / ending), read(wanted / kind / ending))
            for kind, ending in (
                ("depth", f"{file}.png"),
                ("instance_segmentation", f"{file}.JPG.png"),
                ("semantics", f"{file}.png"),
            )
        }
        off.append(np.abs(pairs["depth"][0] - pairs["depth"][1]).ravel())
        same.append((pairs["instance_segmentation"][0] == pairs["instance_segmentation"][1])[shown])
        same_class.append((pairs["semantics"][0] == pairs["semantics"][1])[shown])
        # what is anonymised has depth, but neither instance nor class
        assert (pairs["instance_segmentation"][0][~shown] == 0).all() and (pairs["semantics"][0][~shown] == 255).all()
        assert shown.all() == (number != 10)
        colours = read(found / f"images/{file}.JPG")[shown] - read(wanted / f"images/{file}.JPG")[shown]
        assert 10 * np.log10(255**2 / (colours.astype(float) ** 2).mean()) > 24
    assert np.median(np.concatenate(off)) < 5 and np.quantile(np.concatenate(off), 0.99) < 5
    assert np.concatenate(same).mean() > 0.99 and np.concatenate(same_class).mean() > 0.99


def test_the_dataparser_finds_the_split_and_the_test_frames_once(converted):
    from data_parsers.scannetpp import ScanNetppScenesConfig

    parser = ScanNetppScenesConfig(data=converted).setup()
    outputs = parser.get_dataparser_outputs("train")
    assert outputs.metadata["scene_names"] == ["room_0000"] and len(outputs.image_filenames) == FRAMES
    assert parser.get_dataparser_outputs("val").metadata["scene_names"] == ["room_0001"]
    assert all(file.is_file() for key in ("instance_filenames", "depth_filenames") for file in outputs.metadata[key])


def test_one_process_writes_the_same_bytes_and_a_second_run_writes_nothing(converted, download, tmp_path):
    out = tmp_path / "again"
    convert_scannetpp(download, out, SETTINGS)
    first = contents(out)
    assert first == contents(converted)
    times = {file: (out / file).stat().st_mtime_ns for file in first if "transforms" not in file and "scenes" in file}
    report = convert_scannetpp(download, out, SETTINGS)
    assert (report.done, report.found) == (0, 2 * FRAMES)
    assert times == {file: (out / file).stat().st_mtime_ns for file in times}
    # what an interruption leaves: no transforms, a frame without all of its files
    (out / "scenes/room_0001/transforms_train.json").unlink()
    (out / "scenes/room_0001/depth/DSC00003.png").unlink()
    (out / "scenes/room_0001/images/DSC00004.JPG").unlink()
    report = convert_scannetpp(download, out, SETTINGS)
    assert (report.done, report.found) == (2, 2 * FRAMES - 2)
    assert contents(out) == first


def test_other_settings_or_another_folder_are_refused_and_nothing_is_changed(converted, download, tmp_path):
    before = contents(converted)
    with pytest.raises(InputError, match="other settings.*Nothing was changed"):
        convert_scannetpp(download, converted, Settings(56, 84))
    assert contents(converted) == before
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not an empty folder"):
        convert_scannetpp(download, tmp_path, SETTINGS)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_what_cannot_be_used_is_skipped_with_its_reason_and_the_rest_is_done(copy, tmp_path):
    first, second = copy / "data/room_0000", copy / "data/room_0001"
    (first / "dslr/resized_images/DSC00001.JPG").unlink()
    (first / "dslr/resized_images/DSC00002.JPG").write_bytes(b"no image")
    Image.new("RGB", (84, 56)).save(first / "dslr/resized_images/DSC00003.JPG")
    (first / "dslr/resized_anon_masks/DSC00004.png").unlink()

    def spoil(content):
        content["frames"][4]["transform_matrix"][0][0] = float("nan")
        content["frames"][5]["transform_matrix"] = [[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]
        content["frames"][6]["is_bad"] = True

    edit(first / "dslr/nerfstudio/transforms.json", spoil)
    (second / "scans/segments.json").unlink()
    out = tmp_path / "out"
    report = convert_scannetpp(copy, out, SETTINGS)
    reasons = {outcome.frame: outcome.what for outcome in report.skipped_frames}
    assert reasons == {
        "DSC00001.JPG": "its image is missing",
        "DSC00002.JPG": "its image cannot be decoded",
        "DSC00003.JPG": "its image has 84x56 pixels, its camera 168x112",
        "DSC00004.JPG": "its anonymisation mask is missing",
        "DSC00005.JPG": "its pose is not a 4x4 matrix of finite numbers",
        "DSC00006.JPG": "its pose is not rigid",
    }
    assert report.scenes == ["room_0000"] and report.done == 4
    assert [outcome.scene for outcome in report.skipped_scenes] == ["room_0001"]
    assert "segments.json is missing" in report.skipped_scenes[0].what
    assert not (out / "scenes/room_0001").exists()
    written = frames_of(out / "scenes/room_0000")
    assert [(f["file_path"][6:8], f["is_bad"]) for f in written] == [
        ("07", True), ("08", False), ("09", False), ("10", False)
    ]  # fmt: skip
    told = "\n".join(report.lines())
    assert "Skipped scene room_0001" in told and "Skipped 1 frames: its image is missing" in told
    assert len(json.loads((out / "metadata/skipped.json").read_text())) == 7
    # what is mended is taken in by the next run
    shutil.copy(second / "dslr/resized_images/DSC00001.JPG", first / "dslr/resized_images/DSC00001.JPG")
    assert convert_scannetpp(copy, out, SETTINGS, ["room_0000"]).done == 1
    assert len(frames_of(out / "scenes/room_0000")) == 5


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_that_cannot_be_written_is_named(download, tmp_path, processes):
    convert_scannetpp(download, tmp_path / "out", Settings(28, 42), ["room_0000"])
    # a file where a folder of images would go
    shutil.rmtree(tmp_path / "out/scenes/room_0000/images")
    (tmp_path / "out/scenes/room_0000/images").write_text("")
    with pytest.raises(InputError, match="--out .*out cannot be written"):
        convert_scannetpp(download, tmp_path / "out", Settings(28, 42), ["room_0000"], processes)


def test_frames_that_already_hold_the_test_frames_are_written_once(copy, tmp_path):
    def append(content):
        content["frames"] += content["test_frames"]

    edit(copy / "data/room_0000/dslr/nerfstudio/transforms.json", append)
    report = convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    assert report.done == FRAMES
    content = json.loads((tmp_path / "out/scenes/room_0000/transforms_train.json").read_text())
    assert (len(content["frames"]), len(content["test_frames"])) == (FRAMES - 1, 1)
    assert not (tmp_path / "out/scenes/room_0000/semantics").exists()


@pytest.mark.parametrize("told_by", ["folder", "lists"])
def test_scenes_without_anonymisation_masks_are_shown_whole(copy, tmp_path, told_by):
    if told_by == "folder":
        edit(copy / "data/room_0000/dslr/train_test_lists.json", lambda content: content.pop("has_masks"))
        shutil.rmtree(copy / "data/room_0000/dslr/resized_anon_masks")
    else:
        edit(copy / "data/room_0000/dslr/train_test_lists.json", lambda content: content.update(has_masks=False))
    convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    assert (read(tmp_path / "out/scenes/room_0000/masks/DSC00010.png") == 255).all()


def test_a_scene_without_the_masks_that_its_lists_tell_of_is_skipped(copy, tmp_path):
    shutil.rmtree(copy / "data/room_0000/dslr/resized_anon_masks")
    report = convert_scannetpp(copy, tmp_path / "out", Settings(28, 42))
    assert report.scenes == ["room_0001"] and not (tmp_path / "out/scenes/room_0000").exists()
    assert [outcome.scene for outcome in report.skipped_scenes] == ["room_0000"]
    assert "room_0000/dslr/resized_anon_masks is missing" in report.skipped_scenes[0].what


def move(content) -> None:
    content["frames"][0]["transform_matrix"][0][3] += 0.5


def widen(content) -> None:
    content["fl_x"] *= 0.9


def fewer_objects(content) -> None:
    del content["segGroups"][0]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("dslr/nerfstudio/transforms.json", move),
        ("dslr/nerfstudio/transforms.json", widen),
        ("scans/segments_anno.json", fewer_objects),
        ("dslr/train_test_lists.json", lambda content: content.update(has_masks=False)),
    ],
)
def test_frames_of_a_scene_whose_download_has_changed_are_made_anew(copy, tmp_path, file, change):
    settings = Settings(28, 42)
    convert_scannetpp(copy, tmp_path / "out", settings)
    edit(copy / "data/room_0000" / file, change)
    report = convert_scannetpp(copy, tmp_path / "out", settings)
    assert (report.done, report.found, report.renewed) == (FRAMES, FRAMES, ["room_0000"])
    assert "1 scenes' download has changed" in "\n".join(report.lines()) and "room_0000" in "\n".join(report.lines())
    convert_scannetpp(copy, tmp_path / "fresh", settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    again = convert_scannetpp(copy, tmp_path / "out", settings)
    assert (again.done, again.renewed) == (0, []) and "anew" not in "\n".join(again.lines())


@pytest.mark.parametrize("file", ["scans/mesh_aligned_0.05.ply", "scans/segments.json", "dslr/resized_anon_masks"])
def test_another_mesh_or_other_masks_are_told_by_their_time(copy, tmp_path, file):
    convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    os.utime(copy / "data/room_0000" / file, (0, 0))
    report = convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    assert (report.done, report.found, report.renewed) == (FRAMES, 0, ["room_0000"])


def test_frames_that_nobody_knows_the_origin_of_are_made_anew(copy, tmp_path):
    convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    (tmp_path / "out/scenes/room_0000/made_from.json").unlink()
    assert convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"]).renewed == ["room_0000"]


def test_scenes_whose_scans_are_gone_keep_their_frames(copy, tmp_path):
    convert_scannetpp(copy, tmp_path / "out", Settings(28, 42))
    before = contents(tmp_path / "out/scenes")
    (copy / "data/room_0000/scans/segments.json").unlink()
    edit(copy / "data/room_0000/dslr/nerfstudio/transforms.json", move)
    report = convert_scannetpp(copy, tmp_path / "out", Settings(28, 42))
    assert [outcome.scene for outcome in report.skipped_scenes] == ["room_0000"]
    assert contents(tmp_path / "out/scenes") == before


def test_an_empty_file_is_not_a_finished_one(download, tmp_path):
    convert_scannetpp(download, tmp_path / "out", Settings(28, 42), ["room_0000"])
    depth = tmp_path / "out/scenes/room_0000/depth/DSC00003.png"
    depth.write_bytes(b"")
    assert convert_scannetpp(download, tmp_path / "out", Settings(28, 42), ["room_0000"]).done == 1
    assert read(depth).any()


def test_an_interrupted_conversion_has_the_lists_already(download, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.SceneConverter, "convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_scannetpp(download, tmp_path / "out", SETTINGS)
    assert (tmp_path / "out/metadata/nvs_sem_val.txt").read_text().split() == ["room_0001"]
    assert (tmp_path / "out/metadata/semantic_classes.txt").read_text().split("\n")[:-1] == list(CLASSES)


def test_what_was_skipped_is_kept_for_scenes_that_are_not_asked_for(copy, tmp_path):
    for name in ("room_0000", "room_0001"):
        (copy / "data" / name / "dslr/resized_images/DSC00001.JPG").unlink()
        convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), [name])
    skipped = tmp_path / "out/metadata/skipped.json"
    assert [entry["scene"] for entry in json.loads(skipped.read_text())] == ["room_0000", "room_0001"]
    shutil.copy(
        copy / "data/room_0000/dslr/resized_images/DSC00002.JPG",
        copy / "data/room_0000/dslr/resized_images/DSC00001.JPG",
    )
    convert_scannetpp(copy, tmp_path / "out", Settings(28, 42), ["room_0000"])
    assert [entry["scene"] for entry in json.loads(skipped.read_text())] == ["room_0001"]


class Deadly(Settings):
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


def test_a_process_that_dies_is_an_error_without_a_traceback(download, tmp_path):
    with pytest.raises(InputError, match="exit code 3.*fewer --processes"):
        convert_scannetpp(download, tmp_path / "out", Deadly(28, 42), processes=2)


@pytest.mark.parametrize(
    ("root", "names", "message"),
    [
        (lambda d: d / "data", None, "no folder `data` in it"),
        (lambda d: d, ["room_9"], "--scenes room_9: no folder"),
    ],
)
def test_a_wrong_folder_or_scene_is_named(download, tmp_path, root, names, message):
    with pytest.raises(InputError, match=message):
        convert_scannetpp(root(download), tmp_path / "out", SETTINGS, names)
    assert not (tmp_path / "out").exists()
