"""The head's cross-entropy with all logits at once, in chunks, and to second order: time, memory, and agreement.

    python benchmarks/head.py --json head.json
    python benchmarks/head.py --tokens 500 --prototypes 8192 --max-logits 1048576

The default is one training step at 576 x 880: 2,542 tokens, the paper's 65,536 prototypes of 256 channels, teacher
and student, with gradients to the student's features and prototypes. Every variant starts from features and
prototypes, whose memory is not counted; the gradients' is. `plain` is the shortest way in torch that keeps
as little as autograd lets it: it computes the loss alone, the others also the KL and the teacher's entropy. Variants
run in turns in one process; memory is measured in a fresh process for each.

The last table shows how far the second order is from the whole, for 64 tokens.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

import torch
import torch.nn.functional as F
import tyro
from measuring import (
    added_memory,
    described,
    in_turns,
    machine,
    print_table,
    quartiles,
    ratios,
    with_spread,
    write_json,
)
from torch import Tensor

from snd_nerfstudio.distillation.losses import MAX_LOGITS, prototype_cross_entropy, quadratic_cross_entropy

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
"""Features and prototypes of the student, with gradient, and of the teacher."""


@dataclass
class HeadBenchmark:
    """What to measure."""

    tokens: int = 2542
    """Tokens of each side."""
    prototypes: int = 65536
    """How many prototypes."""
    channels: int = 256
    """Of a feature and of a prototype."""
    max_logits: tuple[int, ...] = (2**22, MAX_LOGITS, 2**25)
    """Logits of each side to hold at once, one variant each; the second is the package's default."""
    noise: float = 0.05
    """By how much the features of student and teacher differ, per channel, before they are normalised."""
    drift: float = 0.0
    """By how much their prototypes do."""
    temperatures: tuple[float, ...] = (1.0, 0.1, 0.04)
    """Of both sides, for the comparison of the second order with the whole."""
    rounds: int = 5
    """Timed runs of each variant."""
    warmups: int = 1
    """Runs of each variant before that."""
    memory: bool = True
    """Measure memory too, in a process for each variant."""
    device: str = "cpu"
    """Where: cpu or cuda."""
    json: Optional[Path] = None
    """File for the numbers."""


def make_parts(
    sizes: tuple[int, int, int], noise: float, drift: float, device: str, dtype: torch.dtype = torch.float32
) -> Parts:
    """Tokens, prototypes and channels are the sizes; random unit vectors, the student's moved from the teacher's."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = [], []
    for count, moved in zip(sizes[:2], (noise, drift), strict=True):
        rows = F.normalize(torch.randn(count, sizes[2], generator=generator, dtype=dtype), dim=-1)
        change = moved * torch.randn(rows.shape, generator=generator, dtype=dtype)
        teacher.append(rows.to(device))
        student.append(F.normalize(rows + change, dim=-1).to(device).requires_grad_())
    return student[0], student[1], teacher[0], teacher[1]


def configured_parts(config: HeadBenchmark, tokens: Optional[int] = None) -> Parts:
    """The parts that the settings ask for, perhaps with another number of tokens."""
    sizes = (tokens or config.tokens, config.prototypes, config.channels)
    return make_parts(sizes, config.noise, config.drift, config.device)


def plain(parts: Parts, temperature: float = 1.0) -> tuple[Tensor, ...]:
    """Loss and gradients with all logits at once: three matrices of their size at the worst moment, on both ways."""
    features, prototypes, teacher_features, teacher_prototypes = parts
    with torch.no_grad():
        p = F.softmax(F.linear(teacher_features / temperature, teacher_prototypes), dim=-1)
    log_q = F.log_softmax(F.linear(features / temperature, prototypes), dim=-1)
    loss = -(p * log_q).sum() / len(features)
    del p, log_q  # autograd drops them as soon as it can only if nobody else holds them
    return loss.detach(), *torch.autograd.grad(loss, (features, prototypes))


def chunked(parts: Parts, max_logits: int = MAX_LOGITS, temperature: float = 1.0) -> tuple[Tensor, ...]:
    """Loss and gradients in chunks."""
    loss = prototype_cross_entropy(*parts, temperature, temperature, max_logits).cross_entropy
    return loss.detach(), *torch.autograd.grad(loss, parts[:2])


def quadratic(parts: Parts, temperature: float = 1.0) -> tuple[Tensor, ...]:
    """Loss and gradients to second order."""
    loss = quadratic_cross_entropy(*parts, temperature, temperature).cross_entropy
    return loss.detach(), *torch.autograd.grad(loss, parts[:2])


def variants(config: HeadBenchmark) -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[int, ...]]]:
    """Every variant's function and its arguments after the parts."""
    in_chunks = {f"chunked {count}": (chunked, (count,)) for count in config.max_logits}
    return {"plain": (plain, ()), **in_chunks, "quadratic": (quadratic, ())}


