"""Files of every layout with random weights: what is read, what is reported, what is refused."""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from snd_nerfstudio.backbones import downloads, layouts
from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.backbones.variants import ConcatenatedBackbone, RefinedBackbone, with_variant
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import (
    WeightError,
    fingerprint,
    load_backbone_weights,
    parse_request,
    read_weights,
)
from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError
from tests.backbones.models import (
    SPECS,
    adapted_model,
    assert_same_state,
    dinov3_spec,
    mef_checkpoint,
    random_vit,
    tokens_of,
    transformers_dinov2,
)

SPEC = SPECS["plain"]
FLAG = "--pipeline.model.weights"
TENSORS = 4 * 14 + 6
"""Of the small model: 14 for each block; class token, positions, patch embedding and norm."""


def stored(state: dict[str, Any], file: Path) -> str:
    """Write a state dict and give its path as the user would."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in state.items()}, file)
    else:
        torch.save(state, file)
    return str(file)


def load(weights: str, spec=SPEC):
    """What a fresh model is given; the model itself is not touched."""
    vit = create_vit(spec)
    before = fingerprint(vit.state_dict())
    loaded = load_backbone_weights(spec, vit, weights, FLAG)
    assert torch.equal(fingerprint(vit.state_dict()), before)
    return loaded


@pytest.fixture(scope="module")
def vit():
    return random_vit(SPEC, 20)


@pytest.fixture(scope="module")
def state(vit):
    return {key: value.clone() for key, value in vit.state_dict().items()}


# ------------------------------------------------------------------ whole models


def nested_like_dinov2(hub):
    """As DINOv2's training code stores its teacher."""
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_g": torch.zeros(2)}
    return {"teacher": {**{f"backbone.{key}": value for key, value in hub.items()}, **heads}, "iteration": 10}


WHOLE_FILES = {
    "timm.safetensors": lambda hub, timm: timm,
    "timm.pth": lambda hub, timm: timm,
    "hub.pth": lambda hub, timm: hub,
    "nested.pth": lambda hub, timm: {"model": hub, "optimizer": {"state": {}}, "epoch": 3},
    "lightning.ckpt": lambda hub, timm: {"state_dict": {f"model.{k}": v for k, v in timm.items()}, "epoch": 3},
    "ddp.pth": lambda hub, timm: {f"module.backbone.{key}": value for key, value in hub.items()},
    "dinov2-teacher.pth": lambda hub, timm: nested_like_dinov2(hub),
    "transformers.bin": lambda hub, timm: layouts.timm_to_transformers(timm),
}


@pytest.mark.parametrize("name", list(WHOLE_FILES))
def test_a_whole_model_is_read_from_every_layout_and_nesting(name, state, tmp_path):
    file = stored(WHOLE_FILES[name](layouts.timm_to_hub(state), state), tmp_path / name)
    loaded = load(file)
    assert_same_state(loaded.state, state)
    report = loaded.report
    assert report.complete and len(report.matched) == TENSORS == len(state)
    assert report.files == {name: hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    assert report.differing is None and "no published weights" in report.compared
    assert report.layout == {"timm": "timm", "ligh": "timm", "tran": "transformers"}.get(name[:4], "hub")
    if name == "nested.pth":
        assert report.set_aside == {
            "mask_token": "used only while the original itself was trained",
            "optimizer": "bookkeeping of the training",
            "epoch": "bookkeeping of the training",
        }
    if name == "dinov2-teacher.pth":
        assert report.set_aside["ibot_head.last_layer.weight_g"] == "heads of the training"


@pytest.mark.parametrize("name", ["registers", "swiglu"])
def test_registers_and_swiglu_are_read_from_the_hub_and_from_transformers_folders(name, tmp_path):
    spec = SPECS[name]
    timm = random_vit(spec, 21).state_dict()
    assert_same_state(load(stored(layouts.timm_to_hub(timm), tmp_path / "hub.pth"), spec).state, timm)
    model = transformers_dinov2(name)
    model.load_state_dict(layouts.timm_to_transformers(timm), strict=False)
    stored(layouts.timm_to_transformers(timm), tmp_path / "folder" / "model.safetensors")
    assert_same_state(load(str(tmp_path / "folder"), spec).state, timm)


def test_a_folder_in_several_files_is_read_whole(state, tmp_path):
    transformers = layouts.timm_to_transformers(state)
    halves = [dict(list(transformers.items())[part::2]) for part in (0, 1)]
    index = {"weight_map": {}}
    for part, half in enumerate(halves):
        stored(half, tmp_path / f"model-{part}.safetensors")
        index["weight_map"].update({key: f"model-{part}.safetensors" for key in half})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load(str(tmp_path))
    assert_same_state(loaded.state, state)
    assert set(loaded.report.files) == {"model-0.safetensors", "model-1.safetensors"}
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match="model-1.safetensors is missing"):
        load(str(tmp_path))


