import pytest
import torch
from einops import rearrange

from snd_nerfstudio.probing.held_out import correspondence, depth_error, held_out_probes
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.reconstruction.depth import unproject
from snd_nerfstudio.snd_triplets import TripletDataManagerConfig

PATCH = 4


@pytest.fixture(scope="module")
def views(rooms):
    """Training and held-out triplets with depth."""
    config = TripletDataManagerConfig(data=rooms, image_size=(56, 84), eval_triplets=6)
    data = resolve(config, "fixed").setup(device="cpu", seed=5)
    return data.train_triplets(6, with_depth=True), [data.eval_triplet(n, with_depth=True) for n in range(6)]


class Oracle:
    """Looks up what it is asked for by the image: tokens that know exactly what a test wants them to know."""

    def __init__(self, triplets, describe):
        views = [view for triplet in triplets for view in (triplet.context, triplet.target)]
        self.known = [(view.images[n], describe(view, n)) for view in views for n in range(len(view))]

    def __call__(self, images):
        found = [next(tokens for image, tokens in self.known if torch.equal(image, wanted)) for wanted in images]
        return torch.stack(found)


def world_points(views, number):
    """Sines of the world coordinates of each pixel, of many wavelengths, so that only neighbours are similar."""
    points = unproject(views.depths, views.intrinsics, views.camera_to_worlds)[number]
    return torch.cat([turn(points * k) for k in (1, 2, 4) for turn in (torch.sin, torch.cos)], -1)


def log_depth(views, number):
    depth = views.depths[number].clamp(min=0.1)
    pooled = torch.nn.functional.avg_pool2d(depth.log()[None], PATCH)[0]
    return torch.stack([torch.sin(pooled), torch.cos(pooled)], -1)


def noise(views, number):
    return torch.randn(14, 21, 16, generator=torch.Generator().manual_seed(int(views.images[number].sum() * 1e3)))


def test_tokens_that_know_where_they_are_match_and_noise_does_not(views):
    _, held_out = views
    perfect = correspondence(Oracle(held_out, world_points), held_out)
    random = correspondence(Oracle(held_out, noise), held_out)
    assert perfect["correspondence"] > 0.97 and perfect["correspondence_5cm"] > 0.8
    assert random["correspondence"] < 0.2
    oracle = Oracle(held_out, world_points)

    def second_one_mirrored(images):
        first, second = oracle(images)
        return torch.stack([first, second.flip(1)])

    mirrored = correspondence(second_one_mirrored, held_out)
    assert mirrored["correspondence"] < 0.5 * perfect["correspondence"]


def test_tokens_that_know_their_depth_guess_it_and_noise_does_not(views):
    known, held_out = views
    perfect = depth_error(Oracle([*known, *held_out], log_depth), known, held_out)["neighbour_depth"]
    random = depth_error(Oracle([*known, *held_out], noise), known, held_out)["neighbour_depth"]
    assert perfect < 0.08 and random > 2 * perfect


def test_every_model_has_its_own_metrics(views):
    known, held_out = views
    models = {"": Oracle([*known, *held_out], log_depth), "_original": Oracle([*known, *held_out], noise)}
    results = held_out_probes(models, known, held_out)
    names = ("correspondence", "correspondence_5cm", "neighbour_depth")
    assert set(results) == {*names, *(f"{name}_original" for name in names)}


def test_without_depth_nothing_is_said(rooms):
    config = TripletDataManagerConfig(data=rooms, image_size=(56, 84), eval_triplets=2)
    data = resolve(config, "fixed").setup(device="cpu", seed=5)
    triplets = [data.eval_triplet(n) for n in range(2)]
    flat = lambda images: rearrange(images, "b c h w -> b h w c")  # noqa: E731
    assert held_out_probes({"": flat}, triplets, triplets) == {}
