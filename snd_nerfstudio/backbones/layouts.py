"""Key layouts of vision transformer weights and adapters merged into them: functions on state dicts, nothing else.

The layout used everywhere else is timm's, as `create_vit` builds the model. The others:

* ``hub``: DINOv2's own code (https://github.com/facebookresearch/dinov2), which Splat and Distill writes too.
* ``transformers``: the files of ``Dinov2Model``, ``Dinov2WithRegistersModel`` and ``DINOv3ViTModel``. Since version 5
  their modules have other names than their files (``q_proj`` for ``attention.query``); both spellings are read.
* low-rank adapters as peft stores them, and those of MEF (https://github.com/qq456cvb/3DCorrEnhance).

No key is ever dropped silently: a conversion gives back what it set aside, with the reason, and what it cannot
explain.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

State = dict[str, Tensor]

PRETRAINING_ONLY = "used only while the original itself was trained"


class LayoutError(ValueError):
    """A state dict is not what it seems to be; the message is half a sentence about it."""


@dataclass(frozen=True)
class Converted:
    """A state dict in another layout."""

    state: State
    """Keys of the new layout."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Keys of the old layout that are explained but have no place in the new one, with the reason."""
    unknown: tuple[str, ...] = ()
    """Keys of the old layout that nothing explains."""


# What the layouts have in common is that a layer is a path with at most one number in it, {i}, and perhaps a leaf
# `weight` or `bias`. A table has one row for each layer.
_SAME_IN_HUB_AND_TIMM = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj",
    "norm",
    *(f"blocks.{{i}}.{layer}" for layer in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")),
    "blocks.{i}.ls1.gamma",
    "blocks.{i}.ls2.gamma",
)
_HUB_TO_TIMM = {
    **{layer: layer for layer in _SAME_IN_HUB_AND_TIMM},
    "register_tokens": "reg_token",
    "blocks.{i}.mlp.w12": "blocks.{i}.mlp.fc1",
    "blocks.{i}.mlp.w3": "blocks.{i}.mlp.fc2",
}
_TRANSFORMERS_TO_HUB = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.register_tokens": "register_tokens",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer.{i}.norm1": "blocks.{i}.norm1",
    "encoder.layer.{i}.attention.attention.qkv": "blocks.{i}.attn.qkv",
    "encoder.layer.{i}.attention.output.dense": "blocks.{i}.attn.proj",
    "encoder.layer.{i}.layer_scale1.lambda1": "blocks.{i}.ls1.gamma",
    "encoder.layer.{i}.norm2": "blocks.{i}.norm2",
    "encoder.layer.{i}.mlp.fc1": "blocks.{i}.mlp.fc1",
    "encoder.layer.{i}.mlp.fc2": "blocks.{i}.mlp.fc2",
    "encoder.layer.{i}.mlp.weights_in": "blocks.{i}.mlp.w12",
    "encoder.layer.{i}.mlp.weights_out": "blocks.{i}.mlp.w3",
    "encoder.layer.{i}.layer_scale2.lambda1": "blocks.{i}.ls2.gamma",
    "layernorm": "norm",
}
_MODULE_TO_FILE_SPELLING = {
    ".attention.q_proj.": ".attention.attention.query.",
    ".attention.k_proj.": ".attention.attention.key.",
    ".attention.v_proj.": ".attention.attention.value.",
    ".attention.o_proj.": ".attention.output.dense.",
    ".mlp.down_proj.": ".mlp.weights_out.",
}
_QUERY_KEY_VALUE = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_DINOV3_TO_TIMM = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings": "patch_embed.proj",
    "layer.{i}.norm1": "blocks.{i}.norm1",
    "layer.{i}.attention.qkv": "blocks.{i}.attn.qkv",
    "layer.{i}.attention.query_bias": "blocks.{i}.attn.q_bias",
    "layer.{i}.attention.value_bias": "blocks.{i}.attn.v_bias",
    "layer.{i}.attention.o_proj": "blocks.{i}.attn.proj",
    "layer.{i}.layer_scale1.lambda1": "blocks.{i}.gamma_1",
    "layer.{i}.norm2": "blocks.{i}.norm2",
    "layer.{i}.mlp.down_proj": "blocks.{i}.mlp.fc2",
    "layer.{i}.layer_scale2.lambda1": "blocks.{i}.gamma_2",
    "norm": "norm",
}
_DINOV3_PLAIN_MLP = {"layer.{i}.mlp.up_proj": "blocks.{i}.mlp.fc1"}
_DINOV3_GATED_MLP = {
    "layer.{i}.mlp.gate_proj": "blocks.{i}.mlp.fc1_g",
    "layer.{i}.mlp.up_proj": "blocks.{i}.mlp.fc1_x",
}


