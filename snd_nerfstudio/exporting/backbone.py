"""A trained backbone in the layouts of other libraries, each read again and compared before it is called written."""

import copy
import dataclasses
import importlib
import json
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import licence_of
from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.exporting.card import model_card
from snd_nerfstudio.exporting.formats import FORMATS, Format, FormatName

MANIFEST = "manifest.json"
CARD = "README.md"
TOLERANCE = 1e-3
"""Largest difference between tokens before and after, as a share of their root mean square. Weights that are wrong
anywhere, and another interpolation of the position embedding, are far above it; rounding is far below."""
GRIDS = ((16, 16), (37, 37), (24, 36))
"""Token grids of the images compared on: 224x224, 518x518 and 336x504 pixels for a patch of 14."""


def refused(backbone: TokenBackbone, formats: Sequence[FormatName]) -> dict[FormatName, str]:
    """The formats that a backbone cannot be written in, and why."""
    reasons: dict[FormatName, str] = {}
    for name in formats:
        reason = FORMATS[name].refuses(backbone)
        if reason is not None:
            reasons[name] = reason
    return reasons


def export_backbone(backbone: TokenBackbone, format_name: FormatName, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write a backbone in one layout into a folder of its own, and check it by loading it again.

    The folder appears whole or not at all, and replaces an older export as a whole. Beside the weights it holds a model
    card, a manifest with checksums, and what code its reader needs.

    Args:
        backbone: without adapters.
        format_name: which layout.
        folder: where to make the folder, which is named like the format.
        about: goes into manifest and card: what the backbone is and how it was trained.

    Returns:
        Path of the manifest.

    Raises:
        InputError: the backbone cannot be written in this format, or the folder cannot be written.
        RuntimeError: what was written gives other tokens when it is loaded again; nothing is left behind.
    """
    backbone = copy.deepcopy(backbone).cpu().eval()
    reasons = refused(backbone, [format_name])
    if reasons:
        raise InputError(f"--format {format_name}: {reasons[format_name]}.")
    layout, target = FORMATS[format_name], folder / format_name
    partial, old = folder / f".{format_name}.partial", folder / f".{format_name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        facts = layout.write(backbone, partial)
        checks = compare(backbone, layout, partial)
        _forget_compiled(partial)
        manifest = {
            "format": format_name,
            **about,
            **facts,
            **describe(backbone),
            "checked_on": checks,
            "tolerance": TOLERANCE,
            "files": {file.name: sha256(file) for file in sorted(partial.iterdir())},
            "versions": {name: version(name) for name in ("snd-nerfstudio", "torch", "timm")}
            | {name: importlib.import_module(name).__version__ for name in layout.packages},
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        (partial / CARD).write_text(model_card(manifest), encoding="utf-8")
        for file in partial.iterdir():  # safetensors' are for their owner only
            file.chmod(stat.S_IMODE((partial / CARD).stat().st_mode))
        if target.exists():
            os.replace(target, old)
        os.replace(partial, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--output-dir {folder} cannot be written ({error}).") from error
    finally:
        if old.exists() and not target.exists():  # interrupted between the two
            os.replace(old, target)
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return target / MANIFEST


def describe(backbone: TokenBackbone) -> dict[str, Any]:
    """What a user of a backbone has to know about it."""
    spec = backbone.spec
    interpolation = {
        "hub": "bicubic with an offset of 0.1, as in DINOv2's own code for models without registers",
        "timm": "bicubic with antialiasing, as in timm and in DINOv2's own code for models with registers",
        "rotary": "none: rotary",
    }
    return {
        "architecture": spec.architecture,
        "tokens": "patch tokens of the last block after the final norm",
        "position_embedding": backbone.positions,
        "position_embedding_resized": interpolation[backbone.positions],
        "patch": spec.patch,
        "channels": backbone.channels,
        "prefix_tokens": spec.prefix_tokens,
        "mean": spec.mean,
        "std": spec.std,
        "base_licence": licence_of(backbone.weight_report),
        "base_source": backbone.weight_report.source if backbone.weight_report is not None else "",
        "base_model": _hub_page(backbone),
    }


def _hub_page(backbone: TokenBackbone) -> str:
    """Repository on the Hugging Face hub of the published weights that it was built with; empty for others."""
    page = f"{backbone.spec.source}/"
    built_with = backbone.weight_report.source if backbone.weight_report is not None else ""
    hub = "https://huggingface.co/"
    return page.removeprefix(hub).strip("/") if page.startswith(hub) and built_with.startswith(page) else ""


@torch.no_grad()
def compare(backbone: TokenBackbone, layout: Format, folder: Path) -> list[dict[str, Any]]:
    """Tokens of fixed images by the backbone itself and by what was written, at three image sizes.

    Args:
        backbone: what was written.
        layout: in which layout.
        folder: where.

    Returns:
        For each image its ``height`` and ``width``, and the ``largest_difference`` of a token's channel as a share of
        the tokens' root mean square; ``largest_difference_without_carried_code`` where the format carries code of ours.

    Raises:
        RuntimeError: a difference exceeds the tolerance.
    """
    spec, generator = backbone.spec, torch.Generator().manual_seed(0)
    carries_code = any(folder.glob("snd_timm.py")) or any(folder.glob("modeling_snd.py"))
    read = layout.read(folder, spec)
    alone = layout.read_stock(folder, spec) if layout.read_stock is not None and carries_code else None
    checks = []
    for rows, columns in GRIDS:
        images = torch.rand(1, 3, rows * spec.patch, columns * spec.patch, generator=generator)
        before, after = backbone.tokens(images), read(images)
        size = float(before.patches.square().mean().sqrt())
        difference = float((before.patches - after.patches).abs().max()) / size
        if before.class_token is not None and after.class_token is not None:
            difference = max(difference, float((before.class_token - after.class_token).abs().max()) / size)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"tokens of the reloaded backbone differ by {difference:.2e} of their size on an image of "
                f"{images.shape[2]}x{images.shape[3]} pixels, more than {TOLERANCE:.0e}"
            )
        check = {"height": images.shape[2], "width": images.shape[3], "largest_difference": difference}
        if alone is not None:
            apart = float((before.patches - alone(images).patches).abs().max()) / size
            check["largest_difference_without_carried_code"] = apart
        checks.append(check)
    return checks


def _forget_compiled(folder: Path) -> None:
    """Loading a folder's code leaves compiled copies in it."""
    for compiled in folder.rglob("__pycache__"):
        shutil.rmtree(compiled, ignore_errors=True)


def plain_values(config: Any) -> Any:
    """A config as JSON can hold it: dataclasses as objects, paths as strings, classes and functions left out."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        return {name: plain_values(value) for name, value in fields.items() if name != "_target"}
    if isinstance(config, Mapping):
        return {str(name): plain_values(value) for name, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [plain_values(value) for value in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    return str(config) if isinstance(config, Path) else None


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload an exported folder to the Hugging Face hub.

    Args:
        folder: of one format.
        repository: ``user/name``; made if it is not there.
        private: of a new repository.

    Returns:
        The repository's address.

    Raises:
        InputError: not logged in, no connection, or not allowed; the export itself is untouched.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repository, private=private, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a backbone by snd-nerfstudio")
    except Exception as error:  # whatever the client raises: no token, no network, no permission
        first = str(error).splitlines()[0] if str(error) else "no message"
        raise InputError(
            f"--push-to-hub {repository} failed ({type(error).__name__}: {first}). The export is in {folder}; log in "
            f"with `hf auth login`, then upload it with `hf upload {repository} {folder}`."
        ) from error
    return address
