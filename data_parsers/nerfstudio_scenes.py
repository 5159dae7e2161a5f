"""Folders with a ``transforms.json``, as ``ns-process-data`` writes them: one scene, or many below one root.

Beside nerfstudio's own keys a frame may name a ``depth_file_path`` (16-bit PNG or ``.npy``) and an ``instance_path``
(one channel of integer ids). Poses are used as they stand: no centring, rotation or scaling.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Type

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
    read_poses,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.file_list import FileList


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
        if any("file_path" not in frame for frame in described):
            raise InputError(f"{file}: a frame has no `file_path`.")
        described = sorted(described, key=lambda frame: natural_key(frame["file_path"]))
        images = [frame["file_path"] for frame in described]

        def files(key: str) -> FileList:
            folder = str(file.parent)
            return FileList.of(os.path.join(folder, frame[key]) if key in frame else None for frame in described)

        return Scene(
            name=file.parent.resolve().name,
            images=files("file_path"),
            order=np.arange(len(described)),
            poses=read_poses([frame.get("transform_matrix") for frame in described], file, images),
            cameras=read_cameras(content, described, file),
            masks=files("instance_path"),
            depths=files("depth_file_path"),
            depth_scale=float(content.get("depth_unit_scale_factor", self.config.depth_unit_scale_factor)),
        )


nerfstudio_scenes = DataParserSpecification(
    config=NerfstudioScenesConfig(), description="One nerfstudio scene (transforms.json), or a folder of many."
)
