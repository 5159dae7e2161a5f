"""ScanNet++ as downloaded to what training reads: pinhole images, masks, depth, in the tree of `scannetpp-scenes`.

metadata/snd_data.json                                  the settings that all files of the tree were made with
metadata/skipped.json                                   what was skipped, and why
metadata/nvs_sem_train.txt, nvs_sem_val.txt             copied from splits/
metadata/semantic_classes.txt                           with --semantic-classes
scenes/<scene>/images/DSC01234.JPG                      undistorted
scenes/<scene>/masks/DSC01234.png                       8 bit, 255 = as it was, 0 = anonymised
scenes/<scene>/instance_segmentation/DSC01234.JPG.png   16 bit; 0 = not annotated, nothing seen, or anonymised
scenes/<scene>/depth/DSC01234.png                       16 bit, millimetres along the optical axis; 0 = nothing seen
scenes/<scene>/semantics/DSC01234.png                   8 or 16 bit, with --semantic-classes
scenes/<scene>/transforms_train.json                    written when the scene is complete
scenes/<scene>/made_from.json                           what of the download its frames were made from
"""

import json
import multiprocessing
import os
import queue
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.toolkit.annotations import MissingOpen3DError, read_annotated_mesh
from snd_nerfstudio.scenes.toolkit.files import in_one_step, write_text
from snd_nerfstudio.scenes.toolkit.fisheye import VALID, Undistortion
from snd_nerfstudio.scenes.toolkit.origin import keep_only_frames_of, origin_of
from snd_nerfstudio.scenes.toolkit.rasterizing import Geometry, MeshRasterizer, ignore_value
from snd_nerfstudio.scenes.toolkit.tree import ToolkitFrame, ToolkitScene, find_scenes

VERSION = 1
"""Raised whenever the same settings would give other files than before."""
LISTS = ("nvs_sem_train.txt", "nvs_sem_val.txt")
DONE, FOUND = "done", "found"
_UNREADABLE = (UnidentifiedImageError, Image.DecompressionBombError, OSError, EOFError, SyntaxError, ValueError)


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of a frame's files, besides the download."""

    height: int
    """Rows of everything that is written."""
    width: int
    """Columns of everything that is written."""
    classes: Optional[list[str]] = None
    """Names of the semantic classes; None for no semantic maps."""

    def as_json(self) -> dict[str, Any]:
        """As they are kept in `metadata/snd_data.json`."""
        fields = {"height": self.height, "width": self.width, "semantic_classes": self.classes}
        return {"made_by": "snd-data scannetpp", "version": VERSION, **fields}


@dataclass(frozen=True)
class Outcome:
    """What became of a frame, or with `frame` None of a whole scene."""

    scene: str
    frame: Optional[str]
    what: str
    """`done`, `found` (its files were there already), or why it was skipped."""


