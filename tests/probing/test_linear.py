import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import linear
from snd_nerfstudio.probing.augmentation import rescaled_size
from snd_nerfstudio.probing.datasets import open_dataset
from snd_nerfstudio.probing.evaluation import evaluate
from snd_nerfstudio.probing.examples import image_tensor, windowed
from snd_nerfstudio.probing.features import FeatureSettings, encode
from snd_nerfstudio.probing.linear import run_linear
from snd_nerfstudio.probing.metrics.depth import depth_errors
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.objectives import largest_class, make_objective
from snd_nerfstudio.probing.protocols import DepthProbe, NormalsProbe, SegmentationProbe
from tests.probing.backbones import KnownMaps, fewer, tiny_model


def pair(rooms, task, every=10):
    """12 images to train on and 6 to test on."""
    return tuple(fewer(open_dataset("rooms", rooms, task, split), every) for split in ("train", "test"))


def knowing(datasets, what, patch, label, noise=False):
    """A model whose tokens are the means, over each patch, of what a function makes of a sample ([H, W, c])."""
    samples = [windowed(dataset, index) for dataset in datasets for index in range(len(dataset))]
    images = torch.stack([image_tensor(sample.image) for sample in samples])
    maps = torch.stack([torch.from_numpy(what(sample)).float().permute(2, 0, 1) for sample in samples])
    maps = F.avg_pool2d(maps, patch)
    return ProbeModel.from_backbone(label, KnownMaps(images, maps, patch, noise))


def camera_coordinates(sample):
    """x, y and z of every pixel, for a camera of 84 pixels focal length."""
    rows, columns = np.mgrid[: sample.depth.shape[0], : sample.depth.shape[1]] + 0.5
    x, y = (columns - sample.depth.shape[1] / 2) / 84, (rows - sample.depth.shape[0] / 2) / 84
    return np.stack([x * sample.depth, y * sample.depth, sample.depth], axis=-1)


PLAIN = FeatureSettings(norm=False)


def short(settings, **changes):
    return dataclasses.replace(settings, **{"iterations": 6, "batch": 3, "eval_every": 3, **changes})


# ---------------------------------------------------------------------- what features are worth


def test_perfect_features_give_nearly_no_depth_error_and_noise_no_more_than_a_constant(rooms, tmp_path):
    data = pair(rooms, "depth")
    for dataset in data:
        dataset.window = (14, 34, 14, 44)  # an eighth of the time
    models = [knowing(data, camera_coordinates, 2, "known"), knowing(data, camera_coordinates, 2, "noise", noise=True)]
    settings = dataclasses.replace(DepthProbe.smoke(), iterations=300, batch=2, lr=0.3, features=PLAIN, clip=None)
    known, noise = (row.last for row in run_linear(models, *data, settings, tmp_path))
    measured, seen = ([torch.from_numpy(windowed(d, i).depth) for i in range(len(d))] for d in data[::-1])
    trained = torch.cat([depth.flatten() for depth in seen])
    middle = float(trained[trained > 0].log().mean().exp())
    constant = [depth_errors(torch.full_like(depth, middle), depth, 1e-3, 10.0)["abs_rel"] for depth in measured]
    chance = sum(constant) / len(constant)
    # tokens are means over 2 x 2 pixels, which blurs edges: no head can undo that
    blurred = [F.interpolate(F.avg_pool2d(depth[None, None], 2), scale_factor=4, mode="bilinear") for depth in measured]
    blurred = [F.interpolate(depth, size=(20, 30), mode="bilinear")[0, 0] for depth in blurred]
    least = [depth_errors(*both, 1e-3, 10.0)["abs_rel"] for both in zip(blurred, measured, strict=True)]
    assert known["abs_rel"] < sum(least) / len(least) + 0.01 < 0.04 and known["d1"] > 0.97
    assert chance > 4 * known["abs_rel"] and noise["abs_rel"] == pytest.approx(chance, rel=0.25)


