"""Instance masks with SAM and SAM 2 (Kirillov et al., ICCV 2023; Ravi et al., ICLR 2025) as transformers has them.

As in the authors' automatic mask generator: a grid of points is asked for masks, three for each point; those that the
model thinks little of, that depend on where logits are cut, or that repeat a better one, are dropped. `label_map` makes
one region per pixel of the rest.
"""

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.masks.label_map import label_map

VERSION = 1
"""To be raised whenever the same image, weights and settings give other masks."""
MODEL_TYPES = {"sam": "SamModel", "sam2": "Sam2Model", "sam2_video": "Sam2Model"}
"""Class for each kind of model; weights of SAM 2 for videos hold those for images."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, as both models were trained with."""
STABILITY_OFFSET = 1.0
"""Logits are cut at plus and minus this to see how stable a mask is."""
MODEL_FILES = ["*.json", "*.safetensors"]
"""What is downloaded of a model: nothing that could run code."""


@dataclass(frozen=True)
class SamSettings:
    """Settings of SAM's and SAM 2's automatic mask generation."""

    model: str = "facebook/sam-vit-base"
    """Folder with the model's weights in transformers' layout, or its name on the Hugging Face hub, such as
    facebook/sam-vit-huge or facebook/sam2.1-hiera-large."""
    points_per_side: int = 32
    """Points along either side of the grid that is asked for masks."""
    points_per_batch: int = 64
    """Points that go through the model at once: fewer need less memory."""
    min_score: float = 0.88
    """Masks of whose overlap with the truth the model expects less are dropped."""
    min_stability: float = 0.95
    """Masks that overlap less with themselves, cut at higher and lower logits, are dropped."""
    max_overlap: float = 0.7
    """Of two masks whose boxes overlap more (intersection over union), the better one stays."""
    min_area: float = 0.001
    """Regions of which less than this share of the image is to be seen are given to their neighbours."""
    device: Optional[str] = None
    """Where SAM runs, such as cpu or cuda:1. None: on CUDA where it is there."""

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            InputError: which flag, and what it takes.
        """
        for name, highest in (("points_per_side", 128), ("points_per_batch", 1 << 14)):
            if not 1 <= getattr(self, name) <= highest:
                flag = name.replace("_", "-")
                raise InputError(f"sam.{flag} {getattr(self, name)}: give a number from 1 to {highest}.")
        for name in ("min_score", "min_stability", "max_overlap", "min_area"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"sam.{name.replace('_', '-')} {getattr(self, name):g}: give a number from 0 to 1.")


class SamSegmenter:
    """Makes masks with SAM; one of the two ways in which `maker.MaskMaker` gets them.

    The files are looked up, and downloaded if need be, when it is made; the model is loaded when the first mask is
    wanted. Threads take turns.

    Args:
        settings: checked here.
        log: for a download.

    Raises:
        InputError: a setting makes no sense, or the model's files are not to be had or of another kind.
    """

    name = "sam"
    uses_depth = False
    slow = True

    def __init__(self, settings: SamSettings, log: Callable[[str], Any] = print) -> None:
        settings.check()
        self.settings = settings
        self.folder = find_model(settings.model, log)
        self.model_type = _model_type(self.folder, settings.model)
        self.weights = _hash_of_weights(self.folder, settings.model)
        self._lock = threading.Lock()
        self._model: Any = None

    @property
    def description(self) -> dict[str, Any]:
        """All that decides on the masks of an image: not where the model lies, nor where it runs."""
        unimportant = ("model", "device", "points_per_batch")
        settings = {name: value for name, value in asdict(self.settings).items() if name not in unimportant}
        return {"version": VERSION, "model": self.model_type, "weights": self.weights, **settings}

    @property
    def model(self) -> Any:
        """The model, loaded on first use.

        Raises:
            InputError: it cannot be loaded.
        """
        if self._model is None:
            self._model = _load(self.folder, self.model_type, self.settings)
        return self._model

    def get_ready(self) -> None:
        """Load the model, if it is not loaded yet.

        Raises:
            InputError: it cannot be loaded.
        """
        with self._lock:
            assert self.model is not None

    def segment(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        depth: Float[np.ndarray, "H W"] | None,
        intrinsics: Float[np.ndarray, "3 3"],
    ) -> Int[np.ndarray, "H W"]:
        """Regions of an image.

        Args:
            image: sRGB.
            depth: not looked at.
            intrinsics: not looked at.

        Returns:
            Ids from 1 on: see `label_map`.
        """
        with self._lock, torch.no_grad():
            masks, scores = generate_masks(self.model, torch.from_numpy(image.copy()), self.settings)
        smallest = max(round(self.settings.min_area * image.shape[0] * image.shape[1]), 1)
        return label_map(masks.cpu().numpy(), scores.cpu().double().numpy(), smallest)


def generate_masks(
    model: Any, image: UInt8[Tensor, "H W 3"], settings: SamSettings
) -> tuple[Bool[Tensor, "n H W"], Float[Tensor, "n"]]:
    """What SAM finds in an image; masks may overlap, and there may be none.

    Args:
        model: transformers' SamModel or Sam2Model.
        image: sRGB.
        settings: points and thresholds.

    Returns:
        Masks and the overlap with the truth that the model expects of each, the best first.
    """
    from torchvision.ops import nms

    height, width = image.shape[:2]
    padded = model.config.model_type == "sam"
    side = model.config.prompt_encoder_config.image_size
    side = int(side[0] if isinstance(side, (list, tuple)) else side)
    size = (side, side)
    if padded:  # SAM keeps the shape and fills up below or to the right; SAM 2 stretches
        size = (int(side * height / max(height, width) + 0.5), int(side * width / max(height, width) + 0.5))
    embeddings = model.get_image_embeddings(prepare(image, size, side).to(model.device, model.dtype))
    found: list[tuple[Tensor, Tensor]] = []
    for points in grid_points(settings.points_per_side, size).split(settings.points_per_batch):
        points = points.to(model.device, model.dtype)[None, :, None]
        output = model(
            image_embeddings=embeddings,
            input_points=points,
            input_labels=torch.ones(points.shape[:3], dtype=torch.int64, device=points.device),
            multimask_output=True,
        )
        logits, scores = output.pred_masks[0].flatten(0, 1).float(), output.iou_scores[0].flatten().float()
        promising = scores >= settings.min_score
        logits, scores = logits[promising], scores[promising]
        logits = restore(logits, size if padded else None, side, (height, width))
        stable = stability(logits) >= settings.min_stability
        masks = logits[stable] > 0
        seen = masks.flatten(1).any(dim=1)
        found.append((masks[seen], scores[stable][seen]))
    masks, scores = (torch.cat([batch[part] for batch in found]) for part in (0, 1))
    kept = nms(boxes_around(masks), scores, settings.max_overlap)
    return masks[kept], scores[kept]


def prepare(image: UInt8[Tensor, "H W 3"], size: tuple[int, int], side: int) -> Float[Tensor, "1 3 side side"]:
    """An image as SAM wants it: resized, normalised, and filled up to a square with zeros.

    Args:
        image: sRGB.
        size: height and width to resize to.
        side: of the square.
    """
    colours = F.interpolate(image.permute(2, 0, 1)[None].float(), size=size, mode="bilinear", antialias=True)
    colours = colours.round() / 255
    mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
    return F.pad((colours - mean) / deviation, (0, side - size[1], 0, side - size[0]))


def grid_points(per_side: int, size: tuple[int, int]) -> Float[Tensor, "n 2"]:
    """Points ``(x, y)`` at the centres of a grid of equal cells, in pixels.

    Args:
        per_side: cells along either side.
        size: height and width of what they cover.
    """
    centres = (torch.arange(per_side) + 0.5) / per_side
    rows, columns = torch.meshgrid(centres * size[0], centres * size[1], indexing="ij")
    return torch.stack([columns, rows], dim=-1).flatten(0, 1)


def restore(
    logits: Float[Tensor, "n h w"], inner: tuple[int, int] | None, side: int, size: tuple[int, int]
) -> Float[Tensor, "n H W"]:
    """Masks of SAM's square as masks of the image.

    Args:
        logits: of the whole square.
        inner: height and width of the image in the square; None if it fills it.
        side: of the square.
        size: height and width of the image.
    """
    if logits.shape[0] == 0:
        return logits.new_zeros(0, *size)
    if inner is not None:
        logits = F.interpolate(logits[None], size=(side, side), mode="bilinear", align_corners=False)[0]
        logits = logits[:, : inner[0], : inner[1]]
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def stability(logits: Float[Tensor, "n H W"]) -> Float[Tensor, "n"]:
    """Intersection over union of a mask cut at higher and at lower logits; the one lies within the other."""
    inner = (logits > STABILITY_OFFSET).flatten(1).sum(dim=1)
    outer = (logits > -STABILITY_OFFSET).flatten(1).sum(dim=1)
    return inner / outer.clamp(min=1)


def boxes_around(masks: Bool[Tensor, "n H W"]) -> Float[Tensor, "n 4"]:
    """First column, first row, last column and last row of each mask, of which none may be empty."""
    rows, columns = masks.any(dim=2).int(), masks.any(dim=1).int()
    height, width = masks.shape[1:]
    first = [side.argmax(dim=1) for side in (columns, rows)]
    last = [width - 1 - columns.flip(1).argmax(dim=1), height - 1 - rows.flip(1).argmax(dim=1)]
    return torch.stack([*first, *last], dim=1).float()


# ---------------------------------------------------------------------- the model's files


def find_model(model: str, log: Callable[[str], Any] = print) -> Path:
    """The folder with a model's files; what is only on the Hugging Face hub is downloaded.

    Args:
        model: a folder, or a name on the hub.
        log: for a download.

    Raises:
        InputError: there is no such folder, or no such model to be had.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith(("/", ".", "~")):
        raise InputError(f"sam.model {model}: no such folder, and no name of a model on the Hugging Face hub.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES, local_files_only=True))
    except Exception:  # not there yet
        log(f"Downloading {model} from the Hugging Face hub.")
    try:
        return Path(snapshot_download(model, allow_patterns=MODEL_FILES))
    except Exception as error:  # the hub's client, its transport and the disk each have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"The weights of {model} are not on this machine and cannot be downloaded ({reason}): give a folder that "
            "holds them in transformers' layout (config.json, model.safetensors) with --pipeline.datamanager.sam.model "
            "(--sam.model of snd-data masks)."
        ) from error


