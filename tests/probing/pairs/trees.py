"""Small data sets in the layouts that others publish, written from procedural rooms."""

import json

import numpy as np
from PIL import Image

from snd_nerfstudio.probing.pairs import RoomPairs


def write_scannet(root, pairs: RoomPairs):
    """ScanNet-1500 as LoFTR packages it; room 2 becomes scene0002_00, a view's place its frame number."""
    listed, intrinsics = [], {}
    for number, (room, first, second) in enumerate(pairs.chosen):
        views = pairs.rooms[room]
        scan = int(views.folder.name.split("_")[1])
        scene = f"scene{scan:04d}_00"
        listed.append([scan, 0, first, second])
        height, width = views.size
        intrinsics[scene] = np.diag([640 / width, 480 / height, 1.0]) @ views.intrinsics
        pair = pairs[number]
        for end, view in enumerate((first, second)):
            write_scannet_frame(root / scene, view, pair.images[end], pair.depths[end], views.camera_to_worlds[view])
    np.savez(root / "test.npz", name=np.array(listed))
    np.savez(root / "intrinsics.npz", **intrinsics)
    return root


def write_scannet_frame(folder, frame, image, depth, pose):
    for kind in ("color", "depth", "pose"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / "color" / f"{frame}.jpg", quality=95, subsampling=0)
    Image.fromarray(np.round(1000 * depth).astype(np.uint16)).save(folder / "depth" / f"{frame}.png")
    np.savetxt(folder / "pose" / f"{frame}.txt", pose, delimiter=" ")


def superglue_line(paths, matrices, pose, turns=(0, 0)):
    numbers = [*matrices[0].ravel(), *matrices[1].ravel(), *pose.ravel()]
    return " ".join([*paths, *map(str, turns), *(f"{number:.8f}" for number in numbers)])


def write_superglue(root, pairs: RoomPairs):
    """The list with ground truth, and the images as ScanNet's exporter names them, depth half as large."""
    lines = []
    for number, (room, first, second) in enumerate(pairs.chosen):
        views, pair = pairs.rooms[room], pairs[number]
        paths = []
        for end, view in enumerate((first, second)):
            scene = f"scene{int(views.folder.name.split('_')[1]):04d}_00"
            paths.append(f"scans_test/{scene}/sens/frame-{view:06d}.color.jpg")
            file = root / paths[-1]
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pair.images[end]).save(file, quality=95, subsampling=0)
            depth = np.round(1000 * pair.depths[end][::2, ::2]).astype(np.uint16)
            header = f"P5\n{depth.shape[1]} {depth.shape[0]}\n65535\n".encode()
            file.with_name(f"frame-{view:06d}.depth.pgm").write_bytes(header + depth.astype(">u2").tobytes())
        lines.append(superglue_line(paths, pair.intrinsics, pair.relative_pose))
    (root / "scannet_test_pairs_with_gt.txt").write_text("\n".join(lines) + "\n")
    return root


def quaternion_of(rotation):
    """(w, x, y, z) by scipy, independently of the package."""
    from scipy.spatial.transform import Rotation

    x, y, z, w = Rotation.from_matrix(rotation).as_quat()
    return [float(w), float(x), float(y), float(z)]


def write_navi(root, views, frames, object_name="ball_room", scene="wild_set", margin=(10, 20)):
    """A room as if it were an object: depth only within margins (rows, columns)."""
    folder = root / object_name / scene
    for kind in ("images", "depth"):
        (folder / kind).mkdir(parents=True)
    height, width = views.size
    entries = []
    for number, view in enumerate(frames):
        depth = views.depth(view)
        stored = np.zeros(depth.shape, np.uint16)
        inside = (slice(margin[0], height - margin[0]), slice(margin[1], width - margin[1]))
        stored[inside] = np.round(655.35 / depth[inside])
        Image.fromarray(views.image(view)).save(folder / "images" / f"{number:03d}.jpg", quality=95, subsampling=0)
        Image.fromarray(stored).save(folder / "depth" / f"{number:03d}.png")
        world_to_camera = np.linalg.inv(views.camera_to_worlds[view])
        camera = {
            "q": quaternion_of(world_to_camera[:3, :3]),
            "t": (1000 * world_to_camera[:3, 3]).tolist(),
            "focal_length": float(views.intrinsics[0, 0]),
            "camera_model": "pixel_5",
        }
        entries.append({
            "object_id": object_name, "camera": camera, "filename": f"{number:03d}.jpg", "scene_name": scene,
            "image_size": [height, width], "split": "train", "occluded": False,
        })  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(entries))
    return root
