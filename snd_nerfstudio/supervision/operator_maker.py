"""From a triplet and its Gaussians to the token operator that one configuration of the teacher's path wants."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from snd_nerfstudio.reconstruction.quality import splat_colours
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.splatting import Gaussians
from snd_nerfstudio.supervision.coverage import black_tokens
from snd_nerfstudio.supervision.operator_cache import operator_key
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_operator import TokenOperator


@dataclass(frozen=True)
class OperatorMaker:
    """What of a configuration decides on operators; no backbone is needed, only its patch."""

    settings: SupervisionSettings
    """Of the teacher's path."""
    patch: int
    """Side of a token, pixels."""
    marks_black: bool
    """Whether black tokens are looked for: the released code's rule for tokens without support."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Token rows and columns of an image."""
        return height // self.patch, width // self.patch

    def key(self, triplet: ViewTriplet, reconstructor: str) -> str:
        """The operator's name in a cache; see `operator_cache.operator_key`."""
        if not triplet.digest:
            raise ValueError(f"nothing is known of the contents of {triplet.describe()}: its digest is empty")
        grid = self.grid(triplet.target.height, triplet.target.width)
        return operator_key(triplet.digest, reconstructor, grid, self.settings, self.marks_black)

    @torch.no_grad()
    def make(self, triplet: ViewTriplet, gaussians: Gaussians, for_any_blending: bool = False) -> TokenOperator:
        """What geometry and masks of a triplet do to tokens.

        Args:
            triplet: its images are not looked at, but for colours where black tokens are marked.
            gaussians: of its contexts.
            for_any_blending: include the regions' part even if this configuration does not blend.
        """
        from snd_nerfstudio.supervision.token_builder import build_token_operator  # numba takes a second to import

        context, target = triplet.context, triplet.target
        operator = build_token_operator(
            self.grid(context.height, context.width),
            context.masks,
            (context.height, context.width),
            gaussians,
            target.camera(0),
            target.mask(0),
            replace(self.settings, blending=0.0) if for_any_blending else self.settings,
            self.grid(target.height, target.width),
        )
        return replace(operator, black=self.black(triplet, gaussians)) if self.marks_black else operator

    def black(self, triplet: ViewTriplet, gaussians: Gaussians) -> Bool[Tensor, "h w"]:
        """Tokens whose splatted colour is exactly black."""
        target = triplet.target
        colours = splat_colours(gaussians, triplet.context, target.camera(0)).features
        return black_tokens(colours, *self.grid(target.height, target.width))
