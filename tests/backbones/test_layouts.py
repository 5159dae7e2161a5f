"""Conversions are checked against other implementations: transformers, peft, DINOv2's architecture in plain torch."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from snd_nerfstudio.backbones import layouts
from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.timm_models import create_vit
from tests.backbones.models import (
    DINOV3,
    SPECS,
    adapted_model,
    assert_same_state,
    dinov3_spec,
    mef_checkpoint,
    plain_vit,
    random_vit,
    randomised,
    tokens_of,
    transformers_dinov2,
    transformers_dinov3,
)

# ------------------------------------------------------------------ DINOv2


@pytest.mark.parametrize("name", list(SPECS))
def test_a_hub_model_gives_the_same_tokens_in_timm(name):
    hub, images = randomised(plain_vit(name), 1), torch.randn(2, 3, 56, 56)
    converted = layouts.hub_to_timm(hub.state_dict())
    assert converted.set_aside == {"mask_token": layouts.PRETRAINING_ONLY} and converted.unknown == ()
    vit = create_vit(SPECS[name]).eval()
    vit.load_state_dict(converted.state)
    with torch.no_grad():
        expected = hub.forward_features(images)
    parts = [expected["x_norm_clstoken"][:, None], expected["x_norm_regtokens"], expected["x_norm_patchtokens"]]
    torch.testing.assert_close(tokens_of(vit, images), torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SPECS))
def test_timm_to_the_hub_and_back_changes_nothing(name):
    vit = random_vit(SPECS[name], 2)
    hub = layouts.timm_to_hub(vit.state_dict())
    plain = plain_vit(name)
    plain.load_state_dict(hub, strict=True)
    assert_same_state(layouts.hub_to_timm(hub).state, vit.state_dict())
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        patches = plain.forward_features(images)["x_norm_patchtokens"]
    prefix = vit.num_prefix_tokens
    torch.testing.assert_close(tokens_of(vit, images)[:, prefix:], patches, rtol=1e-5, atol=1e-5)


def test_blocks_in_chunks_are_those_of_the_model():
    state = layouts.timm_to_hub(random_vit(SPECS["swiglu"], 3).state_dict())
    chunked = {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", k): v for k, v in state.items()
    }
    assert "blocks.1.3.mlp.w12.weight" in chunked
    assert_same_state(layouts.hub_to_timm(chunked).state, layouts.hub_to_timm(state).state)
    with pytest.raises(layouts.LayoutError, match="twice"):
        layouts.hub_to_timm({**chunked, "blocks.3.norm1.weight": torch.zeros(48)})


def test_unknown_keys_are_named_and_not_dropped():
    state = layouts.timm_to_hub(random_vit(SPECS["plain"], 3).state_dict())
    odd = {**state, "blocks.0.attn.surprise": torch.zeros(1), "blocks.0.mlp.w12.weight": torch.zeros(1)}
    assert layouts.hub_to_timm(odd).unknown == ("blocks.0.attn.surprise", "blocks.0.mlp.w12.weight")
    transformers = layouts.timm_to_transformers(layouts.hub_to_timm(state).state)
    transformers["classifier.weight"] = torch.zeros(1)
    del transformers["encoder.layer.2.attention.attention.key.bias"]
    assert layouts.transformers_to_timm(transformers).unknown == (
        "encoder.layer.2.attention.attention.query.bias",
        "encoder.layer.2.attention.attention.value.bias",
        "classifier.weight",
    )
    for convert in (layouts.timm_to_hub, layouts.timm_to_transformers):
        with pytest.raises(layouts.LayoutError, match=r"1 keys have no name in .* layout \(blocks.0.attn.surprise"):
            convert({**create_vit(SPECS["plain"]).state_dict(), "blocks.0.attn.surprise": torch.zeros(1)})
    with pytest.raises(layouts.LayoutError, match=r"10 keys have no name in the DINOv3 .*\(pos_embed, .*, \.\.\."):
        layouts.timm_to_dinov3({**create_vit(SPECS["plain"]).state_dict(), "blocks.0.attn.surprise": torch.zeros(1)})


@pytest.mark.parametrize("spelling", ["of files", "of modules"])
@pytest.mark.parametrize("name", list(SPECS))
def test_a_transformers_model_gives_the_same_tokens_in_timm(name, spelling, tmp_path):
    model = randomised(transformers_dinov2(name), 4)
    if spelling == "of files":
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert "encoder.layer.0.attention.attention.query.weight" in state
    else:
        state = model.state_dict()
        assert "encoder.layer.0.attention.q_proj.weight" in state
    converted = layouts.transformers_to_timm(state)
    assert converted.unknown == () and list(converted.set_aside) == ["embeddings.mask_token"]
    vit = create_vit(SPECS[name]).eval()
    vit.load_state_dict(converted.state)
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model(images).last_hidden_state
    torch.testing.assert_close(tokens_of(vit, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(SPECS))
def test_transformers_reads_what_timm_is_turned_into(name, tmp_path):
    from safetensors.torch import save_file

    vit, model = random_vit(SPECS[name], 5), transformers_dinov2(name)
    state = layouts.timm_to_transformers(vit.state_dict())
    assert_same_state(layouts.transformers_to_timm(state).state, vit.state_dict())
    model.config.save_pretrained(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        found = loaded.eval()(images).last_hidden_state
    torch.testing.assert_close(found, tokens_of(vit, images), rtol=1e-5, atol=1e-5)


def test_both_spellings_of_one_layer_are_refused():
    state = transformers_dinov2("plain").state_dict()
    state["encoder.layer.0.attention.attention.query.weight"] = torch.zeros(48, 48)
    with pytest.raises(layouts.LayoutError, match="are the same layer"):
        layouts.transformers_to_timm(state)


# ------------------------------------------------------------------ DINOv3


@pytest.mark.parametrize("spelling", ["of files", "of modules"])
@pytest.mark.parametrize("name", list(DINOV3))
def test_a_transformers_dinov3_gives_the_same_tokens_in_timm(name, spelling, tmp_path):
    model = randomised(transformers_dinov3(name), 6)
    if name != "biases":
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if re.search(r"[qv]_proj\.bias", key):
                    parameter.zero_()
    state = model.state_dict()
    if spelling == "of files":
        model.save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        assert "layer.0.attention.q_proj.weight" in state
    converted = layouts.dinov3_to_timm(state, biases=name == "biases")
    assert converted.unknown == () and len(converted.set_aside) == (1 if name == "biases" else 5)
    vit = create_vit(dinov3_spec(name)).eval()
    vit.load_state_dict(converted.state)
    for size in ((224, 224), (96, 176)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(images).last_hidden_state
        torch.testing.assert_close(tokens_of(vit, images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(DINOV3))
def test_transformers_reads_what_timms_dinov3_is_turned_into(name):
    vit, model = random_vit(dinov3_spec(name), 7), transformers_dinov3(name)
    state = layouts.timm_to_dinov3(vit.state_dict())
    assert_same_state(layouts.dinov3_to_timm(state, biases=name == "biases").state, vit.state_dict())
    spelled = {re.sub(r"^layer\.", "model.layer.", key): value for key, value in state.items()}
    model.load_state_dict(spelled, strict=True)
    images = torch.randn(1, 3, 96, 176)
    with torch.no_grad():
        found = model.eval()(images).last_hidden_state
    torch.testing.assert_close(found, tokens_of(vit, images), rtol=1e-5, atol=1e-5)


def test_biases_that_timms_model_cannot_have_are_not_dropped():
    state = layouts.timm_to_dinov3(random_vit(dinov3_spec("mlp"), 8).state_dict())
    state["layer.1.attention.v_proj.bias"] = torch.full((48,), 0.1)
    state["layer.0.attention.k_proj.bias"] = torch.zeros(48)
    converted = layouts.dinov3_to_timm(state)
    assert converted.unknown == ("layer.1.attention.v_proj.bias",)
    assert converted.set_aside["layer.0.attention.k_proj.bias"] == "zero, and the model has no such bias"
    without = {key: value for key, value in state.items() if not re.search(r"[qkv]_proj\.bias", key)}
    filled = layouts.dinov3_to_timm(without, biases=True).state
    assert torch.equal(filled["blocks.0.attn.q_bias"], torch.zeros(48))
    model = transformers_dinov3("mlp", query_bias=False, value_bias=False)
    assert not any("q_proj.bias" in key for key in model.state_dict())


# ------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapted() -> Any:
    return adapted_model(random_vit(SPECS["plain"], 9), rank=6, alpha=9, seed=10)


def test_merged_adapters_are_those_of_peft(adapted):
    state = {key.removeprefix("base_model.model."): value for key, value in adapted.state_dict().items()}
    assert layouts.is_adapted(state)
    plain, adapters = layouts.split_adapters(state)
    assert len(adapters) == 4 * 2 + 1 and adapters["patch_embed.proj"][0].shape == (6, 3, 14, 14)
    vit = create_vit(SPECS["plain"]).eval()
    images = torch.randn(1, 3, 56, 56)
    vit.load_state_dict(layouts.merge_adapters(plain, adapters, 9 / 6))
    with torch.no_grad():
        expected = adapted.base_model.model.forward_features(images)
    torch.testing.assert_close(tokens_of(vit, images), expected, rtol=1e-5, atol=1e-5)
    vit.load_state_dict(plain)
    assert (tokens_of(vit, images) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("blocks.1.attn.qkv.lora_B.default.weight"),
            "1 adapters have one factor only .of blocks.1.attn.qkv",
        ),
        (lambda s: s.pop("blocks.1.attn.qkv.base_layer.weight"), "blocks.1.attn.qkv has no weight of its own"),
        (lambda s: s.update({"norm.lora_magnitude_vector.default.weight": torch.ones(1)}), "not plain LoRA"),
        (lambda s: s.update({"norm.lora_A.other.weight": torch.ones(1)}), "several adapters .default, other"),
        (
            lambda s: s.update({"blocks.0.attn.proj.base_layer.weight": torch.ones(48, 47)}),
            r"proj has shape \(48, 47\)",
        ),
        (
            lambda s: s.update({"blocks.0.attn.proj.lora_A.default.weight": torch.ones(5, 48)}),
            r"shapes \(5, 48\) and \(48, 6\) do not go together",
        ),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(adapted, change, message):
    state = {key.removeprefix("base_model.model."): value for key, value in adapted.state_dict().items()}
    change(state)
    with pytest.raises(layouts.LayoutError, match=message):
        layouts.merge_adapters(*layouts.split_adapters(state), 1.0)


class SlowMEF(nn.Module):
    """As MEF computes it: each adapter's output is added to the queries or values, nothing is merged."""

    def __init__(self, qkv: nn.Linear, checkpoint: dict[str, Any], number: int) -> None:
        super().__init__()
        self.qkv = qkv
        self.factors = [checkpoint[f"w_{half}_{number + role:03d}"] for role in (0, 1) for half in "ab"]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first_q, second_q, first_v, second_v = self.factors
        queries, keys, values = self.qkv(tokens).chunk(3, dim=-1)
        queries = queries + (tokens @ first_q.T) @ second_q.T
        values = values + (tokens @ first_v.T) @ second_v.T
        return torch.cat([queries, keys, values], dim=-1)


