"""Files of tensors from anywhere: opened without running what is in them."""

import pickle
import re
import struct
from pathlib import Path
from typing import Any, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

UNREADABLE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    struct.error,
    pickle.UnpicklingError,
    SafetensorError,
)
"""What reading a damaged file has been seen to raise."""


def read_tensors(file: Path) -> Any:
    """What a ``.safetensors`` file, or one that torch saved, holds; on the CPU.

    Raises:
        One of ``UNREADABLE``: the file is damaged, or holds objects besides tensors and plain values.
    """
    if file.suffix == ".safetensors":
        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def refused_objects(error: Exception, file: Path, kept: str) -> Optional[str]:
    """The rest of a sentence about a file that torch refused to unpickle; None if that was not the reason.

    Args:
        error: that `read_tensors` raised.
        file: it was raised for.
        kept: a Python expression of the file's content ``c``: what of it is weights.
    """
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused is None:
        return None
    return (
        f"holds objects besides tensors and plain values ({refused[1]}), which are not unpickled because they can run "
        'code. If you trust the file, keep its weights alone: python -c "import torch; '
        f"c = torch.load('{file}', map_location='cpu', weights_only=False); torch.save({kept}, 'weights.ckpt')\""
    )


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