def test_dinov3_is_read_from_transformers_files(tmp_path):
    spec = dinov3_spec("gated")
    timm = random_vit(spec, 22).state_dict()
    loaded = load(stored(layouts.timm_to_dinov3(timm), tmp_path / "model.safetensors"), spec)
    assert_same_state(loaded.state, timm)
    assert loaded.report.layout == "dinov3-transformers"
    assert sorted(set(loaded.report.set_aside.values())) == [
        "used only while the original itself was trained",
        "zero, and the model has no such bias",
    ]
    with pytest.raises(InputError, match="layout of DINOv3's own code"):
        load(stored({"storage_tokens": torch.zeros(1, 4, 48)}, tmp_path / "meta.pth"), spec)


def test_half_precision_is_widened_and_said(state, tmp_path):
    halved = {key: value.half() for key, value in state.items()}
    loaded = load(stored(halved, tmp_path / "half.safetensors"))
    assert_same_state(loaded.state, {key: value.float() for key, value in halved.items()})
    assert loaded.report.assumptions == ("stored as float16, used as float32",)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), r"1 missing \(norm.weight\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda s: s.update({"norm.weight": torch.zeros(7)}), r"1 of another shape \(norm.weight\)"),
        (
            lambda s: s.update({"norm.weight": torch.zeros(48, dtype=torch.int64)}),
            r"1 of another shape \(norm.weight\)",
        ),
        (lambda s: s.update({"norm.weight": [1.0]}), r"1 missing \(norm.weight\); 1 unexpected \(norm.weight\)"),
        (
            lambda s: [s.pop(key) for key in list(s) if ".3." in key],
            r"14 missing \(blocks.3.attn.proj.bias, .*, \.\.\.\)",
        ),
        # a prefix that only some keys have
        (lambda s: s.update({"module.norm.weight": s.pop("norm.weight")}), "1 missing .*1 unexpected .module.norm"),
        (lambda s: s.update({"norm.weight": torch.full((48,), torch.nan)}), "NaN or infinite value in 1 tensors"),
    ],
)
def test_a_partial_or_wrong_file_is_refused_with_the_counts(state, tmp_path, change, message):
    changed = dict(state)
    change(changed)
    with pytest.raises(InputError, match=message) as caught:
        load(stored(changed, tmp_path / "w.pth"))
    assert str(tmp_path / "w.pth") in str(caught.value) and FLAG in str(caught.value)
    if isinstance(caught.value, WeightError):
        assert not caught.value.report.complete and "vit_small_patch14_dinov2" in str(caught.value)


def test_a_file_of_another_model_is_refused(state, tmp_path):
    file = stored({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(WeightError, match=f"{TENSORS} missing .* 2 unexpected .*seems to be of another model"):
        load(file)
    registers = random_vit(SPECS["registers"], 1).state_dict()
    with pytest.raises(WeightError, match="1 unexpected .reg_token.*1 of another shape .pos_embed"):
        load(stored(registers, tmp_path / "registers.pth"))
    with pytest.raises(WeightError, match="1 missing .reg_token"):
        load(stored(layouts.timm_to_hub(state), tmp_path / "hub.pth"), SPECS["registers"])


def test_a_pickle_that_runs_code_is_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    for file in ("w.pth", "w.ckpt"):
        torch.save({"state_dict": {"norm.weight": torch.ones(1)}, "hyper_parameters": Bomb()}, tmp_path / file)
        with pytest.raises(InputError, match=r"cannot be read as weights: it holds objects .*weights_only=False"):
            load(str(tmp_path / file))
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_weights_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "noise.safetensors").write_bytes(b"not a checkpoint")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"step": 5, "pipeline": {}, "optimizers": {}}, tmp_path / "step-000000005.ckpt")
    for weights, message in (
        ("nowhere.pth", "nowhere.pth: no such file. For vit_small_patch14_dinov2 there are `published`, `random`"),
        ("empty", "is a folder without weights that are known"),
        ("noise.pth", "cannot be read as weights .*damaged"),
        ("noise.safetensors", "cannot be read as weights .*damaged"),
        ("list.pth", "holds a list"),
        ("step-000000005.ckpt", "give the run's config.yml"),
    ):
        with pytest.raises(InputError, match=message):
            load(str(tmp_path / weights))
    with pytest.raises(InputError, match="no published weights"):
        load("published")