@dataclass
class Report:
    """What became of everything."""

    done: int = 0
    """Frames written now."""
    found: int = 0
    """Frames that were there already."""
    scenes: list[str] = field(default_factory=list)
    """Scenes that are complete."""
    renewed: list[str] = field(default_factory=list)
    """Scenes whose earlier frames were of another download and are gone."""
    skipped_frames: list[Outcome] = field(default_factory=list)
    skipped_scenes: list[Outcome] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people: counts, scenes that were skipped, and the reasons for skipped frames with an example each."""
        total = f"{len(self.scenes)} scenes with {self.done + self.found} frames: {self.done} written now, "
        lines = [total + f"{self.found} were there; {len(self.skipped_frames)} frames skipped."]
        if self.renewed:
            example = f"(the first is {self.renewed[0]})"
            changed = f"{len(self.renewed)} scenes' download has changed since they were converted"
            lines.append(f"{changed}: their earlier frames were removed, to be made anew {example}")
        lines += [f"Skipped scene {skipped.scene}: {skipped.what}" for skipped in self.skipped_scenes]
        first: dict[str, Outcome] = {}
        for skipped in self.skipped_frames:
            first.setdefault(skipped.what, skipped)
        for what, count in Counter(skipped.what for skipped in self.skipped_frames).most_common():
            lines.append(f"Skipped {count} frames: {what} (the first is {first[what].scene}/{first[what].frame})")
        return lines


def frame_files(folder: Path, frame: ToolkitFrame, settings: Settings) -> dict[str, Path]:
    """Where the files of a frame go: images, masks, instance_segmentation, depth, semantics."""
    stem = Path(frame.name).stem
    files = {
        "masks": folder / "masks" / f"{stem}.png",
        "instance_segmentation": folder / "instance_segmentation" / f"{frame.name}.png",
        "depth": folder / "depth" / f"{stem}.png",
        "images": folder / "images" / frame.name,
    }
    if settings.classes:
        files["semantics"] = folder / "semantics" / f"{stem}.png"
    return files


def _save(array: np.ndarray, file: Path) -> None:
    kind = "PNG" if file.suffix.lower() == ".png" else "JPEG"
    # a PNG of level 4 is a tenth larger than one of level 6, and written in half the time
    options = {"compress_level": 4} if kind == "PNG" else {"quality": 95}
    with in_one_step(file) as partial:
        Image.fromarray(array).save(partial, format=kind, **options)


class SceneConverter:
    """Writes the files of one scene's frames; the mesh is read when the first frame needs it.

    Args:
        scene: of the download.
        folder: scenes/<scene> of the new tree.
        settings: what to write.
        threads: for casting rays; 0 for one per core.
    """

    def __init__(self, scene: ToolkitScene, folder: Path, settings: Settings, threads: int = 0) -> None:
        self.scene, self.folder, self.settings, self.threads = scene, folder, settings, threads
        self.camera, self.frames = scene.read()
        self.has_masks = scene.has_masks()
        self.undistortion = Undistortion(self.camera, settings.height, settings.width)
        self._rasterizer: Optional[MeshRasterizer] = None

    @property
    def rasterizer(self) -> MeshRasterizer:
        """Raises `InputError` if the scene has no usable mesh or annotations."""
        if self._rasterizer is None:
            mesh = read_annotated_mesh(self.scene)
            self._rasterizer = MeshRasterizer(mesh, self.settings.classes, self.threads)
        return self._rasterizer

    def convert(self, frame: ToolkitFrame) -> str:
        """Writes one frame's files.

        Returns:
            `done`, `found`, or why the frame was skipped.

        Raises:
            InputError: the scene has no usable mesh or annotations.
        """
        try:
            pose = frame.camera_to_world()
        except InputError as error:
            return str(error)
        files = frame_files(self.folder, frame, self.settings)
        if all(file.is_file() and file.stat().st_size > 0 for file in files.values()):
            return FOUND
        rasterizer = self.rasterizer
        try:
            image = self.undistortion.image(self._read(self.scene.image(frame), "image", "RGB"))
            mask = self._mask(frame)
        except InputError as error:
            return str(error)
        size = (self.settings.height, self.settings.width)
        geometry = rasterizer.render(pose, self.undistortion.intrinsics, *size)
        for file in files.values():
            file.parent.mkdir(parents=True, exist_ok=True)
        self._write(files, image, mask, geometry)
        return DONE

    def _mask(self, frame: ToolkitFrame) -> np.ndarray:
        if not self.has_masks:
            return np.full((self.settings.height, self.settings.width), VALID, np.uint8)
        return self.undistortion.mask(self._read(self.scene.masks / frame.mask_name, "anonymisation mask", "L"))

    def _read(self, file: Path, kind: str, mode: str) -> np.ndarray:
        try:
            with Image.open(file) as image:
                array = np.asarray(image.convert(mode))
        except FileNotFoundError as error:
            raise InputError(f"its {kind} is missing") from error
        except _UNREADABLE as error:
            raise InputError(f"its {kind} cannot be decoded") from error
        height, width = array.shape[:2]
        if (height, width) != (self.camera.height, self.camera.width):
            expected = f"{self.camera.width}x{self.camera.height}"
            raise InputError(f"its {kind} has {width}x{height} pixels, its camera {expected}")
        return array

    def _write(self, files: dict[str, Path], image: np.ndarray, mask: np.ndarray, geometry: Geometry) -> None:
        shown = mask == VALID
        if geometry.semantics is not None:
            ignore = ignore_value(self.settings.classes or [])
            semantics = np.where(shown, geometry.semantics, ignore)
            _save(semantics.astype(np.uint8 if ignore == 255 else np.uint16), files["semantics"])
        _save(mask, files["masks"])
        _save(np.where(shown, geometry.instances, 0).astype(np.uint16), files["instance_segmentation"])
        _save(geometry.depth, files["depth"])
        _save(image, files["images"])

    def transforms(self, skipped: set[str]) -> dict[str, Any]:
        """Contents of `transforms_train.json`; frames marked `is_bad` stay marked."""
        intrinsics = self.undistortion.intrinsics
        described: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
        for frame in self.frames:
            if frame.name not in skipped:
                entry = {
                    "file_path": frame.name,
                    "mask_path": f"{Path(frame.name).stem}.png",
                    "transform_matrix": frame.described["transform_matrix"],
                    "is_bad": bool(frame.described.get("is_bad", False)),
                }
                described[frame.is_test].append(entry)
        return {
            "fl_x": float(intrinsics[0, 0]),
            "fl_y": float(intrinsics[1, 1]),
            "cx": float(intrinsics[0, 2]),
            "cy": float(intrinsics[1, 2]),
            "w": self.settings.width,
            "h": self.settings.height,
            **dict.fromkeys(("k1", "k2", "k3", "k4"), 0.0),
            "camera_model": "PINHOLE",
            "frames": described[False],
            "test_frames": described[True],
        }


@dataclass(frozen=True)
class _Task:
    """Every `parts`-th frame of a scene."""

    scene: ToolkitScene
    part: int
    parts: int


def _outcomes(task: _Task, out: Path, settings: Settings, threads: int) -> Iterator[Outcome]:
    scene = task.scene
    try:
        converter = SceneConverter(scene, out / "scenes" / scene.name, settings, threads)
        for frame in converter.frames[task.part :: task.parts]:
            yield Outcome(scene.name, frame.name, converter.convert(frame))
    except MissingOpen3DError:
        raise
    except InputError as error:
        yield Outcome(scene.name, None, str(error))


def _work(tasks: Any, results: Any, out: Path, settings: Settings, threads: int) -> None:
    """One process: takes tasks until it gets None; puts outcomes, a fatal error's text, or None at the end."""
    import cv2

    cv2.setNumThreads(threads)
    try:
        for task in iter(tasks.get, None):
            for outcome in _outcomes(task, out, settings, threads):
                results.put(outcome)
    except InputError as error:
        results.put(str(error))
    except OSError as error:
        results.put(_unwritable(out, error))
    results.put(None)


