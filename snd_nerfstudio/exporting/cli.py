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


@dataclass
class ExportMVSplat:
    """Write the trained reconstructor in the released MVSplat's layout (a state dict with keys under `encoder.`)."""

    load_config: Path
    """The config.yml of a run of ns-train mvsplat."""
    output_dir: Path
    """Folder to write mvsplat.ckpt to; made if it is not there."""

    def main(self) -> None:
        """Export, read it back, compare, and say where it is."""
        import torch

        from snd_nerfstudio.reconstruction.mvsplat import MVSplat
        from snd_nerfstudio.reconstruction.mvsplat.checkpoints import write_official
        from snd_nerfstudio.snd_mvsplat_pipeline import load_trained_network

        _, model, step = load_trained_network(self.load_config)
        file = self.output_dir / "mvsplat.ckpt"
        write_official(model.network, model.network.settings, file, {"global_step": step, "epoch": 0})
        again = MVSplat.from_checkpoint(file)
        same = all(torch.equal(a, b) for a, b in zip(model.network.parameters(), again.parameters(), strict=True))
        if not same or again.settings != model.network.settings:
            raise RuntimeError(f"{file} does not give the same network when it is read again")
        print(f"Wrote {file} ({sum(p.numel() for p in again.parameters()):,} parameters, step {step}).")


COMMANDS: dict[str, type] = {"snd-backbone": ExportBackbone, "snd-mvsplat": ExportMVSplat}


def main() -> None:
    """Entry point of ``snd-export``: the same subcommands as in ``ns-export``, without Open3D."""
    from snd_nerfstudio.errors import show_input_errors_without_traceback

    show_input_errors_without_traceback()
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description="Take away what was trained.").main()


if __name__ == "__main__":
    main()
