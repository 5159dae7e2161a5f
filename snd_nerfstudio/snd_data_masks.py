"""``snd-data masks``: make the instance masks of a dataset ahead of training, in several processes."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Literal, Optional, Tuple

import torch
import tyro
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_parsers.any_layout import parse
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import PROFILES
from snd_nerfstudio.scenes.frames import Frames, load_views, mask_origin
from snd_nerfstudio.scenes.masks.maker import MaskMaker, build_mask_maker, mask_folder
from snd_nerfstudio.scenes.masks.sam import SamSettings
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSettings
from snd_nerfstudio.snd_frames import to_frames

NAMED = 10
"""Of the frames that were left out so many are named."""


@dataclass
class MasksConfig:
    """Make the instance masks of every frame, held out or not, where ns-train then finds them. Give the settings that
    ns-train will get; there they begin with --pipeline.datamanager. Run again, it goes on where it stopped."""

    data: Path
    """The dataset, as for ns-train."""
    masks: Literal["superpixel", "sam"] = "superpixel"
    """What makes the masks."""
    image_size: Tuple[int, int] = PROFILES["fixed"]["image_size"]
    """Height and width that frames are trained at; masks are made at this size."""
    mask_cache: Optional[Path] = None
    """Folder that keeps the masks. None: .snd_masks in the dataset's folder."""
    superpixels: SuperpixelSettings = SuperpixelSettings()
    """Of --masks superpixel."""
    sam: SamSettings = SamSettings()
    """Of --masks sam."""
    processes: Optional[int] = None
    """How many processes make masks. None: one per core for superpixels, one for SAM."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=ScanNetppScenesConfig)
    """Layout of the dataset on disk; the last word of the command, as for ns-train."""

    def maker(self) -> MaskMaker:
        """What makes the masks, and keeps them.

        Raises:
            InputError: a setting makes no sense, or the folder cannot be written to.
        """
        maker = build_mask_maker(
            self.masks, self.superpixels, self.sam, mask_folder(self.mask_cache, self.data), CONSOLE.log
        )
        assert maker is not None
        return maker


@dataclass
class MaskTally:
    """What became of the frames."""

    made: int = 0
    found: int = 0
    """Their masks were there, and whole."""
    skipped: List[str] = field(default_factory=list)
    """Why frames got no mask: a file of theirs cannot be read."""


def every_frame(config: MasksConfig) -> Frames:
    """All frames that training may read.

    Raises:
        InputError: there is no dataset, or not in this layout.
    """
    config.dataparser.data = config.data
    return to_frames(parse(config.dataparser, "all"))


def make_one(maker: MaskMaker, frames: Frames, index: int, size: Tuple[int, int]) -> str:
    """Make a frame's mask if it is not there.

    Returns:
        ``found``, ``made``, or why there is none.

    Raises:
        InputError: the mask cannot be kept, or the model cannot be loaded.
    """
    try:
        key = maker.key(mask_origin(frames, index, size, maker.uses_depth))
        if maker.cache.get(key) is not None:
            return "found"
    except InputError as error:
        return str(error)
    maker.segmenter.get_ready()
    try:
        load_views(frames, [index], size, with_masks=False, with_depth=False, mask_maker=maker)
    except InputError as error:
        return str(error)
    if not maker.cache.path(key).is_file():
        raise InputError(
            f"{maker.cache.folder} cannot be written to: make room, or give another folder with --mask-cache."
        )
    return "made"


_here: Any = None
"""What a process of its own works with: maker, frames and size."""


def _start(config: MasksConfig, frames: Frames, threads: int) -> None:
    global _here  # noqa: PLW0603
    torch.set_num_threads(threads)
    maker = config.maker()
    maker.ahead = True
    _here = (maker, frames, config.image_size)


def _make_here(index: int) -> str:
    maker, frames, size = _here
    return make_one(maker, frames, index, size)


def _outcomes(config: MasksConfig, frames: Frames, processes: int) -> Iterator[str]:
    if processes == 1:
        _start(config, frames, torch.get_num_threads())
        yield from map(_make_here, range(len(frames)))
        return
    threads = max((os.cpu_count() or 1) // processes, 1)
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(processes, context, _start, (config, frames, threads)) as pool:
        try:
            yield from pool.map(
                _make_here, range(len(frames)), chunksize=max(min(len(frames) // (4 * processes), 16), 1)
            )
        except InputError:
            pool.shutdown(cancel_futures=True)
            raise
        except BrokenProcessPool as error:
            raise InputError(
                "A process of snd-data masks ended, perhaps for want of memory: run the command again with fewer "
                f"--processes than {processes}; masks that are made are kept."
            ) from error


def make_masks(config: MasksConfig) -> MaskTally:
    """Make what is missing of a dataset's masks.

    Frames that cannot be read are left out, counted and named.

    Raises:
        InputError: there is no dataset, a setting makes no sense, the folder cannot be written to, or SAM is not to be
            had.
    """
    processes = config.processes
    if processes is None:
        processes = 1 if config.masks == "sam" else os.cpu_count() or 1
    if processes < 1:
        raise InputError(f"--processes {processes} must be at least 1.")
    if min(config.image_size) < 1:
        raise InputError(f"--image-size {config.image_size}: both sides must be at least 1.")
    frames = every_frame(config)
    folder = config.maker().cache.folder  # what is wrong with the settings is said here, and once
    tally = MaskTally()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("Instance masks", total=len(frames))
        for outcome in _outcomes(config, frames, min(processes, len(frames))):
            if outcome in ("made", "found"):
                setattr(tally, outcome, getattr(tally, outcome) + 1)
            else:
                tally.skipped.append(outcome)
            progress.advance(task)
    for reason in tally.skipped[:NAMED]:
        CONSOLE.log(f"[yellow]Left out: {reason}")
    if len(tally.skipped) > NAMED:
        CONSOLE.log(f"[yellow]... and {len(tally.skipped) - NAMED} more.")
    height, width = config.image_size
    CONSOLE.log(
        f"{tally.made} masks made, {tally.found} were there, {len(tally.skipped)} frames left out; {folder} holds them."
    )
    flags = {"masks": config.masks, "image-size": f"{height} {width}", "mask-cache": config.mask_cache}
    given = " ".join(f"--pipeline.datamanager.{name} {value}" for name, value in flags.items() if value is not None)
    CONSOLE.log(f"Train with {given} and the same settings.")
    return tally


def main(arguments: Sequence[str]) -> None:
    """``snd-data masks``."""
    flags = (tyro.conf.FlagConversionOff,)  # as in ns-train: --keep-bad-frames True
    make_masks(tyro.cli(MasksConfig, prog="snd-data masks", args=list(arguments), config=flags))