@pytest.mark.parametrize("option", ["pupil", "alpha=", "alpha=-1", "alpha=x", "alpha=0", "base=", ""])
def test_an_unknown_option_is_refused(option):
    with pytest.raises(InputError, match="is no option"):
        parse_request(f"file.pth::{option}")


@pytest.mark.parametrize("option", ["student", "teacher", "alpha=8", "base=b.pth"])
def test_an_option_that_would_change_nothing_is_refused(option, state, tmp_path):
    with pytest.raises(InputError, match="Leave it out"):
        load(stored(state, tmp_path / "timm.pth") + f"::{option}")


# ------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapted():
    """Rank 8 and alpha 8, as in the released code, on the hub's keys."""
    return adapted_model(random_vit(SPEC, 23), rank=8, alpha=8, seed=24)


def adapted_tokens(model, images):
    with torch.no_grad():
        return model.base_model.model.forward_features(images)


def loaded_tokens(loaded, images, spec=SPEC):
    fresh = create_vit(spec).eval()
    fresh.load_state_dict(loaded.state)
    return tokens_of(fresh, images)


def test_adapters_that_were_not_merged_are_merged(adapted, tmp_path):
    # the released code adapts the hub's model, which has a mask token besides
    whole = {**adapted.state_dict(), "base_model.model.mask_token": torch.zeros(1, 48)}
    loaded = load(stored(whole, tmp_path / "unmerged.pth"))
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(loaded_tokens(loaded, images), adapted_tokens(adapted, images), rtol=1e-5, atol=1e-5)
    report = loaded.report
    assert (report.layout, report.differing, report.compared) == ("peft", 9, "the base in the same file")
    assert "alpha 8 for adapters of rank 8, as in the released code" in report.assumptions
    without_prefix = {key.removeprefix("base_model.model."): value for key, value in whole.items()}
    assert_same_state(load(stored(without_prefix, tmp_path / "injected.pth")).state, loaded.state)


def test_adapters_are_never_taken_for_plain_weights(adapted, state, tmp_path):
    partial = dict(adapted.state_dict())
    partial.pop("base_model.model.blocks.3.mlp.fc1.weight")
    with pytest.raises(WeightError, match=r"peft layout\): 1 missing .blocks.3.mlp.fc1.weight"):
        load(stored(partial, tmp_path / "partial.pth"))
    without = {key: value for key, value in adapted.state_dict().items() if "lora_" not in key}
    with pytest.raises(InputError, match="layers beneath adapters but no adapters"):
        load(stored(without, tmp_path / "without.pth"))
    stray = {**state, "blocks.0.attn.qkv.lora_A.default.weight": torch.zeros(8, 48)}
    with pytest.raises(InputError, match="1 adapters have one factor only"):
        load(stored(stray, tmp_path / "stray.pth"))


@pytest.mark.parametrize("stabilised", [False, True])
def test_a_folder_of_pefts_says_its_own_scale(stabilised, tmp_path):
    base = random_vit(SPEC, 25)
    file = stored({key: value.clone() for key, value in base.state_dict().items()}, tmp_path / "base.pth")
    model = adapted_model(base, rank=4, alpha=6, seed=26, use_rslora=stabilised)
    model.save_pretrained(tmp_path / "adapters")
    loaded = load(f"{tmp_path / 'adapters'}::base={file}")
    images = torch.randn(1, 3, 56, 56)
    torch.testing.assert_close(loaded_tokens(loaded, images), adapted_tokens(model, images), rtol=1e-5, atol=1e-5)
    assert (loaded.report.differing, loaded.report.compared) == (9, "the base beneath the adapters")
    with pytest.raises(InputError, match="could not be had: .*no published weights.*::base=PATH"):
        load(str(tmp_path / "adapters"))
    file_alone = load(f"{tmp_path / 'adapters' / 'adapter_model.safetensors'}::base={file}")
    assert_same_state(file_alone.state, loaded.state)
    with pytest.raises(InputError, match="::alpha is for low-rank adapters that come without"):
        load(f"{tmp_path / 'adapters'}::base={file}::alpha=3")