def make_run(config: HeadBenchmark, name: str, parts: Optional[Parts] = None) -> Callable[[], tuple[Tensor, ...]]:
    """A run of one variant."""
    function, arguments = variants(config)[name]
    if parts is None:
        parts = configured_parts(config)
    return lambda: function(parts, *arguments)


def agreement() -> dict[str, float]:
    """The largest differences of loss and gradients in float64 from plain, relative to each one's largest value.

    At 100 tokens and 1,000 prototypes, in chunks of 7 tokens, at temperature 0.1.
    """
    parts = make_parts((100, 1000, 64), 0.05, 0.05, "cpu", torch.float64)
    pairs = zip(("loss", "features", "prototypes"), chunked(parts, 7000, 0.1), plain(parts, 0.1), strict=True)
    return {name: float((found - expected).abs().max() / expected.abs().max()) for name, found, expected in pairs}


def second_order(config: HeadBenchmark) -> dict[str, dict[str, float]]:
    """How far the second order is from the whole, by temperature: KL in nats per token, cosines of gradients."""
    parts = configured_parts(config, tokens=64)
    table = {}
    for temperature in config.temperatures:
        exact = prototype_cross_entropy(*parts, temperature, temperature)
        approximate = quadratic_cross_entropy(*parts, temperature, temperature)
        gradients = [torch.autograd.grad(loss.cross_entropy, parts[:2]) for loss in (exact, approximate)]
        to_features, to_prototypes = (
            float(F.cosine_similarity(one.flatten(), other.flatten(), dim=0))
            for one, other in zip(*gradients, strict=True)
        )
        table[f"{temperature:g}"] = {
            "teacher entropy": float(exact.teacher_entropy),
            "teacher entropy, quadratic": float(approximate.teacher_entropy),
            "KL": float(exact.kl),
            "KL, quadratic": float(approximate.kl),
            "gradients' cosine, features": to_features,
            "gradients' cosine, prototypes": to_prototypes,
        }
    return table


def measure(config: HeadBenchmark) -> dict[str, Any]:
    """All numbers."""
    names = list(variants(config))
    results: dict[str, Any] = {
        "machine": machine(),
        "settings": {key: value for key, value in asdict(config).items() if key != "json"},
        "float64 differences": agreement(),
        "second order": second_order(config),
    }
    # before the other variants' inputs stand in this process's memory
    peaks = {name: added_memory(make_run, config, name, device=config.device) for name in names if config.memory}
    parts = configured_parts(config)
    times = in_turns(
        {name: make_run(config, name, parts) for name in names}, config.rounds, config.warmups, config.device
    )
    for name in names:
        results[name] = {
            clock: quartiles([getattr(seconds, clock) for seconds in times[name]]) for clock in ("wall", "cpu")
        }
        results[name]["time over plain"] = ratios(times[name], times["plain"])
        if config.memory:
            results[name]["peak bytes"] = peaks[name]
    default = f"chunked {MAX_LOGITS}"
    shown = {"chunked": default if default in names else names[1], "quadratic": "quadratic"}
    results["ratios"] = {
        f"{short}_over_plain_time": results[name]["time over plain"][1] for short, name in shown.items()
    }
    for short, name in shown.items():
        if config.memory:
            results["ratios"][f"{short}_over_plain_memory"] = peaks[name] / peaks["plain"]
    results["ratios"]["float64_gradient_difference"] = max(
        results["float64 differences"][name] for name in ("features", "prototypes")
    )
    return results


def show(config: HeadBenchmark, results: dict[str, Any]) -> None:
    """Print the numbers."""
    print(described(results["machine"]))
    print(
        f"{config.tokens} tokens, {config.prototypes} prototypes of {config.channels} channels, {config.rounds} runs "
        "each in turns; medians with quartiles"
    )
    rows = []
    for name in variants(config):
        numbers = results[name]
        row = [name, *(with_spread(numbers[key]) for key in ("wall", "cpu", "time over plain"))]
        if config.memory:
            peak = numbers["peak bytes"]
            row += [f"{peak / 2**20:.0f}", f"{peak / results['plain']['peak bytes']:.3f}"]
        rows.append(row)
    memory = ["added MiB", "over plain"] if config.memory else []
    print_table(["variant", "wall s", "cpu s", "wall over plain", *memory], rows)
    differences = {name: f"{value:.1e}" for name, value in results["float64 differences"].items()}
    print("chunked and plain in float64, largest relative difference: " + described(differences))
    table = results["second order"]
    columns = list(next(iter(table.values())))
    print_table(["temperature", *columns], [[t, *(f"{row[c]:.5g}" for c in columns)] for t, row in table.items()])


def main(config: HeadBenchmark) -> None:
    """Measure and print."""
    results = measure(config)
    show(config, results)
    if config.json is not None:
        write_json(config.json, results)


if __name__ == "__main__":
    main(tyro.cli(HeadBenchmark, description=__doc__))
