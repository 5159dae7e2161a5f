"""`snd-probe DATASET --check PATH`: what is missing of a dataset."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.parsing import parse
from snd_nerfstudio.probing.datasets import DATASETS
from snd_nerfstudio.probing.datasets.checking import NOTE, check_dataset
from snd_nerfstudio.probing.progress import quiet, reporting


@dataclass
class Check:
    """Say what is missing of a dataset or wrong with it; ends with code 1 if anything is."""

    check: Path
    """The dataset's folder."""
    task: Optional[Literal["depth", "normals", "segmentation", "pairs"]] = None
    """Look only at what this needs; pairs: correspondence. None: everything."""
    protocol: Literal["paper", "fixed"] = "fixed"
    """Whose splits are looked at."""
    thorough: bool = False
    """Decode every sample instead of five of each split: names all that is damaged, and takes as long as reading the
    whole dataset does."""


def check(name: str, arguments: Sequence[str]) -> list[str]:
    """Print what is found.

    Args:
        name: of the dataset.
        arguments: of the command line, after it.

    Returns:
        What is missing or wrong, without what may be meant so.
    """
    config = parse(Check, arguments, name)
    found = find(name, config)
    wrong = [text for text in found if not text.startswith(NOTE)]
    for text in found:
        print(text)
    many = "thing is" if len(wrong) == 1 else "things are"
    print(
        f"{name} in {config.check}: " + (f"{len(wrong)} {many} missing or wrong." if wrong else "nothing is missing.")
    )
    return wrong


def find(name: str, config: Check) -> list[str]:
    """What is missing or wrong, a sentence each; those that begin with `NOTE` may be meant so."""
    from snd_nerfstudio.probing.keypoints import SPair71k, check_spair
    from snd_nerfstudio.probing.pairs import NAMES, check_pairs, open_pairs

    if name == "spair":
        found = check_spair(config.check)
        return found or (_damaged(SPair71k(config.check, "test")) if config.thorough else [])
    found: list[str] = []
    if name in DATASETS and config.task != "pairs":
        with reporting() as progress:
            found += check_dataset(
                name,
                config.check,
                None if config.task is None else [config.task],
                config.protocol,
                config.thorough,
                progress if config.thorough else quiet,
            )
    if name in NAMES and config.task in (None, "pairs"):
        of_pairs = check_pairs(name, config.check)
        if config.thorough and not of_pairs:
            of_pairs = _damaged(open_pairs(name, config.check))
        found += of_pairs
    return list(dict.fromkeys(found))


def _damaged(pairs: Any) -> list[str]:
    """Pairs that cannot be decoded."""
    found = []
    with reporting() as progress:
        for place in range(len(pairs)):
            try:
                pairs[place]
            except InputError as error:
                found.append(str(error))
            progress("pairs", place + 1, len(pairs))
    return found
