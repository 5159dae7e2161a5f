"""Photometric training of MVSplat on view triplets."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Literal, Tuple, Type

import torch
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes, TrainingCallbackLocation
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import EXTRA_STATE
from snd_nerfstudio.reconstruction.mvsplat.settings import MVSplatSettings, NetworkSizes
from snd_nerfstudio.reconstruction.quality import context_depths, reconstruction_quality
from snd_nerfstudio.scenes.masks.maker import MaskSource
from snd_nerfstudio.scenes.views import ViewTriplet
from snd_nerfstudio.snd_mvsplat_model import MVSplatModel, MVSplatModelConfig
from snd_nerfstudio.snd_triplet_pipeline import (
    TripletPipeline,
    TripletPipelineConfig,
    load_run,
    median_depth,
    strip_prefixes,
)
from snd_nerfstudio.snd_triplets import TripletDataManager, TripletDataManagerConfig
from snd_nerfstudio.viewer.panel import ReconstructionPanel
from snd_nerfstudio.viewer.start import StartingCamera


@dataclass
class MVSplatDataManagerConfig(TripletDataManagerConfig):
    """View triplets with several targets."""

    _target: Type = field(default_factory=lambda: MVSplatDataManager)
    """Target class to instantiate."""
    masks: MaskSource = "none"
    """Instance masks are not used here."""
    targets_per_pair: int = 4
    """Target views rendered from each pair of contexts; rendering costs little beside the network."""


class MVSplatDataManager(TripletDataManager):
    """Triplets whose contexts can be matched with each other."""

    config: MVSplatDataManagerConfig

    @property
    def needs_overlap(self) -> bool:
        """Whether the contexts are matched with each other: they are."""
        return True

    @property
    def targets_per_pair(self) -> int:
        """Target views of each pair of contexts in a training step."""
        return self.config.targets_per_pair

    def _check_config(self) -> None:
        super()._check_config()
        if self.config.targets_per_pair < 1:
            raise InputError("--pipeline.datamanager.targets-per-pair must be at least 1.")


@dataclass
class MVSplatPipelineConfig(TripletPipelineConfig):
    """Photometric training of MVSplat."""

    _target: Type = field(default_factory=lambda: MVSplatPipeline)
    """Target class to instantiate."""
    datamanager: MVSplatDataManagerConfig = field(default_factory=MVSplatDataManagerConfig)  # type: ignore
    """Triplets."""
    model: MVSplatModelConfig = field(default_factory=MVSplatModelConfig)  # type: ignore
    """Network and loss."""


def resolved(config: MVSplatPipelineConfig) -> MVSplatPipelineConfig:
    """A copy in which every field left at None that the `fixed` profile decides has its value."""
    return replace(config, datamanager=resolve(config.datamanager, "fixed"))


class MVSplatPipeline(TripletPipeline):
    """Wraps the datamanager (triplets) and the model (network, rendering, loss).

    Args:
        config: as the user gave it.
        device: where everything is computed.
        test_mode: nerfstudio's.
        world_size: number of processes.
        local_rank: of this one.
        grad_scaler: not used.
    """

    config: MVSplatPipelineConfig
    datamanager: MVSplatDataManager  # type: ignore
    model: MVSplatModel  # type: ignore

    LOSS = "photometric"

    def __init__(
        self,
        config: MVSplatPipelineConfig,
        device: str,
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        grad_scaler: Any = None,
    ) -> None:
        self._set_up(resolved(config), test_mode, world_size, local_rank)
        self.datamanager = self.config.datamanager.setup(
            device=device, test_mode=test_mode, world_size=world_size, local_rank=self.rank, seed=config.seed
        )
        near, far = self.datamanager.depth_range
        self._model = self.config.model.setup(
            scene_box=self.datamanager.train_dataparser_outputs.scene_box,
            num_train_data=len(self.datamanager.train_frames),
            seed=config.seed,
            near=near,
            far=far,
        )
        self.model.to(device)
        self._distribute(device, local_rank)
        display = self.model.display
        self.model.show(self.datamanager.shown_triplet)
        start = StartingCamera(lambda: display.scene().triplet.target.camera(0), lambda: median_depth(display.scene()))
        self.panel = ReconstructionPanel(self.datamanager, display, start)
        if test_mode == "val":
            self._warn_about_range(self.datamanager.train_triplets(8, with_depth=True))

    def _depth_range(self) -> Tuple[float, float]:
        settings = self.model.network.settings
        return settings.near, settings.far

    # ------------------------------------------------------------------ training

    def _step(self, triplets: List[ViewTriplet], seed: int) -> Dict[str, Tensor]:
        return self._model(triplets, seed)

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> List[TrainingCallback]:
        """A line in the terminal; the viewer's Gaussians are computed anew after a step, when they are asked for."""
        callbacks = super().get_training_callbacks(training_callback_attributes)
        after = [TrainingCallbackLocation.AFTER_TRAIN_ITERATION]
        return [*callbacks, TrainingCallback(after, lambda step: self.model.display.changed())]

    # ------------------------------------------------------------------ evaluation

    def _losses(self, triplet: ViewTriplet) -> Dict[str, Tensor]:
        return self.model([triplet])

    @torch.no_grad()
    def evaluate(self, triplet: ViewTriplet) -> Tuple[Dict[str, float], Dict[str, Tensor]]:
        """Metrics and pictures of one triplet.

        Returns:
            Those of `reconstruction_quality`, ``lpips`` where its weights are there, and pictures ``[H, W, 3]``: the
            target, the rendered target, and the first context's depth (near is bright), measured beside predicted.
        """
        gaussians = self.model.reconstruct(triplet.context)
        metrics, pictures = reconstruction_quality(gaussians, triplet)
        distance = self.model.perceptual_distance(pictures["splatted"], pictures["target"])
        if distance is not None:
            metrics["lpips"] = distance
        inverse = 1 / context_depths(gaussians, triplet.context)[0].clamp(min=1e-6)
        maps = [inverse]
        if triplet.context.depths is not None:
            measured = triplet.context.depths[0]
            maps.insert(0, torch.where(measured > 0, 1 / measured.clamp(min=1e-6), torch.zeros_like(measured)))
        brightest = torch.quantile(maps[0], 0.99).clamp(min=1e-6)
        pictures["depth"] = (torch.cat(maps, dim=1) / brightest).clamp(0, 1)[..., None].expand(-1, -1, 3)
        return metrics, pictures

    # ------------------------------------------------------------------ checkpoints

    def load_pipeline(self, loaded_state: Dict[str, Any], step: int) -> None:
        """Load a checkpoint's network; every key must be accounted for.

        Raises:
            InputError: it does not fit.
        """
        self.model.update_to_step(step)
        self.model.load_trained(strip_prefixes(loaded_state), f"The checkpoint of step {step}")


def load_trained_network(load_config: Path) -> Tuple[Any, MVSplatModel, int]:
    """The network of a finished (or interrupted) run, from its newest checkpoint alone.

    Neither the dataset nor the weights that the run started from are needed.

    Args:
        load_config: the run's ``config.yml``.

    Returns:
        The run's config, the model on the CPU in eval mode, and the step.

    Raises:
        InputError: see `load_run`.
    """
    config, state, file = load_run(load_config, MVSplatPipelineConfig, "mvsplat")
    weights = strip_prefixes(state["pipeline"])
    settings = MVSplatSettings.from_dict(weights["network." + EXTRA_STATE], str(file))
    sizes = NetworkSizes(**{field.name: getattr(settings, field.name) for field in fields(NetworkSizes)})
    model_config = replace(
        config.pipeline.model,
        weights="random",
        matching_weights=None,
        sizes=sizes,
        geometry=settings.geometry,
        lpips_weight=0.0,
    )
    model = model_config.setup(
        scene_box=SceneBox(aabb=torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])),
        num_train_data=0,
        near=settings.near,
        far=settings.far,
    )
    model.load_trained(weights, str(file))
    return config, model.eval(), int(state["step"])