def _renamed(state: Mapping[str, Tensor], table: Mapping[str, str]) -> tuple[State, tuple[str, ...]]:
    """The state under the table's names, and the keys that the table does not have or has twice."""
    renamed: State = {}
    unknown = []
    for key, value in state.items():
        layer, leaf = re.fullmatch(r"(.+?)((?:\.(?:weight|bias))?)", key).groups()  # type: ignore
        number = re.search(r"(?<=\.)\d+(?=\.)", layer)
        pattern = layer if number is None else layer[: number.start()] + "{i}" + layer[number.end() :]
        new = table.get(pattern, "").replace("{i}", number[0] if number else "") + leaf
        if pattern not in table or new in renamed:
            unknown.append(key)
        else:
            renamed[new] = value
    return renamed, tuple(unknown)


def _packed(state: Mapping[str, Tensor], parts: tuple[str, ...], whole: str, leaves: str = "weight|bias") -> State:
    """Layers that are stored apart put one above the other, where all of them are there; the rest stays."""
    packed = dict(state)
    for key in state:
        if re.search(rf"\.{re.escape(parts[0])}\.(?:{leaves})$", key):
            siblings = [key.replace(parts[0], part) for part in parts]
            if all(sibling in state for sibling in siblings):
                packed[key.replace(parts[0], whole)] = torch.cat([packed.pop(sibling) for sibling in siblings])
    return packed


def _unpacked(state: Mapping[str, Tensor], whole: str, parts: tuple[str, ...]) -> State:
    """The reverse of `_packed`."""
    unpacked: State = {}
    for key, value in state.items():
        if f".{whole}." in key:
            pieces = [piece.clone() for piece in value.chunk(len(parts))]
            unpacked |= {key.replace(whole, part): piece for part, piece in zip(parts, pieces, strict=True)}
        else:
            unpacked[key] = value
    return unpacked


def _all_known(state: State, unknown: Iterable[str], layout: str) -> State:
    unknown = list(unknown)
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        raise LayoutError(f"{len(unknown)} keys have no name in the {layout} layout ({', '.join(unknown[:3])}{more})")
    return state


# ------------------------------------------------------------------ DINOv2


def hub_to_timm(state: Mapping[str, Tensor]) -> Converted:
    """DINOv2's hub layout in timm's names.

    Blocks may be in chunks (``blocks.<chunk>.<i>.``), as in training code. In models with registers the hub's
    position embedding has an entry for the class token, which timm adds to that token once and for all.

    Args:
        state: of a model of DINOv2's code, with or without registers, with MLPs or SwiGLU (``mlp.w12``, ``mlp.w3``).
    """
    flat = {re.sub(r"^blocks\.\d+\.(?=\d+\.)", "blocks.", key): (key, value) for key, value in state.items()}
    if len(flat) < len(state):
        raise LayoutError("a block is there twice, in a chunk and without")
    set_aside = {flat.pop("mask_token")[0]: PRETRAINING_ONLY} if "mask_token" in flat else {}
    converted, unknown = _renamed({key: value for key, (_, value) in flat.items()}, _HUB_TO_TIMM)
    if {"reg_token", "cls_token", "pos_embed"} <= converted.keys():
        converted["cls_token"] = converted["cls_token"] + converted["pos_embed"][:, :1]
        converted["pos_embed"] = converted["pos_embed"][:, 1:].clone()
    return Converted(converted, set_aside, tuple(flat[key][0] for key in unknown))


