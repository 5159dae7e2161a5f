import numba
import numpy as np
import pytest
import torch

from snd_nerfstudio.splatting import rasterize
from snd_nerfstudio.splatting.hits import compiled, front_to_back

SCENES = {
    "ordinary": {"n": 400},
    "one channel, one tile": {"n": 50, "height": 16, "width": 16, "channels": 1},
    "odd size": {"n": 300, "height": 17, "width": 65, "channels": 3, "seed": 1},
    "many channels": {"n": 200, "height": 20, "width": 30, "channels": 130, "seed": 2},
    "large Gaussians": {"n": 150, "size": 12.0, "seed": 3},
    "tiny Gaussians": {"n": 800, "size": 0.01, "seed": 4},
    "thousands, opaque, overlapping": {"n": 3000, "height": 24, "width": 40, "size": 2.0, "opacity": 0.99, "seed": 5},
    "thousands, faint, overlapping": {"n": 3000, "height": 20, "width": 24, "size": 4.0, "opacity": 0.02, "seed": 6},
    "a single pixel": {"n": 100, "height": 1, "width": 1, "size": 4.0, "seed": 7},
}


def largest_difference(one, other):
    names = ("features", "alpha", "depth")
    return max((getattr(one, name) - getattr(other, name)).abs().max().item() for name in names)


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_in_float64_the_engine_equals_the_reference_to_rounding(random_scene, scene):
    gaussians, camera, features = random_scene(**scene, dtype=torch.float64)
    fast = rasterize(gaussians, camera, features, engine="numba")
    slow = rasterize(gaussians, camera, features, engine="reference")
    assert slow.alpha.max() > 0.1
    assert largest_difference(fast, slow) < 1e-9


@pytest.mark.parametrize("scene", SCENES.values(), ids=SCENES.keys())
def test_in_float32_the_engine_equals_the_reference_to_1e_4(random_scene, scene):
    gaussians, camera, features = random_scene(**scene, dtype=torch.float32)
    fast = rasterize(gaussians, camera, features, engine="numba")
    slow = rasterize(gaussians, camera, features, engine="reference")
    assert fast.features.dtype == fast.alpha.dtype == fast.depth.dtype == torch.float32
    difference = (fast.features - slow.features).abs()
    # A hit whose alpha rounds to the other side of 1/255 is worth up to 0.004 of a feature: almost all, and the mean.
    assert (difference < 1e-4).double().mean() > 0.999
    assert difference.mean() < 1e-5
    assert (fast.alpha - slow.alpha).abs().mean() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_thread_and_all_threads_give_the_same_bits(random_scene, dtype):
    scene = random_scene(n=1500, height=75, width=93, channels=19, dtype=dtype)
    threads = numba.get_num_threads()
    everything = rasterize(*scene, engine="numba")
    try:
        numba.set_num_threads(1)
        alone = rasterize(*scene, engine="numba")
    finally:
        numba.set_num_threads(threads)
    for name in ("features", "alpha", "depth"):
        assert torch.equal(getattr(everything, name), getattr(alone, name))


def test_the_threads_of_torch_are_left_alone(random_scene):
    before = torch.get_num_threads()
    rasterize(*random_scene(n=50), engine="numba")
    assert torch.get_num_threads() == before


def test_no_result_shares_memory_with_another(random_scene):
    scene = random_scene(n=100)
    first = rasterize(*scene, engine="numba")
    kept = first.features.clone()
    rasterize(scene[0], scene[1], -scene[2], engine="numba")
    assert torch.equal(first.features, kept)


def test_a_feature_that_is_nan_reaches_only_the_pixels_of_its_gaussian(random_scene):
    gaussians, camera, features = random_scene(n=100)
    weights = rasterize(gaussians, camera, torch.eye(100, dtype=features.dtype), engine="numba").features
    chosen = (weights > 0).sum(dim=(0, 1)).argmax()
    touched = weights[..., chosen] > 0
    features[chosen] = float("nan")
    broken = torch.isnan(rasterize(gaussians, camera, features, engine="numba").features[..., 0])
    assert touched.any() and torch.equal(touched, broken)


@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_the_depth_order_is_that_of_a_stable_sort(dtype):
    random = np.random.default_rng(0)
    wide = random.integers(0, np.iinfo(dtype).max, 5000, dtype=dtype, endpoint=True)
    for keys in (wide, wide % dtype(50), np.sort(wide), wide[:1], wide[:0], np.full(9, 7, dtype)):
        assert np.array_equal(front_to_back(keys.copy()), np.argsort(keys, kind="stable"))


def test_a_function_that_cannot_be_cached_on_disk_is_compiled_all_the_same():
    namespace = {}
    exec("def double(x):\n    return 2 * x", namespace)  # no source file, hence no place for a cache
    assert compiled()(namespace["double"])(21) == 42
