"""Colour that depends on the direction it is seen from: real spherical harmonics up to band 4.

The basis is that of e3nn (https://docs.e3nn.org), which MVSplat rotates its coefficients in: polar axis y, azimuth
``atan2(x, z)``, order ``m = -l .. l`` within a band, no Condon-Shortley sign, here with unit norm over the sphere.
Band 1 is proportional to (x, y, z).
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians

MAX_BAND = 4


def band_slices(count: int) -> list[slice]:
    """Where each band lies among ``count`` coefficients.

    Raises:
        ValueError: ``count`` is not 1, 4, 9, 16 or 25.
    """
    bands = math.isqrt(count)
    if bands * bands != count or not 1 <= bands <= MAX_BAND + 1:
        raise ValueError(f"spherical harmonics come in 1, 4, 9, 16 or 25 coefficients, not {count}")
    return [slice(band * band, (band + 1) ** 2) for band in range(bands)]


def real_harmonics(directions: Float[Tensor, "... 3"], count: int) -> Float[Tensor, "... count"]:
    """Values of the first ``count`` basis functions.

        Y_l^m = N_l^|m| Q_l^|m|(y) * (Im (z + i x)^|m|  for m < 0,  Re (z + i x)^|m|  for m >= 0)

    with ``Q_l^m(y) sin(theta)^m`` the associated Legendre function, and ``N`` such that ``Y^2`` integrates to 1 over
    the sphere.

    Args:
        directions: unit vectors.
        count: 1, 4, 9, 16 or 25.
    """
    slices = band_slices(count)
    x, y, z = directions.unbind(dim=-1)
    real, imaginary = [torch.ones_like(x)], [torch.zeros_like(x)]
    for _ in slices[1:]:
        real.append(real[-1] * z - imaginary[-1] * x)
        imaginary.append(real[-2] * x + imaginary[-1] * z)
    values = []
    for band in range(len(slices)):
        for order in range(-band, band + 1):
            m = abs(order)
            norm = (2 * band + 1) / (4 * math.pi) * math.factorial(band - m) / math.factorial(band + m)
            azimuthal = imaginary[m] if order < 0 else real[m]
            values.append(math.sqrt(norm * (2 if m else 1)) * _legendre(band, m, y) * azimuthal)
    return torch.stack(values, dim=-1)


def _legendre(band: int, order: int, y: Tensor) -> Tensor:
    """Associated Legendre function divided by ``sin(theta)^order``, without the Condon-Shortley sign."""
    below, value = torch.zeros_like(y), torch.full_like(y, math.prod(range(2 * order - 1, 0, -2)))
    for degree in range(order + 1, band + 1):
        below, value = value, ((2 * degree - 1) * y * value - (degree + order - 1) * below) / (degree - order)
    return value


def rotate_harmonics(
    harmonics: Float[Tensor, "v *other d"], rotations: Float[Tensor, "v 3 3"]
) -> Float[Tensor, "v *other d"]:
    """Coefficients of the rotated function: ``f'(R d) = f(d)``.

    Each band is multiplied by its Wigner matrix D, ``Y(R d) = D Y(d)``, which is found by least squares in float64 over
    a fixed set of directions: exact to rounding, because a rotated band lies in the span of the same band.

    Args:
        harmonics: coefficients, one rotation for each entry of the first axis.
        rotations: proper rotation matrices.
    """
    slices = band_slices(harmonics.shape[-1])
    directions = _sphere(64, rotations.device)
    before = real_harmonics(directions, harmonics.shape[-1])
    after = real_harmonics(torch.einsum("vij,nj->vni", rotations.double(), directions), harmonics.shape[-1])
    bands = []
    for band in slices:
        wigner = (torch.linalg.pinv(before[:, band]) @ after[..., band]).transpose(-1, -2)
        bands.append(torch.einsum("vij,v...j->v...i", wigner.to(harmonics.dtype), harmonics[..., band]))
    return torch.cat(bands, dim=-1)


def _sphere(count: int, device: torch.device) -> Float[Tensor, "count 3"]:
    """Directions spread evenly over the sphere (Fibonacci lattice), float64."""
    index = torch.arange(count, dtype=torch.float64, device=device) + 0.5
    height = 1 - 2 * index / count
    azimuth = math.pi * (1 + math.sqrt(5)) * index
    ring = (1 - height * height).sqrt()
    return torch.stack([ring * azimuth.sin(), height, ring * azimuth.cos()], dim=-1)


def harmonic_colours(gaussians: Gaussians, viewpoint: Float[Tensor, "3"]) -> Float[Tensor, "n 3"]:
    """Colours of Gaussians seen from a point: ``max(0, 0.5 + sum_k c_k Y_k(d))``, d from the point to the Gaussian.

    Args:
        gaussians: with harmonics.
        viewpoint: camera centre, world coordinates.

    Raises:
        ValueError: the Gaussians have no harmonics.
    """
    if gaussians.harmonics is None:
        raise ValueError("these Gaussians have no harmonics")
    directions = torch.nn.functional.normalize(gaussians.means - viewpoint, dim=-1)
    basis = real_harmonics(directions, gaussians.harmonics.shape[-1])
    return (0.5 + torch.einsum("ncd,nd->nc", gaussians.harmonics, basis)).clamp(min=0)
