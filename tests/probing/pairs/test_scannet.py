import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings, ScanNetPairs, check_pairs, open_pairs
from tests.probing.pairs.trees import write_scannet


@pytest.fixture(scope="module")
def source(rooms):
    return RoomPairs(rooms, RoomPairsSettings(pairs=3, split="all"))


@pytest.fixture
def tree(source, tmp_path):
    return write_scannet(tmp_path, source)


def test_pairs_come_back_as_they_were_written(tree, source):
    pairs = open_pairs("scannet-1500", tree)
    assert isinstance(pairs, ScanNetPairs) and len(pairs) == len(source) == 3
    for pair, true in zip(pairs, source):
        np.testing.assert_allclose(pair.relative_pose, true.relative_pose, atol=1e-9)
        for end in (0, 1):
            np.testing.assert_allclose(pair.depths[end], true.depths[end], atol=1e-3)
            # stored for 640 x 480, given back for the depth map's 84 x 56
            np.testing.assert_allclose(pair.intrinsics[end], true.intrinsics[end], rtol=1e-9)
            assert pair.images[end].dtype == np.uint8
            assert np.abs(pair.images[end].astype(int) - true.images[end].astype(int)).mean() < 3
    _, first, second = source.chosen[0]
    assert pairs[0].scene.startswith("scene000") and pairs[0].name == f"{pairs[0].scene}/{first}-{second}"


def test_a_point_of_the_first_image_is_where_the_pose_says_in_the_second(tree):
    # independently: lift with the first camera's own pose file and project with the second's
    pairs = ScanNetPairs(tree)
    pair, (_, _, first, second) = pairs[0], pairs.frames[0].tolist()
    poses = [np.loadtxt(tree / pair.scene / "pose" / f"{frame}.txt") for frame in (first, second)]
    point = np.array([0.3, -0.2, 2.0, 1.0])
    world = poses[0] @ point
    np.testing.assert_allclose(pair.relative_pose @ point, np.linalg.inv(poses[1]) @ world, atol=1e-9)


def test_slices_and_spreads_are_read_when_they_are_asked_for(tree):
    pairs = ScanNetPairs(tree)
    for folder in tree.glob("scene*"):
        for file in folder.glob("color/*"):
            file.unlink()
    last, spread = pairs[1:], pairs.spread(2)
    assert len(last) == 2 and len(spread) == 2 and len(pairs.spread(10)) == 3
    with pytest.raises(InputError, match="does not exist"):
        last[0]
    with pytest.raises(IndexError):
        pairs[3]


def test_a_grey_image_becomes_rgb(tree):
    pairs = ScanNetPairs(tree)
    file = pairs.files("color", ".jpg")[0]
    Image.open(file).convert("L").save(file)
    image = pairs[0].images[0]
    assert image.shape == (56, 84, 3) and (image[..., 0] == image[..., 2]).all()


def test_check_finds_nothing_in_a_whole_tree(tree):
    assert check_pairs("scannet-1500", tree) == []


def test_check_names_each_kind_of_missing_file_once_with_path_and_remedy(tree):
    pairs = ScanNetPairs(tree)
    gone = [pairs.files("color", ".jpg")[0], *pairs.files("depth", ".png")[:2]]
    for file in gone:
        file.unlink()
    found = check_pairs("scannet-1500", tree)
    assert len(found) == 2
    assert "colour images are missing" in found[0] and str(gone[0]) in found[0] and "unpack LoFTR" in found[0]
    assert found[1].startswith("2 of ") and str(gone[1]) in found[1]
    (tree / "intrinsics.npz").unlink()
    assert check_pairs("scannet-1500", tree)[0].startswith(f"{tree / 'intrinsics.npz'} does not exist")
    assert "is not a folder" in check_pairs("scannet-1500", tree / "nowhere")[0]


def test_a_scene_without_intrinsics_is_found(tree):
    np.savez(tree / "intrinsics.npz", scene9999_00=np.eye(3))
    assert "lacks" in check_pairs("scannet-1500", tree)[0]
    with pytest.raises(InputError, match="intrinsics.npz has no scene000"):
        ScanNetPairs(tree)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": np.zeros((3, 5), int)}, r"int64 of shape \(3, 5\)"),
        ({"name": np.zeros((3, 4))}, "float64"),
        ({"name": np.zeros((0, 4), int)}, r"shape \(0, 4\)"),
        ({"name": np.array([[{}] * 4])}, "cannot be read .*allow_pickle"),
        ({"score": np.zeros(3)}, "has no `name`, only score"),
    ],
)
def test_a_list_that_is_something_else_is_refused(tree, content, message):
    np.savez(tree / "test.npz", **content)
    with pytest.raises(InputError, match=message):
        ScanNetPairs(tree)
    assert len(check_pairs("scannet-1500", tree)) == 1


def test_damaged_files_are_named(tree):
    pairs = ScanNetPairs(tree)
    pose = pairs.files("pose", ".txt")[0]
    pose.write_text("-inf " * 4 + "\n" + "0 0 0 1\n" * 3)
    with pytest.raises(InputError, match=f"Pose {pose} is not a 4 x 4 matrix of a rotation"):
        pairs[0]
    pose.write_text("a b\n")
    with pytest.raises(InputError, match="cannot be read"):
        pairs[0]
    depth = pairs.files("depth", ".png")[2]
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(depth)
    with pytest.raises(InputError, match=r"one channel of 16 bits"):
        pairs[1]
    depth.write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be decoded"):
        pairs[1]
    (tree / "test.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="test.npz cannot be read"):
        ScanNetPairs(tree)


def test_an_unknown_name_lists_those_there_are(tmp_path):
    with pytest.raises(InputError, match="scannet-1500, superglue, rooms, navi"):
        check_pairs("scannet", tmp_path)
