import socket
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.scene_box import SceneBox

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.mvsplat import MVSplat, MVSplatSettings
from snd_nerfstudio.reconstruction.mvsplat.checkpoints import official_key
from snd_nerfstudio.reconstruction.mvsplat.settings import NetworkSizes
from snd_nerfstudio.reconstruction.quality import splat_colours
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.snd_mvsplat_model import MVSplatModel, MVSplatModelConfig
from tests.conftest import SMALL_MVSPLAT

HEIGHT, WIDTH = 32, 48


def build(seed=0, near=0.7, far=8.0, **settings) -> MVSplatModel:
    settings = {"sizes": NetworkSizes(**SMALL_MVSPLAT), "lpips_weight": 0.0, "background": "black", **settings}
    box = SceneBox(aabb=torch.tensor([[-1.0, -1, -1], [1, 1, 1]]))
    return MVSplatModelConfig(**settings).setup(scene_box=box, num_train_data=0, seed=seed, near=near, far=far)


def views(positions, seed) -> Views:
    """Views side by side of smooth random pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(len(positions), 3, 4, 6, generator=generator)
    poses = torch.eye(4).repeat(len(positions), 1, 1)
    poses[:, 0, 3] = torch.tensor(positions)
    matrix = torch.tensor([[40.0, 0, WIDTH / 2], [0, 40.0, HEIGHT / 2], [0, 0, 1]])
    return Views(
        images=torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear"),
        camera_to_worlds=poses,
        intrinsics=matrix.repeat(len(positions), 1, 1),
        names=tuple(f"{position:g}.png" for position in positions),
    )


def triplet(targets=(0.1,), seed=0, baseline=0.2) -> ViewTriplet:
    return ViewTriplet(views((0.0, baseline), seed), views(targets, seed + 100), "scene")


def only_target(pair: ViewTriplet, number: int) -> ViewTriplet:
    one = {name: value[number : number + 1] for name, value in vars(pair.target).items() if torch.is_tensor(value)}
    return replace(pair, target=replace(pair.target, **one))


def perturbed(model: MVSplatModel) -> MVSplatModel:
    """A fresh network is the identity in many places, where gradients are 0; this one is not."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


# ---------------------------------------------------------------------- loss


def test_the_loss_is_the_squared_error_of_the_rendered_targets():
    model, pair = build(), triplet((0.05, 0.15))
    outputs = model([pair])
    assert set(outputs) == {"loss", "mse", "psnr", "coverage", "skipped_pairs"}
    gaussians = model.reconstruct(pair.context)
    splats = [splat_colours(gaussians, pair.context, pair.target.camera(number)) for number in (0, 1)]
    truth = pair.target.images.permute(0, 2, 3, 1)
    expected = torch.stack([(splat.features - image).square().mean() for splat, image in zip(splats, truth)]).mean()
    torch.testing.assert_close(outputs["loss"].detach(), expected)
    torch.testing.assert_close(outputs["psnr"], -10 * expected.log10())
    torch.testing.assert_close(outputs["coverage"], torch.stack([splat.alpha.mean() for splat in splats]).mean())
    assert outputs["loss"].requires_grad
    assert not any(value.requires_grad for name, value in outputs.items() if name != "loss")


def test_all_targets_and_all_pairs_count_the_same():
    model, pairs = build(), [triplet((0.05, 0.15)), triplet((0.1, 0.12), seed=3)]
    alone = [float(model([only_target(pair, n)])["loss"].detach()) for pair in pairs for n in (0, 1)]
    assert max(alone) - min(alone) > 1e-3  # or the next line would not notice a target that is left out
    assert float(model(pairs)["loss"].detach()) == pytest.approx(sum(alone) / 4, rel=1e-4)


def thin(model: MVSplatModel) -> MVSplatModel:
    """Half of what is behind its Gaussians shines through."""
    with torch.no_grad():
        model.network.depth.disparity_head[2].bias[1] -= 4.0
    return model


def test_what_is_not_covered_shows_a_random_colour_in_training_and_black_in_evaluation():
    model, plain, pair = thin(build(background="random")), thin(build()), triplet((0.05, 0.15))
    black = plain([pair])
    assert black["coverage"] < 0.97  # or there would be nothing to see
    losses = {seed: float(model([pair], seed)["loss"].detach()) for seed in (1, 2)}
    assert len({*losses.values(), float(black["loss"].detach())}) == 3
    assert float(model([pair], 1)["loss"].detach()) == losses[1]  # a function of the seed
    assert torch.equal(model([pair], 1)["coverage"], black["coverage"])
    assert torch.equal(model.eval()([pair], 1)["loss"], plain.eval()([pair], 2)["loss"])
    assert torch.equal(model([pair], 1)["loss"].detach(), black["loss"].detach())


