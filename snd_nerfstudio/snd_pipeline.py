"""One training step of Splat and Distill, evaluation, checkpoints, and what the viewer is given."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Dict, List, Literal, Optional, Tuple, Type

import torch
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import PROFILES, ProfileName, resolve
from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError
from snd_nerfstudio.reconstruction.mvsplat.reconstructor import MVSplatReconstructor
from snd_nerfstudio.reconstruction.quality import reconstruction_quality
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.snd_datamanager import SnDDataManager, SnDDataManagerConfig
from snd_nerfstudio.snd_model import Geometry, SnDModel, SnDModelConfig
from snd_nerfstudio.snd_triplet_pipeline import (
    TripletPipeline,
    TripletPipelineConfig,
    load_run,
    median_depth,
    strip_prefixes,
)
from snd_nerfstudio.viewer.outputs import ShownScene
from snd_nerfstudio.viewer.panel import FeaturePanel
from snd_nerfstudio.viewer.pictures import sheet
from snd_nerfstudio.viewer.start import StartingCamera

STEPS_PER_REFRESH = 10
"""Steps between looks of the viewer at what teacher and student say by now."""
RECONSTRUCTOR = "reconstructor_fingerprint"
"""Key of a checkpoint that tells which weights made the Gaussians it was trained on; the weights are not in it."""


@dataclass
class SnDPipelineConfig(TripletPipelineConfig):
    """Splat and Distill."""

    _target: Type = field(default_factory=lambda: SnDPipeline)
    """Target class to instantiate."""
    datamanager: SnDDataManagerConfig = field(default_factory=SnDDataManagerConfig)  # type: ignore
    """Triplets and Gaussians."""
    model: SnDModelConfig = field(default_factory=SnDModelConfig)  # type: ignore
    """Teacher, student, loss."""
    profile: ProfileName = "fixed"
    """Values of fields left at None: fixed (the paper with the released code's defects mended), paper, official."""
    checked_triplets: int = 8
    """Held-out triplets on which the reconstruction is measured before training starts; 0 = none."""
    probe_triplets: int = 8
    """Held-out triplets with depth maps on which every evaluation of all of them, such as ns-eval's, also looks at what
    the student's tokens know of 3D: correspondence between the contexts, and depth by similar tokens; 0 = none."""
    warn_below_psnr: float = 15.0
    """Re-rendered target views worse than this (mean PSNR in dB) give a warning before training starts."""


def resolved(config: SnDPipelineConfig) -> SnDPipelineConfig:
    """A copy in which every field that the profile decides has its value.

    Raises:
        InputError: there is no such profile.
    """
    model = resolve(config.model, config.profile)
    if "position_embedding" not in vars(config.model):  # the config.yml of a run from before there was a choice
        model.position_embedding = "timm"
    return replace(
        config,
        datamanager=resolve(config.datamanager, config.profile),
        model=replace(model, supervision=resolve(model.supervision, config.profile)),
    )


def check_cache(config: SnDPipelineConfig) -> None:
    """Refuse a cache of operators together with a path that uses none.

    Raises:
        InputError: both are asked for.
    """
    if config.datamanager.operator_cache is not None and config.model.supervision.path == "dense":
        raise InputError(
            "--pipeline.model.supervision.path dense does not use token operators, and "
            "--pipeline.datamanager.operator-cache keeps them: leave one of the two."
        )


class SnDPipeline(TripletPipeline):
    """Wraps the datamanager (triplets, Gaussians) and the model (teacher, student).

    Args:
        config: as the user gave it; the profile is applied here.
        device: where everything is computed.
        test_mode: nerfstudio's.
        world_size: number of processes.
        local_rank: of this one.
        grad_scaler: not used; the loss is computed in float32.
    """

    config: SnDPipelineConfig
    datamanager: SnDDataManager  # type: ignore
    model: SnDModel  # type: ignore

    LOSS = "distillation"
    reconstructor_fingerprint: Tensor

    def __init__(
        self,
        config: SnDPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        self._set_up(resolved(config), test_mode, world_size, local_rank)
        check_cache(self.config)
        if test_mode != "val":  # only training looks things up
            self.config.datamanager.operator_cache = None
        self.skipped_pairs = 0
        self.schedule_steps = PROFILES[config.profile]["schedule_steps"]
        self.datamanager = self.config.datamanager.setup(
            device=device, test_mode=test_mode, world_size=world_size, local_rank=self.rank, seed=config.seed
        )
        self.register_buffer("reconstructor_fingerprint", self.datamanager.reconstructor_fingerprint)
        if not self.datamanager.with_masks:
            CONSOLE.log("Without instance masks: tokens are upsampled plainly and splatted features are not blended.")
        self._model = self.config.model.setup(
            scene_box=self.datamanager.train_dataparser_outputs.scene_box,
            num_train_data=len(self.datamanager.train_frames),
            seed=config.seed,
        )
        self.model.to(device)
        self._distribute(device, local_rank)
        if test_mode == "val":  # that is, when training starts
            _ = self.datamanager.operators  # a cache that cannot be used is said now, not at the first step
            self._check_reconstruction()
        self._show(self.datamanager.shown_triplet)
        self.panel = FeaturePanel(
            self.datamanager,
            self.model.display,
            StartingCamera(lambda: self._shown.triplet.target.camera(0), lambda: median_depth(self._shown)),
            self._show,
            lambda: self.model.pictures(self._shown.triplet, self._shown.gaussians),
        )

    def _show(self, triplet: ViewTriplet) -> None:
        """Put a triplet on display in the viewer."""
        self.model.display.show(triplet, self.datamanager.reconstruct(triplet.context))

    @property
    def _shown(self) -> ShownScene:
        assert self.model.display.scene is not None
        return self.model.display.scene

    @torch.no_grad()
    def _check_reconstruction(self) -> None:
        """Measure the reconstructor on held-out triplets: features splatted with bad geometry teach nothing.

        Raises:
            InputError: no target view is covered anywhere.
        """
        data = self.datamanager
        count = self.config.checked_triplets
        if count < 1 or self.rank != 0:
            return
        number = min(count, data.num_eval_triplets)
        places = [place * data.num_eval_triplets // number for place in range(number)]
        held_out = data.eval_triplets(places, with_depth=True) if places else []
        triplets = held_out or data.train_triplets(count, with_depth=True)
        if not triplets:
            raise InputError(f"None of {count} training triplets, spread over the dataset, can be read.")
        rows = [reconstruction_quality(data.reconstruct(triplet.context), triplet)[0] for triplet in triplets]
        values = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0] if all(name in r for r in rows)}
        if max(row["coverage"] for row in rows) < 1e-3:
            raise InputError(
                f"The Gaussians of the context views cover nothing of the target views (looked at {len(rows)} "
                f"triplets, the last one {triplets[-1].describe()}). Check convention and unit of the poses, the unit "
                "of the depth maps, and near and far."
            )
        report = f"PSNR {values['psnr']:.1f} dB, SSIM {values['ssim']:.2f}, coverage {values['coverage']:.0%}"
        if "depth_error" in values:
            report += f", depth off by {values['depth_error']:.1%} ({values['depth_right']:.0%} within a quarter)"
        where = "held-out" if held_out else "training"
        name = self.config.datamanager.reconstructor
        CONSOLE.log(f"Reconstruction by `{name}`, target views of {len(rows)} {where} triplets re-rendered: {report}.")
        self._warn_about_range(triplets)
        if values["psnr"] < self.config.warn_below_psnr or values["coverage"] < 0.5:
            CONSOLE.log(
                f"[bold red]Warning: this reconstruction is bad (below {self.config.warn_below_psnr:g} dB, or less "
                "than half covered), and nothing in the distillation loss would show it.[/bold red] Check poses, near "
                "and far, try a smaller --pipeline.datamanager.max-context-gap, another reconstructor, or train one on "
                "this data with `ns-train mvsplat`. (--pipeline.warn-below-psnr sets the threshold.)"
            )

    def _depth_range(self) -> Optional[Tuple[float, float]]:
        reconstructor = self.datamanager.reconstructor
        return (reconstructor.near, reconstructor.far) if isinstance(reconstructor, MVSplatReconstructor) else None

    # ------------------------------------------------------------------ training

    def _step(self, triplets: List[ViewTriplet], seed: int) -> Dict[str, Tensor]:
        usable, geometry = [], []
        for triplet in triplets:
            try:
                geometry.append(self.geometry(triplet))
                usable.append(triplet)
            except DegeneratePairError as error:
                self.skipped_pairs += 1
                CONSOLE.log(f"[yellow]Skipped {triplet.describe()} ({self.skipped_pairs} so far): {error}")
        return self._model(usable, geometry, seed)

    @torch.no_grad()
    def geometry(self, triplet: ViewTriplet) -> Geometry:
        """What the teacher's path needs of a triplet: its operator from the cache if there is one, or its Gaussians.

        Raises:
            DegeneratePairError: the reconstructor cannot match the contexts.
        """
        operators = self.datamanager.operators
        if operators is None:
            return self.datamanager.reconstruct(triplet.context)
        key = self.model.operators.key(triplet, self.datamanager.reconstructor_description)
        operator = operators.get(key)
        if operator is None:
            gaussians = self.datamanager.reconstruct(triplet.context)
            operator = operators.keep(key, self.model.operators.make(triplet, gaussians, for_any_blending=True))
        return operator.to(triplet.target.images.device)

    def _report(self, step: int) -> None:
        super()._report(step)
        every, operators = self.config.steps_per_report, self.datamanager.operators
        if operators is not None and every and step and step % every == 0 and self.rank == 0:
            counts = operators.statistics
            CONSOLE.log(
                f"operator cache: {counts.found} found, {counts.missing + counts.damaged} built, {counts.turned_away} "
                f"without room; it holds {operators.size / 1e6:.1f} MB"
            )

    def _after_loss(self, step: int) -> None:
        if self.config.model.ema_timing == "before_optimizer":
            # the targets of this step are computed already, the student is still as it was before its update
            self._update_teacher(step)

    def _update_teacher(self, step: int) -> None:
        if step % self.config.model.ema_every == 0 and self.config.model.ema_momentum < 1:
            self.model.update_teacher()

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> List[TrainingCallback]:
        """A line in the terminal, and the teacher's update after the optimiser's step unless it comes before it."""
        callbacks = super().get_training_callbacks(training_callback_attributes)
        if self.config.model.ema_timing == "after_optimizer":
            after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
            callbacks.append(TrainingCallback(after, self._update_teacher))
        callbacks.append(TrainingCallback([TrainingCallbackLocation.AFTER_TRAIN_ITERATION], self._refresh_display))
        return callbacks

    def _refresh_display(self, step: int) -> None:
        if step % STEPS_PER_REFRESH == 0:
            self.model.display.changed()

    # ------------------------------------------------------------------ evaluation

    def _losses(self, triplet: ViewTriplet) -> Dict[str, Tensor]:
        return self.model([triplet], [self.geometry(triplet)])

    @torch.no_grad()
    def evaluate(self, triplet: ViewTriplet) -> Tuple[Dict[str, float], Dict[str, Tensor]]:
        """Metrics and pictures of one triplet.

        Returns:
            ``cosine`` between student and splatted teacher tokens, the loss with its parts, and the reconstruction's
            metrics (``reconstruction.quality``); pictures ``[H, W, 3]``.
        """
        gaussians = self.datamanager.reconstruct(triplet.context)
        metrics = {name: float(value) for name, value in self.model([triplet], [gaussians]).items()}
        quality, pictures = reconstruction_quality(gaussians, triplet)
        pictures = {"reconstruction": pictures["splatted"], **self.model.pictures(triplet, gaussians)}
        return {**metrics, **quality}, {"features": sheet(pictures, columns=4, title=triplet.describe())}

    @torch.no_grad()
    def get_average_eval_image_metrics(
        self, step: Optional[int] = None, output_path: Optional[Path] = None, get_std: bool = False
    ) -> Dict[str, float]:
        """As for every pipeline, and a short probe of the student, and of the backbone as it was (``_original``).

        Raises:
            InputError: nothing is held out.
        """
        results = super().get_average_eval_image_metrics(step, output_path, get_std)
        data, count = self.datamanager, self.config.probe_triplets
        if count < 1 or data.eval_frames is None or not (data.eval_frames.has_depth and data.train_frames.has_depth):
            return results
        from snd_nerfstudio.probing.held_out import held_out_probes

        held_out = min(count, data.num_eval_triplets)
        places = [number * data.num_eval_triplets // held_out for number in range(held_out)]
        self.eval()
        measured = held_out_probes(
            {"": self.model.student_tokens, "_original": self.model.original_tokens},
            data.train_triplets(count, with_depth=True),
            data.eval_triplets(places, with_depth=True),
        )
        self.train()
        return {**results, **measured}

    # ------------------------------------------------------------------ checkpoints

    def load_pipeline(self, loaded_state: Dict[str, Any], step: int) -> None:
        """Load a checkpoint's trained weights; every key must be accounted for.

        Raises:
            InputError: it does not fit, or was trained on the Gaussians of another reconstructor.
        """
        self.model.update_to_step(step)
        state = strip_prefixes(loaded_state)
        trained_with = state.pop(RECONSTRUCTOR, None)
        own = self.reconstructor_fingerprint.cpu()
        if trained_with is None or not torch.equal(trained_with.cpu(), own):
            raise InputError(
                f"The checkpoint of step {step} was trained with another reconstructor than "
                f"--pipeline.datamanager.reconstructor {self.config.datamanager.reconstructor} and its "
                "--pipeline.datamanager.reconstructor-checkpoint give now (of a run's folder the newest): give the "
                "same weights."
            )
        self.model.load_trained(state, f"The checkpoint of step {step}")


def load_trained_model(load_config: Path) -> Tuple[Any, SnDModel, int]:
    """The model of a finished (or interrupted) run, from its newest checkpoint; the dataset is not needed.

    Args:
        load_config: the run's ``config.yml``.

    Returns:
        The run's config with the profile applied to its pipeline, the model on the CPU in eval mode, and the step.

    Raises:
        InputError: see `load_run`.
    """
    config, state, file = load_run(load_config, SnDPipelineConfig, "snd")
    config.pipeline = resolved(config.pipeline)
    model = config.pipeline.model.setup(
        scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])),
        num_train_data=0,
        seed=config.pipeline.seed,
    )
    weights = strip_prefixes(state["pipeline"])
    weights.pop(RECONSTRUCTOR, None)
    model.load_trained(weights, str(file))
    return config, model.eval(), int(state["step"])
