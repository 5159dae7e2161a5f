import copy

import pytest
import timm
import torch
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer

from snd_nerfstudio.backbones.adaptation import (
    OriginalValues,
    choose_trained,
    compact,
    flags_of,
    trained_modules,
    unused_parameters,
)
from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.backbones.lora import LoRASettings, add_adapters, merged
from snd_nerfstudio.backbones.registry import BackboneSpec
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.errors import InputError

SMALL = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0, "dynamic_img_size": True}


def tokens_of(vit) -> TokenBackbone:
    """A frozen backbone around a small transformer of timm."""
    spec = BackboneSpec(timm_name="small", patch=8, channels=48, licence="", source="")
    return TokenBackbone(spec, vit.requires_grad_(False)).eval()


def small_eva(**settings) -> TokenBackbone:
    """DINOv3's kind of transformer: rotary embedding, registers."""
    torch.manual_seed(0)
    rotary = {"use_rot_pos_emb": True, "rope_type": "dinov3", "use_abs_pos_emb": False, "num_reg_tokens": 2}
    return tokens_of(Eva(img_size=32, global_pool="token", init_values=1.0, **SMALL, **rotary, **settings))


def choose(backbone, trains="lora", last_blocks=4, patch_embed=False, **lora) -> list[str]:
    return choose_trained(backbone, trains, LoRASettings(**lora), patch_embed, last_blocks, seed=1)


def trained(backbone) -> dict:
    return {name: p for name, p in backbone.vit.named_parameters() if p.requires_grad}


def test_the_last_blocks_and_the_final_norm_are_trained_with_all_their_parameters():
    backbone = build_trainable("tiny", "random", seed=0)
    assert compact(choose(backbone, "blocks", last_blocks=2)) == ["blocks.2-3", "norm"]
    names = [name for name, _ in backbone.vit.named_parameters()]
    expected = {name for name in names if name.startswith(("blocks.2", "blocks.3", "norm."))}
    assert trained(backbone).keys() == expected and len(expected) == 2 * 14 + 2


@pytest.mark.parametrize("count", [-1, 0, 5])
def test_blocks_that_the_backbone_does_not_have_are_refused(count):
    with pytest.raises(InputError, match=f"--pipeline.model.last-blocks {count} must be from 1 to 4"):
        choose(build_trainable("tiny", "random", seed=0), "blocks", last_blocks=count)


def test_everything_is_trained_on_request():
    backbone = build_trainable("tiny", "random", seed=0)
    assert choose(backbone, "full") == ["cls_token", "pos_embed", "patch_embed", "blocks", "norm"]
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("trains", ["lora", "blocks", "full"])
@pytest.mark.parametrize("kind", ["tiny", "rotary", "pooling"])
def test_every_trained_parameter_gets_a_gradient_from_patch_tokens(kind, trains):
    if kind == "tiny":
        backbone = build_trainable("tiny", "random", seed=0)
    elif kind == "rotary":
        backbone = small_eva(qkv_bias=True)
    else:
        backbone = tokens_of(VisionTransformer(img_size=32, global_pool="map", **SMALL))
    choose(backbone, trains, last_blocks=1, patch_embed=True)
    with torch.no_grad():
        for name, parameter in trained(backbone).items():
            if "lora_B" in name:
                parameter += 0.1
    side = 3 * backbone.spec.patch
    backbone(torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert trained(backbone) and not [name for name, p in trained(backbone).items() if p.grad is None]
    assert not [name for name, p in trained(backbone).items() if "bias" not in name and not p.grad.any()]


def test_what_patch_tokens_do_not_depend_on_stays_frozen():
    backbone = tokens_of(VisionTransformer(img_size=32, global_pool="map", **SMALL))
    pooling = {f"attn_pool.{name}" for name, _ in backbone.vit.attn_pool.named_parameters()}
    assert len(pooling) > 5
    assert choose(backbone, "full") == ["cls_token", "pos_embed", "patch_embed", "blocks", "norm"]
    everything = {name for name, _ in backbone.vit.named_parameters()}
    assert everything - trained(backbone).keys() == pooling
    backbone.requires_grad_(True)
    assert set(unused_parameters(backbone)) == pooling


# ---------------------------------------------------------------------- adapters in other transformers


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"qkv_bias": False}, "{qkv,proj}"),  # DINOv3 as it was published
        ({"qkv_bias": True}, "{qkv,proj}"),
        ({"qkv_fused": False}, "{q_proj,k_proj,v_proj,proj}"),
    ],
)
def test_adapters_find_the_projections_of_dinov3_s_kind_of_transformer_and_act_on_tokens(settings, names):
    backbone = small_eva(**settings)
    image = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in backbone.vit.named_parameters():
            if name.endswith(("q_bias", "v_bias")):  # or a bias that got lost would not show
                parameter += 0.5
        before = backbone(image)
        assert compact(choose(backbone)) == [f"blocks.0-1.attn.{names}"]
        torch.testing.assert_close(backbone(image), before)
        values = {name: p.detach().clone() for name, p in trained(backbone).items()}
        for layer in {name.split(".lora_")[0] for name in values}:
            second = f"{layer}.lora_B.default.weight"
            one = {**values, second: torch.randn_like(values[second])}
            changed = copy.deepcopy(backbone)
            changed.vit.load_state_dict(one, strict=False)
            adapted = changed(image)
            assert (adapted - before).abs().max() > 1e-3, layer
            plain = tokens_of(merged(backbone.vit, one))
            torch.testing.assert_close(plain(image), adapted, rtol=0, atol=1e-5)


