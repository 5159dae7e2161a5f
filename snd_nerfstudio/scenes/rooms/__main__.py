"""The command line: `python -m snd_nerfstudio.scenes.rooms --help`."""

import sys

import tyro
from rich.console import Console

from snd_nerfstudio.scenes.rooms.layout import RoomsError
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms


def main() -> None:
    """Reads the arguments and writes the rooms; exits with status 1 and one message if it cannot."""
    config = tyro.cli(RoomsConfig, description=__doc__)
    try:
        out = generate_rooms(config)
    except RoomsError as error:
        Console(stderr=True).print(f"[bold red]Error:[/] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    Console().print(f"{config.scenes} rooms in {out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
