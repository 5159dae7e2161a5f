import copy

import pytest
import torch

from snd_nerfstudio.backbones.build import build_trainable
from snd_nerfstudio.backbones.lora import LoRASettings, add_adapters, merged
from snd_nerfstudio.backbones.registry import BACKBONES
from snd_nerfstudio.backbones.timm_models import create_vit
from snd_nerfstudio.errors import InputError


def adapted(patch_embed=False, **settings):
    backbone = build_trainable("tiny", "random", seed=0)
    return backbone, add_adapters(backbone.vit, LoRASettings(**settings), patch_embed, seed=1)


def test_attention_layers_alone_are_adapted():
    _, paths = adapted()
    assert sorted(paths) == sorted(f"blocks.{i}.attn.{name}" for i in range(4) for name in ("qkv", "proj"))


def test_the_patch_embedding_is_adapted_on_request():
    _, paths = adapted(patch_embed=True)
    assert len(paths) == 9 and "patch_embed.proj" in paths


@pytest.mark.parametrize(("patch_embed", "layers", "trained"), [(False, 24, 221_184), (True, 25, 228_960)])
def test_vit_small_gets_as_many_adapters_as_the_released_code_has(patch_embed, layers, trained):
    vit = create_vit(BACKBONES["dinov2-small"]).requires_grad_(False)
    assert len(add_adapters(vit, LoRASettings(), patch_embed, seed=0)) == layers
    assert sum(p.numel() for p in vit.parameters() if p.requires_grad) == trained


def test_adapters_change_nothing_at_first_and_only_they_are_trained():
    plain = build_trainable("tiny", "random", seed=0)
    backbone, _ = adapted()
    image = torch.rand(1, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(backbone(image), plain(image))
    names = [name for name, p in backbone.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)


def test_adapters_are_drawn_from_the_seed():
    first, second = (dict(adapted()[0].named_parameters()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("patch_embed", [False, True])
def test_merging_gives_a_plain_model_with_the_same_tokens(patch_embed):
    backbone, _ = adapted(patch_embed=patch_embed, dropout=0.3)
    values = {name: torch.randn_like(p) * 0.1 for name, p in backbone.vit.named_parameters() if p.requires_grad}
    before = {k: v.clone() for k, v in backbone.vit.state_dict().items()}
    plain = merged(backbone.vit, values)
    assert all(torch.equal(v, before[k]) for k, v in backbone.vit.state_dict().items())  # left as it was
    assert plain.state_dict().keys() == create_vit(BACKBONES["tiny"]).state_dict().keys()
    reference = copy.deepcopy(backbone)
    reference.vit.load_state_dict({**before, **values})
    result = copy.deepcopy(backbone)
    result.vit = plain
    image = torch.rand(1, 3, 28, 42)
    with torch.no_grad():
        expected, tokens, untrained = reference(image), result(image), backbone(image)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
    assert (expected - untrained).abs().max() > 0.1  # or the comparison would prove nothing


def test_useless_settings_are_refused():
    with pytest.raises(InputError, match="rank 0"):
        adapted(rank=0)
