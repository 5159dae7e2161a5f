"""Filling the cache ahead of training: exactly what training then reads, however often it was interrupted."""

import copy
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest

from snd_nerfstudio import snd_precompute
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_precompute import Tally, precompute, wanted_triplets

CACHE_FLAG = "--pipeline.datamanager.operator-cache"


@pytest.fixture
def config(tiny_config, tmp_path):
    """Six steps of `snd-tiny`, three held-out triplets, and an empty folder for operators."""
    tiny_config.pipeline.datamanager.operator_cache = tmp_path / "operators"
    return tiny_config


def files_of(config) -> list[Path]:
    folder = config.pipeline.datamanager.operator_cache
    return sorted(path for path in folder.rglob("*") if path.is_file())


def train(config, rank=0):
    """What a training and its evaluations find in the cache."""
    config = copy.deepcopy(config)
    config.pipeline.checked_triplets = 0  # the reconstruction is not measured first
    pipeline = config.pipeline.setup(device="cpu", test_mode="val", local_rank=rank)
    for step in range(config.max_num_iterations):
        pipeline.get_train_loss_dict(step)
    for step in range(0, 400, 50):  # all three held-out ones are among them
        pipeline.get_eval_loss_dict(step)
    assert len({pipeline._eval_triplet_of(step).describe() for step in range(0, 400, 50)}) == 3
    return pipeline.datamanager.operators.statistics


def assert_nothing_missing(config, rank=0):
    statistics = train(config, rank)
    reads = config.max_num_iterations * config.pipeline.datamanager.triplets_per_step + 8
    assert statistics.found == reads
    assert (statistics.missing, statistics.damaged, statistics.written, statistics.turned_away) == (0, 0, 0, 0)


def indices_of(config, rank=0):
    """The triplets of all steps, and the held-out ones."""
    data = copy.deepcopy(config.pipeline).setup(device="cpu", test_mode="test", local_rank=rank).datamanager
    steps = [("train", index) for step in range(config.max_num_iterations) for index in data.step_indices(step)]
    return data, steps, [("eval", index) for index in data.eval_indices]


@pytest.mark.parametrize("profile", ["fixed", "official"])
def test_training_finds_everything_and_nothing_was_built_in_vain(config, profile):
    config.pipeline.profile = profile
    config.pipeline.datamanager.triplets_per_step = 2
    _, steps, held_out = indices_of(config)
    count = len(set(steps)) + len(held_out)
    assert count > 12
    assert precompute(config, processes=1) == Tally(built=count)
    files = files_of(config)
    assert len(files) == count
    assert_nothing_missing(config)
    assert files_of(config) == files


def test_with_a_pool_its_triplets_are_built_and_no_others(config):
    config.pipeline.datamanager.triplet_pool = 4
    config.max_num_iterations = 9
    assert precompute(config, processes=1) == Tally(built=4 + 3) and len(files_of(config)) == 7
    assert_nothing_missing(config)
    config.pipeline.datamanager.triplet_pool = 6  # the first four are the same
    assert precompute(config, processes=1) == Tally(built=2, present=4 + 3)
    assert_nothing_missing(config)


def test_operators_made_by_matching_are_found_by_training(config, mvsplat_file):
    config.pipeline.datamanager.reconstructor = "mvsplat"
    config.pipeline.datamanager.reconstructor_checkpoint = mvsplat_file
    config.max_num_iterations = 3
    assert precompute(config, processes=1) == Tally(built=3 + 3)
    assert_nothing_missing(config)


def test_a_second_run_builds_nothing_and_an_interrupted_one_goes_on(config, capsys, logged):
    everything = precompute(config, processes=1).built
    times = {path: path.stat().st_mtime_ns for path in files_of(config)}
    assert precompute(config, processes=1) == Tally(present=everything)
    assert {path: path.stat().st_mtime_ns for path in files_of(config)} == times
    files = list(times)
    for gone in files[:3]:
        gone.unlink()
    files[3].write_bytes(files[3].read_bytes()[:-1])
    capsys.readouterr()
    assert precompute(config, processes=1) == Tally(built=4, present=everything - 4)
    said = logged()
    assert said.count("is damaged") == 1 and f"4 operators built, {everything - 4} were there" in said
    after = {path: path.stat().st_mtime_ns for path in files_of(config)}
    assert set(after) == set(times)
    assert {path for path in files if after[path] != times[path]} == set(files[:4])
    assert_nothing_missing(config)


