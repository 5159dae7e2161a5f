"""Input from which no geometry can be had: one error each, before anything is computed."""

import torch
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat.settings import STRIDE

MAX_ANGLE = 120.0
"""Degrees between the viewing directions beyond which two views are taken to look away from each other."""
MIN_FOCAL = 4.0
"""Pixels; anything shorter sees nearly half the world in 16 pixels, or is no focal length in pixels."""
MIN_BASELINE = 1e-4
"""Shortest useful distance between the cameras, as a share of near or of one world unit, whichever is less."""


class DegeneratePairError(InputError):
    """Two context views that cannot be matched; training skips and counts them."""


def check_inputs(images: Tensor, intrinsics: Tensor, camera_to_world: Tensor, near: Tensor, far: Tensor) -> None:
    """Check what MVSplat is called with.

    Raises:
        ValueError: shapes do not fit.
        InputError: images are too small, a number is not finite, or near and far are out of order.
        DegeneratePairError: no baseline, or cameras that face away from each other.
    """
    batch = tuple(images.shape[:2])
    expected = {
        "images": (images, (*batch, 3, *images.shape[-2:])),
        "intrinsics": (intrinsics, (*batch, 3, 3)),
        "camera_to_world": (camera_to_world, (*batch, 4, 4)),
        "near": (near, batch),
        "far": (far, batch),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if images.shape[1] != 2:
        raise InputError(f"MVSplat takes two context views, not {images.shape[1]}.")
    height, width = images.shape[-2:]
    if height < STRIDE or width < STRIDE:
        raise InputError(
            f"Images of {height}x{width} are too small for MVSplat: it needs at least {STRIDE}x{STRIDE} pixels "
            "(--pipeline.datamanager.image-size)."
        )
    if not images.is_floating_point() or images.amin() < -0.01 or images.amax() > 1.01:
        raise InputError("Images must be floating point with colours in [0, 1]; divide 8-bit colours by 255.")
    named = (("images", images), ("intrinsics", intrinsics), ("poses", camera_to_world), ("near", near), ("far", far))
    for name, tensor in named:
        if not torch.isfinite(tensor).all():
            raise InputError(f"The context views' {name} have a NaN or infinite value: check the dataset's {name}.")
    _check_intrinsics(intrinsics)
    if ((near <= 0) | (far <= near)).any():
        raise InputError(
            f"near {_some(near)} and far {_some(far)} of the plane sweep: 0 < near < far is needed "
            "(--pipeline.datamanager.near, --pipeline.datamanager.far)."
        )
    _check_poses(camera_to_world.double(), near.double())


def _check_intrinsics(intrinsics: Tensor) -> None:
    if (intrinsics[..., 0, 0] <= 0).any() or (intrinsics[..., 1, 1] <= 0).any():
        raise InputError("The context views' intrinsics have a focal length that is not positive: check the dataset.")
    if ((intrinsics[..., 2, :] - intrinsics.new_tensor([0, 0, 1])).abs() > 1e-6).any():
        raise InputError("The last row of the context views' intrinsics is not (0, 0, 1): check the dataset.")
    if (intrinsics[..., [0, 1], [0, 1]] < MIN_FOCAL).any():
        raise InputError(
            f"The context views' intrinsics have a focal length below {MIN_FOCAL:g} pixels: are they normalised by the "
            "image size? Give them in pixels."
        )


def _check_poses(poses: Tensor, near: Tensor) -> None:
    if ((poses[..., 3, :] - poses.new_tensor([0, 0, 0, 1])).abs() > 1e-6).any():
        raise InputError("The last row of the context views' poses is not (0, 0, 0, 1): check the dataset's poses.")
    rotations = poses[..., :3, :3]
    identity = torch.eye(3, dtype=poses.dtype, device=poses.device)
    off = (rotations @ rotations.transpose(-1, -2) - identity).abs().amax()
    if off > 1e-2 or (torch.linalg.det(rotations) < 0).any():
        raise InputError(
            "The context views' poses are not rigid: their rotation is scaled or mirrored. Check the dataset's poses."
        )
    baseline = (poses[:, 0, :3, 3] - poses[:, 1, :3, 3]).norm(dim=-1)
    if (baseline < MIN_BASELINE * near.amin(dim=1).clamp(max=1)).any():
        raise DegeneratePairError(
            f"The two context views have the same camera position (baseline {_some(baseline)}): depth needs parallax. "
            "Choose views further apart (--pipeline.datamanager.min-context-gap), or check the poses."
        )
    cosine = (poses[:, 0, :3, 2] * poses[:, 1, :3, 2]).sum(dim=-1)
    angle = torch.rad2deg(torch.acos(cosine.clamp(-1, 1)))
    if (angle > MAX_ANGLE).any():
        raise DegeneratePairError(
            f"The two context views look in opposite directions ({float(angle.max()):.0f} degrees apart): they see "
            "nothing in common. Choose views closer together (--pipeline.datamanager.max-context-gap), or check the "
            "poses."
        )


def _some(values: Tensor) -> str:
    """The first few values, for a message."""
    numbers = [f"{value:g}" for value in values.flatten()[:4].tolist()]
    return numbers[0] if len(set(numbers)) == 1 else f"[{', '.join(numbers)}]"
