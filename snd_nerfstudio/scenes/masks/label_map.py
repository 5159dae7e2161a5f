"""From masks that overlap and leave gaps, as SAM's do, to one region for every pixel."""

import numpy as np
from jaxtyping import Bool, Float, Int


def label_map(
    masks: Bool[np.ndarray, "n H W"], scores: Float[np.ndarray, "n"], smallest: int
) -> Int[np.ndarray, "H W"]:
    """One region for every pixel.

    Masks are painted in the order of their size, the largest first, so that a part lies on top of the whole that it
    belongs to (of two equally large ones the one with the better score). What no mask covers is cut into its connected
    pieces (pixels that share a side), and each becomes a region: one region for all of them, as id 0 would be, would
    mix the features of places that have nothing in common. Regions of which less than ``smallest`` pixels are to be
    seen are left out, and their pixels go to the nearest region.

    Args:
        masks: one after the other, in any order.
        scores: how good each is.
        smallest: pixels that a region must have.

    Returns:
        Ids from 1 on, without gaps: masks first, the largest first, then the pieces of the rest.
    """
    from scipy.ndimage import distance_transform_edt, label

    areas = masks.reshape(len(masks), masks.shape[1] * masks.shape[2]).sum(axis=1)
    painted = np.zeros(masks.shape[1:], np.int64)
    for number, mask in enumerate(np.lexsort((scores, -areas)).tolist(), start=1):
        painted[masks[mask]] = number
    visible = np.bincount(painted.ravel(), minlength=len(masks) + 1) >= smallest
    visible[0] = False
    painted[~visible[painted]] = 0
    pieces, _ = label(painted == 0)  # type: ignore
    large = np.bincount(pieces.ravel()) >= smallest
    large[0] = False
    regions = np.where(large[pieces], pieces + len(masks), painted)  # type: ignore
    if (regions == 0).all():  # the image is smaller than a region must be
        return np.ones(regions.shape, np.int64)
    if (regions == 0).any():
        nearest = distance_transform_edt(regions == 0, return_distances=False, return_indices=True)
        regions = regions[tuple(nearest)]  # type: ignore
    ids, compact = np.unique(regions, return_inverse=True)
    return compact.reshape(regions.shape).astype(np.int64) + 1
