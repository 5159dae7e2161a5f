"""The token operator against the dense chain, its slow twin, on small random scenes."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import jaxtyping
import numba
import pytest
import torch

from snd_nerfstudio.profiles import PROFILES
from snd_nerfstudio.splatting import Gaussians, PinholeCamera, rasterize
from snd_nerfstudio.supervision import token_kernel
from snd_nerfstudio.supervision.blending import blend
from snd_nerfstudio.supervision.coverage import black_tokens
from snd_nerfstudio.supervision.dense import EMPTY, dense_supervision
from snd_nerfstudio.supervision.pooling import area_weights, pool
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.supervision.token_builder import (
    SparseRows,
    _interpolation,
    _shares,
    build_token_operator,
    compact_labels,
    pooling_axis,
)
from snd_nerfstudio.supervision.upsampling import interpolation_weights

FIXED = SupervisionSettings()
PLAIN = SupervisionSettings(weighting="none")
PROFILE_SETTINGS = {
    name: SupervisionSettings(
        **{field.name: values[field.name] for field in fields(SupervisionSettings) if field.name in values}
    )
    for name, values in PROFILES.items()
}
DOUBLE, SINGLE = torch.float64, torch.float32
TOLERANCE = {DOUBLE: 1e-12, SINGLE: 1e-4}


@dataclass(frozen=True)
class Scene:
    """What `dense_supervision` takes, but for the settings."""

    tokens: torch.Tensor
    masks: torch.Tensor | None
    size: tuple[int, int]
    gaussians: Gaussians
    camera: PinholeCamera
    target_mask: torch.Tensor | None

    @property
    def grid(self):
        return tuple(self.tokens.shape[1:3])


def instances(size, count, random):
    """The cells of random points, and one pixel in ten of any instance: many boxes then hold three labels or more."""
    height, width = size
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.rand(count, 2, generator=random) * torch.tensor([height, width])
    cells = ((y[..., None] - centres[:, 0]) ** 2 + (x[..., None] - centres[:, 1]) ** 2).argmin(dim=-1)
    stray = torch.rand(size, generator=random) < 0.1
    return torch.where(stray, torch.randint(0, count, size, generator=random), cells)


def make_scene(
    size=(28, 42),
    grid=(2, 3),
    target_size=None,
    views=2,
    dtype=DOUBLE,
    seed=0,
    deviation=1.0,
    opacity=None,
    regions=6,
    channels=5,
):
    """One Gaussian per context pixel, scattered over a target camera off the origin; one in eight is behind it.

    Standard deviations are 0.3 to 3 pixels times `deviation`; opacities are uniform from 0 to 1 unless given.
    """
    random = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=random, dtype=DOUBLE)

    height, width = size if target_size is None else target_size
    n = views * size[0] * size[1]
    focal = 0.9 * width
    depth = 1 + 3 * uniform(n)
    depth[::8] *= -1
    rows = (torch.arange(size[0], dtype=DOUBLE) + 0.5) * height / size[0]
    columns = (torch.arange(size[1], dtype=DOUBLE) + 0.5) * width / size[1]
    pixel = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1).reshape(-1, 2).repeat(views, 1)
    pixel += 6 * uniform(n, 2) - 3
    centre = torch.tensor([0.48 * width, 0.53 * height], dtype=DOUBLE)
    in_camera = torch.cat([(pixel - centre) / focal * depth[:, None], depth[:, None]], dim=1)
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=random, dtype=DOUBLE))[0]
    pose = torch.eye(4, dtype=DOUBLE)
    pose[:3, :3] = rotation * torch.linalg.det(rotation)
    pose[:3, 3] = torch.tensor([0.3, -1.2, 2.0])
    gaussians = Gaussians(
        means=in_camera @ pose[:3, :3].T + pose[:3, 3],
        quats=torch.randn(n, 4, generator=random, dtype=DOUBLE),
        scales=deviation * 0.3 * 10 ** uniform(n, 3) * depth.abs()[:, None] / focal,
        opacities=uniform(n) if opacity is None else torch.full((n,), opacity, dtype=DOUBLE),
    )
    intrinsics = torch.tensor([[focal, 0, centre[0]], [0, 1.1 * focal, centre[1]], [0, 0, 1]], dtype=DOUBLE)
    return Scene(
        tokens=torch.randn(views, *grid, channels, generator=random, dtype=DOUBLE).to(dtype),
        masks=torch.stack([instances(size, regions, random) for _ in range(views)]),
        size=size,
        gaussians=gaussians.to(dtype=dtype),
        camera=PinholeCamera(pose, intrinsics, height, width).to(dtype=dtype),
        target_mask=instances((height, width), regions, random),
    )


def build(scene, settings, target_grid=None, route="auto"):
    return build_token_operator(
        scene.grid,
        scene.masks,
        scene.size,
        scene.gaussians,
        scene.camera,
        scene.target_mask,
        settings,
        target_grid,
        route,
    )


def dense(scene, settings, blending, target_grid=None):
    """Tokens, coverage and isolated share by the dense chain, pooled here where the target has a grid of its own."""
    settings = replace(settings, blending=blending)
    result = dense_supervision(
        scene.tokens, scene.masks, scene.size, scene.gaussians, scene.camera, scene.target_mask, settings
    )
    if target_grid is None:
        return result.tokens, result.coverage, result.lifted.isolated
    tokens = pool(result.blended, *target_grid, settings.pooling)
    if settings.weighting == "coverage":
        mass = pool(result.alpha[..., None], *target_grid, settings.pooling)
        tokens = torch.where(mass > EMPTY, tokens / mass.clamp(min=EMPTY), torch.zeros_like(tokens))
    return tokens, pool(result.alpha[..., None], *target_grid)[..., 0], result.lifted.isolated


def assert_parity(scene, settings, target_grid=None, tolerance=None, blendings=(0.0, 0.5, 1.0)):
    """One operator equals the dense chain at every blending strength; returns the operator."""
    tolerance = TOLERANCE[scene.tokens.dtype] if tolerance is None else tolerance
    operator = build(scene, settings, target_grid)
    for blending in blendings:
        tokens, coverage, isolated = dense(scene, settings, blending, target_grid)
        found = operator(scene.tokens, blending)
        assert found.dtype == operator.coverage.dtype == scene.tokens.dtype
        assert torch.isfinite(found).all()
        torch.testing.assert_close(found, tokens, rtol=0, atol=tolerance)
        torch.testing.assert_close(operator.coverage, coverage, rtol=0, atol=tolerance)
        torch.testing.assert_close(operator.isolated, isolated, rtol=0, atol=1e-6)
    return operator


def matrices(operator):
    """All of an operator's parts as dense matrices."""
    return {
        "points": operator.points.matrix().to_dense(),
        "regions": operator.regions.matrix().to_dense(),
        "shares": operator.shares.matrix().to_dense(),
        "coverage": operator.coverage,
        "isolated": operator.isolated,
    }


