import pytest
import torch

from snd_nerfstudio.splatting import Splatted, rasterize
from snd_nerfstudio.splatting.gsplat_engine import splat_gsplat

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat runs on CUDA only")


def test_tensors_on_the_cpu_are_an_error_that_names_the_other_engine(random_scene):
    gaussians, camera, features = random_scene(n=10, dtype=torch.float32)
    for call in (
        lambda: rasterize(gaussians, camera, features, engine="gsplat"),
        lambda: splat_gsplat(gaussians, camera, features, near=0.01, far=1e10),
    ):
        with pytest.raises(ValueError, match="engine gsplat needs a CUDA tensor; use engine='numba'"):
            call()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("channels", [0, 3, 32, 50])
@pytest.mark.parametrize("footprint", ["exact", "squared"])
def test_gsplat_agrees_with_numba(random_scene, channels, footprint):
    gaussians, camera, features = random_scene(
        n=3000, height=75, width=93, channels=channels, dtype=torch.float32, opacity=0.3
    )
    expected = rasterize(gaussians, camera, features, engine="numba", footprint=footprint)
    found = rasterize(gaussians.to("cuda"), camera.to("cuda"), features.cuda(), footprint=footprint)
    for name in ("features", "alpha", "depth"):
        difference = (getattr(found, name).cpu() - getattr(expected, name)).abs()
        assert difference.shape == getattr(expected, name).shape
        if difference.numel():
            # Hits at a threshold may fall on either side: the mean is bound, and all but a few pixels.
            assert difference.mean() < 1e-4
            assert (difference < 1e-3).double().mean() > 0.99


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("channels", [3, 50])
def test_the_gradients_of_gsplat_agree_with_those_of_numba(random_scene, gradients_of, channels):
    scene = random_scene(n=400, height=75, width=93, channels=channels, dtype=torch.float32, opacity=0.3)
    gaussians, camera, features = scene

    def on_cuda(gaussians, camera, features):
        out = rasterize(gaussians.to("cuda"), camera.to("cuda"), features.cuda(), engine="gsplat")
        return Splatted(out.features.cpu(), out.alpha.cpu(), out.depth.cpu())

    expected = gradients_of(gaussians, camera, features)
    found = gradients_of(gaussians, camera, features, on_cuda)
    for name, gradient in expected.items():
        # Hits at a threshold may fall on either side: the mean is bound, relative to the mean gradient.
        assert (found[name] - gradient).abs().mean() < 1e-2 * gradient.abs().mean(), name
