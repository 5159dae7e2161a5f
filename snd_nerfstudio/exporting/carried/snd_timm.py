"""Loads the backbone in this folder as a timm model that resizes its position embedding as DINOv2's own code does.

timm does that in another way (antialiased, without DINOv2's offset of 0.1), and its tokens differ a little at all image
sizes but the one the model was trained at. Needs torch and timm.
"""

from pathlib import Path
from typing import Union

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer


class HubPositions(VisionTransformer):
    """A timm model without register tokens, whose positions follow the image size as in DINOv2's code."""

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[1:3]
        rows, columns = self.patch_embed.grid_size
        positions = self.pos_embed
        if (height, width) != (rows, columns):
            grid = positions[:, 1:].float().reshape(1, rows, columns, -1).permute(0, 3, 1, 2)
            scales = ((height + 0.1) / rows, (width + 0.1) / columns)
            grid = F.interpolate(grid, scale_factor=scales, mode="bicubic")
            grid = grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
            positions = torch.cat([positions[:, :1], grid], dim=1)
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + positions


def load(folder: Union[str, Path] = Path(__file__).parent) -> VisionTransformer:
    """The backbone of a folder, in eval mode; image sides may be any multiples of the patch."""
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, dynamic_img_size=True)
    vit.__class__ = HubPositions
    return vit.eval()
