import os
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import RE10K, MVSplat, MVSplatSettings
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import load_unimatch, official_key, write_official
from tests.reconstruction.mvsplat.golden_weights import released_keys

SMALL = MVSplatSettings(
    candidates=8,
    stem_channels=8,
    middle_channels=12,
    feature_channels=16,
    transformer_blocks=2,
    cost_channels=32,
    depth_channels=32,
    harmonics=4,
    geometry="exact",
    near=0.3,
    far=12.0,
)
UNIMATCH_OTHERS = [
    *(f"feature_flow_attn.{layer}.{kind}" for layer in ("q_proj", "k_proj") for kind in ("weight", "bias")),
    *(f"upsampler.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")),
]


@pytest.fixture(scope="module")
def small():
    """A small network whose weights are all different from a fresh one's."""
    network = MVSplat(SMALL).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def assert_same_network(loaded, expected):
    assert loaded.settings == expected.settings
    ours, theirs = dict(loaded.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def refused(path, *words, geometry=None):
    """The message of the one error that loading ``path`` gives."""
    with pytest.raises(InputError) as caught:
        MVSplat.from_checkpoint(path, geometry)
    message = str(caught.value)
    assert Path(path).name in message
    for word in words:
        assert word in message, message
    return message


def test_released_weights_survive_loading_and_exporting_bit_for_bit(released, released_state, tmp_path):
    path = tmp_path / "deep" / "export.ckpt"
    write_official(released, released.settings, path, {"global_step": 7})
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == 7
    assert content["state_dict"].keys() == {f"encoder.{key}" for key in released_state}
    assert all(torch.equal(content["state_dict"][f"encoder.{key}"], value) for key, value in released_state.items())
    assert_same_network(MVSplat.from_checkpoint(path), released)
    assert os.listdir(path.parent) == ["export.ckpt"]


def test_names_are_the_released_ones(released_state):
    keys = released_keys()
    if keys is None:
        pytest.skip("the list of released names is not at hand")
    assert released_state.keys() == keys.keys()


NAMES = {
    "encoder.stem.weight": "backbone.backbone.conv1.weight",
    "encoder.head.bias": "backbone.backbone.conv2.bias",
    "encoder.stages.1.0.skip.bias": "backbone.backbone.layer2.0.downsample.0.bias",
    "encoder.stages.2.1.conv2.weight": "backbone.backbone.layer3.1.conv2.weight",
    "transformer.blocks.0.self_attention.query.weight": "backbone.transformer.layers.0.self_attn.q_proj.weight",
    "transformer.blocks.1.self_attention.norm.bias": "backbone.transformer.layers.1.self_attn.norm1.bias",
    "transformer.blocks.3.cross_attention.merge.weight": "backbone.transformer.layers.3.cross_attn_ffn.merge.weight",
    "transformer.blocks.3.cross_attention.mlp.2.weight": "backbone.transformer.layers.3.cross_attn_ffn.mlp.2.weight",
    "transformer.blocks.5.cross_attention.mlp_norm.weight": "backbone.transformer.layers.5.cross_attn_ffn.norm2.weight",
    "depth.cost_refinement.norm.weight": "depth_predictor.corr_refine_net.1.weight",
    "depth.cost_output.bias": "depth_predictor.corr_refine_net.4.bias",
    "depth.cost_residual.weight": "depth_predictor.regressor_residual.weight",
    "depth.depth_head.2.weight": "depth_predictor.depth_head_lowres.2.weight",
    "depth.feature_upsampler.weight": "depth_predictor.upsampler.0.weight",
    "depth.feature_projection.weight": "depth_predictor.proj_feature.weight",
    "depth.depth_refinement.conv.weight": "depth_predictor.refine_unet.0.weight",
    "depth.disparity_head.2.weight": "depth_predictor.to_disparity.2.weight",
    "depth.gaussian_head.0.bias": "depth_predictor.to_gaussians.0.bias",
}
UNET_NAMES = {
    "stem.weight": "input_blocks.0.0.weight",
    "down.0.block.norm1.weight": "input_blocks.1.0.in_layers.1.weight",
    "down.1.shrink.weight": "input_blocks.4.0.op.weight",
    "down.2.block.conv2.bias": "input_blocks.5.0.out_layers.0.bias",
    "down.2.attention.qkv.weight": "input_blocks.5.1.qkv.weight",
    "middle.1.norm2.bias": "middle_block.2.out_layers.1.bias",
    "up.0.blocks.0.conv1.weight": "output_blocks.0.0.in_layers.0.weight",
    "up.0.blocks.1.skip.weight": "output_blocks.1.0.skip_connection.weight",
    "up.0.attentions.0.norm.weight": "output_blocks.0.1.norm.weight",
    "up.0.attentions.1.project.bias": "output_blocks.1.1.proj_out.bias",
    "up.0.grow.weight": "output_blocks.1.2.conv.weight",
    "up.1.grow.weight": "output_blocks.3.1.conv.weight",
    "up.2.blocks.1.conv1.bias": "output_blocks.5.0.in_layers.0.bias",
    "out.weight": "out.0.weight",
    "out_norm.weight": "out.1.weight",
}


def test_names_are_translated_by_hand(released):
    parameters = dict(released.named_parameters())
    unet = {
        f"depth.cost_refinement.unet.{ours}": f"depth_predictor.corr_refine_net.3.{theirs}"
        for ours, theirs in UNET_NAMES.items()
    }
    names = {
        **NAMES,
        **unet,
        "depth.depth_refinement.unet.stem.bias": "depth_predictor.refine_unet.3.input_blocks.0.0.bias",
    }
    assert names.keys() <= parameters.keys()
    assert {ours: official_key(ours) for ours in names} == names


def test_a_released_checkpoint_is_read_with_the_released_settings(released, released_file):
    assert released.settings == RE10K
    assert MVSplat.from_checkpoint(released_file, geometry="exact").settings == replace(RE10K, geometry="exact")


def test_loading_makes_a_few_networks_only(small_content, tmp_path, monkeypatch):
    made = []
    make = MVSplat.__init__
    monkeypatch.setattr(MVSplat, "__init__", lambda self, settings: (made.append(self), make(self, settings))[1])
    MVSplat.from_checkpoint(tmp_path / "good.ckpt")
    assert len(made) <= 3


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: state,
        lambda state: {f"encoder.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {f"encoder.{key}": value for key, value in state.items()}, "epoch": 3},
    ],
    ids=["bare", "bare with prefix", "nested", "nested with prefix"],
)
def test_the_layouts_of_a_state_dict_are_told_apart(layout, released, released_state, tmp_path):
    torch.save(layout(released_state), tmp_path / "weights.ckpt")
    assert_same_network(MVSplat.from_checkpoint(tmp_path / "weights.ckpt"), released)


