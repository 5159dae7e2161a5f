"""What training on view triplets has in common, whatever is trained: steps, evaluation, the viewer's start."""

import pickle
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, cast

import numpy as np
import torch
import torch.distributed as dist
import yaml
from jaxtyping import Float
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.snd_triplets import TripletDataManager
from snd_nerfstudio.viewer.outputs import ShownScene


@dataclass
class TripletPipelineConfig(VanillaPipelineConfig):
    """A method that trains on view triplets."""

    seed: int = 42
    """Seed of everything random in training; --machine.seed covers nerfstudio's own."""
    steps_per_report: int = 50
    """Steps between lines with the loss in the terminal; 0 = none."""


class TripletPipeline(VanillaPipeline):
    """A datamanager that gives triplets and a model that learns from them.

    A subclass sets ``config``, ``datamanager``, ``_model``, ``rank`` and ``world_size`` and says what a step and an
    evaluation are.
    """

    config: TripletPipelineConfig
    datamanager: TripletDataManager  # type: ignore
    rank: int

    LOSS = "loss"
    """Name of the loss in the logs."""

    def _set_up(self, config: TripletPipelineConfig, test_mode: Any, world_size: int, local_rank: int) -> None:
        """Take the place of nerfstudio's constructor, which expects pixels and rays."""
        super(VanillaPipeline, self).__init__()
        self.config = config
        self.test_mode = test_mode
        self.world_size = world_size
        self.rank = dist.get_rank() if dist.is_initialized() else local_rank  # over all machines
        self.schedule_steps: Optional[int] = None
        self._latest: Dict[str, Tensor] = {}

    def _distribute(self, device: str, local_rank: int) -> None:
        """Wrap the model for several processes."""
        if self.world_size > 1:
            ids = [local_rank] if torch.device(device).type == "cuda" else None
            self._model = cast(Model, DistributedDataParallel(self._model, device_ids=ids))
            dist.barrier(device_ids=ids)

    def _depth_range(self) -> Optional[Tuple[float, float]]:
        """Near and far of the reconstructor, or None where it has none."""
        return None

    def _warn_about_range(self, triplets: List[ViewTriplet]) -> None:
        """MVSplat represents nothing nearer than near or farther than far."""
        bounds = self._depth_range()
        measured = [t.context.depths[t.context.depths > 0] for t in triplets if t.context.depths is not None]
        if bounds is None or sum(len(depths) for depths in measured) == 0:
            return
        near, far = bounds
        depths = torch.cat(measured)
        outside = float(((depths < near) | (depths > far)).float().mean())
        if outside > 0.01:
            CONSOLE.log(
                f"[yellow]{outside:.0%} of the measured depths are not between near {near:g} and far {far:g}, and "
                "cannot be represented: give them, or --pipeline.datamanager.bounds scene."
            )

    # ------------------------------------------------------------------ training

    @abstractmethod
    def _step(self, triplets: List[ViewTriplet], seed: int) -> Dict[str, Tensor]:
        """``loss`` with gradient, and metrics, through DDP's wrapper."""

    def _after_loss(self, step: int) -> None:
        """Called between the loss and its gradient."""

    def get_train_loss_dict(self, step: int) -> Tuple[Any, Dict[str, Any], Dict[str, Any]]:
        """Loss of one step; everything random in it is a function of (seed, step, rank)."""
        triplets = self.datamanager.next_train(step)
        # odd multipliers keep the seeds of neighbouring steps and ranks apart
        seed = (self.config.seed * 1_000_003 + step * 8_191 + self.rank) % 2**63
        outputs = self._step(triplets, seed)
        if not torch.isfinite(outputs["loss"]):
            raise InputError(
                f"The loss of step {step} is not finite; its triplets: "
                f"{'; '.join(triplet.describe() for triplet in triplets)}. Look at these files and their poses."
            )
        self._after_loss(step)
        metrics = {name: value.detach() for name, value in outputs.items() if name != "loss"}
        if self.datamanager.faults.triplets("training"):
            metrics["skipped"] = torch.tensor(float(self.datamanager.faults.triplets("training")))
        self._latest = {"loss": outputs["loss"].detach(), **metrics}
        return outputs, {self.LOSS: outputs["loss"]}, metrics

    def _report(self, step: int) -> None:
        every = self.config.steps_per_report
        if every and step % every == 0 and self.rank == 0:
            values = "  ".join(f"{name} {float(value):.6f}" for name, value in self._latest.items())
            CONSOLE.log(f"step {step}: {values}")

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> List[TrainingCallback]:
        """A line in the terminal."""
        return [TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], self._report)]

    # ------------------------------------------------------------------ evaluation

    @abstractmethod
    def _losses(self, triplet: ViewTriplet) -> Dict[str, Tensor]:
        """``loss`` and metrics of one held-out triplet, without gradient."""

    @abstractmethod
    def evaluate(self, triplet: ViewTriplet) -> Tuple[Dict[str, float], Dict[str, Tensor]]:
        """Metrics, and pictures ``[H, W, 3]``, of one triplet."""

    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> Tuple[Any, Dict[str, Any], Dict[str, Any]]:
        """Loss on one held-out triplet."""
        self.eval()
        outputs = self._losses(self._eval_triplet_of(step))
        self.train()
        metrics = {name: value for name, value in outputs.items() if name != "loss"}
        return outputs, {self.LOSS: outputs["loss"]}, metrics

    def _eval_triplet_of(self, step: int) -> ViewTriplet:
        """A held-out triplet drawn from (seed, step) alone, so that a resumed run's curves are the same."""
        generator = np.random.default_rng([self.config.seed, step])
        # nerfstudio wants a loss in any case: where a triplet cannot be read, another one's is said to be that
        for number in generator.permutation(self.datamanager.num_eval_triplets).tolist():
            try:
                return self.datamanager.eval_triplet(number, with_depth=True)
            except BrokenFileError as error:
                self.datamanager.faults.note(error, "a held-out triplet", "evaluation")
                CONSOLE.log(f"[yellow]Step {step}: another held-out triplet is evaluated, for one cannot be read.")
        raise InputError("No held-out triplet can be read.")

    @torch.no_grad()
    def get_eval_image_metrics_and_images(self, step: int) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        """Metrics and pictures of one held-out triplet, for the writers."""
        self.eval()
        triplet = self._eval_triplet_of(step)
        metrics, pictures = self.evaluate(triplet)
        self.train()
        return {**metrics, "num_rays": triplet.target.height * triplet.target.width}, pictures

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> Dict[str, float]:
        """Mean (and standard deviation) of the metrics over all held-out triplets.

        Args:
            step: not used.
            output_path: folder for the pictures of every triplet.
            get_std: add ``<metric>_std``.

        Raises:
            InputError: nothing is held out.
        """
        count = self.datamanager.num_eval_triplets
        if count == 0:
            raise InputError(
                "Nothing is held out for evaluation: the dataset needs a second scene, or a longer one, or smaller "
                "context gaps (--pipeline.datamanager.min-context-gap, --pipeline.datamanager.max-context-gap)."
            )
        self.eval()
        rows: List[Dict[str, float]] = []
        columns = (TextColumn("Evaluating held-out triplets"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, transient=True) as progress:
            for number in progress.track(range(count)):
                try:
                    triplet = self.datamanager.eval_triplet(number, with_depth=True)
                except BrokenFileError as error:
                    self.datamanager.faults.note(error, "a held-out triplet", "evaluation")
                    continue
                metrics, pictures = self.evaluate(triplet)
                rows.append(metrics)
                if output_path is not None:
                    _save_pictures(pictures, output_path, number)
        self.train()
        if not rows:
            raise InputError(f"None of the {count} held-out triplets can be read.")
        # a triplet without any covered token has no loss and no cosine
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: torch.tensor([row[name] for row in rows if name in row]) for name in names}
        results = {name: float(value.mean()) for name, value in values.items()}
        if len(rows) < count:
            results["skipped"] = float(count - len(rows))
        if get_std:
            results |= {f"{name}_std": float(value.std(correction=0)) for name, value in values.items()}
        return results


