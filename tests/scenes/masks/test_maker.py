"""Masks that are made where a dataset has none: made once, at the size of training, and found again by content."""

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.decoding import read_mask
from snd_nerfstudio.scenes.frames import Frames, load_views
from snd_nerfstudio.scenes.masks.maker import MaskMaker, build_mask_maker, mask_folder
from snd_nerfstudio.scenes.masks.sam import SamSettings
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSegmenter, SuperpixelSettings

SETTINGS = SuperpixelSettings(regions=20)
SIZE = (28, 42)


@pytest.fixture
def frames(tmp_path: Path) -> Frames:
    """Two frames of 56x84 without masks; a bright box stands before a wall, at half of its distance."""
    images, depths = [], []
    for number in range(2):
        image = np.full((56, 84, 3), 80, np.uint8)
        depth = np.full((56, 84), 3000, np.uint16)
        box = (slice(12, 38), slice(20 + 20 * number, 46 + 20 * number))
        image[box], depth[box] = (200, 180, 60), 1500
        images.append(tmp_path / f"{number}.png")
        depths.append(tmp_path / f"depth_{number}.png")
        Image.fromarray(image).save(images[-1])
        Image.fromarray(depth).save(depths[-1])
    return Frames(
        image_files=images,
        camera_to_worlds=np.tile(np.eye(4), (2, 1, 1)),
        intrinsics=np.tile(np.array([[60.0, 0, 42], [0, 60.0, 28], [0, 0, 1]]), (2, 1, 1)),
        sizes=np.array([[56, 84], [56, 84]]),
        scene_index=np.zeros(2, int),
        frame_order=np.arange(2),
        scene_names=("s",),
        depth_files=depths,
    )


def maker_in(folder: Path, settings=SETTINGS, log=print) -> MaskMaker:
    return MaskMaker(SuperpixelSegmenter(settings), folder / "cache", log)


def masks_of(frames, maker, size=SIZE, indices=(0, 1)):
    return load_views(frames, list(indices), size, with_masks=False, with_depth=False, mask_maker=maker).masks


def on_the_wrong_side(mask, inside) -> float:
    """Share of the pixels that are cut off from their side of a border, if every region is counted to one side."""
    within = [inside[mask == region] for region in mask.unique()]
    return float(sum(torch.minimum(part.sum(), (~part).sum()) for part in within) / mask.numel())


def files_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted((folder / "cache").rglob("*.png"))}


def test_masks_have_the_size_of_training_and_lie_on_the_image(frames, tmp_path):
    maker = maker_in(tmp_path)
    masks = masks_of(frames, maker)
    assert masks.shape == (2, *SIZE) and masks.dtype == torch.int64
    box = torch.zeros(SIZE, dtype=torch.bool)
    box[6:19, 10:23] = True  # half of 12:38 and 20:46
    assert on_the_wrong_side(masks[0], box) < 0.05 and on_the_wrong_side(masks[0], box.roll(4, dims=1)) > 0.08
    assert maker.cache.statistics.written == 2


def test_a_second_run_makes_nothing(frames, tmp_path):
    first = masks_of(frames, maker_in(tmp_path))
    files = files_in(tmp_path)
    again = maker_in(tmp_path)
    assert torch.equal(masks_of(frames, again), first)
    assert vars(again.cache.statistics) == {"found": 2, "missing": 0, "damaged": 0, "written": 0}
    assert files_in(tmp_path) == files and len(files) == 2


def test_a_frame_is_known_by_its_content_not_by_its_name(frames, tmp_path):
    masks_of(frames, maker_in(tmp_path))
    moved = []
    for files, kind in ((frames.image_files, "image"), (frames.depth_files, "depth")):
        moved.append([Path(shutil.copy(file, tmp_path / f"moved_{kind}_{n}.png")) for n, file in enumerate(files)])
    again = maker_in(tmp_path)
    masks_of(replace(frames, image_files=moved[0], depth_files=moved[1]), again)
    assert again.cache.statistics.found == 2 and again.cache.statistics.written == 0


def test_whatever_a_mask_depends_on_makes_another_one(frames, tmp_path):
    def made(frames=frames, size=SIZE, settings=SETTINGS):
        maker = maker_in(tmp_path, settings)
        masks_of(frames, maker, size, [0])
        return maker.cache.statistics.written

    assert made() == 1 and made() == 0
    assert made(size=(56, 84)) == 1
    assert made(settings=replace(SETTINGS, regions=21)) == 1
    assert made(settings=replace(SETTINGS, depth_weight=0.0, normal_weight=0.0)) == 1  # depth is not looked at
    assert made(frames=replace(frames, depth_files=None)) == 1
    assert made(frames=replace(frames, depth_scale=np.array([2e-3, 2e-3]))) == 1
    other = frames.intrinsics.copy()
    other[:, 0, 0] = 70
    assert made(frames=replace(frames, intrinsics=other)) == 1  # normals depend on them
    assert made(frames=replace(frames, intrinsics=other, depth_files=None)) == 0  # colours do not
    bent = replace(frames, depth_files=None, distortion=np.array([[0.1, 0, 0, 0, 0, 0]] * 2))
    assert made(frames=bent) == 1
    shutil.copy(frames.image_files[1], frames.image_files[0])
    assert made() == 1
    shutil.copy(frames.depth_files[1], frames.depth_files[0])
    assert made() == 1


