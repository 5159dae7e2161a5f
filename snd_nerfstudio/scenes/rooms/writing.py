"""Writes rooms to disk in the tree that the preprocessed ScanNet++ has.

    metadata/nvs_sem_train.txt, nvs_sem_val.txt             scene names, one per line
    metadata/semantic_classes.txt                           class names; the line number from 0 is the class index
    metadata/rooms.json                                     generator version and arguments
    scenes/<scene>/images/DSC00001.JPG                      RGB, JPEG quality 95, full-resolution colour
    scenes/<scene>/masks/DSC00001.png                       8 bit, 255 everywhere: nothing is anonymised
    scenes/<scene>/instance_segmentation/DSC00001.JPG.png   16 bit, instance ids, the same in all views; 0 = unlabelled
    scenes/<scene>/depth/DSC00001.png                       16 bit, millimetres along the optical axis; 0 = none
    scenes/<scene>/normals/DSC00001.png                     8 bit RGB, round(255 (n/2 + 1/2)), n in OpenCV camera axes
                                                            (x right, y down, z forward) facing the camera; 0 = none
    scenes/<scene>/semantics/DSC00001.png                   8 bit, class index; 255 = ignore
    scenes/<scene>/transforms_train.json                    intrinsics and poses, see `stored_from_opencv`
    scenes/<scene>/mesh.ply                                 the mesh, metres, z up

The same arguments give the same bytes. With layout `toolkit` the same rooms and poses are written as the ScanNet++
toolkit has them: data/<scene>/ as in `toolkit_layout`, splits/nvs_sem_train.txt, nvs_sem_val.txt, and metadata/. With
layout `re10k` the same images and cameras are written as chunks: train/ and test/ as in `re10k_layout`, and metadata/.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
from jaxtyping import Float
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from snd_nerfstudio.scenes.rooms import re10k_layout, toolkit_layout
from snd_nerfstudio.scenes.rooms.cameras import pinhole, stored_from_opencv
from snd_nerfstudio.scenes.rooms.furniture import CLASSES
from snd_nerfstudio.scenes.rooms.layout import Room, RoomsError, build_room
from snd_nerfstudio.scenes.rooms.rendering import RenderedView, render_view

VERSION = 1
"""Raised whenever the same arguments would give other rooms than before."""


@dataclass
class RoomsConfig:
    """Procedural furnished rooms in the tree of the preprocessed ScanNet++."""

    out: Path
    """Folder to write; new, empty, or holding rooms of the same arguments, which are then completed."""
    scenes: int = 5
    """Number of rooms."""
    seed: int = 0
    """Seed of everything random; the same seed gives the same bytes."""
    frames: int = 64
    """Views per room along one smooth camera path."""
    height: int = 224
    """Image height in pixels."""
    width: int = 336
    """Image width in pixels."""
    val_scenes: Optional[int] = None
    """How many of the last rooms are for validation; by default a fifth, at least one if there are two rooms."""

    layout: Literal["snd", "toolkit", "re10k"] = "snd"
    """`snd`: what training reads. `toolkit`: ScanNet++ as downloaded, with fisheye images of the same rooms. `re10k`:
    chunks as of RealEstate10K, with images and cameras alone."""

    def resolved_val_scenes(self) -> int:
        """The number of validation scenes, with the default filled in."""
        if self.val_scenes is not None:
            return self.val_scenes
        return min(max(1, self.scenes // 5), self.scenes - 1)

    def arguments(self) -> dict[str, Any]:
        """What determines the bytes that are written: every field but the folder."""
        return {
            "scenes": self.scenes,
            "seed": self.seed,
            "frames": self.frames,
            "height": self.height,
            "width": self.width,
            "val_scenes": self.resolved_val_scenes(),
            **({} if self.layout == "snd" else {"layout": self.layout}),
        }

    def scenes_folder(self) -> Path:
        """Where the scenes' folders are."""
        return Path(self.out) / ("scenes" if self.layout == "snd" else "data")

    def lists_folder(self) -> Path:
        """Where the names of the scenes for training and validation are."""
        return Path(self.out) / ("metadata" if self.layout == "snd" else "splits")


def _check_arguments(config: RoomsConfig) -> None:
    for name, least in (("scenes", 1), ("seed", 0), ("frames", 1), ("height", 8), ("width", 8)):
        if getattr(config, name) < least:
            raise RoomsError(f"--{name} is {getattr(config, name)}, but must be at least {least}.")
    if not 0 <= config.resolved_val_scenes() <= config.scenes:
        raise RoomsError(f"--val-scenes is {config.val_scenes}, but must be between 0 and --scenes {config.scenes}.")


