"""Checkpoint layouts: the released one, UniMatch's for initialisation, and runs of `ns-train mvsplat`."""

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat.settings import RE10K, Geometry, MVSplatSettings
from snd_nerfstudio.tensor_files import UNREADABLE, first_line, read_tensors, refused_objects

PREFIX = "encoder."
"""Of every network key in the released checkpoints."""
UNUSED = ("decoder.", "losses.", "vit.")
"""Keys of other parts, which a released checkpoint may hold beside the network."""
SETTINGS_KEY = "snd_nerfstudio_mvsplat"
"""Top-level entry of our exports in the released layout; the released code does not look at it."""
EXTRA_STATE = "_extra_state"
UNIMATCH_UNUSED = ("feature_flow_attn.", "upsampler.")
"""The parts of UniMatch's `gmdepth` that MVSplat has no place for."""
PUBLISHED = "https://github.com/donydchen/mvsplat"

_UNET = (
    (r"stem", "input_blocks.0.0"),
    (r"down\.(\d+)\.block", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.0"),
    (r"down\.(\d+)\.attention", lambda m: f"input_blocks.{1 + 2 * int(m[1])}.1"),
    (r"down\.(\d+)\.shrink", lambda m: f"input_blocks.{2 + 2 * int(m[1])}.0.op"),
    (r"middle\.(\d+)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"up\.(\d+)\.blocks\.(\d+)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"up\.(\d+)\.attentions\.(\d+)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    # the deepest level has attention in front of its upsampling
    (r"up\.(\d+)\.grow", lambda m: f"output_blocks.{2 * int(m[1]) + 1}.{1 if int(m[1]) else 2}.conv"),
    (r"out_norm", "out.1"),
    (r"out", "out.0"),
)
_UNET_LEAVES = {
    "conv1": "in_layers.0",
    "norm1": "in_layers.1",
    "conv2": "out_layers.0",
    "norm2": "out_layers.1",
    "skip": "skip_connection",
    "project": "proj_out",
}
_DEPTH = {
    "cost_refinement.conv": "corr_refine_net.0",
    "cost_refinement.norm": "corr_refine_net.1",
    "cost_refinement.unet": "corr_refine_net.3",
    "cost_output": "corr_refine_net.4",
    "cost_residual": "regressor_residual",
    "depth_head": "depth_head_lowres",
    "feature_upsampler": "upsampler.0",
    "feature_projection": "proj_feature",
    "depth_refinement.conv": "refine_unet.0",
    "depth_refinement.norm": "refine_unet.1",
    "depth_refinement.unet": "refine_unet.3",
    "disparity_head": "to_disparity",
    "gaussian_head": "to_gaussians",
}
_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "norm": "norm1", "mlp_norm": "norm2"}


def official_key(key: str) -> str:
    """The released code's name of one of our parameters, without the prefix `encoder.`."""
    part, rest = key.split(".", 1)
    if part == "encoder":
        rest = re.sub(r"^stages\.(\d+)", lambda m: f"layer{int(m[1]) + 1}", rest)
        rest = re.sub(r"^stem\b", "conv1", re.sub(r"^head\b", "conv2", rest))
        return "backbone.backbone." + re.sub(r"\.skip\.", ".downsample.0.", rest)
    if part == "transformer":
        number, attention, layer, tail = re.fullmatch(r"blocks\.(\d+)\.(\w+)_attention\.(\w+)\.(.+)", rest).groups()  # type: ignore
        name = {"self": "self_attn", "cross": "cross_attn_ffn"}[attention]
        return f"backbone.transformer.layers.{number}.{name}.{_ATTENTION.get(layer, layer)}.{tail}"
    for ours, theirs in _DEPTH.items():
        if rest.startswith(ours + "."):
            tail = rest[len(ours) + 1 :]
            return f"depth_predictor.{theirs}.{_unet_key(tail) if ours.endswith('unet') else tail}"
    raise KeyError(key)


def _unet_key(key: str) -> str:
    for pattern, name in _UNET:
        match = re.match(pattern + r"\.", key)
        if match:
            start = name(match) if callable(name) else name
            leaves = [_UNET_LEAVES.get(leaf, leaf) for leaf in key[match.end() :].split(".")]
            return ".".join([start, *leaves])
    raise KeyError(key)


def to_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our weights under the released code's names, prefix included."""
    return {PREFIX + official_key(key): value for key, value in state.items() if key != EXTRA_STATE}


@dataclass(frozen=True)
class CheckpointReport:
    """What became of a checkpoint's keys."""

    file: Path
    used: int
    """Number of weights taken over: all that the network has."""
    unused: tuple[str, ...]
    """Keys that are deliberately left aside: of the decoder, the losses, transformers of Splat and Distill."""

    def __str__(self) -> str:
        """One line."""
        line = f"{self.file}: {self.used} weights taken over"
        if self.unused:
            parts = sorted({".".join(key.split(".")[:2]) for key in self.unused})
            line += f", {len(self.unused)} keys of other parts left aside ({', '.join(parts)})"
        return line


def unused_keys(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of a released state dict that the network has no use for."""
    return tuple(key for key in state if key.startswith(UNUSED) or key.endswith("sh_mask"))


def from_official(state: Mapping[str, Tensor], settings: MVSplatSettings, source: str) -> dict[str, Tensor]:
    """Weights under our names, from a released state dict.

    Args:
        state: keys with the prefix `encoder.`, or all without it. Keys of the decoder, the losses, Splat and Distill's
            transformers and the colour mask are deliberately unused.
        settings: of the network they are for.
        source: for messages.

    Raises:
        InputError: a key is missing, unknown or of another shape.
    """
    prefix = PREFIX if any(key.startswith(PREFIX) for key in state) else ""
    unused = set(unused_keys(state))
    strange = sorted(key for key in state.keys() - unused if not key.startswith(prefix))
    if strange:
        raise InputError(f"{source} has keys with and without the prefix {PREFIX} ({', '.join(strange[:3])}).")
    shapes = _shapes(settings)
    names = {official_key(key): key for key in shapes}
    given = {key.removeprefix(prefix): value for key, value in state.items() if key not in unused}
    _check_keys(given, {theirs: shapes[ours] for theirs, ours in names.items()}, source)
    return {ours: given[theirs] for theirs, ours in names.items()}


def _shapes(settings: MVSplatSettings) -> dict[str, tuple[int, ...]]:
    from snd_nerfstudio.reconstruction.mvsplat.model import MVSplat

    with torch.device("meta"):
        network = MVSplat(settings)
    return {key: tuple(value.shape) for key, value in network.named_parameters()}


RELEASED = f"The released MVSplat is `re10k.ckpt` of {PUBLISHED}."
UNIMATCH = "UniMatch's is gmdepth-scale1-resumeflowthings-scannet-5d9d7964.pth of https://github.com/autonomousvision/unimatch."


def _check_keys(
    given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], source: str, wanted: str = RELEASED
) -> None:
    missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    if len(missing) > len(expected) // 2:
        raise InputError(
            f"{source} is a checkpoint of another model: {len(missing)} of MVSplat's {len(expected)} weights are not "
            f"in it (among them {missing[0]}). {wanted}"
        )
    problems = [f"missing {key}" for key in missing] + [f"unknown {key}" for key in unknown]
    problems += [
        f"{key} is a {_kind(given[key])}"
        for key in sorted(expected.keys() & given.keys())
        if not isinstance(given[key], Tensor) or not given[key].is_floating_point()
    ]
    problems += [f"{key} has a NaN or infinite value" for key in sorted(_broken(given, expected))]
    problems += [
        f"{key} has shape {tuple(given[key].shape)}, expected {expected[key]}"
        for key in sorted(expected.keys() & given.keys())
        if isinstance(given[key], Tensor) and tuple(given[key].shape) != expected[key]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise InputError(f"{source} does not fit MVSplat: {'; '.join(problems[:3])}{more}.")


def _kind(value: Any) -> str:
    return f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _broken(given: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key in expected.keys() & given.keys()
        if isinstance(given[key], Tensor) and given[key].is_floating_point() and not given[key].isfinite().all()
    ]


def read_file(path: Path) -> dict[str, Any]:
    """A checkpoint file's contents, without unpickling anything but tensors and plain values.

    Raises:
        InputError: there is no such file, or it is damaged or holds other objects.
    """
    if not path.is_file():
        raise InputError(f"The checkpoint {path} does not exist.")
    try:
        content = read_tensors(path)
    except UNREADABLE as error:
        refused = refused_objects(error, path, "{'state_dict': c['state_dict']}")
        if refused is not None:
            raise InputError(f"The checkpoint {path} {refused}") from error
        raise InputError(
            f"The checkpoint {path} cannot be read ({first_line(error)}): it is damaged, or no checkpoint."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"The checkpoint {path} holds a {type(content).__name__}, not a dictionary of named weights.")
    return content


def find_checkpoint(path: Path) -> Path:
    """The file meant by a run's folder or `config.yml`: its newest checkpoint; a file stands for itself.

    Raises:
        InputError: there is none.
    """
    folder = path.parent if path.name == "config.yml" else path
    if not folder.is_dir():
        return path
    found = sorted(folder.glob("step-*.ckpt")) or sorted(folder.glob("nerfstudio_models/step-*.ckpt"))
    if not found:
        raise InputError(f"{path} has no step-*.ckpt: give a run of `ns-train mvsplat`, or a checkpoint file.")
    return found[-1]


def read_checkpoint(
    path: Path, geometry: Optional[Geometry]
) -> tuple[MVSplatSettings, dict[str, Any], CheckpointReport]:
    """Settings, state dict (ours, strict) and report of any supported checkpoint; see `MVSplat.from_checkpoint`."""
    path = find_checkpoint(path)
    content = read_file(path)
    if "pipeline" in content:
        settings, weights = _from_run(content["pipeline"], path, geometry)
        return settings, weights, CheckpointReport(path, len(weights) - 1, ())
    settings = RE10K
    if SETTINGS_KEY in content:
        settings = MVSplatSettings.from_dict(content[SETTINGS_KEY], f"The checkpoint {path}")
    settings = settings if geometry is None else replace(settings, geometry=geometry)
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InputError(f"The `state_dict` of the checkpoint {path} is no dictionary of named weights.")
    weights = from_official(state, settings, f"The checkpoint {path}")
    report = CheckpointReport(path, len(weights), unused_keys(state))
    return settings, {**weights, EXTRA_STATE: settings.to_dict()}, report


def _from_run(state: Any, path: Path, geometry: Optional[Geometry]) -> tuple[MVSplatSettings, dict[str, Any]]:
    named = isinstance(state, Mapping)
    names = [str(key) for key in state if str(key).endswith("network." + EXTRA_STATE)] if named else []
    if len(names) != 1:
        raise InputError(f"The checkpoint {path} is not of a run of `ns-train mvsplat`.")
    prefix = names[0].removesuffix(EXTRA_STATE)
    strange = sorted(str(key) for key in state if not str(key).startswith(prefix))
    if strange:
        raise InputError(f"The checkpoint {path} has keys that are not the network's ({', '.join(strange[:3])}).")
    settings = MVSplatSettings.from_dict(state[names[0]], f"The checkpoint {path}")
    settings = settings if geometry is None else replace(settings, geometry=geometry)
    weights = {key.removeprefix(prefix): value for key, value in state.items()}
    weights[EXTRA_STATE] = settings.to_dict()
    given = {key: value for key, value in weights.items() if key != EXTRA_STATE}
    _check_keys(given, _shapes(settings), f"The checkpoint {path}")
    return settings, weights


def write_official(network: nn.Module, settings: MVSplatSettings, path: Path, about: Mapping[str, Any]) -> None:
    """Write weights in the released layout, whole or not at all; the released code loads them with matching sizes.

    Args:
        network: an `MVSplat`.
        settings: its settings, stored beside the weights.
        path: file to write, `.ckpt`.
        about: plain values stored at the top level, such as `global_step`.

    Raises:
        InputError: the file cannot be written.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in network.named_parameters()}
    content = {**about, "state_dict": to_official(state), SETTINGS_KEY: settings.to_dict()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}).") from error


def load_unimatch(network: nn.Module, path: Path) -> list[str]:
    """Initialise image encoder and transformer from UniMatch's `gmdepth` (`gmdepth-scale1-resumeflowthings-scannet`).

    Args:
        network: an `MVSplat`; its other weights stay.
        path: the file; weights under `model`.

    Returns:
        The file's keys that have no place in MVSplat.

    Raises:
        InputError: the file is missing, damaged, or does not fit.
    """
    content = read_file(path)
    state = content.get("model", content)
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise InputError(f"The checkpoint {path} is not UniMatch's. {UNIMATCH}")
    unused = sorted(key for key in state if key.startswith(UNIMATCH_UNUSED))
    parameters = dict(network.named_parameters())
    names = {key: official_key(key).removeprefix("backbone.") for key in _initialised(parameters)}
    given = {key: value for key, value in state.items() if key not in unused}
    _check_keys(given, {names[key]: tuple(parameters[key].shape) for key in names}, f"The checkpoint {path}", UNIMATCH)
    with torch.no_grad():
        for ours, theirs in names.items():
            parameters[ours].copy_(given[theirs])
    return unused


def _initialised(keys: Iterable[str]) -> list[str]:
    return [key for key in keys if key.startswith(("encoder.", "transformer."))]
