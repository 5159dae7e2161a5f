"""The model's outputs for any camera: what viewer and renderer show."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from snd_nerfstudio.reconstruction.quality import gaussian_colours
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, Splatted, rasterize
from snd_nerfstudio.splatting.projection import BLUR_VARIANCE
from snd_nerfstudio.viewer.pca import PCABasis

OUTPUT_CHANNELS = {"rgb": 3, "depth": 1, "accumulation": 1, "splatted_pca": 3, "student_pca": 3}
"""Every output and its channels, in the order of the viewer's menu."""


@dataclass(frozen=True)
class ShownScene:
    """The Gaussians on display and the views they come from."""

    triplet: ViewTriplet
    gaussians: Gaussians


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
    covered = splat.alpha[..., None] > 1e-3
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


def render_outputs(
    scene: ShownScene,
    camera: PinholeCamera,
    gaussian_pca: Float[Tensor, "n 3"],
    basis: PCABasis,
    student: Callable[[Float[Tensor, "1 3 H W"]], Float[Tensor, "1 h w c"]],
) -> dict[str, Tensor]:
    """Render everything for one camera, at the camera's size; every value is finite.

    Splatting is linear, so features are projected to three channels before they are splatted, not after.

    Args:
        scene: what to render.
        camera: from where.
        gaussian_pca: the Gaussians' features, projected on the basis.
        basis: colours of features.
        student: tokens of an image in [0, 1].
    """
    colours = gaussian_colours(scene.gaussians, scene.triplet.context, camera)
    splat = rasterize(without_gaps(scene, camera), camera, torch.cat([colours, gaussian_pca], dim=1))
    alpha = splat.alpha[..., None]
    rgb = splat.features[..., :3].clamp(0, 1)
    splatted = basis.colour(splat.features[..., 3:] / alpha.clamp(min=1e-3)) * alpha
    size = (scene.triplet.target.height, scene.triplet.target.width)
    seen = F.interpolate(rearrange(rgb, "H W c -> 1 c H W"), size=size, mode="bilinear", antialias=True)
    tokens = basis.colour(basis.project(student(seen.clamp(0, 1))))
    grown = F.interpolate(rearrange(tokens, "1 h w c -> 1 c h w"), size=(camera.height, camera.width), mode="nearest")
    outputs = {
        "rgb": rgb,
        "depth": ray_distance(splat, camera),
        "accumulation": alpha,
        "splatted_pca": splatted,
        "student_pca": rearrange(grown, "1 c H W -> H W c"),
    }
    return {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in outputs.items()}