def assert_same_bits(one, other):
    for name in ("points", "regions", "shares"):
        a, b = getattr(one, name), getattr(other, name)
        assert a.width == b.width
        for part in ("starts", "columns", "values"):
            assert torch.equal(getattr(a, part), getattr(b, part)), f"{part} of {name} differ"
    assert torch.equal(one.coverage, other.coverage) and torch.equal(one.isolated, other.isolated)


# ---------------------------------------------------------------------- the dense chain is the twin


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("profile", PROFILE_SETTINGS)
def test_every_profile_equals_the_dense_chain(profile, dtype):
    settings = PROFILE_SETTINGS[profile]
    scene = make_scene((50, 73), (4, 5), dtype=dtype, regions=9)
    tight = 5e-6 if dtype == SINGLE and settings.weighting == "none" else None
    operator = assert_parity(scene, settings, tolerance=tight)
    assert operator.coverage.max() > 0.5 and 0 < operator.isolated < 0.5


@pytest.mark.parametrize("masked", ["no masks", "context masks", "target mask", "both masks"])
@pytest.mark.parametrize("weighting", ["coverage", "none"])
@pytest.mark.parametrize("pooling", ["area", "bilinear"])
def test_every_combination_of_pooling_weighting_and_masks_equals_the_dense_chain(pooling, weighting, masked):
    scene = make_scene(seed=1)
    if masked not in ("context masks", "both masks"):
        scene = replace(scene, masks=None)
    if masked not in ("target mask", "both masks"):
        scene = replace(scene, target_mask=None)
    operator = assert_parity(scene, SupervisionSettings(weighting=weighting, pooling=pooling))
    assert (operator.regions is None) == (operator.shares is None) == (scene.target_mask is None)


