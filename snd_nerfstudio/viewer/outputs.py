"""Cameras, Gaussians and depth as nerfstudio's viewer and renderer want them."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, Splatted, rasterize
from snd_nerfstudio.splatting.projection import BLUR_VARIANCE
from snd_nerfstudio.supervision.blending import blend
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.pca import PCABasis

EMPTY = 1e-3
"""Accumulated alpha below which a pixel has no feature."""
SUPPORTED = 0.05
"""Accumulated alpha below which a pixel has no place in space."""
SAME_SURFACE = 0.05
"""Share of its depth by which a point may lie behind or before what the target view saw there."""


@dataclass(frozen=True)
class ShownScene:
    """The Gaussians on display and the views they come from."""

    triplet: ViewTriplet
    gaussians: Gaussians

    @cached_property
    def target_splat(self) -> Splatted:
        """Depth and coverage of the target view."""
        nothing = self.gaussians.means.new_zeros(len(self.gaussians), 0)
        return rasterize(self.gaussians, self.triplet.target.camera(0), nothing)


def to_pinhole(camera: Cameras) -> PinholeCamera:
    """Nerfstudio's camera (one, OpenGL axes) in the package's conventions."""
    flat = camera.flatten()
    pose = torch.eye(4, device=flat.camera_to_worlds.device)
    pose[:3] = flat.camera_to_worlds[0].float()
    pose[:3, 1:3] *= -1
    matrix = torch.eye(3, device=pose.device)
    matrix[0, 0], matrix[1, 1] = flat.fx[0, 0], flat.fy[0, 0]
    matrix[0, 2], matrix[1, 2] = flat.cx[0, 0], flat.cy[0, 0]
    return PinholeCamera(pose, matrix, int(flat.height[0, 0]), int(flat.width[0, 0]))


def ray_lengths(camera: PinholeCamera) -> Float[Tensor, "H W 1"]:
    """Distance along each pixel's ray per unit of z-depth; nerfstudio's ``depth`` is measured along the ray."""
    device = camera.intrinsics.device
    rows = torch.arange(camera.height, device=device) + 0.5
    columns = torch.arange(camera.width, device=device) + 0.5
    y = (rows - camera.intrinsics[1, 2]) / camera.intrinsics[1, 1]
    x = (columns - camera.intrinsics[0, 2]) / camera.intrinsics[0, 0]
    return (1 + x[None, :] ** 2 + y[:, None] ** 2).sqrt()[..., None]


def ray_distance(splat: Splatted, camera: PinholeCamera) -> Float[Tensor, "H W 1"]:
    """Expected depth along the rays, as nerfstudio's ``depth`` is.

    Where nothing was hit it is put behind everything, or it would hide the viewer's camera frusta.
    """
    covered = splat.alpha[..., None] > EMPTY
    return torch.where(covered, splat.depth[..., None], splat.depth.max()) * ray_lengths(camera)


def without_gaps(scene: ShownScene, camera: PinholeCamera) -> Gaussians:
    """The Gaussians, widened for pictures larger than the context views, in which gaps would open between them.

    The rasterizer blurs by a part of the picture's pixel. In a larger picture that is less of a context pixel, so what
    is missing is added to every axis here: the picture is then that of training, enlarged.

    Args:
        scene: what is shown.
        camera: for which camera; at the context views' focal length and below the Gaussians stay as they are.
    """
    context, gaussians = scene.triplet.context, scene.gaussians
    poses = context.camera_to_worlds
    means = rearrange(gaussians.means, "(v n) xyz -> v n xyz", v=poses.shape[0])
    depths = torch.einsum("vni,vi->vn", means - poses[:, None, :3, 3], poses[:, :3, 2])
    focal = context.intrinsics[:, [0, 1], [0, 1]].mean(dim=1)
    missing = BLUR_VARIANCE * (1 - (focal / camera.intrinsics[[0, 1], [0, 1]].mean()).square()).clamp(min=0)
    variances = rearrange(missing[:, None] * (depths / focal[:, None]).square(), "v n -> (v n) 1")
    return replace(gaussians, scales=(gaussians.scales.square() + variances).sqrt())


def target_colours(
    scene: ShownScene,
    values: Float[Tensor, "n 3"],
    basis: PCABasis,
    settings: SupervisionSettings,
    blending: float,
) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W 3"]]:
    """The target view's splatted features in colour on black, before and after blending (paper equation 4).

    Splatting and blending are linear, so both are done to three coordinates instead of all channels.

    Args:
        scene: what is shown.
        values: the Gaussians' features, projected on the basis.
        basis: colours of features.
        settings: of the teacher's path.
        blending: alpha of equation 4.
    """
    target = scene.triplet.target
    ones = torch.ones_like(values[:, :1])
    splat = rasterize(scene.gaussians, target.camera(0), torch.cat([values, ones], 1), footprint=settings.footprint)
    alpha, mask, weighted = splat.alpha[..., None], target.mask(0), settings.weighting == "coverage"
    splatted = basis.colour(splat.features[..., :3] / alpha.clamp(min=EMPTY)) * alpha
    blended = splat.features
    if mask is not None:
        blended = blend(blended, mask, blending, splat.alpha if weighted else None)
    if weighted:
        return splatted, basis.colour(blended[..., :3] / alpha.clamp(min=EMPTY)) * alpha
    # coordinates are of features less their mean, which was subtracted from a pixel only as far as it is covered
    origin = basis.project(torch.zeros_like(basis.mean))
    return splatted, basis.colour(blended[..., :3] + (1 - blended[..., 3:]) * origin)


@dataclass(frozen=True)
class TargetPixels:
    """Where the target view saw what another camera sees."""

    places: Float[Tensor, "H W 2"]
    """Column and row in the target view, as `grid_sample` wants them."""
    seen: Bool[Tensor, "H W"]
    """Whether the target view saw it at all."""

    def take(self, picture: Float[Tensor, "h w c"], flat: bool = False) -> Float[Tensor, "H W c"]:
        """A picture of the target view, drawn on what this camera sees; 0 where the target did not see it.

        Args:
            picture: of the target view's shape, in any resolution.
            flat: take the nearest pixel instead of interpolating.
        """
        taken = F.grid_sample(
            rearrange(picture, "h w c -> 1 c h w"),
            self.places[None],
            mode="nearest" if flat else "bilinear",
            padding_mode="border",
            align_corners=False,
        )
        return rearrange(taken, "1 c h w -> h w c") * self.seen[..., None]

    def take_labels(self, labels: Int[Tensor, "h w"]) -> Int[Tensor, "H W"]:
        """As `take`, of whole numbers below 2**24."""
        return self.take(labels[..., None].float(), flat=True)[..., 0].round().to(labels.dtype)


def target_pixels(scene: ShownScene, camera: PinholeCamera, splat: Splatted) -> TargetPixels:
    """Follow every pixel of a camera to the target view.

    From the target's own position the depth does not matter, and everything in its picture is seen. From elsewhere a
    pixel is a point at the depth of what was splatted there, and what is hidden from the target is not seen.

    Args:
        scene: what is shown.
        camera: from where.
        splat: the scene from there.
    """
    target = scene.triplet.target.camera(0)
    pose, other = camera.camera_to_world, target.camera_to_world.to(camera.camera_to_world)
    depth = scene.target_splat.depth
    known = depth[scene.target_splat.alpha > SUPPORTED]
    middle = known.median() if len(known) else torch.ones_like(depth).max()
    in_place = bool((pose[:3, 3] - other[:3, 3]).norm() < 1e-3 * middle)
    z = torch.where(splat.alpha > SUPPORTED, splat.depth, middle)
    if in_place:
        z = torch.ones_like(z)
    rows = torch.arange(camera.height, device=z.device) + 0.5
    columns = torch.arange(camera.width, device=z.device) + 0.5
    x = (columns[None, :] - camera.intrinsics[0, 2]) / camera.intrinsics[0, 0] * z
    y = (rows[:, None] - camera.intrinsics[1, 2]) / camera.intrinsics[1, 1] * z
    points = torch.stack([x, y, z], dim=-1) @ pose[:3, :3].T
    offset = torch.zeros_like(pose[:3, 3]) if in_place else pose[:3, 3] - other[:3, 3]
    local = (points + offset) @ other[:3, :3]
    ahead = local[..., 2].clamp(min=1e-6)
    u = (local[..., 0] / ahead * target.intrinsics[0, 0] + target.intrinsics[0, 2]) / target.width
    v = (local[..., 1] / ahead * target.intrinsics[1, 1] + target.intrinsics[1, 2]) / target.height
    places = TargetPixels(torch.stack([2 * u - 1, 2 * v - 1], dim=-1), local[..., 2] > 0)
    seen = places.seen & (u >= 0) & (u < 1) & (v >= 0) & (v < 1)
    if not in_place:
        surface = places.take(depth[..., None], flat=True)[..., 0]
        seen &= (splat.alpha > SUPPORTED) & ((ahead - surface).abs() < SAME_SURFACE * ahead)
    return replace(places, seen=seen)
