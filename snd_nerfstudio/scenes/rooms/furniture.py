"""Pieces of furniture, each built from a few textured solids with sizes and colours drawn at random.

A piece stands on z = 0 with its footprint centred on the origin and its front towards +y. A maker returns an
`Arrangement`: the piece itself and what stands on it, each an instance of its own.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np

from snd_nerfstudio.scenes.rooms.shapes import Part, Point, box, cone, placed, sphere
from snd_nerfstudio.scenes.rooms.textures import random_texture

CLASSES = (
    "wall", "floor", "ceiling", "table", "chair", "sofa", "shelf", "cabinet", "box", "lamp", "bin", "ball", "picture",
    "door", "rug", "books", "vase", "plant",
)  # fmt: skip
"""Names of the semantic classes; a class index is a position in this tuple."""


@dataclass(frozen=True)
class Thing:
    """One instance."""

    label: str
    """Its class, one of `CLASSES`."""
    parts: list[Part]
    """What it is made of."""


@dataclass(frozen=True)
class Arrangement:
    """A piece of furniture with the things on it."""

    things: list[Thing]
    """The instances; the first is the piece itself."""
    footprint: tuple[float, float]
    """Width (x) and depth (y) of the floor it takes, metres."""
    height: float
    """Height above the floor of its highest point, metres."""


def _lifted(thing: Thing, position: Point, yaw: float = 0.0) -> Thing:
    return Thing(thing.label, [placed(part, position, yaw) for part in thing.parts])


def vase(rng: np.random.Generator) -> Thing:
    """A vase about 0.2 m high."""
    texture = random_texture(rng, "painted")
    low, high = rng.uniform(0.04, 0.06), rng.uniform(0.06, 0.09)
    body, neck = rng.uniform(0.1, 0.14), rng.uniform(0.05, 0.09)
    return Thing("vase", [cone((0, 0, 0), (low, high), body, texture), cone((0, 0, body), (high, 0.04), neck, texture)])


def ball(rng: np.random.Generator, radius: float) -> Thing:
    """A ball resting on z = 0."""
    return Thing("ball", [sphere((0, 0, radius), radius, random_texture(rng, "fabric"))])


def small_box(rng: np.random.Generator, side: float) -> Thing:
    """A box with sides around `side` metres."""
    width, depth, height = side * rng.uniform(0.7, 1.2, 3)
    return Thing("box", [box((0, 0, height / 2), (width, depth, height), random_texture(rng, "painted"))])


def book_row(rng: np.random.Generator, length: float, depth: float, height: float) -> Thing:
    """Upright books side by side, starting at x = 0, `length` long, at most `height` high."""
    textures = [random_texture(rng, "painted") for _ in range(4)]
    books, x = [], 0.0
    while x < length - 0.07:
        thickness = rng.uniform(0.04, 0.09)
        tall = height * rng.uniform(0.65, 0.92)
        centre = (x + thickness / 2, 0.0, tall / 2)
        books.append(box(centre, (thickness - 0.004, depth * rng.uniform(0.8, 1.0), tall), textures[rng.integers(4)]))
        x += thickness
    return Thing("books", books)


def _legs(width: float, depth: float, height: float, thickness: float, texture) -> list[Part]:
    x, y = width / 2 - thickness, depth / 2 - thickness
    return [box((sx * x, sy * y, height / 2), (thickness, thickness, height), texture)
            for sx in (-1, 1) for sy in (-1, 1)]  # fmt: skip


def table(rng: np.random.Generator) -> Arrangement:
    """A table on four legs with two or three things on it."""
    width, depth, height = rng.uniform(1.0, 1.4), rng.uniform(0.6, 0.8), rng.uniform(0.68, 0.76)
    wood = random_texture(rng, "wood")
    parts = [box((0, 0, height - 0.02), (width, depth, 0.04), wood)]
    parts += _legs(width, depth, height - 0.04, 0.05, random_texture(rng, "metal"))
    makers = [vase, lambda r: ball(r, r.uniform(0.06, 0.09)), lambda r: small_box(r, 0.2)]
    things = [Thing("table", parts)]
    for slot, maker in enumerate(rng.permutation(3)[: rng.integers(2, 4)]):
        position = ((slot - 1) * width / 3.2, rng.uniform(-0.12, 0.12), height)
        things.append(_lifted(makers[maker](rng), position, rng.uniform(-0.5, 0.5)))
    return Arrangement(things, (width, depth), height + 0.25)


def chair(rng: np.random.Generator) -> Arrangement:
    """A chair with a seat, a back rest and four legs."""
    width, seat, back = rng.uniform(0.4, 0.46), rng.uniform(0.42, 0.47), rng.uniform(0.8, 0.92)
    wood, cloth = random_texture(rng, "wood"), random_texture(rng, "fabric")
    parts = [box((0, 0, seat - 0.025), (width, width, 0.05), cloth)]
    parts.append(box((0, -width / 2 + 0.02, (back + seat + 0.12) / 2), (width, 0.04, back - seat - 0.12), cloth))
    parts += [box((s * (width / 2 - 0.03), -width / 2 + 0.02, seat + 0.06), (0.04, 0.035, 0.12), wood) for s in (-1, 1)]
    parts += _legs(width, width, seat - 0.05, 0.04, wood)
    return Arrangement([Thing("chair", parts)], (width, width), back)


def sofa(rng: np.random.Generator) -> Arrangement:
    """A sofa of boxes with two cushions."""
    width, depth = rng.uniform(1.5, 1.9), rng.uniform(0.75, 0.85)
    cloth, cushion = random_texture(rng, "fabric"), random_texture(rng, "fabric")
    parts = [
        box((0, 0.02, 0.2), (width, depth - 0.04, 0.4), cloth),
        box((0, -depth / 2 + 0.1, 0.6), (width, 0.2, 0.4), cloth),
        box((-width / 2 + 0.09, 0.08, 0.5), (0.18, depth - 0.16, 0.2), cloth),
        box((width / 2 - 0.09, 0.08, 0.5), (0.18, depth - 0.16, 0.2), cloth),
    ]
    parts += [box((s * width * 0.26, -depth / 2 + 0.28, 0.57), (0.42, 0.14, 0.34), cushion) for s in (-1, 1)]
    return Arrangement([Thing("sofa", parts)], (width, depth), 0.8)


def shelf(rng: np.random.Generator) -> Arrangement:
    """A tall open shelf with rows of books and a few other things."""
    width, depth, height = rng.uniform(0.8, 1.2), rng.uniform(0.28, 0.34), rng.uniform(1.6, 2.0)
    levels, board = 4, 0.03
    wood, back = random_texture(rng, "wood"), random_texture(rng, "wood")
    gap = (height - board) / levels
    parts = [box((s * (width - board) / 2, 0, height / 2), (board, depth, height), wood) for s in (-1, 1)]
    inner = width - 2 * board
    parts += [box((0, 0, board / 2 + level * gap), (inner, depth, board), wood) for level in range(levels + 1)]
    parts.append(box((0, -depth / 2 + 0.01, height / 2), (inner, 0.02, height - 2 * board), back))
    things = [Thing("shelf", parts)]
    for level in range(levels):
        base = board + level * gap
        length = inner * rng.uniform(0.45, 0.95)
        row = book_row(rng, length, depth - 0.06, gap - board)
        things.append(_lifted(row, (-inner / 2 + 0.005, 0.01, base)))
        if inner - length > 0.22:
            things.append(_lifted(vase(rng), (inner / 2 - 0.12, 0.01, base)))
    return Arrangement(things, (width, depth), height)


def cabinet(rng: np.random.Generator) -> Arrangement:
    """A chest of drawers with knobs and something on top."""
    width, depth, height = rng.uniform(0.8, 1.2), rng.uniform(0.4, 0.5), rng.uniform(0.75, 0.95)
    wood, front, metal = random_texture(rng, "wood"), random_texture(rng, "painted"), random_texture(rng, "metal")
    parts = [box((0, -0.01, height / 2), (width, depth - 0.02, height), wood)]
    rows = 3
    for row in range(rows):
        for side in (-1, 1):
            centre = (side * width / 4, depth / 2 - 0.012, height * (row + 0.5) / rows)
            parts.append(box(centre, (width / 2 - 0.04, 0.024, height / rows - 0.04), front))
            parts.append(sphere((centre[0], depth / 2 + 0.005, centre[2]), 0.022, metal))
    top = vase(rng) if rng.random() < 0.5 else small_box(rng, 0.24)
    things = [Thing("cabinet", parts), _lifted(top, (rng.uniform(-0.25, 0.25), 0, height), rng.uniform(0, 1))]
    return Arrangement(things, (width, depth + 0.03), height + 0.29)


def boxes(rng: np.random.Generator) -> Arrangement:
    """A stack of two or three cardboard boxes."""
    things, z = [], 0.0
    for level in range(rng.integers(2, 4)):
        side, height = 0.5 - 0.09 * level, rng.uniform(0.22, 0.34)
        part = box((0, 0, height / 2), (side, side * 0.85, height), random_texture(rng, ("card", "painted")[level % 2]))
        things.append(_lifted(Thing("box", [part]), (0, 0, z), rng.uniform(-0.2, 0.2)))
        z += height
    return Arrangement(things, (0.58, 0.52), z)


def floor_lamp(rng: np.random.Generator) -> Arrangement:
    """A lamp on a pole."""
    metal, glow = random_texture(rng, "metal"), random_texture(rng, "glow")
    height = rng.uniform(1.4, 1.65)
    parts = [cone((0, 0, 0), (0.15, 0.14), 0.03, metal), cone((0, 0, 0.03), (0.018, 0.018), height - 0.3, metal, 16)]
    parts.append(cone((0, 0, height - 0.28), (0.2, 0.12), 0.28, glow))
    return Arrangement([Thing("lamp", parts)], (0.42, 0.42), height)


def bin_(rng: np.random.Generator) -> Arrangement:
    """A waste bin."""
    height = rng.uniform(0.3, 0.42)
    return Arrangement([Thing("bin", [cone((0, 0, 0), (0.12, 0.16), height, random_texture(rng, "painted"))])],
                       (0.34, 0.34), height)  # fmt: skip


def plant(rng: np.random.Generator) -> Arrangement:
    """A potted plant: a pot and a few leafy blobs."""
    pot, leaves = random_texture(rng, "painted"), random_texture(rng, "leaves")
    parts = [cone((0, 0, 0), (0.11, 0.16), 0.28, pot), cone((0, 0, 0.28), (0.02, 0.02), 0.22, pot, 12)]
    for _ in range(5):
        x, y, z = rng.uniform(-0.1, 0.1), rng.uniform(-0.1, 0.1), rng.uniform(0.5, 0.9)
        parts.append(sphere((x, y, z), rng.uniform(0.1, 0.17), leaves, squash=rng.uniform(0.7, 1.3)))
    return Arrangement([Thing("plant", parts)], (0.52, 0.52), 1.1)


def floor_ball(rng: np.random.Generator) -> Arrangement:
    """A large ball on the floor."""
    radius = rng.uniform(0.15, 0.25)
    return Arrangement([ball(rng, radius)], (2 * radius, 2 * radius), 2 * radius)


def rug(rng: np.random.Generator) -> Arrangement:
    """A flat rug."""
    width, depth = rng.uniform(1.8, 2.4), rng.uniform(1.3, 1.7)
    part = box((0, 0, 0.006), (width, depth, 0.012), random_texture(rng, "fabric"))
    return Arrangement([Thing("rug", [part])], (width, depth), 0.012)


def picture(rng: np.random.Generator) -> Arrangement:
    """A framed painting, its lower edge on z = 0 and its back at y = -0.02."""
    width, height = rng.uniform(0.5, 1.0), rng.uniform(0.4, 0.7)
    frame = box((0, -0.005, height / 2), (width, 0.03, height), random_texture(rng, "wood"))
    canvas = box((0, 0.0, height / 2), (width - 0.08, 0.035, height - 0.08), random_texture(rng, "painting"))
    return Arrangement([Thing("picture", [frame, canvas])], (width, 0.04), height)


def door(rng: np.random.Generator) -> Arrangement:
    """A closed door with its frame and handle."""
    frame, leaf, metal = random_texture(rng, "wood"), random_texture(rng, "wood"), random_texture(rng, "metal")
    parts = [box((0, 0, 1.03), (1.0, 0.04, 2.06), frame), box((0, 0.01, 1.0), (0.86, 0.06, 2.0), leaf)]
    parts += [box((0, 0.025, z), (0.6, 0.06, 0.7), leaf) for z in (0.52, 1.45)]
    parts.append(sphere((0.36, 0.07, 1.0), 0.035, metal))
    return Arrangement([Thing("door", parts)], (1.0, 0.1), 2.06)


WALL_PIECES: tuple[Callable[[np.random.Generator], Arrangement], ...] = (
    sofa, shelf, cabinet, table, floor_lamp, plant, boxes, chair, bin_, shelf, cabinet, floor_ball, chair, plant, boxes,
)  # fmt: skip
"""What may stand along the walls, large things first because those are hard to place later."""