def test_mefs_adapters_are_merged_where_it_adds_them():
    spec = dataclasses.replace(SPECS["registers"], timm_arguments={**SPECS["registers"].timm_arguments, "depth": 6})
    slow, checkpoint = random_vit(spec, 11), mef_checkpoint(48, 12)
    base = {key: value.clone() for key, value in slow.state_dict().items()}
    merged, refine = layouts.merge_mef(base, checkpoint)
    changed = [key for key, value in merged.items() if not torch.equal(value, base[key])]
    assert changed == [f"blocks.{number}.attn.qkv.weight" for number in (2, 3, 4, 5)]
    assert torch.equal(refine["bias"], checkpoint["state_dict"]["refine_conv"]["bias"])
    fast = create_vit(spec).eval()
    fast.load_state_dict(merged)
    images = torch.randn(1, 3, 56, 56)
    before = tokens_of(slow, images)
    for j, block in enumerate(slow.blocks[-4:]):
        block.attn.qkv = SlowMEF(block.attn.qkv, checkpoint, 2 * j)
    torch.testing.assert_close(tokens_of(fast, images), tokens_of(slow, images), rtol=1e-5, atol=1e-5)
    assert (tokens_of(slow, images) - before).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("w_b_007"), "16 factors of MEF's adapters .w_b_007"),
        (lambda c: c.update(w_a_008=torch.ones(4, 48)), "w_a_008"),
        (lambda c: c["state_dict"].clear(), "refine_conv is no 3x3 convolution of 48 channels"),
        (lambda c: c["state_dict"]["refine_conv"].update(weight=torch.ones(48, 48, 1, 1)), "refine_conv"),
        (lambda c: c.update(w_b_001=torch.ones(47, 4)), "have 47 channels|do not go together"),
    ],
)
def test_a_partial_checkpoint_of_mef_is_refused(change, message):
    checkpoint = mef_checkpoint(48, 12)
    change(checkpoint)
    with pytest.raises(layouts.LayoutError, match=message):
        layouts.merge_mef(create_vit(SPECS["plain"]).state_dict(), checkpoint)


