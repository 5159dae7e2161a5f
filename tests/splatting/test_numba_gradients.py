import numba
import numpy as np
import pytest
import torch

from snd_nerfstudio.splatting import numba_gradients, rasterize
from snd_nerfstudio.splatting.hit_list import list_hits, splat_hits
from tests.splatting.conftest import INPUTS, OUTPUTS

SCENES = {
    "ordinary": {"n": 200},
    "smaller than a tile": {"n": 50, "height": 5, "width": 7, "channels": 1},
    "odd size": {"n": 150, "height": 17, "width": 65, "channels": 3, "seed": 1},
    "many channels": {"n": 60, "height": 20, "width": 30, "channels": 130, "seed": 2},
    "large Gaussians": {"n": 150, "size": 12.0, "seed": 3},
    "tiny Gaussians": {"n": 400, "size": 0.01, "seed": 4},
    "capped, overlapping": {"n": 500, "height": 24, "width": 40, "size": 2.0, "opacity": 1.0, "seed": 5},
    "faint, overlapping": {"n": 500, "height": 20, "width": 24, "size": 4.0, "opacity": 0.02, "seed": 6},
    "a single pixel": {"n": 100, "height": 1, "width": 1, "size": 4.0, "seed": 7},
}
scenes = pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())


def by_reference(gaussians, camera, features):
    return rasterize(gaussians, camera, features, engine="reference")


def by_hit_list(gaussians, camera, features):
    return splat_hits(gaussians, camera, features, list_hits(gaussians, camera))


def assert_same(found, expected, relative):
    """Equal up to `relative`, in norm: single entries may be small differences of large numbers."""
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert (found[name] - expected[name]).norm() <= relative * expected[name].norm(), name


@scenes
def test_in_float64_the_gradients_equal_those_of_the_reference_to_rounding(random_scene, gradients_of, scene):
    scene = random_scene(**scene, dtype=torch.float64)
    found, expected = gradients_of(*scene), gradients_of(*scene, by_reference)
    assert all(gradient.any() for gradient in expected.values())
    assert_same(found, expected, 1e-11)


@pytest.mark.parametrize("output", OUTPUTS)
def test_the_gradients_of_each_output_alone_equal_those_of_the_reference(random_scene, gradients_of, output):
    scene = random_scene(n=200, seed=8)
    wanted = INPUTS if output == "features" else INPUTS[:4]
    found = gradients_of(*scene, outputs=(output,))
    assert_same({n: found[n] for n in wanted}, gradients_of(*scene, by_reference, (output,), wanted), 1e-11)
    if output != "features":
        assert not found["features"].any()


@scenes
@pytest.mark.parametrize("dtype, relative", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_on_the_same_hits_the_gradients_equal_those_of_autograd(random_scene, gradients_of, scene, dtype, relative):
    scene = random_scene(**scene, dtype=dtype)
    found, expected = gradients_of(*scene), gradients_of(*scene, by_hit_list)
    assert all(gradient.any() for gradient in expected.values())
    assert_same(found, expected, relative)


@scenes
def test_the_list_of_hits_composites_to_the_view_of_the_reference(random_scene, scene):
    scene = random_scene(**scene, dtype=torch.float64)
    found, expected = by_hit_list(*scene), by_reference(*scene)
    for name in OUTPUTS:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-11, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_have_the_same_bits_in_every_run_and_for_any_number_of_threads(random_scene, gradients_of, dtype):
    scene = random_scene(n=1500, height=75, width=93, channels=4, dtype=dtype)
    threads = numba.get_num_threads()
    first = gradients_of(*scene)
    try:
        for count in (threads, 1):
            numba.set_num_threads(count)
            again = gradients_of(*scene)
            assert all(torch.equal(again[name], first[name]) for name in INPUTS)
    finally:
        numba.set_num_threads(threads)


# With many channels the backward pass needs more and smaller batches than the forward pass.
@pytest.mark.parametrize("limit, channels", [(1, 4), (20_000, 4), (1_000_000, 200)])
def test_batches_of_any_size_give_the_same_bits(random_scene, gradients_of, monkeypatch, limit, channels):
    scene = random_scene(n=600, height=40, width=70, channels=channels)
    together = gradients_of(*scene)
    monkeypatch.setattr(numba_gradients, "MAX_BATCH_BYTES", limit)
    apart = gradients_of(*scene)
    assert all(torch.equal(apart[name], together[name]) for name in INPUTS)


def test_batches_hold_what_fits_and_at_least_one_tile(monkeypatch):
    monkeypatch.setattr(numba_gradients, "MAX_BATCH_BYTES", 10)
    ranges = numba_gradients._batches(np.array([4, 6, 1, 50, 0, 10, 3]))
    assert ranges == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]
    assert numba_gradients._batches(np.array([0, 0, 0])) == [(0, 3)]


def test_a_graph_that_is_kept_gives_the_same_gradients_twice(random_scene):
    gaussians, camera, features = random_scene(n=100)
    features.requires_grad_()
    loss = rasterize(gaussians, camera, features).features.square().sum()
    (once,) = torch.autograd.grad(loss, features, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, features)
    assert once.any() and torch.equal(once, twice)


def test_gradients_of_gradients_are_an_error_not_silence(random_scene):
    gaussians, camera, features = random_scene(n=50)
    features.requires_grad_()
    loss = rasterize(gaussians, camera, features).features.square().sum()
    (gradient,) = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_input_changed_before_the_backward_pass_is_an_error(random_scene):
    gaussians, camera, features = random_scene(n=50)
    gaussians.opacities.requires_grad_()
    alpha = rasterize(gaussians, camera, features).alpha
    with torch.no_grad():
        gaussians.opacities.mul_(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        alpha.sum().backward()


def test_upstream_gradients_with_strides_are_read_correctly(random_scene):
    gaussians, camera, features = random_scene(n=100, channels=4)
    features.requires_grad_()
    out = rasterize(gaussians, camera, features).features
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    (expected,) = torch.autograd.grad(out, features, upstream, retain_graph=True)
    channels_first = upstream.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(torch.autograd.grad(out, features, channels_first)[0], expected)
