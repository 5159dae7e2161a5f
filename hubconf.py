"""torch.hub entry points; they need torch only.

torch.hub.load("OWNER/snd_nerfstudio", "dinov2_small_snd")
torch.hub.load("OWNER/snd_nerfstudio", "dinov2_base_snd", blending=False)
"""

import torch

from snd_nerfstudio.backbones.plain import PlainVisionTransformer

dependencies = ["torch"]
WEIGHTS = "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_{size}_snd{variant}.pth"


def dinov2_small_snd(pretrained: bool = True, blending: bool = True) -> PlainVisionTransformer:
    """DINOv2 ViT-S/14 with the weights that the authors of Splat and Distill published (MIT).

    Args:
        pretrained: with those weights; random otherwise.
        blending: those trained with semantic blending, for dense prediction; without it, for matching.
    """
    return _published(PlainVisionTransformer(384, 12, 6, 1536), "small", pretrained, blending)


def dinov2_base_snd(pretrained: bool = True, blending: bool = True) -> PlainVisionTransformer:
    """DINOv2 ViT-B/14, likewise."""
    return _published(PlainVisionTransformer(768, 12, 12, 3072), "base", pretrained, blending)


def _published(model: PlainVisionTransformer, size: str, pretrained: bool, blending: bool) -> PlainVisionTransformer:
    if pretrained:
        url = WEIGHTS.format(size=size, variant="" if blending else "_no_blending")
        model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True))
    return model.eval()
