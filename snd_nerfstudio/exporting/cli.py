"""The export commands, for ``ns-export`` and for ``snd-export``; nothing heavy is imported before one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class ExportBackbone:
    """Write the distilled backbone: safetensors in timm's layout, adapters merged, with a manifest."""

    load_config: Path
    """The run's config.yml."""
    output_dir: Path
    """Folder to write to; made if it is not there."""
    which: Literal["teacher", "student"] = "teacher"
    """The averaged teacher, which the paper evaluates, or the student."""

    def main(self) -> None:
        """Export, check, and say where it is."""
        from snd_nerfstudio.exporting.backbone import export_backbone
        from snd_nerfstudio.snd_pipeline import load_trained_model

        config, model, step = load_trained_model(self.load_config)
        manifest = export_backbone(
            model.merged_vit(self.which),
            model.student.backbone.spec,
            self.output_dir,
            {
                "method": config.method_name,
                "profile": config.pipeline.profile,
                "seed": config.pipeline.seed,
                "backbone": config.pipeline.model.backbone,
                "base_weights": config.pipeline.model.weights,
                "which": self.which,
                "step": step,
                "adapted_layers": model.adapted_layers,
            },
        )
        print(f"Wrote {manifest.parent / 'snd_backbone.safetensors'} and {manifest.name} ({self.which}, step {step}).")


COMMANDS: dict[str, type] = {"snd-backbone": ExportBackbone}


def main() -> None:
    """Entry point of ``snd-export``: the same subcommands as in ``ns-export``, without Open3D."""
    from snd_nerfstudio.errors import show_input_errors_without_traceback

    show_input_errors_without_traceback()
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description="Take a distilled backbone away.").main()


if __name__ == "__main__":
    main()
