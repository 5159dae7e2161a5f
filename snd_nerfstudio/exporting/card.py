"""The model card of an exported backbone: what it is, how it was made, how it is used."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

PAPER = "https://davidshavin4.github.io/Splat-and-Distill/"
DINOV3_LICENCE = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

HUB_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-sa-4.0", "cc-by-nc-sa-4.0")
"""Those that the hub knows by these names."""

SNIPPETS: Mapping[str, str] = {
    "timm": """\
import timm
import torch

vit = timm.create_model("local-dir:.", pretrained=True).eval()
mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
image = torch.rand(1, 3, {height}, {width})  # colours in [0, 1]; sides are multiples of {patch}
with torch.no_grad():
    tokens = vit.forward_features((image - mean) / std)[:, vit.num_prefix_tokens :]
print(tokens.shape)  # [1, {count}, {channels}], row by row
""",
    "timm with carried code": """\
import torch
from snd_timm import load  # the file beside the weights

vit = load(".")
mean, std = (torch.tensor(vit.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
image = torch.rand(1, 3, {height}, {width})  # colours in [0, 1]; sides are multiples of {patch}
with torch.no_grad():
    tokens = vit.forward_features((image - mean) / std)[:, vit.num_prefix_tokens :]
print(tokens.shape)  # [1, {count}, {channels}], row by row
""",
    "hub": """\
import torch

backbone = torch.hub.load(".", "backbone", source="local")
mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
image = torch.rand(1, 3, {height}, {width})  # colours in [0, 1]; sides are multiples of {patch}
with torch.no_grad():
    tokens = backbone.forward_features((image - mean) / std)["x_norm_patchtokens"]
print(tokens.shape)  # [1, {count}, {channels}], row by row
""",
    "transformers": """\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("./", trust_remote_code={carries}).eval()
mean, std = torch.tensor({mean}).view(3, 1, 1), torch.tensor({std}).view(3, 1, 1)
image = torch.rand(1, 3, {height}, {width})  # colours in [0, 1]; sides are multiples of {patch}
with torch.no_grad():
    tokens = model((image - mean) / std).last_hidden_state[:, {prefix}:]
print(tokens.shape)  # [1, {count}, {channels}], row by row
""",
    "onnx": """\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
image = np.random.rand(1, 3, {height}, {width}).astype("float32")  # colours in [0, 1]; sides are multiples of {patch}
tokens = session.run(["tokens"], {{"images": image}})[0]
print(tokens.shape)  # (1, {rows}, {columns}, {channels})
""",
    "pt2": """\
import torch

backbone = torch.export.load("model.pt2").module()
image = torch.rand(1, 3, {height}, {width})  # colours in [0, 1]; sides are multiples of {patch}
with torch.no_grad():
    tokens = backbone(image)[0]
print(tokens.shape)  # [1, {rows}, {columns}, {channels}]
""",
}
LIBRARIES = {"timm": "timm", "hub": "pytorch", "transformers": "transformers", "onnx": "onnx", "pt2": "pytorch"}


def usage(manifest: Mapping[str, Any]) -> str:
    """Python code that loads an exported folder from within it and computes tokens."""
    rows, columns = 16, 24
    name = manifest["format"]
    carries = "snd_timm.py" in manifest["files"]
    return SNIPPETS["timm with carried code" if carries else name].format(
        height=rows * manifest["patch"],
        width=columns * manifest["patch"],
        rows=rows,
        columns=columns,
        count=rows * columns,
        patch=manifest["patch"],
        channels=manifest["channels"],
        prefix=manifest["prefix_tokens"],
        mean=list(manifest["mean"]),
        std=list(manifest["std"]),
        carries="modeling_snd.py" in manifest["files"],
    )


def model_card(manifest: Mapping[str, Any]) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        manifest: of an exported folder.
    """
    licence = str(manifest["base_licence"])
    front: dict[str, Any] = {
        "library_name": LIBRARIES[manifest["format"]],
        "pipeline_tag": "image-feature-extraction",
        "tags": ["splat-and-distill", "3d-aware-features", "vision-transformer"],
    }
    if licence.lower() in HUB_LICENCES:
        front["license"] = licence.lower()
    else:
        front["license"] = "other"
        front["license_name"] = re.sub(r"[^a-z0-9]+", "-", licence.lower()).strip("-")
        if licence.startswith("DINOv3"):
            front["license_link"] = DINOV3_LICENCE
    if manifest["base_model"]:
        front["base_model"] = manifest["base_model"]
    trained = ", ".join(manifest.get("trained_layers") or ["nothing"])
    data = manifest.get("data")
    sizes = ", ".join(f"{check['height']}x{check['width']}" for check in manifest["checked_on"])
    worst = max(check["largest_difference"] for check in manifest["checked_on"])
    lines = [
        f"# {manifest['architecture']}, made 3D-aware by Splat and Distill",
        "",
        f"The {manifest.get('which', 'backbone')} of a training by [Splat and Distill]({PAPER}) with snd-nerfstudio "
        f"{manifest['versions']['snd-nerfstudio']}, after step {manifest.get('step', 'unknown')}. What was trained: "
        f"{trained}.",
        "",
        "## Use",
        "",
        "From within this folder:",
        "",
        "```python",
        usage(manifest).rstrip(),
        "```",
        "",
        f"Tokens are the {manifest['tokens']}. Position embedding when the image size changes: "
        f"{manifest['position_embedding_resized']}.",
    ]
    alone = [check.get("largest_difference_without_carried_code") for check in manifest["checked_on"]]
    if any(value is not None for value in alone):
        lines += [
            "",
            "The Python file beside the weights resizes the position embedding as in training. The library alone does "
            f"it differently: up to {max(alone):.1%} of the tokens' root mean square apart on noise images of {sizes}.",
        ]
    lines += [
        "",
        "## Training",
        "",
        "| | |",
        "|---|---|",
        *(
            f"| {label} | {manifest[key]} |"
            for label, key in (("Profile", "profile"), ("Method", "method"))
            if key in manifest
        ),
        *([f"| Data | {_sentence(data)} |"] if data else []),
        "",
        "All settings are in `manifest.json`. Whether the training was worth it is not said here: probe the backbone "
        "on your own task before you rely on it.",
        "",
        "## Checks",
        "",
        f"Loaded again and compared with the trained model on noise images of {sizes} pixels: largest difference of a "
        f"channel {worst:.1e} of the tokens' root mean square.",
        "",
        "## Licence",
        "",
        f"Licence of the base weights: {licence}. Terms of the training data may apply to these weights too.",
        "",
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n".join(lines)


def _sentence(data: Mapping[str, Any]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in data.items())