def test_adapters_of_unknown_scale_need_their_alpha(tmp_path):
    model = adapted_model(random_vit(SPEC, 27), rank=4, alpha=6, seed=28)
    file = stored(dict(model.state_dict()), tmp_path / "rank4.pth")
    with pytest.raises(InputError, match="rank 4 and nothing in it says their alpha: add ::alpha=NUMBER"):
        load(file)
    images = torch.randn(1, 3, 56, 56)
    tokens = loaded_tokens(load(f"{file}::alpha=6"), images)
    torch.testing.assert_close(tokens, adapted_tokens(model, images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which changes the base"),
        ({"alpha_pattern": {"proj": 3}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type IA3"),
        ({"r": 5}, "have rank 4, its adapter_config.json says 5"),
        ({"r": None}, "no r and lora_alpha"),
    ],
)
def test_other_kinds_of_adapters_are_refused(change, message, adapted, tmp_path):
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "bias": "none", "init_lora_weights": True, **change}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factors = {"lora_A": torch.zeros(4, 48), "lora_B": torch.zeros(144, 4)}
    file = {f"base_model.model.blocks.0.attn.qkv.{name}.weight": value for name, value in factors.items()}
    stored(file, tmp_path / "adapter_model.safetensors")
    base = stored(dict(random_vit(SPEC, 1).state_dict()), tmp_path / "base" / "base.pth")
    with pytest.raises(InputError, match=message):
        load(f"{tmp_path}::base={base}")


def lightning_checkpoint(teacher, student) -> dict[str, Any]:
    """The key layout of the released code's training checkpoints."""
    state = {}
    for which, model in (("teacher", teacher), ("student", student)):
        state |= {f"vit.{which}.backbone.{key}": value for key, value in model.state_dict().items()}
        state[f"vit.{which}.backbone.base_model.model.mask_token"] = torch.zeros(1, 48)
        for layer in ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "last_layer.weight_g", "last_layer.weight_v"):
            state[f"vit.{which}.dino_head.{layer}"] = torch.zeros(3)
    state["vit.dino_backbone.cls_token"] = torch.zeros(1, 1, 48)
    state["encoder.backbone.backbone.conv1.weight"] = torch.zeros(2)
    return {
        "epoch": 0,
        "global_step": 50000,
        "pytorch-lightning_version": "2.2.1",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": None, "kth_value": torch.tensor(1.0)}},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"last_epoch": 5, "base_lrs": [2e-5]}],
        "hparams_name": "cfg",
        "hyper_parameters": {"lr": 2e-5, "lora": {"r": 8}},
    }


def test_teacher_and_student_of_a_lightning_checkpoint(adapted, tmp_path):
    student = adapted_model(random_vit(SPEC, 23), rank=8, alpha=8, seed=29)
    checkpoint = lightning_checkpoint(adapted, student)
    file, images = stored(checkpoint, tmp_path / "step.ckpt"), torch.randn(1, 3, 56, 56)
    for suffix, model in (("", adapted), ("::teacher", adapted), ("::student", student)):
        loaded = load(file + suffix)
        tokens = loaded_tokens(loaded, images)
        torch.testing.assert_close(tokens, adapted_tokens(model, images), rtol=1e-5, atol=1e-5)
    report = loaded.report
    assert (report.layout, report.differing) == ("snd-lightning", 9)
    reasons = {reason: list(report.set_aside.values()).count(reason) for reason in report.set_aside.values()}
    assert reasons == {
        "bookkeeping of the training": 9,
        "used only while the original itself was trained": 1,
        "the other one of teacher and student": len(adapted.state_dict()) + 1,
        "DINO heads": 10,
        "a further copy of the backbone": 1,
        "the reconstructor": 1,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"vit.surprise": torch.zeros(1)}), r"1 unexpected \(vit.surprise\)"),
        (
            lambda s: s.pop("vit.teacher.backbone.base_model.model.blocks.0.norm1.weight"),
            r"snd-lightning layout\): 1 missing \(blocks.0.norm1.weight\)",
        ),
        (lambda s: [s.pop(key) for key in list(s) if key.startswith("vit.teacher.b")], "it has no teacher"),
        (
            lambda s: s.pop("vit.teacher.backbone.base_model.model.blocks.0.attn.qkv.lora_A.default.weight"),
            "1 adapters have one factor only",
        ),
    ],
)
def test_a_partial_lightning_checkpoint_is_refused(adapted, change, message, tmp_path):
    checkpoint = lightning_checkpoint(adapted, adapted)
    change(checkpoint["state_dict"])
    with pytest.raises(InputError, match=message):
        load(stored(checkpoint, tmp_path / "step.ckpt"))


