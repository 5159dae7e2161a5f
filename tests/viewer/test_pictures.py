import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.viewer.clusters import palette_colour
from snd_nerfstudio.viewer.pictures import (
    BACKGROUND,
    GAP,
    NARROWEST,
    enlarge,
    heat,
    mark,
    overlay_masks,
    save_png,
    sheet,
    wrap,
)


def noise(height, width, seed=0):
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------- tokens


def test_tokens_become_flat_squares():
    colours = noise(3, 4)
    assert torch.equal(enlarge(colours, (42, 56)), colours.repeat_interleave(14, 0).repeat_interleave(14, 1))


def test_a_pixel_has_the_colour_of_the_token_that_its_centre_lies_in():
    colours = noise(3, 4)
    grown = enlarge(colours, (10, 7))
    for row in range(10):
        for column in range(7):
            assert torch.equal(grown[row, column], colours[int((row + 0.5) * 3 / 10), int((column + 0.5) * 4 / 7)])


# ---------------------------------------------------------------------- masks


MASK = torch.tensor(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 2, 2],
        [0, 1, 1, 1, 2, 2],
        [0, 1, 1, 1, 2, 2],
        [0, 0, 0, 0, 2, 2],
    ]
)


def test_regions_are_mixed_with_their_colours_and_unlabelled_pixels_stay():
    picture = noise(5, 6)
    shown = overlay_masks(picture, MASK, 0.25)
    assert torch.equal(shown[MASK == 0], picture[MASK == 0])
    blue, lime = palette_colour(torch.arange(2))
    torch.testing.assert_close(shown[2, 2], 0.75 * picture[2, 2] + 0.25 * blue)  # the only inner pixel of region 1
    torch.testing.assert_close(shown[2:, 5], 0.75 * picture[2:, 5] + 0.25 * lime)  # at the picture's own edge


def test_borders_are_one_pixel_wide_and_dark():
    picture = torch.full((5, 6, 3), 0.9)
    shown = overlay_masks(picture, MASK, 0.0)  # borders alone
    dark = (shown < 0.5).all(-1)
    assert dark.int().tolist() == [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1],  # its upper edge is that to the unlabelled
        [0, 1, 0, 1, 0, 0],  # left edge, and the one towards region 2, on one side only
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
    ]
    assert torch.equal(shown[~dark], picture[~dark])


def test_ids_below_zero_are_unlabelled_and_many_ids_have_colours():
    picture = noise(4, 50)
    assert torch.equal(overlay_masks(picture, torch.full((4, 50), -1), 1.0), picture)
    stripes = torch.arange(1, 51, dtype=torch.int32).repeat_interleave(2)[:50].repeat(4, 1)
    shown = overlay_masks(picture, stripes, 1.0)
    torch.testing.assert_close(shown[0, 0], palette_colour(torch.tensor(0)))
    torch.testing.assert_close(shown[0, 40], palette_colour(torch.tensor(0)))  # id 21 again


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1)])
def test_masks_of_a_single_row_or_column_can_be_drawn(shape):
    mask = torch.ones(shape, dtype=torch.int64)
    mask[-1, -1] = 2
    assert overlay_masks(noise(*shape), mask, 0.5).shape == (*shape, 3)


# ---------------------------------------------------------------------- heat


def test_heat_runs_from_the_darkest_to_the_brightest_colour_and_nothing_is_grey():
    low, middle, high, below, above, missing, endless = heat(
        torch.tensor([[2.0, 3.0, 4.0, -9.0, 9.0, float("nan"), float("inf")]]), 2.0, 4.0
    )[0]
    torch.testing.assert_close(low * 255, torch.tensor([68.0, 1.0, 84.0]), atol=0.6, rtol=0)  # 440154
    torch.testing.assert_close(high * 255, torch.tensor([253.0, 231.0, 37.0]), atol=0.6, rtol=0)  # fde725
    torch.testing.assert_close(middle * 255, torch.tensor([33.0, 145.0, 140.0]), atol=3.0, rtol=0)  # 21918c
    assert torch.equal(below, low) and torch.equal(above, high) and torch.equal(endless, high)
    assert missing.tolist() == [0.5, 0.5, 0.5]


def test_heat_of_an_empty_range_is_finite():
    assert torch.isfinite(heat(torch.tensor([[1.0, 2.0, 3.0]]), 2.0, 2.0)).all()
    assert heat(torch.zeros(2, 2, dtype=torch.float64), 0.0, 1.0).dtype == torch.float64


# ---------------------------------------------------------------------- sheets


def find(page, picture):
    """Upper left corner of a picture on a page; exactly one."""
    height, width = picture.shape[:2]
    windows = page.unfold(0, height, 1).unfold(1, width, 1)  # [rows, columns, 3, height, width]
    found = (windows == picture.permute(2, 0, 1)).flatten(2).all(-1).nonzero()
    assert len(found) == 1
    return tuple(found[0].tolist())