def timm_to_hub(state: Mapping[str, Tensor]) -> State:
    """timm's DINOv2 in the names of DINOv2's hub models, whole: ``load_state_dict(strict=True)`` takes it.

    The mask token, which timm does not keep, is zero. So is the class token's entry in the position embedding of
    models with registers, for timm has it in the class token already.

    Raises:
        LayoutError: a key that DINOv2 does not have.
    """
    table = {layer: layer for layer in _SAME_IN_HUB_AND_TIMM} | {"reg_token": "register_tokens"}
    if _is_gated(state):
        table |= {"blocks.{i}.mlp.fc1": "blocks.{i}.mlp.w12", "blocks.{i}.mlp.fc2": "blocks.{i}.mlp.w3"}
    converted = _all_known(*_renamed(state, table), "DINOv2 hub")
    class_token = converted["cls_token"]
    if "register_tokens" in converted:
        converted["pos_embed"] = torch.cat([torch.zeros_like(class_token), converted["pos_embed"]], dim=1)
    converted["mask_token"] = torch.zeros_like(class_token[0])
    return converted


def _is_gated(state: Mapping[str, Tensor]) -> bool:
    first, second = state["blocks.0.mlp.fc1.weight"], state["blocks.0.mlp.fc2.weight"]
    return first.shape[0] == 2 * second.shape[1]


def transformers_to_timm(state: Mapping[str, Tensor]) -> Converted:
    """``Dinov2Model`` or ``Dinov2WithRegistersModel`` of transformers in timm's names.

    Args:
        state: as stored in files, or under the names that the modules have since transformers 5.
    """
    spelled: dict[str, Tensor] = {}
    originals: dict[str, str] = {}
    for key, value in state.items():
        new = key
        for module, file in _MODULE_TO_FILE_SPELLING.items():
            new = new.replace(module, file)
        if new in spelled:
            raise LayoutError(f"{key} and {originals[new]} are the same layer")
        spelled[new], originals[new] = value, key
    packed = _packed(spelled, _QUERY_KEY_VALUE, "attention.attention.qkv")
    packed = _packed(packed, ("mlp.gate_proj", "mlp.up_proj"), "mlp.weights_in")
    hub, unknown = _renamed(packed, _TRANSFORMERS_TO_HUB)
    converted = hub_to_timm(hub)
    set_aside = {f"embeddings.{key}": reason for key, reason in converted.set_aside.items()}
    return Converted(converted.state, set_aside, tuple(originals[key] for key in unknown) + converted.unknown)


def timm_to_transformers(state: Mapping[str, Tensor]) -> State:
    """timm's DINOv2 in the names of transformers' files, which every version of transformers reads.

    Raises:
        LayoutError: a key that DINOv2 does not have.
    """
    table = {ours: theirs for theirs, ours in _TRANSFORMERS_TO_HUB.items()}
    converted = _all_known(*_renamed(timm_to_hub(state), table), "transformers")
    return _unpacked(converted, "attention.attention.qkv", _QUERY_KEY_VALUE)


# ------------------------------------------------------------------ DINOv3


def dinov3_to_timm(state: Mapping[str, Tensor], biases: bool = False) -> Converted:
    """``DINOv3ViTModel`` of transformers in the names of timm's ``Eva``.

    Published DINOv3 has biases of zero at queries and values; timm's models have none, except those with ``qkvb`` in
    their name. Keys have no bias in either.

    Args:
        state: with or without ``model.`` before its layers.
        biases: the timm model has biases at queries and values. Otherwise those of the state are set aside if they
            are zero, and unknown if they are not.
    """
    shortened = {re.sub(r"^model\.(?=layer\.)", "", key): key for key in state}
    if len(shortened) < len(state):
        raise LayoutError("a layer is there twice, with and without the prefix `model.`")
    set_aside: dict[str, str] = {}
    theirs: State = {}
    for short, key in shortened.items():
        bias = re.fullmatch(r"(layer\.\d+\.attention)\.([qkv])_proj\.bias", short)
        if short == "embeddings.mask_token":
            set_aside[key] = PRETRAINING_ONLY
        elif bias is None:
            theirs[short] = state[key]
        elif biases and bias[2] != "k":
            theirs[f"{bias[1]}.{'query' if bias[2] == 'q' else 'value'}_bias"] = state[key]
        elif not state[key].any():
            set_aside[key] = "zero, and the model has no such bias"
        else:
            theirs[short] = state[key]  # which no row of the table explains
    if biases:
        for short in [key for key in theirs if re.fullmatch(r"layer\.\d+\.attention\.[qv]_proj\.weight", key)]:
            weight, role = theirs[short], "query" if ".q_proj." in short else "value"
            theirs.setdefault(f"{short.rsplit('.', 2)[0]}.{role}_bias", weight.new_zeros(len(weight)))
    projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    packed = _packed(theirs, projections, "attention.qkv", leaves="weight")
    gated = any(".mlp.gate_proj." in key for key in packed)
    converted, unknown = _renamed(packed, _DINOV3_TO_TIMM | (_DINOV3_GATED_MLP if gated else _DINOV3_PLAIN_MLP))
    return Converted(converted, set_aside, tuple(shortened.get(key, key) for key in unknown))


