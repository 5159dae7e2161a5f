"""Training with token operators that are kept on disk."""

import copy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.reconstruction.mvsplat.checks import DegeneratePairError
from snd_nerfstudio.supervision.operator_cache import CacheStatistics
from snd_nerfstudio.supervision.operator_maker import OperatorMaker


@pytest.fixture
def cached(tiny_config, tmp_path):
    """`snd-tiny` with an empty folder for operators."""
    tiny_config.pipeline.datamanager.operator_cache = tmp_path / "operators"
    return tiny_config


def files_of(config) -> list[Path]:
    folder = config.pipeline.datamanager.operator_cache
    return sorted(path for path in folder.rglob("*") if path.is_file())


def after_steps(config, steps=1, **changes) -> tuple[CacheStatistics, list[dict[str, float]]]:
    """What a new pipeline finds in its cache in some steps, and the loss and metrics of each."""
    config = copy.deepcopy(config.pipeline)
    for name, value in changes.items():
        part = config.datamanager if hasattr(config.datamanager, name) else config.model.supervision
        setattr(part, name, value)
    config.checked_triplets = 0  # the reconstruction is not measured first
    pipeline = config.setup(device="cpu")
    values = []
    for step in range(steps):
        _, losses, metrics = pipeline.get_train_loss_dict(step)
        values.append({name: float(value.detach()) for name, value in {**losses, **metrics}.items()})
    operators = pipeline.datamanager.operators
    return CacheStatistics() if operators is None else operators.statistics, values


def forbid_geometry(pipeline, monkeypatch) -> None:
    """From now on nothing may be reconstructed, splatted or built."""

    def never(*_, **__):
        raise AssertionError("the cache is there so that this is not done")

    for name, module in list(sys.modules.items()):
        if name.startswith("snd_nerfstudio."):
            for function in ("rasterize", "build_token_operator"):
                if hasattr(module, function):
                    monkeypatch.setattr(module, function, never)
    monkeypatch.setattr(OperatorMaker, "make", never)
    monkeypatch.setattr(type(pipeline.datamanager.reconstructor), "__call__", never)


