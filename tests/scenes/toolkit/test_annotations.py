import json

import numpy as np
import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.scenes.toolkit.annotations import AnnotatedMesh, read_annotated_mesh, vertex_objects
from snd_nerfstudio.scenes.toolkit.rasterizing import MeshRasterizer, ignore_value
from snd_nerfstudio.scenes.toolkit.tree import ToolkitScene

SQUARE = """ply
format ascii 1.0
element vertex 4
property float x
property float y
property float z
element face 2
property list uchar int vertex_indices
end_header
-1 -1 2
1 -1 2
1 1 2
-1 1 2
3 0 1 2
3 0 2 3
"""


def write_scans(folder, segments, groups):
    (folder / "scans").mkdir(parents=True, exist_ok=True)
    (folder / "scans/mesh_aligned_0.05.ply").write_text(SQUARE)
    (folder / "scans/segments.json").write_text(json.dumps({"segIndices": segments}))
    (folder / "scans/segments_anno.json").write_text(json.dumps({"segGroups": groups}))
    return ToolkitScene(folder)


def group(instance, label, segments):
    return {"objectId": instance, "id": 100 + instance, "label": label, "segments": segments}


def test_later_groups_have_what_two_of_them_claim_and_unclaimed_vertices_have_none():
    segments = np.array([40, 7, 7, 40, 12, 99])
    found = vertex_objects(segments, [(3, [7, 40]), (5, [40, 1000]), (6, [])])
    assert found.tolist() == [5, 3, 3, 5, 0, 0]


def test_a_triangle_belongs_to_the_instance_of_its_first_vertex(tmp_path):
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    scene = write_scans(tmp_path, [4, 9, 9, 9], [group(2, " chair ", [4]), group(1, "table", [9])])
    mesh = read_annotated_mesh(scene)
    assert mesh.face_objects.tolist() == [2, 2] and mesh.labels == {2: "chair", 1: "table"}
    assert mesh.vertices[2].tolist() == [1.0, 1.0, 2.0]


def square(objects=(7, 0)) -> AnnotatedMesh:
    """Two triangles two metres ahead, side lengths of two metres; the second lies below the diagonal."""
    vertices = np.array([[-1, -1, 2], [1, -1, 2], [1, 1, 2], [-1, 1, 2]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return AnnotatedMesh(vertices, faces, np.array(objects), {7: "chair", 8: "table"})


def test_what_a_camera_sees_of_a_square():
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    # focal length 4, 2 metres away: the square is 4 pixels wide, in the middle of 6
    intrinsics = np.array([[4.0, 0, 3], [0, 4, 3], [0, 0, 1]])
    seen = MeshRasterizer(square(), ["table", "chair"]).render(np.eye(4), intrinsics, 6, 6)
    inside = np.zeros((6, 6), bool)
    inside[1:5, 1:5] = True
    assert (seen.depth == np.where(inside, 2000, 0)).all()
    row, column = np.mgrid[:6, :6]
    first = inside & (column > row)
    second = inside & (column < row)
    assert (seen.instances[first] == 7).all() and (seen.instances[second] == 0).all()
    assert seen.semantics is not None
    assert (seen.semantics[first] == 1).all() and (seen.semantics[second] == 255).all()
    assert (seen.instances[~inside] == 0).all() and (seen.semantics[~inside] == 255).all()


def test_what_is_nearer_than_five_centimetres_or_further_than_16_bits_is_not_seen():
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    intrinsics = np.array([[4.0, 0, 3], [0, 4, 3], [0, 0, 1]])
    pose = np.eye(4)
    pose[2, 3] = 1.96
    assert MeshRasterizer(square()).render(pose, intrinsics, 6, 6).instances.max() == 0
    pose[2, 3] = 1.9
    assert MeshRasterizer(square()).render(pose, intrinsics, 6, 6).depth.max() == 100
    pose[2, 3] = -70.0
    assert MeshRasterizer(square()).render(pose, np.diag([400.0, 400, 1]), 6, 6).depth.max() == 0


def test_many_classes_need_another_value_to_ignore():
    assert ignore_value(["a"] * 255) == 255 and ignore_value(["a"] * 256) == 65_535


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "scans/mesh_aligned_0.05.ply").unlink(), "mesh_aligned_0.05.ply is missing"),
        (lambda f: (f / "scans/mesh_aligned_0.05.ply").write_text("ply"), "no triangles or is damaged"),
        (lambda f: (f / "scans/segments.json").write_text("{"), "segments.json is not valid JSON"),
        (lambda f: (f / "scans/segments.json").write_text('{"segIndices": [1]}'), "1 `segIndices` for 4 vertices"),
        (lambda f: (f / "scans/segments_anno.json").write_text("{}"), "has no `segGroups`"),
        (lambda f: (f / "scans/segments_anno.json").write_text('{"segGroups": [{}]}'), "a group lacks"),
        (
            lambda f: write_scans(f, [1, 2, 3, 4], [group(70_000, "chair", [1])]),
            "`objectId` is not between 0 and 65535",
        ),
    ],
)
def test_what_is_wrong_with_a_scan_is_named(tmp_path, damage, message):
    pytest.importorskip("open3d", reason="Open3D's system libraries are missing", exc_type=ImportError)
    scene = write_scans(tmp_path, [1, 2, 3, 4], [group(1, "chair", [1])])
    damage(tmp_path)
    with pytest.raises(InputError, match=message):
        read_annotated_mesh(scene)
