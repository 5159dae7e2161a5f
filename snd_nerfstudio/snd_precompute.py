"""``snd-precompute``: fill a cache of token operators ahead of training, in several processes."""

import dataclasses
import multiprocessing
import os
import queue
import sys
from dataclasses import dataclass
from typing import Any, Iterator, List, Optional, Tuple

import torch
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from snd_nerfstudio.errors import BrokenFileError, InputError, show_input_errors_without_traceback


@dataclass
class Tally:
    """What became of the triplets."""

    present: int = 0
    """Their operator was in the cache, and whole."""
    built: int = 0
    skipped: int = 0
    """The reconstructor cannot match their contexts; training skips them too."""
    turned_away: int = 0
    """The cache is full."""

    def add(self, outcome: str) -> None:
        """Count one."""
        setattr(self, outcome, getattr(self, outcome) + 1)


def wanted_triplets(config: Any, data: Any) -> List[Tuple[str, Any]]:
    """Every triplet that the training will look at, each once: split and index.

    Args:
        config: of the trainer.
        data: the datamanager.
    """
    own_rank, wanted = data.rank, {}
    for rank in range(config.machine.num_devices * config.machine.num_machines):
        data.rank = rank
        if config.pipeline.datamanager.triplet_pool is None:
            for step in range(config.max_num_iterations):
                wanted.update(dict.fromkeys(("train", index) for index in data.step_indices(step)))
        else:
            pool = range(config.pipeline.datamanager.triplet_pool)
            wanted.update(dict.fromkeys(("train", data.pool_index(number)) for number in pool))
    data.rank = own_rank
    wanted.update(dict.fromkeys(("eval", index) for index in data.eval_indices))
    return list(wanted)


def outcomes(config: Any, part: int, parts: int) -> Iterator[Tuple[str, int]]:
    """Build what is missing of every ``parts``-th triplet; after each one what became of it, and how many there are.

    Args:
        config: of the trainer, as the user gave it.
        part: the first triplet's number.
        parts: how many processes share the work.
    """
    from snd_nerfstudio.backbones.registry import find_backbone
    from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError
    from snd_nerfstudio.scenes.prefetch import Prefetcher
    from snd_nerfstudio.snd_pipeline import check_cache, resolved
    from snd_nerfstudio.supervision.operator_maker import OperatorMaker

    pipeline = resolved(config.pipeline)
    check_cache(pipeline)
    model = pipeline.model
    patch = find_backbone(model.backbone).patch
    maker = OperatorMaker(model.supervision.settings(), patch, model.supervision.uncovered == "zero")
    data = pipeline.datamanager.setup(device=config.machine.device_type, test_mode="inference", seed=pipeline.seed)
    frames = {"train": data.train_frames, "eval": data.eval_frames}
    wanted = wanted_triplets(config, data)
    mine = wanted[part::parts]

    def load(place: int) -> Any:
        """A triplet, or why it cannot be read; None beyond the last."""
        if place >= len(mine):
            return None
        try:
            return data.load(frames[mine[place][0]], mine[place][1])
        except BrokenFileError as error:
            return error

    loader = Prefetcher(load, pipeline.datamanager.workers, pipeline.datamanager.prefetch)
    for place in range(len(mine)):
        triplet = loader.get(place)
        if isinstance(triplet, BrokenFileError):
            data.faults.note(triplet, "a triplet")
            yield "skipped", len(wanted)
            continue
        assert triplet is not None
        key = maker.key(triplet, data.reconstructor_description)
        outcome = "present"
        if data.operators.get(key) is None:
            triplet = triplet.to(config.machine.device_type)
            try:
                operator = maker.make(triplet, data.reconstruct(triplet.context), for_any_blending=True)
                outcome = "built" if data.operators.put(key, operator) else "turned_away"
            except DegeneratePairError:
                outcome = "skipped"
        yield outcome, len(wanted)