def test_another_blending_needs_nothing_new_and_another_setting_all_of_it(config):
    config.pipeline.model.supervision.blending = 1.0
    everything = precompute(config, processes=1).built
    config.pipeline.model.supervision.blending = 0.3
    assert precompute(config, processes=1) == Tally(present=everything)
    assert_nothing_missing(config)
    config.pipeline.model.supervision.pooling = "bilinear"
    assert precompute(config, processes=1) == Tally(built=everything)


def test_a_cache_that_is_too_small_is_counted_and_said(config, capsys, logged):
    config.max_num_iterations = 2
    precompute(config, processes=1)
    size = max(path.stat().st_size for path in files_of(config))
    for path in files_of(config):
        path.unlink()
    config.pipeline.datamanager.operator_cache_limit = 2.5 * size / 1e9
    capsys.readouterr()
    tally = precompute(config, processes=1)
    said = logged()
    assert tally.built == len(files_of(config)) >= 2 and tally.turned_away == 5 - tally.built
    assert said.count("is full") == 1 and f"{CACHE_FLAG}-limit" in said and f"{tally.turned_away} turned away" in said


def test_pairs_that_cannot_be_matched_are_skipped(config, monkeypatch):
    from snd_nerfstudio.reconstruction.depth import DepthReconstructor
    from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError

    def unmatched(*_):
        raise DegeneratePairError("they look in opposite directions")

    monkeypatch.setattr(DepthReconstructor, "__call__", unmatched)
    assert precompute(config, processes=1) == Tally(skipped=6 + 3) and files_of(config) == []


# ---------------------------------------------------------------------- which triplets


@pytest.mark.parametrize("items", [1, 2])
def test_without_a_pool_the_triplets_of_all_steps_are_wanted_once_each(config, items):
    config.max_num_iterations = 300
    config.pipeline.datamanager.triplets_per_step = items
    data, steps, held_out = indices_of(config)
    wanted = wanted_triplets(config, data)
    assert len(set(steps)) < len(steps)  # some are drawn twice
    assert len(wanted) == len(set(wanted)) == len(set(steps)) + len(held_out)
    assert set(wanted) == set(steps) | set(held_out) and wanted[-3:] == held_out
    assert wanted[: len(dict.fromkeys(steps))] == list(dict.fromkeys(steps))  # in the order of training


def test_growing_gaps_are_those_of_training(config):
    data_config = config.pipeline.datamanager
    data_config.min_context_gap, data_config.initial_max_context_gap, data_config.gap_warmup_steps = 4, 4, 5
    assert precompute(config, processes=1).built > 3
    assert_nothing_missing(config)


@pytest.mark.parametrize("pool", [None, 3])
def test_the_triplets_of_every_rank_are_wanted(config, pool):
    config.max_num_iterations = 4
    config.pipeline.datamanager.triplet_pool = pool
    config.machine.num_devices = 2
    ranks = [indices_of(config, rank) for rank in (0, 1)]
    expected = set(ranks[0][1]) | set(ranks[1][1]) | set(ranks[0][2])
    assert set(ranks[0][1]) != set(ranks[1][1])
    for data, _, _ in ranks:
        own = data.rank
        assert set(wanted_triplets(config, data)) == expected and data.rank == own
    assert precompute(config, processes=1).built == len(expected)
    for rank in (0, 1):
        assert_nothing_missing(config, rank)
    config.machine.num_machines = 2
    fourth = indices_of(config, 3)
    assert set(fourth[1]) <= set(wanted_triplets(config, ranks[0][0])) and not set(fourth[1]) <= expected


def test_several_parts_share_the_work_and_leave_nothing_out(config):
    tallies = []
    for part in range(3):
        found = list(snd_precompute.outcomes(copy.deepcopy(config), part, 3))
        assert {total for _, total in found} == {9}
        tallies.append([outcome for outcome, _ in found])
    assert tallies == [["built"] * 3] * 3 and len(files_of(config)) == 9
    assert list(snd_precompute.outcomes(copy.deepcopy(config), 11, 12)) == []  # more processes than triplets


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("processes", [0, -2])
def test_no_process_at_all_is_refused(config, processes):
    with pytest.raises(InputError, match=f"--processes {processes} must be at least 1"):
        precompute(config, processes=processes)


def test_without_a_folder_there_is_nowhere_to_write_to(tiny_config):
    with pytest.raises(InputError, match=f"{CACHE_FLAG} FOLDER"):
        precompute(tiny_config, processes=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "data", Path("/nowhere")), "--data /nowhere: no such file"),
        (lambda c: setattr(c.pipeline.model, "backbone", "resnet"), "--pipeline.model.backbone resnet: choose one"),
        (lambda c: setattr(c.pipeline, "profile", "mine"), "--pipeline.profile mine"),
        (lambda c: setattr(c.pipeline.datamanager, "operator_cache_limit", 0.0), f"{CACHE_FLAG}-limit"),
        (lambda c: c.pipeline.datamanager.operator_cache.touch(), f"{CACHE_FLAG} .*operators cannot be written to"),
    ],
)
def test_what_is_wrong_is_said(config, change, message):
    change(config)
    with pytest.raises(InputError, match=message):
        precompute(config, processes=1)


