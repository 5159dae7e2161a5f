import hashlib

import pytest
import torch
from safetensors.torch import save_file

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.models import ProbeModel, open_model, registry_name
from tests.probing.backbones import concatenated, refined, tiny


def test_names_of_dinov2s_hub_are_known():
    assert registry_name("dinov2_vits14") == "dinov2-small"
    assert registry_name("dinov2_vitb14_reg") == "dinov2-base-registers"
    assert registry_name("vit_small_patch14_dinov2") == "vit_small_patch14_dinov2"


def test_random_weights_are_those_of_the_seed():
    first, again, other = (open_model("tiny=random", seed) for seed in (0, 0, 1))
    states = [model.description["state_sha256"] for model in (first, again, other)]
    assert states[0] == states[1] != states[2]
    assert first.label == "tiny=random" and first.description["seed"] == 0
    assert first.description["key_match"] is None and first.description["weights_source"] == "random"
    assert (first.patch, first.channels, first.class_channels) == (14, 96, 96)
    assert not any(parameter.requires_grad for parameter in first.backbone.parameters())


def test_weights_of_a_file_are_described(tmp_path):
    file = tmp_path / "weights.safetensors"
    state = {key: value.contiguous() for key, value in tiny(4).vit.state_dict().items()}
    save_file(state, file)
    model = open_model(f"tiny={file}", 0)
    about = model.description
    assert about["weights_sha256"] == {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    assert about["weights_source"] == str(file) and about["registry_name"] == "tiny" and about["positions"] == "hub"
    assert about["key_match"]["matched"] == len(state) and about["key_match"]["missing"] == []
    torch.testing.assert_close(model.backbone.vit.cls_token, state["cls_token"], rtol=0, atol=0)
    assert about["state_sha256"] != open_model("tiny=random", 0).description["state_sha256"]


def test_what_nothing_knows_is_refused(tmp_path):
    with pytest.raises(InputError, match="--models dinosaur"):
        open_model("dinosaur=random", 0)
    with pytest.raises(InputError, match="--models .*nothing: no such file"):
        open_model(f"tiny={tmp_path}/nothing", 0)
    with pytest.raises(InputError, match="needs the name of a backbone"):
        open_model("=random", 0)


def test_baselines_say_what_they_are():
    both = ProbeModel.from_backbone("both", concatenated(), weights="fit3d-concat")
    assert (both.channels, both.class_channels, both.description["kind"]) == (192, 96, "concatenated")
    assert both.description["weights"] == "fit3d-concat"
    behind = ProbeModel.from_backbone("mef", refined())
    assert (behind.channels, behind.class_channels, behind.description["kind"]) == (96, 96, "refined")
