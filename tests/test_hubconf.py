"""The repository's own torch.hub entry points."""

import importlib.util
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def test_the_entry_points_build_dinov2_with_the_keys_of_its_checkpoints():
    small = torch.hub.load(str(ROOT), "dinov2_small_snd", source="local", pretrained=False)
    state = small.state_dict()
    assert len(state) == 175 and sum(tensor.numel() for tensor in state.values()) == 22_056_576
    assert state["pos_embed"].shape == (1, 1370, 384) and state["mask_token"].shape == (1, 384)


def test_published_weights_are_loaded_strictly(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("our_hubconf", ROOT / "hubconf.py")
    hubconf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hubconf)
    monkeypatch.setattr(hubconf, "WEIGHTS", f"file://{tmp_path}/dinov2_{{size}}_snd{{variant}}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    state = {
        name: torch.randn_like(tensor)
        for name, tensor in hubconf.dinov2_small_snd(pretrained=False).state_dict().items()
    }
    torch.save(state, tmp_path / "dinov2_small_snd_no_blending.pth")
    loaded = hubconf.dinov2_small_snd(blending=False)
    assert not loaded.training and all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)
    del state["norm.bias"]
    torch.save(state, tmp_path / "dinov2_small_snd.pth")
    with pytest.raises(RuntimeError, match="norm.bias"):
        hubconf.dinov2_small_snd()
