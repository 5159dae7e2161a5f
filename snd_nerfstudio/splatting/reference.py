"""The slow twin: every Gaussian at every pixel, in float64, written to be obviously right."""

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted


def splat_reference(
    gaussians: Gaussians, camera: PinholeCamera, features: Float[Tensor, "n c"], near: float, far: float
) -> Splatted:
    """Composite all Gaussians front to back over the whole image, one Gaussian at a time.

    It shares no code with the fast engines: the projection is spelled out again as matrices, one Gaussian at a time,
    and the numbers of gsplat 1.4 are written where they are used. Its gradients are left to autograd.

    Args:
        gaussians: The Gaussians, any floating dtype, any device.
        camera: The camera.
        features: One row per Gaussian.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The splatted view, computed in float64 on the CPU, in the dtype and on the device of the features.
    """
    height, width = camera.height, camera.width
    means = gaussians.means.cpu().double()
    covariances = gaussians.to("cpu", torch.float64).covariances()
    opacities = gaussians.opacities.cpu().double()
    rows = features.cpu().double()
    intrinsics = camera.intrinsics.cpu().double()
    world_to_camera = torch.linalg.inv(camera.camera_to_world.cpu().double())

    points = means @ world_to_camera[:3, :3].T + world_to_camera[:3, 3]
    y, x = torch.meshgrid(
        torch.arange(height, dtype=torch.float64) + 0.5, torch.arange(width, dtype=torch.float64) + 0.5, indexing="ij"
    )
    transmittance = torch.ones(height, width, dtype=torch.float64)
    finished = torch.zeros(height, width, dtype=torch.bool)
    # A sum over nothing, that is 0: it ties the view to its inputs, for autograd, where no Gaussian is seen.
    nothing = torch.cat([tensor[:0].reshape(-1) for tensor in (means, covariances, opacities, rows)]).sum()
    feature_sum = torch.zeros(height, width, features.shape[1], dtype=torch.float64) + nothing
    alpha_sum = torch.zeros(height, width, dtype=torch.float64) + nothing
    depth_sum = torch.zeros(height, width, dtype=torch.float64) + nothing

    # The order is that of the depths as the input's dtype holds them: gsplat sorts those bits, ties by index.
    sorting_depths = points[:, 2].to(gaussians.dtype)
    for index in torch.argsort(sorting_depths, stable=True).tolist():
        depth = points[index, 2]
        if depth < near or depth > far:
            continue
        centre, covariance = _project(points[index], covariances[index], world_to_camera[:3, :3], intrinsics, camera)
        alpha = _alpha(centre, covariance, opacities[index], x, y)
        takes = (alpha >= 1.0 / 255.0) & ~finished
        next_transmittance = transmittance * (1.0 - alpha)
        # The Gaussian that would finish a pixel is itself left out, and so is everything behind it.
        finished |= takes & (next_transmittance <= 1e-4)
        takes &= ~finished
        weight = torch.where(takes, alpha * transmittance, torch.zeros_like(alpha))
        transmittance = torch.where(takes, next_transmittance, transmittance)
        feature_sum += weight[:, :, None] * rows[index]
        alpha_sum += weight
        depth_sum += weight * depth

    expected_depth = depth_sum / alpha_sum.clamp(min=1e-10)
    return Splatted(features=feature_sum.to(features), alpha=alpha_sum.to(features), depth=expected_depth.to(features))


def _project(
    point: Float[Tensor, "3"],
    covariance: Float[Tensor, "3 3"],
    rotation: Float[Tensor, "3 3"],
    intrinsics: Float[Tensor, "3 3"],
    camera: PinholeCamera,
) -> tuple[Float[Tensor, "2"], Float[Tensor, "2 2"]]:
    """Centre (pixels) and blurred 2D covariance (pixels squared) of one Gaussian at camera-space `point`."""
    x, y, z = point
    fx, fy, cx, cy = (float(intrinsics[i]) for i in [(0, 0), (1, 1), (0, 2), (1, 2)])
    margin_x, margin_y = 0.3 * 0.5 * camera.width / fx, 0.3 * 0.5 * camera.height / fy
    slope_x = (x / z).clamp(-(cx / fx + margin_x), (camera.width - cx) / fx + margin_x)
    slope_y = (y / z).clamp(-(cy / fy + margin_y), (camera.height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * slope_x / z, zero, fy / z, -fy * slope_y / z]).view(2, 3)
    image_covariance = jacobian @ rotation @ covariance @ rotation.T @ jacobian.T
    centre = torch.stack([fx * x / z + cx, fy * y / z + cy])
    return centre, image_covariance + 0.3 * torch.eye(2, dtype=torch.float64)


def _alpha(
    centre: Float[Tensor, "2"],
    covariance: Float[Tensor, "2 2"],
    opacity: Float[Tensor, ""],
    x: Float[Tensor, "height width"],
    y: Float[Tensor, "height width"],
) -> Float[Tensor, "height width"]:
    """`min(0.999, opacity exp(-sigma))` at every pixel; 0 in 16-pixel tiles that gsplat's square does not overlap."""
    inverse = torch.linalg.inv(covariance)
    dx, dy = centre[0] - x, centre[1] - y
    sigma = 0.5 * (inverse[0, 0] * dx * dx + inverse[1, 1] * dy * dy) + inverse[0, 1] * dx * dy
    alpha = (opacity * torch.exp(-sigma)).clamp(max=0.999)

    half_trace = 0.5 * (covariance[0, 0] + covariance[1, 1])
    spread = torch.clamp(half_trace**2 - torch.linalg.det(covariance), min=0.01).sqrt()
    radius = torch.ceil(3.0 * torch.sqrt(half_trace + spread))
    tile_x, tile_y = torch.floor(x / 16), torch.floor(y / 16)
    overlapped = (tile_x >= torch.floor((centre[0] - radius) / 16)) & (tile_x < torch.ceil((centre[0] + radius) / 16))
    overlapped &= (tile_y >= torch.floor((centre[1] - radius) / 16)) & (tile_y < torch.ceil((centre[1] + radius) / 16))
    misses_image = (centre[0] + radius <= 0) | (centre[0] - radius >= x.shape[1])
    misses_image |= (centre[1] + radius <= 0) | (centre[1] - radius >= x.shape[0])
    return torch.where(overlapped & ~misses_image & (sigma >= 0), alpha, torch.zeros_like(alpha))