@pytest.mark.parametrize("isolated", ["bilinear", "zero"])
@pytest.mark.parametrize("token_label", ["majority", "sample"])
@pytest.mark.parametrize("align_corners", [False, True], ids=["centres", "corners"])
def test_every_way_to_upsample_equals_the_dense_chain(align_corners, token_label, isolated):
    settings = SupervisionSettings(align_corners=align_corners, token_label=token_label, isolated=isolated)
    operator = assert_parity(make_scene((31, 40), (3, 4), seed=2, regions=12), settings)
    assert operator.isolated > 0


def test_plain_bilinear_upsampling_ignores_the_context_masks():
    settings = SupervisionSettings(upsampling="bilinear")
    scene = make_scene(seed=3)
    operator = assert_parity(scene, settings)
    assert operator.isolated == 0
    assert_same_bits(operator, build(replace(scene, masks=None), settings))


SCENES = {
    "large Gaussians, wider than a tile": {
        "size": (24, 36),
        "target_size": (70, 98),
        "deviation": 20,
        "opacity": 0.01,
    },
    "Gaussians wider than 16 pixels": {"size": (20, 30), "target_size": (70, 98), "deviation": 6, "opacity": 0.1},
    "tiny Gaussians": {"deviation": 0.01},
    "thousands, opaque, overlapping": {"size": (42, 56), "grid": (3, 4), "deviation": 12, "opacity": 1.0},
    "thousands, faint, overlapping": {"size": (42, 56), "grid": (3, 4), "deviation": 3, "opacity": 0.02},
    "sizes that are no multiple of the patch": {"size": (45, 61), "grid": (3, 4)},
    "one view": {"views": 1},
    "three views": {"views": 3, "size": (20, 30)},
    "a grid of one row": {"size": (14, 70), "grid": (1, 5)},
    "a grid of one column": {"size": (70, 14), "grid": (5, 1)},
    "a grid of one token": {"size": (20, 20), "grid": (1, 1)},
    "tokens of one pixel": {"size": (9, 13), "grid": (9, 13)},
    "tokens of one and a half pixels": {"size": (12, 18), "grid": (8, 12)},
    "a target of one pixel": {"size": (14, 14), "grid": (1, 1), "target_size": (1, 1)},
    "a narrow target": {"target_size": (97, 5)},
    "a larger target": {"target_size": (70, 98)},
    "a single region": {"regions": 1},
    "a hundred regions": {"regions": 100},
}


@pytest.mark.parametrize("settings", [FIXED, PROFILE_SETTINGS["paper"]], ids=["fixed", "paper"])
@pytest.mark.parametrize("case", SCENES.values(), ids=SCENES.keys())
def test_in_float64_every_scene_equals_the_dense_chain_to_rounding(case, settings):
    operator = assert_parity(make_scene(**case, seed=4), settings)
    assert operator.coverage.max() > 0.05


@pytest.mark.parametrize("case", SCENES.values(), ids=SCENES.keys())
def test_in_float32_every_scene_equals_the_dense_chain_to_5e_6(case):
    assert_parity(make_scene(**case, dtype=SINGLE, seed=4), PLAIN, tolerance=5e-6)
    assert_parity(make_scene(**case, dtype=SINGLE, seed=5), FIXED)


