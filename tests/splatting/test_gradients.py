"""What `rasterize` promises of its gradients, for every engine that runs on a CPU."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from snd_nerfstudio.splatting import Gaussians, rasterize
from snd_nerfstudio.splatting.gaussians import rotation_matrices, unit_quaternions
from tests.splatting.conftest import INPUTS, OUTPUTS

both_engines = pytest.mark.parametrize("engine", ["numba", "reference"])


def with_gradients(gaussians):
    """The same Gaussians, every field a leaf that requires a gradient."""
    fields = {name: getattr(gaussians, name).detach().clone().requires_grad_() for name in INPUTS[:4]}
    return replace(gaussians, **fields)


@both_engines
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_gradients_equal_finite_differences(engine, output, random_scene):
    # Large Gaussians of middling opacity: no alpha is capped, no pixel ends, and none is near to it.
    gaussians, camera, features = random_scene(n=6, height=5, width=7, channels=2, size=3.0, opacity=0.4, seed=3)
    gaussians, features = with_gradients(gaussians), features.requires_grad_()
    leaves = [*(getattr(gaussians, name) for name in INPUTS[:4]), features]
    assert 0.3 < rasterize(gaussians, camera, features).alpha.min() < 0.99

    def splat(means, quats, scales, opacities, features):
        moved = Gaussians(means, quats, scales, opacities)
        return getattr(rasterize(moved, camera, features, engine=engine), output)

    assert torch.autograd.gradcheck(splat, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


@both_engines
def test_the_gradients_at_the_centre_of_two_gaussians_are_those_worked_out_by_hand(engine, frontal_camera, on_axis):
    # Weights o1 = 0.5 and (1 - o1) o2 = 0.4, depths 1 and 3: covered W = 0.9, D = sum of w z = 1.7, depth D / W.
    gaussians = with_gradients(on_axis((1.0, 0.1, 0.5), (3.0, 0.1, 0.8)))
    features = torch.tensor([[10.0], [1.0]], dtype=torch.float64, requires_grad=True)
    out = rasterize(gaussians, frontal_camera, features, engine=engine)

    by_opacity, by_feature = torch.autograd.grad(
        out.features[5, 5, 0], [gaussians.opacities, features], retain_graph=True
    )
    assert by_opacity.tolist() == pytest.approx([10 - 0.8 * 1, 0.5 * 1])
    assert by_feature.flatten().tolist() == pytest.approx([0.5, 0.4])

    (by_opacity,) = torch.autograd.grad(out.alpha[5, 5], gaussians.opacities, retain_graph=True)
    assert by_opacity.tolist() == pytest.approx([1 - 0.8, 0.5])

    by_opacity, by_mean = torch.autograd.grad(out.depth[5, 5], [gaussians.opacities, gaussians.means])
    # dD/do1 = z1 - o2 z2 = -1.4 and dW/do1 = 0.2; dD/do2 = 0.5 z2 = 1.5 and dW/do2 = 0.5; D/W^2 = 1.7 / 0.81.
    assert by_opacity.tolist() == pytest.approx([-1.4 / 0.9 - 0.2 * 1.7 / 0.81, 1.5 / 0.9 - 0.5 * 1.7 / 0.81])
    # At the centre the footprints' size and a shift to the side change nothing at first order.
    assert by_mean.flatten().tolist() == pytest.approx([0, 0, 0.5 / 0.9, 0, 0, 0.4 / 0.9])


@both_engines
def test_nothing_flows_through_the_cap_of_alpha(engine, frontal_camera, on_axis):
    # Only the pixel in the middle is looked at: 0.999 for the first, and 0.001 * 0.5 for the second.
    gaussians = with_gradients(on_axis((1.0, 0.1, 1.0), (2.0, 0.1, 0.5)))
    features = torch.tensor([[3.0], [5.0]], dtype=torch.float64, requires_grad=True)
    out = rasterize(gaussians, frontal_camera, features, engine=engine)
    out.features[5, 5, 0].backward()
    assert gaussians.opacities.grad[0].item() == 0
    assert gaussians.opacities.grad[1].item() == pytest.approx(0.001 * 5)
    assert not gaussians.means.grad[0].any() and not gaussians.scales.grad[0].any()
    assert features.grad.flatten().tolist() == pytest.approx([0.999, 0.0005])


@both_engines
def test_a_gaussian_behind_a_finished_pixel_has_no_gradient(engine, frontal_camera, on_axis):
    rows = [(1.0, 0.1, 0.9), (2.0, 0.2, 0.9), (3.0, 0.3, 0.9), (4.0, 0.4, 0.91), (5.0, 0.5, 0.1)]
    gaussians = with_gradients(on_axis(*rows))
    rasterize(gaussians, frontal_camera, torch.ones(5, 1).double(), engine=engine).alpha[5, 5].backward()
    # alpha = 1 - (1 - o1) (1 - o2) (1 - o3), each factor 0.1.
    assert gaussians.opacities.grad.tolist() == pytest.approx([0.01, 0.01, 0.01, 0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gaussians_that_touch_no_pixel_have_gradients_of_exactly_zero(dtype, frontal_camera, on_axis, gradients_of):
    seen = (2.0, 0.1, 0.8)
    behind, beyond, faint = (-1.0, 0.1, 0.8), (2e10, 0.1, 0.8), (1.5, 0.1, 0.003)
    overflowing = (1.0, 1e25 if dtype == torch.float32 else 1e170, 0.8)
    at_the_eye, aside = (0.0, 0.1, 0.8), (2.0, 0.1, 0.8)
    gaussians = on_axis(seen, behind, beyond, faint, overflowing, at_the_eye, aside).to(dtype=dtype)
    gaussians.means[6, 0] = 1e6
    gradients = gradients_of(gaussians, frontal_camera, torch.ones(7, 3, dtype=dtype))
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all()
        assert not gradient[1:].any()
        if name != "quats":  # the one that is seen is round: turning it changes nothing
            assert gradient[0].any()


@both_engines
def test_a_zero_quaternion_has_no_gradient_and_does_not_spoil_those_of_others(engine, random_scene, gradients_of):
    gaussians, camera, features = random_scene(n=40, size=3.0)
    gaussians.quats[1] = 0
    gradients = gradients_of(gaussians, camera, features, partial(rasterize, engine=engine))
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert not gradients["quats"][1].any() and gradients["scales"][1].any()
    assert gradients["quats"][2].any()


def test_the_gradient_of_a_quaternion_is_at_right_angles_to_it():
    quats = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quats[2] = 0
    quats.requires_grad_()
    (unit_quaternions(quats) ** 3).sum().backward()
    assert quats.grad[0].norm() > 0.1 and not quats.grad[2].any()
    torch.testing.assert_close((quats.grad * quats).sum(dim=1), torch.zeros(5).double(), atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(rotation_matrices, quats.detach()[:2].requires_grad_())


@both_engines
def test_gaussians_without_extent_are_pushed_but_not_stretched(engine, frontal_camera, on_axis, gradients_of):
    gradients = gradients_of(on_axis((2.0, 0.0, 0.8)), frontal_camera, torch.ones(1, 2).double(), engine_of(engine))
    assert not gradients["scales"].any() and gradients["means"].all()


def engine_of(name):
    return partial(rasterize, engine=name)


@both_engines
def test_with_nothing_to_splat_the_gradients_are_empty_or_zero(engine, frontal_camera, on_axis, gradients_of):
    none = Gaussians(*(torch.zeros(shape, dtype=torch.float64) for shape in [(0, 3), (0, 4), (0, 3), (0,)]))
    for gaussians in (none, on_axis((-1.0, 0.1, 1.0))):
        features = torch.ones(len(gaussians), 3, dtype=torch.float64)
        gradients = gradients_of(gaussians, frontal_camera, features, engine_of(engine))
        assert gradients["features"].shape == features.shape
        assert not any(gradient.any() for gradient in gradients.values())


def test_without_channels_alpha_and_depth_still_have_gradients(random_scene, gradients_of):
    gaussians, camera, features = random_scene(n=40)
    outputs = ("alpha", "depth")
    expected = gradients_of(gaussians, camera, features, outputs=outputs)
    random_draws = {"outputs": outputs, "wanted": INPUTS[:4]}
    found = gradients_of(gaussians, camera, features[:, :0], **random_draws)
    assert found["opacities"].any()
    # The random upstream gradients differ, as there are no channels to draw any for: compare with the reference.
    slow = gradients_of(gaussians, camera, features[:, :0], engine_of("reference"), **random_draws)
    for name in INPUTS[:4]:
        assert not torch.equal(found[name], expected[name])
        torch.testing.assert_close(found[name], slow[name], atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("name", INPUTS)
def test_the_gradient_of_one_input_does_not_depend_on_which_others_require_one(name, random_scene, gradients_of):
    scene = random_scene(n=60)
    assert torch.equal(gradients_of(*scene, wanted=(name,))[name], gradients_of(*scene)[name])


@both_engines
def test_a_squared_footprint_passes_gradients_on_to_the_scales(engine, random_scene, gradients_of):
    gaussians, camera, features = random_scene(n=60, size=8.0)
    squared = replace(gaussians, scales=gaussians.scales**2)
    found = gradients_of(gaussians, camera, features, partial(rasterize, engine=engine, footprint="squared"))
    expected = gradients_of(squared, camera, features, engine_of(engine))
    assert found["scales"].any()
    torch.testing.assert_close(found["scales"], 2 * gaussians.scales * expected["scales"])


@both_engines
def test_values_are_the_same_with_and_without_gradients(engine, random_scene):
    for dtype, tolerance in [(torch.float32, 1e-6), (torch.float64, 1e-14)]:
        gaussians, camera, features = random_scene(n=300, dtype=dtype)
        alone = rasterize(gaussians, camera, features, engine=engine)
        attached = rasterize(with_gradients(gaussians), camera, features, engine=engine)
        for name in OUTPUTS:
            assert getattr(attached, name).requires_grad and not getattr(alone, name).requires_grad
            torch.testing.assert_close(getattr(attached, name), getattr(alone, name), atol=tolerance, rtol=tolerance)


def test_under_no_grad_nothing_is_attached(random_scene):
    gaussians, camera, features = random_scene(n=50)
    with torch.no_grad():
        assert not rasterize(with_gradients(gaussians), camera, features).features.requires_grad


@pytest.mark.parametrize("field", ["camera_to_world", "intrinsics"])
def test_a_camera_that_requires_a_gradient_is_an_error_unless_gradients_are_off(field, random_scene):
    gaussians, camera, features = random_scene(n=50)
    moving = replace(camera, **{field: getattr(camera, field).clone().requires_grad_()})
    with pytest.raises(NotImplementedError, match=f"{field} requires one; detach it"):
        rasterize(gaussians, moving, features)
    with torch.no_grad():
        assert not rasterize(gaussians, moving, features).features.requires_grad
