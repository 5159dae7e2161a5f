"""One configuration's operators: their grid, their names, and what is marked in them."""

from dataclasses import replace

import pytest
import torch

from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.supervision.dense import dense_supervision
from snd_nerfstudio.supervision.operator_maker import OperatorMaker
from snd_nerfstudio.supervision.settings import SupervisionSettings

PATCH = 7


def wall(unseen=0):
    """Two views of a wall and one between them; of the first columns of the contexts no depth is known."""
    random = torch.Generator().manual_seed(0)
    intrinsics = torch.tensor([[40.0, 0, 20], [0, 40, 14], [0, 0, 1]]).repeat(3, 1, 1)
    poses = torch.eye(4).repeat(3, 1, 1)
    poses[:, 0, 3] = torch.tensor([-0.1, 0.1, 0.0])
    images = 0.1 + 0.9 * torch.rand(3, 3, 28, 40, generator=random)
    masks = torch.randint(1, 4, (3, 4, 5), generator=random).repeat_interleave(7, 1).repeat_interleave(8, 2)
    depths = torch.full((3, 28, 40), 3.0)
    depths[:, :, :unseen] = 0
    views = Views(images, poses, intrinsics, masks, depths)

    def part(chosen):
        return Views(*(getattr(views, name)[chosen] for name in vars(views) if name != "names"))

    return ViewTriplet(part(slice(2)), part(slice(2, 3)), "wall", digest="a wall")


def test_the_operator_gives_the_dense_paths_tokens():
    triplet, settings = wall(), SupervisionSettings()
    maker = OperatorMaker(settings, PATCH, marks_black=False)
    context = triplet.context
    gaussians = DepthReconstructor()(context)
    tokens = torch.randn(2, *maker.grid(28, 40), 6, generator=torch.Generator().manual_seed(1))
    operator = maker.make(triplet, gaussians)
    target = triplet.target
    dense = dense_supervision(tokens, context.masks, (28, 40), gaussians, target.camera(0), target.mask(0), settings)
    assert maker.grid(28, 40) == (4, 5) and operator.black is None
    torch.testing.assert_close(operator(tokens, settings.blending), dense.tokens, atol=1e-5, rtol=1e-4)


def test_without_blending_the_regions_are_left_out_unless_another_blending_may_come():
    maker, triplet = OperatorMaker(SupervisionSettings(blending=1.0), PATCH, marks_black=False), wall()
    gaussians = DepthReconstructor()(triplet.context)
    plain, any_blending = (maker.make(triplet, gaussians, for_any_blending=flag) for flag in (False, True))
    assert plain.regions is None and not plain.blendable
    assert any_blending.regions is not None and any_blending.blendable
    tokens = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plain(tokens, 1.0), any_blending(tokens, 1.0))
    assert not torch.allclose(any_blending(tokens, 0.5), any_blending(tokens, 1.0), atol=1e-3)


def test_tokens_without_any_colour_are_marked_where_that_is_asked_for():
    maker, triplet = OperatorMaker(SupervisionSettings(), PATCH, marks_black=True), wall(unseen=20)
    black = maker.make(triplet, DepthReconstructor()(triplet.context)).black
    assert black is not None and black[:, 0].all() and not black[:, 3:].any()


def test_a_triplet_of_unknown_contents_has_no_name():
    maker = OperatorMaker(SupervisionSettings(), PATCH, marks_black=False)
    with pytest.raises(ValueError, match="wall.*digest is empty"):
        maker.key(replace(wall(), digest=""), "depth")


def test_the_name_depends_on_all_but_the_blending_strength():
    maker, triplet = OperatorMaker(SupervisionSettings(), PATCH, marks_black=False), wall()
    name = maker.key(triplet, "depth")
    others = [
        replace(maker, patch=PATCH + 1).key(triplet, "depth"),
        replace(maker, marks_black=True).key(triplet, "depth"),
        replace(maker, settings=SupervisionSettings(pooling="bilinear")).key(triplet, "depth"),
        maker.key(triplet, "another reconstructor"),
        maker.key(replace(triplet, digest="another wall"), "depth"),
    ]
    assert len({name, *others}) == 6
    assert replace(maker, settings=SupervisionSettings(blending=0.1)).key(triplet, "depth") == name
