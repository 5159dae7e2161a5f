"""Videos with poses: folders with one video and a ``transforms.json`` that names its frames by number.

::

    <root>/<scene>/transforms.json   as ns-process-data writes it, but each frame has `frame_index` for `file_path`
                  /walk.mp4          the only video there: .mp4, .mov, .mkv, .avi or .webm
                  /.snd_frames/      decoded frames, made when they are first needed

``<root>`` may be a scene itself. ``frame_index`` counts the frames that a decoder gives, from 0, whatever their time
stamps. A frame may name a ``depth_file_path`` and an ``instance_path`` as in ``nerfstudio-scenes``.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, Type

import numpy as np
from jaxtyping import UInt8
from nerfstudio.data.dataparsers.base_dataparser import DataParser, DataparserOutputs
from nerfstudio.plugins.registry_dataparser import DataParserSpecification
from nerfstudio.utils.rich_utils import CONSOLE
from PIL import Image
from rich.progress import track

from data_parsers.multi_scene import (
    CAMERA_KEYS,
    MultiSceneConfig,
    Scene,
    Split,
    find_transforms,
    places_in_capture,
    read_cameras,
    read_depth_unit,
    read_files,
    read_poses,
    split_scenes,
    to_outputs,
)
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.file_list import FileList

VIDEOS = (".mp4", ".mov", ".mkv", ".avi", ".webm")
FRAMES_FOLDER = ".snd_frames"
JPEG_QUALITY = 95


@dataclass
class VideoScenesConfig(MultiSceneConfig):
    """Posed videos: a video and a transforms.json whose frames have a `frame_index`; one such folder or many."""

    _target: Type = field(default_factory=lambda: VideoScenes)
    """Target class to instantiate."""
    data: Path = Path()
    """A folder with a video and transforms.json, or one whose sub-folders have them."""
    frames_folder: Optional[Path] = None
    """Where decoded frames are kept. None: .snd_frames in each scene's folder."""
    depth_unit_scale_factor: float = 1e-3
    """World units per unit of a depth file, where transforms.json does not say `depth_unit_scale_factor` itself."""


@dataclass
class VideoScenes(DataParser):
    """Reads every scene of the chosen split, and decodes those of its frames that were not before."""

    config: VideoScenesConfig

    def _generate_dataparser_outputs(self, split: Split = "train", **kwargs: Optional[dict]) -> DataparserOutputs:
        """All frames of the split's scenes: the last scenes are held out, or the last frames of a single one.

        Raises:
            InputError: there is no transforms.json or no video, something in them is wrong, or frames cannot be kept.
        """
        files = find_transforms(self.config.data)
        return to_outputs(split_scenes([str(file) for file in files], split, self._read_scene))

    def _read_scene(self, transforms: str) -> Scene:
        file = Path(transforms)
        content = read_object(file)
        described = sorted(_numbered(content, file), key=lambda frame: frame["frame_index"])
        numbers = [frame["frame_index"] for frame in described]
        if len(set(numbers)) < len(numbers):
            twice = next(number for number, after in zip(numbers, numbers[1:]) if number == after)
            raise InputError(f"{file}: video frame {twice} has two poses; keep one.")
        names = [f"frame {number}" for number in numbers]
        named = [{**frame, "file_path": name} for frame, name in zip(described, names, strict=True)]
        cameras = read_cameras(content, named, file)
        poses = read_poses([frame.get("transform_matrix") for frame in described], file, names)
        width, height = CAMERA_KEYS.index("w"), CAMERA_KEYS.index("h")
        sizes = {n: (round(camera[width]), round(camera[height])) for n, camera in zip(numbers, cameras, strict=True)}
        video = find_video(file.parent)
        images = extract(video, self._frames_of(file.parent), sizes)

        return Scene(
            name=file.parent.resolve().name,
            images=FileList.of(images),
            order=places_in_capture(np.array(numbers)),
            poses=poses,
            cameras=cameras,
            masks=read_files(described, "instance_path", file),
            depths=read_files(described, "depth_file_path", file),
            depth_scale=read_depth_unit(content, self.config.depth_unit_scale_factor, file),
        )

    def _frames_of(self, scene: Path) -> Path:
        if self.config.frames_folder is None:
            return scene / FRAMES_FOLDER
        place = scene.resolve()  # scenes of several datasets may have one name
        return self.config.frames_folder / f"{place.name}_{hashlib.sha256(os.fsencode(place)).hexdigest()[:8]}"


