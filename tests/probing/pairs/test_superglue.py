import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings, SuperGluePairs, check_pairs, open_pairs
from snd_nerfstudio.probing.pairs.superglue import read_list
from tests.probing.pairs.trees import superglue_line, write_scannet, write_superglue

RELEASED = (
    "scene0711_00_frame-001680.jpg scene0711_00_frame-001995.jpg 0 0 1163.45     0.     653.626    0.    1164.79   "
    "481.6      0.       0.       1.    1163.45     0.     653.626    0.    1164.79   481.6      0.       0.       "
    "1.     0.78593 -0.35128  0.50884 -1.51061  0.39215  0.91944  0.02904 -0.05367 -0.47805  0.17672  0.86037  "
    "0.056    0.       0.       0.       1."
)
"""A line of SuperGlue's list of samples."""


@pytest.fixture(scope="module")
def source(rooms):
    return RoomPairs(rooms, RoomPairsSettings(pairs=3))


def test_pairs_come_back_as_they_were_written_with_depth_of_another_size(source, tmp_path):
    pairs = open_pairs("superglue", write_superglue(tmp_path, source))
    assert isinstance(pairs, SuperGluePairs) and len(pairs) == 3 and check_pairs("superglue", tmp_path) == []
    for pair, true in zip(pairs, source):
        np.testing.assert_allclose(pair.relative_pose, true.relative_pose, atol=1e-6)
        for end in (0, 1):
            assert pair.images[end].shape == (56, 84, 3) and pair.depths[end].shape == (28, 42)
            np.testing.assert_allclose(pair.depths[end], true.depths[end][::2, ::2], atol=1e-3)
            half = np.diag([0.5, 0.5, 1]) @ true.intrinsics[end]
            np.testing.assert_allclose(pair.intrinsics[end], half, rtol=1e-6)
    assert pairs[0].scene == "scene0002_00" and pairs[0].name.startswith("scans_test/scene0002_00/sens/frame-0000")


def test_a_line_of_the_released_list_is_understood(tmp_path):
    (tmp_path / "pairs.txt").write_text(RELEASED + "\n\n")
    (line,) = read_list(tmp_path / "pairs.txt")
    assert line.paths == ("scene0711_00_frame-001680.jpg", "scene0711_00_frame-001995.jpg")
    np.testing.assert_array_equal(line.intrinsics[1], [[1163.45, 0, 653.626], [0, 1164.79, 481.6], [0, 0, 1]])
    np.testing.assert_array_equal(line.relative_pose[:3, 3], [-1.51061, -0.05367, 0.056])


def test_the_released_list_works_with_the_images_that_loftr_packages(source, tmp_path):
    # its intrinsics are those of 1296 x 968 pixels; the packaged images and depth maps are smaller
    write_scannet(tmp_path, source)
    lines = []
    for pair, (_, first, second) in zip(source, source.chosen):
        matrices = [np.diag([1296 / 84, 968 / 56, 1]) @ matrix for matrix in pair.intrinsics]
        paths = [f"scene0002_00_frame-{view:06d}.jpg" for view in (first, second)]
        lines.append(superglue_line(paths, matrices, pair.relative_pose))
    (tmp_path / "pairs.txt").write_text("\n".join(lines))
    pairs = SuperGluePairs(tmp_path)
    assert check_pairs("superglue", tmp_path) == []
    for pair, true in zip(pairs, source):
        np.testing.assert_allclose(pair.intrinsics[0], true.intrinsics[0], rtol=1e-6)
        np.testing.assert_allclose(pair.depths[1], true.depths[1], atol=1e-3)


def test_intrinsics_of_another_image_are_refused(source, tmp_path):
    write_superglue(tmp_path, source)
    file = tmp_path / "scannet_test_pairs_with_gt.txt"
    lines = file.read_text().splitlines()
    fields = lines[1].split()
    fields[4 + 2] = "300"  # cx in an image 84 wide, and not near the middle of 1296 either
    file.write_text("\n".join([lines[0], " ".join(fields)]))
    pairs = SuperGluePairs(tmp_path)
    pairs[0]
    with pytest.raises(InputError, match=r"line 2: the principal point \(300, 28\) is not near the middle"):
        pairs[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.jpg b.jpg", "line 1 has 2 fields, not 38"),
        (RELEASED.replace(" 0 0 1163", " 1 0 1163"), "turns its images by 1 and 0 quarters"),
        (RELEASED.replace("0.78593", "x"), "something else than a number"),
        (RELEASED.replace("0.78593", "0.9"), "line 1: the pose is not a 4 x 4 matrix of a rotation"),
        (RELEASED.replace("1164.79", "-1"), "intrinsics that are not positive"),
        ("", "is empty"),
    ],
)
def test_a_line_that_is_something_else_is_refused_by_its_number(tmp_path, line, message):
    (tmp_path / "pairs.txt").write_text(line)
    with pytest.raises(InputError, match=message):
        SuperGluePairs(tmp_path)
    assert len(check_pairs("superglue", tmp_path)) == 1


def test_check_says_what_is_missing(source, tmp_path):
    assert "holds neither scannet_test_pairs_with_gt.txt nor pairs.txt" in check_pairs("superglue", tmp_path)[0]
    write_superglue(tmp_path, source)
    depth = next(tmp_path.rglob("*.depth.pgm"))
    depth.unlink()
    (found,) = check_pairs("superglue", tmp_path)
    assert "1 of" in found and "depth maps are missing" in found and str(depth) in found
