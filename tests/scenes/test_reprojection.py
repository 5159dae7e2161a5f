from dataclasses import replace

import numpy as np
import pytest

from snd_nerfstudio.scenes.mistakes import judge, tolerance
from snd_nerfstudio.scenes.reprojection import (
    Cameras,
    Matches,
    depth_ratios,
    epipolar_errors,
    match_frames,
    rays_of,
    reprojection_errors,
    triangulate,
)

WIDTH, HEIGHT, FOCAL = 640, 480, 500.0


def cameras(poses, distortion=None) -> Cameras:
    matrix = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    return Cameras(np.asarray(poses, dtype=float), np.tile(matrix, (len(poses), 1, 1)), distortion)


def moved(x=0.0, y=0.0, z=0.0, turn=0.0):
    angle = np.radians(turn)
    pose = np.eye(4)
    pose[:3, 3] = x, y, z
    pose[0, 0], pose[0, 2], pose[2, 0], pose[2, 2] = np.cos(angle), np.sin(angle), -np.sin(angle), np.cos(angle)
    return pose


def exact(believed: Cameras, count=200, seed=0, depth=True) -> Matches:
    """Points seen by the first two cameras, projected without any of the package's code."""
    generator = np.random.default_rng(seed)
    world = np.stack([*generator.uniform(-1.5, 1.5, (2, count)), generator.uniform(2.5, 6.0, count), np.ones(count)])
    points, depths = [], []
    for pose, matrix in zip(believed.camera_to_worlds[:2], believed.intrinsics[:2]):
        local = (np.linalg.inv(pose) @ world)[:3]
        points.append((matrix @ local / local[2])[:2].T)
        depths.append(local[2])
    first = np.zeros(count, dtype=np.int64)
    measured = np.stack(depths) if depth else np.zeros((2, count))
    return Matches(first, first + 1, np.stack(points), measured, ((0, 1),), float(np.hypot(WIDTH, HEIGHT)))


@pytest.fixture
def pair() -> Cameras:
    return cameras([moved(), moved(0.5, 0.1, 0.2, turn=-5.0)])


def test_exact_points_are_where_they_should_be(pair):
    matches = exact(pair)
    depths, angles = triangulate(pair, matches)
    np.testing.assert_allclose(depths, matches.depths, rtol=1e-9)
    assert (angles > 1).all()
    assert epipolar_errors(pair, matches).max() < 1e-6
    assert reprojection_errors(pair, matches).max() < 1e-6 and len(reprojection_errors(pair, matches)) == 400
    np.testing.assert_allclose(depth_ratios(pair, matches), 1)


def test_errors_are_in_pixels():
    # sideways motion: epipolar lines are horizontal in both images, so 3 pixels down are 3 / sqrt(2) after Sampson
    sideways = cameras([moved(), moved(0.5)])
    matches = exact(sideways)
    matches.points[1, :, 1] += 3.0
    np.testing.assert_allclose(epipolar_errors(sideways, matches), 3 / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(reprojection_errors(sideways, matches)[:200], 3, rtol=1e-6)
    # half a metre at depth z moves a point by 500 * 0.5 / z pixels; with half the depth by twice as much
    np.testing.assert_allclose(
        reprojection_errors(sideways, exact(sideways), factor=0.5)[:200], 250 / exact(sideways).depths[0], rtol=1e-6
    )
    # and with doubled depth maps the triangulated depth is half of the measured one
    doubled = replace(exact(sideways), depths=2 * exact(sideways).depths)
    np.testing.assert_allclose(depth_ratios(sideways, doubled), 0.5)


def test_points_behind_a_camera_count_as_far_off(pair):
    matches = exact(pair)
    flipped = replace(pair, camera_to_worlds=pair.camera_to_worlds @ np.diag([1.0, -1.0, -1.0, 1.0]))
    assert np.median(epipolar_errors(flipped, matches)) > 0.5 * matches.motion
    turned = cameras([moved(), moved(0.5, turn=180.0)])
    assert (reprojection_errors(turned, matches) == matches.diagonal).mean() > 0.9


def test_cameras_at_one_place_are_compared_by_their_rotation():
    standing = cameras([moved(), moved(turn=4.0)])
    matches = exact(standing)
    assert epipolar_errors(standing, matches).max() < 1e-6
    wrong = cameras([moved(), moved(turn=5.0)])
    # a degree is 500 * tan(1 degree) = 8.7 pixels in the middle, more towards the border
    assert 8.7 < np.median(epipolar_errors(wrong, matches)) < 11


def test_lens_distortion_is_removed_from_rays():
    bent = cameras([moved()], np.array([[0.1, 0.0, 0.0, 0.0, 0.0, 0.0]]))
    # r = 0.3 lies at 0.3 (1 + 0.1 * 0.09) = 0.3027 in the image
    rays = rays_of(bent, np.zeros(1, dtype=np.int64), np.array([[WIDTH / 2 + FOCAL * 0.3027, HEIGHT / 2]]))
    np.testing.assert_allclose(rays[0], [0.3, 0.0, 1.0], atol=1e-5)


def test_the_verdict_needs_matches_and_motion_and_allows_for_noise(pair):
    assert judge(pair, exact(pair, count=20)).status == "undecided"
    standing = cameras([moved(), moved(0.01)])
    verdict = judge(standing, exact(standing))
    assert verdict.status == "undecided" and "hardly moves" in verdict.sentence
    noisy = exact(pair)
    noisy.points[1] += np.random.default_rng(0).normal(0, 1.0, noisy.points[1].shape)
    verdict = judge(pair, noisy)
    assert verdict.status == "consistent" and not verdict.wrong and verdict.error < tolerance(noisy.diagonal) == 2.5
    noisy.points[1] += np.random.default_rng(1).normal(0, 3.0, noisy.points[1].shape)
    assert judge(pair, noisy).status == "imprecise"


@pytest.mark.parametrize("factor", [0.001, 0.0254, 0.3048, 1.7, 39.37])
def test_a_unit_is_recognised_whatever_the_factor(pair, factor):
    matches = exact(pair)
    verdict = judge(pair, replace(matches, depths=matches.depths / factor))
    assert verdict.status == "likely" and verdict.key in ("depth_unit", "pose_unit")
    assert verdict.depth_factor == pytest.approx(factor, rel=1e-6) and verdict.error_without < 1e-3


def test_nothing_matches_in_a_scene_of_one_frame(rooms):
    from data_parsers.scannetpp import ScanNetppScenesConfig
    from snd_nerfstudio.snd_frames import to_frames

    frames = to_frames(ScanNetppScenesConfig(data=rooms).setup().get_dataparser_outputs(split="train"))
    matches = match_frames(frames, np.array([3]))
    assert len(matches) == 0 and matches.motion == 0 and not matches.has_depth and matches.pairs == ()
