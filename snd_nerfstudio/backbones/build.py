"""A backbone by name, with weights from wherever they are."""

from typing import Optional, Union

import torch

from snd_nerfstudio.backbones.registry import PositionEmbedding, find_backbone
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.backbones.variants import ConcatenatedBackbone, RefinedBackbone, with_variant
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import FLAG, load_backbone_weights
from snd_nerfstudio.errors import InputError

AnyBackbone = Union[TokenBackbone, RefinedBackbone, ConcatenatedBackbone]
"""What gives tokens: a vision transformer, or a published baseline that is more than one."""


def build_backbone(
    name: str, weights: str, seed: int, positions: Optional[PositionEmbedding] = None, flag: str = FLAG
) -> AnyBackbone:
    """Build a backbone and give it weights.

    Args:
        name: an entry of the registry, or a vision transformer of timm.
        weights: ``random`` (drawn from ``seed``), or what `load_backbone_weights` takes: ``published``, another known
            name, or a path.
        seed: for random weights.
        positions: how the position embedding follows the image size; None: as it did when the weights were trained
            here, otherwise as the model's authors do.
        flag: by which the user gave the weights, for messages.

    Returns:
        The backbone, frozen, in eval mode, float32 on the CPU; its ``weight_report`` says what became of the weights.

    Raises:
        InputError: the name is unknown, or the weights cannot be had or do not fit.
    """
    spec = find_backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vit = create_vit(spec)
    loaded = None
    if weights != "random":
        loaded = load_backbone_weights(spec, vit, weights, flag)
        vit.load_state_dict(loaded.state)
        positions = positions or loaded.positions
    backbone = TokenBackbone(spec, vit, positions)
    backbone.requires_grad_(False).eval()
    if loaded is None:
        return backbone
    built = with_variant(backbone, loaded)
    built.weight_report = loaded.report
    return built


def build_trainable(name: str, weights: str, seed: int, positions: Optional[PositionEmbedding] = None) -> TokenBackbone:
    """As `build_backbone`, for training.

    Raises:
        InputError: likewise; or the weights are of a baseline that is more than a vision transformer.
    """
    backbone = build_backbone(name, weights, seed, positions)
    if not isinstance(backbone, TokenBackbone):
        raise InputError(
            f"{FLAG} {weights} is more than a vision transformer (two side by side, or a convolution behind it) and "
            "cannot be trained: it is for snd-visualize and for probing."
        )
    return backbone
