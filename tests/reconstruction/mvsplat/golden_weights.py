"""Weights that both the released code and this program were run with: a hash of each parameter's name."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from snd_nerfstudio.reconstruction.mvsplat import RE10K, MVSplat
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import official_key
from tests.conftest import SHARED

GAIN = {
    "depth_predictor.regressor_residual.weight": 0.05,
    "depth_predictor.depth_head_lowres.2.weight": 5.0,
    "depth_predictor.to_disparity.2.weight": 0.4,
}
"""Chosen so that depth and density vary as widely as those of a trained network."""
TOTAL_SHA256 = "db3e4cc9bb4b4ca6f00afb6def15a92dc6244407952e1a9fb3f617180c5b8382"
"""Of the weights' digests, in hexadecimal and in the order of their names: one wrong name, shape or bit changes it."""


def golden_weight(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Splitmix64 seeded by the name, scaled to keep activations near 1: bit for bit the same everywhere."""
    count, word = math.prod(shape), np.uint64
    seed = word(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        z = seed + (np.arange(count, dtype=word) + word(1)) * word(0x9E3779B97F4A7C15)
        z = (z ^ (z >> word(30))) * word(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> word(27))) * word(0x94D049BB133111EB)
        z = z ^ (z >> word(31))
    x = (z >> word(40)).astype(np.float64) * 2.0**-23 - 1.0
    if len(shape) >= 2:
        x = x * (GAIN.get(key, 1.0) * math.sqrt(3.0 / (count // shape[0])))
    elif key.endswith("weight"):
        x = 1.0 + x * (0.1 * math.sqrt(3.0))
        if ".transformer." in key:
            x = x * 0.3
    else:
        x = x * (0.05 * math.sqrt(3.0))
    return torch.from_numpy(x.astype(np.float32).reshape(shape))


def golden_state() -> dict[str, torch.Tensor]:
    """The released network's parameters under the released names, without the prefix."""
    with torch.device("meta"):
        parameters = dict(MVSplat(RE10K).named_parameters())
    names = {official_key(key): tuple(value.shape) for key, value in parameters.items()}
    return {key: golden_weight(key, shape) for key, shape in names.items()}


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes, in hexadecimal."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def released_keys() -> Optional[dict[str, Any]]:
    """What is known of each of the released code's parameters; None where the list is not at hand."""
    file = Path(SHARED) / "golden" / "mvsplat_keys.json"
    return json.loads(file.read_text())["keys"] if file.is_file() else None
