"""OpenCV's fisheye camera, and the way from its images to those of a pinhole.

The model (OpenCV's manual, "Fisheye camera model"; J. Kannala and S. Brandt, PAMI 2006): a ray at the angle `a` from
the optical axis lands at the distance `a (1 + k1 a^2 + k2 a^4 + k3 a^6 + k4 a^8)` from the principal point, in units
of the focal length.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

_HALF = np.array([[0.0, 0.0, 0.5], [0.0, 0.0, 0.5], [0.0, 0.0, 0.0]])
"""OpenCV puts pixel centres at whole numbers, we put them at +0.5: what to subtract from intrinsics."""
VALID = 255
"""Value of a pixel of an anonymisation mask that shows what was there."""


@dataclass(frozen=True)
class FisheyeCamera:
    """Intrinsics of a fisheye camera."""

    intrinsics: Float[np.ndarray, "3 3"]
    """In pixels; pixel centres at +0.5, as in COLMAP and so in ScanNet++'s files."""
    distortion: Float[np.ndarray, "4"]
    """k1, k2, k3, k4."""
    height: int
    """Rows of the image."""
    width: int
    """Columns of the image."""

    def resized(self, height: int, width: int) -> "FisheyeCamera":
        """The camera of the same images after they have been resized."""
        scale = np.array([[width / self.width], [height / self.height], [1.0]])
        return FisheyeCamera(scale * self.intrinsics, self.distortion, height, width)

    def project(self, points: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 2"]:
        """Where points in camera axes (x right, y down, z forward) land, in pixels."""
        across = np.linalg.norm(points[..., :2], axis=-1)
        angle = np.arctan2(across, points[..., 2])
        scale = distorted(angle, self.distortion) / np.maximum(across, 1e-12)
        focal, centre = self.intrinsics[[0, 1], [0, 1]], self.intrinsics[:2, 2]
        return focal * scale[..., None] * points[..., :2] + centre

    def directions(self, pixels: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 3"]:
        """Rays through pixel positions, in camera axes, of length 1 along the optical axis.

        Args:
            pixels: x and y; their rays must lie less than 90 degrees off the axis.
        """
        focal, centre = self.intrinsics[[0, 1], [0, 1]], self.intrinsics[:2, 2]
        plane = (pixels - centre) / focal
        radius = np.linalg.norm(plane, axis=-1)
        scale = np.tan(undistorted(radius, self.distortion)) / np.maximum(radius, 1e-12)
        return np.concatenate([scale[..., None] * plane, np.ones_like(plane[..., :1])], -1)


def distorted(angle: Float[np.ndarray, "n"], distortion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "n"]:
    """Distance from the principal point, in focal lengths, of rays at these angles (radians) from the axis."""
    k1, k2, k3, k4 = distortion
    square = angle * angle
    return angle * (1.0 + square * (k1 + square * (k2 + square * (k3 + square * k4))))


def undistorted(radius: Float[np.ndarray, "n"], distortion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "n"]:
    """The angles for which `distorted` gives `radius`, by Newton's method."""
    k1, k2, k3, k4 = distortion
    angle = np.asarray(radius, np.float64)
    for _ in range(10):
        square = angle * angle
        slope = 1.0 + square * (3.0 * k1 + square * (5.0 * k2 + square * (7.0 * k3 + square * 9.0 * k4)))
        angle = angle - (distorted(angle, distortion) - radius) / slope
    return angle


class Undistortion:
    """Resamples images of a fisheye camera to those of a pinhole, as FiT3D and Splat and Distill prepare ScanNet++.

    Images are first resized, then remapped. The pinhole's focal length is the largest of those at which the middle of
    an edge stays where it is (OpenCV's `estimateNewCameraMatrixForUndistortRectify`, balance 0), and its principal
    point is the middle of the image. Corners that the fisheye did not see are filled by reflection.

    Args:
        camera: of the images as they are stored.
        height: rows to resize to.
        width: columns to resize to.
    """

    def __init__(self, camera: FisheyeCamera, height: int, width: int) -> None:
        self.stored = camera
        self.camera = camera.resized(height, width)

    @cached_property
    def intrinsics(self) -> Float[np.ndarray, "3 3"]:
        """Of the pinhole, in pixels; pixel centres at +0.5."""
        import cv2

        camera = self.camera
        size = (camera.width, camera.height)
        # OpenCV takes an image to reach from 0 to its width here, which is the +0.5 convention: nothing to convert
        matrix = cv2.fisheye.estimateNewCameraMatrixForUndistortRectify(
            camera.intrinsics, camera.distortion, size, np.eye(3), balance=0.0
        )
        return np.array([[matrix[0, 0], 0.0, 0.5 * size[0]], [0.0, matrix[1, 1], 0.5 * size[1]], [0.0, 0.0, 1.0]])

    @cached_property
    def _maps(self) -> tuple[np.ndarray, np.ndarray]:
        """For each pixel of the pinhole's image the place in the fisheye's, as OpenCV counts."""
        import cv2

        camera = self.camera
        return cv2.fisheye.initUndistortRectifyMap(
            camera.intrinsics - _HALF,
            camera.distortion,
            np.eye(3),
            self.intrinsics - _HALF,
            (camera.width, camera.height),
            cv2.CV_32FC1,
        )

    def image(self, stored: UInt8[np.ndarray, "a b 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """A colour image: bicubic with antialiasing to the new size, then linear."""
        import cv2

        resized = np.asarray(Image.fromarray(stored).resize(self._size, Image.Resampling.BICUBIC))
        return cv2.remap(resized, *self._maps, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)

    def mask(self, stored: UInt8[np.ndarray, "a b"]) -> UInt8[np.ndarray, "h w"]:
        """An anonymisation mask: 255 where nothing that is anonymised has any part in the pixel, else 0."""
        import cv2

        whole = np.where(stored == VALID, VALID, 0).astype(np.uint8)
        if whole.all():
            return np.full((self.camera.height, self.camera.width), VALID, np.uint8)
        # both filters mix neighbours; a pixel counts as anonymised as soon as one of these is
        resized = np.asarray(Image.fromarray(whole).resize(self._size, Image.Resampling.BOX))
        touched = np.where(resized == VALID, VALID, 0).astype(np.uint8)
        mapped = cv2.remap(touched, *self._maps, interpolation=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
        return np.where(mapped == VALID, VALID, 0).astype(np.uint8)

    @property
    def _size(self) -> tuple[int, int]:
        return self.camera.width, self.camera.height
