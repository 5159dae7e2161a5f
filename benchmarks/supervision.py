"""The teacher's path, context tokens to target tokens: as one token operator, and on full-resolution maps.

    python benchmarks/supervision.py --json supervision.json
    python benchmarks/supervision.py --height 252 --width 378 --no-memory

Start it with OMP_WAIT_POLICY=PASSIVE in the environment, or idle threads of one library keep the cores from another.
The scene is a synthetic training triplet (`room.py`): two contexts with one Gaussian per pixel, 43 target regions.
The path is measured with the settings of the released code but for its footprints (bilinear pooling, no weighting)
and with the default ones (pooling by area, weighted by coverage). Variants:

* `token`: `build_token_operator`, and the operator applied.
* `cached`: the operator read from a folder by `OperatorCache`, and applied.
* `all_channels`: dense, all channels in one compositing pass (`dense_baselines.py`, buffers used again).
* `chunk32`: the same, 32 channels at a time; projection, tiles and weights of lifting shared.
* `three_channel_shared`: the same, three channels at a time, with a kernel of its own; sorting shared too.
* `three_channel`: as in the released code, three channels at a time, each time with projection and sorting; lifting,
  blending and pooling of full-resolution maps in torch (`supervision/dense.py`).

The last two run a few passes and are extrapolated to all, from the mean time of a pass; what happens once is measured
in full. Runs take turns in one process. Memory is what a variant adds to a fresh process, which holds Gaussians,
masks and context tokens; dense buffers count. On CUDA, dense variants go through `rasterize` and torch.

Gradients of colours (section "RGB forward and backward" of the targets) are measured by `splatting_gradients.py`, the
head's cross-entropy by `head.py`.
"""

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numba
import torch
import tyro
from dense_baselines import DensePath
from measuring import (
    Seconds,
    added_memory,
    described,
    machine,
    print_table,
    quartiles,
    ratios,
    timed,
    with_spread,
    write_json,
)
from room import Triplet, make_triplet
from torch import Tensor

from snd_nerfstudio.splatting import rasterize
from snd_nerfstudio.splatting.hits import engine_lock, find_tiles, project_footprints
from snd_nerfstudio.splatting.projection import FAR, NEAR
from snd_nerfstudio.supervision.blending import blend
from snd_nerfstudio.supervision.dense import EMPTY, dense_supervision, lift
from snd_nerfstudio.supervision.operator_cache import OperatorCache
from snd_nerfstudio.supervision.pooling import pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_builder import (
    TokenOperator,
    _interpolation,
    build_token_operator,
    compact_labels,
    pooling_axis,
)
from snd_nerfstudio.supervision.token_kernel import TILE, Regions, sum_weights, uniform_reach

SETTINGS = {
    "released": SupervisionSettings(
        align_corners=True, token_label="sample", isolated="zero", weighting="none", pooling="bilinear"
    ),
    "area": SupervisionSettings(),
}
EXTRAPOLATED = ("three_channel_shared", "three_channel")
AGREEMENT = 1e-4
SMALL, SMALLER, SMALLEST = (252, 378), (126, 196), (84, 140)
KEY = "0" * 64