def _model_type(folder: Path, model: str) -> str:
    try:
        model_type = json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"sam.model {model}: {folder} has no config.json of a transformers model ({error})."
        ) from error
    if model_type not in MODEL_TYPES:
        raise InputError(f"sam.model {model} is a model of the kind {model_type}: give one of SAM or SAM 2.")
    return model_type


def _hash_of_weights(folder: Path, model: str) -> str:
    """Hash of all files that decide what the model computes."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(
            f"sam.model {model}: {folder} has no .safetensors file; weights in other formats are not opened, as they "
            "may run code. Save the model with save_pretrained first."
        )
    digest = hashlib.sha256()
    for file in (folder / "config.json", *files):
        digest.update(f"{file.name} {sha256(file)};".encode())
    return digest.hexdigest()


def _load(folder: Path, model_type: str, settings: SamSettings) -> Any:
    """The model in evaluation mode, every weight from the files."""
    try:
        import transformers

        kind = getattr(transformers, MODEL_TYPES[model_type])
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{MODEL_TYPES[model_type]} needs transformers 4.56 or later: pip install -U transformers"
        ) from error
    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors, torch and transformers each have errors of their own
        raise InputError(f"sam.model {settings.model} cannot be loaded from {folder} ({error}).") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(
            f"sam.model {settings.model}: {len(missing)} of the model's weights are not in {folder}, {missing[0]} "
            "among them: give the folder of a whole model."
        )
    try:
        return model.eval().requires_grad_(False).to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"sam.device {device}: {str(error).splitlines()[0]}") from error
