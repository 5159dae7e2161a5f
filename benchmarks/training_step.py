"""Where the time of a training step goes, and what each way of supervising and each loss makes of it.

    python benchmarks/training_step.py --json training_step.json
    python benchmarks/training_step.py --backbone tiny --image-size 112 168 --prototypes 4096

Whole steps of the real pipeline on a room that is rendered first: loading, reconstruction, target tokens, student,
loss, gradients, optimiser, teacher. The variants run in turns, on the same triplets. Weights are random, which changes
no time.
"""

import tempfile
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Optional

import torch
import tyro
from measuring import (
    Seconds,
    described,
    in_turns,
    machine,
    print_table,
    quartiles,
    ratios,
    timed,
    with_spread,
    write_json,
)

from snd_nerfstudio import snd_config
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms
from snd_nerfstudio.snd_trainer import FusedAdamConfig

STAGES = ("geometry", "targets", "student", "loss", "backward", "optimiser", "teacher update")


@dataclass
class TrainingStepBenchmark:
    """What to measure."""

    backbone: str = "dinov2-small"
    """As for --pipeline.model.backbone; its weights are random."""
    image_size: tuple[int, int] = (448, 672)
    """Height and width of the images; the default profile's."""
    prototypes: int = 65536
    """Of the head."""
    reconstructor: Literal["depth", "mvsplat"] = "depth"
    """Depth maps, or a MVSplat with random weights, which is what it usually costs."""
    repeats: int = 5
    """Timed steps of each variant."""
    device: str = "cpu"
    """Where to run."""
    json: Optional[Path] = None
    """File for the numbers."""


def make_pipeline(settings: TrainingStepBenchmark, rooms: Path, cache: Optional[Path] = None, **model: Any) -> Any:
    """The pipeline that ns-train would build."""
    config = deepcopy(snd_config.snd.config)
    pipeline: Any = config.pipeline
    pipeline.datamanager.data = rooms
    pipeline.datamanager.image_size = settings.image_size
    pipeline.datamanager.reconstructor = "depth"
    pipeline.datamanager.operator_cache = cache
    pipeline.checked_triplets = 0  # the reconstruction is not measured first
    pipeline.model.backbone, pipeline.model.weights = settings.backbone, "random"
    pipeline.model.head.prototypes = settings.prototypes
    pipeline.model.head.form = model.get("form", "exact")
    pipeline.model.supervision.path = model.get("path", "token")
    pipeline.model.precision = model.get("precision", "float32")
    with redirect_stdout(StringIO()):
        built = pipeline.setup(device=settings.device, test_mode="val")
    if settings.reconstructor == "mvsplat":
        from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings
        from snd_nerfstudio.reconstruction.mvsplat.reconstructor import MVSplatReconstructor

        network = MVSplat(MVSplatSettings()).eval().requires_grad_(False)
        built.datamanager.reconstructor = MVSplatReconstructor(network.to(settings.device), 0.7, 8.0)
    return built.train()


class Steps:
    """Training steps on one triplet, in their parts."""

    def __init__(self, pipeline: Any, fused: bool) -> None:
        self.pipeline, self.model = pipeline, pipeline.model
        parameters = [p for group in self.model.get_param_groups().values() for p in group]
        adam = FusedAdamConfig(lr=2e-5, fused=fused)
        self.optimiser = adam.setup(params=parameters)
        (self.triplet,) = pipeline.datamanager.next_train(0)
        self.parts: list[dict[str, Seconds]] = []

    def __call__(self) -> float:
        """One step; the loss."""
        model, device, parts = self.model, str(self.triplet.target.images.device), {}
        parts["geometry"], geometry = timed(lambda: self.pipeline.geometry(self.triplet), device)
        parts["targets"], target = timed(lambda: model.supervise(self.triplet, geometry), device)
        parts["student"], tokens = timed(lambda: model.student_tokens(self.triplet.target.images)[0], device)
        compared = tokens[target.learned], target.tokens[target.learned]
        parts["loss"], outputs = timed(lambda: model._compare(*compared), device)
        parts["backward"], _ = timed(outputs["loss"].backward, device)
        parts["optimiser"], _ = timed(self.optimiser.step, device)
        self.optimiser.zero_grad(set_to_none=True)
        parts["teacher update"], _ = timed(model.update_teacher, device)
        self.parts.append(parts)
        return float(outputs["loss"].detach())


def main(settings: TrainingStepBenchmark) -> None:
    """Measure, print and write."""
    with tempfile.TemporaryDirectory() as folder:
        rooms, cache = Path(folder) / "rooms", Path(folder) / "cache"
        height, width = settings.image_size
        generate_rooms(RoomsConfig(out=rooms, scenes=2, frames=24, height=height, width=width))
        variants = {
            "token": Steps(make_pipeline(settings, rooms), fused=True),
            "token, cached": Steps(make_pipeline(settings, rooms, cache), fused=True),
            "dense": Steps(make_pipeline(settings, rooms, path="dense"), fused=True),
            "token, quadratic head": Steps(make_pipeline(settings, rooms, form="quadratic"), fused=True),
            "token, bfloat16": Steps(make_pipeline(settings, rooms, precision="bfloat16"), fused=True),
            "token, plain Adam": Steps(make_pipeline(settings, rooms), fused=False),
        }
        times = in_turns(variants, settings.repeats, device=settings.device)
        losses = {name: float(steps()) for name, steps in variants.items()}
    about = machine()
    print(described(about))
    print(described(vars(settings)))
    rows = []
    for name, steps in variants.items():
        stages = [quartiles([part[stage].wall for part in steps.parts[1:]])[1] for stage in STAGES]
        total = quartiles([seconds.wall for seconds in times[name]])
        rows.append([name, with_spread(total), *(f"{1e3 * stage:.0f}" for stage in stages)])
    print_table(["variant", "step, s", *(f"{stage}, ms" for stage in STAGES)], rows)
    over = {name: ratios(times[name], times["token"]) for name in variants if name != "token"}
    for name, ratio in over.items():
        print(f"{name} / token: {with_spread(ratio)}")
    print("losses after the same steps: " + ", ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
    if settings.json:
        results = {
            "machine": about,
            "settings": {name: str(value) for name, value in vars(settings).items()},
            "seconds": {name: quartiles([s.wall for s in seconds]) for name, seconds in times.items()},
            "stages": {
                name: {stage: quartiles([part[stage].wall for part in steps.parts[1:]]) for stage in STAGES}
                for name, steps in variants.items()
            },
            "ratios": {f"{name} over token": ratio[1] for name, ratio in over.items()},
            "losses": losses,
        }
        write_json(settings.json, results)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(tyro.cli(TrainingStepBenchmark))
