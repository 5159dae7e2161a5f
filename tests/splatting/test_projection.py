import importlib.util
from pathlib import Path

import pytest
import torch

from snd_nerfstudio.splatting.projection import project_gaussians


@pytest.fixture(scope="module")
def gsplat_torch():
    """gsplat's pure PyTorch twin, loaded by path: importing the package around it may start a CUDA build."""
    package = importlib.util.find_spec("gsplat")
    if package is None:
        pytest.skip("gsplat is not installed")
    path = Path(package.origin).parent / "cuda" / "_torch_impl.py"
    spec = importlib.util.spec_from_file_location("gsplat_torch_impl", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_the_projection_equals_that_of_gsplat(gsplat_torch, random_scene, dtype, tolerance):
    gaussians, camera, _ = random_scene(n=4000, height=61, width=90, dtype=dtype)
    projection = project_gaussians(gaussians, camera)
    radii, means2d, depths, conics, _ = gsplat_torch._fully_fused_projection(
        gaussians.means, gaussians.covariances(), camera.world_to_camera()[None], camera.intrinsics[None], 90, 61
    )
    visible = radii[0] > 0
    assert 0.3 < visible.double().mean() < 0.9
    # In float32 a radius may round up to the next whole pixel, or an edge Gaussian may fall just inside.
    assert (projection.radii != radii[0]).double().mean() <= (0 if dtype == torch.float64 else 1e-3)
    torch.testing.assert_close(projection.means2d[visible], means2d[0][visible], atol=tolerance, rtol=1e-5)
    torch.testing.assert_close(projection.conics[visible], conics[0][visible], atol=tolerance, rtol=1e-3)
    torch.testing.assert_close(projection.depths, depths[0], atol=1e-6, rtol=1e-6)


def test_a_round_gaussian_on_the_axis_projects_to_its_scaled_variance_plus_the_blur(frontal_camera, on_axis):
    # Standard deviation 0.4 at depth 2 with focal length 10: 2 px, variance 4; with the blur 4.3.
    projection = project_gaussians(on_axis((2.0, 0.4, 1.0)), frontal_camera)
    expected = torch.tensor([[1 / 4.3, 0.0, 1 / 4.3]], dtype=torch.float64)
    torch.testing.assert_close(projection.conics, expected)
    assert projection.means2d.tolist() == [[5.5, 5.5]]
    assert projection.depths.tolist() == [2.0]
    # v1 = 4.3 + sqrt(0.01) = 4.4, 3 sqrt(4.4) = 6.29...
    assert projection.radii.tolist() == [7.0]


def test_gaussians_outside_near_and_far_are_culled(frontal_camera, on_axis):
    gaussians = on_axis((-1.0, 0.1, 1.0), (0.5, 0.1, 1.0), (1.0, 0.1, 1.0), (3.0, 0.1, 1.0), (3.5, 0.1, 1.0))
    projection = project_gaussians(gaussians, frontal_camera, near=1.0, far=3.0)
    assert (projection.radii > 0).tolist() == [False, False, True, True, False]
    assert (projection.boxes[:, 2] > 0).tolist() == [False, False, True, True, False]


def test_the_box_holds_exactly_the_pixels_that_reach_one_255th(frontal_camera, on_axis):
    # Variance 1.3, opacity 1: |dx| <= sqrt(2 ln(255) 1.3) = 3.796 px, so columns 5 - 3 to 5 + 3.
    projection = project_gaussians(on_axis((1.0, 0.1, 1.0)), frontal_camera)
    assert projection.boxes.tolist() == [[2, 2, 9, 9]]


def test_a_gaussian_too_faint_to_reach_one_255th_has_an_empty_box(frontal_camera, on_axis):
    projection = project_gaussians(on_axis((1.0, 0.1, 0.0039)), frontal_camera)
    assert projection.boxes.tolist() == [[0, 0, 0, 0]]


def test_enormous_and_degenerate_gaussians_project_without_nan(frontal_camera, on_axis):
    gaussians = on_axis((0.011, 1e6, 1.0), (1.0, 0.0, 1.0), (1.0, 1e25, 1.0)).to(dtype=torch.float32)
    projection = project_gaussians(gaussians, frontal_camera.to(dtype=torch.float32))
    assert (projection.boxes[:, 2] > 0).tolist() == [True, True, False]  # the last one's variance overflows float32
    assert torch.isfinite(projection.conics[:2]).all()
    assert projection.boxes[0].tolist() == [0, 0, 11, 11]