# ------------------------------------------------------------------ MEF and FiT3D


def test_mef_is_a_merged_backbone_and_a_convolution(vit, state, tmp_path):
    checkpoint = mef_checkpoint(48, 30)
    file = stored(checkpoint, tmp_path / "dinov2_base.ckpt")
    base = stored(state, tmp_path / "base.pth")
    loaded = load(f"{file}::base={base}")
    assert (loaded.report.layout, loaded.report.differing) == ("mef", 4)
    assert set(loaded.report.set_aside.values()) == {"bookkeeping of the training"}
    fresh = create_vit(SPEC)
    fresh.load_state_dict(loaded.state)
    backbone = with_variant(TokenBackbone(SPEC, fresh).eval(), loaded)
    assert isinstance(backbone, RefinedBackbone) and backbone.channels == 48 and backbone.spec is SPEC
    images = torch.rand(1, 3, 28, 42)
    tokens = TokenBackbone(SPEC, fresh)(images)[0]
    weight, bias = checkpoint["state_dict"]["refine_conv"].values()
    padded = torch.zeros(4, 5, 48)
    padded[1:3, 1:4] = tokens
    slow = torch.zeros(2, 3, 48)
    for row in range(2):
        for column in range(3):
            patch = padded[row : row + 3, column : column + 3]
            slow[row, column] = bias + torch.einsum("yxc,ocyx->o", patch, weight)
    torch.testing.assert_close(backbone(images)[0], slow, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in backbone.parameters()) and not backbone.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("w_a_003"), "16 factors of MEF's adapters"),
        (lambda c: c.update(surprise=torch.zeros(1)), r"mef layout\): 1 unexpected .surprise"),
        (lambda c: c["state_dict"].update(other={}), r"1 unexpected .state_dict.other"),
    ],
)
def test_a_partial_or_strange_checkpoint_of_mef_is_refused(change, message, state, tmp_path):
    checkpoint = mef_checkpoint(48, 30)
    change(checkpoint)
    file = tmp_path / "mef.ckpt"
    stored(checkpoint, file)
    with pytest.raises(InputError, match=message):
        read_weights(file, SPEC, create_vit(SPEC), FLAG, base=state)


KNOWN_SPEC = dataclasses.replace(
    SPEC, hub_name="dinov2_vits14", source="https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m"
)
"""The small model as if it were DINOv2's ViT-S, so that what is published for that one is looked for."""


@pytest.fixture
def hugging_face_cache(tmp_path, monkeypatch, state):
    """Puts files into a cache as huggingface_hub lays it out, which is offline; the published weights are there."""
    import huggingface_hub.constants

    def put(repository: str, name: str, content: dict[str, Any]) -> Path:
        folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}"
        file = Path(stored(content, folder / "blobs" / name))
        blob = file.rename(file.with_name(sha256(file)))
        for parent in ("refs", "snapshots/abc"):
            (folder / parent).mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc" / name).symlink_to(blob)
        return blob

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    put("timm/vit_small_patch14_dinov2.lvd142m", "model.safetensors", state)
    return put


def test_the_published_weights_tell_how_much_differs(hugging_face_cache, state, tmp_path):
    changed = dict(state)
    for number in range(3):
        changed[f"blocks.{number}.attn.qkv.weight"] = state[f"blocks.{number}.attn.qkv.weight"] + 1e-4
    report = load(stored(layouts.timm_to_hub(changed), tmp_path / "hub.pth"), KNOWN_SPEC).report
    assert (report.differing, report.compared) == (3, "the published weights")
    assert "62 tensors matched, 3 differ from the published weights" in report.summary()
    assert load(stored(state, tmp_path / "same.pth"), KNOWN_SPEC).report.differing == 0


