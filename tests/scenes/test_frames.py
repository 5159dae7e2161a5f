from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import read_mask
from snd_nerfstudio.scenes.frame_cache import FrameCache
from snd_nerfstudio.scenes.frames import Frames, check_frames, depth_bounds, load_views


@pytest.fixture
def frames(tmp_path: Path) -> Frames:
    """Two frames of 20x30 with masks and depth."""
    generator = np.random.default_rng(0)
    images, masks, depths = [], [], []
    for number in range(2):
        images.append(tmp_path / f"{number}.png")
        masks.append(tmp_path / f"mask_{number}.png")
        depths.append(tmp_path / f"depth_{number}.png")
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(images[-1])
        mask = np.zeros((20, 30), np.uint16)
        mask[:, 15:] = 700
        mask[10:, :15] = 40
        Image.fromarray(mask).save(masks[-1])
        Image.fromarray(np.full((20, 30), 1500, np.uint16)).save(depths[-1])
    intrinsics = np.tile(np.array([[25.0, 0, 15], [0, 25.0, 10], [0, 0, 1]]), (2, 1, 1))
    return Frames(
        image_files=images,
        camera_to_worlds=np.tile(np.eye(4), (2, 1, 1)),
        intrinsics=intrinsics,
        sizes=np.array([[20, 30], [20, 30]]),
        scene_index=np.zeros(2, int),
        frame_order=np.arange(2),
        scene_names=("s",),
        mask_files=masks,
        depth_files=depths,
    )


def load(frames, size=(20, 30), **wanted):
    return load_views(frames, [0, 1], size, **{"with_masks": True, "with_depth": True, **wanted})


def test_images_masks_depth_and_intrinsics_come_together(frames):
    views = load(frames)
    stored = np.asarray(Image.open(frames.image_files[0]))
    torch.testing.assert_close(views.images[0], torch.from_numpy(stored.copy()).permute(2, 0, 1) / 255)
    # ids are renumbered by size: 0 stays unlabelled, 40 becomes 1, 700 becomes 2
    assert views.masks[0, 0].tolist() == [0] * 15 + [2] * 15 and views.masks[0, 19].tolist() == [1] * 15 + [2] * 15
    torch.testing.assert_close(views.depths, torch.full((2, 20, 30), 1.5))
    assert views.names == ("0.png", "1.png")


def test_resizing_keeps_what_a_camera_sees(frames):
    views = load(frames, (10, 30))
    assert views.images.shape == (2, 3, 10, 30) and views.masks.shape == views.depths.shape == (2, 10, 30)
    expected = torch.tensor([[25.0, 0, 15], [0, 12.5, 5], [0, 0, 1]])
    torch.testing.assert_close(views.intrinsics[0], expected)
    # a point that lay at pixel (7.5, 12) of 20x30 lies at (7.5, 6) of 10x30
    torch.testing.assert_close((expected @ torch.tensor([-0.3, 0.08, 1.0]))[:2], torch.tensor([7.5, 6.0]))


def test_masks_and_depth_are_read_only_when_wanted(frames):
    views = load(replace(frames, mask_files=None, depth_files=None), with_masks=False, with_depth=False)
    assert views.masks is None and views.depths is None


def test_depth_in_other_units_and_as_an_array(frames, tmp_path):
    np.save(tmp_path / "d.npy", np.array([[2.0, np.nan], [np.inf, -1.0]], np.float32).repeat(10, 0).repeat(15, 1))
    other = replace(frames, depth_files=[tmp_path / "d.npy"] * 2, depth_scale=np.array([1.0, 0.5]))
    depths = load(other).depths
    assert depths[0, 0, 0] == 2.0 and depths[1, 0, 0] == 1.0
    assert (depths[:, 10:] == 0).all() and (depths[:, :10, 15:] == 0).all()  # no value


def test_depth_may_be_of_nearly_its_images_shape_as_scannets_is(frames, tmp_path):
    def depth_of(depth_size, image_size):
        """Whether a depth map of such a height and width goes with an image."""
        Image.fromarray(np.zeros(image_size, np.uint8)).convert("RGB").save(tmp_path / "i.png")
        Image.fromarray(np.full(depth_size, 1500, np.uint16)).save(tmp_path / "d.png")
        files = {"image_files": [tmp_path / "i.png"] * 2, "depth_files": [tmp_path / "d.png"] * 2}
        other = replace(frames, **files, sizes=np.array([image_size] * 2))
        return load_views(other, [0], (20, 30), with_masks=False, with_depth=True).depths

    assert np.allclose(depth_of((480, 640), (968, 1296)), 1.5)  # 1.3333 and 1.3388: 0.4 %
    assert np.allclose(depth_of((10, 15), (20, 31)), 1.5)  # a pixel more or less, of rounding
    with pytest.raises(InputError, match="640x480 pixels, another shape than its image .1296x956.: depth must be reg"):
        depth_of((480, 640), (956, 1296))  # 1.7 %


