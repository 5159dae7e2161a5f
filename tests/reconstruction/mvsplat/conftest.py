"""What MVSplat's tests share."""

from pathlib import Path

import pytest
import torch

from snd_nerfstudio.reconstruction.mvsplat import MVSplat
from tests.reconstruction.mvsplat.golden_weights import golden_state


@pytest.fixture(scope="session")
def released_state() -> dict[str, torch.Tensor]:
    """The golden weights under the released code's names, without the prefix."""
    return golden_state()


@pytest.fixture(scope="session")
def released_file(released_state: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden weights in the released layout."""
    path = tmp_path_factory.mktemp("released") / "re10k.ckpt"
    state = {f"encoder.{key}": value for key, value in released_state.items()}
    torch.save({"epoch": 0, "global_step": 300_001, "state_dict": state}, path)
    return path


@pytest.fixture(scope="session")
def released(released_file: Path) -> MVSplat:
    """The released network with the golden weights; do not change it."""
    return MVSplat.from_checkpoint(released_file).eval()