@dataclass
class SupervisionBenchmark:
    """What to measure."""

    height: int = 576
    """Of all images, pixels."""
    width: int = 880
    """Of all images, pixels."""
    channels: tuple[int, ...] = (384, 768, 1024)
    """Of a token: all variants for the first, `all_channels` for the second too, `token` for all."""
    repeats: int = 5
    """Timed runs of each variant."""
    token_repeats: int = 15
    """Timed runs where variants of the token operator are compared with each other."""
    passes: int = 8
    """Passes to run of variants with three channels."""
    memory: bool = True
    """Measure memory too, in a process for each variant."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    json: Optional[Path] = None
    """File for the numbers."""


class Run(NamedTuple):
    """One run of a variant."""

    tokens: Tensor
    """Target tokens, of as many channels as were computed."""
    seconds: Seconds
    """Of all channels."""


@dataclass(frozen=True)
class Task:
    """Everything that a variant starts from."""

    triplet: Triplet
    tokens: Tensor
    settings: SupervisionSettings

    def build(self) -> TokenOperator:
        """The token operator."""
        triplet = self.triplet
        return build_token_operator(
            triplet.grid,
            triplet.context_masks,
            triplet.size,
            triplet.gaussians,
            triplet.target,
            triplet.target_mask,
            self.settings,
        )

    def token(self, threads: Optional[int] = None) -> Run:
        """Build the operator and apply it."""
        before = numba.get_num_threads(), torch.get_num_threads()
        if threads is not None:
            numba.set_num_threads(threads)
            torch.set_num_threads(threads)
        seconds, result = timed(lambda: self.build()(self.tokens, self.settings.blending), self.tokens.device.type)
        numba.set_num_threads(before[0])
        torch.set_num_threads(before[1])
        return Run(result, seconds)

    def cached(self, cache: OperatorCache) -> Run:
        """Read the operator and apply it."""
        device = self.tokens.device.type

        def run() -> Tensor:
            operator = cache.get(KEY)
            assert operator is not None
            return operator.to(device)(self.tokens, self.settings.blending)

        seconds, result = timed(run, device)
        return Run(result, seconds)

    def dense_path(self, width: int) -> DensePath:
        """Dense passes of some channels."""
        triplet = self.triplet
        return DensePath(
            triplet.context_masks, triplet.gaussians, triplet.target, triplet.target_mask, self.settings, width
        )

    def dense(self, path: DensePath, passes: Optional[int] = None) -> Run:
        """Run dense passes, all or some."""
        seconds, result = timed(lambda: path(self.tokens, passes))
        channels = self.tokens.shape[-1]
        count = -(-channels // path.width)
        done = min(len(path.seconds) * path.width, channels)
        return Run(result[..., :done], extrapolated(seconds, path.seconds, count))

    @torch.no_grad()
    def step_by_step(self, width: int, passes: Optional[int] = None) -> Run:
        """Dense maps in torch, and a call of `rasterize` for every few channels."""
        triplet, settings, device = self.triplet, self.settings, self.tokens.device.type
        channels = self.tokens.shape[-1]
        first, lifted = timed(lambda: lift(self.tokens, triplet.context_masks, triplet.size, settings), device)
        # filled, so that blending reads what it would read after all passes: memory, not pages that nobody wrote to
        image = torch.full((*triplet.size, channels), 0.5, device=device)
        starts = range(0, channels, width)
        alpha, each = image[..., 0], []
        for low in starts[:passes]:
            part = slice(low, low + width)

            def splat(part: slice = part) -> Tensor:
                view = rasterize(
                    triplet.gaussians, triplet.target, lifted.features[:, part], footprint=settings.footprint
                )
                image[..., part] = view.features
                return view.alpha

            seconds, alpha = timed(splat, device)
            each.append(seconds)

        last, tokens = timed(lambda: blended_and_pooled(triplet, image, alpha, settings), device)
        done = min(len(each) * width, channels)
        return Run(tokens[..., :done], extrapolated(total([first, *each, last]), each, len(starts)))


def blended_and_pooled(triplet: Triplet, image: Tensor, alpha: Tensor, settings: SupervisionSettings) -> Tensor:
    """The steps of `dense_supervision` after splatting."""
    weighted = settings.weighting == "coverage"
    blended = blend(image, triplet.target_mask, settings.blending, alpha if weighted else None)
    tokens = pool(blended, *triplet.grid, settings.pooling)
    if not weighted:
        return tokens
    mass = pool(alpha[..., None], *triplet.grid, settings.pooling)
    return torch.where(mass > EMPTY, tokens / mass.clamp(min=EMPTY), torch.zeros_like(tokens))


def extrapolated(measured: Seconds, passes: list[Seconds], count: int) -> Seconds:
    """What a run would have taken with all its passes."""
    one, missing = total(passes), (count - len(passes)) / len(passes)
    return Seconds(measured.wall + missing * one.wall, measured.cpu + missing * one.cpu)


def total(parts: Iterable[Seconds]) -> Seconds:
    """How long all parts took together."""
    parts = list(parts)
    return Seconds(sum(part.wall for part in parts), sum(part.cpu for part in parts))


def dense_variants(task: Task, passes: int) -> dict[str, Callable[[], Run]]:
    """All dense variants; their buffers are made when they first run."""
    if task.tokens.device.type == "cuda":
        channels = task.tokens.shape[-1]
        return {
            "all_channels": lambda: task.step_by_step(channels),
            "chunk32": lambda: task.step_by_step(32),
            "three_channel": lambda: task.step_by_step(3, passes),
        }
    whole, chunks, three = (task.dense_path(width) for width in (task.tokens.shape[-1], 32, 3))
    return {
        "all_channels": lambda: task.dense(whole),
        "chunk32": lambda: task.dense(chunks),
        "three_channel_shared": lambda: task.dense(three, passes),
        "three_channel": lambda: task.step_by_step(3, passes),
    }


def make_task(size: tuple[int, int], channels: int, pooling: str, device: str) -> Task:
    """A task of one size."""
    triplet = make_triplet(*size).to(device)
    return Task(triplet, triplet.tokens(channels), SETTINGS[pooling])


def make_run(config: SupervisionBenchmark, name: str, pooling: str, channels: int) -> Callable[[], Any]:
    """One variant in a process of its own, after a run of a small size, which compiles."""

    def variant(task: Task) -> Callable[[], Any]:
        return task.token if name == "token" else dense_variants(task, config.passes)[name]

    variant(make_task(SMALLER, 32, pooling, config.device))()
    return variant(make_task((config.height, config.width), channels, pooling, config.device))


def stages(task: Task) -> dict[str, Seconds]:
    """Where the token operator's time goes on the CPU."""
    triplet, settings, gaussians, target = task.triplet, task.settings, task.triplet.gaussians, task.triplet.target
    (h, w), dtype = triplet.grid, task.triplet.gaussians.dtype
    rows = pooling_axis(h, target.height, settings.pooling, dtype)
    columns = pooling_axis(w, target.width, settings.pooling, dtype)
    labels, count = compact_labels(triplet.target_mask)
    seconds: dict[str, Seconds] = {}
    with engine_lock:
        seconds["interpolation"], (lifting, _) = timed(
            lambda: _interpolation(triplet.context_masks, triplet.size, (h, w), 2, settings, dtype)
        )
        seconds["projection"], footprints = timed(lambda: project_footprints(gaussians, target, NEAR, FAR))
        seconds["tiles"], tiles = timed(lambda: find_tiles(footprints, target.height, target.width, TILE))
        seconds["reach of regions"], reach = timed(lambda: uniform_reach(labels.numpy()))
        regions = Regions(labels.numpy(), reach, count)
        seconds["sums"], _ = timed(lambda: sum_weights(footprints, tiles, lifting, rows, columns, regions, 2 * h * w))
    whole, operator = timed(task.build)
    so_far = total(seconds.values())
    seconds["rest of building"] = Seconds(whole.wall - so_far.wall, whole.cpu - so_far.cpu)
    seconds["apply"], _ = timed(lambda: operator(task.tokens, settings.blending))
    return seconds


