"""Data sets of posed image pairs, each in the layout that it is published in."""

from collections.abc import Callable
from pathlib import Path
from typing import Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.pairs import navi, rooms, scannet, superglue
from snd_nerfstudio.probing.pairs.base import PairSet, PosedPair
from snd_nerfstudio.probing.pairs.navi import NaviPairs, NaviSettings
from snd_nerfstudio.probing.pairs.rooms import RoomPairs, RoomPairsSettings
from snd_nerfstudio.probing.pairs.scannet import ScanNetPairs
from snd_nerfstudio.probing.pairs.superglue import SuperGluePairs

__all__ = [
    "NAMES",
    "NaviPairs",
    "NaviSettings",
    "PairSet",
    "PosedPair",
    "RoomPairs",
    "RoomPairsSettings",
    "ScanNetPairs",
    "SuperGluePairs",
    "check_pairs",
    "open_pairs",
]


_SETS: dict[str, tuple[Callable[[Path], PairSet], Callable[[Path], list[str]]]] = {
    "scannet-1500": (ScanNetPairs, scannet.check),
    "superglue": (SuperGluePairs, superglue.check),
    "rooms": (RoomPairs, rooms.check),
    "navi": (NaviPairs, navi.check),
}
NAMES = tuple(_SETS)
"""The data sets of posed pairs."""


def open_pairs(name: str, root: Path, seed: Optional[int] = None) -> PairSet:
    """A data set of posed pairs with its usual choice of pairs.

    Args:
        name: one of `NAMES`.
        root: its folder.
        seed: of the pairs that are drawn, in rooms and NAVI; None: the usual one.

    Raises:
        InputError: there is no such data set, its lists cannot be read, or it has no pairs to draw.
    """
    kind = _entry(name)[0]
    if seed is None:
        return kind(Path(root))
    if name == "rooms":
        return RoomPairs(Path(root), RoomPairsSettings(seed=seed))
    if name == "navi":
        return NaviPairs(Path(root), NaviSettings(seed=seed))
    raise InputError(f"--pair-seed {seed}: the pairs of {name} are a published list, so leave it out.")


def check_pairs(name: str, root: Path) -> list[str]:
    """What is missing of a data set or wrong with it: one sentence each, with path and remedy; nothing if all is
    well.

    Args:
        name: one of `NAMES`.
        root: its folder.

    Raises:
        InputError: there is no such data set.
    """
    return _entry(name)[1](Path(root))


def _entry(name: str) -> tuple[Callable[[Path], PairSet], Callable[[Path], list[str]]]:
    if name not in _SETS:
        raise InputError(f"There is no data set of pairs `{name}`: take one of {', '.join(NAMES)}.")
    return _SETS[name]
