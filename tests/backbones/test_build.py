import pytest
import torch
from safetensors.torch import load_file, save_file

from snd_nerfstudio.backbones.build import build_backbone, build_trainable
from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.backbones.variants import RefinedBackbone
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.exporting.backbone import export_backbone


def test_a_backbone_is_built_from_a_file_and_says_what_became_of_it(tmp_path):
    torch.manual_seed(5)
    state = create_vit(BACKBONES["tiny"]).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    backbone = build_trainable("tiny", str(tmp_path / "w.safetensors"), seed=0)
    assert all(torch.equal(tensor, state[name]) for name, tensor in backbone.vit.state_dict().items())
    assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
    assert "62 tensors matched" in backbone.weight_report.summary()
    assert build_trainable("tiny", "random", seed=0).weight_report is None


def test_the_flag_of_the_user_is_in_the_message(tmp_path):
    with pytest.raises(InputError, match="--weights .*nowhere.pth: no such file"):
        build_backbone("tiny", str(tmp_path / "nowhere.pth"), 0, flag="--weights")
    with pytest.raises(InputError, match="no published weights: give --pipeline.model.weights random"):
        build_trainable("tiny", "published", seed=0)


@pytest.mark.parametrize(("positions", "wanted", "expected"), [("timm", None, "timm"), ("timm", "hub", "hub")])
def test_an_export_keeps_the_positions_it_was_trained_with(tmp_path, positions, wanted, expected):
    exported = build_trainable("tiny", "random", seed=0, positions=positions)
    manifest = export_backbone(exported, "timm", tmp_path, {"backbone": "tiny"})
    again = build_trainable("tiny", str(manifest.parent), seed=1, positions=wanted)
    assert again.positions == expected
    images = torch.rand(1, 3, 112, 168)
    with torch.no_grad():
        same = torch.allclose(again(images), exported(images), atol=1e-5)
    assert same == (expected == positions)


def test_baselines_that_are_more_than_a_transformer_give_tokens_but_are_not_trained(tmp_path):
    base = create_vit(BACKBONES["tiny"]).state_dict()
    save_file(base, tmp_path / "base.safetensors")
    adapters = {}
    for index in range(8):
        adapters[f"w_a_{index:03d}"] = torch.randn(4, 96)
        adapters[f"w_b_{index:03d}"] = torch.randn(96, 4)
    refine = {"weight": torch.randn(96, 96, 3, 3), "bias": torch.randn(96)}
    torch.save({**adapters, "state_dict": {"refine_conv": refine}}, tmp_path / "mef.ckpt")
    weights = f"{tmp_path / 'mef.ckpt'}::base={tmp_path / 'base.safetensors'}"
    built = build_backbone("tiny", weights, seed=0)
    assert isinstance(built, RefinedBackbone) and "8" in built.weight_report.summary()
    assert built(torch.rand(1, 3, 28, 42)).shape == (1, 2, 3, 96)
    with pytest.raises(InputError, match="more than a vision transformer .* cannot be trained"):
        build_trainable("tiny", weights, seed=0)


def test_weights_of_an_export_are_those_of_the_model(tmp_path):
    backbone = build_trainable("tiny", "random", seed=0)
    folder = export_backbone(backbone, "timm", tmp_path, {"backbone": "tiny"}).parent
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in backbone.vit.state_dict().items())
