"""Nerfstudio's trainer with exact resuming and checkpoints that are never half-written."""

import copy
import json
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Type

import torch
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig, Optimizers
from nerfstudio.engine.schedulers import Scheduler, SchedulerConfig
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from nerfstudio.utils.decorators import check_main_thread
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from snd_nerfstudio.distillation.schedule import warmup_cosine
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.viewer.fair_lock import FairLock


@dataclass
class WarmupCosineConfig(SchedulerConfig):
    """Linear warm-up, then half a cosine to the end of training."""

    _target: Type = field(default_factory=lambda: WarmupCosine)
    """Target class to instantiate."""
    steps: Optional[int] = None
    """Length of the schedule. None: by the profile, which is --max-num-iterations unless it says otherwise."""
    warmup_share: float = 0.01
    """Share of the steps that is warm-up."""


class WarmupCosine(Scheduler):
    """Builds the scheduler; its factors are Python floats, which keeps checkpoints readable with weights_only."""

    config: WarmupCosineConfig

    def get_scheduler(self, optimizer: torch.optim.Optimizer, lr_init: float) -> LRScheduler:
        """A LambdaLR over `warmup_cosine`.

        Raises:
            InputError: the length is not known or not positive.
        """
        steps, warmup_share = self.config.steps, self.config.warmup_share
        if steps is None or steps < 1:
            raise InputError(f"The learning-rate schedule has {steps} steps: give at least 1 as --max-num-iterations.")
        return LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup_share))


@dataclass
class FusedAdamConfig(AdamOptimizerConfig):
    """Adam in one pass over each tensor (`benchmarks/training_step.py`)."""

    fused: bool = True
    """Update weights and moments in one pass instead of one per operation."""


DATA_SUMMARY = "data.json"
"""In a run's folder: what it was trained on."""
LOCALHOST = "127.0.0.1"
"""Where viewers listen unless another interface is asked for."""


def _host_is_given() -> bool:
    """Whether the command line says where the viewer is to listen."""
    names = [argument.partition("=")[0].replace("_", "-") for argument in sys.argv]
    return "--viewer.websocket-host" in names


@dataclass
class SnDTrainerConfig(TrainerConfig):
    """Nerfstudio's training settings."""

    _target: Type = field(default_factory=lambda: SnDTrainer)
    """Target class to instantiate."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever, but for the viewer's settings that ``ns-viewer`` puts in the place of the run's.

        Nerfstudio's own default is to listen on all interfaces. Here that needs to be asked for.
        """
        if name == "viewer" and isinstance(getattr(self, "viewer", None), ViewerConfig) and not _host_is_given():
            value.websocket_host = LOCALHOST
        super().__setattr__(name, value)

    def save_config(self) -> None:
        """Write ``config.yml`` into the run's folder: the first thing that is written at all.

        Raises:
            InputError: the folder cannot be written.
        """
        self._fix_paths()
        try:
            super().save_config()
        except OSError as error:
            raise InputError(
                f"--output-dir {self.output_dir} cannot be written ({error.strerror}): choose another."
            ) from error

    def _fix_paths(self) -> None:
        """A base on disk is found again from any folder."""
        model = getattr(self.pipeline, "model", None)
        weights = getattr(model, "weights", None)
        if isinstance(weights, str):
            what, separator, options = weights.partition("::")
            file = Path(what).expanduser()
            if file.exists() and (file.is_file() or len(file.parts) > 1):
                model.weights = f"{file.resolve()}{separator}{options}"  # type: ignore


