import numpy as np
import pytest
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.datasets.files import Entry, FileDataset, Request, Rules, kb_cropped

DEPTH = np.array([[1000, 2000, 3000], [4000, 0, 6000]], np.uint16)


def dataset(tmp_path, rules=Rules(), image=None, task="depth", **maps):
    Image.fromarray(np.zeros((2, 3, 3), np.uint8) if image is None else image).save(tmp_path / "image.png")
    for kind, array in maps.items():
        Image.fromarray(array).save(tmp_path / f"{kind}.png")
    entry = Entry("one", tmp_path / "image.png", **{kind: tmp_path / f"{kind}.png" for kind in maps})
    return FileDataset(Request("made", tmp_path, task, "train", "fixed"), [entry], rules)


def test_rules_become_what_tasks_ask_for(tmp_path):
    rules = Rules(min_depth=0.5, max_depth=7.0, eval_crop="garg", window=(1, 2, 3, 4), classes=("a", "b"))
    made = dataset(tmp_path, rules, depth=DEPTH)
    assert (made.min_depth, made.max_depth, made.eval_crop) == (0.5, 7.0, "garg")
    assert (made.window, made.classes) == ((1, 2, 3, 4), ("a", "b")) and len(made) == 1
    assert made.files(0) == [tmp_path / "image.png", tmp_path / "depth.png"]
    with pytest.raises(IndexError):
        made[1]


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no samples to train depth of made"):
        FileDataset(Request("made", tmp_path, "depth", "train", "fixed"), [], Rules())


def test_all_maps_are_decoded_and_belong_to_the_pixels_of_the_image(tmp_path):
    labels = np.array([[0, 1, 2], [2, 1, 255]], np.uint8)
    ids = np.array([[0, 700, 2], [3, 4, 5]], np.uint16)
    normals = np.full((2, 3, 3), (128, 128, 0), np.uint8)
    made = dataset(tmp_path, Rules(classes=("a", "b")), depth=DEPTH, labels=labels, instances=ids, normals=normals)
    sample = made[0]
    np.testing.assert_array_equal(sample.depth, np.float32([[1, 2, 3], [4, 0, 6]]))
    np.testing.assert_array_equal(sample.labels, [[255, 0, 1], [1, 0, 255]])
    np.testing.assert_array_equal(sample.instances, ids)
    np.testing.assert_allclose(sample.normals, np.broadcast_to([0, 0, -1], (2, 3, 3)), atol=0.01)


def test_depth_beyond_what_the_sensor_sees_has_another_unit(tmp_path):
    made = dataset(tmp_path, Rules(stored_max_depth=10.0), depth=DEPTH)
    assert made[0].depth.max() == 6
    made = dataset(tmp_path, Rules(stored_max_depth=10.0), depth=DEPTH * 10)
    with pytest.raises(InputError, match=r"depth.png reaches 60.0 m .*10,000.*export the depth again as millimetres"):
        made[0]


def test_a_map_of_another_size_is_refused(tmp_path):
    made = dataset(tmp_path, image=np.zeros((2, 4, 3), np.uint8), depth=DEPTH)
    with pytest.raises(InputError, match=r"depth.png has 3x2 pixels but its image image.png has 4x2"):
        made[0]


def test_images_are_brought_to_the_size_of_their_maps_where_rules_say_so(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[:2, :2] = [[[10, 0, 0], [20, 0, 0]], [[30, 0, 0], [40, 0, 0]]]
    sample = dataset(tmp_path, Rules(fit_image=True), image=image, depth=DEPTH)[0]
    assert sample.image.shape == (2, 3, 3) and sample.image[0, 0, 0] == 25  # (10 + 20 + 30 + 40) / 4
    made = dataset(tmp_path, Rules(fit_image=True), image=np.zeros((4, 7, 3), np.uint8), depth=DEPTH)
    with pytest.raises(InputError, match="7x4 pixels and its labels 3x2, which is another shape"):
        made[0]


def test_the_crop_of_kitti_keeps_the_lowest_rows_and_the_middle_columns(tmp_path):
    rows, columns = np.mgrid[:375, :1242]
    # 375 - 352 = 23 rows from above, (1242 - 1216) / 2 = 13 columns from the left
    cropped = kb_cropped(np.stack([rows, columns], axis=-1), tmp_path)
    assert cropped.shape == (352, 1216, 2)
    np.testing.assert_array_equal(cropped[[0, -1], [0, -1]], [[23, 13], [374, 1228]])
    np.testing.assert_array_equal(kb_cropped(cropped, tmp_path), cropped)
    with pytest.raises(InputError, match="1215x352 pixels, but KITTI is cropped to 1216x352"):
        kb_cropped(np.zeros((352, 1215)), tmp_path)
