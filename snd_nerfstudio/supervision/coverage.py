"""Which target tokens may be learned from."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def black_tokens(colours: Float[Tensor, "H W 3"], h: int, w: int) -> Bool[Tensor, "h w"]:
    """The released code's rule for tokens without support: the splatted colour is exactly black.

    Partly covered pixels count as covered and truly black ones do not. Read at one pixel per token (nearest neighbour
    by the floor of the scaled index), as that code does.
    """
    black = (colours == 0).all(dim=-1)
    rows = (torch.arange(h, device=black.device) * black.shape[0] / h).long()
    columns = (torch.arange(w, device=black.device) * black.shape[1] / w).long()
    return black[rows[:, None], columns]
