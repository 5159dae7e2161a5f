"""How fast images are decoded, whether training ever waits for them, and how long a large dataset takes to start.

    python benchmarks/loading.py --json loading.json
    python benchmarks/loading.py --parts images start-up

* ``images``: JPEGs to arrays of the size that is trained at, in `--threads` threads: Pillow decoding and resizing, what
  training does, and its cache of frames.
* ``start-up``: from nothing to a datamanager that can draw triplets, in a process of its own, for `--start-up-scenes`
  scenes of `--start-up-frames` frames. The index files are generated; images and masks are links to a few real ones.
* ``triplets``: triplets of a rendered room, through the real datamanager: in the training thread, and ahead of it in
  1, 2 or 4 threads, while the training thread works on something else for `--step-seconds` (sleeping, as it does while
  a GPU works).
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import tyro
from measuring import described, in_turns, machine, print_table, quartiles, with_spread, write_json
from PIL import Image

from snd_nerfstudio import snd_config
from snd_nerfstudio.scenes.frame_cache import FrameCache
from snd_nerfstudio.scenes.frames import Frames, load_views
from snd_nerfstudio.scenes.prefetch import Prefetcher
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms
from snd_nerfstudio.snd_pipeline import resolved


@dataclass
class LoadingBenchmark:
    """What to measure."""

    parts: tuple[Literal["images", "start-up", "triplets"], ...] = ("images", "start-up", "triplets")
    """Which of the three."""
    jpeg_sizes: tuple[tuple[int, int], ...] = ((1168, 1752), (968, 1296), (584, 876))
    """Heights and widths of the JPEGs of `images`: ScanNet++'s as downloaded, ScanNet's, FiT3D's."""
    jpegs: int = 24
    """How many of each."""
    threads: int = 2
    """That decode."""
    start_up_scenes: int = 280
    """Scenes of `start-up`."""
    start_up_frames: int = 500
    """Frames of each."""
    stored_size: tuple[int, int] = (448, 672)
    """Height and width of the files."""
    image_size: tuple[int, int] = (448, 672)
    """Height and width they are resized to."""
    steps: int = 8
    """Triplets per timed run."""
    step_seconds: float = 0.1
    """What the training thread does with each, seconds."""
    repeats: int = 5
    """Timed runs of each variant."""
    start_up_of: Optional[Path] = None
    """Used by `start-up` itself: only start a datamanager on this dataset, and say how long it took."""
    json: Optional[Path] = None
    """File for the numbers."""


def make_data(rooms: Path, settings: LoadingBenchmark, cache: Optional[Path] = None) -> Any:
    """The datamanager that ns-train would build."""
    pipeline = resolved(deepcopy(snd_config.snd.config.pipeline))  # type: ignore
    pipeline.datamanager.data, pipeline.datamanager.image_size = rooms, settings.image_size
    pipeline.datamanager.reconstructor, pipeline.datamanager.operator_cache = "depth", cache
    with redirect_stdout(StringIO()):
        return pipeline.datamanager.setup(device="cpu", test_mode="inference", seed=0)


class Run:
    """Some steps, each of which waits for its triplet and then does something else."""

    def __init__(self, data: Any, workers: int, settings: LoadingBenchmark) -> None:
        self.data, self.workers, self.settings = data, workers, settings
        self.step, self.waited = 0, []
        load = data._load_step
        self.get = Prefetcher(load, workers, 4).get if workers else load

    def __call__(self) -> None:
        """Note how long each step waited."""
        for _ in range(self.settings.steps):
            start = time.perf_counter()
            self.get(self.step)
            self.waited.append(time.perf_counter() - start)
            time.sleep(self.settings.step_seconds)
            self.step += 1


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth shading, edges and grain, which take about as many bytes of JPEG as a photograph of a room."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(30, 220, (height // 40 + 1, width // 40 + 1, 3)).astype(np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    for _ in range(60):
        top, left = generator.integers(0, height - 40), generator.integers(0, width - 40)
        tall, wide = generator.integers(20, height // 3), generator.integers(20, width // 3)
        image[top : top + tall, left : left + wide] += generator.uniform(-60, 60, 3)
    return (image + generator.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)


def by_pillow(file: Path, size: tuple[int, int]) -> np.ndarray:
    """The plain way."""
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC))


