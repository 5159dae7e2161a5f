"""Dinov2Model with the position embedding that this backbone was trained with.

transformers resizes it without DINOv2's offset of 0.1 (bicubic, plain), so that the tokens of its own ``Dinov2Model``
differ a little at all image sizes but the one of the position embedding. ``config.json`` says which way is right:
``snd_positions`` is ``hub`` (DINOv2's own code) or ``timm`` (antialiased).
"""

import torch
import torch.nn.functional as F
import transformers
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings


class SnDEmbeddings(Dinov2Embeddings):
    """Embeddings whose positions follow the image size as they did in training."""

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Positions ``[1, 1 + h * w, c]`` for an image of that many pixels."""
        positions = self.position_embeddings
        side = round((positions.shape[1] - 1) ** 0.5)
        h, w = height // self.config.patch_size, width // self.config.patch_size
        if h == w == side:
            return positions
        grid = positions[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
        if self.config.snd_positions == "hub":
            grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
        else:
            grid = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True)
        grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
        return torch.cat([positions[:, :1], grid], dim=1)


class SnDDinov2Model(transformers.Dinov2Model):
    """transformers' model but for the positions.

    It loads as transformers' own class, which alone knows how to read weights of earlier versions, and becomes this one
    afterwards.
    """

    def __init__(self, config) -> None:  # type: ignore[no-untyped-def]
        super().__init__(config)
        self.embeddings.__class__ = SnDEmbeddings

    @classmethod
    def from_pretrained(cls, *args, **kwargs):  # type: ignore[no-untyped-def, override]
        """As `transformers.Dinov2Model.from_pretrained`."""
        loaded = transformers.Dinov2Model.from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__class__ = cls
        model.embeddings.__class__ = SnDEmbeddings
        return loaded
