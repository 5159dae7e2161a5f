"""The export commands, for ``ns-export`` and for ``snd-export``; nothing heavy is imported before one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import tyro


@dataclass
class ExportBackbone:
    """Write the distilled backbone, adapters merged, in the layout of one or all of these libraries, each in a folder
    of its own with a manifest and a model card; each is loaded again and compared."""

    load_config: Path
    """The run's config.yml."""
    output_dir: Path
    """Folder to write to; made if it is not there. An export of the same format in it is replaced."""
    which: Literal["teacher", "student"] = "teacher"
    """The averaged teacher, which the paper evaluates, or the student."""
    format: Literal["timm", "hub", "transformers", "onnx", "pt2", "all"] = "timm"
    """timm; torch.hub (plain PyTorch, DINOv2's keys); transformers; ONNX; torch.export; or all that fit."""
    push_to_hub: Optional[str] = None
    """Upload to this repository (user/name) of the Hugging Face hub afterwards; one format only."""
    visibility: Literal["private", "public"] = "private"
    """Of a repository that is made for that."""

    def main(self) -> None:
        """Export, check, and say where it is."""
        from snd_nerfstudio.errors import InputError
        from snd_nerfstudio.exporting.backbone import export_backbone, plain_values, push, refused
        from snd_nerfstudio.exporting.formats import FORMATS
        from snd_nerfstudio.snd_pipeline import load_trained_model

        if self.push_to_hub is not None and self.format == "all":
            raise InputError("--push-to-hub uploads one format, each to a repository of its own: choose a --format.")
        config, model, step = load_trained_model(self.load_config)
        backbone = model.merged_backbone(self.which)
        report = backbone.weight_report
        about = {
            "method": config.method_name,
            "profile": config.pipeline.profile,
            "seed": config.pipeline.seed,
            "backbone": config.pipeline.model.backbone,
            "base_weights": config.pipeline.model.weights,
            "base_weights_report": report.as_dict() if report is not None else None,
            "which": self.which,
            "step": step,
            "trains": config.pipeline.model.trains,
            "trained_layers": model.trained_layers,
            "data": self._data(),
            "training": plain_values(config),
        }
        formats: list[Any] = list(FORMATS) if self.format == "all" else [self.format]
        left_out = refused(backbone, formats) if self.format == "all" else {}
        for name in formats:
            if name in left_out:
                print(f"Left out {name}: {left_out[name]}.")
                continue
            manifest = export_backbone(backbone, name, self.output_dir, about)
            print(f"Wrote {manifest.parent} and checked it ({self.which}, step {step}).")
            if self.push_to_hub is not None:
                print(f"Uploaded to {push(manifest.parent, self.push_to_hub, self.visibility == 'private')}")

    def _data(self) -> Any:
        """What the run was trained on, as it wrote it down when it started."""
        import json

        from snd_nerfstudio.snd_trainer import DATA_SUMMARY

        file = self.load_config.parent / DATA_SUMMARY
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


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


