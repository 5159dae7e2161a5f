import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.vit import (
    TokenBackbone,
    build_backbone,
    create_vit,
    fingerprint,
    import_timm,
    load_weights,
    token_grid,
)
from snd_nerfstudio.errors import InputError


@pytest.fixture(scope="module")
def tiny() -> TokenBackbone:
    return build_backbone("tiny", "random", seed=3)


def test_tokens_are_timms_normalised_patch_features_on_their_grid(tiny):
    images = torch.rand(2, 3, 28, 42)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = tiny.vit.forward_intermediates(normalised, indices=[-1], norm=True, intermediates_only=True)[0]
        tokens = tiny(images)
    assert tokens.shape == (2, 2, 3, 96) and tiny.channels == 96
    torch.testing.assert_close(tokens, expected.permute(0, 2, 3, 1))


def test_an_image_that_is_no_multiple_of_the_patch_is_resized_bilinearly(tiny):
    image = torch.rand(1, 3, 30, 50)
    resized = torch.nn.functional.interpolate(image, size=(28, 42), mode="bilinear", align_corners=False)
    with torch.no_grad():
        torch.testing.assert_close(tiny(image), tiny(resized))


def test_the_papers_image_has_its_token_grid():
    assert token_grid(576, 880, 14) == (41, 62)
    with pytest.raises(InputError, match="smaller than one patch"):
        token_grid(13, 28, 14)


def test_random_weights_are_drawn_from_the_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = build_backbone("tiny", "random", seed=3)
    assert torch.equal(torch.rand(1), expected)
    same, other = build_backbone("tiny", "random", seed=3), build_backbone("tiny", "random", seed=4)
    marks = [fingerprint(b.vit.state_dict()).tolist() for b in (first, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_everything_is_frozen_and_in_eval_mode(tiny):
    assert not any(p.requires_grad for p in tiny.parameters()) and not tiny.training


@pytest.mark.parametrize("name", ["dinov2-small", "dinov2-base"])
def test_published_models_have_the_architecture_of_dinov2(name):
    with torch.device("meta"):
        vit = create_vit(BACKBONES[name])
    width = {"dinov2-small": 384, "dinov2-base": 768}[name]
    state = vit.state_dict()
    assert len(state) == 174 and state["pos_embed"].shape == (1, 1370, width)
    assert state["blocks.11.attn.qkv.weight"].shape == (3 * width, width) and "blocks.0.ls1.gamma" in state


@pytest.mark.parametrize("layout", ["timm.safetensors", "timm.pth", "hub.pth"])
def test_a_weights_file_is_loaded_strictly(tiny, tmp_path, layout):
    file = tmp_path / layout
    state = {k: v.clone() for k, v in create_vit(BACKBONES["tiny"]).state_dict().items()}
    stored = {**state, "mask_token": torch.zeros(1, 96)} if layout == "hub.pth" else state
    save_file(stored, file) if file.suffix == ".safetensors" else torch.save(stored, file)
    loaded = build_backbone("tiny", str(file), seed=0).vit.state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "1 missing .norm.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected .extra"),
        (lambda s: s.update({"norm.weight": torch.zeros(7)}), "1 of another shape .norm.weight"),
        (lambda s: [s.update({f"base_model.model.{k}": s.pop(k)}) for k in list(s)], "missing"),
    ],
)
def test_a_file_of_another_model_is_refused_with_the_keys(tmp_path, change, message):
    vit = create_vit(BACKBONES["tiny"])
    state = {k: v.clone() for k, v in vit.state_dict().items()}
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=message):
        load_weights(vit, tmp_path / "w.pth")


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"norm.weight": Bomb()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_weights(create_vit(BACKBONES["tiny"]), tmp_path / "w.pth")
    assert not (tmp_path / "exploded").exists()


def test_a_missing_file_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere.pth: no such file"):
        build_backbone("tiny", str(tmp_path / "nowhere.pth"), seed=0)
    with pytest.raises(InputError, match="Unknown backbone.*dinov2-small"):
        build_backbone("resnet", "random", seed=0)
    with pytest.raises(InputError, match="no published weights"):
        build_backbone("tiny", "published", seed=0)


def test_offline_the_error_names_the_address_and_the_flag(monkeypatch):
    # a real failed download: the hub's address is one where nobody listens, and no cache may answer
    program = (
        "from snd_nerfstudio.backbones.vit import build_backbone\n"
        "from snd_nerfstudio.errors import InputError\n"
        "try:\n    build_backbone('dinov2-small', 'published', 0)\n"
        "except InputError as error:\n    print(error)\n"
    )
    import os

    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    printed = subprocess.run(
        check=False, args=[sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120
    )
    assert "huggingface.co/timm/vit_small_patch14_dinov2.lvd142m" in printed.stdout, printed.stderr
    assert "--pipeline.model.weights PATH" in printed.stdout


def test_an_old_timm_is_reported_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.backbones.vit.version", lambda name: "0.6.7")
    with pytest.raises(InputError, match='pip install -U "timm>=1.0.12,<2"'):
        import_timm()
