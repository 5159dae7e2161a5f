"""What MVSplat gives, and how raw network outputs become it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.reconstruction.mvsplat.settings import MVSplatSettings
from snd_nerfstudio.splatting.gaussians import Gaussians, rotation_matrices
from snd_nerfstudio.splatting.harmonics import band_slices, rotate_harmonics

OFFICIAL_BANDS = 4
"""The released renderer leaves the fifth band out."""


@dataclass(frozen=True)
class PixelGaussians:
    """A batch of pixel-aligned Gaussians in world space: number ``(view * H + row) * W + column``."""

    means: Float[Tensor, "b n 3"]
    """Centres, world units."""
    quats: Float[Tensor, "b n 4"]
    """Rotations to world axes as unit quaternions (w, x, y, z)."""
    scales: Float[Tensor, "b n 3"]
    """Standard deviations, world units."""
    opacities: Float[Tensor, "b n"]
    """In (0, 1)."""
    harmonics: Float[Tensor, "b n 3 d"]
    """Colour coefficients in world axes, as the network's settings read them; `item` gives what can be rendered."""
    depths: Float[Tensor, "b v H W"]
    """What the network predicts, world units: z-depth with the `exact` geometry, distance along the ray with
    `official`."""
    settings: MVSplatSettings
    """Of the network they come from."""

    def __len__(self) -> int:
        return self.means.shape[0]

    def covariances(self) -> Float[Tensor, "b n 3 3"]:
        """Covariances ``R diag(scale)^2 R^T`` in world axes, world units squared."""
        axes = rotation_matrices(self.quats.flatten(0, 1)).view(*self.quats.shape[:2], 3, 3) * self.scales[:, :, None]
        return axes @ axes.transpose(-1, -2)

    def item(self, index: int) -> Gaussians:
        """One batch item, with colours as `splatting.harmonics` evaluates them."""
        harmonics = self.harmonics[index]
        if self.settings.geometry == "official":
            harmonics = _as_official_renderer(harmonics)
        return Gaussians(
            means=self.means[index],
            quats=self.quats[index],
            scales=self.scales[index],
            opacities=self.opacities[index],
            harmonics=harmonics,
        )


def _as_official_renderer(harmonics: Float[Tensor, "n 3 d"]) -> Float[Tensor, "n 3 e"]:
    """The released renderer's basis differs from the one rotated in by the sign of odd orders, and has four bands."""
    slices = band_slices(harmonics.shape[-1])[:OFFICIAL_BANDS]
    signs = [(-1.0) ** order for band in range(len(slices)) for order in range(-band, band + 1)]
    return harmonics[..., : slices[-1].stop] * harmonics.new_tensor(signs)


