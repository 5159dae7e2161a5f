import math

import torch

from snd_nerfstudio.distillation.head import DINOHead, HeadSettings


def test_the_paper_s_head_has_the_widths_it_states():
    head = DINOHead(384, HeadSettings())
    shapes = {name: tuple(p.shape) for name, p in head.named_parameters()}
    assert shapes["mlp.0.weight"] == (2048, 384)
    assert shapes["mlp.2.weight"] == (2048, 2048)
    assert shapes["mlp.4.weight"] == (256, 2048)
    assert shapes["last_layer.weight_v"] == (65536, 256) and shapes["last_layer.weight_g"] == (65536, 1)


def test_logits_are_cosines_at_first_and_never_exceed_one():
    head = DINOHead(12, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
    logits = head(10 * torch.randn(50, 12))
    assert logits.abs().max() <= 1 + 1e-6
    assert torch.equal(head.last_layer.weight_g, torch.ones(20, 1))


def test_a_zero_token_gives_equal_logits_and_the_log_of_the_number_of_prototypes():
    head = DINOHead(12, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
    logits = head(torch.zeros(1, 12))
    assert torch.equal(logits, torch.zeros(1, 20))
    assert math.isclose(float(-torch.log_softmax(logits, -1)[0, 0]), math.log(20), rel_tol=1e-6)


def test_a_head_s_logits_are_the_products_of_its_two_parts():
    torch.manual_seed(0)
    head = DINOHead(12, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
    torch.nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    tokens = torch.randn(2, 5, 12)
    features, prototypes = head.parts(tokens)
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2, 5))
    torch.testing.assert_close(prototypes.norm(dim=-1, keepdim=True), head.last_layer.weight_g)
    torch.testing.assert_close(features @ prototypes.T, head(tokens))


def test_features_have_length_one_in_float32_under_autocast_too():
    head = DINOHead(12, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, prototypes = head.parts(torch.randn(5, 12))
    assert features.dtype == prototypes.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
