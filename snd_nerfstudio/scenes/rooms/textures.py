"""Procedural surface colours: functions of surface coordinates in metres, filtered to the size of a pixel.

Every pattern is computed at the hit point of a ray, so a surface has the same colour from every view. Edges are box
filtered over `width`, the length one sample covers on the surface: patterns that a far or slanted pixel cannot resolve
fade into their mean instead of aliasing, which would make two views of one point disagree.
"""

import colorsys
from dataclasses import dataclass
from typing import Callable

import numpy as np
from jaxtyping import Float, Int

LATTICE = 256
"""Side of the table of random values the noise is interpolated from; the noise repeats after this many cells."""


@dataclass(frozen=True)
class Texture:
    """How one surface is coloured."""

    kind: str
    """A key of `PATTERNS`."""
    colours: Float[np.ndarray, "3 3"]
    """Three RGB colours in [0, 1]; what each is used for depends on the pattern."""
    period: float
    """Size of the pattern's repeating cell, metres."""
    angle: float
    """Rotation of the pattern in the surface, radians."""
    offset: Float[np.ndarray, "2"]
    """Shift of the pattern in the surface, metres."""
    grain: float
    """Amplitude of the fractal noise that modulates the brightness; 0 switches it off."""


@dataclass(frozen=True)
class Samples:
    """Surface points of one texture, with what the patterns need to know about them."""

    u: Float[np.ndarray, "n"]
    """First surface coordinate, metres."""
    v: Float[np.ndarray, "n"]
    """Second surface coordinate, metres."""
    width: Float[np.ndarray, "n"]
    """Length that one sample covers on the surface, metres."""
    lattice: Float[np.ndarray, "k k"]
    """Uniform random values in [0, 1], `k = LATTICE`."""


def pulse(x: Float[np.ndarray, "n"], width: Float[np.ndarray, "n"], duty: float) -> Float[np.ndarray, "n"]:
    """Box-filtered square wave of period 1 that is 1 on [0, duty) and 0 on [duty, 1).

    The wave's integral is F(x) = duty floor(x) + min(x - floor(x), duty), so its mean over the filter is exactly
    (F(x + width/2) - F(x - width/2)) / width, for every width.

    Args:
        x: position, in periods.
        width: length of the filter, in periods.
        duty: part of the period that is 1, in [0, 1].

    Returns:
        Values in [0, 1].
    """
    width = np.maximum(width, 1e-3)

    def integral(t: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
        whole = np.floor(t)
        return duty * whole + np.minimum(t - whole, duty)

    return np.clip((integral(x + 0.5 * width) - integral(x - 0.5 * width)) / width, 0.0, 1.0)


def value_noise(lattice: Float[np.ndarray, "k k"], x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]):
    """Smooth noise in [0, 1] with cells of size 1, interpolated from `lattice`; returns an array like `x`."""
    x0, y0 = np.floor(x), np.floor(y)
    tx, ty = x - x0, y - y0
    tx, ty = tx * tx * (3.0 - 2.0 * tx), ty * ty * (3.0 - 2.0 * ty)
    column, row = x0.astype(np.int32) & (LATTICE - 1), y0.astype(np.int32) & (LATTICE - 1)
    corner = row * LATTICE + column
    right = row * LATTICE + ((column + 1) & (LATTICE - 1))
    step = LATTICE * (((row + 1) & (LATTICE - 1)) - row)
    flat = lattice.ravel()
    top = flat[corner] + tx * (flat[right] - flat[corner])
    bottom_left = flat[corner + step]
    bottom = bottom_left + tx * (flat[right + step] - bottom_left)
    return top + ty * (bottom - top)


def fractal_noise(samples: Samples, size: float, octaves: int, stretch: float = 1.0) -> Float[np.ndarray, "n"]:
    """Sum of noise octaves around 0, about [-1, 1]; an octave fades out where a sample cannot resolve it.

    Args:
        samples: where.
        size: cell size of the coarsest octave, metres.
        octaves: how many; each halves the cell size and takes 0.6 of the amplitude.
        stretch: how much longer than wide the cells are, along u.
    """
    total = np.zeros_like(samples.u)
    amplitude = 1.0
    for octave in range(octaves):
        cell = size / 2.0**octave
        resolved = np.clip(2.0 - 2.5 * samples.width / cell, 0.0, 1.0)
        if not resolved.any():
            break
        shift = np.float32(17.0 * octave)
        noise = value_noise(samples.lattice, samples.u / (cell * stretch) + shift, samples.v / cell + shift)
        total += amplitude * resolved * (2.0 * noise - 1.0)
        amplitude *= 0.6
    return total


