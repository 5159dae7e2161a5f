"""A scene's mesh, and which instance each of its triangles belongs to."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.json_files import read_object
from snd_nerfstudio.scenes.toolkit.tree import ToolkitScene

LARGEST_ID = 65_535
"""Instance ids are written in 16 bits."""


@dataclass(frozen=True)
class AnnotatedMesh:
    """Triangles with instance ids."""

    vertices: Float[np.ndarray, "v 3"]
    """Metres, world axes, float32."""
    faces: Int[np.ndarray, "f 3"]
    """Vertex numbers."""
    face_objects: Int[np.ndarray, "f"]
    """Instance ids; 0 = not annotated."""
    labels: dict[int, str]
    """Instance id -> what it is."""

    def face_classes(self, classes: list[str], ignore: int) -> Int[np.ndarray, "f"]:
        """The place of each triangle's label in a list of classes, or `ignore` if it is not there."""
        places = {name: place for place, name in enumerate(classes)}
        of_object = np.full(max(self.labels, default=0) + 1, ignore, np.int64)
        for instance, label in self.labels.items():
            of_object[instance] = places.get(label, ignore)
        # 0 is nobody's id, whatever a file may say
        of_object[0] = ignore
        return of_object[self.face_objects]


def vertex_objects(
    segment_of_vertex: Int[np.ndarray, "v"], groups: list[tuple[int, list[int]]]
) -> Int[np.ndarray, "v"]:
    """The instance of each vertex.

    Args:
        segment_of_vertex: `segIndices` of segments.json; numbers of any kind.
        groups: id and segments of each instance; where two claim a segment the later one has it, as in the toolkit.

    Returns:
        Instance ids; 0 where no group has the vertex' segment.
    """
    segments, of_vertex = np.unique(segment_of_vertex, return_inverse=True)
    objects = np.zeros(len(segments), np.int64)
    for instance, members in groups:
        wanted = np.asarray(members, np.int64)
        place = np.minimum(np.searchsorted(segments, wanted), len(segments) - 1)
        objects[place[segments[place] == wanted]] = instance
    return objects[of_vertex.reshape(-1)]


def read_annotated_mesh(scene: ToolkitScene) -> AnnotatedMesh:
    """Reads mesh, segments and annotations.

    A triangle belongs to the instance of its first vertex, as in the toolkit's rasterizer.

    Raises:
        InputError: a file is missing, damaged, or of another mesh.
    """
    scene.scans()
    vertices, faces = _read_mesh(scene)
    segments = read_object(scene.segments).get("segIndices")
    if not isinstance(segments, list) or len(segments) != len(vertices):
        count = len(segments) if isinstance(segments, list) else "no"
        raise InputError(
            f"{scene.segments}: {count} `segIndices` for {len(vertices)} vertices of {scene.mesh.name}; the two "
            "files are not of one download."
        )
    groups = read_object(scene.annotations).get("segGroups")
    if not isinstance(groups, list):
        raise InputError(f"{scene.annotations} has no `segGroups`.")
    try:
        of_segments = [(_instance(group), [int(s) for s in group["segments"]]) for group in groups]
        labels = {_instance(group): str(group["label"]).strip() for group in groups}
        numbers = np.asarray(segments, np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{scene.segments}, {scene.annotations}: a group lacks `objectId`, `label` or `segments`, or a segment "
            f"is no number ({error})."
        ) from error
    if any(not 0 <= instance <= LARGEST_ID for instance, _ in of_segments):
        raise InputError(f"{scene.annotations}: an `objectId` is not between 0 and {LARGEST_ID}.")
    return AnnotatedMesh(vertices, faces, vertex_objects(numbers, of_segments)[faces[:, 0]], labels)


def _instance(group: dict[str, Any]) -> int:
    return int(group["objectId"] if "objectId" in group else group["id"])


def _read_mesh(scene: ToolkitScene) -> tuple[Float[np.ndarray, "v 3"], Int[np.ndarray, "f 3"]]:
    try:
        # needs system libraries and is slow to import, so only where a mesh is read
        from open3d import io, utility
    except (ImportError, OSError) as error:
        raise MissingOpen3DError(
            f"Masks and depth are made with open3d, which cannot be imported here ({error}). Install it with "
            "`pip install open3d`; on Debian it also needs `apt install libusb-1.0-0 libgl1 libx11-6 libgomp1`."
        ) from error
    with utility.VerbosityContextManager(utility.VerbosityLevel.Error):  # type: ignore
        mesh = io.read_triangle_mesh(str(scene.mesh))  # type: ignore
    vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.triangles, np.int64)
    if len(faces) == 0:
        raise InputError(f"{scene.mesh} holds no triangles or is damaged; download it again.")
    return vertices, faces


class MissingOpen3DError(InputError):
    """No scene can be done; not the fault of one of them."""
