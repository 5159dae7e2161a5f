import numpy as np

from snd_nerfstudio.scenes.masks.label_map import label_map


def masks_of(*drawings):
    """Masks from drawings, rows side by side; # is inside."""
    return np.array([[[pixel == "#" for pixel in row] for row in drawing.split()] for drawing in drawings])


def test_parts_lie_on_the_whole_and_the_rest_is_a_region_of_its_own():
    masks = masks_of(
        "...... .##... ...... ......",
        "...... ####.. ####.. ......",
    )
    # the whole (8 pixels) is number 1, its part number 2, what no mask covers number 3
    expected = [[3, 3, 3, 3, 3, 3], [1, 2, 2, 1, 3, 3], [1, 1, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3]]
    assert label_map(masks, np.array([0.9, 0.95]), 1).tolist() == expected
    assert label_map(masks[::-1], np.array([0.95, 0.9]), 1).tolist() == expected


def test_of_equally_large_masks_the_better_lies_on_top():
    masks = masks_of("###.", ".###")
    assert label_map(masks, np.array([0.9, 0.8]), 1).tolist() == [[2, 2, 2, 1]]  # the second was painted first: 1
    assert label_map(masks, np.array([0.8, 0.9]), 1).tolist() == [[1, 2, 2, 2]]


def test_each_piece_of_the_rest_is_a_region():
    masks = masks_of("..##.. ..##.. ..##..")
    assert label_map(masks, np.array([0.9]), 1).tolist() == [[2, 2, 1, 1, 3, 3]] * 3


def test_what_is_too_small_goes_to_the_nearest_region():
    masks = masks_of(
        "###... ###... ###...",
        "...##. ...... ......",  # two pixels: their neighbours are the first mask and the rest
    )
    found = label_map(masks, np.array([0.9, 0.9]), 3)
    assert found.tolist() == [[1, 1, 1, 2, 2, 2]] * 3
    hole = masks_of("##### ##.## #####")
    assert label_map(hole, np.array([0.9]), 2).tolist() == [[1] * 5] * 3


def test_a_mask_that_is_hidden_by_smaller_ones_leaves_no_number_behind():
    masks = masks_of("####", "##..", "..##")
    assert label_map(masks, np.array([0.9, 0.8, 0.7]), 1).tolist() in ([[1, 1, 2, 2]], [[2, 2, 1, 1]])


def test_an_instance_in_two_parts_stays_one():
    masks = masks_of("##.##", "..#..")
    assert label_map(masks, np.array([0.9, 0.9]), 1).tolist() == [[1, 1, 2, 1, 1]]


def test_without_a_mask_the_whole_image_is_one_region():
    assert label_map(np.zeros((0, 3, 4), bool), np.zeros(0), 1).tolist() == [[1] * 4] * 3
    assert label_map(np.zeros((0, 3, 4), bool), np.zeros(0), 100).tolist() == [[1] * 4] * 3
