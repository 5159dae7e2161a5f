"""Projection of 3D Gaussians to 2D Gaussians on the image, with the conventions of gsplat 1.4.

The constants below belong to those conventions and are shared by every engine written here.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, rotation_matrices

BLUR_VARIANCE = 0.3
"""Added to the diagonal of every 2D covariance, pixels squared: no Gaussian is thinner than about a pixel."""
FIELD_OF_VIEW_MARGIN = 0.3
"""The Jacobian is taken no further outside the image than this fraction of the half field of view's tangent."""
TILE_SIZE = 16
"""Side of gsplat's tiles, pixels."""
MAX_ALPHA = 0.999
"""No Gaussian is more opaque than this at a pixel."""
MIN_ALPHA = 1.0 / 255.0
"""A Gaussian fainter than this at a pixel is skipped there."""
MIN_TRANSMITTANCE = 1e-4
"""A pixel is finished, before the Gaussian that would do it, once its transmittance would fall to this or below."""
LIMIT_MARGIN = 1e-3 * math.log(255.0)
"""Added to the largest exponent that matters, for rounding."""
NEAR = 0.01
"""Gaussians whose z-depth is smaller are culled, world units."""
FAR = 1e10
"""Gaussians whose z-depth is larger are culled, world units."""


@dataclass(frozen=True)
class Projection:
    """2D Gaussians on one image, in the order of the 3D ones; culled ones have radius 0 and an empty box."""

    means2d: Float[Tensor, "n 2"]
    """Centres (x, y), pixel coordinates: the first pixel's centre is (0.5, 0.5)."""
    conics: Float[Tensor, "n 3"]
    """Inverse 2D covariance (xx, xy, yy), per pixel squared."""
    depths: Float[Tensor, "n"]
    """z in camera space, world units."""
    radii: Float[Tensor, "n"]
    """`ceil(3 sqrt(largest eigenvalue))`, whole pixels."""
    boxes: Int[Tensor, "n 4"]
    """int32 (first column, first row, end column, end row): every pixel that the Gaussian can touch, ends excluded."""


def project_gaussians(
    gaussians: Gaussians, camera: PinholeCamera, *, near: float = NEAR, far: float = FAR
) -> Projection:
    """Project Gaussians by the local affine approximation of the pinhole (EWA splatting, Zwicker et al. 2001, eq. 26).

        Sigma' = J W Sigma W^T J^T + 0.3 I,    J = [[fx/z, 0, -fx x/z^2], [0, fy/z, -fy y/z^2]]

    W is the world-to-camera rotation. As in gsplat 1.4, x/z and y/z inside J are clamped to the field of view plus 0.3
    of its half tangent, and Gaussians nearer than `near`, farther than `far`, or whose square of radius
    `ceil(3 sqrt(v1))` misses the image are culled, v1 being `b + sqrt(max(b^2 - det, 0.01))` with b half the trace.

    Everything is elementwise (no BLAS), so that the result's bits do not depend on the number of threads.

    Means, conics and depths are differentiable by autograd. Those of a culled Gaussian may have overflowed, and then
    give 0 * inf = NaN where its gradient should be 0: who calls `backward` has to mask that.

    Args:
        gaussians: The Gaussians, float32 or float64.
        camera: The camera, of the same dtype and device.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        Means, conics, depths, radii and exact pixel boxes, in the dtype of the Gaussians.
    """
    world_to_camera = camera.world_to_camera()
    points = _apply_rows(world_to_camera[:3, :3], gaussians.means) + world_to_camera[:3, 3]
    depths = points[:, 2]
    in_range = (depths >= near) & (depths <= far)
    # A culled Gaussian gets a harmless depth, so that no division below can produce a value that spreads.
    z = torch.where(in_range, depths, torch.ones_like(depths))
    slopes = points[:, :2] / z[:, None]
    means2d = slopes * camera.intrinsics[[0, 1], [0, 1]] + camera.intrinsics[:2, 2]

    xx, xy, yy = _image_covariances(gaussians, camera, world_to_camera, slopes, z)
    # In float32 the determinant of a long thin covariance is mostly rounding; products of float32 are exact in float64.
    determinant = (xx.double() * yy.double() - xy.double() * xy.double()).to(xx.dtype)
    visible, radii, boxes = _footprints(means2d, xx, yy, determinant, in_range, gaussians.opacities, camera)
    conics = (
        torch.stack([yy, -xy, xx], dim=1) / torch.where(visible, determinant, torch.ones_like(determinant))[:, None]
    )
    return Projection(means2d=means2d, conics=conics, depths=depths, radii=radii, boxes=boxes)


