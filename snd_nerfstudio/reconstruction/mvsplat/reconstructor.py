"""MVSplat as the reconstructor of `ns-train snd`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import PUBLISHED, find_checkpoint
from snd_nerfstudio.reconstruction.mvsplat.model import MVSplat
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import Gaussians


@dataclass(frozen=True)
class MVSplatReconstructor:
    """A frozen MVSplat.

    The network is not indifferent to units: it adds an offset to inverse depths, and has learned how large it should
    be. For another `near` than the one it was trained with, the scene is therefore scaled until its `near` is that one,
    and the Gaussians are scaled back.
    """

    network: MVSplat
    """In eval mode, without gradients."""
    near: float
    """Smallest depth of the plane sweep, world units."""
    far: float
    """Largest depth, world units."""
    needs_depth: bool = False

    @property
    def description(self) -> str:
        """Kind and settings."""
        return f"{self.network.settings} {self.near!r} {self.far!r}"

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's parameters."""
        return dict(self.network.named_parameters())

    def __call__(self, views: Views) -> Gaussians:
        """Reconstruct two views.

        Raises:
            InputError: they cannot be matched (no baseline, looking in opposite directions), or are too small.
        """
        network = self.network.to(views.images.device)
        scale = network.settings.near / self.near
        poses = views.camera_to_worlds.clone()
        poses[:, :3, 3] *= scale
        near = views.images.new_full((1, len(views)), network.settings.near)
        far = near.new_full(near.shape, self.far * scale)
        gaussians = network(views.images[None], views.intrinsics[None], poses[None], near, far).item(0)
        return replace(gaussians, means=gaussians.means / scale, scales=gaussians.scales / scale)


def check_given(checkpoint: Optional[Path]) -> Path:
    """The checkpoint that a user gave.

    Raises:
        InputError: none was given; the message says where there is one, and what else there is.
    """
    if checkpoint is None:
        raise InputError(
            "The reconstructor is MVSplat, and it needs weights: --pipeline.datamanager.reconstructor-checkpoint PATH. "
            f"The released ones (`re10k.ckpt`) are linked from {PUBLISHED}; a run of `ns-train mvsplat` on your own "
            "data (its folder) does as well. For data with depth maps there is --pipeline.datamanager.reconstructor "
            "depth, which needs no weights."
        )
    return find_checkpoint(checkpoint)


def load_reconstructor(checkpoint: Optional[Path], near: Optional[float], far: Optional[float]) -> MVSplatReconstructor:
    """A frozen MVSplat from a checkpoint.

    Args:
        checkpoint: see `MVSplat.from_checkpoint`.
        near: smallest depth, world units. None: what the checkpoint was trained with.
        far: largest depth. None: what the checkpoint was trained with.

    Raises:
        InputError: there is no checkpoint, it does not fit, or near and far are out of order.
    """
    network = MVSplat.from_checkpoint(check_given(checkpoint)).eval().requires_grad_(False)
    near = network.settings.near if near is None else near
    far = network.settings.far if far is None else far
    if not 0 < near < far < math.inf:
        raise InputError(
            f"--pipeline.datamanager.near {near:g} and --pipeline.datamanager.far {far:g}: 0 < near < far is needed."
        )
    network.to(memory_format=torch.channels_last)  # type: ignore
    return MVSplatReconstructor(network, near, far)