def test_pictures_stand_side_by_side_below_their_captions():
    first, second, third = noise(20, 120, 0), noise(20, 30, 1), noise(20, 100, 2)
    page = sheet({"first": first, "second": second, "third": third})
    (top, left), (top2, left2), (top3, left3) = (find(page, picture) for picture in (first, second, third))
    assert top == top2 == top3 and left == GAP
    assert left2 == left + 120 + GAP and left3 == left2 + NARROWEST + GAP
    assert page.shape == (top + 20 + GAP, left3 + 100 + GAP, 3)
    strip = page[:top]
    for start, end in ((left, left + 120), (left2, left2 + NARROWEST), (left3, left3 + 100)):
        assert (strip[:, start:end] > 0.5).any()  # each has a caption
    background = page.clone()
    for corner, picture in (((top, left), first), ((top, left2), second), ((top, left3), third)):
        background[corner[0] :, corner[1] : corner[1] + picture.shape[1]][:20] = BACKGROUND
    assert torch.equal(background[top:], torch.full_like(background[top:], BACKGROUND))


def test_columns_make_rows():
    pictures = {str(number): noise(16, 100, number) for number in range(5)}
    page = sheet(pictures, columns=2)
    corners = [find(page, picture) for picture in pictures.values()]
    assert [column for _, column in corners] == [GAP, 2 * GAP + 100] * 2 + [GAP]
    rows = [row for row, _ in corners]
    assert rows[0] == rows[1] < rows[2] == rows[3] < rows[4]
    assert page.shape[1] == 3 * GAP + 200
    assert torch.equal(sheet(pictures, columns=9), sheet(pictures))


def test_all_pictures_are_scaled_to_one_height_with_flat_pixels():
    small, large = noise(4, 50), noise(8, 60, 1)
    page = sheet({"small": small, "large": large}, height=8)
    find(page, small.repeat_interleave(2, 0).repeat_interleave(2, 1))
    find(page, large)
    assert torch.equal(page, sheet({"small": small, "large": large}))  # the highest one's height is the default


def test_smaller_pictures_are_means_and_not_samples():
    checkers = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    page = sheet({"": checkers[..., None].repeat(1, 1, 3).float()}, height=16)
    shown = page[-GAP - 16 : -GAP, GAP : GAP + 16]
    assert ((shown - 0.5).abs() < 0.1).all()


def test_a_caption_changes_its_own_strip_and_nothing_else():
    picture, other = noise(16, 100), noise(16, 100, 1)
    with_a, with_b = (sheet({name: picture, "same": other}) for name in ("a", "b"))
    changed = (with_a != with_b).any(-1).nonzero()
    assert len(changed) > 5
    assert changed[:, 0].max() < find(with_a, picture)[0] and changed[:, 1].max() < GAP + 100
    plain = sheet({"": picture, "same": other})
    corner = plain[: find(plain, picture)[0], : GAP + 100]
    assert torch.equal(corner, torch.full_like(corner, BACKGROUND))


def test_a_title_stands_above_everything():
    pictures = {"a": noise(16, 200)}
    plain, titled = sheet(pictures), sheet(pictures, title="A title")
    more = len(titled) - len(plain)
    assert more > 10 and torch.equal(titled[more:], plain) and (titled[:more] > 0.5).any()
    assert not torch.equal(sheet(pictures, title="A little"), titled)


def test_a_long_caption_is_wrapped_and_every_strip_of_its_row_grows():
    picture, other = noise(16, 120), noise(16, 120, 1)
    short, long = sheet({"word": picture, "b": other}), sheet({"word " * 8: picture, "b": other})
    assert find(long, picture)[0] > find(short, picture)[0] and find(long, picture)[0] == find(long, other)[0]
    endless = sheet({"word " * 500: picture, "b": other})
    assert find(endless, picture)[0] < 4 * find(short, picture)[0]
    strip = endless[: find(endless, picture)[0]]
    assert (strip[:, GAP + 120 : 2 * GAP + 120] == BACKGROUND).all()  # it does not run into its neighbour's


@pytest.mark.parametrize(
    ("pictures", "columns", "height"), [({}, None, None), ({"a": noise(2, 2)}, 0, None), ({"a": noise(2, 2)}, 1, 0)]
)
def test_a_sheet_of_nothing_is_refused(pictures, columns, height):
    with pytest.raises(ValueError, match="there must be some"):
        sheet(pictures, columns, height)


# ---------------------------------------------------------------------- wrapping


FONT = ImageFont.load_default(14)


