"""MVSplat's inference against a straightforward version of it: time, memory, and how well the two agree.

    python benchmarks/reconstruction.py
    python benchmarks/reconstruction.py --height 256 --width 256 --repeats 7

The straightforward version has the same weights and does what the method's descriptions say, one step after the other:
it warps the features to all depths at once, rolls and masks maps for shifted windows, writes attention as matrices, and
keeps the usual memory format. Times are taken in turns in one process, by the clock and as the time of all cores
together, which other programs disturb less; memory is measured in a process for each. The weights are random, which
changes neither.
"""

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from measuring import Seconds, added_memory, described, machine, timed, write_json
from torch import Tensor

from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings, PixelGaussians, depth, features, unet

Version = Literal["ours", "straightforward"]
VERSIONS: tuple[Version, Version] = ("ours", "straightforward")


@dataclass
class ReconstructionBenchmark:
    """What to measure."""

    height: int = 576
    """Image height."""
    width: int = 880
    """Image width."""
    candidates: int = 128
    """Depths of the plane sweep."""
    repeats: int = 3
    """Timed runs of each version."""
    warmups: int = 1
    """Runs of each version before that."""
    memory: bool = True
    """Measure memory too, in a process for each version."""
    json: Optional[Path] = None
    """File for the numbers."""


def whole_volume(reference: Tensor, source: Tensor, grid: Tensor) -> Tensor:
    """Correlations by way of all warped features, [n, c, d, h, w]."""
    count = grid.shape[1]
    warped = F.grid_sample(source, grid.flatten(1, 2), mode="bilinear", padding_mode="zeros", align_corners=True)
    warped = rearrange(warped, "n c (d h) w -> n c d h w", d=count)
    return (reference[:, :, None] * warped).sum(dim=1) / math.sqrt(reference.shape[1])


def split_windows(x: Tensor) -> Tensor:
    """[n, h, w, c] to [4 n, h/2 w/2, c]."""
    return rearrange(x, "n (i h) (j w) c -> (n i j) (h w) c", i=2, j=2)


def rolled_attention(query: Tensor, key: Tensor, value: Tensor, shifted: bool) -> Tensor:
    """Windowed attention as Swin does it: roll, split, mask, softmax, and back."""
    n, height, width, channels = query.shape
    shift = (height // 4, width // 4) if shifted else (0, 0)
    q, k, v = (split_windows(torch.roll(t, (-shift[0], -shift[1]), dims=(1, 2))) for t in (query, key, value))
    scores = q @ k.transpose(1, 2) / math.sqrt(channels)
    if shifted:
        regions = torch.zeros(1, height, width, 1)
        for number, (rows, columns) in enumerate(
            (rows, columns)
            for rows in (slice(0, -height // 2), slice(-height // 2, -shift[0]), slice(-shift[0], None))
            for columns in (slice(0, -width // 2), slice(-width // 2, -shift[1]), slice(-shift[1], None))
        ):
            regions[:, rows, columns] = number
        labels = split_windows(regions)[..., 0]
        mask = torch.where(labels[:, :, None] != labels[:, None, :], -100.0, 0.0)
        scores = scores + mask.repeat(n, 1, 1)
    mixed = scores.softmax(dim=-1) @ v
    mixed = rearrange(mixed, "(n i j) (h w) c -> n (i h) (j w) c", i=2, j=2, h=height // 2)
    return torch.roll(mixed, shift, dims=(1, 2))


def explicit_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(c)) v`` with the matrix written out."""
    return (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(dim=-1) @ value


@contextmanager
def version(name: Version) -> Iterator[None]:
    """What runs inside computes as this version does."""
    with ExitStack() as stack:
        if name == "straightforward":
            stack.enter_context(patch.object(depth, "correlations", whole_volume))
            stack.enter_context(patch.object(features, "windowed_attention", rolled_attention))
            stack.enter_context(patch.object(unet.F, "scaled_dot_product_attention", explicit_attention))
        yield


def make_network(name: Version, candidates: int) -> MVSplat:
    """A network in which nothing is zero, as it would be in a fresh one; the same for both versions."""
    network = MVSplat(MVSplatSettings(geometry="official", candidates=candidates)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.1 * noise + (0.3 if key.endswith("weight") else 0.0))
    if name == "ours":
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


def make_inputs(height: int, width: int) -> tuple[Tensor, ...]:
    """Images, intrinsics and poses of two views beside each other."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(2, 3, height // 8, width // 8, generator=generator)
    images = F.interpolate(coarse, size=(height, width), mode="bilinear")[None]
    intrinsics = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * width, height / 2], [0, 0, 1]])
    poses = torch.eye(4).repeat(1, 2, 1, 1)
    poses[0, 1, 0, 3] = 0.3
    return images, intrinsics.expand(1, 2, 3, 3), poses


def agreement(ours: PixelGaussians, theirs: PixelGaussians) -> dict[str, float]:
    """The largest differences; what grows with depth is divided by what it grows with."""
    depths = theirs.depths.flatten(1)
    return {
        "disparity": float((1 / ours.depths - 1 / theirs.depths).abs().max()),
        "means / depth^2": float(((ours.means - theirs.means).norm(dim=-1) / depths.square()).max()),
        "opacities": float((ours.opacities - theirs.opacities).abs().max()),
        "harmonics": float((ours.harmonics - theirs.harmonics).abs().max()),
    }


def runner(name: Version, config: ReconstructionBenchmark) -> Callable[[], PixelGaussians]:
    """A run of one version."""
    network = make_network(name, config.candidates)
    inputs = make_inputs(config.height, config.width)

    def run() -> PixelGaussians:
        with torch.inference_mode(), version(name):
            return network(*inputs)

    return run


def measure(config: ReconstructionBenchmark) -> dict[str, Any]:
    """All numbers."""
    runs = {name: runner(name, config) for name in VERSIONS}
    for _ in range(config.warmups):
        for run in runs.values():
            run()
    times: dict[str, list[Seconds]] = {name: [] for name in VERSIONS}
    given: dict[str, PixelGaussians] = {}
    for _ in range(config.repeats):
        for name, run in runs.items():
            seconds, given[name] = timed(run)
            times[name].append(seconds)
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in asdict(config).items() if key != "json"},
        "agreement": agreement(given["ours"], given["straightforward"]),
    }
    runs.clear()
    given.clear()
    for name, taken in times.items():
        results[name] = {clock: summary([getattr(seconds, clock) for seconds in taken]) for clock in ("wall", "cpu")}
        if config.memory:
            results[name]["peak bytes"] = added_memory(runner, name, config)
    return results


def summary(values: list[float]) -> dict[str, float]:
    """Median and spread."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def main(config: ReconstructionBenchmark) -> None:
    """Measure and print."""
    results = measure(config)
    print(described(results["machine"]))
    print(
        f"two views of {config.height}x{config.width}, {config.candidates} depths, {config.repeats} runs each in turns"
    )
    for name in VERSIONS:
        numbers = results[name]
        clocks = [
            f"{clock} {numbers[clock]['median']:.2f} s ({numbers[clock]['least']:.2f} to {numbers[clock]['most']:.2f})"
            for clock in ("wall", "cpu")
        ]
        peak = [f"peak memory {numbers['peak bytes'] / 2**30:.2f} GiB"] if config.memory else []
        print(f"{name:16s} {', '.join([*clocks, *peak])}")
    print("largest differences: " + ", ".join(f"{key} {value:.1e}" for key, value in results["agreement"].items()))
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main(tyro.cli(ReconstructionBenchmark, description=__doc__))
