"""What is probed: a frozen backbone, and what a report must say about it."""

from dataclasses import dataclass, field
from typing import Any, Optional

from torch import nn

from snd_nerfstudio.backbones.build import build_backbone
from snd_nerfstudio.backbones.registry import BACKBONES, find_backbone
from snd_nerfstudio.backbones.variants import ConcatenatedBackbone, RefinedBackbone
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import WeightReport, fingerprint, licence_of
from snd_nerfstudio.errors import InputError

FLAG = "--models"
"""By which the command line names models."""
KINDS: dict[type[nn.Module], str] = {
    TokenBackbone: "vit",
    RefinedBackbone: "refined",
    ConcatenatedBackbone: "concatenated",
}
"""What a description calls them."""


@dataclass(frozen=True)
class ProbeModel:
    """A frozen backbone under the name that tables give it."""

    label: str
    """In tables and file names."""
    backbone: nn.Module
    """What gives tokens, see `features.encode`."""
    description: dict[str, Any] = field(repr=False)
    """Plain values for reports: ``registry_name``, ``architecture``, ``kind`` (``vit``, ``refined``, ``concatenated``
    or ``other``), ``patch``, ``channels``, ``weights`` as asked for, ``weights_source``, ``weights_sha256`` of each
    file, ``key_match`` (None for random weights), ``licence``, ``positions``, and ``state_sha256`` of all tensors as
    they are used."""

    @property
    def patch(self) -> int:
        """Side of a patch, pixels."""
        return int(self.description["patch"])

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.description["channels"])

    @property
    def class_channels(self) -> int:
        """Channels of the class token; 0 = there is none."""
        return class_channels(self.backbone)

    @classmethod
    def from_backbone(cls, label: str, backbone: nn.Module, **about: Any) -> "ProbeModel":
        """A model of a backbone that is built already, such as that of a run.

        Args:
            label: see above.
            backbone: one of `backbones.build.AnyBackbone`, or what `features.CustomBackbone` describes; it is frozen.
            about: entries of the description that only the caller knows, such as ``weights``, ``weights_source`` and
                ``weights_sha256`` of a run's checkpoint. They replace what the backbone says itself.
        """
        backbone.requires_grad_(False).eval()
        return cls(label, backbone, {**describe(backbone), **about})


def open_model(text: str, seed: int) -> ProbeModel:
    """Build the model that a user names.

    Args:
        text: ``NAME``, ``NAME=WEIGHTS`` or ``NAME=random``. The name is one of the registry (``dinov2-small``), of
            DINOv2's hub (``dinov2_vits14``) or of timm; without weights they are the published ones, otherwise what
            `backbones.weights.load_backbone_weights` takes: a known name (``snd``, ``fit3d-concat``, ``mef``), a
            file, an exported folder or a run.
        seed: of random weights.

    Returns:
        The model, labelled with the text.

    Raises:
        InputError: the name is unknown, or the weights cannot be had or do not fit.
    """
    asked, _, weights = text.partition("=")
    weights = weights or "published"
    name = registry_name(asked)
    find_backbone(name, FLAG)  # its message names the flag
    backbone = build_backbone(name, weights, seed, flag=FLAG)
    about: dict[str, Any] = {"registry_name": name, "weights": weights}
    if weights == "random":
        about["seed"] = seed
    return ProbeModel.from_backbone(text, backbone, **about)


def registry_name(name: str) -> str:
    """The registry's key of a name of DINOv2's hub; any other name as it is.

    Raises:
        InputError: there is no name.
    """
    if not name:
        raise InputError(f"{FLAG} needs the name of a backbone, such as dinov2_vits14 or dinov2_vits14=random.")
    known = {spec.hub_name: key for key, spec in BACKBONES.items() if spec.hub_name}
    return known.get(name, name)


def describe(backbone: nn.Module) -> dict[str, Any]:
    """What a backbone says about itself, see `ProbeModel.description`."""
    report: Optional[WeightReport] = getattr(backbone, "weight_report", None)
    common = {
        "channels": int(backbone.channels),  # type: ignore
        "class_channels": class_channels(backbone),
        "weights": None if report is None else report.source,
        "weights_source": "random" if report is None else report.source,
        "weights_sha256": {} if report is None else dict(report.files),
        "key_match": None if report is None else report.as_dict(),
        "state_sha256": bytes(fingerprint(backbone.state_dict()).tolist()).hex(),
    }
    if not isinstance(backbone, (TokenBackbone, RefinedBackbone, ConcatenatedBackbone)):
        name, patch = type(backbone).__name__, int(backbone.patch)  # type: ignore
        about = {"registry_name": name, "architecture": name, "kind": "other", "patch": patch}
        return {**about, **common, "licence": "not known", "positions": None}
    spec = backbone.spec
    return {
        "registry_name": next((key for key, known in BACKBONES.items() if known == spec), spec.timm_name),
        "architecture": spec.architecture,
        "kind": next(kind for known, kind in KINDS.items() if isinstance(backbone, known)),
        "patch": spec.patch,
        **common,
        "licence": licence_of(report),
        "positions": vision_transformers(backbone)[0].positions,
    }


def vision_transformers(backbone: nn.Module) -> list[TokenBackbone]:
    """Those that a backbone consists of, the one whose class token is used first."""
    if isinstance(backbone, TokenBackbone):
        return [backbone]
    if isinstance(backbone, RefinedBackbone):
        return [backbone.backbone]
    if isinstance(backbone, ConcatenatedBackbone):
        return [backbone.original, *vision_transformers(backbone.fine_tuned)]
    return []


def class_channels(backbone: nn.Module) -> int:
    """Channels of the class token that `features.encode` gives; 0 = there is none."""
    transformers = vision_transformers(backbone)
    if not transformers:
        return int(getattr(backbone, "class_channels", 0))
    first = transformers[0]
    return first.channels if getattr(first.vit, "cls_token", None) is not None else 0