def test_a_frame_without_a_depth_map_does_without(frames, tmp_path):
    frames.depth_files[1].unlink()
    masks = masks_of(frames, maker_in(tmp_path))
    blind = masks_of(replace(frames, depth_files=None), maker_in(tmp_path))
    assert torch.equal(masks[1], blind[1])
    some = masks_of(replace(frames, depth_files=[frames.depth_files[0], None]), maker_in(tmp_path))
    assert torch.equal(some, masks)


def test_masks_of_distorted_frames_lie_on_the_undistorted_image(frames, tmp_path):
    bent = replace(frames, distortion=np.array([[-0.25, 0.05, 0, 0, 0, 0]] * 2))
    views = load_views(bent, [0], (56, 84), with_masks=False, with_depth=True, mask_maker=maker_in(tmp_path))
    near = views.depths[0] < 2.2
    assert not torch.equal(near, load_views(frames, [0], (56, 84), False, True).depths[0] < 2.2)
    assert on_the_wrong_side(views.masks[0], near) < 0.03


def test_a_damaged_mask_is_made_anew(frames, tmp_path):
    before = masks_of(frames, maker_in(tmp_path))
    damaged = list(files_in(tmp_path))[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    said = []
    again = maker_in(tmp_path, log=said.append)
    assert torch.equal(masks_of(frames, again), before)
    assert again.cache.statistics.damaged == again.cache.statistics.written == 1 and str(damaged) in said[0]
    assert masks_of(frames, maker_in(tmp_path)).shape == before.shape


def test_threads_that_ask_for_one_mask_make_it_once(frames, tmp_path):
    maker = maker_in(tmp_path)
    threads = [threading.Thread(target=masks_of, args=(frames, maker, SIZE, [0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maker.cache.statistics.written == 1 and maker.cache.statistics.found == 5


def test_where_masks_are_kept(tmp_path):
    assert mask_folder(None, tmp_path) == tmp_path / ".snd_masks"
    assert mask_folder(None, tmp_path / "transforms.json") == tmp_path / ".snd_masks"
    assert mask_folder(tmp_path / "elsewhere", tmp_path) == tmp_path / "elsewhere"


@pytest.mark.parametrize("kind", ["stored", "none"])
def test_nothing_is_made_or_opened_where_nothing_is_asked_for(tmp_path, kind):
    assert build_mask_maker(kind, SETTINGS, SamSettings(), tmp_path / "cache") is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["tiff", "npy", "png"])
def test_stored_masks_may_have_16_or_32_bits(frames, tmp_path, suffix):
    ids = np.zeros((56, 84), np.uint16 if suffix == "png" else np.uint32)
    ids[:10], ids[20:] = 40_000, 65_535 if suffix == "png" else 3_000_000_000
    file = tmp_path / f"mask.{suffix}"
    np.save(file, ids) if suffix == "npy" else Image.fromarray(ids.view(np.int32) if suffix == "tiff" else ids).save(
        file
    )
    assert len(np.unique(read_mask(file))) == 3 and (read_mask(file) == 0).sum() == 10 * 84
    stored = load_views(replace(frames, mask_files=[file, file]), [0], SIZE, with_masks=True, with_depth=False)
    assert stored.masks.unique().tolist() == [0, 1, 2] and (stored.masks == 0).sum() == 5 * 42


@pytest.mark.parametrize("values", [np.zeros((56, 84, 3), int), np.zeros((56, 84)), np.array([None])])
def test_arrays_that_are_no_masks_are_refused(tmp_path, values):
    np.save(tmp_path / "mask.npy", values)
    with pytest.raises(InputError, match="mask.npy"):
        read_mask(tmp_path / "mask.npy")


def test_the_settings_can_be_read_where_the_masks_are(frames, tmp_path):
    maker = maker_in(tmp_path)
    masks_of(frames, maker)
    written = json.loads((maker.cache.folder / "settings.json").read_text())
    assert (
        written["kind"] == "superpixel" and written["regions"] == 20 and maker.cache.folder.name[:11] == "superpixel-"
    )
