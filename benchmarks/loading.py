"""How fast triplets are read, decoded and resized, and whether training ever waits for them.

    python benchmarks/loading.py --json loading.json

Triplets of a rendered room, through the real datamanager: in the training thread, and ahead of it in 1, 2 or 4 threads,
while the training thread works on something else for `--step-seconds` (sleeping, as it does while a GPU works).
"""

import tempfile
import time
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Optional

import tyro
from measuring import described, in_turns, machine, print_table, quartiles, with_spread, write_json

from snd_nerfstudio import snd_config
from snd_nerfstudio.scenes.prefetch import Prefetcher
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms
from snd_nerfstudio.snd_pipeline import resolved


@dataclass
class LoadingBenchmark:
    """What to measure."""

    stored_size: tuple[int, int] = (448, 672)
    """Height and width of the files."""
    image_size: tuple[int, int] = (448, 672)
    """Height and width they are resized to."""
    steps: int = 8
    """Triplets per timed run."""
    step_seconds: float = 0.1
    """What the training thread does with each, seconds."""
    repeats: int = 5
    """Timed runs of each variant."""
    json: Optional[Path] = None
    """File for the numbers."""


def make_data(rooms: Path, settings: LoadingBenchmark, cache: Optional[Path] = None) -> Any:
    """The datamanager that ns-train would build."""
    pipeline = resolved(deepcopy(snd_config.snd.config.pipeline))  # type: ignore
    pipeline.datamanager.data, pipeline.datamanager.image_size = rooms, settings.image_size
    pipeline.datamanager.reconstructor, pipeline.datamanager.operator_cache = "depth", cache
    with redirect_stdout(StringIO()):
        return pipeline.datamanager.setup(device="cpu", test_mode="inference", seed=0)


class Run:
    """Some steps, each of which waits for its triplet and then does something else."""

    def __init__(self, data: Any, workers: int, settings: LoadingBenchmark) -> None:
        self.data, self.workers, self.settings = data, workers, settings
        self.step, self.waited = 0, []
        load = data._load_step
        self.get = Prefetcher(load, workers, 4).get if workers else load

    def __call__(self) -> None:
        """Note how long each step waited."""
        for _ in range(self.settings.steps):
            start = time.perf_counter()
            self.get(self.step)
            self.waited.append(time.perf_counter() - start)
            time.sleep(self.settings.step_seconds)
            self.step += 1


def main(settings: LoadingBenchmark) -> None:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as folder:
        rooms = Path(folder) / "rooms"
        height, width = settings.stored_size
        generate_rooms(RoomsConfig(out=rooms, scenes=2, frames=32, height=height, width=width))
        data = make_data(rooms, settings)
        hashing = make_data(rooms, settings, Path(folder) / "cache")
        runs = {
            "in the training thread": Run(data, 0, settings),
            "1 thread ahead": Run(data, 1, settings),
            "2 threads ahead (default)": Run(data, 2, settings),
            "4 threads ahead": Run(data, 4, settings),
            "2 threads ahead, hashed for the cache": Run(hashing, 2, settings),
        }
        times = in_turns(runs, settings.repeats)
    about = machine()
    print(described(about))
    print(described(vars(settings)))
    rows, figures = [], {}
    for name, run in runs.items():
        waits = quartiles([1e3 * wait for wait in run.waited[settings.steps :]])
        per_step = quartiles([1e3 * seconds.wall / settings.steps for seconds in times[name]])
        processor = quartiles([1e3 * seconds.cpu / settings.steps for seconds in times[name]])
        figures[name] = {"waited_ms": waits, "step_ms": per_step, "cpu_ms": processor}
        rows.append([name, with_spread(waits, 1), with_spread(per_step, 1), with_spread(processor, 1)])
    print_table(["triplets are loaded", "a step waits, ms", "whole step, ms", "CPU per step, ms"], rows)
    if settings.json:
        write_json(settings.json, {"machine": about, "figures": figures})


if __name__ == "__main__":
    main(tyro.cli(LoadingBenchmark))