def _from_processes(tasks: list[_Task], processes: int, out: Path, settings: Settings) -> Iterator[Outcome]:
    context = multiprocessing.get_context("spawn")  # forking does not go with the threads of Open3D and OpenCV
    waiting, results = context.Queue(), context.Queue()
    threads = max((os.cpu_count() or 1) // processes, 1)
    for task in [*tasks, *[None] * processes]:
        waiting.put(task)
    arguments = (waiting, results, out, settings, threads)
    workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    running = processes
    try:
        while running:
            broken = [worker for worker in workers if worker.exitcode not in (None, 0)]
            if broken:
                raise InputError(
                    f"A process of snd-data ended with exit code {broken[0].exitcode}, perhaps for want of memory: "
                    "run the command again with fewer --processes; what is written is kept."
                )
            try:
                result = results.get(timeout=1.0)
            except queue.Empty:
                continue
            if result is None:
                running -= 1
            elif isinstance(result, str):
                raise InputError(result)
            else:
                yield result
    finally:
        for worker in workers:
            worker.terminate()
            worker.join()


def _claim(out: Path, settings: Settings) -> None:
    """Writes the settings file, or checks that the one there is of the same settings.

    Raises:
        InputError: `out` holds something else; nothing has been changed.
    """
    record = out / "metadata" / "snd_data.json"
    remedy = "Nothing was changed; choose another --out, or delete that folder first."
    if record.is_file():
        try:
            found = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings.as_json():
            raise InputError(
                f"--out {out} holds scenes made with other settings ({found}; asked for now: {settings.as_json()}). "
                f"{remedy}"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} is not an empty folder and has no metadata/snd_data.json. {remedy}")
    record.parent.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps(settings.as_json(), indent=1) + "\n")


def _unwritable(out: Path, error: OSError) -> str:
    return f"--out {out} cannot be written ({error}): make room, or choose another folder; what is written stays."


def _prepare(scenes: list[ToolkitScene], out: Path, report: Report) -> dict[str, int]:
    """How many frames each readable scene has, of which none is of an older download; the others are reported."""
    counts = {}
    for scene in scenes:
        try:
            frames, origin = scene.read()[1], origin_of(scene)
        except InputError as error:
            report.skipped_scenes.append(Outcome(scene.name, None, str(error)))
            continue
        counts[scene.name] = len(frames)
        if keep_only_frames_of(origin, out / "scenes" / scene.name):
            report.renewed.append(scene.name)
    return counts


