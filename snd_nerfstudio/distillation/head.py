"""The DINO head: tokens to logits over prototypes."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snd_nerfstudio.distillation.losses import MAX_LOGITS


@dataclass
class HeadSettings:
    """Shape of the DINO head (paper appendix A.3), and how its loss is computed."""

    layers: int = 3
    """Linear layers before the prototypes."""
    hidden: int = 2048
    """Width of the hidden layers."""
    bottleneck: int = 256
    """Width of the last layer before the prototypes."""
    prototypes: int = 65536
    """How many prototypes."""
    form: Literal["exact", "quadratic"] = "exact"
    """The loss itself, or its second-order approximation: close at temperature 1, and it needs no logits."""
    max_logits: int = MAX_LOGITS
    """With `form exact`: logits of the student, and of the teacher, to hold at once; changes memory, not the loss."""


class Prototypes(nn.Module):
    """Weight-normalised linear layer without bias: logit ``k`` is ``g_k <x, v_k / |v_k|>``.

    Args:
        channels: of the input.
        prototypes: of the output.
    """

    def __init__(self, channels: int, prototypes: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1))
        self.weight_v = nn.Parameter(torch.empty(prototypes, channels))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def matrix(self) -> Float[Tensor, "k c"]:
        """The prototypes, ``g_k v_k / |v_k|``."""
        # one product of this size and not two: autograd keeps what it multiplies
        length = self.weight_v.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return self.weight_v * (self.weight_g / length)

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        """Logits over the prototypes."""
        return F.linear(x, self.matrix())


class DINOHead(nn.Module):
    """MLP with GELU, L2-normalised bottleneck, weight-normalised prototypes (Caron et al. 2021; Oquab et al. 2023).

    Parameter names are those of DINO's released heads (``mlp.0.weight``, ..., ``last_layer.weight_v``).

    Args:
        channels: of a token.
        settings: widths.
    """

    def __init__(self, channels: int, settings: HeadSettings) -> None:
        super().__init__()
        widths = [channels] + [settings.hidden] * (settings.layers - 1) + [settings.bottleneck]
        stack: list[nn.Module] = []
        for number, (narrow, wide) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            stack += [nn.GELU()] * (number > 0) + [nn.Linear(narrow, wide)]
        self.mlp = nn.Sequential(*stack) if settings.layers > 1 else stack[0]
        for module in stack:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(settings.bottleneck, settings.prototypes)

    def features(self, tokens: Float[Tensor, "... c"]) -> Float[Tensor, "... d"]:
        """What is compared with the prototypes: vectors of length 1, float32 or better."""
        narrow = self.mlp(tokens)
        return F.normalize(narrow.to(torch.promote_types(narrow.dtype, torch.float32)), dim=-1)

    def parts(self, tokens: Float[Tensor, "... c"]) -> tuple[Float[Tensor, "... d"], Float[Tensor, "k d"]]:
        """Features and prototypes, whose products are the logits: for losses that do not want all of them at once."""
        return self.features(tokens), self.last_layer.matrix()

    def forward(self, tokens: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        """Logits; cosines to the prototypes as long as ``weight_g`` is 1."""
        return self.last_layer(self.features(tokens))