@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_weights_of_other_parts_are_left_alone(prefix, released, released_state, tmp_path):
    state = {prefix + key: value for key, value in released_state.items()}
    others = ("decoder.background_color", "losses.1.lpips.net.weight", "vit.student.cls_token", "vit.teacher.norm.bias")
    state.update({key: torch.ones(3) for key in others})
    state[prefix + "gaussian_adapter.sh_mask"] = torch.ones(25)
    torch.save({"state_dict": state}, tmp_path / "weights.ckpt")
    loaded = MVSplat.from_checkpoint(tmp_path / "weights.ckpt")
    assert_same_network(loaded, released)
    assert set(loaded.checkpoint.unused) == {*others, prefix + "gaussian_adapter.sh_mask"}
    assert loaded.checkpoint.used == 471
    assert "weights.ckpt" in str(loaded.checkpoint) and "vit.student" in str(loaded.checkpoint)


def test_safetensors_are_read_too(released, released_state, tmp_path):
    save_file(released_state, tmp_path / "weights.safetensors")
    assert_same_network(MVSplat.from_checkpoint(tmp_path / "weights.safetensors"), released)


@pytest.fixture
def small_content(small, tmp_path):
    """The contents of the small network's export, to be spoilt."""
    write_official(small, SMALL, tmp_path / "good.ckpt", {})
    return torch.load(tmp_path / "good.ckpt", weights_only=True)


KEY = "encoder.depth_predictor.to_disparity.2.weight"