def test_the_published_weights_are_those_that_timm_loads(hugging_face_cache, state):
    loaded = load("published", KNOWN_SPEC)
    assert_same_state(loaded.state, state)
    assert loaded.report.source == f"{KNOWN_SPEC.source}/resolve/main/model.safetensors"
    assert list(loaded.report.files) == ["model.safetensors"] and loaded.report.differing == 0
    for option in ("concat", "student"):
        with pytest.raises(InputError, match="Leave it out"):
            load(f"published::{option}", KNOWN_SPEC)


def test_what_others_published_is_known_by_name(hugging_face_cache, state):
    tuned = {**state, "norm.bias": state["norm.bias"] + 1}
    hugging_face_cache("david-shavin/SnD", "dinov2_small_snd.pth", layouts.timm_to_hub(tuned))
    hugging_face_cache("david-shavin/SnD", "dinov2_small_snd_no_blending.pth", layouts.timm_to_hub(state))
    hugging_face_cache("yuanwenyue/FiT3D", "dinov2_small_finetuned.pth", tuned)
    hugging_face_cache("qq456cvb/3DCorrEnhance", "dinov2_small.ckpt", mef_checkpoint(48, 33))
    snd = load("snd", KNOWN_SPEC)
    assert_same_state(snd.state, tuned)
    assert (snd.report.layout, snd.report.differing) == ("hub", 1)
    assert snd.report.source == "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_small_snd.pth"
    with pytest.raises(WeightError, match="snd_no_blending.pth is the published base itself, unchanged"):
        load("snd-no-blending", KNOWN_SPEC)
    assert load("fit3d", KNOWN_SPEC).original is None
    for weights in ("fit3d-concat", "fit3d::concat"):
        beside = load(weights, KNOWN_SPEC)
        assert beside.original is not None
        assert_same_state(beside.original, state)
        assert_same_state(beside.state, tuned)
    mef = load("mef", KNOWN_SPEC)
    assert (mef.report.layout, mef.report.differing) == ("mef", 4) and mef.refine is not None
    with pytest.raises(InputError, match="::teacher and ::student choose from a run"):
        load("snd::student", KNOWN_SPEC)
    with pytest.raises(InputError, match=r"no such file. For vit_small_patch14_dinov2 .*`snd-no-blending`"):
        load("snd-blended", KNOWN_SPEC)


def test_a_download_of_something_else_is_refused_with_its_address(hugging_face_cache, state):
    hugging_face_cache("david-shavin/SnD", "dinov2_small_snd.pth", {"norm.bias": state["norm.bias"]})
    with pytest.raises(WeightError, match="61 missing .*came from https://huggingface.co/david-shavin/SnD"):
        load("snd", KNOWN_SPEC)


def test_a_report_fits_a_terminal_and_a_manifest(state, tmp_path):
    file = stored({"model": layouts.timm_to_hub(state), "epoch": 3}, tmp_path / "hub.pth")
    report = load(file).report
    assert report.summary() == (
        f"Weights from {file} (hub layout): 62 tensors matched, not compared with the base (it has no published "
        "weights); 1 keys set aside, bookkeeping of the training (epoch); 1 keys set aside, used only while the "
        f"original itself was trained (mask_token); SHA-256 of hub.pth: {report.files['hub.pth'][:12]}...."
    )
    written = json.loads(json.dumps(report.as_dict()))
    assert (written["matched"], written["missing"], written["differing"]) == (62, [], None)
    assert written["set_aside"]["bookkeeping of the training"] == {"count": 1, "first": ["epoch"]}


def test_fine_tuned_tokens_stand_beside_the_original_ones(vit, state, tmp_path):
    original, fine_tuned = TokenBackbone(SPEC, random_vit(SPEC, 31)), TokenBackbone(SPEC, random_vit(SPEC, 32))
    loaded = load(stored(dict(fine_tuned.vit.state_dict()), tmp_path / "fit3d.pth"))
    loaded = dataclasses.replace(loaded, original=dict(original.vit.state_dict()))
    backbone = with_variant(fine_tuned, loaded)
    assert isinstance(backbone, ConcatenatedBackbone) and backbone.channels == 96
    images = torch.rand(2, 3, 28, 42)
    with torch.no_grad():
        expected = torch.cat([original(images), fine_tuned(images)], dim=-1)
    torch.testing.assert_close(backbone(images), expected)
    assert backbone.grid(28, 42) == (2, 3) and (original(images) - fine_tuned(images)).abs().max() > 0.1
    with pytest.raises(InputError, match="no published weights"):
        load(f"{tmp_path / 'fit3d.pth'}::concat")


