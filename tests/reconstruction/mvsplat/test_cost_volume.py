import math

import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.reconstruction.mvsplat import MVSplatSettings, cost_volume
from snd_nerfstudio.reconstruction.mvsplat.cost_volume import correlations, inverse_depth_candidates, sampling_grid
from snd_nerfstudio.reconstruction.mvsplat.depth import DepthPredictor, enlarge
from snd_nerfstudio.reconstruction.mvsplat.features import attention_bounds, windowed_attention
from snd_nerfstudio.splatting.gaussians import rotation_matrices
from tests.reconstruction.mvsplat.slow_twins import bilinear, rolled_attention

HEIGHT, WIDTH = 5, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def scene(seed=0):
    """Two pairs of cameras with intrinsics of their own, the second pair looking past each other."""
    reference = torch.tensor([[[30.0, 0, 15], [0, 26.0, 9], [0, 0, 1]], [[22.0, 0, 12], [0, 25.0, 11], [0, 0, 1]]])
    source = torch.tensor([[[26.0, 0, 13], [0, 31.0, 12], [0, 0, 1]], [[33.0, 0, 16], [0, 24.0, 8], [0, 0, 1]]])
    axis = torch.tensor([[1.0, 0.05, -0.1, 0.02], [0.1, 0.1, 1.0, -0.1]])  # the second is almost half a turn
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[:, :3, :3] = rotation_matrices(axis)
    poses[:, :3, 3] = torch.tensor([[0.3, -0.1, 0.05], [0.2, 0.0, -1.0]])
    features = torch.randn(2, 2, 6, HEIGHT, WIDTH, generator=generator(seed))
    inverse_depths = inverse_depth_candidates(torch.tensor([0.5, 0.4]), torch.tensor([20.0, 5.0]), 9)
    return inverse_depths, reference, source, poses, features


def naive(inverse_depths, reference, source, poses, features, geometry):
    """One candidate, one feature, one neighbour at a time, in float64."""
    offset = 0.5 if geometry == "exact" else 0.0
    views, first, second = features.shape[1], features[0].double(), features[1].double()
    out = torch.zeros(views, inverse_depths.shape[1], HEIGHT, WIDTH, dtype=torch.float64)
    for view in range(views):
        into = (reference if geometry == "official" else source)[view].double()
        back = torch.linalg.inv(reference[view].double())
        for candidate, inverse in enumerate(inverse_depths[view].double()):
            for row in range(HEIGHT):
                for column in range(WIDTH):
                    pixel = torch.tensor([4 * column + offset, 4 * row + offset, 1], dtype=torch.float64)
                    point = poses[view, :3, :3].double() @ (back @ pixel / inverse) + poses[view, :3, 3].double()
                    if point[2] <= 0:
                        continue
                    x, y, w = (into @ point).tolist()
                    warped = bilinear(second[view], (x / w - offset) / 4, (y / w - offset) / 4)
                    out[view, candidate, row, column] = first[view, :, row, column] @ warped
    return out / math.sqrt(features.shape[2])


@pytest.mark.parametrize("geometry", ["official", "exact"])
def test_correlations_are_those_of_one_feature_and_one_depth_after_the_other(geometry):
    inverse_depths, reference, source, poses, features = scene()
    grid = sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), geometry)
    ours = correlations(features[0], features[1], grid)
    expected = naive(inverse_depths, reference, source, poses, features, geometry)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2e-4)
    assert 0.3 < (expected != 0).float().mean() < 0.9  # both kinds are there


def test_the_two_geometries_differ():
    inverse_depths, reference, source, poses, features = scene()
    ours = [
        correlations(*features, sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), geometry))
        for geometry in ("official", "exact")
    ]
    assert (ours[0] - ours[1]).abs().mean() > 0.1


@pytest.mark.parametrize("geometry", ["official", "exact"])
def test_what_lies_behind_the_other_camera_agrees_with_nothing(geometry):
    inverse_depths, reference, source, poses, features = scene()
    # nothing but depth: the other camera stands 4 in front of this one and looks the same way
    ahead = torch.eye(4).repeat(2, 1, 1)
    ahead[:, 2, 3] = -4
    grid = sampling_grid(inverse_depths, reference, source, ahead, (HEIGHT, WIDTH), geometry)
    ours = correlations(*features, grid)
    behind = inverse_depths > 1 / 4
    assert behind.any() and (~behind).any()
    assert torch.isfinite(grid).all()
    assert (ours[behind] == 0).all()
    assert (ours[~behind] != 0).any()


def test_the_same_camera_sees_every_feature_where_it_is():
    inverse_depths, reference, _, _, features = scene()
    for geometry in ("official", "exact"):
        still = torch.eye(4).repeat(2, 1, 1)
        grid = sampling_grid(inverse_depths, reference, reference, still, (HEIGHT, WIDTH), geometry)
        ours = correlations(features[0], features[0], grid)
        expected = features[0].square().sum(dim=1) / math.sqrt(6)
        torch.testing.assert_close(ours, expected[:, None].expand_as(ours), rtol=0, atol=1e-4)


