"""From a dataset on disk to view triplets and Gaussians."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, Type

import torch

from snd_nerfstudio.reconstruction import Reconstructor
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.snd_triplets import TripletDataManager, TripletDataManagerConfig
from snd_nerfstudio.splatting import Gaussians

RECONSTRUCTORS: dict[str, Callable[[], Reconstructor]] = {"depth": DepthReconstructor}


@dataclass
class SnDDataManagerConfig(TripletDataManagerConfig):
    """View triplets from many scenes, and the frozen reconstructor that turns their contexts into Gaussians."""

    _target: Type = field(default_factory=lambda: SnDDataManager)
    """Target class to instantiate."""
    reconstructor: Literal["depth"] = "depth"
    """What turns the context views into Gaussians: their depth maps."""


class SnDDataManager(TripletDataManager):
    """Triplets, and the Gaussians of their contexts."""

    config: SnDDataManagerConfig

    @cached_property
    def reconstructor(self):  # a `Reconstructor`; tests check annotations at run time, which a protocol does not allow
        """What turns the context views into Gaussians; no submodule, so that checkpoints do not hold its weights."""
        return RECONSTRUCTORS[self.config.reconstructor]()

    @property
    def needs_depth(self) -> bool:
        """Whether the reconstructor reads the contexts' depth maps, so that every frame must have one."""
        return self.reconstructor.needs_depth

    def reconstruct(self, context: Views) -> Gaussians:
        """Gaussians of a pair of context views, without gradient."""
        with torch.no_grad():
            return self.reconstructor(context)
