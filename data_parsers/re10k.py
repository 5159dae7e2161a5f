"""RealEstate10K and ACID as pixelSplat and MVSplat lay them out: chunks of many scenes, images and cameras alone.

::

    <root>/train/000000.torch, 000001.torch, ..., index.json
          /test/000000.torch, ..., index.json                   (optional)

What a chunk holds is described in `snd_nerfstudio.scenes.chunks`. An image's path leads through its chunk, and images
stay where they are until they are trained on.
"""

import io
import os
from collections.abc import Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional, Type

import numpy as np
from jaxtyping import Float
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from data_parsers.multi_scene import (
    CAMERA_KEYS,
    MultiSceneConfig,
    Scene,
    Split,
    natural_key,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.chunks import SUFFIX, Chunk, frame_name, read_chunk
from snd_nerfstudio.scenes.file_list import FileList

OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
CHUNKS_WITHOUT_BAR = 4
"""So few are read without a progress bar."""


@dataclass
class Re10kScenesConfig(MultiSceneConfig):
    """RealEstate10K or ACID in pixelSplat's chunks: many scenes without masks and depth."""

    _target: Type = field(default_factory=lambda: Re10kScenes)
    """Target class to instantiate."""
    data: Path = Path("re10k")
    """Folder with train/ and test/, or a folder of chunks (000000.torch, ...)."""
    max_scenes: Optional[int] = None
    """Read only so many scenes, the first ones in the order of the chunks; of train/ and of test/ each. None: all."""
    min_frames: int = 3
    """Leave out scenes with fewer frames."""


@dataclass
class Re10kScenes(DataParser):
    """Reads every scene of the chosen split."""

    config: Re10kScenesConfig

    def _generate_dataparser_outputs(self, split: Split = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of the split's scenes: held out are those of test/, or without it the last scenes.

        Raises:
            InputError: there are no chunks, one is damaged, or something in one is wrong.
        """
        if self.config.min_frames < 1 or (self.config.max_scenes is not None and self.config.max_scenes < 1):
            raise InputError("re10k-scenes: --max-scenes and --min-frames must be at least 1.")
        sides = self._sides()
        if len(sides) == 1:
            if self._undivided is None:  # both sides are asked for, one after the other
                self._undivided = {scene.name: scene for scene in self._scenes(sides[:1])}
            scenes = self._undivided
            return to_outputs(split_scenes(list(scenes), split, scenes.__getitem__))
        _check_disjoint(*sides)
        scenes = self._scenes({"train": sides[:1], "all": sides}.get(split, sides[1:]))
        if split != "all":
            self._read[split] = {scene.name for scene in scenes}
            both = set.intersection(*self._read.values()) if len(self._read) > 1 else set()
            if both:
                raise _in_both(min(both), sides[0], sides[1], len(both))
        return to_outputs(scenes)

    def __post_init__(self) -> None:
        self._undivided: Optional[dict[str, Scene]] = None
        self._read: dict[str, set[str]] = {}

    def _sides(self) -> list[Path]:
        """Folders of chunks: of training and of test scenes, or of scenes that are not divided yet.

        Raises:
            InputError: there are none.
        """
        root = self.config.data
        sides = [folder for folder in (root / "train", root / "test") if _chunks(folder)] or [root]
        if not _chunks(sides[0]):
            raise InputError(
                f"--data {root}: no chunks (000000{SUFFIX}, ...) there nor in `train` and `test` below it. For "
                "folders with a transforms.json end the command with `nerfstudio-scenes`, for other "
                "layouts with theirs."
            )
        return sides

    def _scenes(self, sides: Sequence[Path]) -> list[Scene]:
        """The scenes of some folders, in the order of their chunks."""
        read: dict[str, Scene] = {}
        for side in sides:
            before, short = len(read), 0
            with closing(self._scenes_of(side)) as found:
                for scene in found:
                    if len(scene) < self.config.min_frames:
                        short += 1
                        continue
                    if scene.name in read:
                        raise InputError(
                            f"{_chunk_of(scene)} holds scene {scene.name}, which {_chunk_of(read[scene.name])} holds "
                            "too: remove one of the chunks, or write one again without the scene."
                        )
                    read[scene.name] = scene
                    if len(read) - before == self.config.max_scenes:
                        break
            if short:
                CONSOLE.log(f"{side}: {short} scenes with fewer than {self.config.min_frames} frames are left out.")
            if len(read) == before:
                raise InputError(f"{side}: no scene has {self.config.min_frames} frames: lower --min-frames.")
        return list(read.values())

    def _scenes_of(self, side: Path) -> Generator[Scene, None, None]:
        """The scenes of one folder, one chunk after the other."""
        files = _chunks(side)
        listed: dict[str, list[str]] = {}
        for key, name in _listed(side, files).items():
            listed.setdefault(name, []).append(key)
        quiet = len(files) <= CHUNKS_WITHOUT_BAR
        for file in track(files, f"Reading {side}", console=CONSOLE, transient=True, disable=quiet):
            chunk = read_chunk(file)
            lost = [key for key in listed.get(file.name, ()) if key not in chunk.index.places]
            if lost:
                raise InputError(
                    f"{side / 'index.json'}: scene {lost[0]} should be in {file.name}, and is not: restore the "
                    "chunk, or delete index.json, which can be done without."
                )
            for key in chunk.index.keys:
                if len(chunk.index.frames(key)):
                    yield _scene(chunk, key)


def _chunks(folder: Path) -> list[Path]:
    """Chunks in the order of their numbers."""
    return sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: natural_key(file.name))


def _listed(side: Path, files: Sequence[Path]) -> dict[str, str]:
    """The chunk of each scene as ``index.json`` has it; empty without one.

    Raises:
        InputError: it cannot be read, or names a chunk that is not there.
    """
    index = side / "index.json"
    if not index.is_file():
        return {}
    listed = {key: str(name) for key, name in read_object(index).items()}
    present = {file.name for file in files}
    missing = sorted({name for name in listed.values() if name not in present})
    if missing:
        raise InputError(
            f"{index} names {missing[0]}, which is not there ({len(missing)} of {len({*listed.values()})} chunks are "
            "missing): restore them, or delete index.json to read those that are there."
        )
    return listed


def _check_disjoint(train: Path, test: Path) -> None:
    """Refuses scenes for training that are held out, as far as ``index.json`` tells without reading the chunks."""
    both = _listed(train, _chunks(train)).keys() & _listed(test, _chunks(test)).keys()
    if both:
        raise _in_both(min(both), train, test, len(both))


def _in_both(scene: str, train: Path, test: Path, count: int) -> InputError:
    return InputError(
        f"Scene {scene} is in {train} and in {test} ({count} scenes are): held-out scenes must not be trained on; "
        "remove them from one of the two."
    )


def _chunk_of(scene: Scene) -> Path:
    image = scene.images[0]
    assert image is not None
    return image.parent.parent


def _scene(chunk: Chunk, key: str) -> Scene:
    """One scene in the order in which its frames were taken.

    Raises:
        InputError: a camera is not finite or not invertible, or the first image cannot be decoded.
    """
    index, frames = chunk.index, chunk.index.frames(key)
    by_time = np.argsort(chunk.timestamps[frames.start : frames.stop], kind="stable")
    packed = chunk.cameras[frames.start : frames.stop].astype(np.float64)[by_time]
    numbers = packed[:, [0, 1, 2, 3, *range(6, 18)]]  # 4 and 5 are of no use
    finite = np.isfinite(numbers).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{index.file}: the camera of frame {int(by_time[np.argmin(finite)])} of scene {key} holds NaN or "
            "infinity; write the chunk again without the frame."
        )
    invertible = np.abs(np.linalg.det(packed[:, 6:].reshape(-1, 3, 4)[:, :, :3])) >= 1e-6
    if not invertible.all():
        raise InputError(
            f"{index.file}: the camera of frame {int(by_time[np.argmin(invertible)])} of scene {key} is not "
            "invertible; write the chunk again without the frame."
        )
    width, height = _size(chunk, key)
    cameras = np.zeros((len(packed), len(CAMERA_KEYS)))
    cameras[:, :4] = packed[:, :4] * [width, height, width, height]
    cameras[:, 4:6] = width, height
    folder = os.path.join(index.file, key)
    return Scene(
        name=key,
        images=FileList.of(os.path.join(folder, frame_name(int(place))) for place in by_time),
        order=np.arange(len(packed)),
        poses=_poses(packed[:, 6:]),
        cameras=cameras,
    )


def _poses(rows: Float[np.ndarray, "n 12"]) -> Float[np.ndarray, "n 4 4"]:
    """Camera-to-world in OpenGL's axes of the first three rows of world-to-camera in OpenCV's."""
    world_to_camera = np.tile(np.eye(4), (len(rows), 1, 1))
    world_to_camera[:, :3] = rows.reshape(-1, 3, 4)
    return np.linalg.inv(world_to_camera) @ OPENCV_TO_OPENGL


def _size(chunk: Chunk, key: str) -> tuple[int, int]:
    """Width and height that the header of a scene's first readable image states; the others have the same."""
    from PIL import Image

    for place in chunk.index.frames(key):
        with suppress(OSError, EOFError, SyntaxError):
            with Image.open(io.BytesIO(chunk.index.read(place))) as image:
                return image.size
    raise InputError(
        f"{chunk.index.file}: no image of scene {key} can be decoded: restore the chunk or write it again without the "
        "scene."
    )


re10k_scenes = DataParserSpecification(
    config=Re10kScenesConfig(), description="RealEstate10K or ACID in pixelSplat's chunks; many scenes."
)
