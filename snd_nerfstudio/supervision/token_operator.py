"""The teacher's path as one sparse matrix from context tokens to target tokens; `token_builder.py` builds it.

Lifting U, splatting S, blending B and pooling D are linear in the teacher's tokens, and depend on geometry and masks
alone (paper sections 3.3 to 3.5). So `target_tokens = D B S U context_tokens`, and blending keeps two parts apart:

    target = alpha A F + (1 - alpha) Q G F

with A the splatted tokens (target tokens x context tokens, some ten entries per row), G the means of the target's
regions (regions x context tokens) and Q the regions' shares in each target token. `dense.py` is the same step by step.
"""

import warnings
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# that they are in beta state is no news to a user
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix, row by row."""

    starts: Int[Tensor, "rows_and_1"]
    """int64: where each row begins in the other two."""
    columns: Int[Tensor, "entries"]
    """int32, ascending within a row."""
    values: Float[Tensor, "entries"]
    """Not negative."""
    width: int
    """Number of columns."""

    def matrix(self) -> Tensor:
        """The same as one of PyTorch's sparse matrices."""
        return torch.sparse_csr_tensor(
            self.starts,
            self.columns.long(),
            self.values,
            size=(len(self.starts) - 1, self.width),
            check_invariants=False,
        )

    def to(self, device: torch.device | str) -> "SparseRows":
        """The same on another device."""
        return replace(
            self, starts=self.starts.to(device), columns=self.columns.to(device), values=self.values.to(device)
        )


@dataclass(frozen=True)
class TokenOperator:
    """The teacher's path of one triplet for every backbone of one token grid, and every blending strength."""

    points: SparseRows
    """A: target tokens x context tokens. Rows sum to 1 if weighted by coverage, to the token's coverage otherwise."""
    regions: SparseRows | None
    """G: target regions x context tokens; None without a target mask or if built for no blending."""
    shares: SparseRows | None
    """Q: target tokens x target regions; None where `regions` is."""
    context_shape: tuple[int, int, int]
    """Context views, and token rows and columns of each."""
    coverage: Float[Tensor, "h w"]
    """Accumulated alpha, averaged over each token's cell."""
    isolated: Float[Tensor, ""]
    """Share of context pixels none of whose four tokens shares their instance."""
    blendable: bool = True
    """False if it was built for a blending strength of 1, without regions."""
    black: Bool[Tensor, "h w"] | None = None
    """Tokens whose splatted colour is exactly black (`coverage.black_tokens`), where the profile asks for them."""

    @torch.no_grad()
    def __call__(self, context_tokens: Float[Tensor, "v h w c"], blending: float) -> Float[Tensor, "ht wt c"]:
        """Target tokens.

        Args:
            context_tokens: the teacher's tokens of each context view.
            blending: alpha of paper equation 4. Has no effect on an operator built without a target mask.

        Raises:
            ValueError: blending is not in [0, 1], or below 1 and the operator was built for 1; another token grid.
        """
        if not 0 <= blending <= 1:
            raise ValueError(f"blending strength {blending} is not in [0, 1]")
        if blending < 1 and not self.blendable:
            raise ValueError(f"blending strength {blending}, and the operator was built for 1")
        if tuple(context_tokens.shape[:3]) != self.context_shape:
            found, expected = tuple(context_tokens.shape[:3]), self.context_shape
            raise ValueError(f"context tokens of {found} (views, rows, columns), and the operator is for {expected}")
        flat = context_tokens.flatten(0, 2)
        splatted = self.points.matrix() @ flat
        if self.regions is not None and self.shares is not None and blending < 1:
            means = self.regions.matrix() @ flat
            splatted = torch.lerp(self.shares.matrix() @ means, splatted, blending)
        return splatted.view(*self.coverage.shape, -1)

    def to(self, device: torch.device | str) -> "TokenOperator":
        """The same on another device."""
        return replace(
            self,
            points=self.points.to(device),
            regions=None if self.regions is None else self.regions.to(device),
            shares=None if self.shares is None else self.shares.to(device),
            coverage=self.coverage.to(device),
            isolated=self.isolated.to(device),
            black=None if self.black is None else self.black.to(device),
        )