def to_gaussians(
    raw: Float[Tensor, "b v k H W"],
    depths: Float[Tensor, "b v H W"],
    opacities: Float[Tensor, "b v H W"],
    intrinsics: Float[Tensor, "b v 3 3"],
    camera_to_world: Float[Tensor, "b v 4 4"],
    settings: MVSplatSettings,
) -> PixelGaussians:
    """Place one Gaussian per pixel (MVSplat, section 3.2).

    With o, s, q, c the raw offset, scale, rotation and colour of the pixel in row r and column k:

        point = (k + 0.5, r + 0.5) + sigmoid(o) - 0.5,        ray = K^-1 (point, 1)
        mean  = centre + depth R ray                           (`official`: ray / |ray|)
        scale = (min + (max - min) sigmoid(s)) depth 0.1 (1 / fx + 1 / fy)
        rotation = R q / |q|                                   (q stored x, y, z, w)
        colour = rotated by R: c_0, then 0.1 * 0.25^l c_l in band l

    Args:
        raw: 2 + 3 + 4 + 3 d channels.
        depths: world units.
        opacities: in [0, 1].
        intrinsics: in pixels.
        camera_to_world: OpenCV.
        settings: of the network.
    """
    height, width = depths.shape[-2:]
    offset, scale, quaternion, colour = raw.split([2, 3, 4, 3 * settings.harmonics], dim=2)
    rows = torch.arange(height, device=raw.device, dtype=raw.dtype)
    columns = torch.arange(width, device=raw.device, dtype=raw.dtype)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    points = torch.stack([x, y]) + offset.sigmoid()  # + 0.5 for the centre of the pixel, - 0.5 of the offset
    rays = torch.einsum("bvij,bvjhw->bvihw", torch.linalg.inv(intrinsics), F.pad(points, (0, 0, 0, 0, 0, 1), value=1.0))
    if settings.geometry == "official":
        rays = F.normalize(rays, dim=2)
    rotation, centre = camera_to_world[..., :3, :3], camera_to_world[..., :3, 3]
    means = torch.einsum("bvij,bvjhw->bvhwi", rotation, rays * depths[:, :, None]) + centre[:, :, None, None]

    pixel = 0.1 * (1 / intrinsics[..., 0, 0] + 1 / intrinsics[..., 1, 1])
    span = settings.min_scale + (settings.max_scale - settings.min_scale) * scale.sigmoid()
    scales = span * (depths * pixel[..., None, None])[:, :, None]

    quats = rearrange(quaternion, "b v q h w -> b v h w q").roll(1, dims=-1)
    quats = quats / (quats.norm(dim=-1, keepdim=True) + 1e-8)
    views = repeat(rotations_to_quaternions(rotation), "b v q -> b v h w q", h=1, w=1)

    shares = [0.1 * 0.25**band if band else 1.0 for band in range(len(band_slices(settings.harmonics)))]
    mask = raw.new_tensor([share for band, share in enumerate(shares) for _ in range(2 * band + 1)])
    colour = rearrange(colour, "b v (rgb d) h w -> (b v) (h w) rgb d", rgb=3) * mask
    colour = rotate_harmonics(colour, rotation.flatten(0, 1))
    return PixelGaussians(
        means=rearrange(means, "b v h w xyz -> b (v h w) xyz"),
        quats=rearrange(multiply_quaternions(views, quats), "b v h w q -> b (v h w) q"),
        scales=rearrange(scales, "b v xyz h w -> b (v h w) xyz"),
        opacities=rearrange(opacities, "b v h w -> b (v h w)"),
        harmonics=rearrange(colour, "(b v) n rgb d -> b (v n) rgb d", b=depths.shape[0]),
        depths=depths,
        settings=settings,
    )


def multiply_quaternions(
    left: Float[Tensor, "*#batch 4"], right: Float[Tensor, "*#batch 4"]
) -> Float[Tensor, "*#batch 4"]:
    """Hamilton product: first ``right``, then ``left``; (w, x, y, z)."""
    a, b, c, d = left.unbind(dim=-1)
    w, x, y, z = right.unbind(dim=-1)
    return torch.stack(
        [
            a * w - b * x - c * y - d * z,
            a * x + b * w + c * z - d * y,
            a * y - b * z + c * w + d * x,
            a * z + b * y - c * x + d * w,
        ],
        dim=-1,
    )


def rotations_to_quaternions(rotations: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Unit quaternions (w, x, y, z) of rotation matrices, in float64 inside.

    The quaternion is the eigenvector to the largest eigenvalue of a symmetric 4x4 matrix (Bar-Itzhack 2000): right for
    every rotation, also of half a turn, and the nearest one where the matrix is not quite orthonormal.
    """
    r = rotations.detach().double()
    trace = r.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    twist = torch.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], dim=-1)
    matrix = r.new_zeros(*r.shape[:-2], 4, 4)
    matrix[..., 0, 0] = trace
    matrix[..., 0, 1:] = matrix[..., 1:, 0] = twist
    identity = torch.eye(3, dtype=r.dtype, device=r.device)
    matrix[..., 1:, 1:] = r + r.transpose(-1, -2) - trace[..., None, None] * identity
    return torch.linalg.eigh(matrix).eigenvectors[..., -1].to(rotations.dtype)
