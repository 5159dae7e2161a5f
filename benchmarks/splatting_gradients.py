"""Time `rasterize` with gradients on the CPU, forward and backward, against its twin in torch.

    python benchmarks/splatting_gradients.py --json splatting_gradients.json

The scene is that of one training step: two pixel-aligned context views of 128 x 192, hence 49,152 Gaussians, splatted
with three colour channels into a view between them; gradients come from features, alpha and depth and go to all inputs.
Both routes run in turn, in one process, and include the projection and its autograd. The twin, `splat_hits`, composites
a list of hits; the time it takes to list them is given apart.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import numba
import torch
from measuring import described, machine, print_table, quartiles, with_spread, write_json
from torch import Tensor

from snd_nerfstudio.splatting import Gaussians, PinholeCamera, Splatted, rasterize
from snd_nerfstudio.splatting.hit_list import list_hits, splat_hits

HEIGHT, WIDTH = 128, 192
FOCAL = 0.9 * WIDTH
INPUTS = ("means", "quats", "scales", "opacities", "features")


def pixel_aligned_scene(seed: int = 0) -> tuple[Gaussians, PinholeCamera, Tensor]:
    """One Gaussian per pixel of two views 0.3 m apart, about 1.5 px wide, on a wavy surface 2 to 3 m away."""
    random = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    rays = torch.stack([(x - WIDTH / 2) / FOCAL, (y - HEIGHT / 2) / FOCAL, torch.ones_like(x)], dim=-1)
    means, depths = [], []
    for offset in (-0.15, 0.15):
        wave = torch.sin(4 * math.pi * x / WIDTH + offset) * torch.cos(3 * math.pi * y / HEIGHT)
        depth = (2.5 + 0.5 * wave) * (1 + 0.01 * torch.randn(HEIGHT, WIDTH, generator=random))
        means.append((rays * depth[:, :, None] + torch.tensor([offset, 0, 0])).reshape(-1, 3))
        depths.append(depth.reshape(-1))
    n = 2 * HEIGHT * WIDTH
    spread = torch.exp(0.4 * torch.randn(n, 3, generator=random))
    gaussians = Gaussians(
        means=torch.cat(means),
        quats=torch.randn(n, 4, generator=random),
        scales=1.5 / FOCAL * torch.cat(depths)[:, None] * spread,
        opacities=0.05 + 0.9 * torch.rand(n, generator=random),
    )
    intrinsics = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return gaussians, PinholeCamera(torch.eye(4), intrinsics, HEIGHT, WIDTH), torch.rand(n, 3, generator=random)


def by_numba(gaussians: Gaussians, camera: PinholeCamera, features: Tensor) -> tuple[Splatted, float]:
    """The view, and no time spent on listing hits."""
    return rasterize(gaussians, camera, features, engine="numba"), 0.0


def by_torch(gaussians: Gaussians, camera: PinholeCamera, features: Tensor) -> tuple[Splatted, float]:
    """The view, and the seconds spent on listing hits."""
    start = time.perf_counter()
    hits = list_hits(gaussians, camera)
    listing = time.perf_counter() - start
    return splat_hits(gaussians, camera, features, hits), listing


ROUTES = {"numba": by_numba, "torch": by_torch}


def run(route: str, scene: tuple[Gaussians, PinholeCamera, Tensor]) -> tuple[dict[str, float], list[Tensor]]:
    """Milliseconds of one forward and backward pass by part, and the gradients of all inputs."""
    gaussians, camera, features = scene
    leaves = {name: getattr(gaussians, name).clone().requires_grad_() for name in INPUTS[:4]}
    rows = features.clone().requires_grad_()
    random = torch.Generator().manual_seed(1)
    sizes = [(HEIGHT, WIDTH, 3), (HEIGHT, WIDTH), (HEIGHT, WIDTH)]
    upstream = [torch.randn(size, generator=random) for size in sizes]
    start = time.perf_counter()
    out, listing = ROUTES[route](replace(gaussians, **leaves), camera, rows)
    between = time.perf_counter()
    gradients = torch.autograd.grad([out.features, out.alpha, out.depth], [*leaves.values(), rows], upstream)
    end = time.perf_counter()
    seconds = {
        "list hits": listing,
        "forward": between - start - listing,
        "backward": end - between,
        "total": end - start,
    }
    return {part: 1e3 * value for part, value in seconds.items()}, list(gradients)


def measure(rounds: int) -> dict:
    """Run both routes in turn and sum up: times in milliseconds as quartiles, ratios, and how well gradients agree."""
    scene = pixel_aligned_scene()
    gradients = {route: run(route, scene)[1] for route in ROUTES}  # also compiles and warms up
    agreement = {
        name: float((found - expected).norm() / expected.norm())
        for name, found, expected in zip(INPUTS, gradients["numba"], gradients["torch"])
    }
    times = {route: [] for route in ROUTES}
    for _ in range(rounds):
        for route in ROUTES:
            times[route].append(run(route, scene)[0])
    parts = times["numba"][0]
    table = {route: {part: quartiles([row[part] for row in rows]) for part in parts} for route, rows in times.items()}
    pairs = list(zip(times["numba"], times["torch"]))
    return {
        "machine": machine(**{"numba threads": numba.get_num_threads(), "numba": numba.__version__}),
        "scene": {
            "height": HEIGHT,
            "width": WIDTH,
            "gaussians": len(scene[0]),
            "hits": len(list_hits(scene[0], scene[1]).pixels),
        },
        "rounds": rounds,
        "milliseconds": table,
        "numba / torch": quartiles([fast["total"] / slow["total"] for fast, slow in pairs]),
        "numba / torch, hits given": quartiles(
            [fast["total"] / (slow["total"] - slow["list hits"]) for fast, slow in pairs]
        ),
        "relative difference of gradients": agreement,
    }


def show(results: dict) -> None:
    """Print the results as a table: medians, with quartiles in brackets."""
    print(described(results["machine"]))
    print(f"{described(results['scene'])}, rounds {results['rounds']}")
    rows = results["milliseconds"]
    print_table(
        ["ms", *rows["numba"]],
        [[route, *(with_spread(part, 1) for part in row.values())] for route, row in rows.items()],
    )
    for name in ("numba / torch", "numba / torch, hits given"):
        print(f"{name}: {with_spread(results[name])}")
    differences = results["relative difference of gradients"].items()
    print("relative difference of gradients: " + ", ".join(f"{name} {value:.1e}" for name, value in differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each route, taken in turn")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    results = measure(arguments.rounds)
    show(results)
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()
