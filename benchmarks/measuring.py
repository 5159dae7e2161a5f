"""What the benchmarks beside this file share: runs in turns, memory in fresh processes, tables, files.

A script in this folder is started as ``python benchmarks/NAME.py`` and imports from ``measuring``. Everything here
works for the CPU and for CUDA: times and memory are those of ``device``.
"""

import ctypes
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Seconds:
    """How long something took."""

    wall: float
    """By the clock."""
    cpu: float
    """Of all threads together, which other programs disturb less; on CUDA, of the CPU alone."""


def machine(**more: str | int) -> dict[str, str | int]:
    """What figures depend on: processors, threads and versions, and whatever a script adds."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    described: dict[str, str | int] = {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 0,
        "torch threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "numpy": numpy.__version__, "python": platform.python_version()}
    return {**described, **versions, **more}


def timed(run: Callable[[], Result], device: str = "cpu") -> tuple[Seconds, Result]:
    """How long a run took, and what it gave."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    synchronise(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu), result


def in_turns(
    variants: Mapping[str, Callable[[], Any]], rounds: int, warmups: int = 1, device: str = "cpu"
) -> dict[str, list[Seconds]]:
    """Times of some variants in one process: each once, then each once again, so that a slow spell hits all alike.

    Args:
        variants: what to run, by name. What a run gives is dropped before the next.
        rounds: timed runs of each.
        warmups: untimed runs of each before that.
        device: where they run.
    """
    for _ in range(warmups):
        for run in variants.values():
            run()
    times: dict[str, list[Seconds]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            times[name].append(timed(run, device)[0])
    return times


def synchronise(device: str) -> None:
    """Wait for what was started on a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> list[float]:
    """First quartile, median and third quartile; of a single value, that value."""
    if len(values) == 1:
        return [float(values[0])] * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def ratios(one: Sequence[Seconds], other: Sequence[Seconds], clock: str = "wall") -> list[float]:
    """Quartiles of the quotients of runs that were taken in the same round."""
    return quartiles([getattr(a, clock) / getattr(b, clock) for a, b in zip(one, other, strict=True)])


def added_memory(make: Callable[..., Callable[[], Any]], *arguments: Any, device: str = "cpu") -> int:
    """The most that a run adds to the memory of a process that has done nothing before, bytes.

    Args:
        make: gives the run; a function of the script's top level, because the process finds it by its name. What it
            does itself is not counted: inputs are made there, and what has to be compiled is run there.
        arguments: of ``make``.
        device: where it runs.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_of, make, arguments, device).result()


def _peak_of(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], device: str) -> int:
    return peak(make(*arguments), device)


def peak(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most that a run adds to this process's memory, or to a GPU's, bytes.

    Memory that the process was given earlier and holds idle is used without being seen, hence `added_memory`.
    """
    if torch.device(device).type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/status").exists():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    """A field of /proc/self/status, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def described(values: Mapping[str, Any]) -> str:
    """Names and values in one line."""
    return ", ".join(f"{name} {value}" for name, value in values.items())


def with_spread(values: Sequence[float], digits: int = 2) -> str:
    """A median with its quartiles in brackets."""
    low, middle, high = values
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as what stands in them: the first to the left, the rest to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())


def write_json(path: Path, results: Mapping[str, Any]) -> None:
    """Write the figures; the file is there whole, or not at all."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)