def _numbered(content: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    described = content.get("frames") or []
    if not described:
        raise InputError(f"{file} has no frames.")
    for frame in described:
        if "frame_index" not in frame:
            raise InputError(
                f"{file}: a frame has no `frame_index`, its number in the video from 0. Frames with a `file_path` "
                "are images: end the command with `nerfstudio-scenes`."
            )
        number = frame["frame_index"]
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise InputError(f"{file}: `frame_index` {number!r} is no number of a video frame (0, 1, ...).")
    return described


def find_video(folder: Path) -> Path:
    """The only video in a folder.

    Raises:
        InputError: there is none, or several.
    """
    videos = sorted(file for file in folder.iterdir() if file.suffix.lower() in VIDEOS and file.is_file())
    if len(videos) != 1:
        found = f"{len(videos)} videos ({', '.join(video.name for video in videos)})" if videos else "no video"
        raise InputError(f"{folder} holds {found}; one is needed beside transforms.json ({', '.join(VIDEOS)}).")
    return videos[0]


def extract(video: Path, folder: Path, sizes: Mapping[int, tuple[int, int]]) -> list[Path]:
    """Decode some frames of a video into JPEG files, those that are not there yet.

    A video is decoded from its beginning: seeking is inexact in most formats. Its frames lie in a folder named after
    its name, size and time of change, so a changed video is decoded anew; what was made of it before is deleted.

    Args:
        video: of any codec that OpenCV reads.
        folder: where a folder of frames is made.
        sizes: width and height of each wanted frame, by its number from 0.

    Returns:
        A file per wanted frame, in their order.

    Raises:
        InputError: the video cannot be read or has too few frames or frames of another size, or there is no place.
    """
    state = video.stat()
    stamp = hashlib.sha256(f"{video.name}/{state.st_size}/{state.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = folder / stamp
    files = {number: kept / f"{number:06d}.jpg" for number in sizes}
    try:
        kept.mkdir(parents=True, exist_ok=True)
        present = set(os.listdir(kept))
        missing = sorted(number for number, file in files.items() if file.name not in present)
        if missing:
            with_progress = track(
                _decoded(video, missing), f"Frames of {video.name}", len(missing), console=CONSOLE, transient=True
            )
            with closing(with_progress):  # type: ignore  # its thread would outlive an error
                for number, image in with_progress:
                    _check_size(video, number, (image.shape[1], image.shape[0]), sizes[number])
                    _write(files[number], image)
    except OSError as error:
        raise InputError(
            f"{kept} cannot be written to ({error.strerror}): make room, or give another folder with video-scenes "
            "--frames-folder."
        ) from error
    for other in folder.iterdir():  # of former states of the video; another process may be doing the same
        if other != kept and other.is_dir() and re.fullmatch("[0-9a-f]{16}", other.name):
            shutil.rmtree(other, ignore_errors=True)
    return list(files.values())


def _decoded(video: Path, wanted: Sequence[int]) -> Iterator[tuple[int, UInt8[np.ndarray, "h w 3"]]]:
    """Some frames of a video in RGB, as they are shown: turned if its meta data say so."""
    import cv2

    capture = cv2.VideoCapture(str(video))
    try:
        if not capture.isOpened():
            raise InputError(f"{video} cannot be opened: it is no video, or of a codec that OpenCV does not read.")
        position = 0
        for number in wanted:
            while position <= number:
                if not capture.grab():
                    raise InputError(
                        f"{video} has no frame {number}: it ends, or is damaged, after {position} frames. "
                        "`frame_index` in transforms.json counts from 0."
                    )
                position += 1
            readable, image = capture.retrieve()
            if not readable:
                raise InputError(f"{video}: frame {number} cannot be decoded; remove it from transforms.json.")
            yield number, np.ascontiguousarray(image[..., ::-1])
    finally:
        capture.release()


def _check_size(video: Path, number: int, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    if size != wanted:
        turned = " It is shown turned by its meta data: give the camera of that." if size == wanted[::-1] else ""
        raise InputError(
            f"{video}: frame {number} has {size[0]}x{size[1]} pixels, but `w` and `h` in transforms.json say "
            f"{wanted[0]}x{wanted[1]}.{turned}"
        )


def _write(file: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write a JPEG in one step, so that an interruption leaves no half of it."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    Image.fromarray(image).save(partial, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    os.replace(partial, file)


video_scenes = DataParserSpecification(
    config=VideoScenesConfig(), description="Posed videos: a video and a transforms.json of its frames."
)