def median_depth(scene: ShownScene) -> float:
    """Depth of the middle one of the Gaussians before the target view, world units."""
    gaussians, pose = scene.gaussians, scene.triplet.target.camera_to_worlds[0]
    depths: Float[Tensor, "n"] = (gaussians.means - pose[:3, 3]) @ pose[:3, 2]
    return float(depths[gaussians.opacities > 0].median().clamp(min=0.1))


def _save_pictures(pictures: Dict[str, Tensor], folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
        Image.fromarray(pixels).save(folder / f"eval_{number:04d}_{name}.png")


def load_run(load_config: Path, pipeline: type, method: str) -> Tuple[Any, Dict[str, Any], Path]:
    """The config and the newest checkpoint of a finished (or interrupted) run.

    Args:
        load_config: the run's ``config.yml``. As everywhere in nerfstudio it is read as YAML with Python objects: load
            only your own.
        pipeline: the kind of pipeline config that is expected.
        method: how it is called, for messages.

    Returns:
        The trainer's config as written, the checkpoint's contents, and its file.

    Raises:
        InputError: the file is missing or of another method, or there is no checkpoint beside it, or it is damaged.
    """
    if not load_config.is_file():
        raise InputError(f"--load-config {load_config}: no such file; it is <run folder>/config.yml.")
    config = yaml.load(load_config.read_text(), Loader=yaml.Loader)  # noqa: S506
    if not isinstance(getattr(config, "pipeline", None), pipeline):
        raise InputError(f"--load-config {load_config} is not of a run of `ns-train {method}` or its variants.")
    folder = load_config.parent / config.relative_model_dir
    checkpoints = sorted(folder.glob("step-*.ckpt"))
    if not checkpoints:
        raise InputError(f"{folder}: no checkpoint (step-*.ckpt) of this run.")
    try:
        state = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"The checkpoint {checkpoints[-1]} cannot be read ({error}).") from error
    return config, state, checkpoints[-1]


def strip_prefixes(state: Dict[str, Any]) -> Dict[str, Any]:
    """Checkpoint keys as the model knows them; DDP may have wrapped the model."""
    return {key.removeprefix("_model.").removeprefix("module."): value for key, value in state.items()}
