"""How many pictures a second the viewer draws, and what an open tab costs the training.

    python benchmarks/viewer.py --json viewer.json
    python benchmarks/viewer.py --backbone tiny --image-size 112 168 --no-training

Start it with OMP_WAIT_POLICY=PASSIVE in the environment.

Pictures: the real display of `ns-train snd` on a room that is rendered first, each output alone, from a camera that
moves a little with every picture; the first picture, for which tokens are computed and colours fitted, is not counted.
The variant `splatted_pca, all channels` splats every channel and projects afterwards, not the other way round.

Training: the real `ns-train` in a process of its own. A client connects to its viewer as a browser's tab does, rests
for a while, and leaves again, in turns. What a browser itself would take from the processor is not in it. Steps are
timed by what the training writes for tensorboard.
"""

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal, Optional

import msgspec
import numpy as np
import torch
import tyro
import viser.transforms as vtf
from measuring import described, in_turns, machine, print_table, quartiles, ratios, timed, with_spread, write_json
from torch import Tensor
from websockets.asyncio.client import connect

from snd_nerfstudio import snd_config
from snd_nerfstudio.scenes.rooms.writing import RoomsConfig, generate_rooms
from snd_nerfstudio.splatting import PinholeCamera, rasterize
from snd_nerfstudio.supervision.dense import lift
from snd_nerfstudio.viewer.display import Display
from snd_nerfstudio.viewer.outputs import without_gaps

ALL_CHANNELS = "splatted_pca, all channels"
ASPECT = 1.5
"""Width of the pictures over their height; a browser's window decides on it."""


@dataclass
class ViewerBenchmark:
    """What to measure."""

    backbone: str = "dinov2-small"
    """As for --pipeline.model.backbone; its weights are random."""
    image_size: tuple[int, int] = (448, 672)
    """Height and width of the context views."""
    height: int = 512
    """Height of the pictures: the viewer's "Max res"."""
    repeats: int = 9
    """Timed pictures of each output."""
    training: bool = True
    """Measure what a client costs the training too."""
    method: Literal["snd", "snd-tiny"] = "snd-tiny"
    """What is trained then."""
    seconds: float = 20.0
    """How long a client stays, and stays away, in one turn."""
    turns: int = 4
    """How often it comes."""
    json: Optional[Path] = None
    """File for the numbers."""


# ---------------------------------------------------------------------- pictures


def make_display(settings: ViewerBenchmark, rooms: Path) -> Display:
    """The display of the pipeline that ns-train would build."""
    config = deepcopy(snd_config.snd.config)
    pipeline: Any = config.pipeline
    pipeline.datamanager.data = rooms
    pipeline.datamanager.image_size = settings.image_size
    pipeline.datamanager.reconstructor = "depth"
    pipeline.model.backbone, pipeline.model.weights = settings.backbone, "random"
    pipeline.model.head.prototypes = 4096
    with redirect_stdout(StringIO()):
        return pipeline.setup(device="cpu", test_mode="inference").eval().model.display


def moving_camera(display: Display, height: int, number: int) -> PinholeCamera:
    """Near the target view, a centimetre further each time."""
    assert display.scene is not None
    target = display.scene.triplet.target.camera(0)
    pose = target.camera_to_world.clone()
    pose[:3, 3] += 0.01 * (number % 10) * pose[:3, 0]
    scale = height / target.height
    matrix = target.intrinsics * torch.tensor([scale, scale, 1.0])[:, None]
    width = round(ASPECT * height)
    matrix[:2, 2] = torch.tensor([width / 2, height / 2])
    return PinholeCamera(pose, matrix, height, width)


def all_channels(display: Display, camera: PinholeCamera) -> Tensor:
    """What `splatted_pca` would be without using that splatting is linear."""
    assert display.scene is not None
    context = display.scene.triplet.context
    features = lift(display.context_tokens(), context.masks, (context.height, context.width), display.settings).features
    splat = rasterize(without_gaps(display.scene, camera), camera, features)
    alpha = splat.alpha[..., None]
    basis = display.basis()
    return basis.colour(basis.project(splat.features / alpha.clamp(min=1e-3))) * alpha


@torch.no_grad()
def measure_pictures(settings: ViewerBenchmark, rooms: Path) -> dict[str, Any]:
    """Seconds per picture of each output."""
    display = make_display(settings, rooms)
    device = torch.device("cpu")
    count = 0

    def draw(name: str) -> Callable[[], Any]:
        def run() -> Any:
            nonlocal count
            count += 1
            camera = moving_camera(display, settings.height, count)
            if name == ALL_CHANNELS:
                return all_channels(display, camera)
            display.wanted = lambda: {name, "depth"}
            return display.render(camera, device)

        return run

    assert display.scene is not None
    pose = display.scene.triplet.target.camera_to_worlds[0]
    display.click(pose[:3, 3], pose[:3, 2])  # something for `similarity` to look for
    names = ["rgb", "splatted_pca", ALL_CHANNELS, *(n for n in Display.CHANNELS if n not in ("rgb", "splatted_pca"))]
    first = {}
    for name in names:  # tokens, colours and compiled kernels
        first[name] = timed(draw(name))[0].wall
    seconds = in_turns({name: draw(name) for name in names}, settings.repeats)
    spread = {name: quartiles([1000 * s.wall for s in seconds[name]]) for name in names}
    rows = [[name, with_spread(spread[name], 0), f"{1000 / spread[name][1]:.1f}"] for name in names]
    print_table(["output", f"ms per picture of {settings.height} pixels", "pictures a second"], rows)
    gain = ratios(seconds[ALL_CHANNELS], seconds["splatted_pca"])
    print(f"projecting before splatting: {with_spread(gain, 1)} times as fast\n")
    return {
        "first picture, s": first,
        "pictures a second": {name: 1000 / spread[name][1] for name in names},
        "seconds": {name: [s.wall for s in seconds[name]] for name in names},
        "all channels over projected": gain,
    }