class SnDTrainer(Trainer):
    """What differs from nerfstudio's:

    * ``--max-num-iterations`` is where training ends, also for a resumed run (nerfstudio 1.1 adds as many again);
    * a schedule without a length of its own gets that of the training;
    * checkpoints are written beside their folder and then renamed into it, so a killed run leaves only whole ones;
    * a picture that the viewer waits for comes after the current step, not when training happens to leave a gap.
    """

    def __init__(self, config: TrainerConfig, local_rank: int = 0, world_size: int = 1) -> None:
        if config.mixed_precision:
            raise InputError(
                "--mixed-precision True is nerfstudio's float16, in which neither the geometry nor the loss survives "
                "(its signal is in the fourth decimal): leave it off."
            )
        if any(steps != 1 for steps in config.gradient_accumulation_steps.values()):
            raise InputError(
                "--gradient-accumulation-steps would make resuming inexact: for larger batches use "
                "--pipeline.datamanager.triplets-per-step."
            )
        super().__init__(config, local_rank, world_size)
        self.train_lock: Any = FairLock()

    def setup(self, test_mode: Literal["test", "val", "inference"] = "val") -> None:
        """Nerfstudio's, and a summary of the data in the run's folder, which an exported backbone quotes."""
        super().setup(test_mode)
        summary = getattr(self.pipeline.datamanager, "summary", None)
        if self.local_rank == 0 and summary is not None:
            (self.base_dir / DATA_SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def setup_optimizers(self) -> Optimizers:
        """Give every schedule its length, then build the optimisers."""
        configs: dict[str, Any] = copy.deepcopy(self.config.optimizers)
        by_profile = getattr(self.pipeline, "schedule_steps", None)
        for group in configs.values():
            scheduler = group["scheduler"]
            if isinstance(scheduler, WarmupCosineConfig) and scheduler.steps is None:
                scheduler.steps = by_profile or self.config.max_num_iterations
        return Optimizers(configs, self.pipeline.get_param_groups())

    def _load_checkpoint(self) -> None:
        """Resume, if asked to.

        Raises:
            InputError: there is no checkpoint, or it is damaged or of another method.
        """
        folder = self.config.load_dir
        if folder is not None and not list(folder.glob("step-*.ckpt")):
            raise InputError(f"--load-dir {folder}: no step-*.ckpt there; it is <run folder>/nerfstudio_models.")
        self._check_data_unchanged()
        try:
            super()._load_checkpoint()
        except KeyError as error:
            if error.args != ("adapters",):
                raise
            raise InputError(
                f"The checkpoint of {folder or self.config.load_checkpoint} is of an earlier version of this plugin, "
                "whose runs can be evaluated, looked at and exported, but not resumed."
            ) from error
        except (RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            where = folder if folder is not None else self.config.load_checkpoint
            raise InputError(
                f"The checkpoint of {where} cannot be loaded ({error}): choose another with --load-step."
            ) from error

    def _check_data_unchanged(self) -> None:
        """Notice if a run that is resumed was trained on another state of its dataset.

        Raises:
            InputError: it was, and that is not allowed.
        """
        folder = self.config.load_dir
        if folder is None and self.config.load_checkpoint is not None:
            folder = self.config.load_checkpoint.parent
        check = getattr(self.pipeline.datamanager, "check_unchanged", None)
        if folder is None or check is None or not (file := folder.parent / DATA_SUMMARY).is_file():
            return
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{file} is not valid JSON ({error}): delete it to resume without the check.") from error
        check(summary, file)

    def train(self) -> None:
        """Train up to ``max_num_iterations`` steps in all."""
        total = self.config.max_num_iterations
        if self._start_step >= total:
            raise InputError(
                f"The checkpoint is at step {self._start_step - 1} and training ends at --max-num-iterations {total}: "
                "there is nothing left to do; give a larger number to go on."
            )
        self.config.max_num_iterations = total - self._start_step
        try:
            super().train()
        finally:
            self.config.max_num_iterations = total

    @check_main_thread
    def save_checkpoint(self, step: int) -> None:
        """Write ``step-<step>.ckpt`` whole or not at all; older ones go only afterwards.

        Raises:
            InputError: the folder cannot be written.
        """
        with self.train_lock:  # a render in another thread may have the teacher's values in the student's place
            state = {
                "step": step,
                "pipeline": self.pipeline.state_dict(),
                "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.optimizers.items()},
                "schedulers": {name: scheduler.state_dict() for name, scheduler in self.optimizers.schedulers.items()},
                "scalers": self.grad_scaler.state_dict(),
            }
        target: Path = self.checkpoint_dir / f"step-{step:09d}.ckpt"
        # not in the checkpoint folder: nerfstudio reads a step number from every name in it
        partial = self.base_dir / f".{target.name}.partial"
        try:
            self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
            torch.save(state, partial)
            os.replace(partial, target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"The checkpoint {target} cannot be written ({error.strerror}).") from error
        if self.config.save_only_latest_checkpoint:
            for file in self.checkpoint_dir.glob("*.ckpt"):
                if file != target:
                    file.unlink()
