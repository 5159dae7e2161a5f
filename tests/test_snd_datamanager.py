import shutil
from pathlib import Path

import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig
from snd_nerfstudio.splatting import rasterize


def manager(data: Path, **settings):
    config = SnDDataManagerConfig(data=data, **{"image_size": (56, 84), "eval_triplets": 4, **settings})
    return resolve(config, "fixed").setup(device="cpu", seed=5)


def test_the_reconstruction_explains_the_target_view(rooms):
    data = manager(rooms)
    triplet = data.eval_triplet(0)
    gaussians = data.reconstruct(triplet.context)
    colours = triplet.context.images.permute(0, 2, 3, 1).reshape(-1, 3)
    splat = rasterize(gaussians, triplet.target.camera(0), colours)
    truth = triplet.target.images[0].permute(1, 2, 0)
    mean_error = (splat.features / splat.alpha[..., None].clamp(min=1e-6) - truth).abs()[splat.alpha > 0.5].mean()
    assert splat.alpha.mean() > 0.95 and mean_error < 0.06
    # splatting from a wrong place is far worse, so the comparison can fail
    elsewhere = rasterize(gaussians, triplet.context.camera(0), colours)
    assert (elsewhere.features - truth).abs().mean() > 1.5 * mean_error


def test_the_depth_reconstructor_is_given_the_depth_of_the_contexts_alone(rooms):
    data = manager(rooms)
    for triplet in (*data.next_train(0), data.eval_triplet(0)):
        assert triplet.context.depths.shape == (2, 56, 84) and triplet.target.depths is None
    reported = data.eval_triplet(0, with_depth=True)
    assert reported.target.depths.shape == (1, 56, 84) and (reported.context.depths == triplet.context.depths).all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "No depth map is known"),
        (lambda folder: next(folder.iterdir()).unlink(), r"Missing depth map .*\(1 of 60 are missing\)"),
    ],
)
def test_depth_that_is_missing_names_the_way_out(rooms, tmp_path, damage, message):
    scene = tmp_path / "scenes" / "room_0000"
    shutil.copytree(rooms / "scenes" / "room_0000", scene)
    damage(scene / "depth")
    with pytest.raises(InputError, match=rf"{message}.*`depth` reconstructor needs"):
        manager(tmp_path, all_scenes=True)