def test_the_random_colour_is_one_per_target_behind_what_is_rendered():
    model, pair = thin(build(background="random")), triplet((0.05, 0.15))
    gaussians = model.reconstruct(pair.context)
    generator = torch.Generator().manual_seed(7)
    errors = []
    for number, truth in enumerate(pair.target.images):
        splat = splat_colours(gaussians, pair.context, pair.target.camera(number))
        colour = torch.rand(3, generator=generator)
        image = splat.features + (1 - splat.alpha)[..., None] * colour
        errors.append((image - truth.permute(1, 2, 0)).square().mean())
    torch.testing.assert_close(model([pair], 7)["loss"].detach(), torch.stack(errors).mean())


def test_a_few_steps_on_one_triplet_lower_the_loss(rooms):
    from snd_nerfstudio.profiles import resolve
    from snd_nerfstudio.snd_mvsplat_pipeline import MVSplatDataManagerConfig

    config = MVSplatDataManagerConfig(data=rooms, image_size=(HEIGHT, WIDTH), targets_per_pair=2)
    (shown,) = resolve(config, "fixed").setup(device="cpu").next_train(0)
    model = build(background="random")
    optimizer = torch.optim.Adam(model.get_param_groups()["network"], lr=4e-3)
    losses = []
    for step in range(13):
        optimizer.zero_grad()
        loss = model([shown], step)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    print("losses on one triplet:", [round(loss, 4) for loss in losses])
    assert losses[-1] < 0.6 * losses[0]


def test_every_parameter_gets_a_gradient():
    model = perturbed(build())
    model([triplet((0.05, 0.15))])["loss"].backward()
    trained = {id(parameter) for parameter in model.get_param_groups()["network"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in trained), name
    for name, parameter in model.network.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # a bias in front of a normalisation over the same channel alone could not have one; there is none here
        assert parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------------- pairs that cannot be matched


def opposite() -> ViewTriplet:
    pair = triplet(seed=5)
    poses = pair.context.camera_to_worlds.clone()
    poses[1, [0, 2], [0, 2]] = -1.0  # turned about the vertical axis
    return replace(pair, context=replace(pair.context, camera_to_worlds=poses))


def test_a_pair_that_cannot_be_matched_is_left_out_and_counted_and_the_others_are_used(logged):
    model, usable = build(), [triplet(seed=1), triplet(seed=2)]
    expected = model(usable)["loss"]
    outputs = model([usable[0], triplet(baseline=0.0), usable[1], opposite()])
    assert float(outputs["loss"].detach()) == float(expected.detach())
    assert outputs["skipped_pairs"] == 2
    printed = logged()
    assert "Skipped scene: 0.png, 0.png -> 0.1.png (1 so far)" in printed and "(2 so far)" in printed
    assert "same camera position" in printed and "opposite directions" in printed
    assert model([triplet(baseline=0.0)])["skipped_pairs"] == 1


def test_a_step_of_such_pairs_alone_gives_a_loss_and_gradients_of_zero():
    model = build()
    outputs = model([triplet(baseline=0.0)])
    outputs["loss"].backward()
    assert outputs["loss"] == 0 and outputs["skipped_pairs"] == 1
    gradients = [parameter.grad for parameter in model.network.parameters()]
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients)


def test_wrong_data_is_no_pair_to_skip():
    pair = triplet()
    bad = replace(pair, context=replace(pair.context, images=pair.context.images * float("nan")))
    with pytest.raises(InputError, match="NaN"):
        build()([bad])


# ---------------------------------------------------------------------- precision


def test_half_precision_stays_close_and_is_for_the_network_alone():
    full, half = perturbed(build()), build(precision="bfloat16")
    half.network.load_state_dict(full.network.state_dict())
    pair = triplet((0.05, 0.15))
    losses, gradients = {}, {}
    for name, model in (("full", full), ("half", half)):
        losses[name] = model([pair])["loss"]
        losses[name].backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in model.network.parameters()])
    assert losses["half"].dtype == torch.float32 and losses["half"] != losses["full"]
    assert float(losses["half"].detach()) == pytest.approx(float(losses["full"].detach()), rel=0.02)
    assert torch.cosine_similarity(gradients["half"], gradients["full"], dim=0) > 0.9
    ours, theirs = half.reconstruct(pair.context), full.reconstruct(pair.context)
    assert {ours.means.dtype, ours.scales.dtype, ours.opacities.dtype, ours.harmonics.dtype} == {torch.float32}
    assert ((ours.means - theirs.means).norm(dim=1) / theirs.means.norm(dim=1)).median() < 0.05


# ---------------------------------------------------------------------- where weights come from


def same(first: MVSplat, second: MVSplat) -> bool:
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_random_weights_are_a_function_of_the_seed_and_leave_torchs_own_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = build(seed=4)
    assert torch.rand(1) == expected
    assert same(first.network, build(seed=4).network) and not same(first.network, build(seed=5).network)