@pytest.mark.parametrize("target_grid", [(2, 3), (5, 7), (1, 4), (4, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("pooling", ["area", "bilinear"])
def test_the_target_may_have_another_size_and_grid(pooling, target_grid):
    scene = make_scene((28, 42), (4, 6), target_size=(53, 75), seed=6)
    operator = assert_parity(scene, SupervisionSettings(pooling=pooling), target_grid)
    assert operator.coverage.shape == target_grid


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
def test_holes_and_large_uncovered_parts(dtype):
    scene = make_scene((42, 56), (3, 4), dtype=dtype, seed=7)
    holes = torch.rand(2, *scene.size, generator=torch.Generator().manual_seed(0)) < 0.3
    holes[:, :, :30] = True  # more than half of the image has no support
    opacities = scene.gaussians.opacities * ~holes.flatten()
    means = torch.where(holes.reshape(-1, 1), scene.camera.camera_to_world[:3, 3], scene.gaussians.means)
    scene = replace(scene, gaussians=replace(scene.gaussians, opacities=opacities, means=means))
    for name, settings in PROFILE_SETTINGS.items():
        operator = assert_parity(scene, settings)
        assert operator.coverage.min() == 0 < operator.coverage.max(), name


@pytest.mark.parametrize("profile", PROFILE_SETTINGS)
@pytest.mark.parametrize("why", ["behind the camera", "transparent", "outside the image"])
def test_where_nothing_is_visible_the_tokens_are_zero(why, profile):
    scene = make_scene(seed=8)
    position, forward = scene.camera.camera_to_world[:3, 3], scene.camera.camera_to_world[:3, 2]
    if why == "behind the camera":
        gaussians = replace(scene.gaussians, means=(position - 2 * forward).expand_as(scene.gaussians.means))
    elif why == "outside the image":
        right = scene.camera.camera_to_world[:3, 0]
        gaussians = replace(scene.gaussians, means=(position + forward + 50 * right).expand_as(scene.gaussians.means))
    else:
        gaussians = replace(scene.gaussians, opacities=torch.zeros_like(scene.gaussians.opacities))
    operator = assert_parity(replace(scene, gaussians=gaussians), PROFILE_SETTINGS[profile])
    assert not operator.coverage.any()
    for blending in (0.0, 0.5, 1.0):
        assert torch.equal(operator(scene.tokens, blending), torch.zeros(2, 3, 5, dtype=DOUBLE))


def test_every_pixel_its_own_region():
    scene = make_scene((24, 30), (2, 3), seed=9)
    own = torch.arange(24 * 30).view(24, 30)
    scene = replace(scene, masks=torch.stack([own, own.flip(0)]), target_mask=own)
    for settings in PROFILE_SETTINGS.values():
        operator = assert_parity(scene, settings)
        assert len(operator.regions.starts) == 24 * 30 + 1


@pytest.mark.parametrize(
    "rename",
    [
        lambda ids: ids - 3,
        lambda ids: ids * 1000 + 7,
        lambda ids: (ids - 2) * 2**60,
        lambda ids: ids + 4096 - 6,
        lambda ids: ids + 4096 - 5,
        lambda ids: ids.to(torch.int32),
        lambda ids: (ids * -50).to(torch.int16),
    ],
    ids=["negative", "gaps", "near the ends of int64", "up to 4095", "up to 4096", "int32", "int16"],
)
def test_instances_may_have_any_ids(rename):
    scene = make_scene(seed=10)
    scene = replace(scene, masks=rename(scene.masks), target_mask=rename(scene.target_mask))
    for settings in (FIXED, PROFILE_SETTINGS["official"]):
        assert_parity(scene, settings)


def test_equal_depths_are_composited_in_order_of_index():
    scene = make_scene(seed=11, deviation=2)
    camera = replace(scene.camera, camera_to_world=torch.eye(4, dtype=DOUBLE))
    random = torch.Generator().manual_seed(0)
    means = torch.rand(len(scene.gaussians), 3, generator=random, dtype=DOUBLE) * 2 - 1
    means[:, 2] = 2 + torch.randint(0, 3, (len(means),), generator=random)  # three depths, exactly
    for dtype in (DOUBLE, SINGLE):
        tied = replace(
            scene,
            tokens=scene.tokens.to(dtype),
            gaussians=replace(scene.gaussians, means=means).to(dtype=dtype),
            camera=camera.to(dtype=dtype),
        )
        assert_parity(tied, FIXED)


def test_the_operator_is_the_product_of_four_matrices_made_by_the_slowest_means():
    """`D B S U`, each a dense matrix: splat weights from the reference engine, an unit feature per Gaussian."""
    scene = make_scene((14, 21), (2, 3), views=1, seed=12, channels=4)
    height, width = scene.size
    operator = build(scene, PLAIN)
    upsampling = interpolation_weights(scene.masks[0], scene.size, scene.grid, PLAIN, DOUBLE)
    lift = torch.zeros(height * width, 6, dtype=DOUBLE).scatter_add_(1, upsampling.tokens, upsampling.weights)
    units = torch.eye(len(scene.gaussians), dtype=DOUBLE)
    splat = rasterize(scene.gaussians, scene.camera, units, engine="reference").features.view(height * width, -1)
    pooling = torch.kron(area_weights(2, height, DOUBLE), area_weights(3, width, DOUBLE))
    member = torch.nn.functional.one_hot(scene.target_mask.flatten()).to(DOUBLE)
    expected = {
        "points": pooling @ splat @ lift,
        "regions": (member / member.sum(dim=0)).T @ splat @ lift,
        "shares": pooling @ member,
    }
    for name, matrix in expected.items():
        torch.testing.assert_close(getattr(operator, name).matrix().to_dense(), matrix, rtol=0, atol=1e-12)


def test_with_tokens_of_one_pixel_the_operator_has_the_engines_weights_bit_by_bit():
    for dtype in (SINGLE, DOUBLE):
        scene = make_scene((19, 23), (19, 23), views=1, dtype=dtype, seed=13, deviation=3, channels=1)
        operator = build(replace(scene, masks=None, target_mask=None), PLAIN)
        splat = rasterize(scene.gaussians, scene.camera, torch.eye(len(scene.gaussians), dtype=dtype))
        assert torch.equal(operator.coverage, splat.alpha)
        weights = operator.points.matrix().to_dense().view(splat.features.shape)
        assert (weights > 0).sum() > 1000 and torch.equal(weights, splat.features)


# ---------------------------------------------------------------------- two routes


@pytest.mark.parametrize("profile", PROFILE_SETTINGS)
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"size": (24, 36), "target_size": (70, 98), "deviation": 6, "opacity": 0.1},
        {"size": (45, 61), "grid": (3, 4), "regions": 40},
        {"size": (14, 42), "grid": (1, 3)},
        {"size": (12, 18), "grid": (8, 12)},
        {"deviation": 4, "opacity": 1.0},
    ],
    ids=["ordinary", "large Gaussians", "forty regions", "a single row", "small tokens", "opaque"],
)
def test_gradients_of_the_rasterizer_give_the_same_operator(case, profile):
    scene = make_scene(**case, seed=14)
    by_sums = matrices(build(scene, PROFILE_SETTINGS[profile], route="sums"))
    by_gradients = matrices(build(scene, PROFILE_SETTINGS[profile], route="gradients"))
    for name, matrix in by_sums.items():
        torch.testing.assert_close(by_gradients[name], matrix, rtol=0, atol=1e-9, msg=lambda text, n=name: n + text)


