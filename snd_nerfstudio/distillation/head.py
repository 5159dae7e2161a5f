"""The DINO head: tokens to logits over prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class HeadSettings:
    """Shape of the DINO head (paper appendix A.3)."""

    layers: int = 3
    """Linear layers before the prototypes."""
    hidden: int = 2048
    """Width of the hidden layers."""
    bottleneck: int = 256
    """Width of the last layer before the prototypes."""
    prototypes: int = 65536
    """How many prototypes."""


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

    def forward(self, x: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        """Logits over the prototypes."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=-1))


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

    def forward(self, tokens: Float[Tensor, "... c"]) -> Float[Tensor, "... k"]:
        """Logits; cosines to the prototypes as long as ``weight_g`` is 1."""
        return self.last_layer(F.normalize(self.mlp(tokens), dim=-1))