@pytest.mark.parametrize(
    "text", ["a few short words", "onewordthatismuchtoolongforasingleline", "a mix_of_both_kinds_of words"]
)
def test_no_line_is_wider_than_there_is_room_and_no_letter_is_lost(text):
    lines = wrap(text, 70, FONT, most_lines=20)
    assert len(lines) > 1 and all(FONT.getlength(line) <= 70 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_words_stay_whole_where_they_fit():
    width = int(FONT.getlength("three short words")) + 1
    assert wrap("three short\n words  and more", width, FONT) == ["three short words", "and more"]
    assert wrap("", width, FONT) == [""]


def test_what_does_not_fit_ends_in_an_ellipsis():
    lines = wrap("one two three four five six seven", 70, FONT, most_lines=2)
    assert len(lines) == 2 and lines[0].startswith("one") and lines[1].endswith("…")
    assert all(FONT.getlength(line) <= 70 for line in lines)
    assert wrap("one two", 70, FONT, most_lines=2)[-1][-1] != "…"


# ---------------------------------------------------------------------- marks


def changed_box(before, after):
    """First row, last row, first column, last column of what differs."""
    rows, columns = ((before != after).any(-1)).nonzero().T
    return rows.min().item(), rows.max().item(), columns.min().item(), columns.max().item()


@pytest.mark.parametrize("ground", [0.0, 0.5, 1.0])
def test_a_cross_lies_on_its_point_and_is_seen_on_any_ground(ground):
    picture = torch.full((60, 80, 3), ground)
    marked = mark(picture, [(30.5, 20.5)], [""])
    top, bottom, left, right = changed_box(picture, marked)
    assert (top + bottom) / 2 == pytest.approx(20, abs=0.5) and (left + right) / 2 == pytest.approx(30, abs=0.5)
    assert torch.equal(marked[20, 30], torch.ones(3)) and bottom - top >= 6
    assert (marked == 0).any() and (marked == 1).any()
    assert (picture == ground).all()  # the given one is left as it is


def test_a_text_stands_beside_its_point():
    picture = torch.full((100, 160, 3), 0.5)
    cross, labelled = (mark(picture, [(40.0, 30.0)], [text]) for text in ("", "door"))
    top, _, left, right = changed_box(cross, labelled)
    assert top > 30 and 40 < left < 60 and right < 120
    assert not torch.equal(mark(picture, [(40.0, 30.0)], ["roof"]), labelled)
    text = labelled[30:, 44:]
    assert (text == 0).any() and (text > 0.95).any()  # white with a rim


@pytest.mark.parametrize(
    ("x", "y"), [(0.0, 0.0), (159.9, 0.0), (0.0, 99.9), (159.9, 99.9), (159.9, 50.0), (80.0, 99.9)]
)
def test_at_a_border_the_text_is_still_whole(x, y):
    picture, wide = torch.full((100, 160, 3), 0.5), torch.full((100, 480, 3), 0.5)
    cross, labelled = (mark(picture, [(x, y)], [text]) for text in ("", "a label"))
    middle = [mark(wide, [(240.0, 50.0)], [text]) for text in ("", "a label")]
    whole = (middle[0] != middle[1]).any(-1).sum()
    assert (cross != labelled).any(-1).sum() == whole


def test_a_text_that_is_wider_than_the_picture_is_shortened():
    picture = torch.full((40, 60, 3), 0.5)
    long = mark(picture, [(30.0, 10.0)], ["a label that is much too long"])
    assert torch.equal(long, mark(picture, [(30.0, 10.0)], ["a label that is much too long for it by far"]))
    assert (long[:, [0, -1]] <= 0.5).all()  # at most the black rim


def test_points_outside_are_left_out():
    picture = noise(30, 40)
    outside = [(-1.0, 5.0), (40.0, 5.0), (5.0, 30.0), (float("nan"), 5.0), (5.0, float("inf"))]
    assert torch.equal(mark(picture, outside, ["a"] * 5), picture)
    assert torch.equal(mark(picture, [], []), picture)


def test_points_and_labels_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        mark(noise(30, 40), [(5.0, 5.0)], [])


# ---------------------------------------------------------------------- files


def test_a_picture_is_read_back_as_it_was_written(tmp_path):
    pixels = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "new" / "folder" / "picture.png"
    save_png(pixels / 255, file)
    assert np.array_equal(np.asarray(Image.open(file)), pixels.numpy())
    assert [path.name for path in file.parent.iterdir()] == ["picture.png"]


def test_values_that_are_no_colours_are_cut_off(tmp_path):
    values = torch.tensor([[[-1.0, 0.5, 7.0], [float("nan"), float("inf"), float("-inf")]]])
    save_png(values.requires_grad_(), tmp_path / "picture.png")
    assert np.asarray(Image.open(tmp_path / "picture.png")).tolist() == [[[0, 128, 255], [0, 0, 0]]]


def test_a_write_that_fails_leaves_the_older_picture_and_nothing_half_written(tmp_path, monkeypatch):
    file = tmp_path / "picture.png"
    save_png(noise(4, 4), file)
    before = file.read_bytes()

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="picture.png cannot be written .No space left"):
        save_png(noise(4, 4, 1), file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/picture.png cannot be written"):
        save_png(noise(2, 2), tmp_path / "file" / "picture.png")