@torch.no_grad()
def _footprints(
    means2d: Float[Tensor, "n 2"],
    xx: Float[Tensor, "n"],
    yy: Float[Tensor, "n"],
    determinant: Float[Tensor, "n"],
    in_range: Bool[Tensor, "n"],
    opacities: Float[Tensor, "n"],
    camera: PinholeCamera,
) -> tuple[Bool[Tensor, "n"], Float[Tensor, "n"], Int[Tensor, "n 4"]]:
    """Visibility, radii and boxes: decisions, through which no gradient flows."""
    half_trace = 0.5 * (xx + yy)
    largest = half_trace + (half_trace * half_trace - determinant).clamp(min=0.01).sqrt()
    radii = (3.0 * largest.sqrt()).ceil()
    size = means2d.new_tensor([camera.width, camera.height])
    on_image = ((means2d + radii[:, None] > 0) & (means2d - radii[:, None] < size)).all(dim=1)
    visible = in_range & on_image & (determinant > 0) & torch.isfinite(determinant)
    boxes = _pixel_boxes(means2d, torch.stack([xx, yy], dim=1), radii, opacities, visible, size)
    return visible, torch.where(visible, radii, torch.zeros_like(radii)), boxes


def _apply_rows(matrix: Float[Tensor, "rows 3"], vectors: Float[Tensor, "n 3"]) -> Float[Tensor, "n rows"]:
    """`matrix @ vector` for each vector, by elementwise operations alone."""
    x, y, z = vectors[:, 0:1], vectors[:, 1:2], vectors[:, 2:3]
    return x * matrix[:, 0] + y * matrix[:, 1] + z * matrix[:, 2]


def _image_covariances(
    gaussians: Gaussians,
    camera: PinholeCamera,
    world_to_camera: Float[Tensor, "4 4"],
    slopes: Float[Tensor, "n 2"],
    z: Float[Tensor, "n"],
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"], Float[Tensor, "n"]]:
    """Entries (xx, xy, yy) of the blurred 2D covariance, pixels squared."""
    intrinsics = camera.intrinsics
    focal, centre = intrinsics[[0, 1], [0, 1]], intrinsics[:2, 2]
    size = intrinsics.new_tensor([camera.width, camera.height])
    margin = FIELD_OF_VIEW_MARGIN * 0.5 * size / focal
    slopes = torch.minimum(torch.maximum(slopes, -(centre / focal + margin)), (size - centre) / focal + margin)

    # Rows of J W, one per image axis: focal/z (W_axis - slope W_z).
    stretch = focal / z[:, None]
    rotation = world_to_camera[:3, :3]
    rotations = rotation_matrices(gaussians.quats)
    extents = []
    for axis in (0, 1):
        direction = stretch[:, axis : axis + 1] * (rotation[axis] - slopes[:, axis : axis + 1] * rotation[2])
        # The principal axes' projections: the covariance below is a sum of their products, never negative definite.
        along = (
            direction[:, 0:1] * rotations[:, 0]
            + direction[:, 1:2] * rotations[:, 1]
            + direction[:, 2:3] * rotations[:, 2]
        )
        extents.append(along * gaussians.scales)
    across, down = extents
    return (
        (across * across).sum(dim=1) + BLUR_VARIANCE,
        (across * down).sum(dim=1),
        (down * down).sum(dim=1) + BLUR_VARIANCE,
    )


def _pixel_boxes(
    means2d: Float[Tensor, "n 2"],
    variances: Float[Tensor, "n 2"],
    radii: Float[Tensor, "n"],
    opacities: Float[Tensor, "n"],
    visible: Tensor,
    size: Float[Tensor, "2"],
) -> Int[Tensor, "n 4"]:
    """Half-open pixel boxes (first column, first row, end column, end row), int32; (0, 0, 0, 0) where nothing is hit.

    The box is the intersection of the image, of gsplat's rule (a Gaussian only touches the 16-pixel tiles that its
    square of radius `radii` overlaps) and of the exact extent of the ellipse `alpha >= 1/255`, whose half width is
    `sqrt(2 ln(255 opacity) Sigma'_xx)`.
    """
    reach = torch.log(opacities.clamp(min=MIN_ALPHA) / MIN_ALPHA)
    # The margin covers the rounding of the exponent, which the engines evaluate from the conic.
    half = (2.0 * reach[:, None] * variances).sqrt() * (1.0 + 1e-3) + 1e-2
    first_tile = torch.floor((means2d - radii[:, None]) / TILE_SIZE) * TILE_SIZE
    end_tile = torch.ceil((means2d + radii[:, None]) / TILE_SIZE) * TILE_SIZE
    first = torch.maximum(torch.ceil(means2d - half - 0.5), first_tile).clamp(min=0)
    end = torch.minimum(torch.minimum(torch.floor(means2d + half + 0.5), end_tile), size)
    hit = visible & (opacities >= MIN_ALPHA * (1.0 - 1e-6)) & (end > first).all(dim=1)
    boxes = torch.cat([first, end], dim=1)
    return torch.where(hit[:, None], boxes, torch.zeros_like(boxes)).to(torch.int32)


def exponent_limits(opacities: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    """`ln(255 opacity)` plus a margin: an exponent above it cannot reach alpha >= 1/255 (dimensionless)."""
    return torch.log(opacities.clamp(min=1e-30) / MIN_ALPHA) + LIMIT_MARGIN
