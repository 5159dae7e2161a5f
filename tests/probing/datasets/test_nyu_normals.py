import gzip
import pickle
import sys

import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets import nyu_normals, open_dataset
from snd_nerfstudio.probing.datasets.checking import check_dataset
from snd_nerfstudio.probing.datasets.nyu_normals import is_complete
from tests.probing.datasets.writers import geonet_name, sized, write_geonet, write_labelled


@pytest.fixture
def geonet(rooms, tmp_path):
    return tmp_path / "nyuv2", write_geonet(rooms, tmp_path / "nyuv2")


def train(root, protocol="fixed"):
    return open_dataset("nyuv2", root, "normals", "train", protocol)


def test(root):
    return open_dataset("nyuv2", root, "normals", "test")


test.__test__ = False  # type: ignore


# ---------------------------------------------------------------------- training


def test_frames_have_their_mean_added_back_and_are_cut(geonet):
    root, frames = geonet
    dataset = train(root)
    assert len(dataset) == 4 and dataset.window == (0, 480, 80, 560) and dataset.left_out == ()
    for sample, frame in zip(dataset, frames):
        assert sample.name == geonet_name(frame)[:-4] and sample.image.shape == (480, 640, 3)
        np.testing.assert_array_equal(sample.image, sized(frame.image, 481, 641)[:480, :640])
        expected = sized(frame.millimetres, 481, 641)[:480, :640] / np.float32(1000)
        np.testing.assert_array_equal(sample.depth, np.where(expected > 10, 0, expected))
        np.testing.assert_allclose(sample.normals, sized(frame.normals, 481, 641)[:480, :640], atol=1e-5)
    assert dataset.scene(0) == "bedroom_0000" and dataset.files(0) == [root / "nyu_geonet" / geonet_name(frames[0])]


def test_the_paper_cuts_decimals_off_where_fixed_rounds(geonet):
    root, frames = geonet
    image = np.full((480, 640, 3), 100.0)
    image[0, 0], image[0, 1] = [7.4, 7.6, 254.6], [255.4, -0.3, 0.2]
    changed(root, frames[0], img=image - 2 * np.array([122.175, 116.169, 103.508]))
    np.testing.assert_array_equal(train(root, "paper")[0].image[0, :2], [[7, 7, 254], [255, 0, 0]])
    np.testing.assert_array_equal(train(root)[0].image[0, :2], [[7, 8, 255], [255, 0, 0]])


def test_the_folder_may_lie_beside_and_have_either_name(geonet, tmp_path):
    root, _ = geonet
    (root / "nyu_geonet").rename(tmp_path / "nyuv2_geonet")
    assert len(train(root)) == 4
    (tmp_path / "nyuv2_geonet").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"Folder .*nyuv2/nyu_geonet is missing: put the .mat files"):
        train(root)


def changed(root, frame, **changes):
    """One frame written again, with some keys changed, added or (None) removed."""
    from scipy.io import loadmat, savemat

    file = root / "nyu_geonet" / geonet_name(frame)
    content = {key: value for key, value in loadmat(str(file)).items() if not key.startswith("__")} | changes
    savemat(file, {key: value for key, value in content.items() if value is not None}, do_compression=True)
    return file


def test_depth_beyond_ten_metres_and_normals_of_no_length_count_as_none(geonet):
    root, frames = geonet
    depth, normals = np.full((480, 640), 2.0), np.tile([0, 0, -1.0], (480, 640, 1))
    depth[0, :4], normals[1, :2] = [10.5, np.nan, -1, 10], [[0, 0, 0], [0, 0, -1.7]]
    changed(root, frames[0], depth=depth, norm=normals)
    sample = train(root)[0]
    np.testing.assert_array_equal(sample.depth[0, :5], [0, 0, 0, 10, 2])
    np.testing.assert_array_equal(sample.normals[1, :3], [[0, 0, 0], [0, 0, -1], [0, 0, -1]])