def test_random_weights_have_the_given_sizes_range_and_geometry():
    expected = MVSplatSettings(**SMALL_MVSPLAT, geometry="exact", near=0.7, far=8.0)
    assert build().network.settings == expected
    assert build(geometry="official").network.settings == replace(expected, geometry="official")
    assert build(near=None, far=None).network.settings == replace(expected, near=1.0, far=100.0)


def test_given_weights_bring_sizes_range_and_geometry_and_flags_win(mvsplat_file):
    sizes = NetworkSizes(candidates=64)  # not those of the file
    model = build(weights=str(mvsplat_file), sizes=sizes, near=None, far=None)
    loaded = MVSplat.from_checkpoint(mvsplat_file)
    assert same(model.network, loaded) and model.network.settings == loaded.settings
    assert model.network.settings == MVSplatSettings(**SMALL_MVSPLAT, near=0.7, far=8.0)
    other = build(weights=str(mvsplat_file), near=0.2, far=None, geometry="official")
    assert other.network.settings == replace(loaded.settings, near=0.2, geometry="official")
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_weights_may_be_a_run(tmp_path):
    model = perturbed(build())
    (tmp_path / "nerfstudio_models").mkdir()
    state = {f"_model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"step": 3, "pipeline": state}, tmp_path / "nerfstudio_models" / "step-000000003.ckpt")
    assert same(build(seed=8, weights=str(tmp_path)).network, model.network)


def unimatch(model: MVSplatModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    parts = {k: v for k, v in model.network.named_parameters() if k.startswith(("encoder.", "transformer."))}
    return {
        official_key(key).removeprefix("backbone."): torch.randn(value.shape, generator=generator)
        for key, value in parts.items()
    }


def test_matching_weights_replace_those_of_encoder_and_transformer(tmp_path, logged):
    plain = build()
    state = unimatch(plain)
    torch.save({"model": {**state, "upsampler.0.weight": torch.ones(2)}}, tmp_path / "gmdepth.pth")
    model = build(matching_weights=tmp_path / "gmdepth.pth")
    fresh = dict(plain.network.named_parameters())
    for key, value in model.network.named_parameters():
        name = official_key(key).removeprefix("backbone.")
        assert torch.equal(value, fresh[key] if key.startswith("depth.") else state[name]), key
    assert "without a place: upsampler.0.weight" in logged()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "nowhere.ckpt"}, r"nowhere\.ckpt does not exist"),
        ({"weights": "other.pth"}, r"other\.pth is a checkpoint of another model"),
        ({"weights": "."}, r"no step-\*\.ckpt"),
        ({"matching_weights": Path("nowhere.pth")}, r"nowhere\.pth does not exist"),
        ({"matching_weights": Path("other.pth")}, r"other\.pth is a checkpoint of another model"),
        ({"weights": "export.ckpt", "matching_weights": Path("other.pth")}, "leave --pipeline.model.weights"),
        ({"lpips_weight": -0.1}, r"--pipeline\.model\.lpips-weight -0\.1 must not be negative"),
        ({"near": 9.0}, "near 9 and far 8: 0 < near < far"),
        ({"weights": "export.ckpt", "near": 9.0, "far": None}, "near 9 and far 8: 0 < near < far"),
    ],
)
def test_weights_and_settings_that_do_not_fit_are_refused(tmp_path, monkeypatch, mvsplat_file, settings, message):
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, tmp_path / "other.pth")
    (tmp_path / "export.ckpt").write_bytes(mvsplat_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        build(**settings)


# ---------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_network_and_its_settings_alone():
    model = build()
    state = model.state_dict()
    expected = {f"network.{name}" for name, _ in model.network.named_parameters()} | {"network._extra_state"}
    assert set(state) == expected
    assert state["network._extra_state"] == asdict(model.network.settings)
    assert {"x"} < set(model.state_dict(destination={"x": torch.ones(1)}, prefix="p."))  # others' entries are kept


def test_loading_takes_over_weights_near_and_far_and_what_is_shown():
    trained, fresh = perturbed(build(near=0.5, far=6.0)), build(seed=1)
    pair = triplet()
    fresh.show(pair)
    before = fresh.display.scene().gaussians.means
    fresh.load_trained(trained.state_dict(), "The checkpoint")
    assert same(trained.network, fresh.network) and fresh.network.settings == trained.network.settings
    expected = trained.reconstruct(pair.context).means
    assert torch.equal(fresh.display.scene().gaussians.means, expected) and not torch.equal(before, expected)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("network.encoder.stem.weight"), "Missing key.*encoder.stem.weight.*config.yml"),
        (lambda state: state.update({"network.extra": torch.ones(1)}), "Unexpected key.*extra"),
        (lambda state: state.update({"teacher.extra": torch.ones(1)}), "Unexpected key.*teacher.extra"),
        (lambda state: state.update({"network.encoder.stem.weight": torch.ones(2)}), "size mismatch.*stem.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message):
    model = build()
    state = dict(model.state_dict())
    damage(state)
    with pytest.raises(InputError, match=rf"The checkpoint of step 3 does not fit this network: .*{message}"):
        model.load_trained(state, "The checkpoint of step 3")


def test_a_checkpoint_of_other_sizes_says_which():
    small, other = build(), build(sizes=NetworkSizes(**{**SMALL_MVSPLAT, "candidates": 16, "harmonics": 1}))
    with pytest.raises(InputError) as caught:
        other.load_trained(small.state_dict(), "The checkpoint")
    assert "candidates 8 instead of 16" in str(caught.value) and "harmonics 4 instead of 1" in str(caught.value)


# ---------------------------------------------------------------------- LPIPS


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """torch.hub's folder, empty, and no way out to the network."""

    def refuse(*_):
        raise AssertionError("something was to be downloaded")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def squeezenet(offline):
    """Random weights where torchvision would have put the pretrained ones."""
    from torchvision.models import squeezenet1_1

    offline.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(squeezenet1_1(weights=None).state_dict(), offline / "squeezenet1_1-b8a52dc0.pth")


@pytest.mark.parametrize(("network", "file"), [("vgg", "vgg16-397923af.pth"), ("alex", "alexnet-owt-7be5be79.pth")])
def test_without_its_weights_training_goes_on_without_lpips_and_names_the_file(offline, capsys, network, file):
    model = build(lpips_weight=0.05, lpips_network=network)
    printed = "".join(capsys.readouterr().out.split())
    assert "TrainingwithoutLPIPS" in printed and str(offline / file) in printed
    outputs = model([triplet()])
    assert torch.equal(outputs["loss"].detach(), outputs["mse"]) and "lpips" not in outputs
    assert model.perceptual_distance(torch.zeros(32, 48, 3), torch.ones(32, 48, 3)) is None


def test_with_its_weights_lpips_is_a_weighted_part_of_the_loss(squeezenet, capsys):
    model = build(lpips_weight=0.3, lpips_network="squeeze")
    assert "without LPIPS" not in capsys.readouterr().out
    pair = triplet((0.05, 0.15))
    outputs = model([pair])
    assert outputs["lpips"] > 0 and not outputs["lpips"].requires_grad
    torch.testing.assert_close(outputs["loss"].detach(), outputs["mse"] + 0.3 * outputs["lpips"])
    outputs["loss"].backward()
    with_it = torch.cat([p.grad.flatten() for p in model.network.parameters()])
    plain = build()
    plain([pair])["loss"].backward()
    without = torch.cat([p.grad.flatten() for p in plain.network.parameters()])
    assert (with_it - without).norm() > 0.01 * without.norm()
    assert model.perceptual_distance(torch.zeros(32, 48, 3), torch.ones(32, 48, 3)) > 0


def test_lpips_weights_are_neither_trained_nor_in_the_checkpoint(squeezenet):
    model, plain = build(lpips_weight=0.3, lpips_network="squeeze"), build()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert len(model.get_param_groups()["network"]) == len(list(plain.network.parameters()))


def test_a_weight_of_zero_asks_for_nothing(offline, capsys):
    model = build(lpips_weight=0.0)
    assert model._perceptual is None and "LPIPS" not in capsys.readouterr().out


# ---------------------------------------------------------------------- viewer


def camera(height, width):
    return Cameras(torch.eye(4)[None, :3], fx=40.0, fy=40.0, cx=width / 2, cy=height / 2, height=height, width=width)


def test_outputs_have_the_cameras_size_and_are_finite():
    model = build()
    pose = torch.eye(4)[None, :3] * torch.tensor([1.0, -1.0, -1.0, 1.0])  # nerfstudio's axes
    view = Cameras(pose, fx=40.0, fy=40.0, cx=30.0, cy=20.0, height=40, width=60)
    model.show(triplet())
    outputs = model.get_outputs_for_camera(view)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "rgb": (40, 60, 3),
        "depth": (40, 60, 1),
        "accumulation": (40, 60, 1),
    }
    assert all(torch.isfinite(value).all() for value in outputs.values())
    assert outputs["accumulation"].mean() > 0.5 and outputs["rgb"].std() > 0.05
    assert 0.7 < outputs["depth"].median() < 8.0 * 1.5


def test_before_anything_is_shown_the_pictures_are_grey():
    outputs = build().get_outputs_for_camera(camera(6, 8))
    assert outputs["depth"].shape == (6, 8, 1) and all((value == 0.5).all() for value in outputs.values())
