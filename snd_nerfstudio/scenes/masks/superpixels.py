"""Superpixels as stand-ins for instance masks: compact patches that do not cross edges of colour, depth or surface."""

from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from snd_nerfstudio.errors import InputError

VERSION = 1
"""To be raised whenever the same image and settings give other superpixels."""
MOST_REGIONS = 65_535
"""Ids are kept in 16 bits."""
NORMAL_REACH = 2
"""Pixels to either side between which the depth's slope is measured; measured depth is too noisy for less."""


@dataclass(frozen=True)
class SuperpixelSettings:
    """Settings of SLIC on colour and, where the frame has a depth map, on depth and surface normals."""

    regions: int = 150
    """About how many regions an image is cut into."""
    compactness: float = 20.0
    """What one region's width of distance counts for, in units of CIELAB: more makes regions rounder, less lets them
    follow edges."""
    smoothing: float = 1.0
    """Standard deviation in pixels of the blur before; 0 = none."""
    depth_weight: float = 40.0
    """What a depth e times as large counts for, in units of CIELAB; 0 = depth is not looked at."""
    normal_weight: float = 15.0
    """What opposite surface normals count for, in half units of CIELAB; 0 = normals are not looked at."""

    def check(self) -> None:
        """Refuse values that make no sense.

        Raises:
            InputError: which flag, and what it takes.
        """
        if not 2 <= self.regions <= MOST_REGIONS:
            raise InputError(f"superpixels.regions {self.regions}: give a number from 2 to {MOST_REGIONS}.")
        if not 0 < self.compactness < float("inf"):
            raise InputError(f"superpixels.compactness {self.compactness:g}: give a number above 0.")
        for name in ("smoothing", "depth_weight", "normal_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise InputError(f"superpixels.{flag} {getattr(self, name):g}: give 0 or a positive number.")


class SuperpixelSegmenter:
    """Cuts images into superpixels; one of the two ways in which `maker.MaskMaker` gets masks.

    Args:
        settings: checked here.

    Raises:
        InputError: a setting makes no sense.
    """

    name = "superpixel"
    slow = False

    def __init__(self, settings: SuperpixelSettings) -> None:
        settings.check()
        self.settings = settings
        self.uses_depth = settings.depth_weight > 0 or settings.normal_weight > 0

    @property
    def description(self) -> dict[str, Any]:
        """All that decides on the regions of an image."""
        return {"version": VERSION, "scikit-image": version("scikit-image"), **asdict(self.settings)}

    def get_ready(self) -> None:
        """Nothing has to be loaded."""

    def segment(
        self,
        image: UInt8[np.ndarray, "H W 3"],
        depth: Float[np.ndarray, "H W"] | None,
        intrinsics: Float[np.ndarray, "3 3"],
    ) -> Int[np.ndarray, "H W"]:
        """See `superpixels`."""
        return superpixels(image, depth, intrinsics, self.settings)


def superpixels(
    image: UInt8[np.ndarray, "H W 3"],
    depth: Float[np.ndarray, "H W"] | None,
    intrinsics: Float[np.ndarray, "3 3"],
    settings: SuperpixelSettings,
) -> Int[np.ndarray, "H W"]:
    """Cut an image into connected regions by SLIC (Achanta et al., TPAMI 2012).

    Pixels are clustered, each within reach of a regular grid of seeds, by

    ``|lab - lab'|^2 + (d log(z / z'))^2 + |n - n'|^2 w^2 + (c / s)^2 |u - u'|^2``

    with CIELAB colours, depth ``z`` and its weight ``d``, surface normals ``n`` and their weight ``w``, positions
    ``u``, the seeds' distance ``s`` and compactness ``c``. Pixels without depth borrow that of the nearest pixel that
    has one.

    Args:
        image: sRGB.
        depth: along the optical axis, 0 = no value; None if there is none.
        intrinsics: of this image; only used for the normals.
        settings: weights and number of regions.

    Returns:
        Ids from 1 on. The same on every call.
    """
    from skimage.color import rgb2lab
    from skimage.segmentation import slic

    channels = [rgb2lab(image).astype(np.float64)]
    if depth is not None and (depth > 0).any():
        filled = fill_depth(depth)
        channels.append(settings.depth_weight * np.log(filled)[..., None])
        channels.append(settings.normal_weight * surface_normals(filled, intrinsics))
    features = np.concatenate(channels, axis=-1)
    # scikit-image scales features to a range of 1 whatever they are, and compactness has to follow
    spread = float(np.ptp(features)) or 1.0
    labels = slic(
        features,
        n_segments=settings.regions,
        compactness=settings.compactness / spread,
        sigma=settings.smoothing,
        convert2lab=False,
        enforce_connectivity=True,
        start_label=1,
        channel_axis=-1,
    )
    return labels.astype(np.int64)


def fill_depth(depth: Float[np.ndarray, "H W"]) -> Float[np.ndarray, "H W"]:
    """A depth map without holes, each filled from its nearest measured pixel, and with single outliers removed.

    Args:
        depth: 0 = no value; at least one pixel has one.
    """
    import cv2
    from scipy.ndimage import distance_transform_edt

    holes = depth <= 0
    if holes.any():
        nearest = distance_transform_edt(holes, return_distances=False, return_indices=True)
        depth = depth[tuple(nearest)]  # type: ignore
    return cv2.medianBlur(np.ascontiguousarray(depth, np.float32), 5).astype(np.float64)


def surface_normals(
    depth: Float[np.ndarray, "H W"], intrinsics: Float[np.ndarray, "3 3"]
) -> Float[np.ndarray, "H W 3"]:
    """Unit normals of the surface that a depth map shows, towards the camera.

    The cross product of the differences between the points some pixels to the right and left, and below and above.

    Args:
        depth: along the optical axis, a value everywhere.
        intrinsics: of the depth map; pixel centres at +0.5.
    """
    height, width = depth.shape
    columns = (np.arange(width) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    rows = (np.arange(height) + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    points = np.stack([depth * columns, depth * rows[:, None], depth], axis=-1)
    padded = np.pad(points, ((NORMAL_REACH, NORMAL_REACH), (NORMAL_REACH, NORMAL_REACH), (0, 0)), mode="edge")
    inner = slice(NORMAL_REACH, -NORMAL_REACH)
    right = padded[inner, 2 * NORMAL_REACH :] - padded[inner, : -2 * NORMAL_REACH]
    down = padded[2 * NORMAL_REACH :, inner] - padded[: -2 * NORMAL_REACH, inner]
    normals = np.cross(down, right)
    return normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)
