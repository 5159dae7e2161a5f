"""Instance ids that ScanNet++'s toolkit saved (`obj_ids/<scene>/DSC01234.JPG.pth`), opened without pickle."""

import pickle
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int

from snd_nerfstudio.errors import BrokenFileError

_WRONG = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, KeyError, AttributeError, OSError)
"""What torch raises on files that are damaged or hold something else."""


def read_saved_ids(file: Path) -> Int[np.ndarray, "h w"]:
    """Reads an array of instance ids from a `.pth` file; whatever else is in it is refused, not executed.

    `torch.load(weights_only=True)` knows tensors; here it is told how numpy's arrays are put together, and no more.

    Returns:
        int64; 0 where no instance is known, also where the file has a negative number.

    Raises:
        BrokenFileError: the file is missing, damaged, or holds something else than one array or tensor of integers.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        raise BrokenFileError(f"Instance mask {file}: numpy arrays in .pth files are read with torch 2.5 or later.")
    array = np.zeros(0, np.int64)
    rebuild = array.__reduce__()[0]
    kinds = [type(np.dtype(f"{sign}{size}")) for sign in "iu" for size in (1, 2, 4, 8)]
    known: list = [rebuild, np.ndarray, np.dtype, *kinds]
    if torch.__version__ >= "2.6":
        # the function's name in files that were written with numpy 1 and 2
        known += [(rebuild, f"numpy.{module}.multiarray._reconstruct") for module in ("core", "_core")]
    try:
        with torch.serialization.safe_globals(known):
            ids = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BrokenFileError(f"Instance mask {file} does not exist.") from error
    except _WRONG as error:
        raise BrokenFileError(
            f"Instance mask {file} is damaged, or holds more than an array of numbers, which is not opened: it could "
            "run code. Write the ids as 16-bit PNG instead."
        ) from error
    ids = ids.numpy() if isinstance(ids, torch.Tensor) else ids
    if not isinstance(ids, np.ndarray) or ids.ndim != 2 or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise BrokenFileError(f"Instance mask {file} holds {found}; expected one array of integers, height by width.")
    return np.maximum(ids.astype(np.int64), 0)
