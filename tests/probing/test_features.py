import numpy as np
import pytest
import torch

from snd_nerfstudio.backbones.build import build_backbone
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.features import FeatureSettings, encode, feature_map
from snd_nerfstudio.probing.models import ProbeModel
from tests.probing.backbones import KnownMaps, concatenated, refined, tiny, tiny_model

MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def images(height, width, count=2):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels)


def seen_by(model, run):
    """What the transformer is given."""
    seen = []
    handle = model.backbone.vit.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run()
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("norm", ["imagenet", "half"])
def test_padding_is_exactly_zero_after_normalisation_and_the_image_exactly_normalised(norm):
    model, x = tiny_model(), images(48, 60)
    seen = seen_by(model, lambda: encode(model, x, FeatureSettings(input_norm=norm)))
    # 48 is 8 short of 56: 4 rows above; 60 is 10 short of 70: 5 columns at the left
    assert seen.shape == (2, 3, 56, 70)
    inside = torch.zeros(56, 70, dtype=torch.bool)
    inside[4:52, 5:65] = True
    assert (seen[:, :, ~inside] == 0).all()
    colours = x.float() / 255
    expected = (colours - MEAN) / STD if norm == "imagenet" else (colours - 0.5) / 0.5
    torch.testing.assert_close(seen[:, :, 4:52, 5:65], expected, rtol=0, atol=0)
    if norm == "half":  # 0 and 255 are -1 and 1
        assert float(seen.min()) == -1 and float(seen.max()) == 1


def test_sides_that_fit_may_get_a_whole_patch_more():
    model, x = tiny_model(), images(56, 60, 1)
    assert encode(model, x, FeatureSettings()).tokens.shape == (1, 4, 5, 96)
    odd = encode(model, x, FeatureSettings(extra_patch_quirk=True))
    assert odd.tokens.shape == (1, 5, 5, 96) and (odd.padding.top, odd.padding.bottom) == (7, 7)


@pytest.mark.parametrize("norm", [False, True])
def test_without_padding_tokens_are_the_backbones_own(norm):
    model, x = tiny_model(), images(56, 84)
    for block in (-1, 1):
        found = encode(model, x, FeatureSettings(block=block, norm=norm, class_token=True))
        own = model.backbone.tokens(x.float() / 255, block, norm)
        torch.testing.assert_close(found.tokens, own.patches)
        torch.testing.assert_close(found.class_token, own.class_token)
    assert encode(model, x, FeatureSettings()).class_token is None
    assert not torch.equal(
        encode(model, x, FeatureSettings(norm=False)).tokens, encode(model, x, FeatureSettings()).tokens
    )


def test_bytes_and_colours_are_the_same():
    model, x = tiny_model(), images(48, 60)
    settings = FeatureSettings()
    torch.testing.assert_close(encode(model, x, settings).tokens, encode(model, x.float() / 255, settings).tokens)


def test_two_transformers_give_patches_side_by_side_and_the_originals_class_token():
    model, x = ProbeModel.from_backbone("both", concatenated()), images(56, 70)
    found = encode(model, x, FeatureSettings(norm=False, class_token=True))
    original, tuned = (
        b.tokens(x.float() / 255, -1, False) for b in (model.backbone.original, model.backbone.fine_tuned)
    )
    torch.testing.assert_close(found.tokens, torch.cat([original.patches, tuned.patches], dim=-1))
    torch.testing.assert_close(found.class_token, original.class_token)
    assert not torch.allclose(original.class_token, tuned.class_token)


def test_mefs_map_is_refined_after_the_norm_and_its_class_token_is_raw():
    model, x = ProbeModel.from_backbone("mef", refined()), images(56, 70)
    for norm in (False, True):
        found = encode(model, x, FeatureSettings(norm=norm, class_token=True))
        torch.testing.assert_close(found.tokens, model.backbone(x.float() / 255), rtol=1e-4, atol=1e-4)
        own = model.backbone.backbone.tokens(x.float() / 255, -1, norm)
        torch.testing.assert_close(found.class_token, own.class_token)
    with pytest.raises(InputError, match="--features.block"):
        encode(model, x, FeatureSettings(block=1))


def test_positions_are_resized_as_asked_and_as_before_afterwards():
    model, x = tiny_model(), images(56, 84)
    before = encode(model, x, FeatureSettings()).tokens
    changed = encode(model, x, FeatureSettings(positions="timm")).tokens
    built_so = ProbeModel.from_backbone("timm", build_backbone("tiny", "random", 0, positions="timm"))
    torch.testing.assert_close(changed, encode(built_so, x, FeatureSettings()).tokens)
    torch.testing.assert_close(before, encode(built_so, x, FeatureSettings(positions="hub")).tokens)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(encode(model, x, FeatureSettings()).tokens, before, rtol=0, atol=0)
    # a failure on the way leaves no trace either
    with pytest.raises(ValueError, match="block 9"):
        encode(model, x, FeatureSettings(positions="timm", block=9))
    torch.testing.assert_close(encode(model, x, FeatureSettings()).tokens, before, rtol=0, atol=0)


def test_a_class_token_that_is_not_there_is_refused():
    x = images(4, 8)
    model = ProbeModel.from_backbone("maps", KnownMaps(x, torch.zeros(2, 5, 2, 4), 2))
    assert model.description["architecture"] == "KnownMaps" and model.patch == 2
    assert encode(model, x, FeatureSettings()).tokens.shape == (2, 2, 4, 5)
    with pytest.raises(InputError, match="no class token"):
        encode(model, x, FeatureSettings(class_token=True))


def test_a_map_for_matching_says_what_of_it_is_image():
    model = ProbeModel.from_backbone("tiny", tiny())
    x = images(48, 60, 1)
    found = feature_map(model, x[0].permute(1, 2, 0).numpy(), FeatureSettings(norm=False))
    assert found.values.shape == (96, 4, 5) and found.image_size == (48, 60) and found.padded_size == (56, 70)
    expected = encode(model, x, FeatureSettings(norm=False)).tokens[0].permute(2, 0, 1)
    torch.testing.assert_close(found.values, expected)
    # the image's middle is the map's; its left edge is 5 of 70 columns inside
    corner = found.in_map(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    torch.testing.assert_close(corner, torch.tensor([[0.5, 0.5], [5 / 70, 4 / 56]]))