# ---------------------------------------------------------------------- training


CAMERA = {
    "type": "ViewerCameraMessage",
    "wxyz": [1.0, 0.0, 0.0, 0.0],
    "position": [0.0, 0.0, 0.0],
    "fov": 1.0,
    "aspect": ASPECT,
    "look_at": [0.0, 0.0, 1.0],
    "up_direction": [0.0, -1.0, 0.0],
}
"""What a tab tells of its camera when it opens; the program then moves it to the shown view."""


async def rest(port: int, seconds: float) -> int:
    """Be an idle tab: open, say where the camera is, follow the program's moves, read everything. Bytes read."""
    read, camera = 0, dict(CAMERA)
    async with connect(f"ws://127.0.0.1:{port}", max_size=None) as client:
        await client.send(msgspec.msgpack.encode(camera))
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                message = await asyncio.wait_for(client.recv(), left)
            except asyncio.TimeoutError:
                break
            read += len(message)
            if follow(camera, msgspec.msgpack.decode(message)):
                await client.send(msgspec.msgpack.encode(camera))
    return read


def follow(camera: dict[str, Any], message: Any) -> bool:
    """Move a tab's camera as the program says; whether it said so."""
    fields = {
        "SetCameraPositionMessage": ("position", "position"),
        "SetCameraLookAtMessage": ("look_at", "look_at"),
        "SetCameraUpDirectionMessage": ("up_direction", "position"),
        "SetCameraFovMessage": ("fov", "fov"),
    }
    parts = message if isinstance(message, (list, tuple)) else [message]
    moves = [part for part in parts if isinstance(part, dict) and part.get("type") in fields]
    for part in moves:
        name, field = fields[part["type"]]
        camera[name] = part[field]
    if moves:
        forward = np.subtract(camera["look_at"], camera["position"])
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, camera["up_direction"])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward], axis=1)
        camera["wxyz"] = vtf.SO3.from_matrix(rotation).wxyz.tolist()
    return bool(moves)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def measure_training(settings: ViewerBenchmark, rooms: Path, folder: Path) -> dict[str, Any]:
    """Seconds per step with and without a client, in turns."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    port = free_port()
    command = [str(Path(sys.executable).with_name("ns-train")), settings.method, "--data", str(rooms)]
    command += ["--vis", "viewer+tensorboard", "--viewer.websocket-port", str(port), "--max-num-iterations", "1000000"]
    command += ["--output-dir", str(folder), "--experiment-name", "e", "--timestamp", "t"]
    command += ["--machine.device-type", "cpu"]
    command += ["--logging.steps-per-log", "1", "--steps-per-eval-batch", "0", "--steps-per-eval-image", "0"]
    command += ["--steps-per-eval-all-images", "1000000", "--pipeline.datamanager.reconstructor", "depth"]
    if settings.method == "snd":
        command += ["--pipeline.model.weights", "random", "--pipeline.model.backbone", settings.backbone]
    with (folder / "log.txt").open("wb") as log:
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    windows: list[tuple[str, float, float]] = []
    try:
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            if training.poll() is not None:
                raise RuntimeError((folder / "log.txt").read_text()[-3000:])
            time.sleep(0.5)
        time.sleep(settings.seconds)  # compiled, warm
        read = 0
        for _ in range(settings.turns):
            begin = time.time()
            time.sleep(settings.seconds)
            windows.append(("alone", begin, time.time()))
            begin = time.time()
            read += asyncio.run(rest(port, settings.seconds))
            windows.append(("client", begin, time.time()))
        if read < 10_000:
            raise RuntimeError(f"the client was sent {read} bytes only: no pictures")
    finally:
        training.kill()
        training.wait()
    events = EventAccumulator(str(folder / "e" / settings.method / "t"), size_guidance={"scalars": 0})
    events.Reload()
    times = sorted(event.wall_time for event in events.Scalars("Train Loss"))
    seconds: dict[str, list[float]] = {"alone": [], "client": []}
    for name, begin, end in windows:
        inside = [t for t in times if begin + 1 < t < end]
        seconds[name].append((inside[-1] - inside[0]) / (len(inside) - 1))
    rows = [
        [f"{settings.method}, {name}", with_spread(quartiles([1000 * value for value in values]), 1)]
        for name, values in seconds.items()
    ]
    print_table(["training", "ms per step"], rows)
    slower = quartiles([one / other for one, other in zip(seconds["client"], seconds["alone"], strict=True)])
    print(f"with an idle client a step takes {with_spread(slower)} of the time; {read / 1e6:.1f} MB were sent to it")
    return {"seconds per step": seconds, "client over alone": slower, "bytes sent": read}


def main(settings: ViewerBenchmark) -> None:
    """Measure and print."""
    described_machine = machine()
    print(described(described_machine))
    print(described(vars(settings)))
    results: dict[str, Any] = {"machine": described_machine}
    results["settings"] = {name: str(value) for name, value in vars(settings).items()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        height, width = settings.image_size
        size = {"height": height, "width": width}
        rooms = generate_rooms(RoomsConfig(out=folder / "rooms", scenes=2, seed=0, frames=48, **size))
        results["pictures"] = measure_pictures(settings, rooms)
        if settings.training:
            results["training"] = measure_training(settings, rooms, folder)
    if settings.json is not None:
        write_json(settings.json, results)


if __name__ == "__main__":
    main(tyro.cli(ViewerBenchmark))