def test_normals_as_features_are_found_and_so_are_classes(rooms, tmp_path):
    data = pair(rooms, "normals")
    model = knowing(data, lambda sample: sample.normals, 2, "normals")
    settings = dataclasses.replace(NormalsProbe.smoke(), iterations=150, batch=4, lr=0.05, features=PLAIN)
    (row,) = run_linear([model], *data, settings, tmp_path / "normals")
    assert row.last["median"] < 2 and row.last["d3"] > 0.8  # edges are blurred
    assert row.last["depth/median"] == row.last["median"]  # all of a room's pixels have normals
    data = pair(rooms, "segmentation")
    count = len(data[0].classes)

    def classes(sample):
        return (sample.labels[..., None] == np.arange(count)) * 5.0

    settings = dataclasses.replace(SegmentationProbe.smoke(), iterations=150, batch=4, lr=0.05)
    rows = run_linear([knowing(data, classes, 2, "classes")], *data, settings, tmp_path / "classes")
    assert [row.variant["head_norm"] for row in rows] == ["none", "batch"]
    assert min(row.last["aAcc"] for row in rows) > 93 and rows[0].last["mIoU"] > 50


# ---------------------------------------------------------------------- resuming, caching, many at once


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_an_interrupted_run_goes_on_exactly_as_it_would_have(rooms, tmp_path, cache):
    data, model = pair(rooms, "segmentation"), tiny_model()
    settings = short(SegmentationProbe.fixed(cache), iterations=8, save_every=2)
    if cache == "none":
        settings = dataclasses.replace(settings, crop=56, short_side=50, window=42, stride=28)
    whole = run_linear([model], *data, settings, tmp_path / "whole")

    def interrupt(what, done, total):
        if what.startswith("Training") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_linear([model], *data, settings, tmp_path / "again", progress=interrupt)
    steps = []
    again = run_linear(
        [model], *data, settings, tmp_path / "again", progress=lambda what, done, total: steps.append((what, done))
    )
    # after step 4 the state was saved
    assert [done for what, done in steps if what.startswith("Training")] == [5, 6, 7, 8]
    for one, other in zip(whole, again, strict=True):
        assert one.curve == other.curve and one.last == other.last and len(one.curve) == 3
        expected, found = load_file(one.head_file), load_file(other.head_file)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.parametrize("kind", [DepthProbe, NormalsProbe])
def test_interrupted_runs_of_other_tasks_go_on_exactly_too(rooms, tmp_path, kind):
    """Depth cycles a beta and sees mirror images; the last batch of normals is smaller than the others."""
    data, model = pair(rooms, "depth" if kind is DepthProbe else "normals"), tiny_model()
    settings = short(kind.fixed("memory"), iterations=7, batch=5, save_every=2, eval_every=0)
    (whole,) = run_linear([model], *data, settings, tmp_path / "whole")

    def interrupt(what, done, total):
        if what.startswith("Training") and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_linear([model], *data, settings, tmp_path / "again", progress=interrupt)
    (again,) = run_linear([model], *data, settings, tmp_path / "again")
    assert again.curve == whole.curve
    expected, found = load_file(whole.head_file), load_file(again.head_file)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_a_finished_run_is_not_trained_again(rooms, tmp_path):
    data, model, settings = pair(rooms, "depth"), tiny_model(), short(DepthProbe.smoke())
    first = run_linear([model], *data, settings, tmp_path)
    asked = []
    again = run_linear([model], *data, settings, tmp_path, progress=lambda what, *_: asked.append(what))
    assert again == first and not any(what.startswith(("Training", "Testing")) for what in asked)
    for other in (dataclasses.replace(settings, lr=2e-2), dataclasses.replace(settings, seed=1)):
        with pytest.raises(InputError, match="state of a probe with other settings"):
            run_linear([model], *data, other, tmp_path)
    with pytest.raises(InputError, match="state of a probe with other settings"):
        run_linear([tiny_model(seed=1)], *data, settings, tmp_path)
    (tmp_path / "state.pt").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be read"):
        run_linear([model], *data, settings, tmp_path)


def test_cached_tokens_give_what_the_backbone_gives_to_half_precision(rooms, tmp_path):
    data, model = pair(rooms, "depth"), tiny_model()
    settings = short(DepthProbe.smoke(), lr=1e-3)
    rows = {}
    for cache in ("none", "memory", "disk"):
        changed = dataclasses.replace(settings, cache=cache)
        (rows[cache],) = run_linear([model], *data, changed, tmp_path / cache)
    assert rows["memory"].curve == rows["disk"].curve and rows["none"].tokens_bytes == 0
    # 12 images, and 6 with their mirror images, of 24 tokens and a class token of 96 channels
    assert rows["memory"].tokens_bytes == (12 + 2 * 6) * 25 * 96 * 2
    for with_cache, without in zip(rows["memory"].curve, rows["none"].curve, strict=True):
        for name, value in without.items():
            assert with_cache[name] == pytest.approx(value, rel=2e-3, abs=2e-3), name
    assert rows["memory"].curve != rows["none"].curve