def test_a_training_that_refuses_the_cache_is_refused_here_too(config):
    config.pipeline.model.supervision.path = "dense"
    with pytest.raises(InputError, match="supervision.path dense"):
        precompute(config, processes=1)


# ---------------------------------------------------------------------- processes


@pytest.fixture
def same_threads():
    """A worker sets the number of threads of its process, which here is that of the tests."""
    import numba
    import torch

    before = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


def test_a_worker_hands_on_its_outcomes_or_what_is_wrong_and_then_none(config, same_threads):
    results = queue.Queue()
    snd_precompute._work(copy.deepcopy(config), 0, 2, 1, results)
    assert [results.get_nowait() for _ in range(results.qsize())] == [("built", 9)] * 5 + [None]
    config.pipeline.model.backbone = "resnet"
    snd_precompute._work(copy.deepcopy(config), 0, 2, 1, results)
    message, end = results.get_nowait(), results.get_nowait()
    assert "Unknown backbone" in message and end is None and results.empty()


def _die(*_):
    os._exit(7)


def test_a_worker_that_dies_ends_it_all(config, monkeypatch):
    monkeypatch.setattr(snd_precompute, "_work", _die)
    with pytest.raises(RuntimeError, match="exit code 7"):
        list(snd_precompute._from_processes(config, 1))


def _die_beside_a_busy_one(config, part, parts, threads, results):
    if part == 0:
        os._exit(7)
    for _ in range(600):
        results.put(("built", 600))
        time.sleep(0.1)
    results.put(None)


@pytest.mark.slow
def test_a_worker_that_dies_is_noticed_while_another_goes_on(config, monkeypatch):
    monkeypatch.setattr(snd_precompute, "_work", _die_beside_a_busy_one)
    with pytest.raises(RuntimeError, match="exit code 7"):
        list(snd_precompute._from_processes(config, 2))


def test_two_processes_do_what_one_does(config):
    assert precompute(config, processes=2) == Tally(built=9) and len(files_of(config)) == 9
    assert_nothing_missing(config)


# ---------------------------------------------------------------------- the command


def command(monkeypatch, *words):
    """Run it in this process."""
    monkeypatch.setattr(sys, "argv", ["snd-precompute", *map(str, words)])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back afterwards
    snd_precompute.main()


def test_help_names_the_flags_and_the_methods(monkeypatch, logged):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "--help")
    said = logged()
    assert end.value.code in (0, None)
    for part in ("snd-tiny", "snd-correspondence", "operator-cache", "triplet-pool", "--processes"):
        assert part in said, part
    assert "mvsplat" not in said  # there is nothing to precompute for training a reconstructor


def test_the_command_takes_the_flags_of_training_and_its_own(config, monkeypatch, logged):
    flags = {
        "--data": config.data,
        CACHE_FLAG: config.pipeline.datamanager.operator_cache,
        "--machine.device-type": "cpu",
        "--pipeline.datamanager.triplet-pool": 2,
        "--pipeline.datamanager.eval-triplets": 1,
    }
    for group in ("backbone", "head"):  # nerfstudio's default is an integer, which the tests' type checks refuse
        flags[f"--optimizers.{group}.optimizer.weight-decay"] = 0.0
    words = [word for flag in flags.items() for word in flag]
    command(monkeypatch, "--processes", 1, "snd-tiny", *words, "--pipeline.datamanager.image-size", 56, 84)
    assert "3 operators built" in logged() and len(files_of(config)) == 3
    config.pipeline.datamanager.triplet_pool, config.pipeline.datamanager.eval_triplets = 2, 1
    assert precompute(config, processes=1) == Tally(present=3)


def test_an_unknown_method_ends_with_the_known_ones(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        command(monkeypatch, "mvsplat")
    assert end.value.code == 2 and "snd-tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_without_data_ends_the_command_with_one_sentence(tmp_path):
    words = ["--processes", "1", "snd-tiny", "--data", "/nowhere", CACHE_FLAG, str(tmp_path / "operators")]
    result = subprocess.run(
        [sys.executable, "-m", "snd_nerfstudio.snd_precompute", *words],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
        check=False,
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr + result.stdout
    assert "Error: --data /nowhere: no such file or folder" in result.stderr
