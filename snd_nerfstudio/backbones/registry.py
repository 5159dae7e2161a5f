"""Which backbones there are and what must be known about each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from snd_nerfstudio.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PositionEmbedding = Literal["hub", "timm", "rotary"]
"""How a position embedding follows the image size. ``hub``: bicubic with the 0.1 offset of DINOv2's own code. ``timm``:
bicubic with antialiasing, which is also what DINOv2's own code does in models with registers. ``rotary``: nothing is
interpolated (DINOv3)."""
Family = Literal["dinov2", "dinov3", "other"]


@dataclass(frozen=True)
class BackboneSpec:
    """One vision transformer as timm builds it."""

    timm_name: str
    """Architecture and weights tag for ``timm.create_model``."""
    patch: int
    """Side of a patch in pixels."""
    channels: int
    """Channels of a token."""
    licence: str
    """Licence of the published weights."""
    source: str
    """Where the published weights come from; empty where there are none."""
    positions: PositionEmbedding = "timm"
    """As the model's authors interpolate it."""
    prefix_tokens: int = 1
    """Class and register tokens before those of the patches."""
    family: Family = "other"
    """Which other libraries have the same architecture."""
    hub_name: str = ""
    """Name in DINOv2's torch.hub; empty where it has none."""
    timm_arguments: Mapping[str, object] = field(default_factory=dict)
    """Further arguments of ``timm.create_model`` that change the architecture."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from images in [0, 1]."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Images are divided by this afterwards."""

    @property
    def architecture(self) -> str:
        """timm's name without the weights tag."""
        return self.timm_name.split(".")[0]


def _dinov2(size: str, channels: int, letter: str, registers: bool = False) -> BackboneSpec:
    timm_name = f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m"
    return BackboneSpec(
        timm_name=timm_name,
        patch=14,
        channels=channels,
        licence="Apache-2.0",
        source=f"https://huggingface.co/timm/{timm_name}",
        positions="timm" if registers else "hub",
        prefix_tokens=5 if registers else 1,
        family="dinov2",
        hub_name=f"dinov2_vit{letter}14{'_reg' if registers else ''}",
    )


def _dinov3(size: str, channels: int) -> BackboneSpec:
    timm_name = f"vit_{size}_patch16_dinov3.lvd1689m"
    return BackboneSpec(
        timm_name=timm_name,
        patch=16,
        channels=channels,
        licence="DINOv3 License",
        source=f"https://huggingface.co/timm/{timm_name}",
        positions="rotary",
        prefix_tokens=5,
        family="dinov3",
    )


BACKBONES: dict[str, BackboneSpec] = {
    "dinov2-small": _dinov2("small", 384, "s"),
    "dinov2-base": _dinov2("base", 768, "b"),
    "dinov2-large": _dinov2("large", 1024, "l"),
    "dinov2-giant": _dinov2("giant", 1536, "g"),
    "dinov2-small-registers": _dinov2("small", 384, "s", registers=True),
    "dinov2-base-registers": _dinov2("base", 768, "b", registers=True),
    "dinov2-large-registers": _dinov2("large", 1024, "l", registers=True),
    "dinov2-giant-registers": _dinov2("giant", 1536, "g", registers=True),
    "dinov3-small": _dinov3("small", 384),
    "dinov3-small-plus": _dinov3("small_plus", 384),
    "dinov3-base": _dinov3("base", 768),
    "dinov3-large": _dinov3("large", 1024),
    "dinov3-huge-plus": _dinov3("huge_plus", 1280),
    "dinov3-7b": _dinov3("7b", 4096),
    "tiny": BackboneSpec(
        timm_name="vit_small_patch14_dinov2.lvd142m",
        patch=14,
        channels=96,
        licence="none (random weights)",
        source="",
        positions="hub",
        family="dinov2",
        # LayerScale at DINOv2's 1e-5 would hide four random blocks completely
        timm_arguments={"embed_dim": 96, "depth": 4, "num_heads": 3, "init_values": 1.0, "img_size": 224},
    ),
}


def find_backbone(name: str, flag: str = "--pipeline.model.backbone") -> BackboneSpec:
    """The registry's entry of a name, or one made from what timm says about its vision transformer of that name.

    Args:
        name: a key of ``BACKBONES``, or a model of timm with or without its weights tag.
        flag: that the user gave it by, for messages.

    Raises:
        InputError: neither knows the name, or timm's model is no vision transformer on square patches.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    from snd_nerfstudio.backbones.timm_models import spec_of_timm_model

    spec = spec_of_timm_model(name, flag)
    if spec is None:
        raise InputError(
            f"Unknown backbone {flag} {name}: choose one of {', '.join(BACKBONES)}, or a vision "
            "transformer of timm (list them: python -c \"import timm; print(timm.list_models('vit_*'))\")."
        )
    return spec
