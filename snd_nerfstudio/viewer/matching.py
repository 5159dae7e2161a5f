"""What a click hits, and where the other views have the like."""

from dataclasses import dataclass, replace
from typing import Optional

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from snd_nerfstudio.scenes.views import Views
from snd_nerfstudio.splatting import PinholeCamera, rasterize
from snd_nerfstudio.supervision.settings import SupervisionSettings
from snd_nerfstudio.viewer.outputs import ShownScene

RAY_PIXELS = 3
"""Side of the picture that is rendered about a ray, pixels of the target view."""
HIT = 0.3
"""Accumulated alpha from which a ray has hit something."""


@dataclass(frozen=True)
class Picked:
    """A point of the feature field."""

    point: Float[Tensor, "3"]
    """World."""
    feature: Float[Tensor, "c"]
    """Mean of the splatted features there."""


@dataclass(frozen=True)
class ViewMatch:
    """The token of one view that is most like a picked feature."""

    view: str
    """context 1, context 2 or target."""
    pixel: tuple[float, float]
    """Centre of that token: column and row in the view's image."""
    similarity: float
    """Cosine."""
    point: Optional[Float[Tensor, "3"]]
    """What is seen at that pixel, world; None where nothing is known about it."""
    expected: Optional[tuple[float, float]]
    """Where the picked point itself is in this view: column and row; None outside of it."""


def ray_camera(
    origin: Float[Tensor, "3"], direction: Float[Tensor, "3"], focal: float, pixels: int = RAY_PIXELS
) -> PinholeCamera:
    """A small camera that looks along a ray.

    Args:
        origin: world.
        direction: world, any length above 0.
        focal: focal length, pixels.
        pixels: its picture's side.
    """
    forward = F.normalize(direction, dim=0)
    # any axis that is not parallel to it
    helper = torch.zeros_like(forward)
    helper[forward.abs().argmin()] = 1.0
    right = F.normalize(torch.linalg.cross(helper, forward), dim=0)
    pose = torch.eye(4, dtype=origin.dtype, device=origin.device)
    pose[:3, :3] = torch.stack([right, torch.linalg.cross(forward, right), forward], dim=1)
    pose[:3, 3] = origin
    matrix = torch.eye(3, dtype=origin.dtype, device=origin.device)
    matrix[0, 0] = matrix[1, 1] = focal
    matrix[:2, 2] = pixels / 2
    return PinholeCamera(pose, matrix, pixels, pixels)


def pick(
    scene: ShownScene,
    tokens: Float[Tensor, "v h w c"],
    settings: SupervisionSettings,
    origin: Float[Tensor, "3"],
    direction: Float[Tensor, "3"],
) -> Optional[Picked]:
    """What a ray hits, or None if that is nothing.

    Args:
        scene: what is shown.
        tokens: of the context views.
        settings: how they are lifted.
        origin: of the ray, world.
        direction: of the ray, any length.
    """
    from snd_nerfstudio.supervision.token_builder import build_token_operator  # numba takes a second to import

    context, gaussians = scene.triplet.context, scene.gaussians
    focal = float(scene.triplet.target.intrinsics[0, [0, 1], [0, 1]].mean())
    camera = ray_camera(origin.to(gaussians.means), direction.to(gaussians.means), focal)
    splat = rasterize(gaussians, camera, gaussians.means.new_zeros(len(gaussians), 0))
    middle = RAY_PIXELS // 2
    if float(splat.alpha[middle, middle]) < HIT:
        return None
    operator = build_token_operator(
        (tokens.shape[1], tokens.shape[2]),
        context.masks,
        (context.height, context.width),
        gaussians,
        camera,
        None,
        replace(settings, blending=1.0, weighting="coverage", pooling="area"),
        (1, 1),
    )
    pose = camera.camera_to_world
    return Picked(pose[:3, 3] + float(splat.depth[middle, middle]) * pose[:3, 2], operator(tokens, 1.0)[0, 0])


def match_views(scene: ShownScene, tokens: Float[Tensor, "v h w c"], picked: Picked) -> list[ViewMatch]:
    """The best match of a feature in each context view and in the target.

    Args:
        scene: what is shown.
        tokens: of the contexts and then the target.
        picked: what to look for.
    """
    context, target = scene.triplet.context, scene.triplet.target
    query = F.normalize(picked.feature, dim=0)
    similarity = F.normalize(tokens, dim=-1) @ query
    means = scene.gaussians.means.view(len(context), context.height, context.width, 3)
    seen = (scene.gaussians.opacities > 0).view(len(context), context.height, context.width)
    matches = []
    for number in range(len(tokens)):
        is_target = number == len(context)
        views, place = (target, 0) if is_target else (context, number)
        rows, columns = tokens.shape[1:3]
        row, column = divmod(int(similarity[number].argmax()), columns)
        x, y = (column + 0.5) * views.width / columns, (row + 0.5) * views.height / rows
        u, v = min(int(x), views.width - 1), min(int(y), views.height - 1)
        point: Optional[Tensor] = None
        if not is_target:
            point = means[number, v, u] if seen[number, v, u] else None
        elif float(scene.target_splat.alpha[v, u]) >= HIT:
            point = at_depth(views.camera(place), u + 0.5, v + 0.5, float(scene.target_splat.depth[v, u]))
        matches.append(
            ViewMatch(
                "target" if is_target else f"context {number + 1}",
                (x, y),
                float(similarity[number, row, column]),
                point,
                projected(views, place, picked.point),
            )
        )
    return matches


def at_depth(camera: PinholeCamera, x: float, y: float, depth: float) -> Float[Tensor, "3"]:
    """The point at a pixel position and z-depth, world."""
    matrix, pose = camera.intrinsics, camera.camera_to_world
    local = depth * matrix.new_tensor([(x - matrix[0, 2]) / matrix[0, 0], (y - matrix[1, 2]) / matrix[1, 1], 1.0])
    return pose[:3, :3] @ local + pose[:3, 3]


def projected(views: Views, number: int, point: Float[Tensor, "3"]) -> Optional[tuple[float, float]]:
    """Column and row of a point in a view, or None outside of its picture."""
    pose, matrix = views.camera_to_worlds[number], views.intrinsics[number]
    local = pose[:3, :3].T @ (point - pose[:3, 3])
    if local[2] <= 0:
        return None
    x = float(local[0] / local[2] * matrix[0, 0] + matrix[0, 2])
    y = float(local[1] / local[2] * matrix[1, 1] + matrix[1, 2])
    return (x, y) if 0 <= x < views.width and 0 <= y < views.height else None