def timm_to_dinov3(state: Mapping[str, Tensor]) -> State:
    """timm's DINOv3 in the names of the files of ``DINOv3ViTModel``, with the biases of queries and values.

    Those biases are zero where timm's model has none, so that the file fits the defaults of ``DINOv3ViTConfig``.

    Raises:
        LayoutError: a key that DINOv3 does not have.
    """
    gated = any(".mlp.fc1_g." in key for key in state)
    table = _DINOV3_TO_TIMM | (_DINOV3_GATED_MLP if gated else _DINOV3_PLAIN_MLP)
    converted = _all_known(*_renamed(state, {ours: theirs for theirs, ours in table.items()}), "DINOv3 transformers")
    projections = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    converted = _unpacked(converted, "attention.qkv", projections)
    for key in [key for key in converted if re.search(r"\.[qv]_proj\.weight$", key)]:
        layer, role = key.rsplit(".", 2)[0], "query" if ".q_proj." in key else "value"
        zeros = converted[key].new_zeros(len(converted[key]))
        converted[f"{key.removesuffix('weight')}bias"] = converted.pop(f"{layer}.{role}_bias", zeros)
    converted["embeddings.mask_token"] = torch.zeros_like(converted["embeddings.cls_token"])
    return converted


# ------------------------------------------------------------------ adapters

Adapters = dict[str, tuple[Tensor, Tensor]]
"""By the path of the adapted layer: the first factor A and the second one B."""


def is_adapted(keys: Iterable[str]) -> bool:
    """Whether any of the keys is of a model with peft's adapters that were not merged."""
    return any(re.search(r"(^|\.)(lora_\w+|base_layer)\.", key) for key in keys)


def split_adapters(state: Mapping[str, Tensor]) -> tuple[State, Adapters]:
    """The plain weights of an adapted model, perhaps none at all, and its low-rank adapters.

    Args:
        state: as peft's models have it (``.base_layer.``, ``.lora_A.<name>.weight``) or its files (no name).

    Raises:
        LayoutError: half of an adapter is missing, there are several, or one of another kind than plain LoRA.
    """
    plain: State = {}
    factors: dict[str, dict[str, Tensor]] = {}
    names = set()
    for key, value in state.items():
        adapter = re.fullmatch(r"(.+)\.lora_([AB])((?:\.[^.]+)?)\.weight", key)
        if adapter is not None:
            factors.setdefault(adapter[1], {})[adapter[2]] = value
            names.add(adapter[3])
        elif "lora_" in key:
            raise LayoutError(f"{key} is of a kind of adapter that is not plain LoRA")
        else:
            plain[key.replace(".base_layer.", ".")] = value
    if len(names) > 1:
        raise LayoutError(
            f"there are several adapters ({', '.join(sorted(n.lstrip('.') or 'unnamed' for n in names))})"
        )
    halves = [path for path, pair in factors.items() if len(pair) < 2]
    if halves:
        raise LayoutError(f"{len(halves)} adapters have one factor only (of {halves[0]})")
    return plain, {path: (pair["A"], pair["B"]) for path, pair in factors.items()}