def test_heads_trained_together_are_those_trained_alone(rooms, tmp_path):
    data, settings = pair(rooms, "depth"), short(DepthProbe.smoke(), more_lrs=(1e-3,), repeats=2)
    models = [tiny_model(0, "one"), tiny_model(1, "two")]
    rows = run_linear(models, *data, settings, tmp_path / "all")
    assert [(row.model, row.variant["lr"], row.variant["repeat"]) for row in rows] == [
        (model, lr, repeat) for model in ("one", "two") for lr in (1e-2, 1e-3) for repeat in (0, 1)
    ]
    assert len({row.head_file for row in rows}) == 8 and len({str(row.last) for row in rows}) == 8
    alone = dataclasses.replace(settings, lr=1e-3, more_lrs=(), repeats=1)
    (row,) = run_linear([models[1]], *data, alone, tmp_path / "alone")
    assert row.curve == rows[6].curve
    with pytest.raises(InputError, match="each of them once"):
        run_linear([models[0], models[0]], *data, settings, tmp_path / "twice")


def test_best_is_the_best_test_and_last_the_last(rooms, tmp_path):
    data = pair(rooms, "depth")
    settings = short(DepthProbe.smoke(), iterations=9, eval_every=2, lr=0.5)
    (row,) = run_linear([tiny_model()], *data, settings, tmp_path)
    assert [entry["iteration"] for entry in row.curve] == [2, 4, 6, 8, 9]
    best = min(row.curve, key=lambda entry: entry["abs_rel"])
    assert row.best_iteration == best["iteration"] and row.best["abs_rel"] == best["abs_rel"]
    assert row.last["abs_rel"] == row.curve[-1]["abs_rel"] and "loss" not in row.last and row.seconds > 0


# ---------------------------------------------------------------------- the protocol of testing


def test_depth_is_the_mean_of_an_image_and_its_mirror_image(rooms):
    data, model = pair(rooms, "depth"), tiny_model()
    settings = DepthProbe.paper()
    objective = make_objective(settings, *data)
    torch.manual_seed(0)
    head = objective.make_head(96, 96, {})
    ((found,),) = evaluate([(model, [head])], objective)
    rows = []
    for sample in data[1]:
        image = torch.from_numpy(sample.image).permute(2, 0, 1)[None].float() / 255
        guesses = []
        for seen in (image, image.flip(-1)):
            features = encode(model, seen, settings.features)
            fine = head.depth(head(features.tokens, features.class_token)).clamp(1e-3, 10)
            guesses.append(F.interpolate(fine, size=(56, 84), mode="bilinear", align_corners=False)[0, 0])
        mean = (guesses[0] + guesses[1].flip(-1)) / 2
        rows.append(depth_errors(mean.detach(), torch.from_numpy(sample.depth), 1e-3, 10.0))
    for name in rows[0]:
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / len(rows), rel=1e-5)
    ((single,),) = evaluate([(model, [head])], make_objective(dataclasses.replace(settings, flip_average=False), *data))
    assert single["abs_rel"] != found["abs_rel"]


def test_classes_come_from_overlapping_windows_of_the_resized_image(rooms):
    data, model = pair(rooms, "segmentation"), tiny_model()
    settings = dataclasses.replace(SegmentationProbe.paper(), short_side=70, window=60, stride=40)
    objective = make_objective(settings, *data)
    torch.manual_seed(0)
    head = objective.make_head(96, 0, {"head_norm": "none"})
    image = torch.from_numpy(data[1][0].image).permute(2, 0, 1)[None].float() / 255

    def predict(seen):
        return objective.predict(head, encode(model, seen, settings.features))

    found = objective.on_image(image, predict)
    import cv2

    # 56 x 84 with a shorter side of 70: 70 x 105; windows of 60 begin at 0 and 10, and at 0, 40 and 45
    assert rescaled_size((56, 84), 2048, 70) == (70, 105)
    resized = torch.from_numpy(cv2.resize(data[1][0].image, (105, 70), interpolation=cv2.INTER_LINEAR))
    resized = resized.permute(2, 0, 1)[None].float() / 255
    total, count = torch.zeros(1, len(data[0].classes), 70, 105), torch.zeros(70, 105)
    for top in (0, 10):
        for left in (0, 40, 45):
            features = encode(model, resized[:, :, top : top + 60, left : left + 60], settings.features)
            assert features.tokens.shape == (1, 5, 5, 96)  # padded to 70
            logits = F.interpolate(head(features.tokens), size=(60, 60), mode="bilinear", align_corners=False)
            total[:, :, top : top + 60, left : left + 60] += logits
            count[top : top + 60, left : left + 60] += 1
    expected = F.interpolate(total / count, size=(56, 84), mode="bilinear", align_corners=False)
    classes = expected.argmax(dim=1, keepdim=True)
    assert (found == classes).float().mean() > 0.999 and found.unique().numel() > 1


