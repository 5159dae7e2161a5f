"""``snd-data``: commands on datasets."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Optional

from snd_nerfstudio.errors import InputError, show_input_errors_without_traceback

COMMANDS: dict[str, tuple[str, str]] = {
    "scannetpp": ("snd_nerfstudio.scenes.toolkit.command", "make pinhole images, masks and depth of a download"),
    "masks": ("snd_nerfstudio.snd_data_masks", "make the instance masks of a dataset ahead of training"),
    "inspect": ("snd_nerfstudio.snd_inspect", "what a dataset holds, and whether its poses, depth and images agree"),
}
"""By name: the module, whose ``main(arguments)`` is called, and what the command does."""


def overview() -> str:
    """The commands, one a line."""
    lines = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    return "\n".join(["usage: snd-data COMMAND [flags]; --help after a command lists its flags", "", *lines])


def main(arguments: Optional[Sequence[str]] = None) -> None:
    """Entry point: ``snd-data COMMAND [flags]``.

    Args:
        arguments: instead of the command line's.

    Raises:
        InputError: there is no such command.
    """
    show_input_errors_without_traceback()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return
    if arguments[0] not in COMMANDS:
        raise InputError(f"snd-data has no command `{arguments[0]}`: choose from {', '.join(COMMANDS)}.")
    import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    main()