def cell_value(samples: Samples, column: Float[np.ndarray, "n"], row: Float[np.ndarray, "n"], salt: int = 0):
    """One random value in [0, 1] per cell (brick, plank, tile); returns an array like `column`."""
    x: Int[np.ndarray, "n"] = (column.astype(np.int32) * 7 + salt) & (LATTICE - 1)
    y: Int[np.ndarray, "n"] = (row.astype(np.int32) * 13 + 5 * salt) & (LATTICE - 1)
    return samples.lattice[y, x]


def mix(first, second, amount: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n 3"]:
    """`first` where `amount` is 0, `second` where it is 1; both are one colour `[3]` or one per sample `[n, 3]`."""
    return first + amount[:, None] * (second - first)


def _plain(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    blotches = np.clip(0.5 + 0.4 * fractal_noise(samples, texture.period, 3), 0.0, 1.0)
    return mix(texture.colours[0], texture.colours[1], blotches)


def _stripes(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    x, width = samples.u / texture.period, samples.width / texture.period
    colour = mix(texture.colours[0], texture.colours[1], pulse(x, width, 0.45))
    return mix(colour, texture.colours[2], pulse(x * 0.5 + 0.2, 0.5 * width, 0.08))


def _checkers(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    width = samples.width / (2.0 * texture.period)
    columns = 2.0 * pulse(samples.u / (2.0 * texture.period), width, 0.5) - 1.0
    rows = 2.0 * pulse(samples.v / (2.0 * texture.period), width, 0.5) - 1.0
    return mix(texture.colours[0], texture.colours[1], 0.5 - 0.5 * columns * rows)


def _cells(samples: Samples, texture: Texture, size: tuple[float, float], joint: float, shift: float):
    """Rectangles with joints, each tinted on its own; `shift` moves every second row (all at random if < 0)."""
    long, high = size
    row = np.floor(samples.v / high)
    offset = cell_value(samples, np.zeros_like(row), row, 3) if shift < 0 else shift * np.mod(row, 2.0)
    x = samples.u / long + offset
    face = pulse(x, samples.width / long, 1.0 - joint / long)
    face = face * pulse(samples.v / high, samples.width / high, 1.0 - joint / high)
    column = np.floor(x)
    tint = mix(texture.colours[0], texture.colours[1], cell_value(samples, column, row))
    tint = tint * (0.8 + 0.4 * cell_value(samples, column, row, 11))[:, None]
    return mix(texture.colours[2], tint, face)


def _bricks(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    return _cells(samples, texture, (texture.period, 0.42 * texture.period), 0.07 * texture.period, 0.5)


def _tiles(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    return _cells(samples, texture, (texture.period, texture.period), 0.05 * texture.period, 0.0)


def _planks(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    boards = _cells(samples, texture, (8.0 * texture.period, texture.period), 0.05 * texture.period, -1.0)
    return boards * (1.0 + 0.18 * fractal_noise(samples, 0.35 * texture.period, 2, stretch=8.0))[:, None]


def _wood(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    grain = fractal_noise(samples, texture.period, 3, stretch=7.0)
    return mix(texture.colours[0], texture.colours[1], np.clip(0.5 + 0.5 * grain, 0.0, 1.0))


def _dots(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    x, y, width = (value / texture.period for value in (samples.u, samples.v, samples.width))
    row = np.floor(y)
    x = x + 0.5 * np.mod(row, 2.0)
    column = np.floor(x)
    distance = np.hypot(x - column - 0.5, y - row - 0.5)
    radius = 0.3
    inside = np.clip((radius - distance) / np.maximum(width, 1e-3) + 0.5, 0.0, 1.0)
    # Cells smaller than the filter show the share of the area that dots cover.
    blurred = np.clip(2.0 * width - 0.6, 0.0, 1.0)
    inside += blurred * (np.pi * radius**2 - inside)
    dot = mix(texture.colours[1], texture.colours[2], np.round(cell_value(samples, column, row)))
    return mix(texture.colours[0], dot, inside)


def _marble(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    warp = fractal_noise(samples, texture.period, 4)
    veins = np.sin(2.0 * np.pi * (samples.u / texture.period + 1.2 * warp))
    colour = mix(texture.colours[0], texture.colours[1], 0.5 + 0.5 * veins)
    return mix(colour, texture.colours[2], np.clip(1.2 * warp - 0.3, 0.0, 1.0))


def _painting(samples: Samples, texture: Texture) -> Float[np.ndarray, "n 3"]:
    height = fractal_noise(samples, texture.period, 3)
    sharpness = 1.0 / np.maximum(samples.width / texture.period, 0.05)
    colour = mix(texture.colours[0], texture.colours[1], np.clip(height * sharpness + 0.5, 0.0, 1.0))
    sun = np.clip((np.abs(height) - 0.45) * sharpness + 0.5, 0.0, 1.0)
    return mix(colour, texture.colours[2], sun)


PATTERNS: dict[str, Callable[[Samples, Texture], np.ndarray]] = {
    "plain": _plain,
    "stripes": _stripes,
    "checkers": _checkers,
    "bricks": _bricks,
    "tiles": _tiles,
    "planks": _planks,
    "wood": _wood,
    "dots": _dots,
    "marble": _marble,
    "painting": _painting,
}
"""Pattern name -> colour function; each takes samples and a texture and returns RGB `[n, 3]`."""


def make_lattice(rng: np.random.Generator) -> Float[np.ndarray, "k k"]:
    """The table of random values behind all noise of a room, `k = LATTICE`."""
    return rng.random((LATTICE, LATTICE), dtype=np.float32)


def evaluate(
    texture: Texture,
    uv: Float[np.ndarray, "n 2"],
    width: Float[np.ndarray, "n"],
    lattice: Float[np.ndarray, "k k"],
) -> Float[np.ndarray, "n 3"]:
    """Colour of surface points.

    Args:
        texture: how the surface is coloured.
        uv: surface coordinates, metres.
        width: length that a sample covers on the surface, metres.
        lattice: `make_lattice`'s table.

    Returns:
        RGB in [0, 1], float32, without shading.
    """
    cos, sin = np.float32(np.cos(texture.angle)), np.float32(np.sin(texture.angle))
    offset = texture.offset.astype(np.float32)
    u = cos * uv[:, 0] - sin * uv[:, 1] + offset[0]
    v = sin * uv[:, 0] + cos * uv[:, 1] + offset[1]
    samples = Samples(u, v, width, lattice)
    colour = PATTERNS[texture.kind](samples, texture)
    if texture.grain > 0:
        colour = colour * (1.0 + texture.grain * fractal_noise(samples, 0.22, 3))[:, None]
    return np.clip(colour, 0.0, 1.0).astype(np.float32)


# Style -> (patterns, period range in metres, saturation range, value range, hue range in turns, grain). The ranges keep
# cells above about four samples at three metres in a 224 x 336 image.
_WALLS = ("bricks", "stripes", "dots", "plain", "tiles", "checkers")
_STYLES: dict[str, tuple[tuple[str, ...], tuple, tuple, tuple, tuple, float]] = {
    "wall": (_WALLS, (0.2, 0.36), (0.1, 0.45), (0.6, 0.95), (0, 1), 0.1),
    "floor": (("planks", "tiles", "checkers", "marble"), (0.16, 0.34), (0.2, 0.6), (0.4, 0.8), (0.02, 0.14), 0.14),
    "ceiling": (("tiles", "plain", "planks"), (0.3, 0.5), (0.02, 0.12), (0.8, 0.98), (0, 1), 0.12),
    "wood": (("wood", "planks"), (0.07, 0.14), (0.4, 0.75), (0.3, 0.75), (0.03, 0.11), 0.1),
    "fabric": (("stripes", "checkers", "dots", "plain"), (0.08, 0.15), (0.3, 0.85), (0.4, 0.9), (0, 1), 0.18),
    "painted": (("plain", "marble", "dots", "stripes"), (0.1, 0.22), (0.3, 0.9), (0.4, 0.95), (0, 1), 0.14),
    "card": (("plain",), (0.1, 0.3), (0.3, 0.5), (0.55, 0.75), (0.06, 0.11), 0.2),
    "leaves": (("marble", "plain"), (0.06, 0.1), (0.5, 0.9), (0.25, 0.6), (0.22, 0.4), 0.3),
    "metal": (("plain",), (0.05, 0.1), (0.0, 0.1), (0.25, 0.7), (0, 1), 0.1),
    "glow": (("plain",), (0.1, 0.2), (0.1, 0.4), (0.9, 1.0), (0.08, 0.16), 0.08),
    "painting": (("painting",), (0.18, 0.4), (0.4, 1.0), (0.35, 1.0), (0, 1), 0.1),
}  # fmt: skip


def random_texture(rng: np.random.Generator, style: str) -> Texture:
    """Draw a texture.

    Args:
        rng: source of randomness.
        style: what the surface is, a key of `_STYLES` ("wall", "wood", "fabric", ...).
    """
    kinds, periods, saturations, values, hues, grain = _STYLES[style]
    kind = kinds[rng.integers(len(kinds))]
    hue = rng.uniform(*hues)
    colours = []
    for index in range(3):
        # The second and third colour stay related to the first (but paintings are free), and differ in brightness.
        tone = rng.uniform(*hues) if style == "painting" or index == 2 else hue + rng.uniform(-0.03, 0.03)
        value = np.clip(rng.uniform(*values) * (1.0, 0.72, 0.88)[index], 0.0, 1.0)
        colours.append(colorsys.hsv_to_rgb(tone % 1.0, rng.uniform(*saturations), value))
    angle = rng.choice([0.0, 0.25, 0.5]) * np.pi if style == "fabric" else 0.0
    offset = rng.uniform(0.0, 20.0, 2)
    return Texture(kind, np.array(colours, np.float32), float(rng.uniform(*periods)), float(angle), offset, grain)