def test_normals_are_judged_in_the_datasets_window_under_each_mask(rooms):
    """With the lower half without normals, half of the pixels with depth are wrong by 90 degrees."""
    data = pair(rooms, "normals")
    window = (0, 56, 14, 70)

    class Halved(type(data[1])):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            normals = sample.normals.copy()
            normals[28:] = 0
            return dataclasses.replace(sample, normals=normals)

    test = Halved(data[1].request, data[1].entries, data[1].rules)
    test.window = window
    settings = NormalsProbe.fixed()
    objective = make_objective(settings, data[0], test)
    head = objective.make_head(96, 0, {})
    with torch.no_grad():
        head.linear.weight.zero_()
        head.linear.bias.copy_(torch.tensor([0.0, 0.0, -1.0, 0.0]))  # towards the camera everywhere
    ((found,),) = evaluate([(tiny_model(), [head])], objective)
    medians, rmse = [], []
    for index in range(len(test)):
        cosine = -data[1][index].normals[:28, 14:70, 2].astype(np.float64)
        angle = np.degrees(np.arccos(cosine)).ravel()
        medians.append(np.median(angle))
        rmse.append(
            [math.sqrt((angle**2).mean()), math.sqrt(((angle**2).sum() + len(angle) * 90.0**2) / 2 / len(angle))]
        )
    assert found["median"] == pytest.approx(np.mean(medians), abs=1e-3)
    assert found["rmse"] == pytest.approx(np.mean(rmse, axis=0)[0], abs=1e-3)
    assert found["depth/rmse"] == pytest.approx(np.mean(rmse, axis=0)[1], abs=1e-3)
    ((paper,),) = evaluate([(tiny_model(), [head])], make_objective(NormalsProbe.paper(), data[0], test))
    assert paper["rmse"] == pytest.approx(found["depth/rmse"], abs=1e-3) and "depth/rmse" not in paper