def test_the_route_by_gradients_takes_any_grid_and_any_ids_and_no_masks():
    scene = make_scene((28, 42), (4, 6), target_size=(53, 75), seed=15)
    scene = replace(scene, target_mask=(scene.target_mask - 2) * 2**60)
    one, other = (matrices(build(scene, FIXED, (5, 7), route)) for route in ("sums", "gradients"))
    for name, matrix in one.items():
        torch.testing.assert_close(other[name], matrix, rtol=0, atol=1e-9)
    bare = replace(scene, masks=None, target_mask=None)
    one, other = (build(bare, FIXED, (5, 7), route) for route in ("sums", "gradients"))
    assert one.regions is None and other.regions is None and other.shares is None
    torch.testing.assert_close(other.points.matrix().to_dense(), one.points.matrix().to_dense(), rtol=0, atol=1e-9)


def test_the_route_by_gradients_gives_zeros_where_nothing_is_visible():
    scene = make_scene(seed=16)
    hidden = replace(scene.gaussians, opacities=torch.zeros_like(scene.gaussians.opacities))
    operator = build(replace(scene, gaussians=hidden), FIXED, route="gradients")
    assert torch.equal(operator(scene.tokens, 0.5), torch.zeros(2, 3, 5, dtype=DOUBLE))


# ---------------------------------------------------------------------- bits and memory


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
def test_one_thread_and_all_threads_give_the_same_bits(dtype):
    scene = make_scene((70, 98), (5, 7), dtype=dtype, seed=17, deviation=2, regions=20)
    threads = numba.get_num_threads()
    everything, again = build(scene, FIXED), build(scene, FIXED)
    try:
        numba.set_num_threads(1)
        alone = build(scene, FIXED)
    finally:
        numba.set_num_threads(threads)
    assert_same_bits(everything, again)
    assert_same_bits(everything, alone)


def test_several_python_threads_may_build_at_once():
    scenes = [make_scene(seed=seed) for seed in range(4)]
    expected = [build(scene, FIXED) for scene in scenes]
    with ThreadPoolExecutor(4) as pool_of_threads:
        found = list(pool_of_threads.map(lambda scene: build(scene, FIXED), scenes * 3))
    for one, other in zip(found, expected * 3, strict=True):
        assert_same_bits(one, other)


def test_a_capacity_that_has_to_grow_changes_nothing(monkeypatch):
    scene = make_scene((70, 98), (5, 7), seed=18, regions=30)
    expected = build(scene, FIXED)
    for capacity in (1, 8, 100):
        monkeypatch.setattr(token_kernel, "FIRST_CAPACITY", capacity)
        assert_same_bits(build(scene, FIXED), expected)


