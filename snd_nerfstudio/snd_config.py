"""What ``ns-train`` lists: every method is the shared default with a few fields changed."""

from typing import Optional

import torch
from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.utils.writer import EventName

from snd_nerfstudio.backbones.lora import LoRASettings
from snd_nerfstudio.distillation.head import HeadSettings
from snd_nerfstudio.errors import show_input_errors_without_traceback
from snd_nerfstudio.exporting import ns_export
from snd_nerfstudio.exporting.cli import COMMANDS
from snd_nerfstudio.reconstruction.mvsplat.settings import NetworkSizes
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig
from snd_nerfstudio.snd_model import SnDModelConfig, SupervisionConfig
from snd_nerfstudio.snd_mvsplat_model import MVSplatModelConfig
from snd_nerfstudio.snd_mvsplat_pipeline import MVSplatDataManagerConfig, MVSplatPipelineConfig
from snd_nerfstudio.snd_pipeline import SnDPipelineConfig
from snd_nerfstudio.snd_trainer import LOCALHOST, FusedAdamConfig, SnDTrainerConfig, WarmupCosineConfig
from snd_nerfstudio.snd_triplet_pipeline import TripletPipelineConfig


def trainer(
    method_name: str,
    pipeline: TripletPipelineConfig,
    steps: int,
    learning_rates: dict[str, float],
    largest_gradient: Optional[float] = None,
) -> TrainerConfig:
    """What all methods share: Adam with 1 % warm-up and a cosine, evaluation, the viewer.

    Args:
        method_name: as in ``ns-train <method_name>``.
        pipeline: what is trained, on what.
        steps: length of the training.
        learning_rates: of each parameter group.
        largest_gradient: norm beyond which a group's gradient is scaled down.
    """
    return SnDTrainerConfig(
        method_name=method_name,
        steps_per_save=1000,
        steps_per_eval_batch=100,
        steps_per_eval_image=500,
        steps_per_eval_all_images=5000,
        max_num_iterations=steps,
        mixed_precision=False,  # nerfstudio's would be float16, in which the loss's signal is lost
        pipeline=pipeline,
        optimizers={
            group: {
                "optimizer": FusedAdamConfig(lr=rate, max_norm=largest_gradient),
                "scheduler": WarmupCosineConfig(),
            }
            for group, rate in learning_rates.items()
        },
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        viewer=ViewerConfig(websocket_host=LOCALHOST),
        vis="viewer+tensorboard",  # with the viewer alone nerfstudio never evaluates
        logging=LoggingConfig(
            local_writer=LocalWriterConfig(enable=True, stats_to_track=(EventName.ITER_TRAIN_TIME, EventName.ETA))
        ),
    )


PAPER_RATES = {"backbone": 2e-5, "head": 2e-5}
"""Learning rates of the paper's appendix A.3, and its 50,000 steps."""
PAPER_STEPS = 50_000


def _distillation(method_name: str, model: SnDModelConfig) -> TrainerConfig:
    return trainer(method_name, SnDPipelineConfig(model=model), PAPER_STEPS, PAPER_RATES)


def _tiny() -> TrainerConfig:
    config = trainer(
        "snd-tiny",
        SnDPipelineConfig(
            datamanager=SnDDataManagerConfig(image_size=(112, 168), reconstructor="depth"),
            model=SnDModelConfig(
                backbone="tiny",
                weights="random",
                lora=LoRASettings(alpha=32.0, dropout=0.0),
                # wider than a token, or directions that the bottleneck drops would drift freely
                head=HeadSettings(hidden=512, bottleneck=256, prototypes=4096),
                # in 300 steps the paper's 0.999 would leave the teacher where it started
                ema_momentum=0.9,
                student_temperature=0.1,
                teacher_temperature=0.1,
            ),
        ),
        steps=300,
        learning_rates={"backbone": 1e-3, "head": 2e-5},
    )
    return _often_evaluated(config, every=100)


def _often_evaluated(config: TrainerConfig, every: int) -> TrainerConfig:
    config.steps_per_save = every
    config.steps_per_eval_batch = every // 2
    config.steps_per_eval_image = every
    config.steps_per_eval_all_images = every
    return config


def _photometric() -> TrainerConfig:
    """MVSplat's own recipe: Adam at 2e-4, gradients of norm 0.5 at most; the paper tunes 40,000 steps on ScanNet++."""
    return trainer("mvsplat", MVSplatPipelineConfig(), 40_000, {"network": 2e-4}, largest_gradient=0.5)


def _photometric_tiny() -> TrainerConfig:
    config = trainer(
        "mvsplat-tiny",
        MVSplatPipelineConfig(
            datamanager=MVSplatDataManagerConfig(image_size=(64, 96)),
            model=MVSplatModelConfig(
                depth_range=(0.7, 8.0),
                sizes=NetworkSizes(
                    candidates=32,
                    stem_channels=32,
                    middle_channels=48,
                    feature_channels=64,
                    transformer_blocks=4,
                    cost_channels=64,
                    harmonics=1,
                ),
            ),
        ),
        steps=2000,
        learning_rates={"network": 5e-4},
        largest_gradient=0.5,
    )
    return _often_evaluated(config, every=250)


snd = MethodSpecification(
    config=_distillation("snd", SnDModelConfig()),
    description="Splat and Distill, DINOv2 ViT-S/14: make a 2D backbone 3D-aware on your own posed images.",
)
snd_base = MethodSpecification(
    config=_distillation("snd-base", SnDModelConfig(backbone="dinov2-base")),
    description="Splat and Distill, DINOv2 ViT-B/14.",
)
snd_correspondence = MethodSpecification(
    config=_distillation("snd-correspondence", SnDModelConfig(supervision=SupervisionConfig(blending=1.0))),
    description="Splat and Distill, ViT-S/14 without blending, as the paper uses for matching between views.",
)
snd_tiny = MethodSpecification(
    config=_tiny(),
    description="Splat and Distill, a small random ViT: for trying things out on a CPU, and for tests.",
)
mvsplat = MethodSpecification(
    config=_photometric(),
    description="MVSplat: train or fine-tune the reconstructor of Splat and Distill on your own posed images.",
)
mvsplat_tiny = MethodSpecification(
    config=_photometric_tiny(),
    description="A small MVSplat on small images: for trying things out on a CPU, and for tests.",
)

show_input_errors_without_traceback()
try:
    for name, command in COMMANDS.items():
        ns_export.install(command, name)
except Exception as error:  # an export subcommand is no reason to lose every ns-* command
    CONSOLE.print(f"[yellow]ns-export has no snd-* subcommands here ({error}); use snd-export instead.")
