"""Ray casts a room into an image and its exact geometry."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, UInt8, UInt16

from snd_nerfstudio.scenes.rooms.layout import Room
from snd_nerfstudio.scenes.rooms.textures import evaluate

IGNORE = 255
"""Semantic value of a pixel that shows nothing."""
_MISS = np.uint32(0xFFFFFFFF)
_AMBIENT = 0.46
_BAND = 60_000
"""Rays shaded at a time: small enough that intermediate arrays stay in the processor's cache."""


@dataclass(frozen=True)
class RenderedView:
    """What one camera sees. Everything but the colour is measured at the pixel centre."""

    image: UInt8[np.ndarray, "h w 3"]
    """RGB, the mean of 2 x 2 samples per pixel."""
    depth: Float[np.ndarray, "h w"]
    """Distance along the optical axis, metres, float32; 0 where nothing is hit."""
    normals: Float[np.ndarray, "h w 3"]
    """Unit normals of the mesh faces in world axes, turned to the camera, float32; 0 where nothing is hit."""
    instances: UInt16[np.ndarray, "h w"]
    """Instance ids; 0 where nothing is hit."""
    semantics: UInt8[np.ndarray, "h w"]
    """Class indices; 255 where nothing is hit."""


def pixel_rays(
    camera_to_world: Float[np.ndarray, "4 4"],
    intrinsics: Float[np.ndarray, "3 3"],
    height: int,
    width: int,
    samples: int = 1,
) -> Float[np.ndarray, "r 6"]:
    """Rays through a regular grid of points in every pixel.

    Args:
        camera_to_world: OpenCV pose.
        intrinsics: pixels; the centre of the first pixel is at (0.5, 0.5).
        height: rows of the image.
        width: columns of the image.
        samples: points per pixel and side; 1 is the pixel centre, 2 is two by two.

    Returns:
        Origin and direction, float32, in the order of the image with `height * samples` rows. Directions have length 1
        along the optical axis, so the ray parameter of a hit is its z-depth.
    """
    x = (np.arange(width * samples) + 0.5) / samples
    y = (np.arange(height * samples) + 0.5) / samples
    # A pixel (x, y, 1) maps linearly to its direction, so the grid is a sum of a row and a column.
    to_world = camera_to_world[:3, :3] @ np.linalg.inv(intrinsics)
    rays = np.empty((len(y), len(x), 6), np.float32)
    rays[..., :3] = camera_to_world[:3, 3]
    for axis in range(3):
        row = (to_world[axis, 0] * x + to_world[axis, 2]).astype(np.float32)
        column = (to_world[axis, 1] * y).astype(np.float32)
        rays[..., 3 + axis] = row[None, :] + column[:, None]
    return rays.reshape(-1, 6)


def _cast(room: Room, rays: Float[np.ndarray, "r 6"]) -> dict[str, np.ndarray]:
    """open3d's answer for `rays`: t_hit, primitive_ids, primitive_uvs, primitive_normals."""
    caster = room.raycaster
    from open3d import core

    return {key: value.numpy() for key, value in caster.cast_rays(core.Tensor(rays)).items()}  # type: ignore


def _lambert(light: Float[np.ndarray, "3"], points, normals) -> Float[np.ndarray, "n"]:
    """Light that surfaces receive from a point light if nothing is in between; 0 where they face away."""
    towards = light - points
    squared = np.einsum("ij,ij->i", towards, towards)
    cosine = np.einsum("ij,ij->i", towards, normals) / np.sqrt(squared)
    return np.maximum(cosine, 0.0) / (0.45 + 0.14 * squared)


def _hidden(room: Room, light: Float[np.ndarray, "3"], points, normals) -> Bool[np.ndarray, "n"]:
    """Whether something is between the points and the light."""
    from open3d import core

    rays = np.empty((len(points), 6), np.float32)
    # Start a little off the surface and stop short of the light.
    rays[:, :3] = points + np.float32(2e-3) * normals
    rays[:, 3:] = light - points
    return room.raycaster.test_occlusions(core.Tensor(rays), 0.0, 0.98).numpy()  # type: ignore


def _illumination(room: Room, points, normals) -> Float[np.ndarray, "n"]:
    """Ambient light, the main light with hard shadows, and the other lights without."""
    light = np.full(len(points), _AMBIENT, np.float32)
    main = _lambert(room.lights[0], points, normals)
    lit = np.flatnonzero(main > 0)
    main[lit[_hidden(room, room.lights[0], points[lit], normals[lit])]] = 0.0
    light += 0.72 * main
    for lamp in room.lights[1:]:
        light += 0.34 * _lambert(lamp, points, normals)
    # Light from the floor and walls: ceilings and undersides are not black.
    light += 0.14 * np.maximum(-normals[:, 2], 0.0)
    return light


