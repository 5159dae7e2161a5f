import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import resolve
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig
from snd_nerfstudio.splatting import rasterize
from snd_nerfstudio.supervision.operator_cache import content_digest


def manager(data: Path, **settings):
    settings = {"image_size": (56, 84), "eval_triplets": 4, "reconstructor": "depth", **settings}
    config = SnDDataManagerConfig(data=data, **settings)
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


def with_mvsplat(data: Path, checkpoint: Path, **settings):
    return manager(data, reconstructor="mvsplat", reconstructor_checkpoint=checkpoint, **settings)


def test_mvsplat_reconstructs_without_depth_and_without_gradient(rooms, mvsplat_file, logged):
    data = with_mvsplat(rooms, mvsplat_file)
    (triplet,) = data.next_train(0)
    assert triplet.context.depths is None and not data.needs_depth
    gaussians = data.reconstruct(triplet.context)
    assert len(gaussians) == 2 * 56 * 84 and gaussians.harmonics is not None
    tensors = (gaussians.means, gaussians.scales, gaussians.opacities, gaussians.harmonics)
    assert all(torch.isfinite(t).all() and not t.requires_grad for t in tensors)
    depths = torch.einsum(
        "vni,vi->vn",
        gaussians.means.view(2, -1, 3) - triplet.context.camera_to_worlds[:, None, :3, 3],
        triplet.context.camera_to_worlds[:, :3, 2],
    )
    assert 0.7 - 1e-3 < depths.min() and depths.max() < 8.0 + 1e-3  # near and far of the checkpoint
    printed = logged()
    assert "depths from 0.7 to 8, exact geometry" in printed


def test_its_weights_are_frozen_and_no_part_of_our_checkpoints(rooms, mvsplat_file):
    data = with_mvsplat(rooms, mvsplat_file)
    network = data.reconstructor.network
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert not any("network" in name for name in data.state_dict()) and list(data.parameters()) == []
    assert data.reconstructor is data.reconstructor  # loaded once


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, (0.7, 8.0)),
        ({"near": 0.5}, (0.5, 8.0)),
        ({"far": 20.0}, (0.7, 20.0)),
        ({"near": 0.5, "far": 20.0}, (0.5, 20.0)),
        ({"near": 0.5, "far": 20.0, "bounds": "scene"}, (0.5, 20.0)),
    ],
)
def test_near_and_far_are_those_of_the_flags_or_of_the_checkpoint(rooms, mvsplat_file, flags, expected):
    reconstructor = with_mvsplat(rooms, mvsplat_file, **flags).reconstructor
    assert (reconstructor.near, reconstructor.far) == expected


def test_near_and_far_may_be_read_off_the_depth_maps(rooms, mvsplat_file):
    from snd_nerfstudio.scenes.frames import depth_bounds

    data = with_mvsplat(rooms, mvsplat_file, bounds="scene", far=30.0)
    near, _ = depth_bounds(data.train_frames)
    assert (data.reconstructor.near, data.reconstructor.far) == (near, 30.0) and near != 0.7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"near": 3.0, "far": 3.0}, "near 3.0 and --pipeline.datamanager.far 3.0: 0 < near < far"),
        ({"near": 0.0}, "near 0.0 and --pipeline.datamanager.far None: 0 < near < far"),
        ({"near": 9.0}, "near 9 and --pipeline.datamanager.far 8: 0 < near < far"),
    ],
)
def test_near_and_far_out_of_order_are_refused(rooms, mvsplat_file, flags, message):
    with pytest.raises(InputError, match=message):
        with_mvsplat(rooms, mvsplat_file, **flags).reconstructor


def test_without_a_checkpoint_the_message_says_where_there_is_one_and_what_else_there_is(rooms):
    with pytest.raises(InputError) as caught:
        manager(rooms, reconstructor="mvsplat")
    for part in (
        "--pipeline.datamanager.reconstructor-checkpoint",
        "re10k.ckpt",
        "https://github.com/donydchen/mvsplat",
        "ns-train mvsplat",
        "--pipeline.datamanager.reconstructor depth",
    ):
        assert part in str(caught.value)
    assert SnDDataManagerConfig().reconstructor == "mvsplat"


def test_a_checkpoint_that_is_of_no_use_is_an_error(rooms, mvsplat_file, tmp_path):
    with pytest.raises(InputError, match="reconstructor-checkpoint is for MVSplat, and the reconstructor is depth"):
        manager(rooms, reconstructor_checkpoint=mvsplat_file)
    with pytest.raises(InputError, match=r"no step-\*\.ckpt"):
        with_mvsplat(rooms, tmp_path)
    with pytest.raises(InputError, match="nowhere.ckpt does not exist"):
        with_mvsplat(rooms, tmp_path / "nowhere.ckpt").reconstructor