# ------------------------------------------------------------------ published sizes


def test_the_hub_layout_of_vit_s_is_the_published_one():
    with torch.device("meta"):
        hub = layouts.timm_to_hub(create_vit(BACKBONES["dinov2-small"]).state_dict())
    assert len(hub) == 175 and sum(value.numel() for value in hub.values()) == 22_056_576
    shapes = {key: tuple(value.shape) for key, value in hub.items()}
    assert shapes["pos_embed"] == (1, 1370, 384) and shapes["mask_token"] == (1, 384)
    assert shapes["blocks.11.attn.qkv.weight"] == (1152, 384) and shapes["blocks.0.ls2.gamma"] == (384,)


def test_the_hub_layout_of_vit_g_with_registers_is_the_published_one():
    with torch.device("meta"):
        state = create_vit(BACKBONES["dinov2-giant-registers"]).state_dict()
        hub, transformers = layouts.timm_to_hub(state), layouts.timm_to_transformers(state)
    shapes = {key: tuple(value.shape) for key, value in hub.items()}
    assert shapes["pos_embed"] == (1, 1370, 1536) and shapes["register_tokens"] == (1, 4, 1536)
    assert shapes["blocks.39.mlp.w12.weight"] == (8192, 1536) and shapes["blocks.39.mlp.w3.weight"] == (1536, 4096)
    assert tuple(transformers["encoder.layer.39.mlp.weights_in.bias"].shape) == (8192,)