def frames_of(files: list[Path], size: tuple[int, int]) -> Frames:
    """Files without cameras worth mentioning."""
    count = len(files)
    intrinsics = np.tile(np.array([[size[1], 0, size[1] / 2], [0, size[1], size[0] / 2], [0, 0, 1.0]]), (count, 1, 1))
    return Frames(
        image_files=files,
        camera_to_worlds=np.tile(np.eye(4), (count, 1, 1)),
        intrinsics=intrinsics,
        sizes=np.tile(np.array(size), (count, 1)),
        scene_index=np.zeros(count, np.int64),
        frame_order=np.arange(count),
        scene_names=("benchmark",),
    )


def measure_images(settings: LoadingBenchmark, folder: Path) -> dict[str, Any]:
    """Images per second, for each size of files."""
    rows, figures = [], {}
    for stored in settings.jpeg_sizes:
        files = []
        for number in range(settings.jpegs):
            files.append(folder / f"{stored[0]}_{number}.jpg")
            Image.fromarray(photograph(*stored, seed=number)).save(files[-1], quality=92)
        frames, size = frames_of(files, stored), settings.image_size
        cache = FrameCache(folder / f"cache_{stored[0]}", 1e12)

        def ours(index: int, frames: Frames = frames, cache: Optional[FrameCache] = None) -> Any:
            return load_views(frames, [index], size, with_masks=False, with_depth=False, frame_cache=cache)

        work: dict[str, Callable[[int], Any]] = {
            "Pillow": lambda index, files=files: by_pillow(files[index], size),
            "training": ours,
            "training, frame cache": lambda index, ours=ours, cache=cache: ours(index, cache=cache),
        }

        def run(one: Callable[[int], Any]) -> Callable[[], None]:
            def all_of_them() -> None:
                with ThreadPoolExecutor(settings.threads) as pool:
                    list(pool.map(one, range(settings.jpegs)))

            return all_of_them

        times = in_turns({name: run(one) for name, one in work.items()}, settings.repeats)
        plain = [seconds.wall for seconds in times["Pillow"]]
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1e3
        for name, measured in times.items():
            rate = quartiles([settings.jpegs / seconds.wall for seconds in measured])
            ratio = quartiles([a / b.wall for a, b in zip(plain, measured, strict=True)])
            figures[f"{stored[0]}x{stored[1]} {name}"] = {"images_per_second": rate, "times_pillow": ratio}
            about = f"{stored[0]}x{stored[1]}, {kilobytes:.0f} kB"
            rows.append([about, name, with_spread(rate, 0), with_spread(ratio, 2)])
    print_table(["JPEGs", "read by", "images per second", "times Pillow"], rows)
    return figures


