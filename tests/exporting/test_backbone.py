import hashlib
import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.vit import create_vit
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.exporting.backbone import MANIFEST, WEIGHTS, export_backbone

TINY = BACKBONES["tiny"]


@pytest.fixture
def vit() -> nn.Module:
    torch.manual_seed(0)
    return create_vit(TINY).eval()


def test_the_file_is_a_timm_model_and_the_manifest_says_which(vit, tmp_path):
    manifest = json.loads(export_backbone(vit, TINY, tmp_path / "new" / "folder", {"step": 7}).read_text())
    file = tmp_path / "new" / "folder" / WEIGHTS
    assert manifest["step"] == 7 and manifest["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest["largest_token_difference_after_reloading"] < 1e-6
    assert set(manifest["versions"]) == {"snd-nerfstudio", "torch", "timm", "peft", "safetensors"}
    fresh = timm.create_model(manifest["timm_model"], pretrained=False, **manifest["timm_arguments"])
    fresh.load_state_dict(load_file(file), strict=True)
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in vit.state_dict().items())


def test_an_export_over_an_older_one_replaces_it_whole(vit, tmp_path):
    export_backbone(vit, TINY, tmp_path, {"step": 1})
    with torch.no_grad():
        vit.norm.bias += 1
    export_backbone(vit, TINY, tmp_path, {"step": 2})
    assert json.loads((tmp_path / MANIFEST).read_text())["step"] == 2
    assert torch.equal(load_file(tmp_path / WEIGHTS)["norm.bias"], vit.norm.bias)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([MANIFEST, WEIGHTS])


def test_a_model_that_reloads_to_other_tokens_is_not_written(vit, tmp_path):
    # a hook is not part of a state dict: the reloaded model lacks it
    vit.norm.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(RuntimeError, match="differ by"):
        export_backbone(vit, TINY, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_the_older_export_alone(vit, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    export_backbone(vit, TINY, tmp_path, {"step": 1})

    def no_space(state, file, metadata):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("snd_nerfstudio.exporting.backbone.save_file", no_space)
    with pytest.raises(InputError, match="No space left"):
        export_backbone(vit, TINY, tmp_path, {"step": 2})
    assert json.loads((tmp_path / MANIFEST).read_text())["step"] == 1
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([MANIFEST, WEIGHTS])


def test_a_folder_that_cannot_be_written_is_named(vit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output-dir .*file cannot be written"):
        export_backbone(vit, TINY, tmp_path / "file", {})
