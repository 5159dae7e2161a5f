"""The figures of docs/mvsplat.md, from a run of `ns-train mvsplat-tiny` and the pictures of its `ns-eval`.

python docs/figures.py --run outputs/rooms/mvsplat-tiny/first --pictures pictures
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

IMAGES = Path(__file__).parent / "images"
HELD_OUT = "Eval Images Metrics Dict (all images)/"


@dataclass
class Figures:
    """What to draw from."""

    run: Path
    """Folder of the run, with its event files."""
    pictures: Path
    """What `ns-eval --render-output-path` wrote."""
    shown: tuple[int, ...] = (0, 5, 10)
    """Numbers of the held-out triplets to show."""


def draw_curve(run: Path, file: Path) -> None:
    """Held-out PSNR and depth error against the step, training's PSNR behind them."""
    events = EventAccumulator(str(run))
    events.Reload()

    def curve(tag: str) -> tuple[list[int], list[float]]:
        scalars = events.Scalars(tag)
        return [s.step for s in scalars], [s.value for s in scalars]

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), constrained_layout=True)
    left.plot(*curve("Train Metrics Dict/psnr"), color="#c9d6e6", linewidth=0.8, label="training step")
    left.plot(*curve(HELD_OUT + "psnr"), color="#1f4e8c", marker="o", label="held-out rooms")
    left.set(xlabel="step", ylabel="PSNR of the target view, dB")
    left.legend(frameon=False)
    right.plot(*curve(HELD_OUT + "depth_error"), color="#27764a", marker="o")
    right.set(xlabel="step", ylabel="held-out depth error", ylim=(0, None))
    figure.savefig(file, dpi=110)


def join_pictures(pictures: Path, shown: tuple[int, ...], file: Path) -> None:
    """One row per triplet: target, rendering, measured and predicted depth; pixels twice as large."""
    rows = []
    for number in shown:
        names = [pictures / f"eval_{number:04d}_{name}.png" for name in ("target", "splatted", "depth")]
        rows.append(np.concatenate([np.asarray(Image.open(name).convert("RGB")) for name in names], axis=1))
    joined = np.concatenate(rows, axis=0)
    Image.fromarray(joined.repeat(2, axis=0).repeat(2, axis=1)).save(file, optimize=True)


if __name__ == "__main__":
    arguments = tyro.cli(Figures, description=__doc__)
    draw_curve(arguments.run, IMAGES / "mvsplat_rooms_curve.png")
    join_pictures(arguments.pictures, arguments.shown, IMAGES / "mvsplat_rooms_renderings.png")