def test_only_what_matches_the_contexts_leaves_out_those_that_look_apart(rooms, mvsplat_file):
    # 8 to 12 frames of a room's path turn by up to some ten degrees
    by_depth, by_matching = manager(rooms), with_mvsplat(rooms, mvsplat_file)
    assert by_depth.max_context_angle is None and by_matching.max_context_angle == 90.0
    assert with_mvsplat(rooms, mvsplat_file, max_context_angle=120.0).max_context_angle == 120.0
    assert manager(rooms, max_context_angle=20.0).max_context_angle == 20.0


def test_near_and_far_are_refused_where_nothing_uses_them(rooms):
    for flags in ({"near": 0.5}, {"far": 9.0}, {"bounds": "scene"}):
        with pytest.raises(InputError, match="near, far and bounds are for MVSplat"):
            manager(rooms, **flags)


def test_a_wider_angle_than_mvsplat_takes_is_refused(rooms, mvsplat_file):
    with pytest.raises(InputError, match="max-context-angle 150.*up to 120, beyond which MVSplat takes no pair"):
        with_mvsplat(rooms, mvsplat_file, max_context_angle=150.0)
    assert manager(rooms, max_context_angle=150.0).max_context_angle == 150.0


# ---------------------------------------------------------------------- what operators are cached under


def test_without_a_cache_nothing_is_hashed_and_nothing_is_opened(rooms, tmp_path):
    data = manager(rooms)
    assert data.operators is None and data.next_train(0)[0].digest == "" == data.eval_triplet(0).digest
    data = manager(rooms, operator_cache=tmp_path / "operators", operator_cache_limit=0.25)
    assert data.operators.folder == tmp_path / "operators" and data.operators.limit == 0.25e9
    assert data.operators is data.operators  # opened once


@pytest.mark.parametrize("limit", [0.0, -1.0])
def test_a_cache_that_may_hold_nothing_is_refused(rooms, tmp_path, limit):
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache-limit must be above 0"):
        manager(rooms, operator_cache=tmp_path, operator_cache_limit=limit)


def test_a_cache_in_the_place_of_a_file_is_refused(rooms, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--pipeline.datamanager.operator-cache .*file cannot be written to"):
        manager(rooms, operator_cache=tmp_path / "file").operators


def test_a_triplet_s_digest_is_that_of_what_the_reconstructor_reads(rooms, mvsplat_file, tmp_path):
    by_depth, by_matching = (
        make(operator_cache=tmp_path)
        for make in (
            lambda **cache: manager(rooms, **cache),
            lambda **cache: with_mvsplat(rooms, mvsplat_file, **cache),
        )
    )
    for data in (by_depth, by_matching):
        plain, reported = data.eval_triplet(1), data.eval_triplet(1, with_depth=True)
        assert reported.target.depths is not None and plain.target.depths is None
        assert len(plain.digest) == 64 and plain.digest == reported.digest == content_digest(plain)
        assert len({data.eval_triplet(n).digest for n in range(4)} | {data.next_train(0)[0].digest}) == 5
        assert data.next_train(0)[0].digest == data.load(data.train_frames, data.step_indices(0)[0]).digest
        assert plain.to("cpu").digest == plain.digest
    triplet = by_depth.eval_triplet(1)
    nearer = replace(triplet, context=replace(triplet.context, depths=triplet.context.depths * 0.9))
    assert content_digest(nearer) != triplet.digest != by_matching.eval_triplet(1).digest


def test_the_reconstructor_s_description_tells_its_kind_weights_and_depths(rooms, mvsplat_file):
    by_depth = manager(rooms).reconstructor_description
    assert by_depth == manager(rooms).reconstructor_description and "0.3" in by_depth and "0.95" in by_depth
    data = with_mvsplat(rooms, mvsplat_file)
    descriptions = {by_depth, data.reconstructor_description}
    assert data.reconstructor_description == with_mvsplat(rooms, mvsplat_file).reconstructor_description
    for flags in ({"near": 0.5}, {"far": 9.0}):
        descriptions.add(with_mvsplat(rooms, mvsplat_file, **flags).reconstructor_description)
    other = with_mvsplat(rooms, mvsplat_file)
    with torch.no_grad():
        next(other.reconstructor.network.parameters()).mul_(1.001)
    descriptions.add(other.reconstructor_description)
    assert len(descriptions) == 5
    assert manager(rooms).reconstructor_fingerprint.shape == (32,)
