"""`snd-probe smoke`: all tasks on procedural rooms, in minutes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.linear import KINDS, preset
from snd_nerfstudio.probing.commands.matching import Correspondence, Tracking
from snd_nerfstudio.probing.commands.nearest import Nearest
from snd_nerfstudio.probing.commands.parsing import parse
from snd_nerfstudio.probing.commands.report import Report
from snd_nerfstudio.probing.commands.visualize import VisualizePairs
from snd_nerfstudio.probing.protocols import SMOKE_STEPS
from snd_nerfstudio.probing.results import ProbeResult

SCENES, FRAMES, HEIGHT, WIDTH = 5, 48, 168, 252
"""Of the rooms that are made where there are none: 12 x 18 tokens of 14 pixels for each image."""


@dataclass
class Smoke:
    """Every task on procedural rooms: shows that everything works and what a model can roughly do, in minutes. It is
    no measure of a backbone: rooms are few and simple, and the probes are trained for few steps."""

    models: tuple[str, ...]
    """As for the other commands."""
    data: Optional[Path] = None
    """Rooms of `python -m snd_nerfstudio.scenes.rooms`. None: the folder rooms of --out, made if it is not there."""
    out: Path = Path("probes/smoke")
    """Folder for results, tables and pictures."""
    device: str = "auto"
    """Where to compute: cpu, cuda, or auto, which takes a GPU if there is one."""
    limit: int = 80
    """Images of each split, spread evenly; pairs are a third of it."""
    iterations: int = SMOKE_STEPS
    """Training steps of each linear probe."""
    pictures: int = 2
    """Pictures of each kind."""
    again: bool = False
    """Measure anew what is there already."""

    def main(self) -> list[ProbeResult]:
        """Run everything, and write a table and pictures.

        Returns:
            All results.

        Raises:
            InputError: rooms cannot be made or read, or what the tasks raise.
        """
        if self.iterations < 1 or self.limit < 3 or self.pictures < 0:
            raise InputError(
                f"--iterations {self.iterations}, --limit {self.limit} or --pictures {self.pictures} is too small: "
                "give at least 1, 3 and 0."
            )
        began = time.perf_counter()
        data = self._rooms()
        common: dict[str, Any] = {
            "models": self.models,
            "data": data,
            "out": self.out,
            "device": self.device,
            "again": self.again,
        }
        results: list[ProbeResult] = []
        for kind, probe in KINDS.items():
            settings = preset(probe, "smoke")
            settings.iterations = self.iterations
            results += kind(**common, limit=self.limit, pictures=self.pictures, probe=settings).main()
        pairs = max(self.limit // 3, 1)
        results += Correspondence(**common, limit=pairs, protocol="smoke", pictures=self.pictures).main()
        results += Tracking(**common, protocol="smoke").main()
        results += Nearest(**common, limit=self.limit, protocol="smoke").main()
        if self.pictures:
            VisualizePairs(self.models, data, out=self.out / "pictures", count=self.pictures, device=self.device).main()
        Report(results=(self.out,), format="all", out=self.out / "report").main()
        print(f"snd-probe smoke took {(time.perf_counter() - began) / 60:.1f} minutes.", flush=True)
        return results

    def _rooms(self) -> Path:
        """Rooms to probe on."""
        if self.data is not None:
            return self.data
        from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms

        return generate_rooms(RoomsConfig(self.out / "rooms", SCENES, 0, FRAMES, HEIGHT, WIDTH))


def main(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe smoke``."""
    parse(Smoke, arguments, "smoke").main()
