"""One reader for each layout of weights: from what a file holds to timm's keys.

A reader gives back every key that it has no use for, with the reason or as unknown. It does not compare anything with
the backbone: `weights.read_weights` does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Optional

from snd_nerfstudio.backbones import layouts
from snd_nerfstudio.backbones.layouts import LayoutError, State
from snd_nerfstudio.backbones.registry import PositionEmbedding
from snd_nerfstudio.backbones.weight_files import unwrap

Layout = Literal["timm", "hub", "transformers", "dinov3-transformers", "peft", "snd-lightning", "mef", "run"]
Which = Literal["teacher", "student"]
RELEASED_RANK = 8
"""Of the adapters in the released code of Splat and Distill, whose alpha is the same."""


@dataclass
class Context:
    """What readers may need besides the state."""

    expected: State
    """The timm model's own."""
    base: Callable[[], State]
    """Weights beneath adapters that come without their base, in timm's keys; may raise `InputError`."""
    which: Which = "teacher"
    """Of a file that has both."""
    alpha: Optional[float] = None
    """Scale of adapters times their rank, where the file does not say it."""
    adapters: Optional[Mapping[str, Any]] = None
    """What a folder written by peft says about them."""
    used: set[str] = field(default_factory=set)
    """Options that made a difference: which, alpha, base."""


@dataclass(frozen=True)
class Reading:
    """A state in timm's keys, before it is compared with the backbone."""

    layout: Layout
    state: State
    set_aside: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    refine: Optional[State] = None
    base: Optional[State] = None
    """What the weights were before training, where the file or its base tells."""
    base_name: str = ""
    positions: Optional[PositionEmbedding] = None
    """How the position embedding was resized in training, where a run or an export says it."""
    licence: str = ""
    """Of the weights, where a run or an export says it."""


def detect_layout(state: Mapping[str, Any]) -> Layout:
    """Which layout a state dict without nesting and prefixes is in, by the keys that only that one has.

    Raises:
        LayoutError: one that is not read.
    """
    keys = [str(key) for key in state]
    if any(re.fullmatch(r"w_a_\d+", key) for key in keys):
        return "mef"
    if any(key.startswith(("vit.student.", "vit.teacher.")) for key in keys):
        return "snd-lightning"
    if layouts.is_adapted(keys):
        return "peft"
    if any(key.startswith("embeddings.") for key in keys):
        return "transformers" if any(key.startswith("encoder.layer.") for key in keys) else "dinov3-transformers"
    if "storage_tokens" in state:
        raise LayoutError(
            "it is in the layout of DINOv3's own code; give timm's or transformers' file of the same model"
        )
    of_the_hub = r"mask_token|register_tokens|blocks\.\d+\.(\d+\..+|mlp\.w(12|3)\..+)"
    return "hub" if any(re.fullmatch(of_the_hub, key) for key in keys) else "timm"


def read_timm(state: State, context: Context) -> Reading:
    """timm's own layout: published weights, FiT3D, our exports."""
    heads = {key for key in state if re.fullmatch(r"head\.(weight|bias)", key)} - context.expected.keys()
    kept = {key: value for key, value in state.items() if key not in heads}
    return Reading("timm", kept, dict.fromkeys(sorted(heads), "the classifier"))


def read_hub(state: State, context: Context) -> Reading:
    """DINOv2's hub layout: Meta's files and those of Splat and Distill."""
    return _of(layouts.hub_to_timm(state), "hub")


def read_transformers(state: State, context: Context) -> Reading:
    """``Dinov2Model`` and ``Dinov2WithRegistersModel``."""
    return _of(layouts.transformers_to_timm(state), "transformers")


def read_dinov3(state: State, context: Context) -> Reading:
    """``DINOv3ViTModel``."""
    biases = any(key.endswith(".attn.q_bias") for key in context.expected)
    return _of(layouts.dinov3_to_timm(state, biases), "dinov3-transformers")


def _of(converted: layouts.Converted, layout: Layout) -> Reading:
    return Reading(layout, converted.state, converted.set_aside, converted.unknown)