@dataclass
class ExportGaussians:
    """Write a triplet's Gaussians as PLY files in the layout of 3D Gaussian splatting, in the colours of the images
    and of the features, and the features themselves beside them."""

    load_config: Path
    """The run's config.yml; its dataset is needed too."""
    output_dir: Path
    """Folder to write to; made if it is not there. Files of an earlier export are replaced."""
    scene: Optional[str] = None
    """One of the scenes in the viewer's menu. None: the one that the viewer shows first."""
    triplet: int = 1
    """Which of the scene's triplets, by its number in the viewer's menu."""
    features: Literal["teacher", "student", "original", "none"] = "teacher"
    """Whose tokens the Gaussians carry; original is the backbone before training."""
    min_opacity: float = 0.0
    """Leave out Gaussians that are not more opaque than this; those of opacity 0 are always left out."""

    def main(self) -> None:
        """Export, check, and say where it is."""
        import torch

        from snd_nerfstudio.errors import InputError
        from snd_nerfstudio.exporting.gaussians import Carried, export_gaussians

        if not 0 <= self.min_opacity < 1:
            raise InputError(f"--min-opacity {self.min_opacity:g} must be at least 0 and below 1.")
        method, pipeline, step = self._load()
        data, display = pipeline.datamanager, pipeline.model.display
        triplet = self._triplet(data)
        about = self._about(pipeline, method, step)
        with torch.no_grad():
            gaussians, carried = data.reconstruct(triplet.context), None
            if self.features != "none":
                # the viewer's colours, which it fits to the triplet that it shows first
                tokens, basis = display.tokens_of(self.features, triplet.context.images), display.basis()
                carried = Carried(tokens, display.settings, basis)
            file = export_gaussians(gaussians, triplet, carried, self.output_dir, about, self.min_opacity)
        self._say(file, triplet.describe(), step)

    def _load(self) -> tuple[str, Any, int]:
        """The run's method, its pipeline with the newest checkpoint, and the step."""
        import torch

        from snd_nerfstudio.snd_pipeline import SnDPipelineConfig
        from snd_nerfstudio.snd_triplet_pipeline import load_run

        config, state, _ = load_run(self.load_config, SnDPipelineConfig, "snd")
        if config.data:
            config.pipeline.datamanager.data = config.data
        step = int(state["step"])
        pipeline = config.pipeline.setup(device="cuda" if torch.cuda.is_available() else "cpu", test_mode="inference")
        pipeline.load_pipeline(state["pipeline"], step)
        return config.method_name, pipeline.eval(), step

    def _triplet(self, data: Any) -> Any:
        """The triplet that the flags name."""
        from snd_nerfstudio.errors import InputError

        scenes = data.shown_scenes
        scene = scenes[0] if self.scene is None else self.scene
        if scene not in scenes:
            more = f" and {len(scenes) - 20} more" if len(scenes) > 20 else ""
            raise InputError(f"--scene {scene}: the run has {', '.join(scenes[:20])}{more}; choose one of these.")
        indices = data.shown_indices(scene)
        if not 1 <= self.triplet <= len(indices):
            names = "".join(f"\n{number}: {data.shown_name(index)}" for number, index in enumerate(indices, start=1))
            raise InputError(f"--triplet {self.triplet}: give one of those of {scene}, by its number:{names}")
        return data.shown(indices[self.triplet - 1])

    def _about(self, pipeline: Any, method: str, step: int) -> dict[str, Any]:
        """What the description says about the run."""
        config, data = pipeline.config, pipeline.datamanager
        parsed = data.train_dataparser_outputs
        return {
            "method": method,
            "profile": config.profile,
            "seed": config.seed,
            "step": step,
            "backbone": config.model.backbone,
            "base_weights": config.model.weights,
            "features_of": self.features,
            "reconstructor": config.datamanager.reconstructor,
            "reconstructor_settings": data.reconstructor.description,
            "reconstructor_weights_sha256": bytes(data.reconstructor_fingerprint.tolist()).hex(),
            "triplet": self.triplet,
            "dataparser_transform": parsed.dataparser_transform.tolist(),
            "dataparser_scale": parsed.dataparser_scale,
        }

    def _say(self, file: Path, triplet: str, step: int) -> None:
        import json

        about = json.loads(file.read_text(encoding="utf-8"))
        left_out = f", {about['left_out']:,} left out" if about["left_out"] else ""
        print(
            f"Wrote {', '.join(about['files'])} and {file.name} to {file.parent}: {about['gaussians']:,} Gaussians "
            f"of {triplet}{left_out} (features: {self.features}, step {step})."
        )


COMMANDS: dict[str, type] = {
    "snd-backbone": ExportBackbone,
    "snd-gaussians": ExportGaussians,
    "snd-mvsplat": ExportMVSplat,
}


def main() -> None:
    """Entry point of ``snd-export``: the same subcommands as in ``ns-export``, without Open3D."""
    from snd_nerfstudio.errors import show_input_errors_without_traceback

    show_input_errors_without_traceback()
    tyro.extras.subcommand_cli_from_dict(COMMANDS, description="Take away what was trained.").main()


if __name__ == "__main__":
    main()
