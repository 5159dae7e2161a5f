import json

import numpy as np
import pytest
import torch
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.keypoints import (
    KeypointPair,
    SPair71k,
    check_spair,
    correct_keypoints,
    evaluate_keypoints,
    transfer,
)
from snd_nerfstudio.probing.matching import FeatureMap

PAIR = "000001-2008_000033-2009_003249:aeroplane"
OTHER = "000002-2007_000175-2010_001236:cat"


def annotation(name, points, box, viewpoint=0):
    pair, category = name.split(":")
    _, source, target = pair.split("-")
    return {
        "filename": name, "src_imname": f"{source}.jpg", "trg_imname": f"{target}.jpg", "category": category,
        "src_imsize": [60, 40, 3], "trg_imsize": [50, 30, 3], "src_kps": points[0], "trg_kps": points[1],
        "kps_ids": list(map(str, range(len(points[0])))), "src_bndbox": [1, 2, 40, 30], "trg_bndbox": box,
        "viewpoint_variation": viewpoint, "scale_variation": 0, "truncation": 0, "occlusion": 0, "mirror": 0,
    }  # fmt: skip


@pytest.fixture
def tree(tmp_path):
    for name, points, viewpoint in (
        (PAIR, ([[10, 12], [30, 5]], [[8, 9], [20, 4]]), 0),
        (OTHER, ([[3, 4]], [[5, 6]]), 2),
    ):
        pair, category = name.split(":")
        _, source, target = pair.split("-")
        folder = tmp_path / "JPEGImages" / category
        folder.mkdir(parents=True)
        for stem, size in ((source, (60, 40)), (target, (50, 30))):
            Image.new("RGB", size, (200, 100, 50)).save(folder / f"{stem}.jpg")
        file = tmp_path / "PairAnnotation/test" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(annotation(name, points, [5, 2, 45, 22], viewpoint)))
    layout = tmp_path / "Layout/large"
    layout.mkdir(parents=True)
    (layout / "test.txt").write_text(f"{PAIR}\n{OTHER}\n")
    return tmp_path


# ---------------------------------------------------------------------- the data set


def test_pairs_are_read_with_points_in_the_middle_of_pixels(tree):
    pairs = SPair71k(tree)
    assert len(pairs) == 2 and check_spair(tree) == []
    pair = pairs[0]
    assert pair.images[0].shape == (40, 60, 3) and pair.images[1].shape == (30, 50, 3)
    np.testing.assert_array_equal(pair.points[0], [[10.5, 12.5], [30.5, 5.5]])
    np.testing.assert_array_equal(pair.points[1], [[8.5, 9.5], [20.5, 4.5]])
    assert pair.boxes[1].tolist() == [5, 2, 45, 22] and (pair.category, pair.viewpoint) == ("aeroplane", 0)
    assert [pair.name for pair in pairs] == [PAIR, OTHER]


def test_categories_can_be_chosen_and_a_wrong_one_lists_those_there_are(tree):
    assert [pair.category for pair in SPair71k(tree, categories=["cat"])] == ["cat"]
    with pytest.raises(InputError, match="no pairs of dog: its categories are aeroplane, cat"):
        SPair71k(tree, categories=["dog"])


def test_what_is_missing_is_named(tree):
    image = tree / "JPEGImages/cat/2010_001236.jpg"
    image.unlink()
    (found,) = check_spair(tree)
    assert "1 of 4 images are missing" in found and str(image) in found and "download SPair-71k" in found
    assert "Layout/large/val.txt cannot be read" in check_spair(tree, "val")[0]
    with pytest.raises(InputError, match=f"Image {image} does not exist"):
        SPair71k(tree)[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trg_kps": [[1, 2]]}, "no keypoints in common"),
        ({"src_kps": [], "trg_kps": []}, "no keypoints in common"),
        ({"trg_bndbox": [5, 2, 5, 22]}, "an empty box"),
        ({"trg_bndbox": [5, 2]}, "cannot be read"),
        ({"src_kps": None}, "cannot be read"),
    ],
)
def test_an_annotation_that_is_something_else_is_named(tree, change, message):
    file = tree / "PairAnnotation/test" / f"{PAIR}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        SPair71k(tree)[0]


def test_a_layout_that_is_something_else_is_refused(tree):
    for content, message in (("", "is empty"), ("a-b:cat", "not of the form"), ("a-b-c", "not of the form")):
        (tree / "Layout/large/test.txt").write_text(content)
        with pytest.raises(InputError, match=message):
            SPair71k(tree)


# ---------------------------------------------------------------------- measuring