def read_peft(state: State, context: Context) -> Reading:
    """Low-rank adapters that were not merged, with their base (a model's state dict) or without (peft's files)."""
    plain, adapters = layouts.split_adapters(state)
    scale, assumptions = _scale(adapters, context)
    if plain:
        merged, base_name = layouts.merge_adapters(plain, adapters, scale), "the base in the same file"
        before = _plain(plain, context)
    else:
        names = {path: path.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2") for path in adapters}
        adapters = {names[path]: factors for path, factors in adapters.items()}
        base = context.base()
        merged, base_name = layouts.merge_adapters(base, adapters, scale), "the base beneath the adapters"
        before = Reading("timm", base)
        context.used.add("base")
    after = _plain(merged, context)
    return replace(after, layout="peft", assumptions=assumptions, base=before.state, base_name=base_name)


def _plain(state: State, context: Context) -> Reading:
    """One of the layouts without adapters."""
    readers = {
        "timm": read_timm,
        "hub": read_hub,
        "transformers": read_transformers,
        "dinov3-transformers": read_dinov3,
    }
    layout = detect_layout(state)
    if layout not in readers:
        raise LayoutError(f"a {layout} file was not expected here")
    return readers[layout](state, context)


def _scale(adapters: layouts.Adapters, context: Context) -> tuple[float, tuple[str, ...]]:
    """The factor of the adapters' product: alpha / rank, or alpha / sqrt(rank) in rank-stabilised LoRA."""
    ranks = {first.shape[0] for first, _ in adapters.values()}
    if len(ranks) > 1:
        raise LayoutError(f"its adapters have several ranks ({', '.join(map(str, sorted(ranks)))})")
    if not ranks:
        raise LayoutError("it has layers beneath adapters but no adapters")
    rank = ranks.pop()
    config, alpha = context.adapters, context.alpha
    if config is not None:
        if config["r"] != rank:
            raise LayoutError(f"its adapters have rank {rank}, its adapter_config.json says {config['r']}")
        return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank), ()
    context.used.add("alpha")
    if alpha is not None:
        return alpha / rank, ()
    if rank != RELEASED_RANK:
        raise LayoutError(
            f"its adapters have rank {rank} and nothing in it says their alpha: add ::alpha=NUMBER to the path, or "
            "give the folder with peft's adapter_config.json"
        )
    return 1.0, (f"alpha {RELEASED_RANK} for adapters of rank {RELEASED_RANK}, as in the released code",)


_SND_PARTS = (
    (r"vit\.(student|teacher)\.backbone\.", "the other one of teacher and student"),
    (r"vit\.(student|teacher)\.dino_head\.", "DINO heads"),
    (r"vit\.dino_backbone\.", "a further copy of the backbone"),
    (r"(encoder|decoder|losses)\.", "the reconstructor"),
)


def read_snd_lightning(state: State, context: Context) -> Reading:
    """A training checkpoint of Splat and Distill's released code: teacher or student, adapters merged."""
    which = context.which
    context.used.add("which")
    wanted = f"vit.{which}.backbone."
    chosen: State = {}
    set_aside: dict[str, str] = {}
    unknown = []
    for key, value in state.items():
        reason = next((why for pattern, why in _SND_PARTS if re.match(pattern, key)), None)
        if key.startswith(wanted):
            chosen[key.removeprefix(wanted).removeprefix("base_model.model.")] = value
        elif reason is None:
            unknown.append(key)
        else:
            set_aside[key] = reason
    if not chosen:
        raise LayoutError(f"it has no {which} ({wanted}...)")
    reading = read_peft(chosen, context) if layouts.is_adapted(chosen) else _plain(chosen, context)
    return replace(
        reading,
        layout="snd-lightning",
        set_aside={**reading.set_aside, **set_aside},
        unknown=(*reading.unknown, *unknown),
    )


def read_mef(content: Mapping[str, Any], context: Context) -> Reading:
    """MEF's checkpoint: adapters of the last four blocks, merged into the base, and a convolution after the norm."""
    base = context.base()
    context.used.add("base")
    merged, refine = layouts.merge_mef(base, content)
    return Reading("mef", merged, refine=refine, base=base, base_name="the base beneath the adapters")


READERS: dict[Layout, Callable[[Any, Context], Reading]] = {
    "timm": read_timm,
    "hub": read_hub,
    "transformers": read_transformers,
    "dinov3-transformers": read_dinov3,
    "peft": read_peft,
    "snd-lightning": read_snd_lightning,
    "mef": read_mef,
}


def read_any(content: Mapping[str, Any], context: Context) -> Reading:
    """By the layout that the keys tell, after nesting and prefixes are gone.

    Raises:
        LayoutError: the content is not what it seems to be.
    """
    flat = unwrap(content, context.which)
    if flat.chosen:
        context.used.add("which")
    reading = READERS[detect_layout(flat.state)](flat.state, context)
    return replace(
        reading,
        set_aside={**flat.set_aside, **reading.set_aside},
        unknown=(*flat.unknown, *reading.unknown),
        assumptions=(*flat.assumptions, *reading.assumptions),
    )
