"""What ``ns-train`` lists: every method is the shared default with a few fields changed."""

import torch
from nerfstudio.configs.base_config import LocalWriterConfig, LoggingConfig, MachineConfig, ViewerConfig
from nerfstudio.engine.optimizers import AdamOptimizerConfig
from nerfstudio.engine.trainer import TrainerConfig
from nerfstudio.plugins.types import MethodSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from nerfstudio.utils.writer import EventName

from snd_nerfstudio.backbones.lora import LoRASettings
from snd_nerfstudio.distillation.head import HeadSettings
from snd_nerfstudio.errors import show_input_errors_without_traceback
from snd_nerfstudio.exporting import ns_export
from snd_nerfstudio.exporting.cli import COMMANDS
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig
from snd_nerfstudio.snd_model import SnDModelConfig, SupervisionConfig
from snd_nerfstudio.snd_pipeline import SnDPipelineConfig
from snd_nerfstudio.snd_trainer import SnDTrainerConfig, WarmupCosineConfig


def trainer(method_name: str, pipeline: SnDPipelineConfig, adapters_learning_rate: float = 2e-5) -> TrainerConfig:
    """The shared default: 50,000 steps of Adam at 2e-5 with 1 % warm-up and a cosine (paper appendix A.3)."""
    return SnDTrainerConfig(
        method_name=method_name,
        steps_per_save=1000,
        steps_per_eval_batch=100,
        steps_per_eval_image=500,
        steps_per_eval_all_images=5000,
        max_num_iterations=50_000,
        mixed_precision=False,  # nerfstudio's would be float16, in which the loss's signal is lost
        pipeline=pipeline,
        optimizers={
            "adapters": {
                "optimizer": AdamOptimizerConfig(lr=adapters_learning_rate),
                "scheduler": WarmupCosineConfig(),
            },
            "head": {"optimizer": AdamOptimizerConfig(lr=2e-5), "scheduler": WarmupCosineConfig()},
        },
        machine=MachineConfig(device_type="cuda" if torch.cuda.is_available() else "cpu"),
        viewer=ViewerConfig(websocket_host="127.0.0.1"),
        vis="viewer+tensorboard",  # with the viewer alone nerfstudio never evaluates
        logging=LoggingConfig(
            local_writer=LocalWriterConfig(enable=True, stats_to_track=(EventName.ITER_TRAIN_TIME, EventName.ETA))
        ),
    )


def _tiny() -> TrainerConfig:
    config = trainer(
        "snd-tiny",
        SnDPipelineConfig(
            datamanager=SnDDataManagerConfig(image_size=(112, 168)),
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
        adapters_learning_rate=1e-3,
    )
    config.max_num_iterations = 300
    config.steps_per_save = 100
    config.steps_per_eval_batch = 50
    config.steps_per_eval_image = 100
    config.steps_per_eval_all_images = 100
    return config


snd = MethodSpecification(
    config=trainer("snd", SnDPipelineConfig()),
    description="Splat and Distill, DINOv2 ViT-S/14: make a 2D backbone 3D-aware on your own posed images.",
)
snd_base = MethodSpecification(
    config=trainer("snd-base", SnDPipelineConfig(model=SnDModelConfig(backbone="dinov2-base"))),
    description="Splat and Distill, DINOv2 ViT-B/14.",
)
snd_correspondence = MethodSpecification(
    config=trainer(
        "snd-correspondence", SnDPipelineConfig(model=SnDModelConfig(supervision=SupervisionConfig(blending=1.0)))
    ),
    description="Splat and Distill, ViT-S/14 without blending, as the paper uses for matching between views.",
)
snd_tiny = MethodSpecification(
    config=_tiny(),
    description="Splat and Distill, a small random ViT: for trying things out on a CPU, and for tests.",
)

show_input_errors_without_traceback()
try:
    for name, command in COMMANDS.items():
        ns_export.install(command, name)
except Exception as error:  # an export subcommand is no reason to lose every ns-* command
    CONSOLE.print(f"[yellow]ns-export has no snd-* subcommands here ({error}); use snd-export instead.")
