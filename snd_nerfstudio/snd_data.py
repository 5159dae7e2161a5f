"""``snd-data``: commands for datasets; nothing heavy is imported before one runs."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "masks": ("snd_nerfstudio.snd_data_masks", "make the instance masks of a dataset ahead of training"),
}
"""By name: the module whose ``main(arguments)`` runs it, and what it does."""


def usage() -> str:
    """What there is."""
    lines = [f"  {name:<12}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join(["usage: snd-data COMMAND ...", "", "commands (--help after one says more):", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: ``snd-data COMMAND`` and the command's flags."""
    from snd_nerfstudio.errors import InputError, show_input_errors_without_traceback

    show_input_errors_without_traceback()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    if arguments[0] not in COMMANDS:
        raise InputError(f"snd-data {arguments[0]}: there is no such command. Give one of {', '.join(COMMANDS)}.")
    importlib.import_module(COMMANDS[arguments[0]][0]).main(arguments[1:])


if __name__ == "__main__":
    main()
