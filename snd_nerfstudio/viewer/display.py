"""What is on display, and what must be remembered from one picture to the next."""

from collections.abc import Callable
from typing import Optional

import torch
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera
from snd_nerfstudio.supervision.dense import lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.guarded import GuardedDisplay
from snd_nerfstudio.viewer.outputs import OUTPUT_CHANNELS, ShownScene, render_outputs
from snd_nerfstudio.viewer.pca import PCABasis, fit_pca

Tokens = Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b h w c"]]


class Display(GuardedDisplay):
    """One triplet's Gaussians and the colours of their features.

    Args:
        teacher: tokens of the teacher.
        student: tokens of the student.
        target_tokens: the tokens a triplet's student is to predict, as rows.
        settings: how the teacher's tokens are lifted.
    """

    CHANNELS = OUTPUT_CHANNELS

    def __init__(
        self,
        teacher: Tokens,
        student: Tokens,
        target_tokens: Callable[[ViewTriplet, Gaussians], Float[Tensor, "n c"]],
        settings: SupervisionSettings,
    ) -> None:
        self._teacher, self._student, self._target_tokens = teacher, student, target_tokens
        self._settings = settings
        self.scene: Optional[ShownScene] = None
        self._basis: Optional[PCABasis] = None
        self._gaussian_pca: Optional[Tensor] = None

    def show(self, triplet: ViewTriplet, gaussians: Gaussians) -> None:
        """Put a triplet's Gaussians on display."""
        self.scene = ShownScene(triplet, gaussians)
        self._gaussian_pca = None

    def refit(self) -> None:
        """Fit the colours' basis anew at the next picture: features drift away from it while they are trained."""
        self._basis = None
        self._gaussian_pca = None

    def teacher_changed(self) -> None:
        """Forget the teacher's tokens; the colours' basis stays."""
        self._gaussian_pca = None

    @torch.no_grad()
    def basis(self) -> PCABasis:
        """The joint basis of context, target and student tokens of the shown triplet: fitted once, then frozen."""
        if self._basis is None:
            assert self.scene is not None
            triplet = self.scene.triplet
            context, student = self._teacher(triplet.context.images), self._student(triplet.target.images)
            target = self._target_tokens(triplet, self.scene.gaussians)
            self._basis = fit_pca(torch.cat([context.flatten(0, 2), student.flatten(0, 2), target]))
        return self._basis

    @torch.no_grad()
    def _projected(self, scene: ShownScene, basis: PCABasis) -> Float[Tensor, "n 3"]:
        projected = self._gaussian_pca
        if projected is None:
            context = scene.triplet.context
            tokens = basis.project(self._teacher(context.images))
            projected = lift(tokens, context.masks, (context.height, context.width), self._settings).features
            self._gaussian_pca = projected
        return projected

    def _pictures(self, camera: PinholeCamera) -> dict[str, Tensor]:
        if self.scene is None:
            raise RuntimeError("no triplet is shown yet")
        basis = self.basis()
        return render_outputs(self.scene, camera, self._projected(self.scene, basis), basis, self._student)
