"""One training step, evaluation, checkpoints, and what the viewer is given."""

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple, Type, cast

import numpy as np
import torch
import torch.distributed as dist
import yaml
from einops import rearrange
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.models.base_model import Model
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import PROFILES, ProfileName, resolve
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.snd_datamanager import SnDDataManager, SnDDataManagerConfig
from snd_nerfstudio.snd_model import SnDModel, SnDModelConfig
from snd_nerfstudio.splatting import Gaussians, PinholeCamera
from snd_nerfstudio.viewer.start import StartingCamera


@dataclass
class SnDPipelineConfig(VanillaPipelineConfig):
    """Splat and Distill."""

    _target: Type = field(default_factory=lambda: SnDPipeline)
    """Target class to instantiate."""
    datamanager: SnDDataManagerConfig = field(default_factory=SnDDataManagerConfig)  # type: ignore
    """Triplets and Gaussians."""
    model: SnDModelConfig = field(default_factory=SnDModelConfig)  # type: ignore
    """Teacher, student, loss."""
    profile: ProfileName = "fixed"
    """Values of fields left at None: fixed (the paper with the released code's defects mended), paper, official."""
    seed: int = 42
    """Seed of triplets, dropout, adapters, head and random weights; --machine.seed covers nerfstudio's own."""
    steps_per_report: int = 50
    """Steps between lines with the loss in the terminal; 0 = none."""


def resolved(config: SnDPipelineConfig) -> SnDPipelineConfig:
    """A copy in which every field that the profile decides has its value.

    Raises:
        InputError: there is no such profile.
    """
    model = resolve(config.model, config.profile)
    return replace(
        config,
        datamanager=resolve(config.datamanager, config.profile),
        model=replace(model, supervision=resolve(model.supervision, config.profile)),
    )