def strided(tensor):
    """The same values, nowhere adjacent in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 77)], dim=-1)[..., 0]


@pytest.mark.parametrize("route", ["sums", "gradients"])
def test_inputs_need_not_be_contiguous(route):
    scene = make_scene(seed=19)
    scattered = Scene(
        tokens=strided(scene.tokens),
        masks=scene.masks.mT.contiguous().mT,
        size=scene.size,
        gaussians=Gaussians(
            *(strided(getattr(scene.gaussians, name)) for name in ("means", "quats", "scales", "opacities"))
        ),
        camera=replace(
            scene.camera,
            camera_to_world=strided(scene.camera.camera_to_world),
            intrinsics=scene.camera.intrinsics.mT.contiguous().mT,
        ),
        target_mask=scene.target_mask.mT.contiguous().mT,
    )
    for rename in (lambda ids: ids, lambda ids: (ids - 2) * 2**60):
        renamed = replace(scattered, masks=rename(scattered.masks), target_mask=rename(scattered.target_mask))
        assert not renamed.tokens.is_contiguous() and not renamed.target_mask.is_contiguous()
        operator, expected = build(renamed, FIXED, route=route), build(scene, FIXED, route=route)
        assert_same_bits(operator, expected)
        torch.testing.assert_close(operator(renamed.tokens, 0.5), expected(scene.tokens, 0.5), rtol=0, atol=0)


def test_inputs_are_left_as_they_were_and_results_share_no_memory():
    scene = make_scene(seed=20)
    before = make_scene(seed=20)
    operator = build(scene, FIXED)
    kept = {name: matrix.clone() for name, matrix in matrices(operator).items()}
    build(replace(scene, target_mask=scene.target_mask.flip(0), masks=scene.masks.flip(1)), FIXED)
    for name, matrix in matrices(operator).items():
        assert torch.equal(matrix, kept[name])
    for name in ("means", "quats", "scales", "opacities"):
        assert torch.equal(getattr(scene.gaussians, name), getattr(before.gaussians, name))
    assert torch.equal(scene.masks, before.masks) and torch.equal(scene.target_mask, before.target_mask)


def test_nothing_requires_a_gradient_even_if_the_gaussians_do():
    scene = make_scene(seed=21)
    expected = build(scene, FIXED)
    fields_of = {name: getattr(scene.gaussians, name) for name in ("means", "quats", "scales", "opacities")}
    leaves = {name: field.clone().requires_grad_() for name, field in fields_of.items()}
    operator = build(replace(scene, gaussians=Gaussians(**leaves)), FIXED)
    assert_same_bits(operator, expected)
    assert not operator(scene.tokens.clone().requires_grad_(), 0.5).requires_grad
    assert all(leaf.grad is None for leaf in leaves.values())


# ---------------------------------------------------------------------- what the matrices mean


@pytest.mark.parametrize("pooling", ["area", "bilinear"])
@pytest.mark.parametrize("weighting", ["coverage", "none"])
def test_rows_sum_to_one_or_to_the_coverage(weighting, pooling):
    scene = make_scene((42, 56), (3, 4), seed=22)
    holes = torch.ones(2, *scene.size, dtype=DOUBLE)
    holes[:, :, :30] = 0
    scene = replace(scene, gaussians=replace(scene.gaussians, opacities=scene.gaussians.opacities * holes.flatten()))
    operator = build(scene, SupervisionSettings(weighting=weighting, pooling=pooling))
    parts = matrices(operator)
    alpha = rasterize(scene.gaussians, scene.camera, scene.gaussians.means).alpha
    pooled = pool(alpha[..., None], 3, 4, pooling).flatten()
    weighted = weighting == "coverage"
    expected = (pooled > EMPTY).to(DOUBLE) if weighted else pooled
    torch.testing.assert_close(parts["points"].sum(dim=1), expected, rtol=0, atol=1e-12)
    assert (pooled == 0).any() and (pooled > 0.5).any()
    if pooling == "area":
        torch.testing.assert_close(operator.coverage.flatten(), pooled, rtol=0, atol=1e-15)
    # A region's mean has all of its weight, or the share of its pixels that is covered; a token is in some region.
    region_mass = torch.bincount(scene.target_mask.flatten(), alpha.flatten())
    share = (region_mass > 0).to(DOUBLE) if weighted else region_mass / torch.bincount(scene.target_mask.flatten())
    torch.testing.assert_close(parts["regions"].sum(dim=1), share, rtol=0, atol=1e-12)
    shares = expected if weighted else torch.ones_like(expected)
    torch.testing.assert_close(parts["shares"].sum(dim=1), shares, rtol=0, atol=1e-12)


@pytest.mark.parametrize("route", ["sums", "gradients"])
@pytest.mark.parametrize("profile", PROFILE_SETTINGS)
def test_matrices_are_well_formed_and_not_negative(profile, route):
    operator = build(make_scene((45, 61), (3, 4), seed=23), PROFILE_SETTINGS[profile], route=route)
    for rows in (operator.points, operator.regions, operator.shares):
        assert isinstance(rows, SparseRows)
        assert rows.starts.dtype == torch.int64 and rows.columns.dtype == torch.int32 and rows.values.dtype == DOUBLE
        assert rows.starts[0] == 0 and rows.starts[-1] == len(rows.columns) == len(rows.values)
        assert (rows.values >= 0).all() and torch.isfinite(rows.values).all()
        assert ((0 <= rows.columns) & (rows.columns < rows.width)).all()
        row = torch.repeat_interleave(torch.arange(len(rows.starts) - 1), rows.starts.diff())
        assert ((row * rows.width + rows.columns).diff() > 0).all(), "columns do not ascend within the rows"
    assert operator.points.width == operator.regions.width == 2 * 3 * 4
    assert len(operator.points.starts) == len(operator.shares.starts) == 3 * 4 + 1
    assert len(operator.regions.starts) == operator.shares.width + 1


def test_constant_tokens_stay_constant_wherever_there_is_coverage():
    scene = make_scene((42, 56), (3, 4), seed=24, opacity=0.2)
    operator = build(scene, FIXED)
    for blending in (0.0, 0.3, 1.0):
        found = operator(torch.full((2, 3, 4, 2), 5.0, dtype=DOUBLE), blending)
        torch.testing.assert_close(found, torch.full_like(found, 5.0), rtol=1e-12, atol=0)


def test_the_operator_is_linear_in_the_tokens_and_in_the_blending():
    operator = build(make_scene(seed=25), FIXED)
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 2, 3, 7, generator=random, dtype=DOUBLE)
    apart = 2 * operator(a, 0.4) - 3 * operator(b, 0.4)
    torch.testing.assert_close(operator(2 * a - 3 * b, 0.4), apart, rtol=0, atol=1e-12)
    mixed = 0.25 * operator(a, 1.0) + 0.75 * operator(a, 0.0)
    torch.testing.assert_close(operator(a, 0.25), mixed, rtol=0, atol=1e-12)


def test_an_operator_serves_tokens_of_any_number_of_channels():
    operator = build(make_scene(seed=26), FIXED)
    tokens = torch.randn(2, 2, 3, 40, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    everything = operator(tokens, 0.5)
    assert everything.shape == (2, 3, 40)
    for channels in (slice(0, 1), slice(3, 20)):
        some = operator(tokens[..., channels], 0.5)
        torch.testing.assert_close(some, everything[..., channels], rtol=0, atol=1e-13)


def test_built_for_no_blending_it_has_no_regions_and_splats_alone():
    scene = make_scene(seed=27)
    operator = build(scene, replace(FIXED, blending=1.0))
    assert operator.regions is None and operator.shares is None
    torch.testing.assert_close(operator(scene.tokens, 1.0), dense(scene, FIXED, 1.0)[0], rtol=0, atol=1e-12)


def test_it_can_be_moved_to_another_device():
    scene = make_scene(seed=28)
    operator = build(scene, FIXED)
    moved = operator.to("cpu")
    assert_same_bits(moved, operator)
    bare = build(replace(scene, target_mask=None), FIXED).to("cpu")
    assert bare.regions is None and bare.shares is None


# ---------------------------------------------------------------------- errors


def test_another_number_of_gaussians_than_context_pixels_is_refused():
    scene = make_scene()
    some = Gaussians(*(getattr(scene.gaussians, name)[:-1] for name in ("means", "quats", "scales", "opacities")))
    with pytest.raises(ValueError, match="one per pixel"):
        build(replace(scene, gaussians=some), FIXED)


@pytest.mark.parametrize("blending", [0.5, 1.0])
def test_a_target_mask_of_another_size_is_refused(blending):
    scene = make_scene()
    with pytest.raises(ValueError, match="differ in size"):
        build(replace(scene, target_mask=scene.target_mask[:, 1:]), replace(FIXED, blending=blending))


@pytest.mark.parametrize("route", ["sums", "gradients"])
@pytest.mark.parametrize("wrong", ["smaller", "larger", "transposed", "one view less", "one view more"])
def test_context_masks_of_another_size_are_refused(wrong, route):
    scene = make_scene()
    masks = {
        "smaller": scene.masks[:, 1:],
        "larger": torch.cat([scene.masks, scene.masks], dim=2),
        "transposed": scene.masks.mT,
        "one view less": scene.masks[:1],
        "one view more": torch.cat([scene.masks, scene.masks[:1]]),
    }
    with pytest.raises(ValueError):
        build(replace(scene, masks=masks[wrong]), FIXED, route=route)


@pytest.mark.parametrize("route", ["sums", "gradients"])
@pytest.mark.parametrize("what", ["a Gaussian that is NaN", "a camera that is not finite", "skewed pixels"])
def test_what_the_dense_chain_refuses_is_refused(what, route):
    scene = make_scene()
    if what == "a Gaussian that is NaN":
        scene.gaussians.means[3, 1] = float("nan")
    elif what == "a camera that is not finite":
        scene.camera.camera_to_world[0, 3] = float("inf")
    else:
        scene.camera.intrinsics[0, 1] = 5.0
    with pytest.raises(ValueError):
        dense(scene, FIXED, 0.5)
    with pytest.raises(ValueError):
        build(scene, FIXED, route=route)


def test_tokens_of_another_grid_are_refused():
    operator = build(make_scene(), FIXED)
    for shape in ((2, 3, 3, 5), (1, 2, 3, 5)):
        with pytest.raises(ValueError, match="context tokens"):
            operator(torch.zeros(shape, dtype=DOUBLE), 0.5)


def test_blending_is_refused_by_an_operator_built_for_none():
    scene = make_scene()
    operator = build(scene, replace(FIXED, blending=1.0))
    with pytest.raises(ValueError, match="blending"):
        operator(scene.tokens, 0.5)


@pytest.mark.parametrize("blending", [-0.1, 1.1])
def test_a_blending_strength_outside_the_unit_interval_is_refused(blending):
    scene = make_scene()
    with pytest.raises(ValueError, match="blending"):
        build(scene, FIXED)(scene.tokens, blending)


def test_an_unknown_route_is_refused():
    with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
        build(make_scene(), FIXED, route="detour")


# ---------------------------------------------------------------------- the released code


def test_the_parts_of_the_operator_match_the_released_training_step(golden):
    """Its renderer is a stand-in (a mean over views, and an offset): the parts before and after it are compared."""
    vectors = golden("snd_training_step")
    official = PROFILE_SETTINGS["official"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    weight, bias = (vectors[f"w.teacher.backbone.proj.{name}"] for name in ("weight", "bias"))
    size, grid = (64, 96), (4, 6)
    rows, columns = (pooling_axis(t, p, official.pooling, SINGLE) for t, p in zip(grid, size, strict=True))
    for batch in range(2):
        images = torch.nn.functional.interpolate(vectors["in.context_image"][batch], size=(56, 84), mode="bilinear")
        tokens = torch.nn.functional.conv2d((images - mean) / std, weight, bias, stride=14).permute(0, 2, 3, 1)
        masks = vectors["in.context_segmentation"][batch].long()
        lifting, _ = _interpolation(masks, size, grid, 2, official, SINGLE)
        places = torch.from_numpy(lifting.base[:, None] + lifting.offsets).long()
        lifted = torch.einsum("nk,nkc->nc", torch.from_numpy(lifting.weights), tokens.flatten(0, 2)[places])
        torch.testing.assert_close(lifted[::3], vectors["mid.lifted_features"][batch], rtol=0, atol=2e-5)

        render = lifted.view(2, *size, 6).mean(0) + vectors["in.render_offset"][batch, 0].permute(1, 2, 0)
        mask = vectors["in.target_segmentation"][batch, 0].long()
        labels, count = compact_labels(mask)
        shares = _shares(rows, columns, labels, count, torch.ones(size)).matrix().to_dense().to(SINGLE)
        # a region's mean is what blending of strength 0 puts at any of its pixels
        means = blend(render, mask, 0.0).flatten(0, 1)
        first = torch.stack([(mask.flatten() == i).to(torch.uint8).argmax() for i in range(count)])
        pooled = pool(render, *grid, "bilinear").flatten(0, 1)
        blended = torch.lerp(shares @ means[first], pooled, 0.5).view(*grid, 6)
        black = black_tokens(vectors["in.rendered_color"][batch, 0].permute(1, 2, 0), *grid)
        expected = vectors["mid.teacher_target"][batch, 0].permute(1, 2, 0)
        torch.testing.assert_close(blended.masked_fill(black[..., None], 0.0), expected, rtol=0, atol=2e-5)
