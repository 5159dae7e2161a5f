"""`rasterize`: the one signature through which the rest of the program splats."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.splatting.gaussians import Gaussians, PinholeCamera, Splatted
from snd_nerfstudio.splatting.projection import FAR, NEAR

Engine = Literal["auto", "gsplat", "numba", "reference"]
Footprint = Literal["exact", "squared"]


def rasterize(
    gaussians: Gaussians,
    camera: PinholeCamera,
    features: Float[Tensor, "n c"],
    *,
    engine: Engine = "auto",
    footprint: Footprint = "exact",
    near: float = NEAR,
    far: float = FAR,
) -> Splatted:
    """Alpha-composite Gaussians, with any number of feature channels, into one view.

    At a pixel with centre u, over the Gaussians i in order of z-depth (ties: order of index):

        alpha_i = min(0.999, opacity_i exp(-0.5 (u - mean_i)^T Sigma'_i^-1 (u - mean_i))),   skipped below 1/255
        w_i = alpha_i T_i,   T_{i+1} = T_i (1 - alpha_i),   ended for good before T would fall to 1e-4 or below
        features = sum_i w_i f_i,   alpha = sum_i w_i,   depth = sum_i w_i z_i / max(alpha, 1e-10)

    (3D Gaussian splatting, Kerbl et al. 2023, eq. 3; conventions of gsplat 1.4, see `projection.py`.) The result is
    linear in the features.

    Gradients flow from all three results to means, quats, scales, opacities and features, as far as these require any.
    Which Gaussians hit a pixel, and in which order, is taken as given: nothing flows through the cap of alpha, nor to a
    Gaussian that is culled or nowhere reaches 1/255. The camera is a constant. Where no gradient is required, or under
    `torch.no_grad()`, nothing is kept for a backward pass; the values are the same.

    Args:
        gaussians: n Gaussians, float32 or float64.
        camera: The view to splat into; brought to the dtype and device of the Gaussians.
        features: One row of c channels per Gaussian (c may be 0), same dtype and device. Not checked for NaN: a NaN
            spreads to the pixels that its Gaussian touches.
        engine: `auto` is `gsplat` for CUDA tensors and `numba` for CPU tensors; `reference` is the slow twin.
        footprint: `exact` uses the scales as they are. `squared` reproduces a defect of the released SnD code, which
            hands the covariance's eigenvalues (variances) to a rasteriser that expects standard deviations, so that
            every scale s acts as s**2 and nearly every footprint shrinks to the 0.3 px^2 blur. That code also turns
            eigenvector frames that happen to be left-handed into the identity; the sign of an eigenvector is arbitrary,
            so this cannot be reproduced and the Gaussian's own rotation is kept here.
        near: Gaussians with a smaller z-depth are culled, world units, > 0.
        far: Gaussians with a larger z-depth are culled, world units.

    Returns:
        Premultiplied features, alpha and expected depth, in the dtype and on the device of the Gaussians.

    Raises:
        ValueError: Shapes, dtypes or devices disagree; Gaussians or camera are not finite; near and far are out of
            order; the intrinsics have skew; the engine or the footprint is unknown or does not fit the device.
        NotImplementedError: The camera requires a gradient while gradients are enabled.
    """
    _check_arguments(gaussians, features, engine, footprint, near, far)
    _check_constant(camera)
    with_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad
        for tensor in (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, features)
    )
    camera = camera.to(device=gaussians.device, dtype=gaussians.dtype)
    check_values(gaussians, camera)
    if engine == "auto":
        engine = "gsplat" if gaussians.device.type == "cuda" else "numba"
    if footprint == "squared":
        gaussians = replace(gaussians, scales=gaussians.scales**2)

    if len(gaussians) == 0:
        return _empty_view(gaussians, camera, features)

    # Engines are imported on first use: importing this package must stay light, and neither engine is everywhere.
    if engine == "gsplat":
        from snd_nerfstudio.splatting.gsplat_engine import splat_gsplat as splat
    elif engine == "numba" and with_gradient:
        from snd_nerfstudio.splatting.numba_gradients import splat_numba_with_gradients as splat
    elif engine == "numba":
        from snd_nerfstudio.splatting.numba_engine import splat_numba as splat
    else:
        from snd_nerfstudio.splatting.reference import splat_reference as splat
    with torch.set_grad_enabled(with_gradient):
        return splat(gaussians, camera, features, near, far)


def available_engines() -> tuple[str, ...]:
    """Names of the engines that can run on this machine, the fastest first."""
    engines = []
    if torch.cuda.is_available() and importlib.util.find_spec("gsplat") is not None:
        engines.append("gsplat")
    if importlib.util.find_spec("numba") is not None:
        engines.append("numba")
    return (*engines, "reference")


def _empty_view(gaussians: Gaussians, camera: PinholeCamera, features: Tensor) -> Splatted:
    """The view of no Gaussians, attached to those inputs that require a gradient (an empty one)."""
    inputs = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, features)
    nothing = torch.cat([tensor.reshape(-1) for tensor in inputs]).sum()
    size = camera.height, camera.width
    return Splatted(
        features=features.new_zeros(*size, features.shape[1]) + nothing,
        alpha=features.new_zeros(size) + nothing,
        depth=features.new_zeros(size) + nothing,
    )


def _check_arguments(
    gaussians: Gaussians, features: Tensor, engine: str, footprint: str, near: float, far: float
) -> None:
    """Raise ValueError for arguments that are wrong by their shape, kind or name."""
    if features.ndim != 2 or features.shape[0] != len(gaussians):
        raise ValueError(
            f"features need shape ({len(gaussians)}, c), one row per Gaussian; got {tuple(features.shape)}"
        )
    if features.dtype != gaussians.dtype or features.device != gaussians.device:
        raise ValueError(
            f"features are {features.dtype} on {features.device}, "
            f"but the Gaussians are {gaussians.dtype} on {gaussians.device}"
        )
    if gaussians.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"splatting computes in float32 or float64; got {gaussians.dtype}")
    if engine not in ("auto", "gsplat", "numba", "reference"):
        raise ValueError(f"unknown engine {engine!r}; choose auto, gsplat, numba or reference")
    if footprint not in ("exact", "squared"):
        raise ValueError(f"unknown footprint {footprint!r}; choose exact or squared")
    if not 0 < near < far:
        raise ValueError(f"near and far need 0 < near < far; got near={near}, far={far}")
    if engine == "numba" and gaussians.device.type != "cpu":
        raise ValueError(f"engine numba needs CPU tensors; use engine='gsplat' for tensors on {gaussians.device}")
    if engine == "gsplat" and gaussians.device.type != "cuda":
        raise ValueError(f"engine gsplat needs a CUDA tensor; use engine='numba' for tensors on {gaussians.device}")


def _check_constant(camera: PinholeCamera) -> None:
    """Raise NotImplementedError rather than cut a gradient off in silence; under `torch.no_grad()` none is expected."""
    if not torch.is_grad_enabled():
        return
    inputs = {"camera_to_world": camera.camera_to_world, "intrinsics": camera.intrinsics}
    needing = [name for name, tensor in inputs.items() if tensor.requires_grad]
    if needing:
        raise NotImplementedError(
            f"rasterize has no gradient to the camera, but its {' and '.join(needing)} requires one; detach it"
        )


def splatting_engine(device: torch.device) -> str:
    """What splats tensors of a device, with its version where that may change which hits count."""
    return f"gsplat {importlib.metadata.version('gsplat')}" if device.type == "cuda" else "numba"


def check_values(gaussians: Gaussians, camera: PinholeCamera) -> None:
    """Raise ValueError for values with which no image is defined."""
    fields = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities)
    # One sum per field is non-finite if any entry is (or if the sum overflows, which the exact count then forgives).
    if not all(bool(torch.isfinite(field.sum())) for field in fields):
        finite = torch.stack([torch.isfinite(field).reshape(len(gaussians), -1).all(dim=1) for field in fields]).all(
            dim=0
        )
        broken = int((~finite).sum())
        if broken:
            raise ValueError(f"{broken} of {len(gaussians)} Gaussians have a NaN or infinite parameter")
    if not (torch.isfinite(camera.camera_to_world).all() and torch.isfinite(camera.intrinsics).all()):
        raise ValueError("the camera's pose or intrinsics have a NaN or infinite entry")
    if bool(camera.intrinsics[0, 1] != 0):
        raise ValueError(f"skewed pixels are not supported; intrinsics[0, 1] is {float(camera.intrinsics[0, 1])}")