def _claim(out: Path, config: RoomsConfig) -> None:
    """Writes `metadata/rooms.json`, or checks that the one there is of the same arguments.

    Raises:
        RoomsError: `out` holds something else; nothing has been changed.
    """
    record = out / "metadata" / "rooms.json"
    wanted = {"generator": "snd_nerfstudio.scenes.rooms", "version": VERSION, "arguments": config.arguments()}
    remedy = "Choose another --out, or delete that folder first."
    if record.exists():
        try:
            found = json.loads(record.read_text())
        except ValueError:
            found = None
        if found != wanted:
            was = found.get("arguments") if isinstance(found, dict) else "unreadable"
            raise RoomsError(
                f"{out} holds rooms made with other arguments ({was}, asked for now: {wanted['arguments']}, generator "
                f"version {VERSION}). Nothing was changed. {remedy}"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise RoomsError(f"{out} is not empty and has no metadata/rooms.json. Nothing was changed. {remedy}")
    record.parent.mkdir(parents=True, exist_ok=True)
    _write_text(record, json.dumps(wanted, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Writes a file in one step, so that a reader or an interruption never meets half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _write_mesh(path: Path, room: Room) -> None:
    """Binary PLY with positions, the mean colour of each vertex' surface, and triangles."""
    colours = np.zeros((len(room.vertices), 3), np.uint8)
    means = np.array([texture.colours.mean(0) for texture in room.textures])
    colours[room.faces] = np.round(255.0 * means[room.face_texture]).astype(np.uint8)[:, None]
    vertices = np.empty(len(room.vertices), dtype=[("position", "<f4", 3), ("colour", "u1", 3)])
    vertices["position"], vertices["colour"] = room.vertices, colours
    faces = np.empty(len(room.faces), dtype=[("count", "u1"), ("corners", "<i4", 3)])
    faces["count"], faces["corners"] = 3, room.faces
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {len(vertices)}"]
    header += [f"property float {axis}" for axis in "xyz"]
    header += [f"property uchar {channel}" for channel in ("red", "green", "blue")]
    header += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    path.write_bytes(("\n".join(header) + "\n").encode() + vertices.tobytes() + faces.tobytes())


def _write_view(folder: Path, name: str, view: RenderedView, camera_to_world: Float[np.ndarray, "4 4"]) -> None:
    """Writes the six images of one view; `name` is "DSC00001"."""
    height, width = view.depth.shape
    hit = view.depth > 0
    local = view.normals @ camera_to_world[:3, :3]
    normals = np.where(hit[..., None], np.round(255.0 * (0.5 * local + 0.5)), 0).astype(np.uint8)
    millimetres = np.round(1000.0 * view.depth).astype(np.uint16)
    Image.fromarray(view.image).save(folder / "images" / f"{name}.JPG", quality=95, subsampling=0)
    pngs = {
        f"masks/{name}.png": np.full((height, width), 255, np.uint8),
        f"instance_segmentation/{name}.JPG.png": view.instances,
        f"depth/{name}.png": millimetres,
        f"normals/{name}.png": normals,
        f"semantics/{name}.png": view.semantics,
    }
    for file, array in pngs.items():
        Image.fromarray(array).save(folder / file, compress_level=4)


def _transforms(room: Room, height: int, width: int) -> dict[str, Any]:
    """Contents of `transforms_train.json`."""
    intrinsics = pinhole(height, width)
    frames = [
        {
            "file_path": f"{_view_name(index)}.JPG",
            "mask_path": f"{_view_name(index)}.png",
            "transform_matrix": stored_from_opencv(pose).tolist(),
            "is_bad": False,
        }
        for index, pose in enumerate(room.camera_to_worlds)
    ]
    return {
        "fl_x": float(intrinsics[0, 0]),
        "fl_y": float(intrinsics[1, 1]),
        "cx": float(intrinsics[0, 2]),
        "cy": float(intrinsics[1, 2]),
        "w": width,
        "h": height,
        "k1": 0.0,
        "k2": 0.0,
        "k3": 0.0,
        "k4": 0.0,
        "camera_model": "PINHOLE",
        "frames": frames,
        "test_frames": [],
    }


def _view_name(index: int) -> str:
    return f"DSC{index + 1:05d}"


def _write_scene(folder: Path, index: int, config: RoomsConfig, progress: Progress, task: Any) -> None:
    """Renders and writes one scene into `folder`, which appears only when it is complete."""
    room = build_room(config.seed, index, config.frames)
    partial = folder.parent.parent / ".partial" / folder.name
    shutil.rmtree(partial, ignore_errors=True)
    toolkit = config.layout == "toolkit"
    kinds = ("images", "masks", "instance_segmentation", "depth", "normals", "semantics")
    for kind in toolkit_layout.FOLDERS if toolkit else kinds:
        (partial / kind).mkdir(parents=True)
    names = [_view_name(frame) for frame in range(config.frames)]
    intrinsics = pinhole(config.height, config.width)
    fisheye = toolkit_layout.fisheye(config.height, config.width)

    def write_frame(frame: int) -> None:
        if toolkit:
            toolkit_layout.write_frame(partial, names[frame], room, frame, fisheye)
            return
        pose = room.camera_to_worlds[frame]
        view = render_view(room, pose, intrinsics, config.height, config.width)
        _write_view(partial, names[frame], view, pose)

    _for_frames(write_frame, config.frames, progress, task)
    if toolkit:
        _write_mesh(partial / "scans" / "mesh_aligned_0.05.ply", room)
        toolkit_layout.write_annotations(partial, room)
        toolkit_layout.write_cameras(partial, names, room, fisheye)
    else:
        _write_mesh(partial / "mesh.ply", room)
        content = _transforms(room, config.height, config.width)
        (partial / "transforms_train.json").write_text(json.dumps(content, indent=1))
    os.replace(partial, folder)


def _for_frames(work: Callable[[int], Any], frames: int, progress: Progress, task: Any) -> list[Any]:
    """What some work gives for each frame of a scene."""
    pool, done = ThreadPoolExecutor(min(4, os.cpu_count() or 1)), []
    try:
        for result in pool.map(work, range(frames)):
            done.append(result)
            progress.advance(task)
    finally:
        # After an error or Ctrl-C the frames that have not begun are dropped.
        pool.shutdown(cancel_futures=True)
    return done


def _write_tree(config: RoomsConfig, names: Sequence[str], progress: Progress, task: Any) -> None:
    """A folder for each scene, and the lists of those for training and validation."""
    config.scenes_folder().mkdir(exist_ok=True)
    config.lists_folder().mkdir(exist_ok=True)
    for index, name in enumerate(names):
        progress.update(task, description=name)
        if (config.scenes_folder() / name).exists():
            progress.advance(task, config.frames)
        else:
            _write_scene(config.scenes_folder() / name, index, config, progress, task)
    split = config.scenes - config.resolved_val_scenes()
    _write_text(Path(config.out) / "metadata" / "semantic_classes.txt", "".join(f"{name}\n" for name in CLASSES))
    _write_text(config.lists_folder() / "nvs_sem_train.txt", "".join(f"{name}\n" for name in names[:split]))
    _write_text(config.lists_folder() / "nvs_sem_val.txt", "".join(f"{name}\n" for name in names[split:]))


def _write_chunks(config: RoomsConfig, names: Sequence[str], progress: Progress, task: Any) -> None:
    """The scenes for training and for validation as chunks, each of which appears only when it is complete."""
    split = config.scenes - config.resolved_val_scenes()
    out, partial = Path(config.out), Path(config.out) / ".partial"
    partial.mkdir(exist_ok=True)
    for side, members in (("train", range(split)), ("test", range(split, config.scenes))):
        listed: dict[str, str] = {}
        for first in range(0, len(members), re10k_layout.SCENES_PER_CHUNK):
            within = members[first : first + re10k_layout.SCENES_PER_CHUNK]
            file = out / side / f"{first // re10k_layout.SCENES_PER_CHUNK:06d}.torch"
            listed.update({names[index]: file.name for index in within})
            if file.exists():
                progress.advance(task, len(within) * config.frames)
                continue
            scenes = []
            for index in within:
                progress.update(task, description=names[index])
                scenes.append(_packed_room(names[index], index, config, progress, task))
            re10k_layout.write_chunk(partial / file.name, scenes)
            file.parent.mkdir(exist_ok=True)
            os.replace(partial / file.name, file)
        if listed:
            _write_text(out / side / "index.json", json.dumps(listed, indent=1) + "\n")


def _packed_room(name: str, index: int, config: RoomsConfig, progress: Progress, task: Any) -> dict[str, Any]:
    """Renders one scene as an entry of a chunk."""
    room = build_room(config.seed, index, config.frames)
    intrinsics = pinhole(config.height, config.width)

    def rendered(frame: int) -> bytes:
        view = render_view(room, room.camera_to_worlds[frame], intrinsics, config.height, config.width)
        return re10k_layout.jpeg(view.image)

    images = _for_frames(rendered, config.frames, progress, task)
    return re10k_layout.packed_scene(name, room, images, config.height, config.width)


def generate_rooms(config: RoomsConfig) -> Path:
    """Writes rooms to `config.out`; scenes that are there already are kept, so an interrupted run can be resumed.

    Args:
        config: what to write, and where.

    Returns:
        The folder that was written.

    Raises:
        RoomsError: wrong arguments, a folder that holds something else or cannot be written, or open3d is missing.
    """
    _check_arguments(config)
    out = Path(config.out)
    names = [f"room_{index:04d}" for index in range(config.scenes)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("views"))
    try:
        _claim(out, config)
        with Progress(*columns, TimeRemainingColumn()) as progress:
            task = progress.add_task("Rooms", total=config.scenes * config.frames)
            write = _write_chunks if config.layout == "re10k" else _write_tree
            write(config, names, progress, task)
        shutil.rmtree(out / ".partial", ignore_errors=True)
    except OSError as error:
        raise RoomsError(f"Cannot write rooms to {out}: {error}. Choose an --out that can be written.") from error
    return out
