from dataclasses import replace

import pytest
import torch

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.supervision.blending import blend
from snd_nerfstudio.supervision.coverage import black_tokens
from snd_nerfstudio.supervision.dense import dense_supervision, lift
from snd_nerfstudio.supervision.pooling import pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.upsampling import upsample

HEIGHT, WIDTH = 56, 84
FIXED = SupervisionSettings()


def wall(masks=None, shift=0.0, dtype=torch.float32):
    """Two views of a textured wall two metres away, the second ``shift`` metres to the right."""
    poses = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    poses[1, 0, 3] = shift
    intrinsics = torch.tensor([[60.0, 0, WIDTH / 2], [0, 60.0, HEIGHT / 2], [0, 0, 1]], dtype=dtype).repeat(2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, HEIGHT, WIDTH, generator=generator, dtype=dtype)
    return Views(images, poses, intrinsics, masks, torch.full((2, HEIGHT, WIDTH), 2.0, dtype=dtype))


def run(views, tokens, settings, target=0, target_mask=None):
    gaussians = DepthReconstructor()(views)
    return dense_supervision(
        tokens, views.masks, (HEIGHT, WIDTH), gaussians, views.camera(target), target_mask, settings
    )


def smooth_tokens(seed=0, channels=6, dtype=torch.float32):
    coarse = torch.randn(1, channels, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    grown = torch.nn.functional.interpolate(coarse, size=(4, 6), mode="bilinear")
    return grown[0].permute(1, 2, 0).expand(2, -1, -1, -1).clone()


def test_a_context_view_splatted_onto_itself_returns_its_tokens():
    tokens = smooth_tokens()
    result = run(wall(), tokens, FIXED)
    cosine = torch.nn.functional.cosine_similarity(result.tokens, tokens[0], dim=-1)
    assert cosine.min() > 0.98 and result.coverage.min() > 0.95


def test_constant_tokens_stay_constant_wherever_there_is_any_coverage():
    views = wall(shift=0.4)
    sparse = replace(
        views, depths=views.depths * (torch.rand(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) > 0.7)
    )
    mask = torch.randint(0, 3, (HEIGHT, WIDTH))
    tokens = torch.full((2, 4, 6, 3), 5.0)
    result = run(sparse, tokens, FIXED, target_mask=mask)
    seen = result.coverage > 0.01
    assert seen.any() and result.coverage.max() < 0.97
    torch.testing.assert_close(result.tokens[seen], torch.full_like(result.tokens[seen], 5.0), rtol=1e-4, atol=0)


def test_without_weighting_partial_coverage_shrinks_the_tokens_as_in_the_paper():
    views = wall()
    sparse = replace(
        views, depths=views.depths * (torch.rand(2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3)) > 0.7)
    )
    settings = SupervisionSettings(weighting="none", blending=1.0)
    result = run(sparse, torch.full((2, 4, 6, 1), 5.0), settings)
    torch.testing.assert_close(result.tokens[..., 0], 5 * result.coverage, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        FIXED,
        SupervisionSettings(weighting="none", pooling="bilinear"),
        SupervisionSettings(
            align_corners=True,
            token_label="sample",
            isolated="zero",
            footprint="squared",
            weighting="none",
            pooling="bilinear",
        ),
    ],
    ids=["fixed", "paper", "official"],
)
def test_every_profile_is_linear_in_the_tokens(settings):
    masks = torch.randint(0, 4, (2, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    views = wall(masks, shift=0.3, dtype=torch.float64)
    a, b = smooth_tokens(1, dtype=torch.float64), smooth_tokens(2, dtype=torch.float64)
    both = run(views, 2 * a - 3 * b, settings, target_mask=masks[0]).tokens
    apart = (
        2 * run(views, a, settings, target_mask=masks[0]).tokens
        - 3 * run(views, b, settings, target_mask=masks[0]).tokens
    )
    torch.testing.assert_close(both, apart, rtol=0, atol=1e-10)


def test_the_chain_is_its_documented_steps_one_after_the_other():
    masks = torch.randint(0, 3, (2, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    views = wall(masks, shift=0.2)
    tokens = smooth_tokens()
    result = run(views, tokens, FIXED, target=1, target_mask=masks[1])
    gaussians = DepthReconstructor()(views)
    lifted = torch.cat([upsample(tokens[v], masks[v], (HEIGHT, WIDTH), FIXED).reshape(-1, 6) for v in range(2)])
    torch.testing.assert_close(result.lifted.features, lifted)
    splat = rasterize(gaussians, views.camera(1), lifted)
    blended = blend(splat.features, masks[1], 0.5, splat.alpha)
    mass = pool(splat.alpha[..., None], 4, 6)
    torch.testing.assert_close(result.tokens, pool(blended, 4, 6) / mass)
    torch.testing.assert_close(result.coverage, mass[..., 0])


def test_lifting_follows_the_gaussians_order_of_view_row_column():
    tokens = torch.zeros(2, 4, 6, 1)
    tokens[1] = 1.0
    features = lift(tokens, None, (HEIGHT, WIDTH), FIXED).features[:, 0]
    expected = torch.cat([torch.zeros(HEIGHT * WIDTH), torch.ones(HEIGHT * WIDTH)])
    torch.testing.assert_close(features, expected)


def test_another_number_of_gaussians_than_context_pixels_is_refused():
    gaussians = Gaussians(torch.zeros(3, 3), torch.ones(3, 4), torch.ones(3, 3), torch.ones(3))
    camera = PinholeCamera(torch.eye(4), torch.eye(3), 4, 4)
    with pytest.raises(ValueError, match="one per pixel"):
        dense_supervision(torch.zeros(2, 1, 1, 3), None, (4, 4), gaussians, camera, None, FIXED)


def test_black_tokens_are_read_at_one_pixel_per_token():
    colours = torch.ones(4, 6, 3)
    colours[2, 3] = 0.0  # the pixel that token (1, 1) of a 2x2 grid reads
    colours[0, 1] = 0.0  # read by none
    assert black_tokens(colours, 2, 2).tolist() == [[False, False], [False, True]]


def test_the_released_chain_matches_its_training_step(golden):
    """Everything between backbone and loss, with the original's stand-ins: a conv as backbone, a mean as renderer."""
    from snd_nerfstudio.distillation.head import DINOHead, HeadSettings
    from snd_nerfstudio.distillation.losses import prototype_loss

    v = golden("snd_training_step")
    official = SupervisionSettings(align_corners=True, token_label="sample", isolated="zero")

    def backbone(images, side):
        resized = torch.nn.functional.interpolate(images, size=(56, 84), mode="bilinear", align_corners=False)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        weight, bias = backbone_weight[side], v[f"w.{side}.backbone.proj.bias"]
        return torch.nn.functional.conv2d((resized - mean) / std, weight, bias, stride=14).permute(0, 2, 3, 1)

    def head(side):
        module = DINOHead(6, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
        prefix = f"w.{side}.dino_head."
        module.load_state_dict({k[len(prefix) :]: x for k, x in v.items() if k.startswith(prefix)})
        return module

    backbone_weight = {side: v[f"w.{side}.backbone.proj.weight"].clone() for side in ("student", "teacher")}
    backbone_weight["student"].requires_grad_(True)
    student_head = head("student")
    teacher_tokens, student_tokens = [], []
    for batch in range(2):
        masks = v["in.context_segmentation"][batch].long()
        lifted = lift(backbone(v["in.context_image"][batch], "teacher"), masks, (64, 96), official).features
        torch.testing.assert_close(lifted[::3], v["mid.lifted_features"][batch], rtol=0, atol=2e-5)
        render = lifted.view(2, 64, 96, 6).mean(0) + v["in.render_offset"][batch, 0].permute(1, 2, 0)
        blended = blend(render, v["in.target_segmentation"][batch, 0].long(), 0.5)
        torch.testing.assert_close(blended[::3, ::3], v["mid.blended"][batch, 0].permute(1, 2, 0), rtol=0, atol=2e-5)
        black = black_tokens(v["in.rendered_color"][batch, 0].permute(1, 2, 0), 4, 6)
        teacher = pool(blended, 4, 6, "bilinear").masked_fill(black[..., None], 0.0)
        torch.testing.assert_close(teacher, v["mid.teacher_target"][batch, 0].permute(1, 2, 0), rtol=0, atol=2e-5)
        student = backbone(v["in.target_image"][batch], "student")[0].masked_fill(black[..., None], 0.0)
        torch.testing.assert_close(student, v["mid.student_tokens"][batch, 0].permute(1, 2, 0), rtol=0, atol=2e-5)
        teacher_tokens.append(teacher.reshape(-1, 6))
        student_tokens.append(student.reshape(-1, 6))
    loss = prototype_loss(student_head(torch.cat(student_tokens)), head("teacher")(torch.cat(teacher_tokens)))
    torch.testing.assert_close(loss.cross_entropy.reshape(1), v["out.loss"], rtol=0, atol=2e-6)
    loss.cross_entropy.backward()
    for name, gradient in (
        ("backbone.proj.weight", backbone_weight["student"].grad),
        ("dino_head.mlp.0.weight", student_head.mlp[0].weight.grad),
        ("dino_head.last_layer.weight_g", student_head.last_layer.weight_g.grad),
    ):
        torch.testing.assert_close(gradient, v[f"out.grad.student.{name}"], rtol=1e-3, atol=1e-6)
