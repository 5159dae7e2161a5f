"""What is on display, and what must be remembered from one picture to the next."""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from functools import cached_property
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.reconstruction.quality import gaussian_colours
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, Splatted, rasterize
from snd_nerfstudio.supervision.dense import lift
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.clusters import Clusters, fit_clusters
from snd_nerfstudio.viewer.guarded import GuardedDisplay
from snd_nerfstudio.viewer.matching import Picked, ViewMatch, match_views, pick
from snd_nerfstudio.viewer.outputs import (
    EMPTY,
    ShownScene,
    TargetPixels,
    ray_distance,
    target_colours,
    target_pixels,
    without_gaps,
)
from snd_nerfstudio.viewer.pca import PCABasis, fit_pca, follow_pca
from snd_nerfstudio.viewer.pictures import enlarge, overlay_masks

Tokens = Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b h w c"]]

COLOUR_MOMENTUM = 0.9
"""Share of the old basis that colours keep when they follow the training."""


class Display(GuardedDisplay):
    """One triplet's Gaussians and the colours of their features.

    Args:
        backbones: tokens of `teacher`, `student` and `original`.
        target_tokens: the tokens a triplet's student is to predict, and which of them it learns from.
        settings: how the teacher's tokens are lifted.
    """

    CHANNELS = {
        "rgb": 3,
        "depth": 1,
        "accumulation": 1,
        "splatted_pca": 3,
        "blended_pca": 3,
        "student_pca": 3,
        "cosine_error": 1,
        "similarity": 1,
        "clusters": 3,
    }

    def __init__(
        self,
        backbones: Mapping[str, Tokens],
        target_tokens: Callable[[ViewTriplet, Gaussians], tuple[Float[Tensor, "h w c"], Tensor]],
        settings: SupervisionSettings,
    ) -> None:
        self._backbones, self._target_tokens = backbones, target_tokens
        self.settings = settings
        self.scene: Optional[ShownScene] = None
        self.features_of: str = "teacher"
        """Whose tokens are lifted and splatted."""
        self.student_sees: Literal["rendered view", "target image"] = "rendered view"
        """What the student's outputs are of."""
        self.blending = settings.blending
        self.mask_opacity = 0.0
        """How strongly the target's instance masks are drawn over what is seen; 0 = not at all."""
        self.cluster_count = 8
        self.follow = False
        """Whether the colours' basis follows the training, or stays as it was fitted."""
        self.picked: Optional[Picked] = None
        """The clicked point."""
        self._basis: Optional[PCABasis] = None
        self._basis_is_old = False
        self._clusters: Optional[Clusters] = None
        self._remembered: dict[str, Tensor] = {}

    # ------------------------------------------------------------------ what changes

    def show(self, triplet: ViewTriplet, gaussians: Gaussians) -> None:
        """Put a triplet's Gaussians on display."""
        self.scene = ShownScene(triplet, gaussians)
        self.picked = None
        self._remembered = {}

    def refit(self) -> None:
        """Fit colours and clusters anew at the next picture: features drift away from them while they are trained."""
        self._basis, self._basis_is_old, self._clusters = None, False, None
        self._remembered = {}

    def changed(self) -> None:
        """Forget all tokens: teacher and student have been trained since. Colours and clusters stay, or follow."""
        self._basis_is_old = True
        self._remembered = {}

    def forget_clusters(self) -> None:
        """Fit clusters anew at the next picture."""
        self._clusters = None
        self._remembered.pop("clusters", None)

    def forget_point(self) -> None:
        """There is no clicked point any more."""
        self.picked = None
        self._remembered.pop("similarity", None)

    def choose(self, features_of: str) -> None:
        """Splat the tokens of `teacher`, `student` or `original`."""
        if features_of not in self._backbones:
            raise ValueError(f"unknown backbone {features_of!r}; choose one of {', '.join(self._backbones)}")
        self.features_of, self.picked = features_of, None
        self._remembered = {}

    # ------------------------------------------------------------------ tokens

    def _scene(self) -> ShownScene:
        if self.scene is None:
            raise RuntimeError("no triplet is shown yet")
        return self.scene

    def _memory(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What is remembered under a name until something changes; safe against being interrupted anywhere."""
        memory = self._remembered
        value = memory.get(name)
        if value is None:
            value = make()
            memory[name] = value
        return value

    def context_tokens(self) -> Float[Tensor, "v h w c"]:
        """Tokens of the contexts, of the chosen backbone."""
        images = self._scene().triplet.context.images
        return self._memory("context", lambda: self._backbones[self.features_of](images))

    def student_of_target(self) -> Float[Tensor, "h w c"]:
        """The student's tokens of the target image."""
        images = self._scene().triplet.target.images[:1]
        return self._memory("student", lambda: self._backbones["student"](images))[0]

    def tokens_of(self, backbone: str, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b h w c"]:
        """Tokens of any images."""
        return self._backbones[backbone](images)

    def _joint_features(self) -> Float[Tensor, "n c"]:
        scene = self._scene()
        context = self._backbones["teacher"](scene.triplet.context.images)
        tokens, learned = self._target_tokens(scene.triplet, scene.gaussians)
        return torch.cat([context.flatten(0, 2), self.student_of_target().flatten(0, 1), tokens[learned]])

    @torch.no_grad()
    def basis(self) -> PCABasis:
        """Joint basis of the teacher's context and target tokens and the student's: fitted once, then frozen.

        With `follow` it moves a little towards what the tokens are now whenever they have changed.
        """
        basis = self._basis
        if basis is None:
            basis = fit_pca(self._joint_features())
        elif self.follow and self._basis_is_old:
            basis = follow_pca(basis, self._joint_features(), COLOUR_MOMENTUM)
            self._remembered.pop("pca", None)
        else:
            return basis
        self._basis, self._basis_is_old = basis, False
        return basis

    @torch.no_grad()
    def clusters(self) -> Clusters:
        """Clusters of the same tokens, fitted once and then kept."""
        clusters = self._clusters
        if clusters is None:
            clusters = fit_clusters(self._joint_features(), self.cluster_count)
            self._clusters = clusters
        return clusters

    # ------------------------------------------------------------------ per Gaussian

    def _lifted(self, values: Float[Tensor, "v h w k"]) -> Float[Tensor, "n k"]:
        """A value for every Gaussian. Lifting is linear: what is shown of a feature is lifted, not the feature."""
        context = self._scene().triplet.context
        return lift(values, context.masks, (context.height, context.width), self.settings).features

    def gaussian_values(self, name: str) -> Float[Tensor, "n k"]:
        """`pca`: coordinates on the basis. `clusters`: score of each cluster. `similarity`: to the clicked point."""
        if name == "pca":
            basis = self.basis()
            return self._memory(name, lambda: self._lifted(basis.project(self.context_tokens())))
        directions = F.normalize(self.context_tokens(), dim=-1)
        if name == "clusters":
            clusters = self.clusters()
            return self._memory(name, lambda: self._lifted(clusters.scores(directions)))
        picked = self.picked
        if picked is None:
            return directions.new_zeros(len(self._scene().gaussians), 1)
        query = F.normalize(picked.feature, dim=0)
        return self._memory(name, lambda: self._lifted((directions @ query)[..., None]))

    # ------------------------------------------------------------------ the target view

    def blended_target(self) -> Float[Tensor, "H W 3"]:
        """The splatted features of the target view after blending, in colour, on black (paper equation 4)."""
        values = self.gaussian_values("pca")
        return target_colours(self._scene(), values, self.basis(), self.settings, self.blending)[1]

    # ------------------------------------------------------------------ clicks

    @torch.no_grad()
    def click(self, origin: Float[Tensor, "3"], direction: Float[Tensor, "3"]) -> list[ViewMatch]:
        """Pick what a ray hits first, and find it in all three views; nothing if the ray hits nothing.

        Args:
            origin: of the ray, world.
            direction: of the ray, any length.
        """
        scene = self._scene()
        self.picked = pick(scene, self.context_tokens(), self.settings, origin, direction)
        self._remembered.pop("similarity", None)
        return self.matches()

    def matches(self) -> list[ViewMatch]:
        """Where the views have what is most like the picked point."""
        if self.picked is None:
            return []
        scene = self._scene()
        images = scene.triplet.target.images[:1]
        target = self._memory("target", lambda: self._backbones[self.features_of](images))
        return match_views(scene, torch.cat([self.context_tokens(), target]), self.picked)

    # ------------------------------------------------------------------ pictures

    def _pictures(self, camera: PinholeCamera, wanted: Set[str]) -> dict[str, Tensor]:
        pictures = _Pictures(self, self._scene(), camera, wanted)
        outputs = {name: getattr(pictures, name) for name in self.CHANNELS if name in wanted}
        labels = pictures.labels if self.mask_opacity > 0 else None
        if labels is not None:
            for name, picture in outputs.items():
                if self.CHANNELS[name] == 3:
                    outputs[name] = overlay_masks(picture, labels, self.mask_opacity)
        return {name: torch.nan_to_num(value, nan=0.0, posinf=0.0, neginf=0.0) for name, value in outputs.items()}


class _Pictures:
    """Everything that can be shown from one camera, each computed when it is asked for and at most once."""

    def __init__(self, display: Display, scene: ShownScene, camera: PinholeCamera, wanted: Set[str]) -> None:
        self._display, self._scene, self._camera = display, scene, camera
        self._values = [
            name
            for name, output in (("pca", "splatted_pca"), ("clusters", "clusters"), ("similarity", "similarity"))
            if output in wanted
        ]
        self._rendered = display.student_sees == "rendered view"

    @cached_property
    def _splat(self) -> tuple[Splatted, dict[str, Tensor]]:
        """One pass for colours and all values that are wanted; the values divided by their alpha."""
        colours = gaussian_colours(self._scene.gaussians, self._scene.triplet.context, self._camera)
        parts = {"rgb": colours, **{name: self._display.gaussian_values(name) for name in self._values}}
        gaussians = without_gaps(self._scene, self._camera)
        splat = rasterize(gaussians, self._camera, torch.cat(list(parts.values()), dim=1))
        widths = [values.shape[1] for values in parts.values()]
        features = dict(zip(parts, splat.features.split(widths, dim=-1), strict=True))
        means = {name: features[name] / splat.alpha[..., None].clamp(min=EMPTY) for name in self._values}
        return splat, {"rgb": features["rgb"].clamp(0, 1), **means}

    @property
    def accumulation(self) -> Float[Tensor, "H W 1"]:
        return self._splat[0].alpha[..., None]

    @property
    def rgb(self) -> Float[Tensor, "H W 3"]:
        return self._splat[1]["rgb"]

    @property
    def depth(self) -> Float[Tensor, "H W 1"]:
        return ray_distance(self._splat[0], self._camera)

    @property
    def splatted_pca(self) -> Float[Tensor, "H W 3"]:
        return self._display.basis().colour(self._splat[1]["pca"]) * self.accumulation

    @property
    def clusters(self) -> Float[Tensor, "H W 3"]:
        clusters = self._display.clusters()
        return clusters.colour(clusters.labels(self._splat[1]["clusters"])) * self.accumulation

    @property
    def similarity(self) -> Float[Tensor, "H W 1"]:
        return self._splat[1]["similarity"].clamp(0, 1) * self.accumulation

    @cached_property
    def _target_pixels(self) -> TargetPixels:
        return target_pixels(self._scene, self._camera, self._splat[0])

    @property
    def labels(self) -> Optional[Tensor]:
        """The target's instance masks as seen from here."""
        mask = self._scene.triplet.target.mask(0)
        return None if mask is None else self._target_pixels.take_labels(mask)

    @property
    def blended_pca(self) -> Float[Tensor, "H W 3"]:
        return self._target_pixels.take(self._display.blended_target())

    def _shown(self, values: Float[Tensor, "h w k"]) -> Float[Tensor, "H W k"]:
        """Token by token, as flat squares: over the picture, or where the target view is."""
        if self._rendered:
            return enlarge(values, (self._camera.height, self._camera.width))
        return self._target_pixels.take(values, flat=True)

    @cached_property
    def _student(self) -> Float[Tensor, "h w c"]:
        if not self._rendered:
            return self._display.student_of_target()
        target = self._scene.triplet.target
        seen = F.interpolate(
            rearrange(self.rgb, "H W c -> 1 c H W"),
            size=(target.height, target.width),
            mode="bilinear",
            antialias=True,
        )
        return self._display.tokens_of("student", seen.clamp(0, 1))[0]

    @property
    def student_pca(self) -> Float[Tensor, "H W 3"]:
        basis = self._display.basis()
        return self._shown(basis.colour(basis.project(self._student)))

    @property
    def cosine_error(self) -> Float[Tensor, "H W 1"]:
        """1 - cosine between the student's tokens and the splatted ones without blending; 0 without support."""
        from snd_nerfstudio.supervision.token_builder import build_token_operator  # numba takes a second to import

        context, target = self._scene.triplet.context, self._scene.triplet.target
        tokens, student = self._display.context_tokens(), self._student
        camera = target.camera(0)
        if self._rendered:
            scale = self._camera.intrinsics.new_tensor(
                [target.width / self._camera.width, target.height / self._camera.height, 1.0]
            )
            pose, matrix = self._camera.camera_to_world, self._camera.intrinsics * scale[:, None]
            camera = PinholeCamera(pose, matrix, target.height, target.width)
        operator = build_token_operator(
            (tokens.shape[1], tokens.shape[2]),
            context.masks,
            (context.height, context.width),
            self._scene.gaussians,
            camera,
            None,
            replace(self._display.settings, blending=1.0),
            (student.shape[0], student.shape[1]),
        )
        cosine = F.cosine_similarity(operator(tokens, 1.0), student, dim=-1)
        error = torch.where(operator.coverage > EMPTY, 1 - cosine, torch.zeros_like(cosine))
        return self._shown(error.clamp(0, 1)[..., None])
