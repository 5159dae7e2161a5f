"""Gaussians from depth maps: the simplest reconstructor, and an oracle where the depth is measured."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import Gaussians


def unproject(
    depths: Float[Tensor, "v H W"], intrinsics: Float[Tensor, "v 3 3"], camera_to_worlds: Float[Tensor, "v 4 4"]
) -> Float[Tensor, "v H W 3"]:
    """World position of every pixel centre at its z-depth.

    ``X = R K^-1 (u + 0.5, v + 0.5, 1) z + t``

    Args:
        depths: depth along the optical axis, world units.
        intrinsics: in pixels, pixel centres at +0.5.
        camera_to_worlds: OpenCV camera-to-world.

    Returns:
        Points in world coordinates; where the depth is 0 that is the camera centre.
    """
    height, width = depths.shape[-2:]
    rows = torch.arange(height, device=depths.device, dtype=depths.dtype) + 0.5
    columns = torch.arange(width, device=depths.device, dtype=depths.dtype) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    rays = torch.einsum("vij,hwj->vhwi", torch.linalg.inv(intrinsics), pixels)
    points = torch.einsum("vij,vhwj->vhwi", camera_to_worlds[:, :3, :3], rays * depths[..., None])
    return points + camera_to_worlds[:, None, None, :3, 3]


@dataclass(frozen=True)
class DepthReconstructor:
    """One isotropic Gaussian per pixel at its measured depth; pixels without depth get opacity 0.

    The standard deviation is ``footprint * z * (1 / fx + 1 / fy) / 2``: a fixed share of what one pixel covers at that
    depth, facing the camera, since no normals are assumed.
    """

    footprint: float = 0.3
    """Standard deviation of a Gaussian in pixels of the view it comes from. With the rasterizer's own blur this covers
    98 % and more between neighbouring views; larger ones cover more and blur more."""
    opacity: float = 0.95
    """Opacity where the depth is known; below 1, so that the first of several overlapping neighbours does not win."""
    needs_depth: bool = True

    @property
    def description(self) -> str:
        """Kind and settings."""
        return repr(self)

    @property
    def weights(self) -> dict[str, Tensor]:
        """None are needed."""
        return {}

    def __call__(self, views: Views) -> Gaussians:
        """Unproject the depth maps.

        Raises:
            InputError: the views carry no depth, or none of their pixels has a depth.
        """
        if views.depths is None:
            raise InputError(
                "The `depth` reconstructor needs depth maps, and this dataset has none: give `depth_file_path` in "
                "transforms.json (nerfstudio-scenes) or scenes/<scene>/depth/<image>.png (scannetpp-scenes)."
            )
        valid = views.depths > 0
        if not valid.any():
            raise InputError(f"The depth maps of {', '.join(views.names)} have no valid pixel.")
        depths = torch.where(valid, views.depths, torch.ones_like(views.depths))  # finite everywhere; opacity hides it
        points = unproject(depths, views.intrinsics, views.camera_to_worlds)
        focal = views.intrinsics[:, [0, 1], [0, 1]]
        pixel_size = depths * (1 / focal).mean(dim=-1)[:, None, None]
        scales = rearrange(self.footprint * pixel_size, "v h w -> (v h w) 1").expand(-1, 3)
        quats = torch.zeros(scales.shape[0], 4, device=points.device, dtype=points.dtype)
        quats[:, 0] = 1
        return Gaussians(
            means=rearrange(points, "v h w xyz -> (v h w) xyz"),
            quats=quats,
            scales=scales.contiguous(),
            opacities=rearrange(self.opacity * valid.to(points.dtype), "v h w -> (v h w)"),
        )
