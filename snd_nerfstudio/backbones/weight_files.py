"""Files and folders of weights: opening them without running code, and undoing nesting and prefixes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.tensor_files import UNREADABLE, first_line, read_tensors, refused_objects

MANIFEST = "manifest.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_MODELS = ("model.safetensors", "pytorch_model.bin")
INDEX = "model.safetensors.index.json"

CONTAINERS = ("state_dict", "model", "teacher", "student")
"""Entries of a checkpoint that hold its weights."""
BOOKKEEPING = {
    *("epoch", "global_step", "step", "iteration", "pytorch-lightning_version", "loops", "callbacks"),
    *("optimizer", "optimizer_states", "lr_scheduler", "lr_schedulers", "scheduler", "scaler", "amp_scaling_state"),
    *("hparams_name", "hyper_parameters", "hparams_type", "datamodule_hparams_name", "datamodule_hyper_parameters"),
    *("args", "config", "MixedPrecision", "MixedPrecisionPlugin", "NativeMixedPrecisionPlugin"),
}
"""Entries that tell how training was going."""
PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "base_model.model."),
    *("student.backbone.", "teacher.backbone."),
)
"""Stripped where all keys have them."""
HEADS = ("dino_head.", "ibot_head.")


# ------------------------------------------------------------------ opening


def read_content(path: Path, flag: str) -> tuple[dict[str, Any], list[Path], dict[str, Any]]:
    """What a file, or the weights in a folder, hold.

    Args:
        path: a file of weights; or a folder of peft, transformers or ``ns-export snd-backbone``.
        flag: that the user gave it by, for messages.

    Returns:
        The content, the files that hold it, and the ``manifest`` and ``adapter_config`` that come with it, if any.

    Raises:
        InputError: there are no weights, or they cannot be read without running code.
    """
    about: dict[str, Any] = {}
    if path.is_dir():
        files, about = _in_folder(path, flag)
    elif path.is_file():
        files, manifest = [path], path.parent / MANIFEST
        try:
            described = _read_json(manifest, flag) if manifest.is_file() else {}
        except InputError:  # something else of that name
            described = {}
        if stated_sha256(described, path.name):
            about["manifest"] = described
        if path.name in ADAPTERS and (path.parent / ADAPTER_CONFIG).is_file():
            about["adapter_config"] = _read_json(path.parent / ADAPTER_CONFIG, flag)
    else:
        raise InputError(f"{flag} {path}: no such file.")
    content: dict[str, Any] = {}
    for file in files:
        content.update(_read_file(file, flag))
    return content, files, about


def _in_folder(folder: Path, flag: str) -> tuple[list[Path], dict[str, Any]]:
    if not (folder / MANIFEST).is_file() and (folder / "timm" / MANIFEST).is_file():
        folder = folder / "timm"  # of an export in several layouts
    elif (folder / MANIFEST).is_file() and (folder / "timm" / MANIFEST).is_file():
        raise InputError(f"{flag} {folder} holds two exports, one in it and one in its folder timm: name a file.")
    if (folder / MANIFEST).is_file():
        manifest = _read_json(folder / MANIFEST, flag)
        if manifest.get("format") in ("onnx", "pt2"):
            raise InputError(f"{flag} {folder} is a graph, not weights: give the folder of the format timm or hub.")
        named = (name for name in (manifest.get("file"), manifest.get("hub_weights")) if isinstance(name, str))
        found = [folder / Path(name).name for name in (*named, *WHOLE_MODELS)]
        found = [file for file in found if file.is_file()] or found
        return [_existing(found[0], flag)], {"manifest": manifest}
    if (folder / ADAPTER_CONFIG).is_file():
        found = [folder / name for name in ADAPTERS if (folder / name).is_file()]
        config = _read_json(folder / ADAPTER_CONFIG, flag)
        return [_existing((found or [folder / ADAPTERS[0]])[0], flag)], {"adapter_config": config}
    if (folder / INDEX).is_file():
        names = sorted(set(_read_json(folder / INDEX, flag).get("weight_map", {}).values()))
        return [_existing(folder / Path(name).name, flag) for name in names], {}
    found = [folder / name for name in WHOLE_MODELS if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"{flag} {folder} is a folder without weights that are known: neither a run (config.yml), nor of "
            "ns-export snd-backbone (manifest.json), peft (adapter_config.json) or transformers (model.safetensors)."
        )
    return found[:1], {}


def stated_sha256(manifest: Mapping[str, Any], name: str) -> Optional[str]:
    """What an export's manifest says about a file beside it; None: nothing."""
    for entry in (manifest.get("sha256"), manifest.get("files")):
        if isinstance(entry, str) and manifest.get("file", name) == name:
            return entry
        if isinstance(entry, Mapping) and isinstance(entry.get(name), str):
            return entry[name]
    return None


def _existing(file: Path, flag: str) -> Path:
    if not file.is_file():
        raise InputError(f"{flag} {file.parent}: {file.name} is missing in it.")
    return file


def _read_json(file: Path, flag: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag}: {file} cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag}: {file} holds no named values.")
    return content