def _contact(room: Room, points, normals) -> Float[np.ndarray, "n"]:
    """Darkening in [0, 1] near the edges of the room and on the floor around furniture."""
    factor = np.ones(len(points), np.float32)
    for axis in range(3):
        for plane, sign in ((0.0, 1.0), (room.size[axis], -1.0)):
            # A surface in the plane itself, or facing away from it, is not darkened by it.
            near = np.exp(-np.abs(points[:, axis] - plane) / 0.18)
            factor *= 1.0 - 0.3 * near * np.clip(1.0 - sign * normals[:, axis], 0.0, 1.0)
    floor = np.flatnonzero((points[:, 2] < 0.03) & (normals[:, 2] > 0.5))
    x, y = points[floor, 0], points[floor, 1]
    for x0, y0, x1, y1 in room.footprints:
        outside = np.hypot(np.maximum(np.maximum(x0 - x, x - x1), 0.0), np.maximum(np.maximum(y0 - y, y - y1), 0.0))
        factor[floor] *= 1.0 - 0.35 * np.exp(-outside / 0.12)
    return factor


def _colours(room: Room, rays: Float[np.ndarray, "r 6"], sample_size: float) -> Float[np.ndarray, "r 3"]:
    """Shaded colour of each ray, in [0, 1]; `sample_size` is a sample's width at depth 1, metres."""
    cast = _cast(room, rays)
    hit = np.flatnonzero(cast["primitive_ids"] != _MISS)
    face = cast["primitive_ids"][hit].astype(np.int64)
    depth = cast["t_hit"][hit, None]
    direction = rays[hit, 3:]
    points = rays[hit, :3] + depth * direction
    normals = cast["primitive_normals"][hit]
    along = np.einsum("ij,ij->i", normals, direction)
    normals = np.where(along[:, None] > 0, -normals, normals)
    slant = np.abs(along) / np.sqrt(np.einsum("ij,ij->i", direction, direction))
    # Geometric mean of the footprint's two sides, at most three times the short one.
    width = (sample_size * depth[:, 0] / np.sqrt(np.maximum(slant, 0.11))).astype(np.float32)
    second, third = cast["primitive_uvs"][hit].T
    corners = room.corner_uv[face]
    weights = np.stack([1.0 - second - third, second, third], -1)
    uv = np.einsum("rc,rck->rk", weights, corners)
    texture = room.face_texture[face]
    order = np.argsort(texture, kind="stable")
    starts = np.searchsorted(texture[order], np.arange(len(room.textures) + 1))
    albedo = np.empty((len(hit), 3), np.float32)
    for index, (start, stop) in enumerate(zip(starts[:-1], starts[1:])):
        if stop > start:
            chosen = order[start:stop]
            albedo[chosen] = evaluate(room.textures[index], uv[chosen], width[chosen], room.lattice)
    light = _illumination(room, points, normals) * _contact(room, points, normals)
    colours = np.zeros((len(rays), 3), np.float32)
    colours[hit] = np.clip(albedo * light[:, None], 0.0, 1.0)
    return colours


def render_colours(
    room: Room, rays: Float[np.ndarray, "r 6"], height: int, width: int, samples: int, focal: float
) -> UInt8[np.ndarray, "h w 3"]:
    """The image that rays of any camera see.

    Args:
        room: from `build_room`.
        rays: origin and direction, `samples` by `samples` per pixel, in the order of the image with
            `height * samples` rows; directions have length 1 along the optical axis.
        height: rows.
        width: columns.
        samples: rays per pixel and side: 2.
        focal: focal length in pixels, which says how much of a texture a ray stands for.
    """
    bands = np.array_split(rays, max(1, len(rays) // _BAND))
    colours = np.concatenate([_colours(room, band, 1.0 / (samples * focal)) for band in bands])
    colours = colours.reshape(height, samples, width, samples, 3)
    colours = 0.25 * (colours[:, 0, :, 0] + colours[:, 0, :, 1] + colours[:, 1, :, 0] + colours[:, 1, :, 1])
    return np.round(255.0 * colours).astype(np.uint8)


def render_view(
    room: Room,
    camera_to_world: Float[np.ndarray, "4 4"],
    intrinsics: Float[np.ndarray, "3 3"],
    height: int,
    width: int,
) -> RenderedView:
    """Renders one view of a room.

    Args:
        room: from `build_room`.
        camera_to_world: OpenCV pose (x right, y down, z forward) in the room's world, metres.
        intrinsics: pixels, pixel centres at +0.5.
        height: rows.
        width: columns.

    Returns:
        Colour, depth, normals, instances and semantics.

    Raises:
        RoomsError: open3d is missing.
    """
    samples = 2
    rays = pixel_rays(camera_to_world, intrinsics, height, width, samples)
    image = render_colours(room, rays, height, width, samples, intrinsics[0, 0])

    rays = pixel_rays(camera_to_world, intrinsics, height, width)
    cast = _cast(room, rays)
    hit = cast["primitive_ids"] != _MISS
    face = np.where(hit, cast["primitive_ids"], 0).astype(np.int64)
    normals = cast["primitive_normals"]
    away = np.einsum("ij,ij->i", normals, rays[:, 3:]) > 0
    normals = np.where(away[:, None], -normals, normals)
    # The caster's normals are unit length to about 1e-3 only on slivers; this makes all of them so.
    normals = normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
    shape = (height, width)
    return RenderedView(
        image=image,
        depth=np.where(hit, cast["t_hit"], 0.0).astype(np.float32).reshape(shape),
        normals=np.where(hit[:, None], normals, 0.0).astype(np.float32).reshape(height, width, 3),
        instances=np.where(hit, room.face_instance[face], 0).astype(np.uint16).reshape(shape),
        semantics=np.where(hit, room.face_semantic[face], IGNORE).astype(np.uint8).reshape(shape),
    )
