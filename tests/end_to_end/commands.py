"""Running the installed commands as a user does."""

import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

BIN = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "OMP_WAIT_POLICY": "PASSIVE",
    "COLUMNS": "200",
    "HF_HUB_OFFLINE": "1",  # nothing here may download
    "PYTHONWARNINGS": "ignore",
}


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a command in its own process group, output to one pipe."""
    return subprocess.Popen(
        [str(BIN / str(arguments[0])), *map(str, arguments[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def run(*arguments: object, expect: int = 0, timeout: float = 300) -> str:
    """Run a command to its end and return what it printed."""
    process = start(*arguments)
    try:
        printed, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    assert process.returncode == expect, printed[-5000:]
    return printed


def tiny_training(data: Path, outputs: Path, timestamp: str, steps: int, *more: object) -> list[object]:
    """The command line of a short `snd-tiny` run on small images."""
    command: list[object] = ["ns-train", "snd-tiny", "--data", data, "--output-dir", outputs, "--timestamp", timestamp]
    command += ["--experiment-name", "e2e", "--vis", "tensorboard", "--max-num-iterations", steps]
    command += ["--machine.device-type", "cpu", "--pipeline.datamanager.image-size", 56, 84]
    command += ["--pipeline.datamanager.eval-triplets", 3, "--logging.steps-per-log", 1, "--steps-per-save", 10]
    return [*command, "--save-only-latest-checkpoint", "False", *more]


def folder_of(outputs: Path, timestamp: str) -> Path:
    """Where such a run writes."""
    return outputs / "e2e" / "snd-tiny" / timestamp


def curve(run_folder: Path, tag: str) -> dict[int, float]:
    """A scalar's values by step, from the run's event files."""
    events = EventAccumulator(str(run_folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}
