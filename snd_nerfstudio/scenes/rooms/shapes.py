"""Textured triangle meshes of the few solids that rooms are made of.

Coordinates are metres, z up. Triangles wind counter-clockwise seen from outside. Surface coordinates are stored per
triangle corner, so a cylinder can be unrolled without a seam running backwards.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from snd_nerfstudio.scenes.rooms.textures import Texture

Point = tuple[float | int, float | int, float | int]
"""x, y and z, metres."""


@dataclass(frozen=True)
class Part:
    """A mesh with one texture."""

    vertices: Float[np.ndarray, "v 3"]
    """Positions, metres."""
    faces: Int[np.ndarray, "f 3"]
    """Vertex indices."""
    corner_uv: Float[np.ndarray, "f 3 2"]
    """Surface coordinates of each triangle corner, metres."""
    texture: Texture
    """How the surface is coloured."""


def placed(part: Part, position: Point, yaw: float = 0.0) -> Part:
    """`part` turned by `yaw` radians about the z axis through the origin, then moved by `position` metres."""
    cos, sin = np.cos(yaw), np.sin(yaw)
    rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return replace(part, vertices=part.vertices @ rotation.T + np.asarray(position))


def quad(corners: Float[np.ndarray, "4 3"], size: tuple[float, float], texture: Texture) -> Part:
    """A rectangle; `corners` run counter-clockwise seen from the front, `size` is the length of its first two sides."""
    uv = np.array([[0.0, 0.0], [size[0], 0.0], [size[0], size[1]], [0.0, size[1]]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Part(np.asarray(corners, dtype=float), faces, uv[faces], texture)


def box(centre: Point, size: Point, texture: Texture) -> Part:
    """An axis-aligned box with 24 vertices, so each side keeps its own flat surface coordinates."""
    vertices, faces, corner_uv = [], [], []
    half = 0.5 * np.asarray(size, dtype=float)
    for axis in range(3):
        first, second = [(1, 2), (2, 0), (0, 1)][axis]
        for sign in (-1.0, 1.0):
            corner_signs = [(-1, -1), (1, -1), (1, 1), (-1, 1)] if sign > 0 else [(-1, -1), (-1, 1), (1, 1), (1, -1)]
            corners = np.empty((4, 3))
            corners[:, axis] = sign * half[axis]
            corners[:, [first, second]] = np.array(corner_signs) * half[[first, second]]
            # u runs along the horizontal, v up, so bricks and wood grain lie level on every upright side.
            across = [1, 0, 0][axis]
            up = [2, 2, 1][axis]
            sides = np.array([[0, 1, 2], [0, 2, 3]])
            faces.append(sides + 4 * len(vertices))
            corner_uv.append((corners[:, [across, up]] + np.array([0.37 * axis, 0.11 * axis]))[sides])
            vertices.append(corners + np.asarray(centre))
    return Part(np.concatenate(vertices), np.concatenate(faces), np.concatenate(corner_uv), texture)


def cone(
    base: Point,
    radii: tuple[float, float],
    height: float,
    texture: Texture,
    segments: int = 40,
) -> Part:
    """An upright cylinder or truncated cone with flat ends.

    Args:
        base: centre of the lower end, metres.
        radii: lower and upper radius, metres, both above 0.
        height: metres.
        texture: how it is coloured; the side is unrolled into (arc length, height).
        segments: sides of the regular polygon that stands for the circle.
    """
    angles = 2.0 * np.pi * np.arange(segments) / segments
    circle = np.stack([np.cos(angles), np.sin(angles)], -1)
    lower = np.column_stack([radii[0] * circle, np.zeros(segments)])
    upper = np.column_stack([radii[1] * circle, np.full(segments, height)])
    ends = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, height]])
    vertices = np.concatenate([lower, upper, ends])
    here = np.arange(segments)
    after = (here + 1) % segments
    side = np.concatenate(
        [np.stack([here, after, segments + after], -1), np.stack([here, segments + after, segments + here], -1)]
    )
    bottom = np.stack([after, here, np.full(segments, 2 * segments)], -1)
    top = np.stack([segments + here, segments + after, np.full(segments, 2 * segments + 1)], -1)
    arc = 2.0 * np.pi * max(radii) / segments
    left, right = arc * here, arc * (here + 1)
    low, high = np.zeros(segments), np.full(segments, height)
    side_uv = np.concatenate(
        [
            np.stack([np.stack([left, low], -1), np.stack([right, low], -1), np.stack([right, high], -1)], 1),
            np.stack([np.stack([left, low], -1), np.stack([right, high], -1), np.stack([left, high], -1)], 1),
        ]
    )
    ends_uv = vertices[np.concatenate([bottom, top])][..., :2]
    corner_uv = np.concatenate([side_uv, ends_uv])
    return Part(vertices + np.asarray(base), np.concatenate([side, bottom, top]), corner_uv, texture)


def sphere(centre: Point, radius: float, texture: Texture, squash: float = 1.0) -> Part:
    """A sphere (an ellipsoid of half height `squash * radius`) of 20 rings by 36 segments."""
    rings, segments = 20, 36
    polar = np.pi * np.arange(rings + 1) / rings
    azimuth = 2.0 * np.pi * np.arange(segments + 1) / segments
    grid_polar, grid_azimuth = np.meshgrid(polar, azimuth, indexing="ij")
    vertices = np.stack(
        [
            radius * np.sin(grid_polar) * np.cos(grid_azimuth),
            radius * np.sin(grid_polar) * np.sin(grid_azimuth),
            squash * radius * np.cos(grid_polar),
        ],
        -1,
    ).reshape(-1, 3)
    uv = np.stack([radius * grid_azimuth, -radius * grid_polar], -1).reshape(-1, 2)
    ring, segment = (index.ravel() for index in np.meshgrid(np.arange(rings), np.arange(segments), indexing="ij"))
    corner = ring * (segments + 1) + segment
    below = corner + segments + 1
    # One of the two triangles of a quad collapses to a line at each pole; it is left out.
    west = np.stack([corner, below, below + 1], -1)[ring < rings - 1]
    east = np.stack([corner, below + 1, corner + 1], -1)[ring > 0]
    faces = np.concatenate([west, east])
    return Part(vertices + np.asarray(centre), faces, uv[faces], texture)
