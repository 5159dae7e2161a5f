"""A text file that names many datasets of mixed layouts, one a line: ``<layout> <path> [--option value ...]``.

::

    # my rooms
    nerfstudio-scenes captures
    scannet-scenes    /data/scannet --every-nth 10
    colmap            garden --colmap-path sparse/0

A layout is any dataparser that nerfstudio lists, with its options as on the command line; paths are relative to the
list's folder. Ours give all of their scenes, any other one gives a single scene. Quotes and ``#`` comments are as in
a shell.
"""

import copy
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, Type

import numpy as np
import torch
import tyro
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataParserConfig, DataparserOutputs
from nerfstudio.data.scene_box import SceneBox
from nerfstudio.plugins.registry_dataparser import DataParserSpecification

from data_parsers.any_layout import described, parse
from data_parsers.multi_scene import DISTORTION_KEYS, MultiSceneConfig, Split
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.file_list import FileList


@dataclass
class SceneListConfig(MultiSceneConfig):
    """A text file that names many datasets of mixed layouts, one a line: <layout> <path> [--option value ...]."""

    _target: Type = field(default_factory=lambda: SceneList)
    """Target class to instantiate."""
    data: Path = Path("scenes.txt")
    """The list; paths in it are relative to its folder."""


@dataclass(frozen=True)
class Entry:
    """One line of a list."""

    place: str
    """File and line, for messages."""
    config: DataParserConfig
    """Of the dataset, with its path."""


@dataclass
class SceneList(DataParser):
    """Reads every dataset of a list and joins them; each holds out what it would hold out alone."""

    config: SceneListConfig

    def _generate_dataparser_outputs(self, split: Split = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of one side of every dataset.

        Raises:
            InputError: a line is wrong, or the dataset that it names; the message begins with the line.
        """
        entries = read_list(self.config.data)
        side: Literal["train", "val", "all"] = "val" if split == "test" else split
        parsed = []
        for entry in entries:
            try:
                parsed.append(_with_all_metadata(parse(entry.config, side), entry.config))
            except InputError as error:
                raise InputError(f"{entry.place}: {error}") from error
        return join(parsed, [_folder_name(entry.config) for entry in entries])


def read_list(file: Path) -> list[Entry]:
    """The datasets that a list names.

    Raises:
        InputError: the file cannot be read or names none, or a line is wrong: an unknown layout, an option that its
            layout has not, a list in a list, or a dataset that was there before.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--data {file} cannot be read as a list of datasets ({error}): give a text file with a line `<layout> "
            "<path>` for each."
        ) from error
    entries: list[Entry] = []
    lines_of: dict[Path, int] = {}
    for number, line in enumerate(lines, 1):
        place = f"{file}, line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise InputError(f"{place}: {line.strip()} has an open quote; close it.") from error
        if not words:
            continue
        if len(words) < 2 or words[1].startswith("--"):
            raise InputError(f"{place}: `{line.strip()}` is not `<layout> <path> [--option value ...]`.")
        config = _config_of(words[0], words[2:], place)
        config.data = file.parent / Path(words[1]).expanduser()
        path = config.data.resolve()
        first = lines_of.setdefault(path, number)
        if first != number:
            raise InputError(
                f"{place}: {words[1]} was there in line {first} already; name it once, or frames that one line holds "
                "out may be trained on by the other."
            )
        around = [(other, entry) for other, entry in zip(lines_of, entries) if _one_in_the_other(other, path)]
        for other, entry in around:
            if type(entry.config) is type(config):
                raise InputError(
                    f"{place}: {words[1]} and line {lines_of[other]} lie one in the other; name one of them, or frames "
                    "that one line holds out may be trained on by the other."
                )
        entries.append(Entry(place, config))
    if not entries:
        raise InputError(f"--data {file} names no dataset: it needs a line `<layout> <path>` for each.")
    return entries


def _one_in_the_other(first: Path, second: Path) -> bool:
    return first in second.parents or second in first.parents


def _config_of(layout: str, options: Sequence[str], place: str) -> DataParserConfig:
    # what lists the layouts imports this module
    from nerfstudio.configs.dataparser_configs import all_dataparsers

    if layout not in all_dataparsers:
        known = ", ".join(sorted(all_dataparsers))
        raise InputError(f"{place}: there is no layout {layout}; there are {known}.")
    config = copy.deepcopy(all_dataparsers[layout])
    if isinstance(config, SceneListConfig):
        raise InputError(f"{place}: a list cannot hold another list; put its lines here.")
    if any(option.split("=")[0] == "--data" for option in options):
        raise InputError(f"{place}: the path stands behind the layout; leave --data out.")
    try:
        return tyro.cli(
            type(config), default=config, args=list(options), prog=place, config=(tyro.conf.FlagConversionOff,)
        )
    except SystemExit as error:
        raise InputError(
            f"{place}: {layout} does not take the options `{shlex.join(options)}`; what it takes stands above."
        ) from error


