import subprocess
import sys
import types
from dataclasses import dataclass

from snd_nerfstudio.exporting import ns_export


@dataclass
class Command:
    def main(self):
        pass


def half_made_exporter(monkeypatch):
    module = types.ModuleType("exporter_double")
    monkeypatch.setitem(sys.modules, "exporter_double", module)
    monkeypatch.setattr(ns_export, "EXPORTER", "exporter_double")
    return module


def finish(module):
    """What the rest of the exporter's module body does."""
    exec("from typing import Union\nCommands = Union[int, str]\ndef entrypoint():\n    return Commands\n", vars(module))


def test_two_plugins_that_do_the_same_stack(monkeypatch):
    module = half_made_exporter(monkeypatch)
    assert ns_export.install(Command, "one") and ns_export.install(Command, "two")
    finish(module)
    assert module.entrypoint is module.entrypoint
    commands = module.entrypoint()
    assert len(commands.__args__) == 4


def test_nothing_happens_outside_of_ns_export(monkeypatch):
    monkeypatch.setattr(ns_export, "EXPORTER", "never_imported")
    assert not ns_export.install(Command, "one")
    module = half_made_exporter(monkeypatch)
    finish(module)
    assert not ns_export.install(Command, "one") and type(module) is types.ModuleType


def test_snd_export_lists_the_command_without_loading_open3d():
    program = (
        "import sys; sys.argv = ['snd-export', '--help']\n"
        "from snd_nerfstudio.exporting.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'open3d', 'torch'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        check=False, args=[sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert all(name in result.stdout for name in ("snd-backbone", "snd-gaussians", "snd-mvsplat"))
