import math

import numpy as np
import pytest
import torch

from snd_nerfstudio.reconstruction.mvsplat import RE10K, MVSplatSettings, PixelGaussians
from snd_nerfstudio.splatting import Gaussians
from snd_nerfstudio.splatting.gaussians import rotation_matrices
from snd_nerfstudio.splatting.harmonics import band_slices, harmonic_colours, real_harmonics, rotate_harmonics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def directions(count, seed=0, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator(seed), dtype=dtype), dim=-1)


def rotations(count, seed=0):
    return rotation_matrices(torch.randn(count, 4, generator=generator(seed), dtype=torch.float64))


def coloured(count, coefficients, seed=0):
    """Gaussians of random places and colours."""
    return Gaussians(
        means=torch.randn(count, 3, generator=generator(seed), dtype=torch.float64),
        quats=torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64).expand(count, 4),
        scales=torch.ones(count, 3, dtype=torch.float64),
        opacities=torch.ones(count, dtype=torch.float64),
        harmonics=torch.randn(count, 3, coefficients, generator=generator(seed + 1), dtype=torch.float64),
    )


def test_the_first_three_bands_by_hand():
    x, y, z = directions(20).unbind(dim=-1)
    one = torch.ones_like(x)
    expected = [
        one * math.sqrt(1 / (4 * math.pi)),
        *(math.sqrt(3 / (4 * math.pi)) * axis for axis in (x, y, z)),
        *(math.sqrt(15 / (4 * math.pi)) * product for product in (x * z, x * y)),
        math.sqrt(5 / (16 * math.pi)) * (3 * y * y - 1),
        math.sqrt(15 / (4 * math.pi)) * y * z,
        math.sqrt(15 / (16 * math.pi)) * (z * z - x * x),
    ]
    ours = real_harmonics(torch.stack([x, y, z], dim=-1), 9)
    torch.testing.assert_close(ours, torch.stack(expected, dim=-1), rtol=0, atol=1e-14)


def test_the_basis_is_orthonormal_over_the_sphere():
    # Gauss-Legendre heights and equal angles integrate polynomials up to degree 19 exactly; products have degree 8
    heights, weights = np.polynomial.legendre.leggauss(10)
    azimuths = np.arange(20) * (2 * math.pi / 20)
    y, azimuth = (torch.from_numpy(grid) for grid in np.meshgrid(heights, azimuths, indexing="ij"))
    ring = (1 - y * y).sqrt()
    basis = real_harmonics(torch.stack([ring * azimuth.sin(), y, ring * azimuth.cos()], dim=-1), 25)
    area = torch.from_numpy(weights)[:, None] * (2 * math.pi / 20)
    gram = torch.einsum("ha,hai,haj->ij", area.expand_as(y), basis, basis)
    torch.testing.assert_close(gram, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-13)


def test_rotated_coefficients_give_the_rotated_function():
    coefficients = torch.randn(6, 2, 25, generator=generator(), dtype=torch.float64)
    turns, seen = rotations(6), directions(50, seed=3)
    before = torch.einsum("voc,nc->von", coefficients, real_harmonics(seen, 25))
    turned = torch.einsum("vij,nj->vni", turns, seen)
    after = torch.einsum("voc,vnc->von", rotate_harmonics(coefficients, turns), real_harmonics(turned, 25))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)


def test_basis_functions_rotate_by_the_matrix_that_rotates_coefficients():
    turn, seen = rotations(1, seed=5), directions(40, seed=2)
    # columns of D are the rotated unit coefficients; Y(R d) = D Y(d)
    matrix = rotate_harmonics(torch.eye(25, dtype=torch.float64)[None], turn)[0].T
    torch.testing.assert_close(
        real_harmonics(seen @ turn[0].T, 25), real_harmonics(seen, 25) @ matrix.T, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(25, dtype=torch.float64), rtol=0, atol=1e-12)


def test_two_rotations_in_a_row_are_their_product():
    coefficients = torch.randn(1, 3, 25, generator=generator(), dtype=torch.float64)
    first, second = rotations(2, seed=7).split(1)
    twice = rotate_harmonics(rotate_harmonics(coefficients, first), second)
    torch.testing.assert_close(twice, rotate_harmonics(coefficients, second @ first), rtol=0, atol=1e-12)


def test_wigner_matrices_are_those_of_e3nn(golden):
    units = golden("units")
    unit = torch.eye(25, dtype=torch.float64).expand(12, 25, 25)
    ours = rotate_harmonics(unit, units["sh.rotations"]).transpose(1, 2)
    for band in range(1, 5):
        part = slice(band * band, (band + 1) ** 2)
        torch.testing.assert_close(ours[:, part, part], units[f"sh.wigner_l{band}_float64"], rtol=0, atol=5e-7)


def test_rotated_coefficients_agree_with_the_released_code(golden):
    units = golden("units")
    ours = rotate_harmonics(units["sh.in"], units["sh.rotations"])
    # the released code finds Euler angles by float32 arc cosines, which are that coarse near small rotations
    torch.testing.assert_close(ours, units["sh.out"], rtol=0, atol=2e-4)
    assert (ours - units["sh.out"]).abs().mean() < 5e-6