def _with_all_metadata(outputs: DataparserOutputs, config: DataParserConfig) -> DataparserOutputs:
    outputs.metadata = described(outputs)
    if not isinstance(config, MultiSceneConfig):  # its files say `images`, its folder which scene it is
        outputs.metadata["scene_names"] = [_folder_name(config)]
    return outputs


def _folder_name(config: DataParserConfig) -> str:
    path = config.data.resolve()
    return path.name if path.is_dir() else path.parent.name


def join(parts: Sequence[DataparserOutputs], folders: Sequence[str]) -> DataparserOutputs:
    """The frames of several datasets in one list.

    Args:
        parts: with the metadata of `any_layout.described`; at least one.
        folders: name of each dataset's folder, which goes before the names of scenes that are not the only ones of
            theirs.
    """
    counts = [len(part.image_filenames) for part in parts]
    scenes = np.cumsum([0, *(len(part.metadata["scene_names"]) for part in parts)])
    poses = torch.cat([part.cameras.camera_to_worlds for part in parts])
    centres = poses[:, :3, 3]

    def column(name: str) -> torch.Tensor:
        return torch.cat([getattr(part.cameras, name).reshape(-1, 1) for part in parts])

    def metadata(name: str) -> np.ndarray:
        return np.concatenate([np.asarray(part.metadata[name]) for part in parts])

    shifted = [np.asarray(part.metadata["scene_index"]) + first for part, first in zip(parts, scenes)]
    return DataparserOutputs(
        image_filenames=_files([part.image_filenames for part in parts], counts),  # type: ignore
        cameras=Cameras(
            camera_to_worlds=poses,
            fx=column("fx"),
            fy=column("fy"),
            cx=column("cx"),
            cy=column("cy"),
            width=column("width").long(),
            height=column("height").long(),
            distortion_params=torch.cat([_distortion(part.cameras) for part in parts]),
            camera_type=column("camera_type"),
        ),
        scene_box=SceneBox(aabb=torch.stack([centres.amin(0) - 1.0, centres.amax(0) + 1.0])),
        metadata={
            "scene_names": unique_names([part.metadata["scene_names"] for part in parts], folders),
            "scene_worlds": [world for part in parts for world in part.metadata["scene_worlds"]],
            "scene_index": np.concatenate(shifted),
            "frame_order": metadata("frame_order"),
            "depth_scale": metadata("depth_scale"),
            "instance_filenames": _files([part.metadata["instance_filenames"] for part in parts], counts),
            "depth_filenames": _files([part.metadata["depth_filenames"] for part in parts], counts),
        },
    )


def _distortion(cameras: Cameras) -> torch.Tensor:
    count = len(cameras.camera_to_worlds)
    if cameras.distortion_params is None:
        return torch.zeros(count, len(DISTORTION_KEYS))
    return cameras.distortion_params.reshape(count, len(DISTORTION_KEYS))


def _files(lists: Sequence[Optional[Sequence[Any]]], counts: Sequence[int]) -> Optional[FileList]:
    joined = FileList.joined([
        FileList.without_files(count) if files is None else _file_list(files)
        for files, count in zip(lists, counts, strict=True)
    ])  # fmt: skip
    return joined if joined.any_file else None


def _file_list(files: Sequence[Any]) -> FileList:
    return files if isinstance(files, FileList) else FileList.of(files)


def unique_names(names: Sequence[Sequence[str]], folders: Sequence[str]) -> list[str]:
    """Names of all scenes: those that occur twice with their dataset's folder before, and if need be its number.

    Args:
        names: of each dataset's scenes.
        folders: name of each dataset's folder.
    """
    numbered = [(dataset, name) for dataset, scenes in enumerate(names) for name in scenes]

    def told_apart(found: list[str], other: list[str]) -> list[str]:
        times = Counter(found)
        return [longer if times[name] > 1 else name for name, longer in zip(found, other, strict=True)]

    plain = [name for _, name in numbered]
    with_folder = told_apart(plain, [f"{folders[dataset]}_{name}" for dataset, name in numbered])
    return told_apart(with_folder, [f"{dataset + 1}_{folders[dataset]}_{name}" for dataset, name in numbered])


scene_list = DataParserSpecification(
    config=SceneListConfig(), description="A text file that names many datasets of mixed layouts, one a line."
)
