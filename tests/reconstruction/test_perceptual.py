import socket

import pytest
import torch

from snd_nerfstudio.reconstruction.perceptual import WEIGHTS, PerceptualLoss, weights_file

BUILDERS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty TORCH_HOME, and no way out to the network."""

    def refuse(*_):
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path


@pytest.fixture
def squeezenet(home):
    from torchvision.models import squeezenet1_1

    weights_file("squeeze").parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(squeezenet1_1(weights=None).state_dict(), weights_file("squeeze"))


@pytest.mark.parametrize("network", list(WEIGHTS))
def test_missing_weights_are_named_and_not_downloaded(home, network):
    with pytest.raises(FileNotFoundError) as caught:
        PerceptualLoss(network)
    assert str(caught.value) == str(home / "hub" / "checkpoints" / WEIGHTS[network])


@pytest.mark.parametrize("network", list(WEIGHTS))
def test_the_file_names_are_torchvisions(network):
    from torchvision.models import get_model_weights

    urls = [weights.url for weights in get_model_weights(BUILDERS[network])]
    assert WEIGHTS[network] in {url.rsplit("/", 1)[-1] for url in urls}


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 2, 3, 32, 48, generator=generator).unbind(0)


def test_equal_images_have_no_distance_and_others_have_one_with_a_gradient(squeezenet):
    loss = PerceptualLoss("squeeze")
    first, second = images()
    assert loss(first, first) == 0
    first.requires_grad_(True)
    distance = loss(first, second)
    distance.backward()
    assert distance > 0.01 and (first.grad.flatten(1).norm(dim=1) > 0).all()
    # descending the gradient brings the images closer
    nearer = loss(first.detach() - 0.1 * first.grad / first.grad.abs().max(), second)
    assert nearer < distance


def test_the_distance_is_the_mean_over_the_images(squeezenet):
    loss = PerceptualLoss("squeeze")
    first, second = images()
    alone = [float(loss(first[n : n + 1], second[n : n + 1])) for n in (0, 1)]
    assert alone[0] != alone[1] and float(loss(first, second)) == pytest.approx(sum(alone) / 2, rel=1e-5)


def test_colours_are_taken_from_zero_to_one(squeezenet):
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

    first, second = images()
    expected = learned_perceptual_image_patch_similarity(2 * first - 1, 2 * second - 1, net_type="squeeze")
    torch.testing.assert_close(PerceptualLoss("squeeze")(first, second), expected)


def test_a_picture_beyond_white_is_no_error(squeezenet):
    # rendered colours are not limited while a network is trained
    first, second = images()
    assert torch.isfinite(PerceptualLoss("squeeze")(3 * first - 1, second))


def test_its_weights_need_no_gradient(squeezenet):
    loss = PerceptualLoss("squeeze")
    first, second = images()
    assert not loss(first, second).requires_grad and not isinstance(loss, torch.nn.Module)