def test_a_file_that_is_cut_short_is_refused_until_it_is_listed(geonet):
    root, frames = geonet
    file = root / "nyu_geonet" / geonet_name(frames[1])
    assert is_complete(file)
    whole = file.read_bytes()
    for size in (0, 100, 128, 200, len(whole) - 1):
        file.write_bytes(whole[:size])
        assert not is_complete(file)
    with pytest.raises(InputError, match=rf"1 of 4 files in .* are cut short \({file.name}\): unpack them again"):
        train(root)
    (root / "nyu_geonet" / "bad_frames.txt").write_text(file.name)
    dataset = train(root)
    assert len(dataset) == 3 and dataset.left_out == (file.name,)
    assert file not in {path for index in range(3) for path in dataset.files(index)}
    (root / "nyu_geonet" / "bad_frames.txt").unlink()
    file.write_bytes(whole)
    assert len(train(root)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": None}, "has no numbers `norm` of 3 axes"),
        ({"norm": np.zeros((480, 640, 3))}, "has no depth, no normals"),
        ({"norm": np.full((480, 640, 3), np.nan)}, "has no depth, no normals, or some that are no numbers"),
        ({"depth": np.zeros((480, 640))}, "has no depth"),
        ({"depth": np.ones((240, 320))}, r"`depth` .* has the shape \(240, 320\), less than 480x640"),
        ({"img": np.full((480, 640, 3), 100.0)}, "`img` .* is outside of 0 to 255"),
        ({"img": np.full((480, 640, 3), -np.inf)}, "`img` .* is outside of 0 to 255"),
    ],
)
def test_an_impossible_frame_is_refused_and_can_be_listed(geonet, change, message):
    root, frames = geonet
    file = changed(root, frames[2], **change)
    dataset = train(root)
    with pytest.raises(InputError, match=message + rf".*or leave it out: add the line {file.name} to .*bad_frames"):
        dataset[2]
    found = [text for text in check_dataset("nyuv2", root, ["normals"], thorough=True) if "train:" in text]
    assert len(found) == 1 and str(file) in found[0] and f"add the line {file.name} to" in found[0]
    (root / "nyu_geonet" / "bad_frames.txt").write_text(file.name + "\n")
    listed = train(root)
    assert len(listed) == 3 and listed.left_out == (file.name,) and len(list(listed)) == 3
    assert listed.content_hash() != dataset.content_hash()


def test_a_list_of_bad_frames_that_names_no_frame_is_refused(geonet):
    root, _ = geonet
    (root / "nyu_geonet" / "bad_frames.txt").write_text("6919\n")
    with pytest.raises(InputError, match=r"bad_frames.txt names 6919, which is no frame"):
        train(root)


def test_a_damaged_file_of_full_length_is_refused(geonet):
    root, frames = geonet
    file = root / "nyu_geonet" / geonet_name(frames[0])
    content = bytearray(file.read_bytes())
    content[400:900] = bytes(500)
    file.write_bytes(bytes(content))
    assert is_complete(file)
    with pytest.raises(InputError, match=r"cannot be decoded \(.*or leave it out"):
        train(root)[0]


def test_places_that_the_released_code_deletes_are_named_where_the_listing_is_long_enough(geonet, monkeypatch):
    root, frames = geonet
    assert train(root).notes == ()
    monkeypatch.setattr(nyu_normals, "DELETED_PLACES", (1, 3))
    dataset = train(root)
    assert len(dataset) == 4  # nothing is deleted by place
    assert all(geonet_name(frames[place]) in dataset.notes[0] for place in (1, 3))
    released = train(root, "paper")
    assert released.left_out == tuple(geonet_name(frames[place]) for place in (1, 3)) and len(released) == 2
    assert "are left out" in released.notes[0]
    (root / "nyu_geonet" / "bad_frames.txt").write_text(geonet_name(frames[1]))
    assert train(root).notes == ()


# ---------------------------------------------------------------------- testing


def test_of_two_copies_of_the_normals_each_protocol_takes_its_own_and_says_so(rooms, tmp_path):
    pytest.importorskip("h5py")
    write_labelled(rooms, tmp_path)
    assert test(tmp_path).split_rule == "published, normals of nyu_normals_gt"
    np.save(tmp_path / "all_normals.npy", np.full((9, 480, 640, 3), 0.6, np.float32))
    assert test(tmp_path).split_rule == "published, normals of nyu_normals_gt"
    paper = open_dataset("nyuv2", tmp_path, "normals", "test", "paper")
    assert paper.split_rule == "published, normals of all_normals.npy"
    assert np.ptp(paper[0].normals) < 1e-5


@pytest.mark.parametrize("normals", ["png", "npy"])
@pytest.mark.parametrize("lists", ["json", "mat", "none"])
def test_labelled_images_of_the_list(rooms, tmp_path, normals, lists):
    pytest.importorskip("h5py")
    frames = write_labelled(rooms, tmp_path, normals, tested=(1, 3), lists=lists)
    if (normals, lists) == ("npy", "none"):
        with pytest.raises(InputError, match=r"splits.mat is missing, which says what is tested"):
            test(tmp_path)
        return
    dataset = test(tmp_path)
    assert len(dataset) == 2 and dataset.window == (0, 480, 80, 560)
    for sample, frame, number in zip(dataset, frames[1::2], (2, 4)):
        assert sample.name == f"{number:04d}"
        np.testing.assert_array_equal(sample.image, sized(frame.image, 480, 640))
        metres = (sized(frame.millimetres, 480, 640) / 1000).astype(np.float32)
        np.testing.assert_allclose(sample.depth, np.where(metres > 10, 0, metres), rtol=1e-6)
        np.testing.assert_allclose(sample.normals, sized(frame.normals, 480, 640), atol=0.008)
    assert len(dataset.list_files()) == (0 if lists == "none" else 1) and len(dataset.content_hash()) == 64


