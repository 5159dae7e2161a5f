import dataclasses

import pytest
import torch

from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.backbones.registry import BACKBONES, find_backbone
from snd_nerfstudio.backbones.timm_models import create_vit, import_timm
from snd_nerfstudio.backbones.vit import TokenBackbone, token_grid
from snd_nerfstudio.backbones.weights import fingerprint
from snd_nerfstudio.errors import InputError


@pytest.fixture(scope="module")
def tiny() -> TokenBackbone:
    return build_trainable("tiny", "random", seed=3)


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
    first = build_trainable("tiny", "random", seed=3)
    assert torch.equal(torch.rand(1), expected)
    same, other = build_trainable("tiny", "random", seed=3), build_trainable("tiny", "random", seed=4)
    marks = [fingerprint(b.vit.state_dict()).tolist() for b in (first, same, other)]
    assert marks[0] == marks[1] != marks[2]


def test_everything_is_frozen_and_in_eval_mode(tiny):
    assert not any(p.requires_grad for p in tiny.parameters()) and not tiny.training


@pytest.mark.parametrize("block", [0, 2, -1])
@pytest.mark.parametrize("norm", [False, True])
def test_tokens_of_any_block_with_and_without_the_final_norm(tiny, block, norm):
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        x = tiny.vit._pos_embed(tiny.vit.patch_embed(tiny.prepared(images)))
        for layer in tiny.vit.blocks[: block + 1 or None]:
            x = layer(x)
        x = tiny.vit.norm(x) if norm else x
        tokens = tiny.tokens(images, block, norm)
        last = tiny(images)
    torch.testing.assert_close(tokens.patches, x[:, 1:].reshape(2, 2, 3, 96))
    torch.testing.assert_close(tokens.class_token, x[:, 0])
    if block == -1 and norm:
        torch.testing.assert_close(tokens.patches, last)
    with pytest.raises(ValueError, match="block 4 was asked for, .* has 4"):
        tiny.tokens(images, 4)


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "tiny"])
def test_the_registry_says_what_timm_builds(name):
    spec = BACKBONES[name]
    with torch.device("meta"):
        vit = create_vit(spec)
    assert vit.patch_embed.patch_size == (spec.patch, spec.patch)
    assert (vit.num_features, vit.num_prefix_tokens) == (spec.channels, spec.prefix_tokens)
    assert (tuple(vit.pretrained_cfg["mean"]), tuple(vit.pretrained_cfg["std"])) == (spec.mean, spec.std)
    assert spec.source.endswith(vit.pretrained_cfg["hf_hub_id"])
    assert ("apache-2.0" in vit.pretrained_cfg["license"]) == (spec.licence == "Apache-2.0")
    assert (spec.positions == "rotary") == (vit.pos_embed is None)
    if name == "dinov2-small":
        state = vit.state_dict()
        assert len(state) == 174 and state["pos_embed"].shape == (1, 1370, 384)
        assert state["blocks.11.attn.qkv.weight"].shape == (1152, 384) and "blocks.0.ls1.gamma" in state


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", (16, 192, 1, (0.5, 0.5, 0.5), "timm")),
        ("vit_base_patch32_clip_224.openai", (32, 768, 1, (0.48145466, 0.4578275, 0.40821073), "timm")),
        ("vit_small_patch16_dinov3_qkvb.lvd1689m", (16, 384, 5, (0.485, 0.456, 0.406), "rotary")),
    ],
)
def test_any_vision_transformer_of_timm_can_be_named(name, expected):
    spec = find_backbone(name)
    assert (spec.patch, spec.channels, spec.prefix_tokens, spec.mean, spec.positions) == expected
    assert spec.source == f"https://huggingface.co/timm/{name}"
    assert find_backbone("vit_small_patch14_dinov2.lvd142m") is BACKBONES["dinov2-small"]


def test_a_timm_model_and_one_with_rotary_positions_give_tokens():
    plus = {"embed_dim": 96, "depth": 2, "num_heads": 3}
    for name in ("vit_tiny_patch16_224.augreg_in21k", "dinov3-small", "eva02_tiny_patch14_224"):
        spec = find_backbone(name)
        backbone = TokenBackbone(spec, create_vit(dataclasses.replace(spec, timm_arguments=plus))).eval()
        images = torch.rand(1, 3, 4 * spec.patch, 6 * spec.patch + 3)
        with torch.no_grad():
            tokens, named = backbone(images), backbone.tokens(images, norm=True)
        assert tokens.shape == (1, 4, 6, 96)
        torch.testing.assert_close(named.patches, tokens)


def test_licences_are_those_that_timm_states():
    assert find_backbone("vit_small_patch16_dinov3_qkvb.lvd1689m").licence == "DINOv3 License"
    eupe = find_backbone("vit_small_patch16_dinov3_qkvb.eupe_lvd1689m")
    assert eupe.family == "dinov3" and "noncommercial" in eupe.licence


@pytest.mark.parametrize(
    "name", ["resnet50", "swin_tiny_patch4_window7_224", "vit_small_r26_s32_224", "vit_small_patch14_dinov2.nonsense"]
)
def test_other_models_of_timm_are_refused(name):
    with pytest.raises(InputError, match=f"{name} is no vision transformer"):
        find_backbone(name)


def test_an_unknown_name_is_refused_with_what_there_is():
    with pytest.raises(InputError, match="Unknown backbone --backbone dinosaur.*dinov2-small"):
        find_backbone("dinosaur", flag="--backbone")


def test_an_old_timm_is_reported_with_the_command_that_mends_it(monkeypatch):
    monkeypatch.setattr("snd_nerfstudio.backbones.timm_models.version", lambda name: "0.6.7")
    with pytest.raises(InputError, match='pip install -U "timm>=1.0.20,<2"'):
        import_timm()
