import dataclasses

import pytest
import torch

from snd_nerfstudio.backbones.plain import PlainVisionTransformer
from snd_nerfstudio.backbones.positions import (
    ResampledVisionTransformer,
    cubic_kernel,
    interpolate_positions,
    interpolation_matrix,
    multiply_positions,
    resample_with,
)
from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.backbones.vit import TokenBackbone
from snd_nerfstudio.errors import InputError

TINY_518 = dataclasses.replace(BACKBONES["tiny"], timm_arguments={**BACKBONES["tiny"].timm_arguments, "img_size": 518})
REGISTERS_518 = dataclasses.replace(
    TINY_518, timm_name="vit_small_patch14_reg4_dinov2.lvd142m", positions="timm", prefix_tokens=5
)
SIZES = [(224, 224), (518, 518), (336, 504), (28, 700)]


def random_vit(spec):
    torch.manual_seed(0)
    vit = create_vit(spec).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return vit


def plain_twin(vit):
    """The same weights in DINOv2's own layout and code."""
    registers = vit.reg_token.shape[1] if vit.reg_token is not None else 0
    plain = PlainVisionTransformer(96, 4, 3, 384, 14, 37, registers, antialias=registers > 0).eval()
    state = {**vit.state_dict(), "mask_token": torch.zeros(1, 96)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 96), state["pos_embed"]], dim=1)
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("how", ["hub", "timm"])
@pytest.mark.parametrize("new", [(16, 16), (37, 50), (37, 37), (9, 7), (3, 90)])
@pytest.mark.parametrize("old", [16, 37])
def test_matrix_products_are_torchs_interpolation(old, new, how):
    positions = torch.randn(1, 1 + old * old, 5, generator=torch.Generator().manual_seed(0))
    expected = interpolate_positions(positions, 1, (old, old), new, how)
    found = multiply_positions(positions, 1, (old, old), new, how)
    assert expected.shape == (1, 1 + new[0] * new[1], 5) and torch.equal(expected[:, 0], positions[:, 0])
    if new == (old, old):
        assert torch.equal(expected, positions) and torch.equal(found, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)  # torch computes coordinates in float32


def test_weights_are_those_of_keys_kernel():
    assert cubic_kernel(torch.tensor([0.0, 1.0, 2.0, 2.5]), -0.5).tolist() == [1, 0, 0, 0]
    assert cubic_kernel(torch.tensor([0.5, 1.5]), -0.75).tolist() == [0.59375, -0.09375]
    for how in ("hub", "timm"):
        matrix = interpolation_matrix(7, 4, how)
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(4).double())
    torch.testing.assert_close(interpolation_matrix(6, 6, "timm"), torch.eye(6).double())
    assert not torch.allclose(interpolation_matrix(6, 6, "hub"), torch.eye(6).double(), atol=1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_hub_positions_give_the_tokens_of_dinov2s_own_code(size):
    vit = random_vit(TINY_518)
    plain, backbone = plain_twin(vit), TokenBackbone(TINY_518, vit, "hub")
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.forward_features(backbone.prepared(images))["x_norm_patchtokens"]
        found = backbone(images).flatten(1, 2)
        different = TokenBackbone(TINY_518, random_vit(TINY_518), "timm")(images).flatten(1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.std()))
    apart = float((different - expected).abs().max())
    assert apart < 1e-5 if size == (518, 518) else apart > 1e-2


@pytest.mark.parametrize("size", SIZES)
def test_models_with_registers_agree_at_every_size(size):
    vit = random_vit(REGISTERS_518)
    plain, backbone = plain_twin(vit), TokenBackbone(REGISTERS_518, vit)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain.forward_features(backbone.prepared(images))
        found = backbone.tokens(images)
    tolerance = 2e-4 * float(expected["x_norm_patchtokens"].std())
    torch.testing.assert_close(found.patches.flatten(1, 2), expected["x_norm_patchtokens"], rtol=0, atol=tolerance)
    torch.testing.assert_close(found.class_token, expected["x_norm_clstoken"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("traceable", [False, True])
@pytest.mark.parametrize("spec", [TINY_518, REGISTERS_518])
def test_our_timm_positions_are_timms_own(spec, traceable):
    own, ours = TokenBackbone(spec, random_vit(spec), "timm"), random_vit(spec)
    resample_with(ours, "timm", traceable)
    assert type(ours) is ResampledVisionTransformer and ours.state_dict().keys() == own.vit.state_dict().keys()
    images = torch.rand(1, 3, 336, 504)
    with torch.no_grad():
        expected, found = own(images), TokenBackbone(spec, ours, "timm")(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.std()))


def test_autocast_does_not_round_the_positions():
    positions = torch.randn(1, 1 + 16 * 16, 8)
    exact = interpolate_positions(positions, 1, (16, 16), (9, 12), "hub")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(interpolate_positions(positions, 1, (16, 16), (9, 12), "hub"), exact)


def test_positions_that_do_not_fit_the_model_are_refused():
    rotary = dataclasses.replace(TINY_518, positions="rotary")
    with pytest.raises(InputError, match="is not rotary"):
        TokenBackbone(TINY_518, random_vit(TINY_518), "rotary")
    with pytest.raises(InputError, match="is rotary"):
        TokenBackbone(rotary, random_vit(TINY_518), "hub")
    with pytest.raises(InputError, match="hub cannot be used .*Use timm"):
        TokenBackbone(TINY_518, torch.nn.Linear(1, 1), "hub")
    with pytest.raises(InputError, match="class token and no registers.*Use timm"):
        TokenBackbone(REGISTERS_518, random_vit(REGISTERS_518), "hub")
    with pytest.raises(TypeError, match="one image size"):
        fixed = random_vit(TINY_518)
        fixed.dynamic_img_size = False
        resample_with(fixed, "hub")
