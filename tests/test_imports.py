import subprocess
import sys

import pytest


def run(program):
    result = subprocess.run(
        check=False, args=[sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_package_itself_imports_nothing():
    loaded = run("import sys; before = set(sys.modules); import snd_nerfstudio; print(*(set(sys.modules) - before))")
    assert set(loaded.split()) == {"snd_nerfstudio"}


@pytest.mark.parametrize(
    "module",
    [
        "data_parsers.scannetpp",
        *(
            pytest.param(f"data_parsers.{name}", marks=pytest.mark.slow)
            for name in ("nerfstudio_scenes", "re10k", "scannet", "posed_video")
        ),
        "data_parsers.scene_list",
        "snd_nerfstudio.snd_config",
    ],
)
def test_each_entry_point_can_be_the_first_import_of_a_process(module):
    run(f"import {module}")


def test_what_the_entry_points_load_is_light():
    heavy = ("timm", "peft", "transformers", "numba", "open3d")
    program = f"import sys, snd_nerfstudio.snd_config; print([m for m in {heavy} if m in sys.modules])"
    assert run(program).strip() == "[]"


def test_the_data_command_loads_nothing_before_it_knows_what_to_do():
    program = "import sys, snd_nerfstudio.snd_data; print([m for m in ('torch', 'nerfstudio') if m in sys.modules])"
    assert run(program).strip() == "[]"


def test_the_core_packages_do_not_import_nerfstudio():
    program = """
import sys, importlib, pkgutil, snd_nerfstudio
packages = "scenes splatting reconstruction backbones supervision distillation exporting probing"
for package in packages.split():
    root = importlib.import_module(f"snd_nerfstudio.{package}")
    for info in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
print([m for m in sys.modules if m.split(".")[0] == "nerfstudio"])
"""
    assert run(program).strip() == "[]"


def test_all_methods_and_dataparsers_are_registered():
    program = """
from nerfstudio.configs.method_configs import all_methods
from nerfstudio.configs.dataparser_configs import all_dataparsers
print(sorted(m for m in all_methods if m.startswith(("snd", "mvsplat"))))
print(sorted(d for d in all_dataparsers if d.endswith(("-scenes", "scene-list"))))
"""
    methods, dataparsers = run(program).strip().splitlines()[-2:]
    assert methods == "['mvsplat', 'mvsplat-tiny', 'snd', 'snd-base', 'snd-correspondence', 'snd-tiny']"
    ours = ["nerfstudio-scenes", "re10k-scenes", "scannet-scenes", "scannetpp-scenes", "scene-list", "video-scenes"]
    assert dataparsers == str(ours)