@pytest.mark.parametrize("name", ["all_normals.pklz", "nyuv2_snorm_all.pkl"])
def test_pickles_are_refused_unopened_and_the_advice_works(rooms, tmp_path, name):
    pytest.importorskip("h5py")
    frames = write_labelled(rooms, tmp_path, normals="none", tested=(0,))
    vectors = np.stack([sized(frame.normals, 480, 640) for frame in frames])
    touched = tmp_path / "touched"

    class Harmful:
        def __reduce__(self):
            return (open, (str(touched), "w"))

    if name.endswith("z"):
        content, opened = {"all_normals": vectors}, gzip.open
    else:
        content, opened = {"snorms": vectors.transpose(0, 3, 1, 2)}, open
    with opened(tmp_path / name, "wb") as stream:
        pickle.dump(Harmful(), stream)
    with pytest.raises(InputError, match=rf"{name} is a pickle, which is not opened because") as error:
        test(tmp_path)
    assert not touched.exists()
    with opened(tmp_path / name, "wb") as stream:
        pickle.dump(content, stream)
    program = str(error.value).partition('python -c "')[2].rstrip('".')
    exec(program, {})  # noqa: S102
    np.testing.assert_allclose(test(tmp_path)[0].normals, vectors[0], atol=1e-5)


def test_an_array_of_objects_is_refused_unopened(rooms, tmp_path):
    pytest.importorskip("h5py")
    write_labelled(rooms, tmp_path, normals="none")
    np.save(tmp_path / "all_normals.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"all_normals.npy cannot be read"):
        test(tmp_path)[0]
    np.save(tmp_path / "all_normals.npy", np.zeros((4, 3, 48, 64), np.float32))
    with pytest.raises(InputError, match=r"float32 \(4, 3, 48, 64\); expected floats, 1449 x 480 x 640 x 3"):
        test(tmp_path)[0]
    np.save(tmp_path / "all_normals.npy", np.zeros((2, 480, 640, 3), np.float16))
    with pytest.raises(InputError, match="has 2 images, but number 3 is wanted"):
        test(tmp_path)[1]


def test_without_h5py_it_is_said_what_to_install(rooms, tmp_path, monkeypatch):
    pytest.importorskip("h5py")
    write_labelled(rooms, tmp_path)
    dataset = test(tmp_path)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(InputError, match=r"is a MATLAB 7.3 file: install h5py \(pip install h5py\)"):
        dataset[0]


def test_what_is_missing_or_damaged_is_named(rooms, tmp_path):
    pytest.importorskip("h5py")
    write_labelled(rooms, tmp_path)
    (tmp_path / "test_SN40.json").write_text('[{"img": "0009_a.jpg"}]')
    with pytest.raises(InputError, match="has no image 9, which the list names"):
        test(tmp_path)[0]
    (tmp_path / "test_SN40.json").write_text('[{"picture": 1}]')
    with pytest.raises(InputError, match=r"test_SN40.json cannot be read"):
        test(tmp_path)
    (tmp_path / "test_SN40.json").write_text('[{"img": "0000_a.jpg"}]')  # would be the last image
    with pytest.raises(InputError, match=r"test_SN40.json names no images, or one below 1"):
        test(tmp_path)
    (tmp_path / "test_SN40.json").unlink()
    (tmp_path / "splits.mat").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"splits.mat cannot be decoded"):
        test(tmp_path)
    (tmp_path / "splits.mat").unlink()
    dataset = test(tmp_path)
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(dataset.files(0)[1])
    with pytest.raises(InputError, match="00002.png has 64x48 pixels but its image"):
        dataset[0]
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    with pytest.raises(InputError, match=r"nyu_depth_v2_labeled.mat cannot be read"):
        dataset[1]
    (tmp_path / "nyu_depth_v2_labeled.mat").unlink()
    with pytest.raises(InputError, match=r"nyu_depth_v2_labeled.mat is missing: download it"):
        test(tmp_path)
    (tmp_path / "nyu_normals_gt" / "test").rename(tmp_path / "other")
    with pytest.raises(InputError, match=r"nyu_normals_gt/test is missing: unpack nyu_normals_gt.zip"):
        test(tmp_path)
