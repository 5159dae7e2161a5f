"""Views to pixel-aligned Gaussians: the protocol and its implementations."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import Gaussians


class Reconstructor(Protocol):
    """A frozen, feed-forward map from context views to Gaussians (paper section 3.2, equation 1).

    The result has one Gaussian per context pixel in the order (view, row, column), which is what makes lifting a
    lookup: Gaussian ``i`` carries the feature of context pixel ``i``.
    """

    @property
    def needs_depth(self) -> bool:
        """Whether ``views.depths`` must be there."""
        ...

    @property
    def description(self) -> str:
        """Kind and settings: all but `weights` that decides what is reconstructed."""
        ...

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """What was learned, by name; empty where nothing was."""
        ...

    def __call__(self, views: Views) -> Gaussians:
        """Reconstruct ``v * H * W`` Gaussians in world coordinates."""
        ...
