"""``snd-data scannetpp``: ScanNet++ as downloaded to what training reads."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Tuple

from snd_nerfstudio.errors import InputError


@dataclass
class ConvertScanNetpp:
    """Undistort ScanNet++'s fisheye frames, and rasterize instances and depth from its annotated meshes."""

    data: Path
    """Folder of the download that holds data/<scene>/dslr and splits/."""
    out: Path
    """Folder to write; new, empty, or of the same settings, which is then completed."""
    scenes: Tuple[str, ...] = ()
    """Names of scenes; all of them without it."""
    height: int = 448
    """Rows of images, masks and depth; best the size that is trained on."""
    width: int = 672
    """Columns of images, masks and depth."""
    processes: Optional[int] = None
    """How many processes work at once. None: one per two cores, at most 8."""
    semantic_classes: Optional[Path] = None
    """Text file with one class a line: write semantic maps too, with the number of the line from 0."""

    def main(self) -> None:
        """Runs the command.

        Raises:
            InputError: a flag is wrong, or not one scene could be converted.
        """
        # here, so that the command line's help does not wait for it
        from rich.console import Console

        from snd_nerfstudio.scenes.toolkit.conversion import Settings, convert_scannetpp

        processes = min(max((os.cpu_count() or 1) // 2, 1), 8) if self.processes is None else self.processes
        for flag, value, least in (("height", self.height, 8), ("width", self.width, 8), ("processes", processes, 1)):
            if value < least:
                raise InputError(f"--{flag} {value} must be at least {least}.")
        settings = Settings(self.height, self.width, self._classes())
        report = convert_scannetpp(self.data, self.out, settings, list(self.scenes) or None, processes)
        console = Console()
        for line in report.lines():
            console.print(line, highlight=False, soft_wrap=True, markup=False)
        if not report.scenes:
            raise InputError(f"Not one scene of {self.data} could be converted; the reasons are above.")
        console.print(f"Train with --data {self.out}", highlight=False, soft_wrap=True, markup=False)

    def _classes(self) -> Optional[list[str]]:
        if self.semantic_classes is None:
            return None
        try:
            lines = self.semantic_classes.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--semantic-classes {self.semantic_classes} cannot be read ({error}).") from error
        classes = [line.strip() for line in lines if line.strip()]
        if not classes or len(set(classes)) < len(classes):
            raise InputError(f"--semantic-classes {self.semantic_classes} must hold one class a line, each once.")
        return classes


def main(arguments: list[str]) -> None:
    """``snd-data scannetpp`` with these flags."""
    import tyro

    tyro.cli(ConvertScanNetpp, args=arguments, prog="snd-data scannetpp").main()
