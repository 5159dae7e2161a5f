from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from nerfstudio.viewer_legacy.server.viewer_utils import IOChangeException

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import PinholeCamera
from snd_nerfstudio.viewer.outputs import ray_lengths
from snd_nerfstudio.viewer.reconstruction import ReconstructionDisplay

CPU = torch.device("cpu")


def wall(distance=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    intrinsics = torch.tensor([[40.0, 0, 20], [0, 40, 14], [0, 0, 1]]).repeat(2, 1, 1)
    poses = torch.eye(4).repeat(2, 1, 1)
    poses[1, 0, 3] = 0.1
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    images = F.interpolate(coarse, (28, 40), mode="bilinear").repeat(2, 1, 1, 1)
    context = Views(images, poses, intrinsics, None, torch.full((2, 28, 40), distance))
    return ViewTriplet(context, Views(images[:1], poses[:1], intrinsics[:1]), "wall")


class Growing:
    """A reconstructor that is trained: every call it has learned to put things further away."""

    def __init__(self):
        self.calls = 0

    def __call__(self, views):
        self.calls += 1
        return DepthReconstructor(footprint=0.5)(replace(views, depths=views.depths * self.calls))


def camera():
    return wall().target.camera(0)


def test_colours_and_depth_of_the_reconstruction_are_shown():
    display = ReconstructionDisplay(DepthReconstructor(footprint=0.5))
    triplet = wall()
    display.show(triplet)
    outputs = display.render(camera(), CPU)
    assert list(outputs) == ["rgb", "depth", "accumulation"]
    inner = (slice(4, -4), slice(4, -4))
    truth = triplet.target.images[0].permute(1, 2, 0)
    assert outputs["accumulation"][inner].min() > 0.9
    mirrored = truth.flip(1)
    assert (outputs["rgb"] - truth)[inner].abs().mean() < 0.05 < (outputs["rgb"] - mirrored)[inner].abs().mean()
    # along the ray, as nerfstudio has it: more than 3 in the corners
    distance = 3.0 * ray_lengths(camera())
    torch.testing.assert_close(outputs["depth"][inner], distance[inner], rtol=1e-3, atol=0.0)


def test_gaussians_are_computed_when_they_are_asked_for_and_kept_until_something_changed():
    growing = Growing()
    display = ReconstructionDisplay(growing)
    display.show(wall())
    display.changed()
    assert growing.calls == 0
    first, again = display.render(camera(), CPU), display.render(camera(), CPU)
    assert growing.calls == 1 and torch.equal(first["depth"], again["depth"])
    display.changed()
    display.changed()
    after = display.render(camera(), CPU)
    assert growing.calls == 2
    middle = (14, 20)
    assert float(after["depth"][middle]) == pytest.approx(2 * float(first["depth"][middle]), rel=1e-3)


def test_another_triplet_is_reconstructed_anew():
    display = ReconstructionDisplay(DepthReconstructor())
    display.show(wall())
    near = display.render(camera(), CPU)["depth"]
    display.show(wall(distance=6.0))
    assert display.scene().triplet.scene == "wall"
    assert float(display.render(camera(), CPU)["depth"].median() / near.median()) == pytest.approx(2.0, rel=1e-3)


def test_colours_that_depend_on_the_direction_are_those_of_the_camera():
    def harmonic(views):
        gaussians = DepthReconstructor(footprint=0.5)(views)
        coefficients = torch.zeros(len(gaussians), 3, 4)
        coefficients[:, 0, 1] = 0.5  # red grows along the direction's x
        return replace(gaussians, harmonics=coefficients)

    display = ReconstructionDisplay(harmonic)
    display.show(wall())
    red = display.render(camera(), CPU)["rgb"][4:-4, 4:-4, 0]
    assert red[:, -1].mean() > red[:, 0].mean() + 0.1


def test_without_a_triplet_the_pictures_are_grey(capsys):
    display = ReconstructionDisplay(DepthReconstructor())
    with pytest.raises(RuntimeError, match="no triplet is shown"):
        display.scene()
    assert all((value == 0.5).all() for value in display.render(camera(), CPU).values())
    assert "no triplet is shown" in capsys.readouterr().out


def test_an_interrupted_reconstruction_is_done_again():
    interruptions = [IOChangeException()]

    def reconstruct(views):
        if interruptions:
            raise interruptions.pop()
        return DepthReconstructor()(views)

    display = ReconstructionDisplay(reconstruct)
    display.show(wall())
    with pytest.raises(IOChangeException):
        display.render(camera(), CPU)
    assert not (display.render(camera(), CPU)["depth"] == 0.5).all()


def test_where_nothing_is_the_pictures_are_finite():
    def nothing(views):
        gaussians = DepthReconstructor()(views)
        return replace(gaussians, opacities=torch.zeros_like(gaussians.opacities))

    display = ReconstructionDisplay(nothing)
    display.show(wall())
    away = PinholeCamera(torch.eye(4), torch.tensor([[300.0, 0, 60], [0, 300, 42], [0, 0, 1]]), 84, 120)
    outputs = display.render(away, CPU)
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert (outputs["rgb"] == 0).all() and (outputs["accumulation"] == 0).all()
