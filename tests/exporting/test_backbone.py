import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from snd_nerfstudio.backbones.registry import BACKBONES, find_backbone
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.backbones.weights import WeightReport
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.exporting.backbone import CARD, MANIFEST, compare, export_backbone, plain_values, refused
from snd_nerfstudio.exporting.card import usage
from snd_nerfstudio.exporting.formats import FORMATS

SMALL = {"embed_dim": 96, "depth": 3, "num_heads": 3, "init_values": 1.0}
TINY = dataclasses.replace(BACKBONES["tiny"], timm_arguments={**SMALL, "img_size": 518})
REGISTERS = dataclasses.replace(
    TINY, timm_name="vit_small_patch14_reg4_dinov2.lvd142m", positions="timm", prefix_tokens=5
)
DINOV3 = dataclasses.replace(BACKBONES["dinov3-small"], timm_arguments=SMALL)
PLUS = dataclasses.replace(BACKBONES["dinov3-small-plus"], timm_arguments=SMALL)
OTHER = dataclasses.replace(TINY, timm_name="vit_small_patch16_224", family="other", positions="timm", patch=16)
TINY_PAGE = "https://huggingface.co/timm/x"
ABOUT = {
    "step": 7,
    "which": "teacher",
    "profile": "fixed",
    "trained_layers": ["blocks.0-2.attn.qkv"],
    "data": {"frames": 9},
}


def small(spec, positions=None):
    torch.manual_seed(0)
    backbone = TokenBackbone(spec, create_vit(spec), positions).eval()
    for name, parameter in backbone.vit.named_parameters():
        if not name.endswith("gamma") and "gamma_" not in name:  # LayerScale stays 1
            torch.nn.init.normal_(parameter, std=0.1)
    return backbone.requires_grad_(False)


GATED = dataclasses.replace(
    TINY,
    timm_name="vit_giant_patch14_dinov2.lvd142m",
    timm_arguments={**SMALL, "img_size": 518, "mlp_ratio": 2.66667 * 2},
)
SIGLIP = find_backbone("vit_base_patch16_siglip_224.webli")
SIGLIP = dataclasses.replace(SIGLIP, timm_arguments={"embed_dim": 96, "depth": 2, "num_heads": 3})

CASES = {
    **{f"dinov2 {name}": (TINY, None, name) for name in FORMATS},
    **{f"registers {name}": (REGISTERS, None, name) for name in FORMATS},
    "dinov2 with timm's positions hub": (TINY, "timm", "hub"),
    "dinov2 with timm's positions transformers": (TINY, "timm", "transformers"),
    "dinov3 timm": (DINOV3, None, "timm"),
    "dinov3 transformers": (DINOV3, None, "transformers"),
    "dinov3 onnx": (DINOV3, None, "onnx"),
    "dinov3 with gates transformers": (PLUS, None, "transformers"),
    "other pt2": (OTHER, None, "pt2"),
    "gated hub": (GATED, None, "hub"),
    "gated transformers": (GATED, None, "transformers"),
    "without a class token timm": (SIGLIP, None, "timm"),
    "without a class token pt2": (SIGLIP, None, "pt2"),
}