def test_keypoints_are_correct_within_a_tenth_of_the_longer_side_of_the_box():
    # the box is 40 x 20: 4 pixels, and exactly 4 counts
    truth = torch.zeros(4, 2)
    predicted = torch.tensor([[0.0, 4.0], [2.4, 3.2], [2.9, 2.9], [4.01, 0.0]])
    box = torch.tensor([5.0, 2.0, 45.0, 22.0])
    assert correct_keypoints(predicted, truth, box).tolist() == [True, True, False, False]
    assert correct_keypoints(predicted, truth, box, alpha=0.2).all()


def coordinates(image_size, padded_size, patch=2, scale=(1.0, 1.0), seed=0):
    """A feature that is the same for the same share of the image: random waves, sampled at the tokens' centres."""
    rows, columns = padded_size[0] // patch, padded_size[1] // patch
    before = [(padded - image) // 2 for image, padded in zip(image_size, padded_size)]
    y = ((torch.arange(rows) + 0.5) * patch - before[0]) / image_size[0] * scale[1]
    x = ((torch.arange(columns) + 0.5) * patch - before[1]) / image_size[1] * scale[0]
    waves = torch.randn(32, 2, generator=torch.Generator().manual_seed(seed)) * 12
    phase = waves[:, :1, None] * x + waves[:, 1:, None] * y[:, None]
    return FeatureMap(torch.cat([phase.cos(), phase.sin()]), image_size, padded_size)


def test_points_are_carried_to_the_same_place_of_an_image_of_another_size_and_padding():
    # both images show the same, one 60 x 40 and one 50 x 30, both given to the backbone as 42 x 70 padded to 48 x 76
    maps = coordinates((42, 70), (48, 76)), coordinates((42, 70), (48, 76))
    points = torch.tensor([[10.0, 12.0], [30.0, 5.0], [55.0, 38.0]])
    found = transfer(maps, points, ((40, 60), (30, 50)))
    expected = points * torch.tensor([50 / 60, 30 / 40])
    # half a token is 1 / 70 and 1 / 42 of the image: 0.72 pixels each
    assert (found - expected).abs().max() < 0.75
    soft = transfer(maps, points, ((40, 60), (30, 50)), window=2, temperature=0.02)
    assert (soft - expected).norm(dim=1).mean() < (found - expected).norm(dim=1).mean()


def pair_of(points, category, viewpoint=0, box=(0, 0, 40, 40)):
    image = np.zeros((40, 40, 3), np.uint8)
    array = np.array(points, dtype=np.float64)
    return KeypointPair((image, image), (array, array), (np.array(box, float),) * 2, category, viewpoint, "name")


def test_shares_by_image_by_point_and_by_category():
    # the encoder mirrors every second image: points in the middle column stay, the others go to the other side
    fmap = coordinates((40, 40), (40, 40))
    mirrored = FeatureMap(fmap.values.flip(2), (40, 40), (40, 40))
    calls = []

    def encode(image):
        calls.append(image)
        return fmap if len(calls) % 2 else mirrored

    pairs = [
        pair_of([[20, 10], [5, 10], [20, 30], [35, 20]], "cat"),  # 2 of 4
        pair_of([[20, 20]], "cat", viewpoint=2),  # 1 of 1
        pair_of([[2, 10]], "dog", viewpoint=2),  # none
    ]
    found = evaluate_keypoints(pairs, encode)
    assert found.per_image == pytest.approx(50) and found.per_point == pytest.approx(50)  # (50 + 100 + 0) / 3; 3 of 6
    assert found.categories == {"cat": 75.0, "dog": 0.0} and found.category_mean == 37.5
    assert found.viewpoints == {"0": 50.0, "2": 50.0} and (found.pairs, found.points) == (3, 6)
    assert json.loads(json.dumps(found.plain()))["alpha"] == 0.1
    nothing = evaluate_keypoints([], encode)
    assert nothing.per_image is None and nothing.category_mean is None


def test_perfect_features_carry_all_keypoints_and_random_ones_hardly_any(tree):
    generator = torch.Generator().manual_seed(0)
    points = np.random.default_rng(0).uniform(2, 38, (400, 2))
    pairs = [pair_of(points, "cat", box=(0, 0, 40, 30))]
    fmap = coordinates((40, 40), (40, 40))
    assert evaluate_keypoints(pairs, lambda image: fmap).per_point == 100
    found = evaluate_keypoints(
        pairs, lambda image: FeatureMap(torch.randn(64, 20, 20, generator=generator), *[(40, 40)] * 2)
    )
    # by chance a token's centre within 4 pixels: an area of 16 pi of 1600, less at the border
    near = [np.hypot(*(points[:, None, None] - grid()).transpose(3, 0, 1, 2)) <= 4]
    chance = 100 * np.mean(near)
    assert 1 < chance < 3.2 and found.per_point == pytest.approx(chance, abs=2.5)


def grid():
    centres = np.arange(20) * 2 + 1.0
    return np.stack(np.meshgrid(centres, centres), axis=-1)
