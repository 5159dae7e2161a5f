"""The three ways to run the method, as values of config fields.

A field that a profile decides is ``None`` in the configs ("as the profile says"); what a user sets wins.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar

from snd_nerfstudio.errors import InputError

ProfileName = Literal["fixed", "paper", "official"]

PROFILES: Mapping[ProfileName, Mapping[str, Any]] = {
    # the paper's method with the known defects of the released code mended
    "fixed": {
        "image_size": (448, 672),
        "min_context_gap": 8,
        "max_context_gap": 12,
        "target_view": "between",
        "all_scenes": False,
        "align_corners": False,
        "token_label": "majority",
        "isolated": "bilinear",
        "footprint": "exact",
        "weighting": "coverage",
        "pooling": "area",
        "uncovered": "drop",
        "teacher_dropout": False,
        "ema_timing": "after_optimizer",
        "lora_patch_embed": False,
        "schedule_steps": None,
    },
    # what the paper states; where it is silent, as `fixed`
    "paper": {
        "image_size": (584, 876),
        "min_context_gap": 8,
        "max_context_gap": 12,
        "target_view": "between",
        "all_scenes": True,
        "align_corners": False,
        "token_label": "majority",
        "isolated": "bilinear",
        "footprint": "exact",
        "weighting": "none",
        "pooling": "bilinear",
        "uncovered": "keep",
        "teacher_dropout": False,
        "ema_timing": "after_optimizer",
        "lora_patch_embed": False,
        "schedule_steps": None,
    },
    # what the released code does, defects included
    "official": {
        "image_size": (576, 880),
        "min_context_gap": 8,
        "max_context_gap": 8,
        "target_view": "between_or_context",
        "all_scenes": True,
        "align_corners": True,
        "token_label": "sample",
        "isolated": "zero",
        "footprint": "squared",
        "weighting": "none",
        "pooling": "bilinear",
        "uncovered": "zero",
        "teacher_dropout": True,
        "ema_timing": "before_optimizer",
        "lora_patch_embed": True,
        "schedule_steps": 300_011,
    },
}

Config = TypeVar("Config")


def resolve(config: Config, profile: str) -> Config:
    """A copy of a config dataclass in which every field left to the profile has its value.

    Args:
        config: any dataclass; only fields that are None and named in the profile change.
        profile: ``fixed``, ``paper`` or ``official``.

    Raises:
        InputError: there is no such profile.
    """
    if profile not in PROFILES:
        raise InputError(f"Unknown profile --pipeline.profile {profile}: choose one of {', '.join(PROFILES)}.")
    values = PROFILES[profile]  # type: ignore
    decided = {
        field.name: values[field.name]
        for field in fields(config)  # type: ignore
        if field.name in values and getattr(config, field.name) is None
    }
    return replace(config, **decided)  # type: ignore
