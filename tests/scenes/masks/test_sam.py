"""The path through SAM and SAM 2, with small models of random weights that are saved and loaded as real ones are."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.masks.cache import MaskCache
from snd_nerfstudio.scenes.masks.maker import MaskMaker
from snd_nerfstudio.scenes.masks.sam import (
    SamSegmenter,
    SamSettings,
    boxes_around,
    find_model,
    generate_masks,
    grid_points,
    prepare,
    stability,
)
from tests.scenes.masks.test_maker import SIZE, frames, masks_of  # noqa: F401

pytest.importorskip("transformers", minversion="4.56")
INTRINSICS = np.eye(3)


def small_sam():
    from transformers import SamConfig, SamModel

    vision = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [1], "mlp_dim": 64}
    vision |= {"num_pos_feats": 16, "initializer_range": 0.2}
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 8, "mask_input_channels": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))


def small_sam2():
    from transformers import Sam2Config, Sam2Model

    hiera = {"hidden_size": 12, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1], "mlp_ratio": 2.0}
    hiera |= {"embed_dim_per_stage": [12, 24, 48, 96], "num_attention_heads_per_stage": [1, 2, 4, 8]}
    hiera |= {"window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3]}
    hiera |= {"window_positional_embedding_background_size": [4, 4]}
    vision = {"backbone_config": {"model_type": "sam2_hiera_det_model", **hiera}, "fpn_hidden_size": 32}
    vision |= {"backbone_channel_list": [96, 48, 24, 12], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
    prompts = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 8}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}
    return Sam2Model(Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))


def spread_out(model):
    """Random weights that give masks of many shapes, and scores between 0 and 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if "mask_decoder" in name else 0.2)
        last = model.mask_decoder.iou_prediction_head.proj_out
        last.weight.mul_(0.02)
        last.bias.fill_(0.7)
    return model


@pytest.fixture(scope="module", params=["sam", "sam2"])
def folder(request, tmp_path_factory) -> Path:
    """A model as transformers saves it."""
    where = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = spread_out(small_sam() if request.param == "sam" else small_sam2())
    model.save_pretrained(where)
    return where


def settings_of(folder: Path, **others) -> SamSettings:
    loose = {"points_per_side": 5, "points_per_batch": 10, "min_score": 0.0, "min_stability": 0.0}
    return SamSettings(**{"model": str(folder), "device": "cpu", **loose, **others})


def photo() -> np.ndarray:
    image = np.full((40, 60, 3), 60, np.uint8)
    image[5:30, 10:35] = (220, 60, 40)
    image[15:38, 40:55] = (40, 90, 200)
    return image


def test_masks_come_out_of_the_whole_path_and_are_the_same_every_time(folder):
    regions = SamSegmenter(settings_of(folder)).segment(photo(), None, INTRINSICS)
    assert regions.shape == (40, 60) and np.array_equal(np.unique(regions), np.arange(1, regions.max() + 1))
    assert regions.max() > 2
    again = SamSegmenter(settings_of(folder, points_per_batch=25)).segment(photo(), None, INTRINSICS)
    assert (again == regions).mean() > 0.999


def pipeline_of(model, name):
    """transformers' own mask generation, as an independent answer."""
    from transformers import Sam2ImageProcessor, SamImageProcessor
    from transformers.pipelines import MaskGenerationPipeline

    if name == "sam":
        processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    else:
        processor = Sam2ImageProcessor(size={"height": 64, "width": 64})
    return MaskGenerationPipeline(model=model, image_processor=processor, device="cpu")


def test_transformers_own_pipeline_finds_the_same_masks(folder):
    from PIL import Image

    segmenter = SamSegmenter(settings_of(folder, min_score=0.01, max_overlap=1.0))
    # of other images than squares the pipeline asks SAM 2 for the upper or left part alone
    image = photo() if segmenter.model_type == "sam" else np.ascontiguousarray(photo()[:, :40])
    with torch.no_grad():
        masks, scores = generate_masks(segmenter.model, torch.from_numpy(image), segmenter.settings)
    theirs = pipeline_of(segmenter.model, segmenter.model_type)(
        Image.fromarray(image),
        points_per_batch=10,
        points_per_crop=5,
        pred_iou_thresh=0.01,
        stability_score_thresh=0.0,
        crops_nms_thresh=1.0,
    )
    their_masks = np.array([np.asarray(mask) for mask in theirs["masks"]])
    seen = their_masks.any(axis=(1, 2))
    assert len(masks) == seen.sum() > 40
    np.testing.assert_allclose(scores.numpy(), theirs["scores"].numpy()[seen], atol=0.02)
    overlaps = [max((ours & mask).sum() / (ours | mask).sum() for ours in masks.numpy()) for mask in their_masks[seen]]
    assert np.median(overlaps) > 0.98 and np.mean(overlaps) > 0.95


