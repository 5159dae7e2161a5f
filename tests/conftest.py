"""What several test files share."""

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

SMALL_MVSPLAT = {
    "candidates": 8,
    "stem_channels": 8,
    "middle_channels": 12,
    "feature_channels": 16,
    "transformer_blocks": 2,
    "cost_channels": 32,
    "depth_channels": 32,
    "harmonics": 4,
}
"""Sizes of an MVSplat whose training steps take a tenth of a second."""
SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """Loads vectors that were computed with the original code; skips where they are not at hand."""

    def load(name: str) -> dict[str, torch.Tensor]:
        file = SHARED / "golden" / f"{name}.safetensors"
        if not file.is_file():
            pytest.skip(f"golden vectors are not at hand ({file.name})")
        return load_file(file)

    return load


@pytest.fixture(scope="session")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small procedural rooms, one of them held out."""
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms

    folder = tmp_path_factory.mktemp("data") / "rooms"
    return generate_rooms(RoomsConfig(out=folder, scenes=3, seed=7, height=56, width=84, frames=60))


@pytest.fixture(scope="session")
def packed_rooms(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 24 frames of each of the `rooms` in RealEstate10K's layout."""
    from snd_nerfstudio.scenes.rooms import RoomsConfig, generate_rooms

    folder = tmp_path_factory.mktemp("packed") / "rooms"
    return generate_rooms(RoomsConfig(folder, scenes=3, seed=7, height=56, width=84, frames=24, layout="re10k"))


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Gives what was logged since the last call as one line, without the clock and the source files beside it."""

    def read() -> str:
        return " ".join(re.sub(r"(?m)^\[\d\d:\d\d:\d\d\]|\b\w+\.py:\d+\s*$", "", capsys.readouterr().out).split())

    return read


@pytest.fixture
def with_mvsplat(tiny_config: Any, mvsplat_file: Path) -> Any:
    """`snd-tiny` with a small MVSplat for the rooms' depths of 0.7 to 8."""
    tiny_config.pipeline.datamanager.reconstructor = "mvsplat"
    tiny_config.pipeline.datamanager.reconstructor_checkpoint = mvsplat_file
    return tiny_config


@pytest.fixture
def clean_writers() -> Iterator[None]:
    """Nerfstudio's event writers are global and accumulate from run to run."""
    yield
    from nerfstudio.utils import writer

    writer.EVENT_WRITERS.clear()
    writer.EVENT_STORAGE.clear()
    writer.GLOBAL_BUFFER.clear()


@pytest.fixture
def tiny_config(rooms: Path, tmp_path: Path) -> Any:
    """The real `snd-tiny` on the small rooms: a trainer config that takes well under a second a step."""
    return small_snd_tiny(rooms, tmp_path)


@pytest.fixture(scope="session")
def adapted_run(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.yml of a run whose adapters were changed by much more than its two steps; not to be written to."""
    config = small_snd_tiny(rooms, tmp_path_factory.mktemp("run"))
    from nerfstudio.utils import writer  # not before its methods: nerfstudio's imports go in a circle

    config.max_num_iterations = 2
    config.save_config()
    trainer = config.setup()
    trainer.setup()
    with torch.no_grad():
        for name, parameter in trainer.pipeline.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    trainer.train()
    for known in (writer.EVENT_WRITERS, writer.EVENT_STORAGE, writer.GLOBAL_BUFFER):
        known.clear()
    return config.get_base_dir() / "config.yml"


def small_snd_tiny(rooms: Path, folder: Path) -> Any:
    """A trainer config of `snd-tiny` for small images and few prototypes."""
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods["snd-tiny"])
    config.pipeline.datamanager.image_size = (56, 84)
    config.pipeline.model.head.prototypes = 256
    return on_small_rooms(config, rooms, folder)


@pytest.fixture
def tiny_mvsplat_config(rooms: Path, tmp_path: Path) -> Any:
    """The real `mvsplat-tiny` on the small rooms, smaller still: a step takes a tenth of a second."""
    from nerfstudio.configs.method_configs import all_methods

    from snd_nerfstudio.reconstruction.mvsplat.settings import NetworkSizes

    config = copy.deepcopy(all_methods["mvsplat-tiny"])
    config.pipeline.datamanager.image_size = (32, 48)
    config.pipeline.datamanager.targets_per_pair = 2
    config.pipeline.model.sizes = NetworkSizes(**SMALL_MVSPLAT)
    config.pipeline.model.lpips_weight = 0.0
    return on_small_rooms(config, rooms, tmp_path)


def on_small_rooms(config: Any, rooms: Path, folder: Path) -> Any:
    """What all methods' small test runs have in common."""
    config.data = rooms
    config.pipeline.datamanager.data = rooms
    config.pipeline.datamanager.eval_triplets = 3
    config.output_dir = folder / "outputs"
    config.timestamp = "run"
    config.vis = "tensorboard"
    config.max_num_iterations = 6
    config.machine.device_type = "cpu"
    return config


@pytest.fixture(scope="session")
def mvsplat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained MVSplat for the rooms' depths (0.7 to 8), exported in the released layout."""
    from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings
    from snd_nerfstudio.reconstruction.mvsplat.checkpoints import write_official

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MVSplat(MVSplatSettings(**SMALL_MVSPLAT, near=0.7, far=8.0))
    path = tmp_path_factory.mktemp("mvsplat") / "mvsplat.ckpt"
    write_official(network, network.settings, path, {"global_step": 0})
    return path