def test_the_patch_embedding_of_dinov3_is_adapted_on_request():
    assert compact(choose(small_eva(), patch_embed=True)) == ["patch_embed.proj", "blocks.0-1.attn.{qkv,proj}"]


def test_adapters_that_an_attention_passes_by_are_refused(monkeypatch):
    # as in timm before it could call qkv as a layer and add the bias afterwards
    monkeypatch.setattr(EvaAttention, "qkv_bias_separate", property(lambda _: False, lambda *_: None), raising=False)
    with pytest.raises(InputError, match=r"trains lora: adapters at blocks.0-1.attn.qkv do nothing .*Update timm"):
        choose(small_eva(qkv_bias=True))


@pytest.mark.parametrize("patch_embed", [False, True])
def test_a_backbone_without_such_layers_is_named(patch_embed):
    mixer = timm.create_model("mixer_s16_224", num_classes=0)
    message = r"trains lora: this backbone \(MlpMixer\) has no layers .*--pipeline.model.backbone"
    with pytest.raises(InputError, match=message):
        add_adapters(mixer, LoRASettings(), patch_embed, seed=0)


# ---------------------------------------------------------------------- descriptions


def test_paths_that_differ_in_a_number_or_the_last_name_are_put_together():
    attention = [f"blocks.{i}.attn.{name}" for i in range(12) for name in ("qkv", "proj")]
    assert compact(["patch_embed.proj", *attention]) == ["patch_embed.proj", "blocks.0-11.attn.{qkv,proj}"]
    assert compact(["blocks.0.attn.qkv", "blocks.1.attn.qkv", "blocks.1.attn.proj"]) == [
        "blocks.0-1.attn.qkv",
        "blocks.1.attn.proj",
    ]
    assert compact([f"blocks.{i}.norm" for i in (7, 0, 3)]) == ["blocks.0,3,7.norm"]
    assert compact(["cls_token", "blocks.9", "blocks.10", "norm"]) == ["cls_token", "blocks.9-10", "norm"]
    assert compact(["blocks.3", "fc1", "a.b"]) == ["blocks.3", "fc1", "a.b"] and compact([]) == []


def test_a_module_is_named_as_a_whole_only_if_all_of_it_is_trained():
    vit = build_trainable("tiny", "random", seed=0).vit
    assert trained_modules(vit) == []
    vit.blocks[1].mlp.requires_grad_(True)
    vit.blocks[2].requires_grad_(True)
    vit.blocks[3].mlp.fc1.weight.requires_grad_(True)
    vit.pos_embed.requires_grad_(True)
    assert trained_modules(vit) == ["pos_embed", "blocks.1.mlp", "blocks.2", "blocks.3.mlp.fc1.weight"]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--pipeline.model.trains lora", {"patch_embed": True}),
        ("--pipeline.model.trains full", {"trains": "full"}),
        ("--pipeline.model.trains blocks --pipeline.model.last-blocks 3", {"trains": "blocks", "last_blocks": 3}),
        ("--pipeline.model.trains blocks --pipeline.model.last-blocks 4", {"trains": "blocks", "last_blocks": 4}),
    ],
)
def test_names_of_parameters_tell_how_they_came_to_be_trained(flags, settings):
    backbone = build_trainable("tiny", "random", seed=0)
    choose(backbone, **settings)
    assert flags_of(trained(backbone)) == flags
    assert flags_of([]) is None


# ---------------------------------------------------------------------- before training


def test_original_values_are_copies_of_what_is_trained_on_the_asked_device():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    before = module.weight.detach().clone()
    original = OriginalValues(module)
    with torch.no_grad():
        module.weight += 1
    values = original.on(torch.device("cpu"))
    assert values.keys() == {"weight"} and torch.equal(values["weight"], before)
    assert not values["weight"].requires_grad
    assert original.on(torch.device("meta"))["weight"].is_meta