# ------------------------------------------------------------------ our own


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """What `ns-export snd-backbone` writes of a `tiny` backbone, in three layouts."""
    from snd_nerfstudio.exporting.backbone import export_backbone

    spec, folder = BACKBONES["tiny"], tmp_path_factory.mktemp("export")
    backbone = TokenBackbone(spec, random_vit(spec, 34))
    for name in ("timm", "hub", "transformers"):
        export_backbone(backbone, name, folder, {"backbone": "tiny"})
    return folder, {key: value.clone() for key, value in backbone.vit.state_dict().items()}


@pytest.mark.parametrize("name", ["timm", "hub", "transformers"])
def test_an_export_is_read_again_whatever_its_layout(export, name):
    folder, expected = export
    loaded = load(str(folder / name), BACKBONES["tiny"])
    assert_same_state(loaded.state, expected)
    assert loaded.report.layout == name and loaded.report.assumptions == () and loaded.positions == "hub"
    weights = next(iter(loaded.report.files))
    assert_same_state(load(str(folder / name / weights), BACKBONES["tiny"]).state, expected)


def test_an_export_must_be_what_its_manifest_says(export, tmp_path):
    folder, spec = tmp_path / "timm", BACKBONES["tiny"]
    shutil.copytree(export[0] / "timm", folder)
    assert_same_state(load(str(tmp_path), spec).state, export[1])  # of the folders in it, timm's
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {}}))
    assert load(str(folder), spec).report.assumptions == ("the manifest.json has no checksum of model.safetensors",)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "backbone": "dinov2-base"}))
    with pytest.raises(InputError, match="has the backbone dinov2-base, not vit_small_patch14_dinov2"):
        load(str(folder), spec)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": {"model.safetensors": "0" * 64}}))
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(InputError, match="SHA-256 is .*, expected 000000000000"):
            load(str(path), spec)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing in it"):
        load(str(folder), spec)


def test_a_run_gives_its_teacher_or_its_student(tmp_path):
    methods = pytest.importorskip("nerfstudio.configs.method_configs")
    from snd_nerfstudio.snd_pipeline import load_trained_model, resolved

    config = methods.all_methods["snd-tiny"]
    config = dataclasses.replace(config, pipeline=dataclasses.replace(config.pipeline))
    config.pipeline.model = dataclasses.replace(config.pipeline.model)
    config.pipeline.model.head = dataclasses.replace(config.pipeline.model.head, prototypes=16)
    config.output_dir, config.timestamp, config.experiment_name = tmp_path, "run", "rooms"
    config.save_config()
    run, spec = config.get_base_dir() / "config.yml", BACKBONES["tiny"]
    with pytest.raises(InputError, match="cannot be used as weights: .*no checkpoint"):
        load(str(run), spec)
    pipeline = resolved(config.pipeline)
    model = pipeline.model.setup(scene_box=None, num_train_data=0, seed=pipeline.seed)
    with torch.no_grad():
        for name, parameter in model.student.backbone.named_parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.update_teacher()
    checkpoint = {"step": 7, "pipeline": {f"_model.{key}": value for key, value in model.state_dict().items()}}
    checkpoint["pipeline"]["reconstructor_fingerprint"] = torch.zeros(32, dtype=torch.uint8)
    stored(checkpoint, config.get_checkpoint_dir() / "step-000000007.ckpt")
    trained = load_trained_model(run)[1]
    for weights, which in ((str(run), "teacher"), (f"{run.parent}::student", "student")):
        loaded = load(weights, spec)
        assert_same_state(loaded.state, trained.merged_backbone(which).vit.state_dict())
        assert loaded.report.layout == "run" and list(loaded.report.files) == ["step-000000007.ckpt"]
        assert loaded.report.differing == 4 * 2
    with pytest.raises(InputError, match="has the backbone tiny, not vit_small_patch14_dinov2"):
        load(str(run))


# ------------------------------------------------------------------ downloads


