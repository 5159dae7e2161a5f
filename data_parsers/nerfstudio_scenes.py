"""Folders with a ``transforms.json``, as ``ns-process-data`` writes them: one scene, or many below one root.

Beside nerfstudio's own keys a frame may name a ``depth_file_path`` (16-bit PNG or ``.npy``) and an ``instance_path``
(one channel of integer ids). Poses are used as they stand: no centring, rotation or scaling.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Type

import numpy as np
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from data_parsers.multi_scene import (
    MultiSceneConfig,
    Scene,
    Split,
    find_transforms,
    natural_key,
    read_cameras,
    read_depth_unit,
    read_files,
    read_poses,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object


@dataclass
class NerfstudioScenesConfig(MultiSceneConfig):
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
        files = find_transforms(self.config.data)
        return to_outputs(split_scenes([str(file) for file in files], split, self._read_scene))

    def _read_scene(self, transforms: str) -> Scene:
        file = Path(transforms)
        content = read_object(file)
        described = content.get("frames") or []
        if not described:
            raise InputError(f"{file} has no frames.")
        if any(not isinstance(frame.get("file_path"), str) for frame in described):
            raise InputError(f"{file}: a frame has no `file_path`.")
        described = _each_once(sorted(described, key=lambda frame: natural_key(frame["file_path"])), file)
        images = [frame["file_path"] for frame in described]
        return Scene(
            name=file.parent.resolve().name,
            images=read_files(described, "file_path", file),
            order=np.arange(len(described)),
            poses=read_poses([frame.get("transform_matrix") for frame in described], file, images),
            cameras=read_cameras(content, described, file),
            masks=read_files(described, "instance_path", file),
            depths=read_files(described, "depth_file_path", file),
            depth_scale=read_depth_unit(content, self.config.depth_unit_scale_factor, file),
        )


def _each_once(described: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Frames without those that stand there twice in the same words; some exports hold their test frames twice.

    Raises:
        InputError: one image has two poses.
    """
    known: dict[str, dict[str, Any]] = {}
    for frame in described:
        first = known.setdefault(os.path.normpath(frame["file_path"]), frame)
        if first.get("transform_matrix") != frame.get("transform_matrix"):
            raise InputError(f"{file}: {frame['file_path']} has two poses; keep one.")
    return list(known.values())


nerfstudio_scenes = DataParserSpecification(
    config=NerfstudioScenesConfig(), description="One nerfstudio scene (transforms.json), or a folder of many."
)