def test_chunks_of_depths_give_the_same_as_all_at_once(monkeypatch):
    inverse_depths, reference, source, poses, features = scene()
    grid = sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), "exact")
    whole = correlations(*features, grid)
    for depths in (1, 2, 4, 8):  # nine depths: the last chunk is a smaller one
        monkeypatch.setattr(cost_volume, "CHUNK_BYTES", depths * features[0].numel() * 4)
        torch.testing.assert_close(correlations(*features, grid), whole, rtol=0, atol=1e-6)


def test_chunks_of_depths_have_the_same_gradients_as_all_at_once(monkeypatch):
    inverse_depths, reference, source, poses, features = scene()
    grid = sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), "exact")
    weights = torch.randn(grid.shape[:-1], generator=generator(1))
    gradients = []
    for size in (2**30, 1):
        monkeypatch.setattr(cost_volume, "CHUNK_BYTES", size)
        maps = [f.clone().requires_grad_() for f in features]
        gradients.append(torch.autograd.grad((correlations(*maps, grid) * weights).sum(), maps))
    for ours, expected in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
        assert expected.abs().max() > 0.1


def test_gradients_of_correlations_are_those_of_finite_differences(monkeypatch):
    inverse_depths, reference, source, poses, features = scene()
    grid = sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), "exact")[:, :3].double()
    monkeypatch.setattr(cost_volume, "CHUNK_BYTES", 1)
    maps = [f[:, :2].double().clone().requires_grad_() for f in features]
    torch.autograd.gradcheck(lambda a, b: correlations(a, b, grid), maps, fast_mode=True)


def test_candidates_are_evenly_spaced_in_inverse_depth_from_the_farthest():
    candidates = inverse_depth_candidates(torch.tensor([1.0, 0.5]), torch.tensor([4.0, 1.0]), 4)
    torch.testing.assert_close(candidates, torch.tensor([[0.25, 0.5, 0.75, 1.0], [1.0, 4 / 3, 5 / 3, 2.0]]))


@pytest.mark.parametrize("size", [(4, 4), (6, 10), (10, 14), (18, 22), (8, 12), (14, 4)])
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_are_those_of_rolled_and_masked_maps(size, shifted):
    query, key, value = torch.randn(3, 2, *size, 8, generator=generator())
    expected = rolled_attention(query, key, value, shifted)
    torch.testing.assert_close(windowed_attention(query, key, value, shifted), expected, rtol=0, atol=2e-6)
    learned = query.clone().requires_grad_()  # another way is taken where gradients are needed
    torch.testing.assert_close(windowed_attention(learned, key, value, shifted), expected, rtol=0, atol=2e-6)
    if shifted:
        nothing_crosses = rolled_attention(query, key, value, shifted, blocked=-torch.inf)
        torch.testing.assert_close(nothing_crosses, expected, rtol=0, atol=2e-6)


def test_windows_have_the_gradients_of_the_slow_twin():
    maps = torch.randn(3, 1, 10, 14, 4, generator=generator(), dtype=torch.float64)
    weights = torch.randn(1, 10, 14, 4, generator=generator(1), dtype=torch.float64)
    for shifted in (False, True):
        gradients = []
        for attention in (windowed_attention, rolled_attention):
            leaves = [m.clone().requires_grad_() for m in maps]
            gradients.append(torch.autograd.grad((attention(*leaves, shifted) * weights).sum(), leaves))
        for ours, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_the_bounds_of_windows_by_hand():
    assert attention_bounds(12, shifted=False) == [0, 6, 12]
    assert attention_bounds(12, shifted=True) == [0, 3, 9, 12]
    assert attention_bounds(10, shifted=True) == [0, 2, 7, 10]  # windows of five, shifted by two


def test_exact_maps_are_enlarged_around_the_pixels_their_cells_are_centred_on():
    # a ramp of slope 1 per cell has slope 1/4 per pixel, starting at pixel 0; beyond the last cell it stays
    ramp = torch.arange(3.0)[None, None, None].expand(1, 1, 2, 3)
    large = enlarge(ramp, "exact")
    expected = torch.tensor([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2, 2, 2])
    torch.testing.assert_close(large, expected.expand(1, 1, 8, 12))
    down = enlarge(ramp.transpose(2, 3), "exact")
    torch.testing.assert_close(down, expected[:, None].expand(1, 1, 12, 8))


def test_official_maps_are_stretched_from_the_first_pixel_to_the_last():
    ramp = torch.arange(3.0)[None, None, None].expand(1, 1, 2, 3)
    large = enlarge(ramp, "official")
    torch.testing.assert_close(large, (torch.arange(12.0) * 2 / 11).expand(1, 1, 8, 12))