def test_lens_distortion_is_removed(tmp_path):
    # a straight vertical line bends under barrel distortion and must be straight again afterwards
    import cv2

    height, width, focal = 120, 160, 100.0
    k1 = -0.3
    matrix = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    points = np.stack([x, y], -1).reshape(-1, 1, 2)
    ideal = cv2.undistortPoints(points, matrix, np.array([k1, 0, 0, 0, 0.0])).reshape(height, width, 2)
    image = np.where(np.abs(ideal[..., 0] - 0.4) < 0.02, 255, 0).astype(np.uint8)  # the line X / Z = 0.4
    Image.fromarray(image).convert("RGB").save(tmp_path / "i.png")
    frames = Frames(
        image_files=[tmp_path / "i.png"],
        camera_to_worlds=np.eye(4)[None],
        intrinsics=matrix[None],
        sizes=np.array([[height, width]]),
        scene_index=np.zeros(1, int),
        frame_order=np.zeros(1, int),
        scene_names=("s",),
        distortion=np.array([[k1, 0, 0, 0, 0, 0]]),
    )
    views = load_views(frames, [0], (height, width), with_masks=False, with_depth=False)
    line = views.images[0, 0]
    columns = (line * (torch.arange(width) + 0.5)).sum(1) / line.sum(1)
    expected = 0.4 * views.intrinsics[0, 0, 0] + views.intrinsics[0, 0, 2]
    assert (columns - expected).abs().max() < 0.6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.image_files[1].unlink(), r"1\.png"),
        (lambda f: f.image_files[0].write_bytes(b"not an image"), r"0\.png cannot be decoded"),
        (lambda f: f.image_files[0].write_bytes(f.image_files[0].read_bytes()[:200]), r"0\.png cannot be decoded"),
        (lambda f: Image.new("I;16", (5, 5)).save(f.mask_files[0]), r"mask_0\.png has 5x5 pixels.*30x20"),
        (lambda f: Image.new("RGB", (30, 20)).save(f.mask_files[0]), r"mask_0\.png has mode RGB"),
        (lambda f: f.mask_files[0].unlink(), r"mask_0\.png"),
        (lambda f: f.depth_files[0].unlink(), r"depth_0\.png"),
        (lambda f: Image.new("I;16", (30, 30)).save(f.depth_files[0]), r"depth_0\.png has 30x30"),
        (lambda f: Image.new("RGB", (31, 20)).save(f.image_files[0]), r"0\.png has 31x20 pixels but.*30x20"),
    ],
)
def test_a_damaged_file_is_named(frames, damage, message):
    damage(frames)
    with pytest.raises(InputError, match=message):
        check_frames(frames, needs_masks=True, needs_depth=True)
        load(frames)


def test_sizes_are_compared_for_every_frame_before_training(frames):
    Image.new("I;16", (5, 5)).save(frames.mask_files[1])  # not the first frame of its scene, which alone is decoded
    with pytest.raises(InputError, match=r"mask_1\.png has 5x5 pixels"):
        check_frames(frames, needs_masks=True, needs_depth=False)
    Image.new("RGB", (30, 19)).save(frames.image_files[1])
    with pytest.raises(InputError, match=r"1\.png has 30x19 pixels"):
        check_frames(frames, needs_masks=False, needs_depth=False)


def test_an_empty_array_is_named(frames, tmp_path):
    (tmp_path / "d.npy").write_bytes(b"")
    with pytest.raises(InputError, match=r"d\.npy cannot be decoded"):
        load(replace(frames, depth_files=[tmp_path / "d.npy"] * 2))


def test_absent_masks_and_depth_are_refused_before_training_with_the_remedy(frames):
    with pytest.raises(InputError, match="--pipeline.datamanager.masks none"):
        check_frames(replace(frames, mask_files=None), needs_masks=True, needs_depth=False)
    with pytest.raises(InputError, match="`depth` reconstructor needs"):
        check_frames(replace(frames, depth_files=None), needs_masks=False, needs_depth=True)


