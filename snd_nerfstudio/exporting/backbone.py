"""A merged backbone as safetensors in timm's layout, with a manifest that says what it is."""

import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from snd_nerfstudio.backbones.registry import BackboneSpec
from snd_nerfstudio.backbones.vit import TokenBackbone, create_vit
from snd_nerfstudio.errors import InputError

WEIGHTS = "snd_backbone.safetensors"
MANIFEST = "manifest.json"
TOLERANCE = 1e-4


def export_backbone(vit: nn.Module, spec: BackboneSpec, folder: Path, about: Mapping[str, Any]) -> Path:
    """Write a plain timm model and check the file by loading it again.

    Both files appear whole or not at all. The check builds the model anew in timm, loads the file with strict keys and
    compares tokens on a fixed image.

    Args:
        vit: the model without adapters.
        spec: what it is.
        folder: where to write.
        about: goes into the manifest.

    Returns:
        Path of the manifest.

    Raises:
        InputError: the folder cannot be written.
        RuntimeError: the reloaded model gives other tokens (by more than 1e-4); nothing is left behind.
    """
    partial, described = folder / f".{WEIGHTS}.partial", folder / f".{MANIFEST}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in vit.state_dict().items()}
        save_file(state, partial, metadata={"format": "pt"})
        difference = _reload_difference(vit, spec, partial)
        if difference > TOLERANCE:
            raise RuntimeError(f"tokens of the reloaded backbone differ by {difference:.2e}, more than {TOLERANCE:.0e}")
        manifest = {
            **about,
            "timm_model": spec.timm_name.split(".")[0],
            "timm_arguments": {"num_classes": 0, "dynamic_img_size": True, **spec.timm_arguments},
            "tokens": "timm forward_features without the prefix tokens: last block, after the final norm",
            "position_embedding": "timm's interpolation",
            "patch": spec.patch,
            "mean": spec.mean,
            "std": spec.std,
            "base_licence": spec.licence,
            "base_source": spec.source,
            "file": WEIGHTS,
            "sha256": hashlib.sha256(partial.read_bytes()).hexdigest(),
            "largest_token_difference_after_reloading": difference,
            "versions": {name: version(name) for name in ("snd-nerfstudio", "torch", "timm", "peft", "safetensors")},
        }
        described.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / WEIGHTS)
        os.replace(described, folder / MANIFEST)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--output-dir {folder} cannot be written ({error}).") from error
    finally:
        if folder.is_dir():
            partial.unlink(missing_ok=True)
            described.unlink(missing_ok=True)
    return folder / MANIFEST


@torch.no_grad()
def _reload_difference(vit: nn.Module, spec: BackboneSpec, file: Path) -> float:
    fresh = create_vit(spec)
    fresh.load_state_dict(load_file(file), strict=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 8 * spec.patch, 12 * spec.patch, generator=generator)
    before = TokenBackbone(spec, vit).eval()(image)
    after = TokenBackbone(spec, fresh).eval()(image)
    return float((before - after).abs().max())