class SnDPipeline(VanillaPipeline):
    """Wraps the datamanager (triplets, Gaussians) and the model (teacher, student).

    Args:
        config: as the user gave it; the profile is applied here.
        device: where everything is computed.
        test_mode: nerfstudio's.
        world_size: number of processes.
        local_rank: of this one.
        grad_scaler: not used; the loss is computed in float32.
    """

    datamanager: SnDDataManager  # type: ignore
    model: SnDModel  # type: ignore

    def __init__(
        self,
        config: SnDPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        super(VanillaPipeline, self).__init__()  # its own constructor expects pixels and rays
        self.config = resolved(config)
        self.test_mode = test_mode
        self.world_size = world_size
        self.rank = dist.get_rank() if dist.is_initialized() else local_rank  # over all machines
        self.schedule_steps: Optional[int] = PROFILES[config.profile]["schedule_steps"]
        self._latest: Dict[str, Tensor] = {}
        self.datamanager = self.config.datamanager.setup(
            device=device, test_mode=test_mode, world_size=world_size, local_rank=self.rank, seed=config.seed
        )
        if not self.datamanager.with_masks:
            CONSOLE.log("Without instance masks: tokens are upsampled plainly and splatted features are not blended.")
        self._model = self.config.model.setup(
            scene_box=self.datamanager.train_dataparser_outputs.scene_box,
            num_train_data=len(self.datamanager.train_frames),
            seed=config.seed,
        )
        self.model.to(device)
        if world_size > 1:
            ids = [local_rank] if torch.device(device).type == "cuda" else None
            self._model = cast(Model, DistributedDataParallel(self._model, device_ids=ids))
            dist.barrier(device_ids=ids)
        shown = self.datamanager.shown_triplet
        gaussians = self.datamanager.reconstruct(shown.context)
        self.model.display.show(shown, gaussians)
        self.starting_camera = StartingCamera(shown.target.camera(0), _median_depth(gaussians, shown.target.camera(0)))

        if test_mode == "val":  # that is, when training starts
            self._check_coverage()

    @torch.no_grad()
    def _check_coverage(self, count: int = 4) -> None:
        """Splat a few training triplets before the first step: without coverage nothing can be learned.

        Raises:
            InputError: no target view is covered anywhere.
        """
        coverage = []
        for triplet in self.datamanager.train_triplets(count):
            _, alpha = self.model.splat_colours(triplet, self.datamanager.reconstruct(triplet.context))
            coverage.append(float(alpha.mean()))
        mean = sum(coverage) / len(coverage)
        if max(coverage) < 1e-3:
            raise InputError(
                f"The Gaussians of the context views cover nothing of the target views (looked at {len(coverage)} "
                f"triplets, the last one {triplet.describe()}). Check the unit of the depth maps and the convention of "
                "the poses."
            )
        message = f"The contexts cover {mean:.0%} of their target views ({len(coverage)} triplets looked at)."
        if mean < 0.5:
            message = f"[yellow]{message} That is little: lower --pipeline.datamanager.max-context-gap?"
        CONSOLE.log(message)

    # ------------------------------------------------------------------ training

    def _step(self, triplets: List[ViewTriplet], seed: int) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Any]]:
        gaussians = [self.datamanager.reconstruct(triplet.context) for triplet in triplets]
        outputs = self._model(triplets, gaussians, seed)
        losses = {"distillation": outputs["loss"]}
        metrics = {name: value.detach() for name, value in outputs.items() if name != "loss"}
        return outputs, losses, metrics

    def get_train_loss_dict(self, step: int) -> Tuple[Any, Dict[str, Any], Dict[str, Any]]:
        """Loss of one step; everything random in it is a function of (seed, step, rank)."""
        triplets = self.datamanager.next_train(step)
        # odd multipliers keep the seeds of neighbouring steps and ranks apart
        seed = (self.config.seed * 1_000_003 + step * 8_191 + self.rank) % 2**63
        outputs, losses, metrics = self._step(triplets, seed)
        if not torch.isfinite(losses["distillation"]):
            raise InputError(
                f"The loss of step {step} is not finite; its triplets: "
                f"{'; '.join(triplet.describe() for triplet in triplets)}. Look at these files and their poses."
            )
        if self.config.model.ema_timing == "before_optimizer":
            # the targets of this step are computed already, the student is still as it was before its update
            self._update_teacher(step)
        self._latest = {"loss": losses["distillation"].detach(), **metrics}
        return outputs, losses, metrics

    def _report(self, step: int) -> None:
        every = self.config.steps_per_report
        if every and step % every == 0 and self.rank == 0:
            values = "  ".join(f"{name} {float(value):.6f}" for name, value in self._latest.items())
            CONSOLE.log(f"step {step}: {values}")

    def _update_teacher(self, step: int) -> None:
        if step % self.config.model.ema_every == 0 and self.config.model.ema_momentum < 1:
            self.model.update_teacher()

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> List[TrainingCallback]:
        """A line in the terminal, and the teacher's update after the optimiser's step unless it comes before it."""
        after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        callbacks = [TrainingCallback(after, self._report)]
        if self.config.model.ema_timing == "after_optimizer":
            callbacks.append(TrainingCallback(after, self._update_teacher))
        return callbacks

    # ------------------------------------------------------------------ evaluation

    @torch.no_grad()
    def get_eval_loss_dict(self, step: int) -> Tuple[Any, Dict[str, Any], Dict[str, Any]]:
        """Loss on one held-out triplet."""
        self.eval()
        triplet = self._eval_triplet_of(step)
        outputs = self.model([triplet], [self.datamanager.reconstruct(triplet.context)])
        self.train()
        metrics = {name: value for name, value in outputs.items() if name != "loss"}
        return outputs, {"distillation": outputs["loss"]}, metrics

    def _eval_triplet_of(self, step: int) -> ViewTriplet:
        """A held-out triplet drawn from (seed, step) alone, so that a resumed run's curves are the same."""
        number = np.random.default_rng([self.config.seed, step]).integers(self.datamanager.num_eval_triplets)
        return self.datamanager.eval_triplet(int(number))

    @torch.no_grad()
    def evaluate(self, triplet: ViewTriplet) -> Tuple[Dict[str, float], Dict[str, Tensor]]:
        """Metrics and pictures of one triplet.

        Returns:
            ``cosine`` between student and splatted teacher tokens, ``coverage``, ``psnr`` of the splatted colours
            against the target (holes are black), ``psnr_covered`` over the covered pixels alone, and the loss with its
            parts; pictures ``[H, W, 3]``.
        """
        gaussians = self.datamanager.reconstruct(triplet.context)
        outputs = self.model([triplet], [gaussians])
        colours, alpha = self.model.splat_colours(triplet, gaussians)
        truth = rearrange(triplet.target.images[0], "c h w -> h w c")
        covered = alpha > 0.5
        filled = colours / alpha.clamp(min=1e-6)[..., None]
        metrics = {name: float(value) for name, value in outputs.items()}
        metrics["psnr"] = _psnr(colours, truth)
        metrics["psnr_covered"] = _psnr(filled[covered], truth[covered]) if covered.any() else 0.0
        return metrics, {"target": truth, "splatted": colours.clamp(0, 1), **self._feature_pictures(triplet, gaussians)}

    def _feature_pictures(self, triplet: ViewTriplet, gaussians: Gaussians) -> Dict[str, Tensor]:
        basis = self.model.display.basis()
        target = self.model.supervise(triplet, gaussians)
        student = self.model.student_tokens(triplet.target.images)[0]
        patch = self.model.student.backbone.spec.patch
        pictures = {
            "target_tokens_pca": basis.colour(basis.project(target.tokens)) * target.learned[..., None],
            "student_pca": basis.colour(basis.project(student)),
        }
        return {name: p.repeat_interleave(patch, 0).repeat_interleave(patch, 1) for name, p in pictures.items()}

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
                metrics, pictures = self.evaluate(self.datamanager.eval_triplet(number))
                rows.append(metrics)
                if output_path is not None:
                    _save_pictures(pictures, output_path, number)
        self.train()
        # a triplet without any covered token has no loss and no cosine
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: torch.tensor([row[name] for row in rows if name in row]) for name in names}
        results = {name: float(value.mean()) for name, value in values.items()}
        if get_std:
            results |= {f"{name}_std": float(value.std(correction=0)) for name, value in values.items()}
        return results

    # ------------------------------------------------------------------ checkpoints

    def load_pipeline(self, loaded_state: Dict[str, Any], step: int) -> None:
        """Load a checkpoint's trained weights; every key must be accounted for.

        Raises:
            InputError: it does not fit.
        """
        self.model.update_to_step(step)
        self.model.load_trained(strip_prefixes(loaded_state), f"The checkpoint of step {step}")


