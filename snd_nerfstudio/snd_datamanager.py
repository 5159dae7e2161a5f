"""From a dataset on disk to view triplets and Gaussians."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Optional, Type

import torch
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from snd_nerfstudio.backbones.weights import fingerprint
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.mvsplat.reconstructor import (
    check_given,
    load_reconstructor,
)
from snd_nerfstudio.scenes.frames import Frames
from snd_nerfstudio.scenes.triplets import TripletIndex
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.snd_triplets import TripletDataManager, TripletDataManagerConfig
from snd_nerfstudio.splatting import Gaussians
from snd_nerfstudio.splatting.rasterizer import splatting_engine
from snd_nerfstudio.supervision.operator_cache import OperatorCache, content_digest


@dataclass
class SnDDataManagerConfig(TripletDataManagerConfig):
    """View triplets from many scenes, and the frozen reconstructor that turns their contexts into Gaussians."""

    _target: Type = field(default_factory=lambda: SnDDataManager)
    """Target class to instantiate."""
    reconstructor: Literal["mvsplat", "depth"] = "mvsplat"
    """What turns the context views into Gaussians: a trained MVSplat, or their depth maps."""
    reconstructor_checkpoint: Optional[Path] = None
    """MVSplat's weights: re10k.ckpt as released, a run of ns-train mvsplat, or an export of one."""
    operator_cache: Optional[Path] = None
    """Folder that keeps what geometry and masks do to tokens, per triplet; what is in it needs no reconstruction. None:
    nothing is kept. snd-precompute fills it ahead of training."""
    operator_cache_limit: float = 50.0
    """Most gigabytes that the folder may hold; what comes later is not kept."""


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
        if self.config.operator_cache_limit <= 0:
            raise InputError("--pipeline.datamanager.operator-cache-limit must be above 0 gigabytes.")
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

    @cached_property
    def operators(self) -> Optional[OperatorCache]:
        """The cache of token operators, or None."""
        if self.config.operator_cache is None:
            return None
        return OperatorCache(self.config.operator_cache, self.config.operator_cache_limit * 1e9, CONSOLE.log)

    def load(self, frames: Frames, index: TripletIndex, with_depth: bool = False) -> ViewTriplet:
        """Read a triplet's files, and hash them where operators are cached; see `TripletDataManager.load`."""
        triplet = super().load(frames, index, with_depth)
        if self.config.operator_cache is None:
            return triplet
        # measured depth that the reconstructor does not read makes no difference to the operator
        context = triplet.context if self.needs_depth else replace(triplet.context, depths=None)
        return replace(triplet, digest=content_digest(replace(triplet, context=context)))

    @cached_property
    def reconstructor_description(self) -> str:
        """All that decides what is made of two views: the reconstructor's kind and settings, a hash of its weights,
        and what splats."""
        weights = bytes(self.reconstructor_fingerprint.tolist()).hex()
        return f"{self.reconstructor.description} {weights} {splatting_engine(torch.device(self.device))}"

    @cached_property
    def reconstructor_fingerprint(self) -> Tensor:
        """Hash of the reconstructor's weights, 32 bytes; of none where it has none."""
        return fingerprint(dict(self.reconstructor.weights))

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
