from dataclasses import replace

import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import MVSplat
from snd_nerfstudio.reconstruction.mvsplat.reconstructor import MVSplatReconstructor, load_reconstructor
from snd_nerfstudio.scenes.views import Views


@pytest.fixture
def network(mvsplat_file):
    """The small network, its branches that start as nothing filled with noise."""
    network = MVSplat.from_checkpoint(mvsplat_file).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network


def two_views(unit=1.0):
    generator = torch.Generator().manual_seed(1)
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, :3, 3] = unit * torch.tensor([0.3, -0.05, 0.1])
    intrinsics = torch.tensor([[40.0, 0.0, 24.0], [0.0, 40.0, 16.0], [0.0, 0.0, 1.0]]).repeat(2, 1, 1)
    return Views(torch.rand(2, 3, 32, 48, generator=generator), poses, intrinsics)


@torch.no_grad()
def test_in_the_range_of_its_training_it_is_the_network_alone(network):
    views = two_views()
    gaussians = MVSplatReconstructor(network, 0.7, 8.0)(views)
    alone = network(views.images[None], views.intrinsics[None], views.camera_to_worlds[None]).item(0)
    assert torch.equal(gaussians.means, alone.means) and torch.equal(gaussians.scales, alone.scales)


@torch.no_grad()
def test_another_unit_of_length_gives_the_same_gaussians_in_that_unit(network):
    # a world in units of 40 cm: poses, near and far are 2.5 times as large, and so must be the Gaussians
    metres = MVSplatReconstructor(network, 0.7, 8.0)(two_views())
    other = MVSplatReconstructor(network, 0.7 * 2.5, 8.0 * 2.5)(two_views(2.5))
    torch.testing.assert_close(other.means, 2.5 * metres.means, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.scales, 2.5 * metres.scales, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(other.opacities, metres.opacities, rtol=1e-4, atol=1e-5)
    # without scaling the scene, the network itself gives something else
    views = two_views(2.5)
    network.settings = replace(network.settings, near=0.7 * 2.5, far=8.0 * 2.5)
    alone = network(views.images[None], views.intrinsics[None], views.camera_to_worlds[None]).item(0)
    assert ((alone.means - other.means).norm(dim=1) / other.means.norm(dim=1)).median() > 0.01


@pytest.mark.parametrize(("near", "far"), [(9.0, None), (None, 0.5), (0.5, float("inf")), (-1.0, None)])
def test_a_range_that_makes_no_sense_with_the_checkpoint_names_the_flags(mvsplat_file, near, far):
    with pytest.raises(InputError, match="--pipeline.datamanager.near .* --pipeline.datamanager.far"):
        load_reconstructor(mvsplat_file, near, far)