def _median_depth(gaussians: Gaussians, camera: PinholeCamera) -> float:
    """Depth of the middle one of the visible Gaussians, world units."""
    pose = camera.camera_to_world
    depths = (gaussians.means - pose[:3, 3]) @ pose[:3, 2]
    return float(depths[gaussians.opacities > 0].median().clamp(min=0.1))


def _psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of colours in [0, 1]."""
    error = (image.clamp(0, 1) - truth).square().mean().clamp(min=1e-10)
    return float(-10 * torch.log10(error))


def _save_pictures(pictures: Dict[str, Tensor], folder: Path, number: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
        Image.fromarray(pixels).save(folder / f"eval_{number:04d}_{name}.png")


def load_trained_model(load_config: Path) -> Tuple[Any, SnDModel, int]:
    """The model of a finished (or interrupted) run, from its newest checkpoint; the dataset is not needed.

    Args:
        load_config: the run's ``config.yml``. As everywhere in nerfstudio it is read as YAML with Python objects: load
            only your own.

    Returns:
        The run's config with the profile applied to its pipeline, the model on the CPU in eval mode, and the step.

    Raises:
        InputError: the file is missing or of another method, or there is no checkpoint beside it.
    """
    if not load_config.is_file():
        raise InputError(f"--load-config {load_config}: no such file; it is <run folder>/config.yml.")
    config = yaml.load(load_config.read_text(), Loader=yaml.Loader)  # noqa: S506
    if not isinstance(getattr(config, "pipeline", None), SnDPipelineConfig):
        raise InputError(f"--load-config {load_config} is not of a run of `ns-train snd` or its variants.")
    config.pipeline = resolved(config.pipeline)
    folder = load_config.parent / config.relative_model_dir
    checkpoints = sorted(folder.glob("step-*.ckpt"))
    if not checkpoints:
        raise InputError(f"{folder}: no checkpoint (step-*.ckpt) of this run.")
    try:
        state = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError(f"The checkpoint {checkpoints[-1]} cannot be read ({error}).") from error
    model = config.pipeline.model.setup(
        scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])),
        num_train_data=0,
        seed=config.pipeline.seed,
    )
    model.load_trained(strip_prefixes(state["pipeline"]), str(checkpoints[-1]))
    return config, model.eval(), int(state["step"])


def strip_prefixes(state: Dict[str, Any]) -> Dict[str, Any]:
    """Checkpoint keys as the model knows them; DDP may have wrapped the model."""
    return {key.removeprefix("_model.").removeprefix("module."): value for key, value in state.items()}