def convert_scannetpp(
    root: Path, out: Path, settings: Settings, names: Optional[list[str]] = None, processes: int = 1
) -> Report:
    """Converts scenes; files that are there already are kept, so that an interrupted run goes on where it stopped.

    Where a scene's download has changed since, its frames are removed and made anew.

    Args:
        root: the download, which holds `data/` and `splits/`.
        out: folder of the new tree; new, empty, or of the same settings.
        settings: what to write.
        names: which scenes; None for all.
        processes: how many work at once; 1 for this one alone.

    Returns:
        What was done, found and skipped; what was skipped is in `metadata/skipped.json` too.

    Raises:
        InputError: no such download, `out` holds something else or cannot be written, or a process died.
    """
    scenes = find_scenes(root, names)
    report = Report()
    try:
        _claim(out, settings)
        _write_lists(root, out, settings)
        counts = _prepare(scenes, out, report)
        readable = [scene for scene in scenes if scene.name in counts]
        parts = max(1, -(-processes // max(len(readable), 1)))
        tasks = [_Task(scene, part, parts) for scene in readable for part in range(parts)]
        source: Iterator[Outcome]
        if processes == 1:
            source = (outcome for task in tasks for outcome in _outcomes(task, out, settings, 0))
        else:
            source = _from_processes(tasks, min(processes, max(len(tasks), 1)), out, settings)
        _collect(source, readable, counts, out, settings, report)
        _write_skipped(out, scenes, report)
    except OSError as error:
        raise InputError(_unwritable(out, error)) from error
    return report


def _collect(
    source: Iterator[Outcome],
    scenes: list[ToolkitScene],
    counts: dict[str, int],
    out: Path,
    settings: Settings,
    report: Report,
) -> None:
    """Counts outcomes, shows progress, and completes each scene when its last frame is there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("frames"))
    by_name = {scene.name: scene for scene in scenes}
    remaining, given_up = dict(counts), set()
    skipped: dict[str, set[str]] = {name: set() for name in counts}
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("ScanNet++", total=sum(counts.values()))
        for outcome in source:
            name = outcome.scene
            if outcome.frame is None:
                if name not in given_up:
                    report.skipped_scenes.append(outcome)
                    progress.advance(bar, remaining[name])
                given_up.add(name)
                continue
            progress.update(bar, advance=0 if name in given_up else 1, description=name)
            remaining[name] -= 1
            if outcome.what == DONE:
                report.done += 1
            elif outcome.what == FOUND:
                report.found += 1
            else:
                report.skipped_frames.append(outcome)
                skipped[name].add(outcome.frame)
            if remaining[name] == 0 and name not in given_up:
                _complete(by_name[name], skipped[name], counts[name], out, settings, report)


def _complete(
    scene: ToolkitScene, skipped: set[str], frames: int, out: Path, settings: Settings, report: Report
) -> None:
    if len(skipped) == frames:
        report.skipped_scenes.append(Outcome(scene.name, None, "all of its frames were skipped."))
        return
    folder = out / "scenes" / scene.name
    content = SceneConverter(scene, folder, settings).transforms(skipped)
    write_text(folder / "transforms_train.json", json.dumps(content, indent=1))
    report.scenes.append(scene.name)


def _write_lists(root: Path, out: Path, settings: Settings) -> None:
    """Before any scene, so that an interruption leaves none without the list of those held out."""
    for name in LISTS:
        file = root / "splits" / name
        if file.is_file():
            write_text(out / "metadata" / name, file.read_text(encoding="utf-8"))
    if settings.classes:
        write_text(out / "metadata" / "semantic_classes.txt", "".join(f"{name}\n" for name in settings.classes))


def _write_skipped(out: Path, scenes: list[ToolkitScene], report: Report) -> None:
    """Replaces what is told of these scenes; what is told of others stays."""
    file = out / "metadata" / "skipped.json"
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        earlier = []
    names = {scene.name for scene in scenes}
    skipped = [entry for entry in earlier if entry["scene"] not in names]
    skipped += [vars(outcome) for outcome in [*report.skipped_scenes, *report.skipped_frames]]
    skipped.sort(key=lambda entry: (entry["scene"], entry["frame"] or ""))
    write_text(file, json.dumps(skipped, indent=1) + "\n")
