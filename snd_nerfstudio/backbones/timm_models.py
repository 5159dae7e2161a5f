"""Building vision transformers by timm, and what timm says about them."""

from dataclasses import replace
from importlib.metadata import version
from typing import Any, Optional

import torch
from torch import nn

from snd_nerfstudio.backbones.registry import BACKBONES, BackboneSpec
from snd_nerfstudio.errors import InputError

TIMM_MINIMUM = (1, 0, 20)
TIMM_REMEDY = 'pip install -U "timm>=1.0.20,<2"'


def import_timm() -> Any:
    """Import timm, which takes seconds and which nerfstudio pins to a version without DINOv2.

    Raises:
        InputError: timm is too old; the message is the command that mends it.
    """
    installed = version("timm")
    numbers = tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in installed.split(".")[:3])
    if numbers < TIMM_MINIMUM:
        raise InputError(
            f"timm {installed} is too old (nerfstudio pins it but does not use it). Run: {TIMM_REMEDY}\n"
            "pip then reports a conflict with nerfstudio's pin; it is harmless."
        )
    import timm

    return timm


def create_vit(spec: BackboneSpec, pretrained: bool = False) -> nn.Module:
    """The bare timm model of a spec; images of any multiple of the patch are accepted.

    Raises:
        InputError: timm is too old, or does not know the model.
    """
    timm = import_timm()
    if not timm.is_model(spec.timm_name):
        raise InputError(f"timm {timm.__version__} does not know {spec.architecture}. Run: {TIMM_REMEDY}")
    return timm.create_model(
        spec.timm_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True, **spec.timm_arguments
    )


def spec_of_timm_model(name: str, flag: str) -> Optional[BackboneSpec]:
    """What must be known about one of timm's vision transformers; None where timm has no model of that name.

    Nothing is downloaded and no weights are made.

    Raises:
        InputError: the model is no vision transformer that gives one token per square patch.
    """
    timm = import_timm()
    if not timm.is_model(name):
        return None
    for spec in BACKBONES.values():
        if spec.source and name in (spec.timm_name, spec.architecture):
            return spec
    from timm.layers import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    problem = f"{flag} {name} is no vision transformer that can be used here"
    try:
        with torch.device("meta"):
            vit: Any = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
    except (TypeError, RuntimeError) as error:  # other architectures do not take dynamic_img_size; an unknown tag
        raise InputError(f"{problem} ({error}).") from error
    if not isinstance(vit, (VisionTransformer, Eva)):
        raise InputError(f"{problem} (timm builds a {type(vit).__name__}).")
    if type(vit.patch_embed) is not PatchEmbed:
        raise InputError(f"{problem} (its tokens are those of a {type(vit.patch_embed).__name__}, not of patches).")
    height, width = vit.patch_embed.patch_size
    if height != width:
        raise InputError(f"{problem} (its patches have {height}x{width} pixels and are not square).")
    about: Any = vit.pretrained_cfg
    hub_id = about.get("hf_hub_id") or ""
    known = BackboneSpec(
        timm_name=name,
        patch=int(height),
        channels=int(vit.num_features),
        licence=str(about.get("license") or "not stated by timm"),
        source=f"https://huggingface.co/{hub_id}" if hub_id else str(about.get("url") or ""),
        positions="rotary" if isinstance(vit, Eva) and vit.pos_embed is None else "timm",
        prefix_tokens=int(vit.num_prefix_tokens),
        mean=tuple(about["mean"]),
        std=tuple(about["std"]),
    )
    if known.licence == "dinov3-license":
        known = replace(known, licence="DINOv3 License")
    if "dinov3" in name:
        return replace(known, family="dinov3")
    return replace(known, family="dinov2") if "dinov2" in name else known
