"""From a dataset on disk to view triplets and Gaussians."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Optional, Type

import torch
from nerfstudio.utils.rich_utils import CONSOLE

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.mvsplat.reconstructor import check_given, load_reconstructor
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.snd_triplets import TripletDataManager, TripletDataManagerConfig
from snd_nerfstudio.splatting import Gaussians


@dataclass
class SnDDataManagerConfig(TripletDataManagerConfig):
    """View triplets from many scenes, and the frozen reconstructor that turns their contexts into Gaussians."""

    _target: Type = field(default_factory=lambda: SnDDataManager)
    """Target class to instantiate."""
    reconstructor: Literal["mvsplat", "depth"] = "mvsplat"
    """What turns the context views into Gaussians: a trained MVSplat, or their depth maps."""
    reconstructor_checkpoint: Optional[Path] = None
    """MVSplat's weights: re10k.ckpt as released, a run of ns-train mvsplat, or an export of one."""


class SnDDataManager(TripletDataManager):
    """Triplets, and the Gaussians of their contexts."""

    config: SnDDataManagerConfig

    @cached_property
    def reconstructor(self):  # a `Reconstructor`; tests check annotations at run time, which a protocol does not allow
        """What turns the context views into Gaussians; no submodule, so that checkpoints do not hold its weights."""
        if self.config.reconstructor == "depth":
            return DepthReconstructor()
        reconstructor = load_reconstructor(self.config.reconstructor_checkpoint, *self.depth_range)
        CONSOLE.log(
            f"MVSplat of {reconstructor.network.checkpoint}; depths from {reconstructor.near:g} to "
            f"{reconstructor.far:g}, {reconstructor.network.settings.geometry} geometry."
        )
        return reconstructor

    def _check_config(self) -> None:
        super()._check_config()
        checkpoint = self.config.reconstructor_checkpoint
        if self.config.reconstructor == "mvsplat":
            check_given(checkpoint)
        elif checkpoint is not None:
            raise InputError(
                "--pipeline.datamanager.reconstructor-checkpoint is for MVSplat, and the reconstructor is "
                f"{self.config.reconstructor}: leave one of the two."
            )
        elif self.config.near is not None or self.config.far is not None or self.config.bounds == "scene":
            raise InputError(
                "--pipeline.datamanager.near, far and bounds are for MVSplat, and the reconstructor is "
                f"{self.config.reconstructor}: leave them."
            )

    @property
    def needs_depth(self) -> bool:
        """Whether the reconstructor reads the contexts' depth maps, so that every frame must have one."""
        return self.config.reconstructor == "depth"

    @property
    def needs_overlap(self) -> bool:
        """Whether the reconstructor matches the contexts with each other."""
        return self.config.reconstructor == "mvsplat"

    def reconstruct(self, context: Views) -> Gaussians:
        """Gaussians of a pair of context views, without gradient.

        Raises:
            DegeneratePairError: the reconstructor cannot match the two.
        """
        with torch.no_grad():
            return self.reconstructor(context)
