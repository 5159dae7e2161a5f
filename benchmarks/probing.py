"""Training a depth probe on cached tokens, and running the frozen backbone in every step: time of a step.

    python benchmarks/probing.py --json probing.json
    python benchmarks/probing.py --backbone dinov2_vitb14=random --batch 2

Images, depth and training step are those of ``snd-probe``: procedural rooms, 256 bins, class token, the loss at the
images' pixels, AdamW. Weights are random, which changes no time. Both variants see the same batches; the one that
runs the backbone is given images that are decoded already. They run in turns in one process, and start from one head,
so that their losses can be compared: they differ by the half precision of cached tokens. What caching costs once is
in the last line.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import tyro
from measuring import Seconds, described, in_turns, machine, print_table, quartiles, ratios, with_spread, write_json

from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.examples import image_tensor, step_indices
from snd_nerfstudio.probing.features import ProbeFeatures, encode
from snd_nerfstudio.probing.linear import training_step
from snd_nerfstudio.probing.models import ProbeModel, open_model
from snd_nerfstudio.probing.objectives import head_inputs, make_objective
from snd_nerfstudio.probing.protocols import DepthProbe
from snd_nerfstudio.probing.token_store import CachePlace, LabelStore, TokenStore, label_store, token_store
from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms


@dataclass
class ProbingBenchmark:
    """What to measure."""

    backbone: str = "dinov2_vits14=random"
    """The frozen model."""
    height: int = 224
    """Of the images, pixels."""
    width: int = 336
    """Of the images, pixels."""
    frames: int = 16
    """Images of a room."""
    batch: tuple[int, ...] = (2, 8)
    """Images of a step, each number measured by itself."""
    cached_steps: int = 20
    """Steps of one timed run on cached tokens."""
    backbone_steps: int = 2
    """Steps of one timed run of the backbone."""
    rounds: int = 7
    """Timed runs of each."""
    warmups: int = 1
    """Runs of each before that."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    rooms: Optional[Path] = None
    """Rooms to use; None: they are made."""
    json: Optional[Path] = None
    """File for the numbers."""


@dataclass
class Data:
    """What both variants train on."""

    dataset: Any
    images: torch.Tensor
    labels: LabelStore
    tokens: TokenStore


def read_data(config: ProbingBenchmark, model: ProbeModel, settings: DepthProbe, rooms: Path) -> tuple[Data, float]:
    """Images, labels and tokens in memory, and the seconds that tokens took."""
    dataset = open_dataset("rooms", rooms, "depth", "train")
    began = time.perf_counter()
    place = CachePlace()
    tokens = token_store(model, dataset, settings.features, place, device=config.device)
    seconds = time.perf_counter() - began
    images = torch.stack([image_tensor(sample.image) for sample in dataset])
    return Data(dataset, images, label_store(dataset, place), tokens), seconds


def make_run(
    features: Callable[[Sequence[int]], ProbeFeatures],
    config: ProbingBenchmark,
    model: ProbeModel,
    settings: DepthProbe,
    data: Data,
    steps: int,
) -> Callable[[], list[float]]:
    """Some steps of a head of its own, whose features come from a function; they give their losses."""
    objective = make_objective(settings, data.dataset, data.dataset)
    torch.manual_seed(0)
    head = objective.make_head(*head_inputs(model, settings), {}).to(config.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, betas=settings.betas)
    done = 0

    def run() -> list[float]:
        nonlocal done
        losses = []
        for step in range(done, done + steps):
            indices = step_indices(step, len(data.dataset), settings)
            labels = {kind: value.to(config.device) for kind, value in data.labels.batch(indices).items()}
            losses.append(training_step(objective, head, optimizer, settings.lr, features(indices), labels, step))
        done += steps
        return losses

    return run


def measure_batch(config: ProbingBenchmark, model: ProbeModel, batch: int, rooms: Path) -> dict[str, Any]:
    """Times of a step with so many images."""
    settings = DepthProbe(batch=batch, cache="memory", augment=False)
    data, caching = read_data(config, model, settings, rooms)

    def make(name: str, steps: int) -> Callable[[], list[float]]:
        def rerun(indices: Sequence[int]) -> ProbeFeatures:
            return encode(model, data.images[list(indices)].to(config.device), settings.features)

        def cached(indices: Sequence[int]) -> ProbeFeatures:
            return data.tokens.batch(indices, config.device)

        return make_run(cached if name == "cached" else rerun, config, model, settings, data, steps)

    steps = {"backbone": config.backbone_steps, "cached": config.cached_steps}
    losses = {name: make(name, 2)() for name in steps}
    times = in_turns({name: make(name, n) for name, n in steps.items()}, config.rounds, config.warmups, config.device)
    per_step = {
        name: [Seconds(row.wall / steps[name], row.cpu / steps[name]) for row in rows] for name, rows in times.items()
    }
    found: dict[str, Any] = {
        name: {clock: quartiles([getattr(row, clock) for row in rows]) for clock in ("wall", "cpu")}
        for name, rows in per_step.items()
    }
    found["backbone over cached"] = ratios(per_step["backbone"], per_step["cached"])
    found["backbone over cached, cpu"] = ratios(per_step["backbone"], per_step["cached"], "cpu")
    found["losses"] = losses
    found["caching seconds per image"] = caching / len(data.dataset)
    found["cached bytes per image"] = data.tokens.bytes / len(data.dataset)
    return found


def measure(config: ProbingBenchmark) -> dict[str, Any]:
    """All numbers."""
    model = open_model(config.backbone, 0)
    model.backbone.to(config.device)
    with tempfile.TemporaryDirectory() as scratch:
        rooms = config.rooms
        if rooms is None:
            made = RoomsConfig(
                out=Path(scratch) / "rooms", scenes=2, height=config.height, width=config.width, frames=config.frames
            )
            rooms = generate_rooms(made)
        results: dict[str, Any] = {
            "machine": machine(),
            "settings": {
                key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()
            },
        }
        results["batches"] = {str(batch): measure_batch(config, model, batch, rooms) for batch in config.batch}
    results["ratios"] = {
        f"backbone_over_cached_batch_{batch}": row["backbone over cached"][1]
        for batch, row in results["batches"].items()
    }
    return results


def show(config: ProbingBenchmark, results: dict[str, Any]) -> None:
    """Print the numbers."""
    print(described(results["machine"]))
    print(
        f"{config.backbone}, {config.height} x {config.width}, depth probe; milliseconds per step, {config.rounds} "
        "runs each in turns; medians with quartiles"
    )
    rows = []
    for batch, found in results["batches"].items():
        for name in ("backbone", "cached"):
            times = [with_spread([1e3 * value for value in found[name][clock]], 1) for clock in ("wall", "cpu")]
            rows.append([f"batch {batch}, {name}", *times])
    print_table(["variant", "wall ms", "cpu ms"], rows)
    for batch, found in results["batches"].items():
        print(f"batch {batch}: backbone over cached {with_spread(found['backbone over cached'], 1)} by the clock, ")
        print(f"  {with_spread(found['backbone over cached, cpu'], 1)} by processor time; first losses", end=" ")
        print({name: [round(loss, 5) for loss in losses] for name, losses in found["losses"].items()})
    one = next(iter(results["batches"].values()))
    print(
        f"caching once: {1e3 * one['caching seconds per image']:.0f} ms and "
        f"{one['cached bytes per image'] / 1e6:.2f} MB per image"
    )


def main(config: ProbingBenchmark) -> None:
    """Measure and print."""
    results = measure(config)
    show(config, results)
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main(tyro.cli(ProbingBenchmark, description=__doc__))
