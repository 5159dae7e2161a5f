import dataclasses

import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.protocols import PROBES, DepthProbe, NormalsProbe, SegmentationProbe


def test_paper_depth_is_as_released():
    depth = DepthProbe.paper()
    assert (depth.iterations, depth.batch, depth.lr, depth.weight_decay) == (307_200, 2, 1e-4, 0.01)
    assert depth.warmup * depth.iterations == pytest.approx(12_800) and depth.clip == 35 and depth.beta_cycle
    features = depth.features
    assert (features.block, features.norm, features.class_token) == (-1, False, True)
    assert (features.positions, features.pad_crop, features.input_norm) == ("timm", "parity", "imagenet")
    assert depth.flip_average and depth.gradient_weight == 0 and depth.eval_every == 38_400 and depth.seed == 42
    assert depth.augmentation("nyuv2").crop == (416, 544) and depth.augmentation("nyuv2").brightness == (0.75, 1.25)
    assert depth.augmentation("rooms").crop is None
    assert depth.augmentation("kitti").crop == (352, 704) and depth.augmentation("kitti").brightness == (0.9, 1.1)


def test_paper_normals_are_as_released():
    normals = NormalsProbe.paper()
    assert (normals.epochs, normals.batch, normals.lr, normals.weight_decay) == (10, 8, 5e-4, 0.01)
    assert not normals.shuffle and not normals.drop_last and normals.clip is None
    assert normals.features.norm is False and normals.features.class_token is False
    assert normals.features.extra_patch_quirk and normals.test_masks == ("depth",)
    # 20 images in batches of 8, the last one of 4: 3 steps, 10 times, and a test after each epoch
    assert normals.steps(20) == 30 and normals.test_steps(20) == set(range(3, 31, 3))


def test_paper_segmentation_is_as_released():
    probe = SegmentationProbe.paper()
    assert (probe.iterations, probe.batch, probe.lr, probe.weight_decay) == (320_000, 2, 1e-3, 1e-4)
    assert probe.warmup * probe.iterations == pytest.approx(1_500) and probe.clip is None
    assert (probe.head_norm, probe.loss_over, probe.window, probe.stride) == ("none", "all", 512, 341)
    assert probe.features.norm and not probe.features.class_token and probe.features.positions == "timm"
    assert probe.eval_every == 40_000 and (probe.augmentation("ade20k").crop, probe.short_side) == (512, 512)


def test_fixed_mends_and_smoke_is_short():
    for name, probe in PROBES.items():
        fixed, smoke = probe.fixed(), probe.smoke()
        assert fixed.features.pad_crop == smoke.features.pad_crop == "exact" and fixed.shuffle and fixed.augment
        assert smoke.iterations <= 500 and smoke.cache == "memory" and not smoke.augment, name
        for settings in (probe.paper(), fixed, smoke, probe.fixed("disk")):
            settings.check()
    assert SegmentationProbe.fixed().head_norm == "both" and NormalsProbe.fixed().test_masks == ("normal", "depth")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dataclasses.replace(DepthProbe.fixed(), cache="memory"), "contradicts --augment"),
        (dataclasses.replace(DepthProbe.smoke(), crop=(42, 56)), "--crop and --brightness belong to --augment"),
        (dataclasses.replace(SegmentationProbe.smoke(), window=512), "contradicts --window"),
        (dataclasses.replace(SegmentationProbe.smoke(), crop=64), "--crop belongs to --augment"),
        (dataclasses.replace(DepthProbe.fixed(), batch=0), "--batch 0"),
        (dataclasses.replace(DepthProbe.fixed(), more_lrs=(0.0,)), "--lr 0"),
        (dataclasses.replace(DepthProbe.fixed(), warmup=1.5), "--warmup 1.5"),
        (dataclasses.replace(DepthProbe.fixed(), iterations=0), "--iterations 0"),
        (dataclasses.replace(NormalsProbe.fixed(), test_masks=()), "--test-masks"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        settings.check()


def test_a_batch_that_is_larger_than_the_dataset_is_refused_unless_it_may_be_partial():
    with pytest.raises(InputError, match="--batch 8 is more than the 5 training images"):
        dataclasses.replace(DepthProbe.smoke()).steps_per_epoch(5)
    assert NormalsProbe.fixed().steps_per_epoch(5) == 1


def test_the_last_step_is_always_tested():
    settings = dataclasses.replace(DepthProbe.smoke(), iterations=10)
    tested = {every: dataclasses.replace(settings, eval_every=every).test_steps(24) for every in (None, 0, 4, 10)}
    # 24 images are 3 batches of 8
    assert tested == {None: {3, 6, 9, 10}, 0: {10}, 4: {4, 8, 10}, 10: {10}}