def test_an_export_keeps_the_settings_and_gives_the_same_gaussians(small, small_content, tmp_path):
    loaded = MVSplat.from_checkpoint(tmp_path / "good.ckpt").eval()
    assert_same_network(loaded, small)
    generator = torch.Generator().manual_seed(1)
    poses = torch.eye(4).repeat(1, 2, 1, 1)
    poses[0, 1, 0, 3] = 0.2
    intrinsics = torch.tensor([[30.0, 0, 16], [0, 30.0, 16], [0, 0, 1]]).expand(1, 2, 3, 3)
    images = torch.rand(1, 2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        expected, ours = small(images, intrinsics, poses), loaded(images, intrinsics, poses)
    assert torch.equal(ours.means, expected.means) and torch.equal(ours.harmonics, expected.harmonics)
    assert 0.3 <= ours.depths.min() and ours.depths.max() <= 12.0  # near and far of the settings


def test_a_missing_weight_is_named(small_content, tmp_path):
    del small_content["state_dict"][KEY]
    torch.save(small_content, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", "missing", "depth_predictor.to_disparity.2.weight")


def test_an_unknown_weight_is_named(small_content, tmp_path):
    small_content["state_dict"]["encoder.backbone.extra.weight"] = torch.ones(2)
    torch.save(small_content, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", "unknown", "backbone.extra.weight")


def test_a_weight_of_another_shape_is_named_with_both_shapes(small_content, tmp_path):
    small_content["state_dict"][KEY] = torch.ones(3, 64, 3, 3)
    torch.save(small_content, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", "depth_predictor.to_disparity.2.weight", "(3, 64, 3, 3)", "(2, 64, 3, 3)")


def test_many_problems_are_counted_and_not_all_listed(small_content, tmp_path):
    small_content["state_dict"].update({f"encoder.extra.{i}": torch.ones(1) for i in range(10)})
    torch.save(small_content, tmp_path / "bad.ckpt")
    message = refused(tmp_path / "bad.ckpt", "and 7 more")
    assert message.count("unknown") == 3


def test_settings_of_another_version_are_refused(small_content, tmp_path):
    small_content["snd_nerfstudio_mvsplat"]["surfaces"] = 2
    torch.save(small_content, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", "surfaces")


def test_another_models_checkpoint_is_told_apart(tmp_path):
    resnet = {"conv1.weight": torch.ones(64, 3, 7, 7), "layer1.0.conv1.weight": torch.ones(64, 64, 3, 3)}
    torch.save({"state_dict": {**resnet, "fc.weight": torch.ones(1000, 512)}}, tmp_path / "resnet50.ckpt")
    refused(tmp_path / "resnet50.ckpt", "another model", "re10k.ckpt")
    torch.save({}, tmp_path / "empty.ckpt")
    refused(tmp_path / "empty.ckpt", "another model")


def test_a_file_that_is_not_there_and_a_folder_without_checkpoints_are_named(tmp_path):
    refused(tmp_path / "nowhere.ckpt", "does not exist")
    refused(tmp_path, "ns-train mvsplat")


@pytest.mark.parametrize("name", ["weights.ckpt", "weights.safetensors"])
def test_a_file_cut_off_is_refused(name, small_content, tmp_path):
    path = tmp_path / name
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(small_content["state_dict"], path)
    for length in (path.stat().st_size // 2, 100, 0):
        path.write_bytes(path.read_bytes()[:length])
        refused(path, "cannot be read")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "notes.ckpt").write_text("not a checkpoint\n" * 100)
    refused(tmp_path / "notes.ckpt", "cannot be read")
    torch.save([torch.ones(2)], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "list")


@pytest.mark.parametrize(
    "content",
    [{0: torch.ones(2)}, {"state_dict": torch.ones(2)}, {"state_dict": None}, {"pipeline": None}, {"pipeline": [1]}],
    ids=["numbered", "tensor", "none", "no pipeline", "list"],
)
def test_dictionaries_of_something_else_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "odd.ckpt")
    refused(tmp_path / "odd.ckpt")


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_is_not_run(small_content, tmp_path):
    sprung = tmp_path / "sprung"
    trap = {**small_content, "callbacks": Trap(str(sprung))}
    torch.save(trap, tmp_path / "trap.ckpt")
    refused(tmp_path / "trap.ckpt", "can run code", "mkdir")
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(trap, protocol=2))
    refused(tmp_path / "bare.ckpt")
    assert not sprung.exists()
    torch.load(tmp_path / "trap.ckpt", weights_only=False)
    assert sprung.exists()  # it was a trap


def test_a_path_that_cannot_be_written_is_one_error_and_leaves_nothing(small, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        write_official(small, SMALL, tmp_path / "file" / "export.ckpt", {})
    (tmp_path / "taken.ckpt").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        write_official(small, SMALL, tmp_path / "taken.ckpt", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "taken.ckpt"]


@pytest.mark.parametrize("prefix", ["_model.network.", "_model.module.network."], ids=["one process", "several"])
def test_a_run_is_read_from_its_folder_its_config_and_its_newest_checkpoint(prefix, small, tmp_path):
    folder = tmp_path / "nerfstudio_models"
    folder.mkdir()
    (tmp_path / "config.yml").touch()
    pipeline = {f"{prefix}{key}": value for key, value in small.state_dict().items()}
    for step, change in ((20, 0.0), (3, 1.0)):
        state = {key: value + change if isinstance(value, torch.Tensor) else value for key, value in pipeline.items()}
        torch.save({"step": step, "pipeline": state, "optimizers": {}}, folder / f"step-{step:09d}.ckpt")
    for path in (tmp_path, tmp_path / "config.yml", folder, folder / "step-000000020.ckpt"):
        assert_same_network(MVSplat.from_checkpoint(path), small)
    assert MVSplat.from_checkpoint(tmp_path, geometry="official").settings == replace(SMALL, geometry="official")


def test_a_run_of_another_method_or_with_a_weight_missing_is_refused(small, tmp_path):
    torch.save({"step": 1, "pipeline": {"_model.field.weight": torch.ones(2)}}, tmp_path / "other.ckpt")
    refused(tmp_path / "other.ckpt", "ns-train mvsplat")
    pipeline = {f"_model.network.{key}": value for key, value in small.state_dict().items()}
    torch.save({"step": 1, "pipeline": {**pipeline, "_model.head.weight": torch.ones(2)}}, tmp_path / "more.ckpt")
    refused(tmp_path / "more.ckpt", "_model.head.weight")
    del pipeline["_model.network.encoder.stem.weight"]
    torch.save({"step": 1, "pipeline": pipeline}, tmp_path / "cut.ckpt")
    refused(tmp_path / "cut.ckpt", "missing encoder.stem.weight")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.full((2, 64, 3, 3), torch.nan), "NaN"),
        (torch.ones(2, 64, 3, 3, dtype=torch.long), "int64"),
        (3.0, "float"),
    ],
    ids=["nan", "integers", "a number"],
)
def test_weights_that_are_no_finite_numbers_are_named(value, words, small_content, tmp_path):
    small_content["state_dict"][KEY] = value
    torch.save(small_content, tmp_path / "bad.ckpt")
    refused(tmp_path / "bad.ckpt", "depth_predictor.to_disparity.2.weight", words)


def test_weights_of_half_precision_are_taken_over(small, small_content, tmp_path):
    state = {key: value.half() for key, value in small_content["state_dict"].items()}
    torch.save({**small_content, "state_dict": state}, tmp_path / "half.ckpt")
    loaded = MVSplat.from_checkpoint(tmp_path / "half.ckpt")
    for (name, ours), expected in zip(loaded.named_parameters(), small.parameters(), strict=True):
        assert ours.dtype == torch.float32, name
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


def test_resuming_takes_over_near_and_far_and_refuses_other_settings(small):
    resumed = MVSplat(replace(SMALL, near=0.5, far=30.0))
    resumed.load_state_dict(small.state_dict())
    assert_same_network(resumed, small)
    other = MVSplat(replace(SMALL, geometry="official", max_scale=3.0))
    with pytest.raises(InputError, match=r"max_scale 15\.0 instead of 3\.0, geometry exact instead of official"):
        other.load_state_dict(small.state_dict())


def unimatch(network):
    """A file in UniMatch's layout for a network of the released sizes, with weights unlike any fresh ones."""
    generator = torch.Generator().manual_seed(5)
    parameters = {k: v for k, v in network.named_parameters() if k.startswith(("encoder.", "transformer."))}
    state = {
        official_key(key).removeprefix("backbone."): torch.randn(value.shape, generator=generator)
        for key, value in parameters.items()
    }
    return {**state, **{key: torch.ones(2) for key in UNIMATCH_OTHERS}}


def test_unimatch_initialises_encoder_and_transformer_and_names_what_it_leaves(tmp_path):
    network = MVSplat(RE10K)
    before = {key: value.clone() for key, value in network.named_parameters()}
    state = unimatch(network)
    assert len(state) == 123
    keys = released_keys()
    if keys is not None:
        mapped = {about["unimatch_key"] for about in keys.values() if "unimatch_key" in about}
        assert state.keys() - set(UNIMATCH_OTHERS) == mapped
    torch.save({"model": state}, tmp_path / "gmdepth.pth")
    assert load_unimatch(network, tmp_path / "gmdepth.pth") == sorted(UNIMATCH_OTHERS)
    landed = 0
    for key, value in network.named_parameters():
        if key.startswith("depth."):
            assert torch.equal(value, before[key])
        else:
            assert torch.equal(value, state[official_key(key).removeprefix("backbone.")])
            landed += 1
    assert landed == 115


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda state: state.pop("transformer.layers.1.self_attn.q_proj.weight"),
            "missing transformer.layers.1.self_attn",
        ),
        (lambda state: state.update({"refine.weight": torch.ones(1)}), "unknown refine.weight"),
        (lambda state: state.update({"backbone.conv1.weight": torch.ones(64, 3, 3, 3)}), "(64, 3, 3, 3)"),
        (lambda state: state.clear(), "another model"),
    ],
    ids=["missing", "unknown", "shape", "empty"],
)
def test_a_file_that_is_not_unimatchs_changes_nothing(spoil, words, tmp_path):
    network = MVSplat(SMALL)
    before = {key: value.clone() for key, value in network.named_parameters()}
    state = unimatch(network)
    spoil(state)
    torch.save({"model": state}, tmp_path / "wrong.pth")
    with pytest.raises(InputError, match=re.escape(words)) as caught:
        load_unimatch(network, tmp_path / "wrong.pth")
    assert "wrong.pth" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in network.named_parameters())