def test_a_dataset_has_depth_only_if_every_frame_has_a_file(frames):
    assert frames.has_depth
    assert not replace(frames, depth_files=None).has_depth
    assert not replace(frames, depth_files=[frames.depth_files[0], None]).has_depth
    frames.depth_files[1].unlink()
    assert not replace(frames).has_depth


def with_depths(frames, maps, scale=1e-3):
    for file, depth in zip(frames.depth_files, maps):
        Image.fromarray(depth.astype(np.uint16)).save(file)
    return replace(frames, depth_scale=np.full(2, scale))


def test_bounds_hold_nearly_all_depths_and_a_tenth_more(frames):
    generator = np.random.default_rng(1)
    maps = [generator.integers(500, 9000, (20, 30)), generator.integers(500, 9000, (20, 30))]
    maps[0][:, :4] = 0  # not measured
    maps[1][0, :2] = 60_000  # wrong: a few pixels must not stretch the range
    near, far = depth_bounds(with_depths(frames, maps))
    # every seventh of the measured pixels of each map
    looked_at = np.concatenate([depth[depth > 0][::7] for depth in maps]) / 1000
    assert near == pytest.approx(np.quantile(looked_at, 0.005) / 1.1, rel=1e-5)
    assert far == pytest.approx(np.quantile(looked_at, 0.995) * 1.1, rel=1e-5)
    assert 0.4 < near < 0.6 and 9 < far < 70


def test_bounds_are_in_world_units_and_of_frames_spread_over_the_dataset(frames):
    maps = [np.full((20, 30), 1000), np.full((20, 30), 4000)]
    near, far = depth_bounds(with_depths(frames, maps, scale=0.01))
    assert (near, far) == pytest.approx((10 / 1.1, 44.0))
    near, far = depth_bounds(with_depths(frames, maps, scale=0.01), looked_at=1)  # the first frame
    assert (near, far) == pytest.approx((10 / 1.1, 11.0))


def test_bounds_without_depth_name_the_flags(frames):
    for without in (replace(frames, depth_files=None), replace(frames, depth_files=[frames.depth_files[0], None])):
        with pytest.raises(InputError, match="bounds scene.*not every frame.*datamanager.near.*datamanager.far"):
            depth_bounds(without)
    with pytest.raises(InputError, match="no valid pixel.*--pipeline.datamanager.near"):
        depth_bounds(with_depths(frames, [np.zeros((20, 30))] * 2))


@pytest.mark.parametrize(
    ("pose", "message"),
    [
        (np.full((4, 4), np.nan), "not finite"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "not rigid"),
        (np.diag([1.0, 1.0, -1.0, 1.0]), "not rigid"),
        (np.diag([2.0, 2.0, 2.0, 1.0]), "not rigid"),
    ],
)
def test_an_impossible_pose_names_its_frame(frames, pose, message):
    poses = frames.camera_to_worlds.copy()
    poses[1] = pose
    with pytest.raises(InputError, match=rf"{message}.*1\.png"):
        check_frames(replace(frames, camera_to_worlds=poses), needs_masks=False, needs_depth=False)


def test_masks_of_eight_and_sixteen_bits_are_read(tmp_path):
    for dtype in (np.uint8, np.uint16):
        Image.fromarray(np.array([[0, 200]], dtype)).save(tmp_path / "m.png")
        assert read_mask(tmp_path / "m.png").tolist() == [[0, 200]]


def test_a_frame_from_the_cache_is_the_frame_that_was_decoded(frames, tmp_path):
    cache = FrameCache(tmp_path / "cache", 1e9, print)
    plain = load(frames)
    for _ in range(2):
        views = load(frames, frame_cache=cache)
        assert torch.equal(views.images, plain.images) and torch.equal(views.intrinsics, plain.intrinsics)
    assert cache.statistics.written == cache.statistics.found == 2
    # another calibration is another key, so that its size is compared with the file's
    with pytest.raises(InputError, match="was calibrated for"):
        load(replace(frames, sizes=frames.sizes * 2), frame_cache=cache)


def test_intrinsics_that_are_shares_of_the_image_are_refused(frames):
    intrinsics = frames.intrinsics.copy()
    intrinsics[1] /= np.array([[30], [20], [1]])
    with pytest.raises(
        InputError, match=r"focal length of .*1\.png is 0.83.*has 30 columns: intrinsics must be in pix"
    ):
        check_frames(replace(frames, intrinsics=intrinsics), needs_masks=False, needs_depth=False)
