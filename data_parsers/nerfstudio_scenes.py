"""Folders with a ``transforms.json``, as ``ns-process-data`` writes them: one scene, or many below one root.

Beside nerfstudio's own keys a frame may name a ``depth_file_path`` (16-bit PNG or ``.npy``) and an ``instance_path``
(one channel of integer ids). Poses are used as they stand: no centring, rotation or scaling.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Type

from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from data_parsers.multi_scene import (
    Frame,
    Scene,
    Split,
    natural_key,
    read_camera,
    read_json,
    read_pose,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError


@dataclass
class NerfstudioScenesConfig(DataParserConfig):
    """One nerfstudio scene (a folder with transforms.json), or a folder that holds many."""

    _target: Type = field(default_factory=lambda: NerfstudioScenes)
    """Target class to instantiate."""
    data: Path = Path()
    """A folder with transforms.json, or one whose sub-folders have it."""
    depth_unit_scale_factor: float = 1e-3
    """World units per unit of a depth file, where transforms.json does not say `depth_unit_scale_factor` itself."""


@dataclass
class NerfstudioScenes(DataParser):
    """Reads every scene of the chosen split."""

    config: NerfstudioScenesConfig

    def _generate_dataparser_outputs(self, split: Split = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of the split's scenes: the last scenes are held out, or the last frames of a single one.

        Raises:
            InputError: there is no transforms.json, or something in one is wrong.
        """
        root = self.config.data
        if (root / "transforms.json").is_file():
            files = [root / "transforms.json"]
        else:
            found = root.glob("*/transforms.json") if root.is_dir() else []
            files = sorted(found, key=lambda file: natural_key(file.parent.name))
        if not files:
            raise InputError(f"--data {root}: no transforms.json there nor in its sub-folders.")
        if len(files) == 1:
            return to_outputs(split_scenes([self._read_scene(files[0])], split))
        chosen = split_scenes([Scene(str(file), ()) for file in files], split)
        return to_outputs([self._read_scene(Path(scene.name)) for scene in chosen])

    def _read_scene(self, file: Path) -> Scene:
        content = read_json(file)
        described = content.get("frames") or []
        if not described:
            raise InputError(f"{file} has no frames.")
        if any("file_path" not in frame for frame in described):
            raise InputError(f"{file}: a frame has no `file_path`.")
        described = sorted(described, key=lambda frame: natural_key(frame["file_path"]))
        frames = [
            Frame(
                image=file.parent / frame["file_path"],
                order=order,
                pose=read_pose(frame.get("transform_matrix"), file, frame["file_path"]),
                camera=read_camera(content, frame, file),
                mask=file.parent / frame["instance_path"] if "instance_path" in frame else None,
                depth=file.parent / frame["depth_file_path"] if "depth_file_path" in frame else None,
            )
            for order, frame in enumerate(described)
        ]
        scale = float(content.get("depth_unit_scale_factor", self.config.depth_unit_scale_factor))
        return Scene(file.parent.resolve().name, frames, scale)


nerfstudio_scenes = DataParserSpecification(
    config=NerfstudioScenesConfig(), description="One nerfstudio scene (transforms.json), or a folder of many."
)