@pytest.mark.parametrize("coefficients", [1, 4, 9, 16, 25])
def test_turning_everything_together_changes_no_colour(coefficients):
    still = coloured(30, coefficients)
    viewpoint = torch.tensor([0.3, -2.0, 0.7], dtype=torch.float64)
    turn = rotations(1, seed=11)
    turned = Gaussians(
        means=still.means @ turn[0].T,
        quats=still.quats,
        scales=still.scales,
        opacities=still.opacities,
        harmonics=rotate_harmonics(still.harmonics[None], turn)[0],
    )
    colours = harmonic_colours(still, viewpoint)
    torch.testing.assert_close(harmonic_colours(turned, turn[0] @ viewpoint), colours, rtol=0, atol=1e-12)
    assert colours.std() > 0.1


def test_a_colour_by_hand():
    # seen along (0.6, 0, 0.8): 0.5 + 2 * 0.28209479 + 1 * 0.48860251 * 0.8 for red, clamped for green, 0.5 for blue
    harmonics = torch.zeros(1, 3, 4)
    harmonics[0, 0, 0], harmonics[0, 0, 3], harmonics[0, 1, 1] = 2.0, 1.0, -4.0
    splat = Gaussians(torch.tensor([[1.6, 2.0, 3.8]]), torch.eye(4)[:1], torch.ones(1, 3), torch.ones(1), harmonics)
    colours = harmonic_colours(splat, torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(colours, torch.tensor([[1.4550716, 0.0, 0.5]]), rtol=0, atol=1e-6)


def test_colours_need_harmonics():
    plain = Gaussians(torch.zeros(1, 3), torch.eye(4)[:1], torch.ones(1, 3), torch.ones(1))
    with pytest.raises(ValueError, match="no harmonics"):
        harmonic_colours(plain, torch.zeros(3))


@pytest.mark.parametrize("count", [0, 2, 3, 8, 24, 36])
def test_only_whole_bands_up_to_the_fifth_are_taken(count):
    with pytest.raises(ValueError, match="1, 4, 9, 16 or 25"):
        band_slices(count)
    with pytest.raises(ValueError, match="1, 4, 9, 16 or 25"):
        real_harmonics(directions(2), count)


def renderers_basis(d):
    """Bands 0 to 3 as rasterizers of 3D Gaussian splatting evaluate them (Kerbl et al. 2023)."""
    x, y, z = d.unbind(dim=-1)
    xx, yy, zz = x * x, y * y, z * z
    values = [
        0.28209479177387814 * torch.ones_like(x),
        *(0.4886025119029199 * term for term in (-y, z, -x)),
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.31539156525252005 * (2 * zz - xx - yy),
        -1.0925484305920792 * x * z,
        0.5462742152960396 * (xx - yy),
        -0.5900435899266435 * y * (3 * xx - yy),
        2.890611442640554 * x * y * z,
        -0.4570457994644658 * y * (4 * zz - xx - yy),
        0.3731763325901154 * z * (2 * zz - 3 * xx - 3 * yy),
        -0.4570457994644658 * x * (4 * zz - xx - yy),
        1.445305721320277 * z * (xx - yy),
        -0.5900435899266435 * x * (xx - 3 * yy),
    ]
    return torch.stack(values, dim=-1)


def pixel_gaussians(gaussians, settings):
    fields = [getattr(gaussians, name)[None] for name in ("means", "quats", "scales", "opacities", "harmonics")]
    return PixelGaussians(*fields, depths=torch.ones(1, 2, 1, 1), settings=settings)


def test_official_colours_are_those_of_the_released_renderer():
    # it exchanges the axes of the direction, (x, y, z) to (z, x, y), and knows four bands
    predicted = coloured(40, 25)
    viewpoint = torch.tensor([0.1, 0.2, -3.0], dtype=torch.float64)
    shown = harmonic_colours(pixel_gaussians(predicted, RE10K).item(0), viewpoint)
    seen = torch.nn.functional.normalize(predicted.means - viewpoint, dim=-1)
    basis = renderers_basis(seen[:, [2, 0, 1]])
    expected = (0.5 + torch.einsum("ncd,nd->nc", predicted.harmonics[..., :16], basis)).clamp(min=0)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-12)


def test_official_coefficients_change_sign_with_odd_orders_and_lose_the_fifth_band():
    predicted = coloured(2, 25)
    shown = pixel_gaussians(predicted, RE10K).item(0).harmonics
    signs = [1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1]  # orders 0 | -1 0 1 | -2 .. 2 | -3 .. 3
    torch.testing.assert_close(shown, predicted.harmonics[..., :16] * torch.tensor(signs))


@pytest.mark.parametrize("coefficients", [1, 4])
def test_fewer_bands_stay_as_many(coefficients):
    settings = MVSplatSettings(geometry="official", harmonics=coefficients)
    assert pixel_gaussians(coloured(2, coefficients), settings).item(0).harmonics.shape == (2, 3, coefficients)


def test_exact_coefficients_stay_as_they_are():
    predicted = coloured(2, 25)
    assert torch.equal(pixel_gaussians(predicted, MVSplatSettings()).item(0).harmonics, predicted.harmonics)
