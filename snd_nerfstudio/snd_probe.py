"""``snd-probe``: what a backbone knows about depth, surfaces, classes and correspondence."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Optional

from snd_nerfstudio.errors import InputError, show_input_errors_without_traceback

COMMANDS: dict[str, tuple[str, str]] = {
    "depth": ("linear:depth", "train and test linear probes for depth"),
    "normals": ("linear:normals", "train and test linear probes for surface normals"),
    "segmentation": ("linear:segmentation", "train and test linear probes for semantic segmentation"),
    "correspondence": ("matching:correspondence", "match posed images by their features"),
    "keypoints": ("matching:keypoints", "carry semantic keypoints between images (SPair-71k)"),
    "tracking": ("matching:tracking", "follow points through videos of rooms"),
    "nearest": ("nearest:main", "depth of the most similar tokens, without training"),
    "visualize": ("visualize:main", "PCA, clusters and matches of two views of a scene"),
    "smoke": ("smoke:main", "try everything on procedural rooms, in minutes"),
    "report": ("report:main", "tables and charts of results"),
}
"""By name: module of `probing.commands` and its function, which gets the arguments; and what the command does."""
LINEAR_DATASETS = ("scannetpp", "scannet", "nyuv2", "ade20k", "voc2012", "kitti", "rooms")
PAIR_DATASETS = ("scannet-1500", "superglue", "rooms", "navi", "spair")


def overview() -> str:
    """The commands, one a line, and the datasets."""
    lines = [f"  {name:<16}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: snd-probe COMMAND [flags]; --help after a command lists its flags",
            "       snd-probe DATASET --check PATH; what is missing of a dataset",
            "",
            *lines,
            "",
            f"datasets of images: {' '.join(LINEAR_DATASETS)}",
            f"datasets of pairs:  {' '.join(PAIR_DATASETS)}",
        ]
    )


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Entry point: ``snd-probe COMMAND [flags]`` or ``snd-probe DATASET --check PATH``.

    Args:
        arguments: instead of the command line's.

    Raises:
        InputError: there is no such command or dataset.
        SystemExit: with code 1, something is missing of the dataset that is checked.
    """
    show_input_errors_without_traceback()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    name = arguments[0]
    if name in COMMANDS:
        module, _, function = COMMANDS[name][0].partition(":")
        getattr(import_module(f"snd_nerfstudio.probing.commands.{module}"), function)(arguments[1:])
        return
    if name in (*LINEAR_DATASETS, *PAIR_DATASETS):
        from snd_nerfstudio.probing.commands.check import check

        sys.exit(1 if check(name, arguments[1:]) else 0)
    raise InputError(f"snd-probe knows no `{name}`: take one of {', '.join(COMMANDS)}, or the name of a dataset.")


if __name__ == "__main__":
    main()