def test_thresholds_leave_less(folder):
    segmenter = SamSegmenter(settings_of(folder))

    def count(**others):
        with torch.no_grad():
            return len(generate_masks(segmenter.model, torch.from_numpy(photo()), settings_of(folder, **others))[0])

    every = count(max_overlap=1.0)
    assert every > count(max_overlap=0.3) >= 1
    assert every > count(min_stability=0.9, max_overlap=1.0) and count(min_score=1.0) == 0
    nothing = SamSegmenter(settings_of(folder, min_score=1.0)).segment(photo(), None, INTRINSICS)
    assert (nothing == 1).all()


def test_the_second_run_finds_the_masks_and_does_not_even_load_the_model(folder, frames, tmp_path):  # noqa: F811
    first = MaskMaker(SamSegmenter(settings_of(folder)), tmp_path / "cache", lambda line: None)
    masks = masks_of(frames, first)
    assert first.cache.statistics.written == 2 and masks.shape == (2, *SIZE)
    again = MaskMaker(SamSegmenter(settings_of(folder)), tmp_path / "cache", lambda line: None)
    assert torch.equal(masks_of(frames, again), masks)
    assert again.cache.statistics.found == 2 and again.segmenter._model is None


def test_other_weights_and_settings_have_other_masks_and_other_places_have_not(folder, tmp_path):
    import shutil

    def key(settings):
        segmenter = SamSegmenter(settings)
        return MaskCache(tmp_path / "cache", segmenter.name, segmenter.description).settings_key

    settings = settings_of(folder)
    moved = Path(shutil.copytree(folder, tmp_path / "moved"))
    same = [replace(settings, model=str(moved)), replace(settings, points_per_batch=3), replace(settings, device=None)]
    assert {key(other) for other in same} == {key(settings)}
    weights = moved / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    others = [same[0], replace(settings, points_per_side=6), replace(settings, min_score=0.1)]
    assert len({key(settings), *map(key, others)}) == 4


def test_slow_masks_while_training_name_the_command_that_makes_them_ahead(folder, frames, tmp_path):  # noqa: F811
    said = []
    masks_of(frames, MaskMaker(SamSegmenter(settings_of(folder)), tmp_path / "cache", said.append))
    assert len(said) == 1 and "snd-data masks" in said[0]


def test_points_are_the_centres_of_cells():
    # three columns of 20 pixels and three rows of 10
    assert grid_points(3, (30, 60))[:4].tolist() == [[10, 5], [30, 5], [50, 5], [10, 15]]


def test_images_are_prepared_as_transformers_prepares_them():
    from transformers import Sam2ImageProcessor, SamImageProcessor

    image = torch.from_numpy(photo())
    padded = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    expected = padded(images=photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepare(image, (43, 64), 64), expected, atol=0.03, rtol=0)
    stretched = Sam2ImageProcessor(size={"height": 64, "width": 64})
    expected = stretched(images=photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(prepare(image, (64, 64), 64), expected, atol=0.03, rtol=0)


def test_boxes_and_stability_of_a_mask():
    masks = torch.zeros(2, 6, 8, dtype=torch.bool)
    masks[0, 2:5, 3:7] = masks[1, 5, 0] = True
    assert boxes_around(masks).tolist() == [[3, 2, 6, 4], [0, 5, 0, 5]]
    logits = torch.tensor([[[3.0, 0.5, -0.5, -3.0]]])  # above 1: one pixel, above -1: three
    assert stability(logits).tolist() == pytest.approx([1 / 3])


# ---------------------------------------------------------------------- what a user can get wrong


def test_a_model_that_is_not_to_be_had_names_itself_and_the_flag(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match="nobody/no-model.*--pipeline.datamanager.sam.model"):
        find_model("nobody/no-model", lambda line: None)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub():
    with pytest.raises(InputError, match="sam.model /nowhere/sam: no such folder"):
        SamSegmenter(SamSettings(model="/nowhere/sam"))


def test_what_is_no_model_of_this_kind_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        SamSegmenter(SamSettings(model=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="kind bert"):
        SamSegmenter(SamSettings(model=str(tmp_path)))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match="no .safetensors file.*may run code"):
        SamSegmenter(SamSettings(model=str(tmp_path)))


def test_a_model_without_all_its_weights_is_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if name.startswith("mask_decoder.transformer"))
    save_file({n: w for n, w in weights.items() if n != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(InputError, match="1 of the model's weights are not in"):
        SamSegmenter(settings_of(tmp_path)).segment(photo(), None, INTRINSICS)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be loaded"):
        SamSegmenter(settings_of(tmp_path)).segment(photo(), None, INTRINSICS)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"points_per_side": 0}, "sam.points-per-side 0"),
        ({"points_per_batch": 0}, "sam.points-per-batch 0"),
        ({"min_score": 1.5}, "sam.min-score 1.5"),
        ({"min_area": float("nan")}, "sam.min-area nan"),
    ],
)
def test_settings_without_sense_are_refused_by_name(wrong, named):
    with pytest.raises(InputError, match=named):
        SamSegmenter(SamSettings(**wrong))


def test_a_device_that_is_not_there_is_named(folder):
    with pytest.raises(InputError, match="sam.device cuda:9"):
        SamSegmenter(settings_of(folder, device="cuda:9")).segment(photo(), None, INTRINSICS)