def take_turns(
    variants: dict[str, Callable[[], Run]], repeats: int
) -> tuple[dict[str, list[Seconds]], dict[str, Tensor]]:
    """Times of every variant, and its target tokens; a first round warms up."""
    tokens = {name: run().tokens for name, run in variants.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(run().seconds)
    return times, tokens


def agreement(tokens: dict[str, Tensor], reference: str) -> dict[str, float]:
    """The largest difference of each variant from one of them.

    Raises:
        SystemExit: one is too large.
    """
    differences = {}
    for name, found in tokens.items():
        differences[name] = float((found - tokens[reference][..., : found.shape[-1]]).abs().max())
        if not differences[name] <= AGREEMENT:
            raise SystemExit(f"{name} differs from {reference} by {differences[name]:.1e}")
    return differences


def measure_pooling(config: SupervisionBenchmark, pooling: str) -> dict[str, Any]:
    """Everything that is measured with one of the settings."""
    channels, *more = config.channels
    size, results = (config.height, config.width), {}
    if config.memory:  # before this process holds the dense buffers
        names = list(dense_variants(make_task(SMALLER, 3, pooling, config.device), 1))
        results["peak bytes"] = {
            name: added_memory(make_run, config, name, pooling, channels, device=config.device)
            for name in ("token", *names)
        }
    task = make_task(size, channels, pooling, config.device)
    wider = {count: replace(task, tokens=task.triplet.tokens(count)) for count in more}
    operator = task.build()
    with tempfile.TemporaryDirectory() as folder:
        cache = OperatorCache(Path(folder), 1e9)
        cache.put(KEY, replace(operator, coverage=operator.coverage.contiguous()))
        tokens_only: dict[str, Callable[[], Run]] = {"token": task.token, "cached": lambda: task.cached(cache)}
        tokens_only |= {f"token {count}": other.token for count, other in wider.items()}
        if config.device == "cpu":
            tokens_only["token, one thread"] = lambda: task.token(1)
        token_times, tokens = take_turns(tokens_only, config.token_repeats)
        results["bytes on disk"] = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
        results["differences, token"] = agreement({name: tokens[name] for name in ("token", "cached")}, "token")
        parts = [operator.points, operator.regions, operator.shares]
        results["operator"] = {
            name: {
                "entries": len(part.values),
                "bytes": sum(x.nbytes for x in (part.starts, part.columns, part.values)),
            }
            for name, part in zip(("points", "regions", "shares"), parts, strict=True)
            if part is not None
        }
        if config.device == "cpu":
            stages(task)
            taken = [stages(task) for _ in range(config.token_repeats)]
            results["stages, ms"] = {
                name: [1e3 * value for value in quartiles([one[name].wall for one in taken])] for name in taken[0]
            }
        results["differences"], times = {}, {}
        variants = {"token": task.token, **dense_variants(task, config.passes)}
        if more:
            second = wider[more[0]]
            variants[f"token {more[0]}"] = second.token
            variants[f"all_channels {more[0]}"] = dense_variants(second, config.passes)["all_channels"]
        times, tokens = take_turns(variants, config.repeats)
    first = {name: found for name, found in tokens.items() if not name[-1].isdigit() or name == "chunk32"}
    results["differences"] = agreement(first, "token")
    if more:
        pair = {name: tokens[name] for name in (f"token {more[0]}", f"all_channels {more[0]}")}
        results["differences"] |= agreement(pair, f"token {more[0]}")
    results["seconds"] = {
        name: {clock: quartiles([getattr(one, clock) for one in taken]) for clock in ("wall", "cpu")}
        for name, taken in times.items()
    }
    results["seconds, token alone"] = {
        name: {clock: quartiles([getattr(one, clock) for one in taken]) for clock in ("wall", "cpu")}
        for name, taken in token_times.items()
    }
    over = {f"{name}_over_token": ratios(taken, times["token"]) for name, taken in times.items() if name in first}
    if more:
        name = f"all_channels_{more[0]}_over_token"
        over[name] = ratios(times[f"all_channels {more[0]}"], times[f"token {more[0]}"])
    over["cached_over_token"] = ratios(token_times["cached"], token_times["token"])
    for count in more:
        over[f"token_{count}_over_{channels}"] = ratios(token_times[f"token {count}"], token_times["token"])
    if config.device == "cpu":
        over["one_thread_over_two"] = ratios(token_times["token, one thread"], token_times["token"])
    del over["token_over_token"]
    results["ratios"] = over
    results["cpu ratios"] = {
        f"{name}_over_token": ratios(taken, times["token"], "cpu") for name, taken in times.items() if name in first
    }
    return results


def exactness() -> dict[str, float]:
    """How far apart the operator and dense maps are on the CPU, for random tokens of unit variance."""
    found: dict[str, float] = {}
    for pooling, settings in SETTINGS.items():
        triplet = make_triplet(*SMALL)
        tokens = triplet.tokens(64)
        task = Task(triplet, tokens, settings)
        single = task.token().tokens
        precise = replace(
            triplet,
            gaussians=triplet.gaussians.to(dtype=torch.float64),
            target=triplet.target.to(dtype=torch.float64),
        )
        twin = _dense(precise, tokens.double(), settings)
        double = Task(precise, tokens.double(), settings).token().tokens
        same_hits = _dense(triplet, tokens, settings)
        found[f"{pooling}: float32, same hits"] = float((single - _finely_summed(task)).abs().max())
        found[f"{pooling}: float32, same hits, dense sums over regions in float32"] = float(
            (single - same_hits).abs().max()
        )
        found[f"{pooling}: float64, same hits"] = float((double - twin).abs().max())
        difference = (single - twin).abs()
        found[f"{pooling}: float32 and float64 dense, mean"] = float(difference.mean())
        found[f"{pooling}: float32 and float64 dense, largest"] = float(difference.max())
    triplet = make_triplet(*SMALLEST)  # the reference engine is slow
    settings = SETTINGS["released"]
    tokens = triplet.tokens(16)
    features = lift(tokens, triplet.context_masks, triplet.size, settings).features
    images = {
        engine: rasterize(triplet.gaussians, triplet.target, features, engine=engine).features
        for engine in ("numba", "reference")
    }
    pooled = pool(blend(images["reference"], triplet.target_mask, settings.blending), *triplet.grid, "bilinear")
    pairs = {
        "pixels": (images["numba"], images["reference"]),
        "tokens": (Task(triplet, tokens, settings).token().tokens, pooled),
    }
    for name, (one, other) in pairs.items():
        difference = (one - other).abs().flatten()
        found[f"across rasterizers, {name}: mean"] = float(difference.mean())
        found[f"across rasterizers, {name}: p99.9"] = float(torch.quantile(difference, 0.999))
        found[f"across rasterizers, {name}: largest"] = float(difference.max())
    return found


def _finely_summed(task: Task) -> Tensor:
    """Dense maps in float32, blended and pooled in float64: float32 sums over thousands of pixels are off by 1e-5."""
    triplet, settings = task.triplet, task.settings
    features = lift(task.tokens, triplet.context_masks, triplet.size, settings).features
    view = rasterize(triplet.gaussians, triplet.target, features, footprint=settings.footprint)
    return blended_and_pooled(triplet, view.features.double(), view.alpha.double(), settings)


def _dense(triplet: Triplet, tokens: Tensor, settings: SupervisionSettings) -> Tensor:
    return dense_supervision(
        tokens, triplet.context_masks, triplet.size, triplet.gaussians, triplet.target, triplet.target_mask, settings
    ).tokens


def measure(config: SupervisionBenchmark) -> dict[str, Any]:
    """All numbers."""
    load = os.getloadavg()
    triplet = make_triplet(config.height, config.width)
    versions = {"numba": numba.__version__, "numba threads": numba.get_num_threads()}
    results: dict[str, Any] = {
        "machine": machine(**versions, **{"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set")}),
        "settings": {key: value for key, value in asdict(config).items() if key != "json"},
        "scene": {
            "gaussians": len(triplet.gaussians),
            "tokens per view": triplet.grid[0] * triplet.grid[1],
            "target regions": len(torch.unique(triplet.target_mask)),
        },
        "exactness": exactness(),
    }
    for pooling in SETTINGS:
        results[pooling] = measure_pooling(config, pooling)
        short = {name: values[1] for name, values in results[pooling]["ratios"].items()}
        peaks = results[pooling].get("peak bytes", {})
        dense = {name: peak for name, peak in peaks.items() if name != "token"}
        short |= {f"memory_{name}_over_token": peak / peaks["token"] for name, peak in dense.items()}
        results["ratios" if pooling == "released" else f"ratios_{pooling}"] = short
    results["targets"] = targets(results)
    results["load average"] = {"before": load[0], "after": os.getloadavg()[0]}
    return results


def targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, what was measured, and whether that is enough."""
    channels, *more = results["settings"]["channels"]
    widest = more[-1] if more else channels
    least = {
        "all_channels_over_token": 8,
        f"all_channels_{more[0] if more else 0}_over_token": 14,
        "chunk32_over_token": 20,
        "three_channel_over_token": 200,
        "memory_all_channels_over_token": 20,
        "memory_three_channel_over_token": 50,
        "one_thread_over_two": 1.6,
    }
    most = {f"token_{widest}_over_{channels}": 1.2}
    exact = results["exactness"]
    rows = []
    for pooling, key in (("released", "ratios"), ("area", "ratios_area")):
        for bounds, sign in ((least, ">="), (most, "<=")):
            for name, bound in bounds.items():
                value = results[key].get(name)
                if value is not None:
                    holds = value >= bound if sign == ">=" else value <= bound
                    rows.append((f"{pooling}: {name}", f"{sign} {bound:g}", value, holds))
        for name, bound in (("float32, same hits", 5e-6), ("float64, same hits", 1e-12)):
            value = exact[f"{pooling}: {name}"]
            rows.append((f"{pooling}: largest difference, {name}", f"<= {bound:g}", value, value <= bound))
    for kind in ("pixels", "tokens"):
        for name, bound in (("mean", 1e-5), ("p99.9", 5e-4)):
            value = exact[f"across rasterizers, {kind}: {name}"]
            rows.append((f"across rasterizers, {kind}: {name}", f"<= {bound:g}", value, value <= bound))
    return [dict(zip(("target", "required", "measured", "holds"), row, strict=True)) for row in rows]


def show_pooling(config: SupervisionBenchmark, pooling: str, results: dict[str, Any]) -> None:
    """Print what was measured with one of the settings."""
    print(f"\n{pooling}: {config.repeats} runs each in turns, {config.channels[0]} channels if not said otherwise")
    over, peaks = results["ratios"], results.get("peak bytes", {})
    rows = []
    for name, seconds in results["seconds"].items():
        label = f"{name} (from {config.passes} passes)" if name in EXTRAPOLATED else name
        ratio = over.get(f"{name.replace(' ', '_')}_over_token")
        row = [label, with_spread(seconds["wall"], 3), with_spread(seconds["cpu"], 3)]
        cpu = results["cpu ratios"].get(f"{name}_over_token")
        row += [
            with_spread(ratio, 1) if ratio else "",
            f"{cpu[1]:.1f}" if cpu else "",
            f"{results['differences'][name]:.1e}",
        ]
        if peaks:
            peak = peaks.get(name)
            row += ["", ""] if peak is None else [f"{peak / 2**20:.0f}", f"{peak / peaks['token']:.1f}"]
        rows.append(row)
    memory = ["added MiB", "over token"] if peaks else []
    print_table(["variant", "wall s", "cpu s", "wall over token", "cpu", "largest difference", *memory], rows)
    print(f"\n{pooling}, token operator alone: {config.token_repeats} runs each in turns")
    rows = [
        [name, with_spread(seconds["wall"], 4), with_spread(seconds["cpu"], 4)]
        for name, seconds in results["seconds, token alone"].items()
    ]
    print_table(["variant", "wall s", "cpu s"], rows)
    if "stages, ms" in results:
        print_table(["stage", "ms"], [[name, with_spread(ms, 1)] for name, ms in results["stages, ms"].items()])
    rows = [[name, f"{part['entries']}", f"{part['bytes']}"] for name, part in results["operator"].items()]
    print_table(["operator", "entries", "bytes"], rows)
    print(
        f"its file: {results['bytes on disk']} bytes; cached differs by {results['differences, token']['cached']:.1e}"
    )


def show(config: SupervisionBenchmark, results: dict[str, Any]) -> None:
    """Print the numbers."""
    print(described(results["machine"]))
    print(f"{config.height} x {config.width}: {described(results['scene'])}; medians with quartiles")
    print(f"programs that ran, one minute's average: {described(results['load average'])}")
    for pooling in SETTINGS:
        show_pooling(config, pooling, results[pooling])
    print(f"\nexactness at {SMALL[0]} x {SMALL[1]}, across rasterizers at {SMALLEST[0]} x {SMALLEST[1]}")
    print_table(["difference", ""], [[name, f"{value:.1e}"] for name, value in results["exactness"].items()])
    print()
    rows = [
        [row["target"], row["required"], f"{row['measured']:.3g}", "yes" if row["holds"] else "NO"]
        for row in results["targets"]
    ]
    print_table(["target", "required", "measured", "holds"], rows)


def main(config: SupervisionBenchmark) -> None:
    """Measure and print."""
    results = measure(config)
    show(config, results)
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main(tyro.cli(SupervisionBenchmark, description=__doc__))
