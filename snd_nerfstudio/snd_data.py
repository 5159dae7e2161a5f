"""``snd-data``: make data ready for training."""

import tyro

from snd_nerfstudio.errors import show_input_errors_without_traceback
from snd_nerfstudio.scenes.toolkit.command import ConvertScanNetpp

COMMANDS: dict[str, type] = {
    "scannetpp": ConvertScanNetpp,
}


def main() -> None:
    """Entry point of ``snd-data``."""
    show_input_errors_without_traceback()
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description="Make data ready for training.").main()


if __name__ == "__main__":
    main()
