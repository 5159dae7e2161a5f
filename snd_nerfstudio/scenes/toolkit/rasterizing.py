"""Depth, instances and classes of a mesh as a pinhole camera sees them, from one cast of rays."""

from dataclasses import dataclass
from typing import Optional

import numpy as np
from jaxtyping import Float, Int, UInt16

from snd_nerfstudio.scenes.rooms.rendering import pixel_rays
from snd_nerfstudio.scenes.toolkit.annotations import AnnotatedMesh

NEAR = 0.05
"""Metres along the optical axis before which nothing is seen, as in the toolkit's renderer."""
_MISS = 0xFFFFFFFF


@dataclass(frozen=True)
class Geometry:
    """What is seen at the pixel centres."""

    depth: UInt16[np.ndarray, "h w"]
    """Along the optical axis, millimetres; 0 = nothing, or beyond 65 metres."""
    instances: UInt16[np.ndarray, "h w"]
    """Instance ids; 0 = nothing, or not annotated."""
    semantics: Optional[Int[np.ndarray, "h w"]]
    """Classes; `ignore` where nothing is seen or the label is no class."""


class MeshRasterizer:
    """Casts rays at one mesh.

    Args:
        mesh: triangles with instances.
        classes: names of the semantic classes; None for none.
        threads: how many threads cast rays; 0 for one per core.
    """

    def __init__(self, mesh: AnnotatedMesh, classes: Optional[list[str]] = None, threads: int = 0) -> None:
        from open3d import core
        from open3d.t.geometry import RaycastingScene  # type: ignore

        self.face_objects = mesh.face_objects
        self.ignore = ignore_value(classes) if classes else 0
        self.face_classes = mesh.face_classes(classes, self.ignore) if classes else None
        self.threads = threads
        self.scene = RaycastingScene(nthreads=threads)
        self.scene.add_triangles(core.Tensor(mesh.vertices), core.Tensor(mesh.faces.astype(np.uint32)))  # type: ignore

    def render(
        self, camera_to_world: Float[np.ndarray, "4 4"], intrinsics: Float[np.ndarray, "3 3"], height: int, width: int
    ) -> Geometry:
        """What one camera sees.

        Args:
            camera_to_world: OpenCV pose in the world of the mesh.
            intrinsics: of a pinhole, in pixels; pixel centres at +0.5.
            height: rows.
            width: columns.
        """
        from open3d import core

        rays = pixel_rays(camera_to_world, intrinsics, height, width)
        # directions have length 1 along the optical axis: this starts them all on one plane
        rays[:, :3] += np.float32(NEAR) * rays[:, 3:]
        cast = self.scene.cast_rays(core.Tensor(rays), nthreads=self.threads)  # type: ignore
        faces = cast["primitive_ids"].numpy()
        hit = faces != _MISS
        face = np.where(hit, faces, 0).astype(np.int64)
        millimetres = np.rint(1000.0 * (np.where(hit, cast["t_hit"].numpy(), 0.0) + NEAR))
        seen = hit & (millimetres <= np.iinfo(np.uint16).max)
        semantics = None
        if self.face_classes is not None:
            semantics = np.where(hit, self.face_classes[face], self.ignore).reshape(height, width)
        return Geometry(
            depth=np.where(seen, millimetres, 0).astype(np.uint16).reshape(height, width),
            instances=np.where(hit, self.face_objects[face], 0).astype(np.uint16).reshape(height, width),
            semantics=semantics,
        )


def ignore_value(classes: list[str]) -> int:
    """What a semantic map holds where there is no class: 255, or 65535 if there are more than 255 classes."""
    return 255 if len(classes) <= 255 else 65_535
