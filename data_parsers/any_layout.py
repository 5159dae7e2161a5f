"""One side of a dataset of any layout: ours hold scenes out themselves, of a foreign one frames are cut here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from nerfstudio.data.dataparsers.base_dataparser import DataParserConfig, DataparserOutputs

from data_parsers.multi_scene import MultiSceneConfig, held_out_tail, natural_key
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.file_list import FileList


def parse(config: DataParserConfig, split: Literal["train", "val", "all"]) -> DataparserOutputs:
    """All frames of one side of a dataset.

    A foreign dataparser's own split takes every n-th frame for evaluation, and triplets need neighbours: the frames
    that it trains on are put in the order of their file names, and the last of them are held out.

    Args:
        config: of the layout, with ``data``.
        split: which side; ``all`` for both.

    Raises:
        InputError: there is no dataset, it is too small, or what its dataparser says is wrong with it.
    """
    if not config.data.exists():
        raise InputError(f"--data {config.data}: no such file or folder.")
    if isinstance(config, MultiSceneConfig):
        return config.setup().get_dataparser_outputs(split=split)
    return _cut(config, _foreign_outputs(config), split)


def parse_sides(config: DataParserConfig, all_scenes: bool) -> tuple[DataparserOutputs, DataparserOutputs]:
    """What is trained on, and what is held out; the dataset is opened once for both.

    Args:
        config: of the layout, with ``data``.
        all_scenes: train on what is held out too.

    Raises:
        InputError: see `parse`.
    """
    if not config.data.exists():
        raise InputError(f"--data {config.data}: no such file or folder.")
    if isinstance(config, MultiSceneConfig):
        parser = config.setup()
        train = parser.get_dataparser_outputs(split="all" if all_scenes else "train")
        return train, parser.get_dataparser_outputs(split="val")
    outputs = _foreign_outputs(config)
    return _cut(config, outputs, "all" if all_scenes else "train"), _cut(config, outputs, "val")


def _cut(
    config: DataParserConfig, outputs: DataparserOutputs, split: Literal["train", "val", "all"]
) -> DataparserOutputs:
    order = by_name(outputs)
    if len(order) < 3:
        raise InputError(f"--data {config.data}: {len(order)} training frames; a triplet needs at least three.")
    first = len(order) - held_out_tail(len(order))
    return subset(outputs, {"train": order[:first], "val": order[first:], "all": order}[split])


def _foreign_outputs(config: DataParserConfig) -> DataparserOutputs:
    """What another library's dataparser trains on; these end in any kind of error, or the process, if data are wrong.

    Raises:
        InputError: with the error's kind and text.
    """
    name = type(config).__name__.removesuffix("Config")
    try:
        return config.setup().get_dataparser_outputs(split="train")
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split()) or "no reason given"
        raise InputError(
            f"--data {config.data}: nerfstudio's {name} cannot read it ({type(error).__name__}: {said}). Mend the "
            "data, or end the command with the layout that they have."
        ) from error


def described(outputs: DataparserOutputs) -> dict[str, Any]:
    """The metadata of our own dataparsers (`multi_scene.to_outputs`), made up where another one gives none.

    Another one's frames are a single scene in the order of their file names; depth follows the scale of the poses.
    """
    count = len(outputs.image_filenames)
    unit = float(outputs.metadata.get("depth_unit_scale_factor", 1e-3)) * outputs.dataparser_scale
    made_up = {
        "scene_names": [outputs.image_filenames[0].parent.name],
        "scene_worlds": [_world(outputs)],
        "scene_index": np.zeros(count, dtype=np.int64),
        "depth_scale": np.full(count, unit, dtype=np.float64),
        "instance_filenames": None,
        "depth_filenames": None,
    }
    if "frame_order" not in outputs.metadata:
        made_up["frame_order"] = np.empty(count, dtype=np.int64)
        made_up["frame_order"][by_name(outputs)] = np.arange(count)
    return {**made_up, **outputs.metadata}


def _world(outputs: DataparserOutputs) -> tuple[Float[np.ndarray, "4 4"], float]:
    world = np.eye(4)
    world[:3] = outputs.dataparser_transform.double().numpy()[:3]
    return world, float(outputs.dataparser_scale)


def scene_worlds(outputs: DataparserOutputs) -> list[tuple[Float[np.ndarray, "4 4"], float]]:
    """What the dataparser did to the poses of each scene's files: a matrix from the left, then a scale."""
    return [(world, float(scale)) for world, scale in outputs.metadata.get("scene_worlds", [_world(outputs)])]


def by_name(outputs: DataparserOutputs) -> Int[np.ndarray, "frames"]:
    """Frame numbers in the natural order of their file names."""
    names = [str(file) for file in outputs.image_filenames]
    return np.array(sorted(range(len(names)), key=lambda frame: natural_key(names[frame])), dtype=np.int64)


def subset(outputs: DataparserOutputs, chosen: Int[np.ndarray, "n"]) -> DataparserOutputs:
    """Some frames of a foreign dataparser's single scene."""
    metadata: dict[str, Any] = dict(outputs.metadata)
    for name in ("depth_filenames", "instance_filenames"):
        if metadata.get(name) is not None:
            metadata[name] = _taken(metadata[name], chosen)
    return DataparserOutputs(
        image_filenames=_taken(outputs.image_filenames, chosen),  # type: ignore
        cameras=outputs.cameras[torch.from_numpy(chosen)],
        scene_box=outputs.scene_box,
        metadata=metadata,
        dataparser_transform=outputs.dataparser_transform,
        dataparser_scale=outputs.dataparser_scale,
    )


def _taken(files: Sequence[Path], chosen: Int[np.ndarray, "n"]) -> FileList:
    return FileList.of(files[int(index)] for index in chosen)