def _read_file(file: Path, flag: str) -> dict[str, Any]:
    """One file's content, without unpickling anything but tensors and plain values."""

    try:
        content = read_tensors(file)
    except UNREADABLE as error:
        kept = "{k: v for k, v in c.items() if k == 'state_dict' or k.startswith('w_')}"
        refused = refused_objects(error, file, kept)
        if refused is not None:
            raise InputError(f"{flag} {file} cannot be read as weights: it {refused}") from error
        reason = first_line(error)
        raise InputError(f"{flag} {file} cannot be read as weights ({reason}): it is damaged, or none.") from error
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{flag} {file} holds a {type(content).__name__}, no named weights.")
    if "pipeline" in content:
        raise InputError(f"{flag} {file} is a checkpoint of a run: give the run's config.yml, which says what it is.")
    return dict(content)


def read_adapter_config(config: Optional[Mapping[str, Any]], file: Path, flag: str) -> Optional[Mapping[str, Any]]:
    """Check that a folder of peft's holds plain LoRA, which can be merged by its formula.

    Args:
        config: the contents of ``adapter_config.json``; None where there is none.
        file: the adapters.
        flag: that the user gave it by, for messages.

    Raises:
        InputError: another kind of adapter.
    """
    if config is None:
        return None
    problems = [] if config.get("peft_type") == "LORA" else [f"peft_type {config.get('peft_type')}"]
    initial = config.get("init_lora_weights", True)
    if initial not in (True, False, "gaussian", "orthogonal", "eva"):
        problems.append(f"init_lora_weights {initial}, which changes the base too")
    if config.get("bias", "none") != "none":
        problems.append(f"bias {config['bias']}")
    without = ("fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices")
    kinds = ("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication", "target_parameters")
    more = ("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config")
    problems += [f"{name} {config[name]}" for name in (*without, *kinds, *more) if config.get(name)]
    if not isinstance(config.get("r"), int) or not isinstance(config.get("lora_alpha"), (int, float)):
        problems.append("no r and lora_alpha")
    if problems:
        raise InputError(
            f"{flag} {file.parent} is no plain LoRA ({'; '.join(problems)}): merge it with peft (merge_and_unload) "
            "and give the merged weights."
        )
    return config


# ------------------------------------------------------------------ nesting and prefixes


@dataclass
class Flat:
    """Weights by their own keys."""

    state: dict[str, Any]
    set_aside: dict[str, str]
    """Keys of other things, with the reason."""
    unknown: list[str]
    assumptions: list[str]
    chosen: bool = False
    """There were a teacher and a student to choose from."""


def unwrap(content: Mapping[str, Any], which: str) -> Flat:
    """Undo the nesting of checkpoints (``{"state_dict": ...}``) and prefixes that all keys share.

    Args:
        content: a checkpoint. MEF's stays as it is but for its bookkeeping, for its weights are in several places.
        which: ``teacher`` or ``student``, where both are there.
    """
    flat = Flat(dict(content), {}, [], [])
    if any(re.fullmatch(r"w_a_\d+", key) for key in content):
        for key in [key for key in content if not re.fullmatch(r"w_[ab]_\d+|state_dict", key)]:
            del flat.state[key]
            _explain(key, flat)
        stored = content.get("state_dict")
        others = sorted(set(stored) - {"refine_conv"}) if isinstance(stored, Mapping) else []
        flat.unknown += [f"state_dict.{key}" for key in others]
        return flat
    while _open_container(flat, which) or _strip_prefix(flat, which):
        pass
    for key in [key for key, value in flat.state.items() if not isinstance(value, Tensor)]:
        del flat.state[key]
        _explain(key, flat)
    return flat


def _explain(key: str, flat: Flat) -> None:
    if key in BOOKKEEPING:
        flat.set_aside[key] = "bookkeeping of the training"
    else:
        flat.unknown.append(key)


def _open_container(flat: Flat, which: str) -> bool:
    found = [key for key in CONTAINERS if isinstance(flat.state.get(key), Mapping)]
    if not found or any(isinstance(value, Tensor) for value in flat.state.values()):
        return False
    both = {"teacher", "student"} <= set(found)
    chosen = which if both else found[0]
    flat.chosen |= both
    for key in flat.state.keys() - {chosen}:
        if both and key in ("teacher", "student"):
            flat.set_aside[key] = "the other one of teacher and student"
        else:
            _explain(key, flat)
    flat.state = dict(flat.state[chosen])
    return True


def _strip_prefix(flat: Flat, which: str) -> bool:
    """One prefix that all keys share, heads aside; or one half of student and teacher."""
    halves = {key.split(".", 1)[0] for key in flat.state}
    if halves == {"student", "teacher"}:
        other = [key for key in flat.state if not key.startswith(f"{which}.")]
        flat.set_aside |= dict.fromkeys(other, "the other one of teacher and student")
        flat.state = {key.split(".", 1)[1]: value for key, value in flat.state.items() if key not in other}
        flat.chosen = True
        return True
    heads = [key for key in flat.state if key.startswith(HEADS)]
    rest = {key: value for key, value in flat.state.items() if key not in heads}
    for prefix in PREFIXES:
        if rest and all(key.startswith(prefix) for key in rest):
            flat.set_aside |= dict.fromkeys(heads, "heads of the training")
            flat.state = {key.removeprefix(prefix): value for key, value in rest.items()}
            flat.assumptions.append(f"prefix {prefix} stripped from all keys")
            return True
    return False
