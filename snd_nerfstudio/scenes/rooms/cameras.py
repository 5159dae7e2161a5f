"""The camera's way through a room, and the two conventions its poses are written in."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

HORIZONTAL_FIELD_OF_VIEW = 70.0
"""Degrees."""
STEP = 0.06
"""Distance between consecutive camera centres where the camera turns slowly, metres."""
TURN = 2.0
"""Largest rotation between consecutive frames, degrees; where the path asks for more, the steps get shorter."""


@dataclass(frozen=True)
class CameraLoop:
    """One closed round of the camera, finely sampled."""

    positions: Float[np.ndarray, "n 3"]
    """Camera centres, metres."""
    focus: Float[np.ndarray, "n 3"]
    """What the camera looks at from each, metres."""
    heading: float
    """Direction, in the floor plane from the x axis, that the camera looks in on average, radians."""
    front: tuple[float, float]
    """Point on the floor amid what the camera sees, where the middle furniture goes, metres."""


def camera_loop(size: tuple[float, float, float], rng: np.random.Generator, samples: int = 2000) -> CameraLoop:
    """A flat ellipse in the rear half of the room from which the camera looks at the front half.

    The camera moves mostly sideways to where it looks, which gives the baselines that view triplets want, and the focus
    sways slower than the camera, so that neighbouring frames overlap.

    Args:
        size: extent of the room along x, y, z, metres.
        rng: source of randomness.
        samples: how finely the round is sampled.
    """
    quarter = int(rng.integers(4))
    heading = 0.5 * np.pi * quarter
    forward = np.round([np.cos(heading), np.sin(heading)])
    left = np.array([-forward[1], forward[0]])
    centre = 0.5 * np.array(size[:2])
    along, across = float(abs(forward @ centre)), float(abs(left @ centre))
    side = min(across - 0.85, rng.uniform(1.1, 1.5))
    deep = rng.uniform(0.4, 0.5)
    rear = min(along - deep - 0.9, rng.uniform(0.3, 0.6))
    way = rng.choice([-1.0, 1.0])
    turn = way * 2.0 * np.pi * np.arange(samples) / samples + rng.uniform(0.0, 2.0 * np.pi)
    lateral, depth = side * np.sin(turn), deep * np.cos(turn) - rear
    eye = rng.uniform(1.48, 1.62) + 0.05 * np.sin(2.0 * turn + rng.uniform(0.0, 6.0))
    sway = rng.uniform(0.3, 0.6) * across * np.sin(turn + rng.uniform(2.2, 4.0))
    reach = along * rng.uniform(0.55, 0.8)
    level = rng.uniform(0.75, 0.95) + 0.15 * np.sin(turn + rng.uniform(0.0, 6.0))
    ground = centre + lateral[:, None] * left + depth[:, None] * forward
    target = centre + sway[:, None] * left + reach * forward
    front = centre + rng.uniform(0.3, 0.5) * along * forward + rng.uniform(-0.3, 0.3) * left
    return CameraLoop(
        positions=np.column_stack([ground, eye]),
        focus=np.column_stack([target, level]),
        heading=heading,
        front=(float(front[0]), float(front[1])),
    )


def look_at(position: Float[np.ndarray, "n 3"], focus: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 4 4"]:
    """OpenCV camera-to-world poses (x right, y down, z forward) without roll in a z-up world.

    Args:
        position: camera centres.
        focus: points on the optical axes; none straight above or below its camera.
    """
    forward = focus - position
    forward = forward / np.linalg.norm(forward, axis=-1, keepdims=True)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right = right / np.linalg.norm(right, axis=-1, keepdims=True)
    down = np.cross(forward, right)
    poses = np.tile(np.eye(4), (len(position), 1, 1))
    poses[:, :3, :] = np.stack([right, down, forward, position], -1)
    return poses


def camera_poses(loop: CameraLoop, frames: int) -> Float[np.ndarray, "n 4 4"]:
    """`frames` poses along the loop, at most `STEP` metres and `TURN` degrees apart; the loop repeats if they go round.

    Returns:
        OpenCV camera-to-world poses.
    """
    poses = look_at(loop.positions, loop.focus)
    after = np.roll(poses, -1, axis=0)
    moved = np.linalg.norm(after[:, :3, 3] - poses[:, :3, 3], axis=-1)
    trace = np.einsum("nij,nij->n", after[:, :3, :3], poses[:, :3, :3])
    turned = np.degrees(np.arccos(np.clip(0.5 * (trace - 1.0), -1.0, 1.0)))
    # Cost in frames of each small step; the square root of squares keeps the speed smooth where the limits swap.
    cost = np.hypot(moved / STEP, turned / TURN)
    travelled = np.concatenate([[0.0], np.cumsum(cost)])
    wanted = np.arange(frames) % travelled[-1]
    parameter = np.interp(wanted, travelled, np.arange(len(travelled)))
    closed = np.arange(len(travelled))
    position = np.stack([np.interp(parameter, closed, np.append(axis, axis[0])) for axis in loop.positions.T], -1)
    focus = np.stack([np.interp(parameter, closed, np.append(axis, axis[0])) for axis in loop.focus.T], -1)
    return look_at(position, focus)


def pinhole(height: int, width: int) -> Float[np.ndarray, "3 3"]:
    """Intrinsics in pixels: 70 degrees across, square pixels, the principal point in the middle of the image."""
    focal = 0.5 * width / np.tan(np.radians(0.5 * HORIZONTAL_FIELD_OF_VIEW))
    return np.array([[focal, 0.0, 0.5 * width], [0.0, focal, 0.5 * height], [0.0, 0.0, 1.0]])


def stored_from_opencv(camera_to_world: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """The `transform_matrix` that ScanNet++ stores for an OpenCV camera-to-world pose in the mesh world.

    It undoes `opencv_from_stored` step by step: negate columns 1 and 2, swap rows 0 and 1, negate row 2.
    """
    stored = camera_to_world.copy()
    stored[:3, 1:3] *= -1.0
    stored = stored[[1, 0, 2, 3]]
    stored[2] *= -1.0
    return stored


def opencv_from_stored(stored: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
    """OpenCV camera-to-world pose in the mesh world: negate row 2, swap rows 0 and 1, negate columns 1 and 2."""
    pose = stored.copy()
    pose[2] *= -1.0
    pose = pose[[1, 0, 2, 3]]
    pose[:3, 1:3] *= -1.0
    return pose