def low_rank_update(
    first: Float[Tensor, "r *fan_in"], second: Float[Tensor, "o s *ones"]
) -> Float[Tensor, "o *fan_in"]:
    """The product of an adapter's factors: ``B A``; of a convolution ``sum_r B[o, r] A[r, c, y, x]``.

    Raises:
        LayoutError: the factors do not go together (``s`` is not ``r``).
    """
    if first.shape[0] != second.shape[1] or second[0, 0].numel() != 1:
        raise LayoutError(f"factors of the shapes {tuple(first.shape)} and {tuple(second.shape)} do not go together")
    return torch.einsum("or,r...->o...", second.flatten(1), first)


def merge_adapters(state: Mapping[str, Tensor], adapters: Adapters, scale: float) -> State:
    """``W <- W + scale * B A`` in each adapted layer (Hu et al. 2022; scale: alpha / rank).

    Raises:
        LayoutError: an adapted layer is not in the state, or has another shape.
    """
    merged = dict(state)
    for path, (first, second) in adapters.items():
        weight = state.get(f"{path}.weight")
        update = low_rank_update(first.float(), second.float())
        if weight is None:
            raise LayoutError(f"the adapted layer {path} has no weight of its own")
        if weight.shape != update.shape:
            raise LayoutError(f"{path} has shape {tuple(weight.shape)}, its adapter {tuple(update.shape)}")
        merged[f"{path}.weight"] = weight + scale * update.to(weight.dtype)
    return merged


def merge_mef(state: Mapping[str, Tensor], checkpoint: Mapping[str, Any]) -> tuple[State, State]:
    """MEF's adapters merged into the queries and values of the last four blocks; they are not scaled.

    ``W_q <- W_q + B_2j A_2j``, ``W_v <- W_v + B_2j+1 A_2j+1`` in block ``depth - 4 + j`` (You et al. 2024, "Multiview
    Equivariance Improves 3D Correspondence Understanding with Minimal Feature Finetuning").

    Args:
        state: DINOv2's own weights, in timm's or the hub's names.
        checkpoint: ``w_a_000`` to ``w_a_007`` (4, c), ``w_b_000`` to ``w_b_007`` (c, 4), and
            ``state_dict["refine_conv"]``: ``weight`` (c, c, 3, 3) and ``bias`` (c).

    Returns:
        The merged weights, and those of the convolution that follows the final norm.

    Raises:
        LayoutError: something is missing, or of another shape.
    """
    depth = 1 + max((int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))), default=-1)
    expected = {f"w_{half}_{number:03d}" for half in "ab" for number in range(8)}
    found = {key for key in checkpoint if re.fullmatch(r"w_[ab]_\d+", key)}
    if found != expected:
        odd = sorted(expected ^ found)
        raise LayoutError(f"it has not the 16 factors of MEF's adapters ({odd[0]} is missing or too many)")
    stored = checkpoint.get("state_dict")
    refine = stored.get("refine_conv") if isinstance(stored, Mapping) else None
    if depth < 4:
        raise LayoutError(f"MEF adapts the last four blocks, and this backbone has {depth}")
    channels = state["norm.weight"].shape[0]
    shapes = {"weight": (channels, channels, 3, 3), "bias": (channels,)}
    if not isinstance(refine, Mapping) or {key: tuple(value.shape) for key, value in refine.items()} != shapes:
        raise LayoutError(f"its refine_conv is no 3x3 convolution of {channels} channels")
    merged = dict(state)
    for number in range(8):
        first, second = checkpoint[f"w_a_{number:03d}"].detach(), checkpoint[f"w_b_{number:03d}"].detach()
        update = low_rank_update(first.float(), second.float())
        if update.shape != (channels, channels):
            raise LayoutError(f"its adapters have {update.shape[0]} channels, the backbone has {channels}")
        key = f"blocks.{depth - 4 + number // 2}.attn.qkv.weight"
        rows = slice(0, channels) if number % 2 == 0 else slice(2 * channels, 3 * channels)
        weight = merged[key].clone()
        weight[rows] += update.to(weight.dtype)
        merged[key] = weight
    return merged, {key: value.detach().float() for key, value in refine.items()}