def assert_close(values, expected) -> None:
    assert len(values) == len(expected)
    for found, wanted in zip(values, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("profile", ["fixed", "paper", "official"])
def test_losses_are_the_same_without_a_cache_and_when_it_is_filled_and_read(cached, profile):
    cached.pipeline.profile = profile
    cached.pipeline.datamanager.triplets_per_step = 2
    _, plain = after_steps(cached, 3, operator_cache=None)
    filled, first = after_steps(cached, 3)
    read, second = after_steps(cached, 3)
    assert (filled.missing, filled.written, filled.found) == (6, 6, 0)
    assert (read.missing, read.written, read.found) == (0, 0, 6) and len(files_of(cached)) == 6
    assert_close(first, plain)
    assert second == first  # bit by bit, or a resumed training would differ from one that ran through


@pytest.mark.parametrize("profile", ["fixed", "official"])
def test_a_step_whose_operator_is_cached_makes_no_geometry_at_all(cached, monkeypatch, profile):
    cached.pipeline.profile = profile
    _, expected = after_steps(cached)
    cached.pipeline.setup(device="cpu").get_eval_loss_dict(0)
    pipeline = cached.pipeline.setup(device="cpu")
    forbid_geometry(pipeline, monkeypatch)
    _, losses, _ = pipeline.get_train_loss_dict(0)
    losses["distillation"].backward()
    assert float(losses["distillation"].detach()) == pytest.approx(expected[0]["distillation"], abs=1e-4)
    assert torch.isfinite(pipeline.get_eval_loss_dict(0)[1]["distillation"])
    with pytest.raises(AssertionError, match="the cache is there"):
        pipeline.get_train_loss_dict(1)  # the test could fail


def test_with_mvsplat_neither_training_nor_evaluation_runs_the_network_again(with_mvsplat, tmp_path, monkeypatch):
    with_mvsplat.pipeline.datamanager.operator_cache = tmp_path / "operators"
    _, plain = after_steps(with_mvsplat, 2, operator_cache=None)
    after_steps(with_mvsplat, 2)
    evaluated = with_mvsplat.pipeline.setup(device="cpu").get_eval_loss_dict(0)[1]["distillation"]
    pipeline = with_mvsplat.pipeline.setup(device="cpu")
    forbid_geometry(pipeline, monkeypatch)
    monkeypatch.setattr(type(pipeline.datamanager.reconstructor.network), "forward", None)
    losses = [float(pipeline.get_train_loss_dict(step)[1]["distillation"].detach()) for step in range(2)]
    assert losses == pytest.approx([values["distillation"] for values in plain], abs=1e-4)
    # held-out triplets carry measured depth that MVSplat does not look at
    assert float(pipeline.get_eval_loss_dict(0)[1]["distillation"]) == pytest.approx(float(evaluated), abs=1e-4)


def test_tokens_are_preserved_with_operators_from_the_cache_too(cached):
    cached.pipeline.model.preserve = "l2"
    for found in (0, 1):
        statistics, (values,) = after_steps(cached)
        assert statistics.found == found and values["preservation"] == 0


def test_a_pool_is_built_in_its_first_epoch_and_read_from_then_on(cached):
    statistics, _ = after_steps(cached, 9, triplet_pool=3)
    assert (statistics.missing, statistics.found) == (3, 6) and len(files_of(cached)) == 3


@pytest.mark.parametrize("damage", [lambda contents: contents[:-7], lambda contents: contents[:-7] + b"damaged"])
def test_a_damaged_operator_is_built_anew_while_training(cached, logged, damage):
    _, expected = after_steps(cached)
    (file,) = files_of(cached)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    logged()
    statistics, values = after_steps(cached)
    said = logged()
    assert said.count("is damaged") == 1 and "built anew" in said
    assert statistics == CacheStatistics(damaged=1, written=1)
    assert_close(values, expected)
    assert files_of(cached) == [file] and len(file.read_bytes()) == len(whole)
    assert after_steps(cached)[0] == CacheStatistics(found=1)


def test_a_full_cache_does_not_keep_anything_from_training(cached, logged):
    _, expected = after_steps(cached, 4, operator_cache=None)
    after_steps(cached)
    size = files_of(cached)[0].stat().st_size
    logged()
    statistics, values = after_steps(cached, 4, operator_cache_limit=1.5 * size / 1e9)
    assert statistics == CacheStatistics(found=1, missing=3, turned_away=3)
    assert_close(values, expected)
    said = logged()
    assert said.count("is full") == 1 and "--pipeline.datamanager.operator-cache-limit" in said


def test_another_setting_is_another_operator(cached):
    changes = {
        "upsampling": "bilinear",
        "align_corners": True,
        "token_label": "sample",
        "isolated": "zero",
        "footprint": "squared",
        "weighting": "none",
        "pooling": "bilinear",
        "uncovered": "zero",
        "masks": "none",
        "image_size": (56, 70),
    }
    after_steps(cached)
    for name, value in changes.items():
        assert after_steps(cached, **{name: value})[0] == CacheStatistics(missing=1, written=1), name
    assert after_steps(cached)[0] == after_steps(cached, pooling="bilinear")[0] == CacheStatistics(found=1)


@pytest.mark.parametrize(("name", "value"), [("uncovered", "keep"), ("min_coverage", 0.9)])
def test_what_is_decided_after_the_operator_does_not_make_another(cached, name, value):
    after_steps(cached)
    assert after_steps(cached, **{name: value})[0] == CacheStatistics(found=1)


@pytest.mark.parametrize("first", [1.0, 0.5])
def test_every_strength_of_blending_is_served_by_the_same_operator(cached, first):
    after_steps(cached, blending=first)
    losses = []
    for blending in (0.0, 0.25, 1.0):
        statistics, values = after_steps(cached, blending=blending)
        assert statistics == CacheStatistics(found=1)
        assert_close(values, after_steps(cached, blending=blending, operator_cache=None)[1])
        losses.append(values[0]["cosine"])
    assert len(set(losses)) == 3


def test_other_weights_and_other_depths_of_the_reconstructor_make_other_operators(with_mvsplat, mvsplat_file, tmp_path):
    with_mvsplat.pipeline.datamanager.operator_cache = tmp_path / "operators"
    assert after_steps(with_mvsplat)[0] == CacheStatistics(missing=1, written=1)
    contents = torch.load(mvsplat_file, weights_only=True)
    name = next(name for name, value in contents["state_dict"].items() if value.is_floating_point())
    contents["state_dict"][name].view(-1)[0] += 1e-3
    torch.save(contents, tmp_path / "other.ckpt")
    shutil.copy(mvsplat_file, tmp_path / "same.ckpt")
    changes = [{"reconstructor_checkpoint": tmp_path / "other.ckpt"}, {"near": 0.6}, {"far": 9.0}]
    for change in changes:
        assert after_steps(with_mvsplat, **change)[0] == CacheStatistics(missing=1, written=1), change
    for change in ({}, *changes, {"reconstructor_checkpoint": tmp_path / "same.ckpt"}):
        assert after_steps(with_mvsplat, **change)[0] == CacheStatistics(found=1), change
    assert after_steps(with_mvsplat, reconstructor="depth", reconstructor_checkpoint=None)[0].missing == 1


@pytest.mark.parametrize("kind", ["mask", "image", "depth"])
def test_a_file_that_changes_makes_another_operator_where_it_matters(cached, tmp_path, kind):
    shutil.copytree(cached.pipeline.datamanager.data, tmp_path / "rooms")
    cached.data = cached.pipeline.datamanager.data = tmp_path / "rooms"
    after_steps(cached)
    data = cached.pipeline.setup(device="cpu", test_mode="test").datamanager
    (index,) = data.step_indices(0)
    for place, frame in (("left", index.context[0]), ("right", index.context[1]), ("target", index.target)):
        file = getattr(data.train_frames, f"{kind}_files")[frame]
        with Image.open(file) as image:
            pixels = np.array(image)
        before = pixels.copy()
        pixels[20:30, 20:30] = pixels[40, 60]
        assert (pixels != before).any()
        Image.fromarray(pixels).save(file)
        matters = place != "target" or kind == "mask"
        expected = CacheStatistics(missing=1, written=1) if matters else CacheStatistics(found=1)
        assert after_steps(cached)[0] == expected, place


def test_a_pair_that_cannot_be_matched_is_skipped_and_leaves_nothing_in_the_cache(cached, logged, monkeypatch):
    pipeline = cached.pipeline.setup(device="cpu")

    def unmatched(*_):
        raise DegeneratePairError("they look in opposite directions")

    monkeypatch.setattr(DepthReconstructor, "__call__", unmatched)
    _, losses, _ = pipeline.get_train_loss_dict(0)
    assert losses["distillation"] == 0 and pipeline.skipped_pairs == 1 and files_of(cached) == []
    assert "opposite directions" in logged()


def test_the_dense_path_has_no_use_for_a_cache(cached):
    cached.pipeline.model.supervision.path = "dense"
    with pytest.raises(InputError, match="supervision.path dense .*--pipeline.datamanager.operator-cache"):
        cached.pipeline.setup(device="cpu")


def test_a_cache_that_cannot_be_written_to_is_named(cached, tmp_path):
    cached.pipeline.datamanager.operator_cache = tmp_path / "taken"
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache .*taken cannot be written to"):
        cached.pipeline.setup(device="cpu").get_train_loss_dict(0)


def test_a_cache_that_cannot_be_written_to_is_named_before_training(cached, tmp_path):
    cached.pipeline.datamanager.operator_cache = tmp_path / "taken"
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache"):
        cached.pipeline.setup(device="cpu")


@pytest.mark.parametrize("test_mode", ["test", "inference"])
def test_a_run_with_a_cache_is_looked_at_without_touching_it(cached, tmp_path, test_mode):
    folder = tmp_path / "operators"
    pipeline = cached.pipeline.setup(device="cpu", test_mode=test_mode)
    assert cached.pipeline.datamanager.operator_cache == folder  # the given config is not changed
    metrics, _ = pipeline.evaluate(pipeline.datamanager.eval_triplet(0, with_depth=True))
    assert pipeline.datamanager.operators is None and metrics["cosine"] > 0 and not folder.exists()
    assert torch.isfinite(pipeline.get_eval_loss_dict(0)[1]["distillation"]) and not folder.exists()
    folder.write_text("a file in its place")  # as it may be on another machine
    cached.pipeline.setup(device="cpu", test_mode=test_mode)
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache"):
        cached.pipeline.setup(device="cpu")


def test_black_tokens_of_the_official_profile_come_back_from_the_cache(cached, monkeypatch):
    class Half(DepthReconstructor):
        """Nothing is known of the left half of any view."""

        def __call__(self, views):
            depths = views.depths.clone()
            depths[..., :42] = 0
            return super().__call__(replace(views, depths=depths))

    monkeypatch.setattr("snd_nerfstudio.snd_datamanager.DepthReconstructor", Half)
    cached.pipeline.profile = "official"
    plain = copy.deepcopy(cached.pipeline)
    plain.datamanager.operator_cache = None
    expected, first, second = (config.setup(device="cpu") for config in (plain, cached.pipeline, cached.pipeline))
    for step in range(2):
        (triplet,) = first.datamanager.next_train(step)
        wanted = expected.model.supervise(triplet, expected.geometry(triplet))
        assert 0.2 < wanted.zeroed.float().mean() < 0.8
        for pipeline in (first, second):
            found = pipeline.model.supervise(triplet, pipeline.geometry(triplet))
            assert torch.equal(found.zeroed, wanted.zeroed) and found.learned.all()
            assert (found.tokens[found.zeroed] == 0).all()
            torch.testing.assert_close(found.tokens, wanted.tokens, rtol=0, atol=1e-4)
    assert first.datamanager.operators.statistics.written == second.datamanager.operators.statistics.found == 2