def test_exact_grids_are_the_homographies_of_fronto_parallel_planes():
    inverse_depths, reference, source, poses, _ = scene()
    grid = sampling_grid(inverse_depths, reference, source, poses, (HEIGHT, WIDTH), "exact")
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    centres = torch.stack([4 * columns + 0.5, 4 * rows + 0.5, torch.ones(HEIGHT, WIDTH)], dim=-1).double()
    facing = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    for candidate, inverse in enumerate(inverse_depths[0].tolist()):  # the first pair: everything is in front of both
        # Hartley and Zisserman, example 13.2, for the plane z = 1 / inverse
        turn, shift = poses[0, :3, :3].double(), poses[0, :3, 3:].double()
        homography = source[0].double() @ (turn + shift @ facing * inverse) @ torch.linalg.inv(reference[0].double())
        landed = centres @ homography.T
        cells = (landed[..., :2] / landed[..., 2:] - 0.5) / 4
        expected = cells / torch.tensor([WIDTH - 1, HEIGHT - 1]) * 2 - 1
        torch.testing.assert_close(grid[0, candidate].double(), expected, rtol=1e-5, atol=1e-5)


class SlantedPlane:
    """A textured plane seen by two cameras with intrinsics of their own, the second turned by about a quarter.

    One cell of parallax is about twenty candidates.
    """

    size = (24, 32)  # features
    near, far, candidates = 1.5, 6.0, 240

    def __init__(self):
        self.intrinsics = torch.tensor(
            [[[120.0, 0, 55], [0, 110.0, 52], [0, 0, 1]], [[150.0, 0, 70], [0, 165.0, 44], [0, 0, 1]]],
            dtype=torch.float64,
        )
        quarter = torch.tensor([[1.0, 0.02, -0.03, 0.04], [math.cos(0.7), -0.05, 0.06, math.sin(0.7)]])
        self.poses = torch.eye(4, dtype=torch.float64).repeat(2, 1, 1)
        self.poses[:, :3, :3] = rotation_matrices(quarter.double())
        self.poses[:, :3, 3] = torch.tensor([[-0.3, 0.1, 0.0], [0.3, -0.1, 0.1]])
        # points X with normal . X = 1: about 2.5 away, nearer on one side
        self.normal = torch.tensor([0.12, -0.08, 0.4], dtype=torch.float64)

    def hits(self, view, centre):
        """Where the rays of features meet the plane, [h, w, 3], if features are centred on pixel ``4 k + centre``."""
        rows, columns = (torch.arange(side, dtype=torch.float64) * 4 + centre for side in self.size)
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        rays = torch.stack([x, y, torch.ones_like(x)], dim=-1) @ torch.linalg.inv(self.intrinsics[view]).T
        rays = rays @ self.poses[view, :3, :3].T
        eye = self.poses[view, :3, 3]
        return eye + ((1 - self.normal @ eye) / (rays @ self.normal))[..., None] * rays

    def features(self, view, centre):
        """A unit vector for each point: the nearer two points, the more alike (random Fourier features)."""
        frequencies = torch.randn(128, 3, generator=generator(4), dtype=torch.float64) * 5
        phases = torch.rand(128, generator=generator(5), dtype=torch.float64) * 2 * math.pi
        return F.normalize((self.hits(view, centre) @ frequencies.T + phases).cos(), dim=-1).permute(2, 0, 1).float()

    def errors(self, geometry, centre):
        """Best candidate minus the true one in each view, where the other view sees the point too."""
        settings = MVSplatSettings(geometry=geometry, candidates=self.candidates, cost_channels=32)
        candidates = inverse_depth_candidates(torch.full((2,), self.near), torch.full((2,), self.far), self.candidates)
        volume = DepthPredictor(settings).cost_volume(
            torch.stack([self.features(view, centre) for view in range(2)])[None],
            self.intrinsics[None].float(),
            self.poses[None],
            candidates,
        )
        for view, other in ((0, 1), (1, 0)):
            points = self.hits(view, centre)
            depth = ((points - self.poses[view, :3, 3]) @ self.poses[view, :3, :3])[..., 2]
            truth = (1 / depth - 1 / self.far) / (1 / self.near - 1 / self.far) * (self.candidates - 1)
            seen = (points - self.poses[other, :3, 3]) @ self.poses[other, :3, :3] @ self.intrinsics[other].T
            cells = (seen[..., :2] / seen[..., 2:]) / 4
            inside = ((cells > 2) & (cells < torch.tensor([32 - 3, 24 - 3]))).all(dim=-1)
            assert inside.double().mean() > 0.2
            yield (volume[view, : self.candidates].argmax(dim=0) - truth)[inside]


def test_exact_plane_sweeps_agree_best_at_the_true_depth():
    # bilinear sampling draws the best candidate to whole cells, to either side alike
    for error in SlantedPlane().errors("exact", centre=0.5):
        assert error.mean().abs() < 1
        assert error.abs().max() < 25


def test_half_a_pixel_and_the_other_cameras_intrinsics_matter_to_where_they_agree():
    for error in SlantedPlane().errors("exact", centre=0.0):
        assert error.mean().abs() > 2
    for error in SlantedPlane().errors("official", centre=0.0):
        assert error.abs().mean() > 10
