"""Backbones of tests: small random transformers, and modules whose tokens are known."""

import dataclasses

import torch
from torch import Tensor, nn

from snd_nerfstudio.backbones.build import build_backbone
from snd_nerfstudio.backbones.variants import ConcatenatedBackbone, RefinedBackbone
from snd_nerfstudio.backbones.vit import Tokens
from snd_nerfstudio.probing.models import ProbeModel


def tiny(seed=0):
    """A transformer of 4 blocks and 96 channels with patches of 14 pixels."""
    return build_backbone("tiny", "random", seed)


def tiny_model(seed=0, label="tiny"):
    return ProbeModel.from_backbone(label, tiny(seed))


def refined():
    """MEF's kind, with a random convolution."""
    generator = torch.Generator().manual_seed(5)
    weight = 0.05 * torch.randn(96, 96, 3, 3, generator=generator)
    return RefinedBackbone(tiny(3), {"weight": weight, "bias": torch.randn(96, generator=generator)})


def concatenated():
    """FiT3D's kind."""
    return ConcatenatedBackbone(tiny(0), tiny(1))


class KnownMaps(nn.Module):
    """Gives the map that belongs to an image, which it finds among those it knows and their mirror images.

    Args:
        images: uint8 [n, 3, H, W], sides multiples of the patch.
        maps: [n, c, H / patch, W / patch].
        patch: pixels.
        noise: tokens are random numbers instead, others for each image.
    """

    class_channels = 0

    def __init__(self, images: Tensor, maps: Tensor, patch: int, noise: bool = False):
        super().__init__()
        self.patch, self.channels = patch, maps.shape[1]
        mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
        known = (images.float() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        if noise:
            maps = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
        self.register_buffer("known", torch.cat([known, known.flip(-1)]).flatten(1))
        self.register_buffer("maps", torch.cat([maps, maps.flip(-1)]).permute(0, 2, 3, 1).contiguous())

    def prepared_tokens(self, prepared, block, norm):
        distance = torch.cdist(prepared.flatten(1), self.known, compute_mode="donot_use_mm_for_euclid_dist")
        found = distance.argmin(dim=1)
        assert distance.gather(1, found[:, None]).max() < 0.1  # of 14,000 numbers of about 1
        return Tokens(self.maps[found], None)


def fewer(dataset, every):
    """Every so-many-th sample of a dataset of files."""
    return dataclasses.replace(dataset, entries=dataset.entries[::every])
