"""What goes into a splat and what comes out: `Gaussians`, `PinholeCamera`, `Splatted`."""

from dataclasses import dataclass
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Gaussians:
    """Anisotropic 3D Gaussians in world space; features travel beside them, in the same order.

    Gaussian `i` has density `opacity * exp(-0.5 (x - mean)^T Sigma^-1 (x - mean))` with
    `Sigma = R(quat) diag(scale)^2 R(quat)^T` (3D Gaussian splatting, Kerbl et al. 2023, eq. 4 and 6).

    All fields share one floating dtype and one device.

    Raises:
        ValueError: The fields' shapes, dtypes or devices do not agree.
    """

    means: Float[Tensor, "n 3"]
    """Centres, world units (metres)."""
    quats: Float[Tensor, "n 4"]
    """Rotations as quaternions (w, x, y, z); normalised on use, and the zero quaternion means no rotation."""
    scales: Float[Tensor, "n 3"]
    """Standard deviations along the principal axes, world units (metres); not variances."""
    opacities: Float[Tensor, "n"]
    """Peak alpha, in [0, 1]."""
    harmonics: Optional[Float[Tensor, "n 3 d"]] = None
    """Colour as spherical harmonics (`harmonics.py`), where the reconstructor predicts one; splatting ignores it."""

    def __post_init__(self) -> None:
        fields = {"means": self.means, "quats": self.quats, "scales": self.scales, "opacities": self.opacities}
        n = self.means.shape[0] if self.means.ndim else 0
        expected = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,)}
        if self.harmonics is not None:
            fields["harmonics"] = self.harmonics
            expected["harmonics"] = (n, 3, self.harmonics.shape[-1])
        if any(tuple(field.shape) != expected[name] for name, field in fields.items()):
            found = ", ".join(f"{name} {tuple(field.shape)}" for name, field in fields.items())
            raise ValueError(f"Gaussians need means (n, 3), quats (n, 4), scales (n, 3), opacities (n,); got {found}")
        kinds = {(field.dtype, field.device) for field in fields.values()}
        if len(kinds) > 1 or not self.means.is_floating_point():
            found = ", ".join(f"{name} {field.dtype} on {field.device}" for name, field in fields.items())
            raise ValueError(f"Gaussians need one floating dtype and one device; got {found}")

    def __len__(self) -> int:
        return self.means.shape[0]

    @property
    def device(self) -> torch.device:
        """The device that holds every field."""
        return self.means.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of every field."""
        return self.means.dtype

    def covariances(self) -> Float[Tensor, "n 3 3"]:
        """Covariance matrices `R diag(scale)^2 R^T`, world units squared."""
        axes = rotation_matrices(self.quats) * self.scales[:, None, :]
        return axes @ axes.transpose(1, 2)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "Gaussians":
        """The same Gaussians on another device or in another floating dtype."""
        return Gaussians(
            means=self.means.to(device=device, dtype=dtype),
            quats=self.quats.to(device=device, dtype=dtype),
            scales=self.scales.to(device=device, dtype=dtype),
            opacities=self.opacities.to(device=device, dtype=dtype),
            harmonics=None if self.harmonics is None else self.harmonics.to(device=device, dtype=dtype),
        )


@dataclass(frozen=True)
class PinholeCamera:
    """A posed pinhole camera without distortion, in the OpenCV convention.

    A camera-space point (x, y, z) lands at pixel coordinates `(fx x / z + cx, fy y / z + cy)`; the centre of the pixel
    in row `r` and column `c` has the coordinates `(c + 0.5, r + 0.5)`.

    Raises:
        ValueError: A shape is wrong, or the image has no pixels.
    """

    camera_to_world: Float[Tensor, "4 4"]
    """Rigid pose: camera axes (x right, y down, z forward) and position, in world units."""
    intrinsics: Float[Tensor, "3 3"]
    """`[[fx, 0, cx], [0, fy, cy], [0, 0, 1]]` in pixels; no skew."""
    height: int
    """Image height in pixels."""
    width: int
    """Image width in pixels."""

    def __post_init__(self) -> None:
        if tuple(self.camera_to_world.shape) != (4, 4) or tuple(self.intrinsics.shape) != (3, 3):
            raise ValueError(
                "PinholeCamera needs camera_to_world (4, 4) and intrinsics (3, 3); got "
                f"{tuple(self.camera_to_world.shape)} and {tuple(self.intrinsics.shape)}"
            )
        if self.height < 1 or self.width < 1:
            raise ValueError(f"PinholeCamera needs at least one pixel; got {self.height} x {self.width}")

    def world_to_camera(self) -> Float[Tensor, "4 4"]:
        """Inverse of the rigid pose: `[R^T | -R^T t]`."""
        rotation = self.camera_to_world[:3, :3].T
        inverse = torch.eye(4, dtype=self.camera_to_world.dtype, device=self.camera_to_world.device)
        inverse[:3, :3] = rotation
        inverse[:3, 3] = -(rotation @ self.camera_to_world[:3, 3])
        return inverse

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "PinholeCamera":
        """The same camera on another device or in another floating dtype."""
        return PinholeCamera(
            camera_to_world=self.camera_to_world.to(device=device, dtype=dtype),
            intrinsics=self.intrinsics.to(device=device, dtype=dtype),
            height=self.height,
            width=self.width,
        )


@dataclass(frozen=True)
class Splatted:
    """One splatted view. With `w_i = alpha_i prod_{j before i} (1 - alpha_j)` the weight of Gaussian `i` at a pixel:"""

    features: Float[Tensor, "height width c"]
    """`sum_i w_i f_i`: premultiplied, that is on a zero background and not divided by alpha."""
    alpha: Float[Tensor, "height width"]
    """`sum_i w_i`, in [0, 1]."""
    depth: Float[Tensor, "height width"]
    """Expected z-depth `sum_i w_i z_i / max(alpha, 1e-10)` in world units; 0 where nothing was hit."""


def unit_quaternions(quats: Float[Tensor, "n 4"]) -> Float[Tensor, "n 4"]:
    """Quaternions (w, x, y, z) of norm 1; a zero quaternion becomes (1, 0, 0, 0), as it has no direction to keep."""
    norms = torch.linalg.vector_norm(quats, dim=1, keepdim=True)
    identity = torch.zeros_like(quats)
    identity[:, 0] = 1
    # Not divided by zero even where the result is not taken: its gradient would be NaN.
    return torch.where(norms > 0, quats / torch.where(norms > 0, norms, torch.ones_like(norms)), identity)


def rotation_matrices(quats: Float[Tensor, "n 4"]) -> Float[Tensor, "n 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z), which need not be normalised."""
    w, x, y, z = unit_quaternions(quats).unbind(dim=1)
    entries = [
        1 - 2 * (y * y + z * z),
        2 * (x * y - w * z),
        2 * (x * z + w * y),
        2 * (x * y + w * z),
        1 - 2 * (x * x + z * z),
        2 * (y * z - w * x),
        2 * (x * z - w * y),
        2 * (y * z + w * x),
        1 - 2 * (x * x + y * y),
    ]
    return torch.stack(entries, dim=1).view(-1, 3, 3)