def _work(config: Any, part: int, parts: int, threads: int, results: Any) -> None:
    """One process's share; outcomes, an error's text, or None at the end go to the queue."""
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.get_num_threads()))
    try:
        for outcome in outcomes(config, part, parts):
            results.put(outcome)
    except InputError as error:
        results.put(str(error))
    results.put(None)


def _from_processes(config: Any, processes: int) -> Iterator[Tuple[str, int]]:
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA, nor numba's threads
    results = context.Queue()
    threads = max((os.cpu_count() or 1) // processes, 1)
    workers = [
        context.Process(target=_work, args=(config, part, processes, threads, results), daemon=True)
        for part in range(processes)
    ]
    for worker in workers:
        worker.start()
    running = processes
    while running:
        broken = [worker for worker in workers if worker.exitcode not in (None, 0)]
        if broken:
            raise RuntimeError(f"a process of snd-precompute ended with exit code {broken[0].exitcode}")
        try:
            result = results.get(timeout=1.0)
        except queue.Empty:
            continue
        if result is None:
            running -= 1
        elif isinstance(result, str):
            for worker in workers:
                worker.terminate()
            raise InputError(result)
        else:
            yield result
    for worker in workers:
        worker.join()


def precompute(config: Any, processes: Optional[int] = None) -> Tally:
    """Fill the cache for every triplet of a training; what is there already is only read.

    Args:
        config: of the trainer, as ``ns-train`` would get it.
        processes: None for one per two cores on the CPU, at most 8, and one on CUDA.

    Raises:
        InputError: no cache is named, or what training would raise.
    """
    from nerfstudio.utils.rich_utils import CONSOLE

    if config.data:
        config = dataclasses.replace(config)
        config.pipeline.datamanager.data = config.data
    cache = config.pipeline.datamanager.operator_cache
    if cache is None:
        raise InputError("Say where to: --pipeline.datamanager.operator-cache FOLDER.")
    if processes is None:
        on_cpu = config.machine.device_type == "cpu"
        processes = min(max((os.cpu_count() or 1) // 2, 1), 8) if on_cpu else 1
    if processes < 1:
        raise InputError(f"--processes {processes} must be at least 1.")
    tally = Tally()
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    source = outcomes(config, 0, 1) if processes == 1 else _from_processes(config, processes)
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task("Token operators", total=None)
        for outcome, total in source:
            tally.add(outcome)
            progress.update(task, total=total, advance=1)
    size = sum(path.stat().st_size for path in cache.glob("??/*.safetensors"))
    CONSOLE.log(
        f"{tally.built} operators built, {tally.present} were there, {tally.skipped} triplets skipped, "
        f"{tally.turned_away} turned away; {cache} holds {size / 1e6:.1f} MB. Train with the same flags."
    )
    return tally


@dataclass
class Options:
    """Flags of its own, before the method's name."""

    processes: Optional[int] = None
    """How many processes build operators. None: one per two cores on the CPU, at most 8, and one on CUDA."""


def main() -> None:
    """Entry point: ``snd-precompute [--processes N] METHOD`` and the flags of ``ns-train METHOD``."""
    show_input_errors_without_traceback()
    from snd_nerfstudio import snd_config

    methods = (snd_config.snd, snd_config.snd_base, snd_config.snd_correspondence, snd_config.snd_tiny)
    configs = {str(spec.config.method_name): spec.config for spec in methods}
    method = tyro.extras.subcommand_type_from_defaults(
        configs, {str(spec.config.method_name): spec.description for spec in methods}
    )
    arguments = sys.argv[1:]
    start = next((place for place, word in enumerate(arguments) if word in configs), 0)
    options = tyro.cli(Options, args=arguments[:start])
    config = tyro.cli(
        method,
        args=arguments[start:],
        description="Fill --pipeline.datamanager.operator-cache for the triplets that ns-train will draw with the same "
        "flags: those of --pipeline.datamanager.triplet-pool, or of all steps. Run again, it goes on where it stopped. "
        "--processes N before the method sets how many processes build (default: one per two cores, one on CUDA).",
    )
    precompute(config, options.processes)


if __name__ == "__main__":
    main()
