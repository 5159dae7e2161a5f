"""What is on display while a reconstructor is trained: the shown triplet, as the network reconstructs it now."""

from collections.abc import Callable, Set
from typing import Optional

import torch
from torch import Tensor

from snd_nerfstudio.reconstruction.quality import gaussian_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.viewer.guarded import GuardedDisplay
from snd_nerfstudio.viewer.outputs import ShownScene, ray_distance, without_gaps


class ReconstructionDisplay(GuardedDisplay):
    """Rendered colours and depth of one triplet.

    Args:
        reconstruct: Gaussians of two context views.
    """

    CHANNELS = {"rgb": 3, "depth": 1, "accumulation": 1}

    def __init__(self, reconstruct: Callable[[Views], Gaussians]) -> None:
        self._reconstruct = reconstruct
        self.triplet: Optional[ViewTriplet] = None
        self._scene: Optional[ShownScene] = None

    def show(self, triplet: ViewTriplet) -> None:
        """Put a triplet on display."""
        self.triplet = triplet
        self._scene = None

    def changed(self) -> None:
        """Forget the Gaussians: the network has been trained since."""
        self._scene = None

    def scene(self) -> ShownScene:
        """The shown triplet and its Gaussians, reconstructed when they are asked for.

        Raises:
            RuntimeError: nothing is shown yet.
        """
        scene = self._scene
        if scene is None:
            if self.triplet is None:
                raise RuntimeError("no triplet is shown yet")
            scene = ShownScene(self.triplet, self._reconstruct(self.triplet.context))
            self._scene = scene
        return scene

    def _pictures(self, camera: PinholeCamera, wanted: Set[str]) -> dict[str, Tensor]:
        scene = self.scene()
        colours = gaussian_colours(scene.gaussians, scene.triplet.context, camera)
        splat = rasterize(without_gaps(scene, camera), camera, colours)
        outputs = {
            "rgb": splat.features.clamp(0, 1),
            "depth": ray_distance(splat, camera),
            "accumulation": splat.alpha[..., None],
        }
        return {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in outputs.items()}
