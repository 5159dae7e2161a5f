"""Which backbones there are and what must be known about each."""

from collections.abc import Mapping
from dataclasses import dataclass, field

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class BackboneSpec:
    """One vision transformer as timm builds it."""

    timm_name: str
    """Architecture and weights tag for ``timm.create_model``."""
    patch: int
    """Side of a patch in pixels."""
    licence: str
    """Licence of the published weights."""
    source: str
    """Where the published weights come from; empty where there are none."""
    timm_arguments: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of ``timm.create_model`` that change the architecture."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Images are divided by this afterwards."""


BACKBONES: dict[str, BackboneSpec] = {
    "dinov2-small": BackboneSpec(
        timm_name="vit_small_patch14_dinov2.lvd142m",
        patch=14,
        licence="Apache-2.0",
        source="https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m",
    ),
    "dinov2-base": BackboneSpec(
        timm_name="vit_base_patch14_dinov2.lvd142m",
        patch=14,
        licence="Apache-2.0",
        source="https://huggingface.co/timm/vit_base_patch14_dinov2.lvd142m",
    ),
    "tiny": BackboneSpec(
        timm_name="vit_small_patch14_dinov2.lvd142m",
        patch=14,
        licence="none (random weights)",
        source="",
        # LayerScale at DINOv2's 1e-5 would hide four random blocks completely
        timm_arguments={"embed_dim": 96, "depth": 4, "num_heads": 3, "init_values": 1.0, "img_size": 224},
    ),
}