EXTRAS = ("registers onnx", "registers pt2", "dinov3 onnx", "other pt2")
"""Cases that take long and are like others."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in EXTRAS else ()) for case in CASES]
)
def test_every_format_gives_the_same_tokens_at_every_size_and_its_card_runs(case, tmp_path, monkeypatch):
    spec, positions, name = CASES[case]
    backbone = small(spec, positions)
    file = export_backbone(backbone, name, tmp_path / "new", ABOUT)
    manifest = json.loads(file.read_text())
    sides = [(check["height"] // spec.patch, check["width"] // spec.patch) for check in manifest["checked_on"]]
    assert sides == [(16, 16), (37, 37), (24, 36)]
    # tokens have a root mean square of about 0.1 here
    assert all(check["largest_difference"] < 1e-4 for check in manifest["checked_on"])
    assert manifest["step"] == 7 and manifest["position_embedding"] == backbone.positions
    folder = file.parent
    listed = {entry.name for entry in folder.iterdir()}
    assert listed == {MANIFEST, CARD, *manifest["files"]} and folder.name == name
    assert all(hashlib.sha256((folder / f).read_bytes()).hexdigest() == s for f, s in manifest["files"].items())
    modes = {entry.stat().st_mode for entry in folder.iterdir()}
    assert len(modes) == 1
    card = (folder / CARD).read_text()
    assert usage(manifest).rstrip() in card and "frames: 9" in card
    printed = run_from_within(folder, usage(manifest), monkeypatch)
    assert re.search(r"1, 384, 96|1, 16, 24, 96", printed), printed


def run_from_within(folder, code, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for carried in ("snd_timm", "snd_vision_transformer", "hubconf"):
        monkeypatch.delitem(sys.modules, carried, raising=False)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "card", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize("name", ["timm", "transformers"])
def test_what_the_library_does_without_our_code_is_measured(name, tmp_path):
    manifest = json.loads(export_backbone(small(TINY), name, tmp_path, ABOUT).read_text())
    apart = [check["largest_difference_without_carried_code"] for check in manifest["checked_on"]]
    assert apart[0] > 1e-3 and apart[1] < 1e-5 and apart[2] > 1e-3
    assert f"{max(apart):.1%} of the tokens' root mean square apart" in (tmp_path / name / CARD).read_text()


@pytest.mark.parametrize("name", FORMATS)
def test_wrong_weights_are_noticed_in_every_format(name, tmp_path):
    backbone, other = small(TINY), small(TINY)
    with torch.no_grad():
        other.vit.blocks[1].attn.proj.weight[5] += 0.05
    folder = tmp_path / name
    folder.mkdir()
    FORMATS[name].write(other, folder)
    with pytest.raises(RuntimeError, match="differ by"):
        compare(backbone, FORMATS[name], folder)


def test_an_export_over_an_older_one_replaces_it_whole(tmp_path):
    backbone = small(TINY)
    export_backbone(backbone, "timm", tmp_path, {"step": 1})
    (tmp_path / "timm" / "leftover").write_text("of another version")
    with torch.no_grad():
        backbone.vit.norm.bias += 1
    export_backbone(backbone, "timm", tmp_path, {"step": 2})
    assert json.loads((tmp_path / "timm" / MANIFEST).read_text())["step"] == 2
    assert not (tmp_path / "timm" / "leftover").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["timm"]


def test_a_model_that_reloads_to_other_tokens_is_not_written(tmp_path):
    backbone = small(TINY)
    # a hook is not part of a state dict: the reloaded model lacks it
    backbone.vit.norm.register_forward_hook(lambda module, inputs, output: output * 1.01)
    with pytest.raises(RuntimeError, match="differ by"):
        export_backbone(backbone, "timm", tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_leave_the_older_export_alone(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    export_backbone(small(TINY), "timm", tmp_path, {"step": 1})

    def no_space(*args, **kwargs):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", no_space)
    with pytest.raises(InputError, match="No space left"):
        export_backbone(small(TINY), "timm", tmp_path, {"step": 2})
    assert json.loads((tmp_path / "timm" / MANIFEST).read_text())["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["timm"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output-dir .*file cannot be written"):
        export_backbone(small(TINY), "timm", tmp_path / "file", {})


def test_formats_that_do_not_have_the_architecture_say_so(tmp_path, monkeypatch):
    assert set(refused(small(DINOV3), list(FORMATS))) == {"hub"}
    assert set(refused(small(OTHER), list(FORMATS))) == {"hub", "transformers"}
    with pytest.raises(InputError, match="--format hub: vit_small_patch16_dinov3 is no DINOv2 model"):
        export_backbone(small(DINOV3), "hub", tmp_path, {})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'--format onnx: onnx, .* run pip install "snd-nerfstudio\[onnx\]"'):
        export_backbone(small(TINY), "onnx", tmp_path, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("licence", "source", "expected"),
    [
        ("Apache-2.0", TINY_PAGE + "/resolve/main/model.safetensors", ("apache-2.0", None, "timm/x")),
        ("MIT", "https://huggingface.co/david-shavin/SnD/resolve/main/dinov2_small_snd.pth", ("mit", None, None)),
        ("DINOv3 License", "", ("other", "dinov3-license", None)),
        ("not known", "/somewhere/my.pth", ("other", "not-known", None)),
        (None, None, ("other", "none-random-weights", None)),
    ],
)
def test_the_card_has_the_licence_of_the_weights_that_were_used(licence, source, expected, tmp_path):
    backbone = small(dataclasses.replace(TINY, source=TINY_PAGE))
    if licence is not None:
        backbone.weight_report = WeightReport(source, "timm", {}, (), licence=licence)
    card = (export_backbone(backbone, "timm", tmp_path, ABOUT).parent / CARD).read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front.get("license_name"), front.get("base_model")) == expected


def test_the_folder_for_transformers_can_be_saved_again_with_its_positions(tmp_path):
    from transformers import AutoConfig, AutoModel

    backbone = small(TINY)
    folder = export_backbone(backbone, "transformers", tmp_path / "first", ABOUT).parent
    AutoModel.from_pretrained(folder, trust_remote_code=True).save_pretrained(tmp_path / "second")
    again = AutoModel.from_pretrained(tmp_path / "second", trust_remote_code=True).eval()
    empty = AutoModel.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=True)
    assert type(again).__name__ == type(empty).__name__ == "SnDDinov2Model"
    assert type(empty.embeddings).__name__ == "SnDEmbeddings"
    images = torch.rand(1, 3, 224, 336)
    with torch.no_grad():
        tokens = again(backbone.prepared(images)).last_hidden_state[:, 1:]
        torch.testing.assert_close(tokens, backbone(images).flatten(1, 2), rtol=0, atol=1e-4)


def test_without_a_connection_an_upload_says_where_the_export_is(tmp_path):
    program = (
        "from pathlib import Path\nfrom snd_nerfstudio.errors import InputError\n"
        "from snd_nerfstudio.exporting.backbone import push\n"
        f"try:\n    push(Path({str(tmp_path)!r}), 'user/name', True)\nexcept InputError as error:\n    print(error)\n"
    )
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_none", "HF_HOME": str(tmp_path / "home")}
    printed = subprocess.run(
        check=False,
        args=[sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert "--push-to-hub user/name failed" in printed.stdout, printed.stderr
    assert f"The export is in {tmp_path}" in printed.stdout and "hf upload user/name" in printed.stdout


def test_configs_become_plain_values():
    @dataclasses.dataclass
    class Inner:
        _target: type = int
        path: Path = Path("/data/rooms")

    found = plain_values({"inner": Inner(), "rates": (1, 2.5), "method": print, "none": None})
    assert found == {"inner": {"path": "/data/rooms"}, "rates": [1, 2.5], "method": None, "none": None}
    json.dumps(found)