def test_training_follows_the_schedules_and_the_released_steps(rooms, tmp_path):
    """An independent loop of the depth probe: AdamW with cycled betas, the clipped gradient, the loss at the crop."""
    from snd_nerfstudio.probing.examples import TrainingBatches
    from snd_nerfstudio.probing.losses import sig_loss
    from snd_nerfstudio.probing.schedules import depth_betas, depth_rate

    data, model = pair(rooms, "depth"), tiny_model()
    settings = short(DepthProbe.paper(), iterations=5, batch=2, crop=(42, 56), lr=1e-2, mean_only_steps=2, clip=0.05)
    (row,) = run_linear([model], *data, settings, tmp_path)
    torch.manual_seed(settings.seed)
    convolution = torch.nn.Linear(192, 256)  # 96 of a token, 96 of the class token
    optimizer = torch.optim.AdamW(convolution.parameters(), lr=1.0, weight_decay=0.01)
    bins = torch.linspace(1e-3, 10, 256)
    batches = TrainingBatches(data[0], settings)
    for step in range(5):
        images, labels = batches(step)
        features = encode(model, images, settings.features)
        x = torch.cat([features.tokens, features.class_token[:, None, None].expand_as(features.tokens)], dim=-1)
        x = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=4, mode="bilinear", align_corners=False)
        weights = F.relu(convolution(x.permute(0, 2, 3, 1))) + 0.1
        depth = (weights * bins).sum(-1) / weights.sum(-1)
        depth = F.interpolate(depth[:, None], size=(42, 56), mode="bilinear", align_corners=False)[:, 0]
        loss = sig_loss(depth, labels["depth"], step, 2)
        optimizer.param_groups[0].update(lr=1e-2 * depth_rate(step, 5, settings.warmup), betas=depth_betas(step, 5))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(convolution.parameters(), 0.05)
        optimizer.step()
    batches.close()
    trained = load_file(row.head_file)
    torch.testing.assert_close(trained["linear.weight"], convolution.weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(trained["linear.bias"], convolution.bias.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("task", ["depth", "normals", "segmentation"])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_probe_on_the_gpu_is_that_of_the_cpu(rooms, tmp_path, task, cache):
    data, found = pair(rooms, task), {}
    kind = {"depth": DepthProbe, "normals": NormalsProbe, "segmentation": SegmentationProbe}[task]
    settings = short(kind.fixed("memory"), cache=cache)
    for device in ("cpu", "cuda"):
        results = run_linear([tiny_model()], *data, settings, tmp_path / device, device)
        found[device] = [row.last for row in results]
    for one, other in zip(found["cpu"], found["cuda"], strict=True):
        for name, value in one.items():
            # a class changes where two logits are nearly equal
            assert other[name] == pytest.approx(value, rel=2e-2, abs=0.5 if task == "segmentation" else 1e-3), name


# ---------------------------------------------------------------------- what is refused


def test_a_loss_that_is_not_finite_ends_the_run(rooms, tmp_path, monkeypatch):
    data = pair(rooms, "depth")
    model = knowing(data, lambda sample: camera_coordinates(sample) * math.inf, 14, "broken")
    settings = short(DepthProbe.fixed(), augment=False, features=PLAIN)
    with pytest.raises(InputError, match="depth probe of broken has a loss of nan in step 1: give a smaller --lr"):
        run_linear([model], *data, settings, tmp_path)


@pytest.mark.parametrize("size", [(5, 7), (11, 9), (3, 3)])
@pytest.mark.parametrize("at_once", [1, 300, 10**6])
def test_the_largest_class_is_that_of_all_logits_enlarged_at_once(size, at_once):
    logits = torch.randn(2, 13, 5, 7).round(decimals=1)  # some are equal
    expected = F.interpolate(logits, size=size, mode="bilinear", align_corners=False).argmax(dim=1, keepdim=True)
    assert torch.equal(largest_class(logits, size, at_once), expected)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_head_that_diverges_has_no_results_and_leaves_the_others_alone(rooms, tmp_path, capsys, cache):
    data, model = pair(rooms, "depth"), tiny_model()
    settings = short(DepthProbe.fixed(cache), augment=False, iterations=4, eval_every=2)
    (alone,) = run_linear([model], *data, settings, tmp_path / "alone")
    both = dataclasses.replace(settings, more_lrs=(1e30,))
    kept, lost = run_linear([model], *data, both, tmp_path / "both")
    assert kept.last == alone.last and kept.curve == alone.curve
    assert all(math.isnan(value) for value in lost.last.values()) and lost.last.keys() == kept.last.keys()
    assert "lr 1e+30" in capsys.readouterr().out
    # what was saved says so too
    again = run_linear([model], *data, both, tmp_path / "both")
    assert again[0].last == kept.last and all(math.isnan(value) for value in again[1].last.values())


def test_test_images_are_read_once_for_all_models(rooms):
    data, read = pair(rooms, "depth"), []

    class Counted(type(data[1])):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    test = Counted(data[1].request, data[1].entries, data[1].rules)
    objective = make_objective(DepthProbe.fixed(), data[0], test)
    heads = [objective.make_head(96, 96, {}) for _ in range(2)]
    models = [tiny_model(), tiny_model()]
    first, second = evaluate([(models[0], heads), (models[1], heads[:1])], objective)
    assert read == list(range(len(test))) and len(first) == 2 and second == first[:1]


def test_data_of_another_task_or_range_is_refused(rooms, tmp_path):
    depth, normals = pair(rooms, "depth"), pair(rooms, "normals")
    with pytest.raises(InputError, match="opened for normals, not depth"):
        run_linear([tiny_model()], normals[0], depth[1], DepthProbe.smoke(), tmp_path)
    depth[1].max_depth = 20.0
    with pytest.raises(InputError, match="use datasets of one range"):
        run_linear([tiny_model()], *depth, DepthProbe.smoke(), tmp_path)
    classes = pair(rooms, "segmentation")
    classes[1].classes = classes[1].classes[:-1]
    with pytest.raises(InputError, match="do not have the same classes"):
        run_linear([tiny_model()], *classes, SegmentationProbe.smoke(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_look_alike_have_files_of_their_own():
    names = {linear.head_file_name(label, "depth", {"lr": 1e-4}) for label in ("a=b", "a/b", "a b")}
    assert len(names) == 3 and all("/" not in name and " " not in name for name in names)