def write_large_dataset(root: Path, scenes: int, frames: int) -> Path:
    """The tree that FiT3D prepares, with images and masks that are links to one of each per scene."""
    for scene in range(scenes):
        place = root / "scenes" / f"{scene:010x}"
        for kind in ("images", "instance_segmentation"):
            (place / kind).mkdir(parents=True)
        image, mask = place / "image.jpg", place / "mask.png"
        Image.fromarray(photograph(146, 219, scene)).save(image, quality=90)
        Image.fromarray(np.arange(146 * 219, dtype=np.uint16).reshape(146, 219) // 4000).save(mask)
        angles = np.linspace(0, 3, frames)
        poses = np.tile(np.eye(4), (frames, 1, 1))
        poses[:, 0, 3], poses[:, 2, 3] = np.cos(angles), np.sin(angles)
        described = []
        for number, pose in enumerate(poses.tolist()):
            name = f"DSC{number + 1:05}.JPG"
            os.link(image, place / "images" / name)
            os.link(mask, place / "instance_segmentation" / f"{name}.png")
            described.append({"file_path": name, "transform_matrix": pose, "is_bad": False})
        content = {"fl_x": 150.0, "fl_y": 150.0, "cx": 109.5, "cy": 73.0, "w": 219, "h": 146, "camera_model": "PINHOLE"}
        (place / "transforms_train.json").write_text(json.dumps({**content, "frames": described, "test_frames": []}))
    return root


def start_up(root: Path) -> None:
    """In a process of its own: imports come first and are counted alone."""
    from snd_nerfstudio.snd_triplets import TripletDataManagerConfig

    before, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with redirect_stdout(StringIO()):
        pipeline = resolved(deepcopy(snd_config.snd.config.pipeline))  # type: ignore
        config = TripletDataManagerConfig(data=root)
        for name in ("image_size", "min_context_gap", "max_context_gap", "target_view", "all_scenes"):
            setattr(config, name, getattr(pipeline.datamanager, name))
        data = config.setup(device="cpu", seed=0)
        ready = time.perf_counter()
        fingerprint = data.fingerprint
    assert fingerprint
    print(
        json.dumps(
            {
                "seconds": ready - before,
                "with_fingerprint_seconds": time.perf_counter() - before,
                "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1e3,
                "frames": len(data.train_frames) + len(data.eval_frames),
                "pairs": data.triplets.num_pairs,
            }
        )
    )


def measure_start_up(settings: LoadingBenchmark, folder: Path) -> dict[str, Any]:
    """Seconds and memory until triplets can be drawn."""
    root = write_large_dataset(folder / "large", settings.start_up_scenes, settings.start_up_frames)
    runs = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, __file__, "--start-up-of", str(root)], check=True, capture_output=True, text=True
        )
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds, whole, memory = (
        quartiles([run[name] for run in runs]) for name in ("seconds", "with_fingerprint_seconds", "megabytes")
    )
    print_table(
        ["scenes", "frames", "context pairs", "start-up, s", "and fingerprint, s", "memory beyond imports, MB"],
        [
            [
                str(settings.start_up_scenes), str(runs[0]["frames"]), str(runs[0]["pairs"]), with_spread(seconds, 1),
                with_spread(whole, 1), with_spread(memory, 0),
            ]
        ],
    )  # fmt: skip
    return {"runs": runs}


def measure_triplets(settings: LoadingBenchmark, folder: Path) -> dict[str, Any]:
    """How long steps wait for their triplets."""
    rooms = folder / "rooms"
    height, width = settings.stored_size
    generate_rooms(RoomsConfig(out=rooms, scenes=2, frames=32, height=height, width=width))
    data = make_data(rooms, settings)
    hashing = make_data(rooms, settings, folder / "cache")
    runs = {
        "in the training thread": Run(data, 0, settings),
        "1 thread ahead": Run(data, 1, settings),
        "2 threads ahead (default)": Run(data, 2, settings),
        "4 threads ahead": Run(data, 4, settings),
        "2 threads ahead, hashed for the cache": Run(hashing, 2, settings),
    }
    times = in_turns(runs, settings.repeats)
    rows, figures = [], {}
    for name, run in runs.items():
        waits = quartiles([1e3 * wait for wait in run.waited[settings.steps :]])
        per_step = quartiles([1e3 * seconds.wall / settings.steps for seconds in times[name]])
        processor = quartiles([1e3 * seconds.cpu / settings.steps for seconds in times[name]])
        figures[name] = {"waited_ms": waits, "step_ms": per_step, "cpu_ms": processor}
        rows.append([name, with_spread(waits, 1), with_spread(per_step, 1), with_spread(processor, 1)])
    print_table(["triplets are loaded", "a step waits, ms", "whole step, ms", "CPU per step, ms"], rows)
    return figures


def main(settings: LoadingBenchmark) -> None:
    """Measure, print and write."""
    if settings.start_up_of is not None:
        start_up(settings.start_up_of)
        return
    about = machine()
    print(described(about))
    print(described(vars(settings)))
    measures = {"images": measure_images, "start-up": measure_start_up, "triplets": measure_triplets}
    figures = {}
    for part in settings.parts:
        with tempfile.TemporaryDirectory() as folder:
            figures[part] = measures[part](settings, Path(folder))
    if settings.json:
        write_json(settings.json, {"machine": about, "figures": figures})


if __name__ == "__main__":
    main(tyro.cli(LoadingBenchmark))
