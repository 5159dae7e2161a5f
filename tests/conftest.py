"""What several test files share."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

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
    from nerfstudio.configs.method_configs import all_methods

    config = copy.deepcopy(all_methods["snd-tiny"])
    config.data = rooms
    config.pipeline.datamanager.data = rooms
    config.pipeline.datamanager.image_size = (56, 84)
    config.pipeline.datamanager.eval_triplets = 3
    config.pipeline.model.head.prototypes = 256
    config.output_dir = tmp_path / "outputs"
    config.timestamp = "run"
    config.vis = "tensorboard"
    config.max_num_iterations = 6
    config.machine.device_type = "cpu"
    return config
