"""Posed images as tensors, and the triplet one training step looks at."""

from dataclasses import dataclass, replace
from typing import Optional

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snd_nerfstudio.splatting import PinholeCamera


@dataclass(frozen=True)
class Views:
    """Posed images of one scene, all of one size, in the package's conventions (docs/conventions.md)."""

    images: Float[Tensor, "v 3 H W"]
    """Colours in [0, 1]."""
    camera_to_worlds: Float[Tensor, "v 4 4"]
    """OpenCV camera-to-world (x right, y down, z forward); translation in world units (metres where known)."""
    intrinsics: Float[Tensor, "v 3 3"]
    """In pixels of ``images``; pixel centres at +0.5."""
    masks: Optional[Int[Tensor, "v H W"]] = None
    """Instance ids, compact per image, 0 = unlabelled; None where masks are not used."""
    depths: Optional[Float[Tensor, "v H W"]] = None
    """Depth along z in world units, 0 = no value; None where depth is not used."""
    names: tuple[str, ...] = ()
    """File name of each view, for messages."""

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def height(self) -> int:
        """Rows of every image."""
        return self.images.shape[-2]

    @property
    def width(self) -> int:
        """Columns of every image."""
        return self.images.shape[-1]

    def camera(self, index: int) -> PinholeCamera:
        """The camera of one view."""
        return PinholeCamera(self.camera_to_worlds[index], self.intrinsics[index], self.height, self.width)

    def mask(self, index: int) -> Optional[Int[Tensor, "H W"]]:
        """The instance mask of one view, or None."""
        return None if self.masks is None else self.masks[index]

    def to(self, device: torch.device | str) -> "Views":
        """The same views on another device."""
        tensors = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class ViewTriplet:
    """Two context views that are lifted and one target view that is splatted to (paper section 3.1)."""

    context: Views
    """The two context views."""
    target: Views
    """The target view; several of them where a method learns from more than one (photometric training)."""
    scene: str
    """Name of the scene, for messages."""
    digest: str = ""
    """Hash of what the token operator depends on (`supervision.operator_cache`); empty where not asked for."""

    def to(self, device: torch.device | str) -> "ViewTriplet":
        """The same triplet on another device."""
        return replace(self, context=self.context.to(device), target=self.target.to(device))

    def describe(self) -> str:
        """Scene and file names, for messages."""
        return f"{self.scene}: {', '.join(self.context.names)} -> {', '.join(self.target.names)}"
