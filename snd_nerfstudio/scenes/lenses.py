"""Lens distortion, removed while images are resized."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Shaped, UInt8

HALF_PIXEL = np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
"""OpenCV puts pixel centres at whole numbers, we put them at +0.5."""
MAPS_KEPT = 12
"""Maps of the latest cameras that are kept; the frames of a scene mostly share one camera."""


@dataclass(frozen=True)
class Lens:
    """A camera with distortion, and the ideal pinhole that shows no pixel from outside its image."""

    matrix: tuple[float, ...]
    """The 3x3 intrinsics, row by row; pixel centres at +0.5."""
    distortion: tuple[float, ...]
    """nerfstudio's k1 k2 k3 k4 p1 p2."""
    size: tuple[int, int]
    """Height and width that ``matrix`` is of."""

    @property
    def pinhole(self) -> Float[np.ndarray, "3 3"]:
        """Intrinsics of the pinhole, for an image of ``size``."""
        return _pinhole(self)

    def undistorted(self, image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The pinhole's image, bilinearly, of one that may be smaller than ``size``."""
        import cv2

        columns, rows = _source(self, image.shape[:2], image.shape[:2])
        return cv2.remap(image, columns, rows, interpolation=cv2.INTER_LINEAR)

    def picked(self, values: Shaped[np.ndarray, "h w"], size: tuple[int, int]) -> Shaped[np.ndarray, "H W"]:
        """What the pinhole sees at each pixel centre of an image of ``size``, by nearest neighbour: one lookup for
        undistorting and resizing."""
        columns, rows = _source(self, size, values.shape[:2])
        rows, columns = np.rint(rows).astype(np.int64), np.rint(columns).astype(np.int64)
        inside = (rows >= 0) & (rows < values.shape[0]) & (columns >= 0) & (columns < values.shape[1])
        found = values[np.clip(rows, 0, values.shape[0] - 1), np.clip(columns, 0, values.shape[1] - 1)]
        return np.where(inside, found, np.zeros((), values.dtype))


def _coefficients(lens: Lens) -> Float[np.ndarray, "8"]:
    k1, k2, k3, k4, p1, p2 = lens.distortion
    return np.array([k1, k2, p1, p2, k3, k4, 0.0, 0.0])


def _scaled(matrix: Float[np.ndarray, "3 3"], old: tuple[int, int], new: tuple[int, int]) -> Float[np.ndarray, "3 3"]:
    return np.array([new[1] / old[1], new[0] / old[0], 1.0])[:, None] * matrix


@lru_cache(MAPS_KEPT)
def _pinhole(lens: Lens) -> Float[np.ndarray, "3 3"]:
    import cv2

    matrix = np.array(lens.matrix).reshape(3, 3) - HALF_PIXEL
    size = (lens.size[1], lens.size[0])
    return cv2.getOptimalNewCameraMatrix(matrix, _coefficients(lens), size, 0)[0] + HALF_PIXEL


@lru_cache(MAPS_KEPT)
def _source(
    lens: Lens, size: tuple[int, int], source_size: tuple[int, int]
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Column and row, in OpenCV's pixels of an image of ``source_size``, of each pixel of a pinhole of ``size``."""
    import cv2

    matrix = _scaled(np.array(lens.matrix).reshape(3, 3), lens.size, source_size)
    pinhole = _scaled(_pinhole(lens), lens.size, size)
    return cv2.initUndistortRectifyMap(  # type: ignore
        matrix - HALF_PIXEL, _coefficients(lens), np.eye(3), pinhole - HALF_PIXEL, (size[1], size[0]), cv2.CV_32FC1
    )
