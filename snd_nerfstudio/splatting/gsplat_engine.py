"""The CUDA engine: gsplat's `rasterization`, called (gsplat is Apache-2.0, https://github.com/nerfstudio-project/gsplat)."""

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted, unit_quaternions
from snd_nerfstudio.splatting.projection import BLUR_VARIANCE, TILE_SIZE

CHANNELS_PER_PASS = 32
"""gsplat composites this many channels per kernel call; its own documentation calls wider ones slow."""


def splat_gsplat(
    gaussians: Gaussians, camera: PinholeCamera, features: Float[Tensor, "n c"], near: float, far: float
) -> Splatted:
    """Splat with gsplat 1.4, 1.5 or 1.6; the first call may compile gsplat's kernels, which takes minutes.

    gsplat 1.4.0 cuts a Gaussian off at the tiles of its 3-sigma square, as the CPU engines here do; 1.5 and later use
    a square that depends on opacity and never cuts a hit with alpha >= 1/255 off, so that a few pixels differ there.

    Where gradients are enabled they are gsplat's own, to the same inputs as those of the CPU engine.

    Args:
        gaussians: The Gaussians, float32 on CUDA.
        camera: The camera, float32 on the same device.
        features: One row per Gaussian, float32 on the same device.
        near: Smallest z-depth kept, world units.
        far: Largest z-depth kept, world units.

    Returns:
        The splatted view.

    Raises:
        ValueError: The tensors are not float32 on CUDA.
    """
    if gaussians.device.type != "cuda":
        raise ValueError(f"engine gsplat needs a CUDA tensor; use engine='numba' for tensors on {gaussians.device}")
    if not gaussians.dtype == features.dtype == torch.float32:
        raise ValueError(
            f"engine gsplat computes in float32; got {gaussians.dtype} Gaussians, {features.dtype} features"
        )
    from gsplat.rendering import rasterization

    channels = features.shape[1]
    # gsplat has no kernel without channels: an unused one keeps alpha and depth.
    colors = features if channels else features.new_zeros(len(gaussians), 1)
    rendered, alphas, _ = rasterization(
        means=gaussians.means.contiguous(),
        quats=unit_quaternions(gaussians.quats).contiguous(),
        scales=gaussians.scales.contiguous(),
        opacities=gaussians.opacities.contiguous(),
        colors=colors.contiguous(),
        viewmats=camera.world_to_camera()[None].contiguous(),
        Ks=camera.intrinsics[None].contiguous(),
        width=camera.width,
        height=camera.height,
        near_plane=near,
        far_plane=far,
        eps2d=BLUR_VARIANCE,
        tile_size=TILE_SIZE,
        packed=False,
        render_mode="RGB+ED",
        channel_chunk=CHANNELS_PER_PASS,
    )
    return Splatted(features=rendered[0, :, :, :channels], alpha=alphas[0, :, :, 0], depth=rendered[0, :, :, -1])
