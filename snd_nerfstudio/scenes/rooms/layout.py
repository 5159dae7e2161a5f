"""A furnished room: which pieces stand where, and the one mesh they make together.

World frame ("mesh world" of ScanNet++): metres, z up, the floor is z = 0 and one lower corner of the room the origin.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.rooms import furniture
from snd_nerfstudio.scenes.rooms.cameras import CameraLoop, camera_loop, camera_poses
from snd_nerfstudio.scenes.rooms.furniture import CLASSES, Arrangement, Thing
from snd_nerfstudio.scenes.rooms.shapes import Part, Point, placed, quad
from snd_nerfstudio.scenes.rooms.textures import Texture, make_lattice, random_texture

MIN_CLEARANCE = 0.4
"""No camera centre comes closer to a surface than this, metres."""
_EYE_LEVEL = 1.05
"""Pieces higher than this keep a horizontal distance from the camera's path, metres."""
_SIDE_CLEARANCE = 0.6
"""That distance, metres."""


class RoomsError(InputError):
    """Something the user can mend; the message says what and how."""


@dataclass
class Room:
    """A room in memory: its mesh, what each triangle belongs to, and where the camera goes."""

    size: tuple[float, float, float]
    """Extent along x, y and z, metres."""
    vertices: Float[np.ndarray, "v 3"]
    """Mesh vertices in world coordinates, metres, float32."""
    faces: Int[np.ndarray, "f 3"]
    """Vertex indices."""
    corner_uv: Float[np.ndarray, "f 3 2"]
    """Surface coordinates of each triangle corner, metres, float32."""
    face_texture: Int[np.ndarray, "f"]
    """Index into `textures`."""
    face_instance: Int[np.ndarray, "f"]
    """Instance id, from 1."""
    textures: list[Texture]
    """Surface colours."""
    instance_labels: dict[int, str]
    """Instance id -> class name."""
    lattice: Float[np.ndarray, "k k"]
    """Random table behind the textures' noise."""
    lights: Float[np.ndarray, "l 3"]
    """Positions of the point lights, metres; the first casts shadows."""
    footprints: Float[np.ndarray, "p 4"]
    """Rectangles (x0, y0, x1, y1) of the pieces that stand on the floor, metres."""
    camera_to_worlds: Float[np.ndarray, "n 4 4"] = field(default_factory=lambda: np.zeros((0, 4, 4)))
    """OpenCV camera-to-world poses along the path."""

    @cached_property
    def face_semantic(self) -> Int[np.ndarray, "f"]:
        """Class index of each triangle."""
        ids = np.zeros(max(self.instance_labels) + 1, np.int64)
        for instance, label in self.instance_labels.items():
            ids[instance] = CLASSES.index(label)
        return ids[self.face_instance]

    @cached_property
    def raycaster(self) -> Any:
        """open3d's `RaycastingScene` of the mesh.

        Raises:
            RoomsError: open3d cannot be imported.
        """
        try:
            # Slow to import and in need of system libraries, so only where rays are cast.
            from open3d import core
            from open3d.t.geometry import RaycastingScene  # type: ignore
        except (ImportError, OSError) as error:
            raise RoomsError(
                f"Rendering rooms needs open3d, which cannot be imported here ({error}). Install it with "
                "`pip install open3d`; on Debian it also needs `apt install libusb-1.0-0 libgl1 libx11-6 libgomp1`."
            ) from error
        scene = RaycastingScene()
        scene.add_triangles(core.Tensor(self.vertices), core.Tensor(self.faces.astype(np.uint32)))  # type: ignore
        return scene

    def clearance(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n"]:
        """Distance from each point to the nearest surface, metres."""
        from open3d import core

        return self.raycaster.compute_distance(core.Tensor(points.astype(np.float32))).numpy()  # type: ignore


class _Builder:
    """Collects the instances of a room while it is being furnished."""

    def __init__(self, size: tuple[float, float, float], path: Float[np.ndarray, "n 3"]) -> None:
        self.size = size
        self.path = path
        self.parts: list[tuple[int, Part]] = []
        self.labels: dict[int, str] = {}
        self.taken: list[tuple[float, float, float, float]] = []
        self.hung: list[tuple[int, float, float, float, float]] = []

    def add(self, thing: Thing, position: Point = (0, 0, 0), yaw: float = 0.0) -> None:
        """Adds `thing`, turned by `yaw` and moved by `position`, as a new instance."""
        instance = len(self.labels) + 1
        self.labels[instance] = thing.label
        self.parts += [(instance, placed(part, position, yaw)) for part in thing.parts]

    def free(self, rectangle: tuple[float, float, float, float], height: float, margin: float = 0.06) -> bool:
        """Whether a piece of this footprint and height meets no other piece, no wall and not the camera's path."""
        x0, y0, x1, y1 = rectangle
        if min(x0, y0) < 0 or x1 > self.size[0] or y1 > self.size[1]:
            return False
        for a0, b0, a1, b1 in self.taken:
            if x0 < a1 + margin and a0 < x1 + margin and y0 < b1 + margin and b0 < y1 + margin:
                return False
        if height < _EYE_LEVEL:
            return True
        gap = np.maximum(np.maximum([x0, y0] - self.path[:, :2], self.path[:, :2] - [x1, y1]), 0.0)
        return bool(np.linalg.norm(gap, axis=-1).min() > _SIDE_CLEARANCE)

    def stand(self, piece: Arrangement, x: float, y: float, yaw: float) -> bool:
        """Puts `piece` on the floor if it is `free` there; returns whether it was."""
        cos, sin = abs(np.cos(yaw)), abs(np.sin(yaw))
        half_x = 0.5 * (cos * piece.footprint[0] + sin * piece.footprint[1])
        half_y = 0.5 * (sin * piece.footprint[0] + cos * piece.footprint[1])
        rectangle = (x - half_x, y - half_y, x + half_x, y + half_y)
        if not self.free(rectangle, piece.height):
            return False
        self.taken.append(rectangle)
        for thing in piece.things:
            self.add(thing, (x, y, 0.0), yaw)
        return True

    def wall_place(self, wall: int, along: float, out: float) -> tuple[float, float, float]:
        """(x, y, yaw) of a piece `along` metres along a wall and `out` metres off it, its front to the room."""
        width, depth, _ = self.size
        quarter = 0.5 * np.pi
        return [
            (along, out, 0.0),
            (width - out, along, quarter),
            (along, depth - out, 2 * quarter),
            (out, along, -quarter),
        ][wall]

    def wall_length(self, wall: int) -> float:
        """Length of a wall, metres."""
        return self.size[wall % 2]

    def against_wall(self, piece: Arrangement, rng: np.random.Generator, tries: int = 24) -> bool:
        """Tries random places along the walls for `piece`; returns whether it found one."""
        for _ in range(tries):
            wall = int(rng.integers(4))
            along = rng.uniform(0.0, self.wall_length(wall))
            out = piece.footprint[1] / 2 + 0.03
            if self.stand(piece, *self.wall_place(wall, along, out)):
                half = piece.footprint[0] / 2
                self.hung.append((wall, along - half, along + half, 0.0, piece.height))
                return True
        return False

    def hang(self, piece: Arrangement, rng: np.random.Generator, low: float, tries: int = 24) -> bool:
        """Tries random places on the walls, lower edge at `low` metres, that nothing covers."""
        half, top = 0.5 * piece.footprint[0] + 0.05, low + piece.height
        for _ in range(tries):
            wall = int(rng.integers(4))
            along = rng.uniform(half, self.wall_length(wall) - half)
            clear = all(
                other != wall or along + half < start or along - half > end or low > high or top < bottom
                for other, start, end, bottom, high in self.hung
            )
            if clear:
                self.hung.append((wall, along - half, along + half, low, top))
                x, y, yaw = self.wall_place(wall, along, 0.022)
                self.add(piece.things[0], (x, y, low), yaw)
                return True
        return False


def _shell(size: tuple[float, float, float], rng: np.random.Generator) -> list[Thing]:
    """Floor, ceiling and the four walls, facing inwards; instances 1 to 6."""
    x, y, z = size
    wall = random_texture(rng, "wall")
    accent = random_texture(rng, "wall")
    style = [wall, accent, wall, random_texture(rng, "wall")]
    floor = quad(np.array([[0, 0, 0], [x, 0, 0], [x, y, 0], [0, y, 0]]), (x, y), random_texture(rng, "floor"))
    ceiling = quad(np.array([[0, 0, z], [0, y, z], [x, y, z], [x, 0, z]]), (y, x), random_texture(rng, "ceiling"))
    corners = [(x, 0), (x, y), (0, y), (0, 0)]
    things = [Thing("floor", [floor]), Thing("ceiling", [ceiling])]
    for index in range(4):
        (ax, ay), (bx, by) = corners[index], corners[index - 1]
        side = np.array([[ax, ay, 0], [bx, by, 0], [bx, by, z], [ax, ay, z]])
        things.append(Thing("wall", [quad(side, (float(np.hypot(ax - bx, ay - by)), z), style[index])]))
    return things


def _furnish(builder: _Builder, loop: CameraLoop, rng: np.random.Generator) -> None:
    """Fills the room: the middle first (a set table or a rug with a low table), then the walls, then pictures."""
    middle_x, middle_y = loop.front
    builder.add(furniture.rug(rng).things[0], (middle_x, middle_y, 0.0), loop.heading + 0.5 * np.pi)
    yaw = loop.heading + 0.5 * np.pi
    group = furniture.table(rng)
    builder.stand(group, middle_x, middle_y, yaw)
    for side in rng.permutation([-1, 1]):
        across, forth = side * (group.footprint[1] / 2 + 0.34), rng.uniform(-0.25, 0.25)
        x = middle_x + np.cos(yaw) * forth - np.sin(yaw) * across
        y = middle_y + np.sin(yaw) * forth + np.cos(yaw) * across
        builder.stand(furniture.chair(rng), x, y, yaw + (np.pi if side > 0 else 0.0))
    if rng.random() < 0.85:
        wall = int(rng.integers(4))
        door = furniture.door(rng)
        along = rng.uniform(0.55, builder.wall_length(wall) - 0.55)
        builder.stand(door, *builder.wall_place(wall, along, 0.05))
        builder.hung.append((wall, along - 0.5, along + 0.5, 0.0, door.height))
    for maker in furniture.WALL_PIECES:
        builder.against_wall(maker(rng), rng)
    for _ in range(int(rng.integers(6, 10))):
        builder.hang(furniture.picture(rng), rng, float(rng.uniform(1.25, 1.55)))


def _assemble(builder: _Builder, rng: np.random.Generator) -> Room:
    """Joins all parts into one mesh."""
    vertices, faces, corner_uv, face_texture, face_instance = [], [], [], [], []
    textures: dict[int, tuple[int, Texture]] = {}
    count = 0
    for instance, part in builder.parts:
        index, _ = textures.setdefault(id(part.texture), (len(textures), part.texture))
        vertices.append(part.vertices)
        faces.append(part.faces + count)
        corner_uv.append(part.corner_uv)
        face_texture.append(np.full(len(part.faces), index))
        face_instance.append(np.full(len(part.faces), instance))
        count += len(part.vertices)
    x, y, z = builder.size
    share = np.array([[0.35, 0.4], [0.7, 0.62]]) + rng.uniform(-0.04, 0.04, (2, 2))
    lights = np.column_stack([share * [x, y], np.full(2, z - 0.2)])
    return Room(
        size=builder.size,
        vertices=np.concatenate(vertices).astype(np.float32),
        faces=np.concatenate(faces),
        corner_uv=np.concatenate(corner_uv).astype(np.float32),
        face_texture=np.concatenate(face_texture),
        face_instance=np.concatenate(face_instance),
        textures=[texture for _, texture in textures.values()],
        instance_labels=builder.labels,
        lattice=make_lattice(rng),
        lights=lights.astype(np.float32),
        footprints=np.array(builder.taken),
    )


def build_room(seed: int, index: int, frames: int) -> Room:
    """Builds one room with its camera path.

    Args:
        seed: seed of the data set.
        index: number of the scene; (seed, index) determines the room, whatever the number of scenes or frames.
        frames: number of poses along the path.

    Raises:
        RoomsError: open3d is missing (the path's clearance is measured with it).
        RuntimeError: no draw gave the camera enough room, which would be a defect of this module.
    """
    for attempt in range(20):
        rng = np.random.default_rng((seed, index, attempt))
        size = (float(rng.uniform(4.0, 6.0)), float(rng.uniform(3.5, 5.0)), float(rng.uniform(2.5, 3.0)))
        loop = camera_loop(size, rng)
        builder = _Builder(size, loop.positions)
        for thing in _shell(size, rng):
            builder.add(thing)
        _furnish(builder, loop, rng)
        room = _assemble(builder, rng)
        if room.clearance(loop.positions).min() >= MIN_CLEARANCE:
            room.camera_to_worlds = camera_poses(loop, frames)
            return room
    raise RuntimeError(f"room {index} of seed {seed}: no draw leaves {MIN_CLEARANCE} m around the camera")
