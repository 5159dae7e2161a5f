import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.nearest import NearestDepthSettings, make_bank, nearest_depth, token_depths


def directions(*degrees):
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_median_and_mean_of_the_nearest_by_hand():
    tokens, depths = directions(0.0, 10.0, 20.0, 90.0, 180.0), torch.tensor([1.0, 2.0, 6.0, 8.0, 9.0])
    query = directions(8.0, 100.0)
    median, mean = (
        nearest_depth(make_bank(tokens, depths, NearestDepthSettings(3, average)), 5 * query)
        for average in ("median", "mean")
    )
    # near 8 degrees: 10, 0, 20. Near 100: 90, then 180 and 20, both 80 away, and 10 further: 8, 9, 6
    assert median.tolist() == [2.0, 8.0] and mean.tolist() == pytest.approx([3.0, 23 / 3])
    # of two the lower one
    assert nearest_depth(make_bank(tokens, depths, NearestDepthSettings(2)), query[:1]).tolist() == [1.0]
    # of more than there are, all: the median of 1 2 6 8 9
    assert nearest_depth(make_bank(tokens, depths, NearestDepthSettings(99)), query).tolist() == [6.0, 6.0]


def test_tokens_without_depth_are_not_in_the_bank():
    bank = make_bank(directions(0.0, 1.0, 2.0), torch.tensor([0.0, 3.0, 0.0]))
    assert len(bank) == 1 and nearest_depth(bank, directions(0.0)).tolist() == [3.0]
    with pytest.raises(InputError, match="No token of the training images has a depth"):
        make_bank(directions(0.0), torch.zeros(1))


def test_of_many_tokens_some_are_kept_by_the_seed():
    tokens, depths = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)), torch.arange(1.0, 501.0)
    one, two, other = (make_bank(tokens, depths, NearestDepthSettings(most_tokens=50, seed=s)) for s in (0, 0, 1))
    assert len(one) == 50 and torch.equal(one.depths, two.depths) and not torch.equal(one.depths, other.depths)
    assert (one.depths.diff() > 0).all() and torch.equal(one.tokens, tokens[(one.depths - 1).long()])
    assert one.depths.mean() == pytest.approx(250, abs=75)
    assert len(make_bank(tokens, depths, NearestDepthSettings(most_tokens=None))) == 500
    for wrong in (NearestDepthSettings(0), NearestDepthSettings(most_tokens=0)):
        with pytest.raises(InputError, match="both must be at least 1"):
            make_bank(tokens, depths, wrong)


def test_depth_of_a_token_is_the_median_of_its_valid_pixels():
    depth = torch.tensor([[1.0, 3.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0], [1.0, 2.0, 7.0, 7.0], [3.0, 4.0, 7.0, 9.0]])
    # 1 3 5; none; 1 2 3 4: the lower of 2 and 3; 7 7 7 9
    assert token_depths(depth, (2, 2)).tolist() == [[3.0, 0.0], [2.0, 7.0]]


def slow_token_depths(depth, grid):
    """Pixel after pixel: into the cell that its centre lies in."""
    cells = {}
    for row in range(depth.shape[0]):
        for column in range(depth.shape[1]):
            place = int((row + 0.5) * grid[0] / depth.shape[0]), int((column + 0.5) * grid[1] / depth.shape[1])
            cells.setdefault(place, []).append(float(depth[row, column]))
    found = torch.zeros(grid)
    for place, values in cells.items():
        known = sorted(value for value in values if value > 0)
        found[place] = known[(len(known) - 1) // 2] if known else 0.0
    return found


@pytest.mark.parametrize(
    ("shape", "grid"), [((12, 20), (3, 4)), ((13, 17), (4, 5)), ((7, 7), (7, 7)), ((29, 31), (2, 9))]
)
def test_token_depths_agree_with_one_pixel_after_the_other(shape, grid):
    generator = torch.Generator().manual_seed(0)
    depth = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3)
    torch.testing.assert_close(token_depths(depth, grid), slow_token_depths(depth, grid))


def test_a_depth_map_smaller_than_the_grid_is_refused():
    with pytest.raises(InputError, match="3x4 pixels is too small for 5x4 tokens"):
        token_depths(torch.ones(4, 3), (4, 5))


def test_tokens_that_know_depth_give_depth_and_random_ones_the_middle_of_it(rooms):
    from snd_nerfstudio.probing.pairs.rooms import read_room

    room = read_room(rooms / "scenes/room_0000")
    maps = [token_depths(torch.from_numpy(room.depth(index)), (14, 21)).flatten() for index in (0, 20, 40, 55)]
    train, held_out = torch.cat(maps[:3]), maps[3]
    generator = torch.Generator().manual_seed(0)

    def error(encode):
        bank = make_bank(encode(train), train, NearestDepthSettings(5))
        return float(((nearest_depth(bank, encode(held_out)) - held_out).abs() / held_out).mean())

    # features whose direction turns with depth
    knowing = error(lambda depth: torch.stack([(0.3 * depth).cos(), (0.3 * depth).sin()], dim=1))
    guessing = error(lambda depth: torch.randn(len(depth), 8, generator=generator))
    assert knowing < 0.03 and guessing > 0.15
