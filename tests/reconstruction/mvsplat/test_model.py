import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings, cost_volume
from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError
from snd_nerfstudio.reconstruction.mvsplat.depth import enlarge
from snd_nerfstudio.reconstruction.mvsplat.outputs import (
    multiply_quaternions,
    rotations_to_quaternions,
    to_gaussians,
)
from snd_nerfstudio.splatting.gaussians import rotation_matrices

SMALL = MVSplatSettings(
    candidates=8,
    stem_channels=8,
    middle_channels=12,
    feature_channels=16,
    transformer_blocks=2,
    cost_channels=32,
    depth_channels=32,
    harmonics=4,
    near=0.5,
    far=20.0,
)
GEOMETRIES = pytest.mark.parametrize("geometry", ["official", "exact"])


def network(geometry="exact", seed=0):
    """A small network without the zeros that a fresh one starts with, and with varied offsets, depths and colours."""
    made = MVSplat(replace(SMALL, geometry=geometry)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(noise * 0.1 + (1.0 if name.endswith("weight") else 0.0))
        made.depth.disparity_head[2].weight.mul_(0.5)
        made.depth.gaussian_head[2].weight.mul_(10)
    return made


def inputs(height=32, width=48, batch=1, seed=0):
    """Two views 0.2 apart and turned a little, with intrinsics of their own and principal points off the middle."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(batch, 2, 3, height, width, generator=generator)
    intrinsics = torch.zeros(batch, 2, 3, 3)
    intrinsics[..., 0, 0] = width * (0.8 + 0.4 * torch.rand(batch, 2, generator=generator))
    intrinsics[..., 1, 1] = width * (0.8 + 0.4 * torch.rand(batch, 2, generator=generator))
    intrinsics[..., 0, 2] = width * (0.4 + 0.2 * torch.rand(batch, 2, generator=generator))
    intrinsics[..., 1, 2] = height * (0.4 + 0.2 * torch.rand(batch, 2, generator=generator))
    intrinsics[..., 2, 2] = 1
    poses = torch.eye(4).repeat(batch, 2, 1, 1)
    axes = torch.tensor([1.0, 0, 0, 0]) + 0.05 * torch.randn(2 * batch, 4, generator=generator)
    poses[..., :3, :3] = rotation_matrices(axes).view(batch, 2, 3, 3)
    poses[..., :3, 3] = torch.randn(batch, 2, 3, generator=generator) * 0.2
    return images, intrinsics, poses


def camera_points(gaussians, poses):
    """Means of each view's Gaussians in that view's camera, [b, v, H W, 3]."""
    means = gaussians.means.unflatten(1, (2, -1))
    return (means - poses[..., None, :3, 3]) @ poses[..., :3, :3]


@pytest.mark.parametrize("size", [(32, 48), (37, 50), (56, 84), (16, 16), (17, 16)])
@GEOMETRIES
def test_every_gaussian_projects_into_its_own_pixel(size, geometry):
    images, intrinsics, poses = inputs(*size)
    with torch.no_grad():
        gaussians = network(geometry)(images, intrinsics, poses)
    height, width = size
    assert gaussians.means.shape == (1, 2 * height * width, 3)
    projected = camera_points(gaussians, poses) @ intrinsics.transpose(-1, -2)
    assert (projected[..., 2] > 0).all()
    pixels = projected[..., :2] / projected[..., 2:]
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    off = pixels - torch.stack([columns, rows], dim=-1).reshape(-1, 2)
    assert off.abs().max() <= 0.5 + 1e-3
    assert off.std() > 0.1  # offsets inside the pixel are there


@GEOMETRIES
def test_depth_is_along_z_or_along_the_ray_as_the_geometry_says(geometry):
    images, intrinsics, poses = inputs()
    with torch.no_grad():
        gaussians = network(geometry)(images, intrinsics, poses)
    points = camera_points(gaussians, poses)
    depths = gaussians.depths.flatten(2)
    along_z, along_ray = points[..., 2], points.norm(dim=-1)
    expected, other = (along_z, along_ray) if geometry == "exact" else (along_ray, along_z)
    torch.testing.assert_close(depths, expected, rtol=1e-5, atol=1e-5)
    assert ((depths - other).abs() / depths).max() > 0.05
    assert depths.std() > 0.1


def test_a_size_that_does_not_fit_is_continued_at_the_right_and_the_bottom():
    images, intrinsics, poses = inputs(37, 50)
    made = network()
    with torch.no_grad():
        ours = made(images, intrinsics, poses)
        padded = F.pad(images.flatten(0, 1), (0, 14, 0, 11), mode="replicate")[None]
        large = made(padded, intrinsics, poses)
    assert torch.equal(ours.depths, large.depths[..., :37, :50])
    kept = torch.zeros(2, 48, 64, dtype=torch.bool)
    kept[:, :37, :50] = True
    for name in ("means", "quats", "scales", "opacities", "harmonics"):
        torch.testing.assert_close(getattr(ours, name), getattr(large, name)[:, kept.flatten()], rtol=0, atol=1e-5)


def test_a_size_that_fits_is_left_as_it_is():
    images, intrinsics, poses = inputs(32, 48)
    made = network()
    seen = []
    made.encoder.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        made(images, intrinsics, poses)
    assert torch.equal(seen[0], images[0])


def test_scales_are_between_the_smallest_and_the_largest_at_their_depth():
    images, intrinsics, poses = inputs()
    with torch.no_grad():
        gaussians = network()(images, intrinsics, poses)
    pixel = 0.1 * (1 / intrinsics[..., 0, 0] + 1 / intrinsics[..., 1, 1])
    span = gaussians.scales.unflatten(1, (2, -1)) / (gaussians.depths.flatten(2) * pixel[..., None])[..., None]
    assert 0.5 - 1e-4 <= span.min() < 2 and 12 < span.max() <= 15 + 1e-3
    covariance = gaussians.covariances()
    torch.testing.assert_close(
        covariance.diagonal(dim1=-2, dim2=-1).sum(-1), gaussians.scales.square().sum(-1), rtol=1e-4, atol=1e-9
    )


def test_raw_parameters_become_a_gaussian_by_hand():
    settings = replace(SMALL, harmonics=9)
    offset = torch.tensor([0.75, 0.5]).logit()
    scale = torch.tensor([0.5, 0.25, 0.75]).logit()
    quaternion = torch.tensor([0.0, 0.0, 3.0, 3.0])  # x, y, z, w: a quarter turn about z
    raw = torch.cat([offset, scale, quaternion, torch.ones(27)])[None, None, :, None, None]
    intrinsics = torch.tensor([[10.0, 0, 0.5], [0, 20.0, 0.5], [0, 0, 1]])[None, None]
    pose = torch.eye(4)[None, None].clone()
    pose[..., :3, 3] = torch.tensor([1.0, 2.0, 3.0])
    depth = torch.full((1, 1, 1, 1), 2.0)
    gaussians = to_gaussians(raw, depth, depth / 4, intrinsics, pose, settings)
    # the point (0.75, 0.5) is a quarter of a pixel right of the principal point: x = 0.25 / 10 * 2
    torch.testing.assert_close(gaussians.means[0, 0], torch.tensor([1.05, 2.0, 5.0]))
    # 0.5 + 14.5 times 0.5, 0.25 and 0.75 tenths of the sum of 2 / 10 and 2 / 20
    torch.testing.assert_close(gaussians.scales[0, 0], torch.tensor([0.2325, 0.12375, 0.34125]))
    expected = torch.diag(torch.tensor([0.12375, 0.2325, 0.34125]).square())
    torch.testing.assert_close(gaussians.covariances()[0, 0], expected, rtol=1e-5, atol=1e-8)
    assert gaussians.opacities.item() == 0.5
    weakened = torch.tensor([1.0, *[0.025] * 3, *[0.00625] * 5])
    torch.testing.assert_close(gaussians.harmonics[0, 0], weakened.expand(3, 9))


def test_items_of_a_batch_do_not_see_each_other():
    images, intrinsics, poses = inputs(batch=3)
    made = network()
    near, far = torch.tensor([[0.5, 0.6], [1.0, 0.9], [0.3, 0.4]]), torch.tensor([[20.0, 9], [5, 6], [30, 8]])
    with torch.no_grad():
        together = made(images, intrinsics, poses, near, far)
        for item in range(3):
            one = slice(item, item + 1)
            alone = made(images[one], intrinsics[one], poses[one], near[one], far[one])
            torch.testing.assert_close(1 / together.depths[one], 1 / alone.depths, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.opacities[one], alone.opacities, rtol=0, atol=1e-5)
            torch.testing.assert_close(together.harmonics[one], alone.harmonics, rtol=0, atol=1e-4)
            gaussians = together.item(item)
            assert torch.equal(gaussians.means, together.means[item]) and len(gaussians) == 2 * 32 * 48
            assert near[item].min() - 1e-4 <= together.depths[item].min()
            assert together.depths[item].max() <= far[item].max() + 1e-3


def test_the_scene_moves_with_the_cameras():
    # turning and shifting the world changes what depends on it alike, and nothing else
    images, intrinsics, poses = inputs()
    move = torch.eye(4)
    move[:3, :3] = rotation_matrices(torch.tensor([[0.3, -0.5, 0.7, 0.2]]))[0]
    move[:3, 3] = torch.tensor([1.0, -2.0, 0.5])
    made = network()
    with torch.no_grad():
        still, moved = made(images, intrinsics, poses), made(images, intrinsics, move @ poses)
    torch.testing.assert_close(1 / moved.depths, 1 / still.depths, rtol=0, atol=1e-4)
    expected = still.means @ move[:3, :3].T + move[:3, 3]
    off = (moved.means - expected).norm(dim=-1).view(1, 2, 32, 48) / still.depths.square()
    assert off.max() < 2e-4
    turned = move[:3, :3] @ still.covariances() @ move[:3, :3].T
    trace = turned.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert ((moved.covariances() - turned).abs().amax(dim=(-2, -1)) / trace).max() < 1e-2


def test_outputs_are_float32_under_autocast():
    images, intrinsics, poses = inputs(37, 50)
    made = network()
    with torch.no_grad():
        expected = made(images, intrinsics, poses)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gaussians = made(images, intrinsics, poses)
    for name in ("means", "quats", "scales", "opacities", "harmonics", "depths"):
        value = getattr(gaussians, name)
        assert value.dtype == torch.float32 and torch.isfinite(value).all(), name
    assert (1 / gaussians.depths - 1 / expected.depths).abs().mean() < 0.1


def test_a_fresh_network_starts_with_the_depth_of_the_plane_sweep_and_half_opacity():
    torch.manual_seed(0)
    fresh = MVSplat(SMALL).eval()
    seen = []
    for refinement in (fresh.depth.cost_refinement, fresh.depth.depth_refinement):
        refinement.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        gaussians = fresh(*inputs())
        likely = seen[0][:, :8].softmax(dim=1)
        disparity = (likely * torch.linspace(1 / 20, 1 / 0.5, 8)[:, None, None]).sum(dim=1, keepdim=True)
    torch.testing.assert_close(1 / gaussians.depths[0], enlarge(disparity, "exact")[:, 0], rtol=0, atol=1e-5)
    assert disparity.std() > 0.01
    certainty = likely.amax(dim=1).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    torch.testing.assert_close(seen[1][:, -1], certainty, rtol=0, atol=1e-5)
    assert torch.equal(gaussians.opacities, torch.full_like(gaussians.opacities, 0.5))


def all_gradients(made, chunk_bytes, monkeypatch):
    monkeypatch.setattr(cost_volume, "CHUNK_BYTES", chunk_bytes)
    made.zero_grad()
    gaussians = made(*inputs(batch=2))
    generator = torch.Generator().manual_seed(1)
    outputs = [gaussians.means, gaussians.covariances() * 100, gaussians.opacities, gaussians.harmonics]
    sum((out * torch.randn(out.shape, generator=generator)).sum() for out in outputs).backward()
    return {name: parameter.grad for name, parameter in made.named_parameters()}


@GEOMETRIES
def test_gradients_reach_every_parameter_and_do_not_depend_on_chunks(geometry, monkeypatch):
    made = network(geometry).train()
    whole = all_gradients(made, 2**30, monkeypatch)
    chunked = all_gradients(made, 1, monkeypatch)
    for name, gradient in whole.items():
        assert gradient is not None and torch.isfinite(gradient).all(), name
        if name.startswith("encoder.") and name.endswith(".skip.bias"):
            continue  # an instance norm follows, which takes constants away
        scale = gradient.abs().max()
        assert scale > 1e-4, name
        assert (chunked[name] - gradient).abs().max() < 1e-3 * scale, name


def spoilt(**changes):
    """The arguments of a call, with some changed by functions of their values."""
    images, intrinsics, poses = inputs()
    given = {
        "images": images,
        "intrinsics": intrinsics,
        "camera_to_world": poses,
        "near": torch.full((1, 2), 0.5),
        "far": torch.full((1, 2), 20.0),
    }
    return {name: changes[name](value.clone()) if name in changes else value for name, value in given.items()}


def put(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def same_pose(poses):
    return poses[:, :1].expand(1, 2, 4, 4)


def same_place(poses):
    poses[:, 1, :3, 3] = poses[:, 0, :3, 3]
    return poses


def opposite(poses):
    poses[:, 1, :3, :3] = poses[:, 0, :3, :3] @ torch.diag(torch.tensor([-1.0, 1.0, -1.0]))
    return poses


def scaled(poses):
    poses[..., :3, :3] *= 2
    return poses


def mirrored(poses):
    poses[..., :3, 0] *= -1
    return poses


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"camera_to_world": same_pose}, DegeneratePairError, "parallax.*--pipeline.datamanager.min-context-gap"),
        ({"camera_to_world": same_place}, DegeneratePairError, "parallax.*--pipeline.datamanager.min-context-gap"),
        ({"camera_to_world": opposite}, DegeneratePairError, "opposite.*--pipeline.datamanager.max-context-gap"),
        ({"camera_to_world": scaled}, InputError, "not rigid.*[Cc]heck"),
        ({"camera_to_world": mirrored}, InputError, "not rigid.*[Cc]heck"),
        ({"camera_to_world": put((0, 1, 0, 3), math.nan)}, InputError, "poses.*NaN.*check"),
        ({"intrinsics": put((0, 0, 0, 0), math.nan)}, InputError, "intrinsics.*NaN.*check"),
        ({"intrinsics": put((0, 0, 0, 0), -20.0)}, InputError, "focal length.*check"),
        ({"intrinsics": lambda x: x / torch.tensor([48.0, 32.0, 1.0])[:, None]}, InputError, "normalised.*in pixels"),
        ({"intrinsics": put((0, 0, 2), torch.zeros(3))}, InputError, "last row.*check"),
        ({"camera_to_world": put((0, 0, 3), torch.zeros(4))}, InputError, "last row.*[Cc]heck"),
        ({"images": put((0, 0, 0, 0, 0), math.nan)}, InputError, "images.*NaN or infinite.*check"),
        ({"images": lambda x: x * 255}, InputError, "divide 8-bit colours by 255"),
        ({"near": put((0, 1), 20.0)}, InputError, "near.*--pipeline.datamanager.near"),
        ({"near": put((0, 1), 30.0)}, InputError, "near.*--pipeline.datamanager.near"),
        ({"near": put((0, 0), 0.0)}, InputError, "near.*--pipeline.datamanager.near"),
        ({"near": put((0, 0), -1.0)}, InputError, "near.*--pipeline.datamanager.near"),
        ({"far": put((0, 0), math.inf)}, InputError, "far.*NaN or infinite"),
        ({"images": lambda x: x[..., :15, :]}, InputError, "15x48.*16x16.*image-size"),
        ({"images": lambda x: x[..., :8]}, InputError, "32x8.*16x16.*image-size"),
    ],
)
def test_what_gives_no_geometry_is_one_error_that_says_what_to_do(changes, kind, words):
    with pytest.raises(InputError, match=words) as caught:
        MVSplat(SMALL)(**spoilt(**changes))
    assert caught.type is kind
    assert "\n" not in str(caught.value)


def test_one_bad_pair_in_a_batch_is_enough():
    images, intrinsics, poses = inputs(batch=2)
    poses[1, 1, :3, 3] = poses[1, 0, :3, 3]
    with pytest.raises(DegeneratePairError):
        MVSplat(SMALL)(images, intrinsics, poses)


@pytest.mark.parametrize("views", [1, 3])
def test_other_numbers_of_views_are_refused(views):
    images, intrinsics, poses = (x[:, [0, 1, 0][:views]] for x in inputs())
    with pytest.raises(InputError, match=f"two context views, not {views}"):
        MVSplat(SMALL)(images, intrinsics, poses)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("intrinsics", lambda x: x[:, :1]),
        ("intrinsics", lambda x: x[..., :2, :]),
        ("camera_to_world", lambda x: x[..., :3, :]),
        ("near", lambda x: x[:, 0]),
        ("far", lambda x: x.expand(2, 2)),
        ("images", lambda x: x[:, :, :1]),
    ],
)
def test_wrong_shapes_are_named(name, change):
    from jaxtyping import TypeCheckError

    from snd_nerfstudio.reconstruction.mvsplat.checks import check_inputs

    given = spoilt(**{name: change})
    with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
        check_inputs(*given.values())
    with pytest.raises((ValueError, TypeCheckError)):
        MVSplat(SMALL)(**given)


@pytest.mark.parametrize("seed", range(3))
def test_quaternions_of_rotations_turn_back_into_them(seed):
    quats = F.normalize(torch.randn(20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=-1)
    quats[:3] = torch.tensor([[0.0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]])  # half turns, and none
    turns = rotation_matrices(quats)
    torch.testing.assert_close(rotation_matrices(rotations_to_quaternions(turns)), turns, rtol=0, atol=1e-12)
    product = multiply_quaternions(quats[:10], quats[10:])
    torch.testing.assert_close(rotation_matrices(product), turns[:10] @ turns[10:], rtol=0, atol=1e-12)
