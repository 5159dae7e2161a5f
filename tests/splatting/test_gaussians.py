import math

import pytest
import torch

from snd_nerfstudio.splatting import Gaussians, PinholeCamera
from snd_nerfstudio.splatting.gaussians import rotation_matrices


def gaussians(n=2, **fields):
    defaults = {
        "means": torch.zeros(n, 3),
        "quats": torch.tensor([[1.0, 0, 0, 0]]).repeat(n, 1),
        "scales": torch.ones(n, 3),
        "opacities": torch.ones(n),
    }
    return Gaussians(**{**defaults, **fields})


def test_the_covariance_of_an_unrotated_gaussian_holds_its_squared_scales():
    covariance = gaussians(1, scales=torch.tensor([[1.0, 2.0, 3.0]])).covariances()[0]
    assert torch.equal(covariance, torch.diag(torch.tensor([1.0, 4.0, 9.0])))


def test_a_quarter_turn_about_z_swaps_the_variances_of_x_and_y():
    quarter_turn = torch.tensor([[math.cos(math.pi / 4), 0, 0, math.sin(math.pi / 4)]])
    covariance = gaussians(1, quats=quarter_turn, scales=torch.tensor([[1.0, 2.0, 3.0]])).covariances()[0]
    torch.testing.assert_close(covariance, torch.diag(torch.tensor([4.0, 1.0, 9.0])), atol=1e-6, rtol=0)


def test_a_quarter_turn_about_z_takes_x_to_y():
    quarter_turn = torch.tensor([[1.0, 0, 0, 1.0]])  # (w, x, y, z), not normalised
    turned = rotation_matrices(quarter_turn)[0] @ torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(turned, torch.tensor([0.0, 1, 0]), atol=1e-6, rtol=0)


def test_the_length_of_a_quaternion_does_not_matter_and_zero_means_no_rotation():
    quats = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation_matrices(7 * quats), rotation_matrices(quats))
    assert torch.equal(rotation_matrices(torch.zeros(1, 4))[0], torch.eye(3))


def test_converting_keeps_every_field_together():
    doubled = gaussians(3).to(dtype=torch.float64)
    assert len(doubled) == 3
    assert {doubled.means.dtype, doubled.quats.dtype, doubled.scales.dtype, doubled.opacities.dtype} == {torch.float64}


@pytest.mark.parametrize(
    "field, shape", [("means", (2, 2)), ("quats", (2, 3)), ("scales", (3, 3)), ("opacities", (2, 1)), ("means", ())]
)
@pytest.mark.usefixtures("without_shape_checker")
def test_a_wrong_shape_is_an_error_that_names_every_shape(field, shape):
    with pytest.raises(ValueError, match=r"Gaussians need means \(n, 3\).*opacities \("):
        gaussians(2, **{field: torch.zeros(shape)})


def test_mixed_dtypes_are_an_error():
    with pytest.raises(ValueError, match="one floating dtype"):
        gaussians(2, means=torch.zeros(2, 3, dtype=torch.float64))


def test_world_to_camera_undoes_camera_to_world():
    rotation = rotation_matrices(torch.tensor([[0.3, -0.5, 0.2, 0.9]], dtype=torch.float64))[0]
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3], pose[:3, 3] = rotation, torch.tensor([1.0, 2.0, 3.0])
    camera = PinholeCamera(pose, torch.eye(3, dtype=torch.float64), height=2, width=3)
    torch.testing.assert_close(camera.world_to_camera() @ pose, torch.eye(4, dtype=torch.float64), atol=1e-14, rtol=0)


@pytest.mark.usefixtures("without_shape_checker")
def test_a_camera_needs_matrices_of_the_right_shape_and_a_pixel():
    with pytest.raises(ValueError, match=r"camera_to_world \(4, 4\)"):
        PinholeCamera(torch.eye(3), torch.eye(3), height=2, width=3)
    with pytest.raises(ValueError, match="at least one pixel"):
        PinholeCamera(torch.eye(4), torch.eye(3), height=0, width=3)