def test_the_addresses_are_those_of_the_authors():
    known = {name: source.url for name, source in downloads.known_weights(BACKBONES["dinov2-small"]).items()}
    assert known == {
        "hub": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "snd": "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_small_snd.pth",
        "snd-no-blending": "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_small_snd_no_blending.pth",
        "fit3d": "https://huggingface.co/yuanwenyue/FiT3D/resolve/main/dinov2_small_finetuned.pth",
        "fit3d-concat": "https://huggingface.co/yuanwenyue/FiT3D/resolve/main/dinov2_small_finetuned.pth",
        "mef": "https://huggingface.co/qq456cvb/3DCorrEnhance/resolve/main/dinov2_small.ckpt",
    }
    registers = downloads.known_weights(BACKBONES["dinov2-small-registers"])
    assert registers["hub"].url.endswith("/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth")
    assert registers["fit3d"].url.endswith("/dinov2_reg_small_finetuned.pth")
    assert set(downloads.known_weights(BACKBONES["dinov2-giant"])) == {"hub", "mef"}
    assert downloads.known_weights(BACKBONES["dinov3-small"]) == downloads.known_weights(SPEC) == {}


def test_what_other_publishers_give_the_same_name_is_kept_apart_and_checked(tmp_path, monkeypatch):
    for publisher in ("first", "second"):
        (tmp_path / "published" / publisher).mkdir(parents=True)
        (tmp_path / "published" / publisher / "weights.pth").write_text(publisher)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "published"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        files = [
            downloads.fetch(downloads.Source(f"{address}/{name}/weights.pth", "MIT"), FLAG)
            for name in ("first", "second")
        ]
        with pytest.raises(InputError, match=f"{address}/third/weights.pth could not be downloaded .*404"):
            downloads.fetch(downloads.Source(f"{address}/third/weights.pth", "MIT"), FLAG)
        server.shutdown()
    assert [file.read_text() for file in files] == ["first", "second"]
    right = hashlib.sha256(b"first").hexdigest()
    source = downloads.Source(f"{address}/first/weights.pth", "MIT", sha256=right)
    assert downloads.fetch(source, FLAG) == files[0]  # which is not downloaded again: nobody is there any more
    files[0].write_text("tampered")
    with pytest.raises(InputError, match="Delete it to fetch it again"):
        downloads.fetch(source, FLAG)


def test_what_hugging_faces_cache_holds_must_have_its_checksum(hugging_face_cache, state):
    blob = hugging_face_cache("david-shavin/SnD", "dinov2_small_snd.pth", state)
    source = downloads.known_weights(KNOWN_SPEC)["snd"]
    file = downloads.fetch(source, FLAG)
    assert downloads.hub_checksum(file) == sha256(file)
    blob.write_bytes(blob.read_bytes() + b"!")
    with pytest.raises(InputError, match="is not what .* should be: its SHA-256"):
        downloads.fetch(source, FLAG)


def test_offline_the_error_names_the_address_and_the_flag():
    # real failed downloads: nobody listens at the hub's address nor at the proxy, and no cache may answer
    program = (
        "from snd_nerfstudio.backbones.registry import BACKBONES\n"
        "from snd_nerfstudio.backbones.timm_models import create_vit\n"
        "from snd_nerfstudio.backbones.weights import load_backbone_weights\n"
        "from snd_nerfstudio.errors import InputError\n"
        "spec = BACKBONES['dinov2-small']\n"
        "import torch\n"
        "with torch.device('meta'):\n    vit = create_vit(spec)\n"
        "for name in ('published', 'snd', 'hub', 'mef'):\n"
        "    try:\n        load_backbone_weights(spec, vit, name)\n"
        "    except InputError as error:\n        print(str(error).replace('\\n', ' '))\n"
    )
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent", "HF_HUB_OFFLINE": "1"}
    proxies = {"https_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    environment = {**os.environ, **nowhere, **proxies, "TORCH_HOME": "/nonexistent/torch"}
    command = [sys.executable, "-c", program]
    printed = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=120)
    lines = [line for line in printed.stdout.splitlines() if line.startswith("http")]
    addresses = (
        "https://huggingface.co/timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors",
        "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_small_snd.pth",
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        "https://huggingface.co/qq456cvb/3DCorrEnhance/resolve/main/dinov2_small.ckpt",
    )
    assert len(lines) == 4, printed.stdout + printed.stderr
    for line, address in zip(lines, addresses, strict=True):
        assert re.match(rf"{re.escape(address)} could not be downloaded \(.+\)", line)
        assert f"pass {FLAG} PATH" in line
    assert f"{FLAG} random" in lines[0]
