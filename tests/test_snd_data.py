"""The command line of `snd-data`, and training on what it writes."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.commands import ENVIRONMENT, run, tiny_training

pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)


def snd_data(*arguments: object, expect: int = 0) -> str:
    """Run `snd-data` to its end and return what it printed."""
    command = [sys.executable, "-m", "snd_nerfstudio.snd_data", *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rooms as ScanNet++'s toolkit has them."""
    from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms

    out = tmp_path_factory.mktemp("toolkit") / "scannetpp"
    return generate_rooms(RoomsConfig(out=out, scenes=2, seed=7, height=112, width=168, frames=16, layout="toolkit"))


def test_help_names_the_commands_and_loads_nothing_heavy():
    assert "scannetpp" in snd_data("--help")
    assert "--semantic-classes" in snd_data("scannetpp", "--help")
    heavy = ("torch", "nerfstudio", "open3d", "cv2", "numba")
    program = f"import sys, snd_nerfstudio.snd_data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "nowhere"], "Error: --data nowhere: no folder `data` in it."),
        (["--height", 4], "Error: --height 4 must be at least 8."),
        (["--processes", 0], "Error: --processes 0 must be at least 1."),
        (["--semantic-classes", "nothing.txt"], "Error: --semantic-classes nothing.txt cannot be read"),
    ],
)
def test_a_wrong_flag_ends_with_one_sentence(download, tmp_path, flags, message):
    printed = snd_data("scannetpp", "--data", download, "--out", tmp_path / "out", *flags, expect=1)
    assert message in printed and "Traceback" not in printed


def test_a_download_is_converted_and_trained_on(download, tmp_path):
    raw = run(*tiny_training(download, tmp_path, "raw", 2), expect=1)
    out = tmp_path / "out"
    assert f"`snd-data scannetpp --data {download} --out {download}_snd`" in raw and "Traceback" not in raw
    flags = ["--height", 56, "--width", 84, "--processes", 2]
    printed = snd_data("scannetpp", "--data", download, "--out", out, *flags)
    assert "2 scenes with 32 frames: 32 written now, 0 were there; 0 frames skipped." in printed
    assert "0 written now, 32 were there" in snd_data("scannetpp", "--data", download, "--out", out, *flags)
    run(*tiny_training(out, tmp_path, "converted", 3))
