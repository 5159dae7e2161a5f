"""Frames of procedural rooms, written in the layouts that real datasets are published in."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass
class RoomFrame:
    """What a room knows of one of its views, read with nothing of the package."""

    scene: int
    number: int
    folder: Path
    image: np.ndarray = field(init=False)
    millimetres: np.ndarray = field(init=False)
    normals: np.ndarray = field(init=False)
    semantics: np.ndarray = field(init=False)

    def __post_init__(self):
        self.image = np.asarray(Image.open(self.jpeg))
        self.millimetres = np.asarray(Image.open(self.folder / "depth" / f"{self.stem}.png")).astype(np.uint16)
        stored = np.asarray(Image.open(self.folder / "normals" / f"{self.stem}.png")).astype(np.float64)
        vectors = stored / 255 * 2 - 1
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        self.normals = np.where(stored.sum(axis=-1, keepdims=True) > 0, vectors / length, 0)
        self.semantics = np.asarray(Image.open(self.folder / "semantics" / f"{self.stem}.png"))

    @property
    def stem(self):
        return f"DSC{self.number:05d}"

    @property
    def jpeg(self):
        return self.folder / "images" / f"{self.stem}.JPG"

    def classes(self, count):
        """Its semantics as one of so many classes; 255 = none."""
        return np.where(self.semantics == 255, 255, self.semantics % count).astype(np.uint8)


def room_frames(rooms, every=30):
    """Some frames of every room, room after room."""
    folders = sorted((rooms / "scenes").iterdir())
    return [
        RoomFrame(scene, number, folder)
        for scene, folder in enumerate(folders)
        for number in range(1, len(list((folder / "images").iterdir())) + 1, every)
    ]


def sized(array, height, width):
    """An array enlarged or cut by repeating pixels."""
    rows = np.arange(height) * array.shape[0] // height
    columns = np.arange(width) * array.shape[1] // width
    return array[rows][:, columns]


def save(array, file, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)


def copy(source, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, file)


def shifted(classes):
    """As datasets store it that keep 0 for what has no class."""
    return np.where(classes == 255, 0, classes + 1).astype(np.uint8)


def hexadecimal(scene):
    return f"{scene + 1:010x}"


def write_scannetpp(rooms, root):
    """The rooms' own split: two to train on, one to test on."""
    lines = {"train": [], "val": []}
    for frame in room_frames(rooms):
        part, short = ("training", "train") if frame.scene < 2 else ("validation", "val")
        scene = hexadecimal(frame.scene)
        image = f"images/{part}/{scene}/{frame.stem}.JPG"
        copy(frame.jpeg, root / image)
        save(shifted(frame.classes(100)), root / "annotations" / part / scene / f"{frame.stem}.png")
        save(frame.millimetres, root / "depth" / scene / f"{frame.stem}.png")
        lines[short].append(f"/{image} /depth/{scene}/{frame.stem}.png 518.8579")
    for short, text in lines.items():
        # lists come in any order, and with frames that have no depth
        text = [*reversed(text), "/images/none.JPG None 518.8579", ""]
        (root / f"scannetpp_{short}.txt").write_text("\n".join(text))
    return root


def write_scannet_probe(rooms, root):
    """Every third frame to test on, whatever its scene."""
    lines = {"train": [], "test": []}
    for place, frame in enumerate(room_frames(rooms, every=20)):
        part = "test" if place % 3 == 2 else "train"
        name = f"scene{frame.scene:04d}_{frame.number % 2:02d}_{frame.number:06d}"
        copy(frame.jpeg, root / part / "color" / f"{name}.jpg")
        save(shifted(frame.classes(40)), root / part / "label" / f"{name}.png")
        save(frame.millimetres, root / "depth" / f"{name}.png")
        lines[part].append(f"{part}/color/{name}.jpg depth/{name}.png")
    for part, text in lines.items():
        (root / f"{part}_index.txt").write_text("\n".join(text))
    return root


def write_scannet_frames(rooms, root, every=6, colour_factor=1):
    """`scannet_frames_25k`: two scans of each room; colour can be larger than depth and labels, as it is there."""
    for frame in room_frames(rooms, every):
        scan = root / f"scene{frame.scene:04d}_{(frame.number // every) % 2:02d}"
        stem = f"{100 * frame.number:06d}"
        if colour_factor == 1:
            copy(frame.jpeg, scan / "color" / f"{stem}.jpg")
        else:
            larger = np.kron(frame.image, np.ones((colour_factor, colour_factor, 1), np.uint8))
            save(larger, scan / "color" / f"{stem}.jpg", quality=100, subsampling=0)
        save(frame.millimetres, scan / "depth" / f"{stem}.png")
        save(shifted(frame.classes(40)), scan / "label" / f"{stem}.png")
        (scan / "pose").mkdir(exist_ok=True)
        (scan / "pose" / f"{stem}.txt").write_text("1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
    return root


def write_nyu_depth(rooms, root, scale=1):
    """`data_depth`, in millimetres times `scale`."""
    for part, scenes in (("train", (0, 1)), ("test", (2,))):
        lines = []
        for frame in room_frames(rooms):
            if frame.scene in scenes:
                name = f"bedroom_{frame.scene:04d}/rgb_{frame.number:05d}"
                save(frame.image, root / "data_depth" / f"{name}.png")
                depth = np.minimum(frame.millimetres.astype(np.int64) * scale, 65535).astype(np.uint16)
                save(depth, root / "data_depth" / f"{name.replace('rgb', 'sync_depth')}.png")
                lines.append(f"/{name}.png /{name.replace('rgb', 'sync_depth')}.png 518.8579")
        (root / "data_depth" / f"nyu_{part}.txt").write_text("\n".join(lines))
    return root


def write_nyu_semantics(rooms, root, label_name="nyu_rgb_{:04d}.png"):
    for place, frame in enumerate(room_frames(rooms)):
        part = "train" if frame.scene < 2 else "test"
        folder = root / "data_sem"
        save(frame.image, folder / f"nyu_{part}_rgb" / f"nyu_rgb_{place + 1:04d}.png")
        labels = shifted(frame.classes(13))
        save(labels, folder / f"nyuv2_{part}_class13" / label_name.format(place + 1))
    return root


def write_geonet(rooms, root, padded=(481, 641)):
    """`nyu_geonet`: MATLAB 5 files whose images have twice their mean subtracted."""
    from scipy.io import savemat

    frames = room_frames(rooms)[:4]
    (root / "nyu_geonet").mkdir(parents=True)
    for frame in frames:
        image = sized(frame.image, *padded).astype(np.float32) - 2 * np.array([122.175, 116.169, 103.508], np.float32)
        metres = sized(frame.millimetres, *padded) / np.float32(1000)
        normals = sized(frame.normals, *padded).astype(np.float32)
        content = {"img": image, "depth": metres, "norm": normals}
        savemat(root / "nyu_geonet" / geonet_name(frame), content, do_compression=True)
    return frames


def geonet_name(frame):
    return f"bedroom_{frame.scene:04d}-1316653580.{frame.number:06d}-1316138413.mat"


def write_labelled(rooms, root, normals="png", tested=(1, 3), lists="json"):
    """`nyu_depth_v2_labeled.mat` with four images, of which those numbers (from 0) are tested."""
    import h5py

    frames = room_frames(rooms)[:4]
    root.mkdir(parents=True, exist_ok=True)
    images = np.stack([sized(frame.image, 480, 640) for frame in frames])
    depths = np.stack([sized(frame.millimetres, 480, 640) for frame in frames]).astype(np.float32) / 1000
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        # MATLAB's 480 x 640 x 3 x n, stored column by column
        file["images"] = images.transpose(0, 3, 2, 1)
        file["rawDepths"] = depths.transpose(0, 2, 1)
    vectors = np.stack([sized(frame.normals, 480, 640) for frame in frames])
    if normals == "png":
        for number in tested:
            stored = np.round(255 * (vectors[number] / 2 + 0.5)).astype(np.uint8)
            save(stored, root / "nyu_normals_gt" / "test" / f"{number + 1:05d}.png")
    elif normals == "npy":
        np.save(root / "all_normals.npy", vectors.astype(np.float32))
    if lists == "json":
        rows = [{"img": f"{number + 1:04d}_image.jpg"} for number in reversed(tested)]
        (root / "test_SN40.json").write_text(json.dumps(rows))
    elif lists == "mat":
        from scipy.io import savemat

        savemat(root / "splits.mat", {"testNdxs": np.array([[number + 1] for number in tested])})
    return frames


def write_ade20k(rooms, root, table=True):
    for place, frame in enumerate(room_frames(rooms)):
        part, name = ("training", "train") if frame.scene < 2 else ("validation", "val")
        copy(frame.jpeg, root / "images" / part / f"ADE_{name}_{place:08d}.jpg")
        save(shifted(frame.classes(150)), root / "annotations" / part / f"ADE_{name}_{place:08d}.png")
    if table:
        rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", "1\t0.1576\t11664\t1172\t1\twall"]
        rows += [f"{index}\t0.01\t1\t1\t0\tthing {index}, something {index}" for index in range(2, 151)]
        (root / "objectInfo150.txt").write_text("\n".join(rows))
    return root


def write_voc2012(rooms, root):
    """Labels are palette images, as they are there."""
    for part in ("train", "val"):
        names = []
        for frame in room_frames(rooms):
            if (frame.scene < 2) == (part == "train"):
                names.append(f"2007_{frame.scene:03d}{frame.number:03d}")
                copy(frame.jpeg, root / "JPEGImages" / f"{names[-1]}.jpg")
                labels = Image.fromarray(frame.classes(21), mode="P")
                labels.putpalette([(37 * index) % 256 for index in range(768)])
                (root / "SegmentationClass").mkdir(exist_ok=True)
                labels.save(root / "SegmentationClass" / f"{names[-1]}.png")
        (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return root


def write_kitti(rooms, root, layout="lists", size=(352, 1216), every=30):
    """KITTI's selection in one of three layouts; depth in 1/256 m, of what are 3 m in a room 12 m here."""
    folders = ("image", "groundtruth_depth") if layout == "download" else ("images", "depth")
    where = root / "val_selection_cropped" if layout == "download" else root
    lines = {"train": [], "val": []}
    for place, frame in enumerate(room_frames(rooms, every)):
        drive = f"2011_09_26_drive_{frame.scene:04d}_sync"
        image = f"{drive}_image_{frame.number:010d}_image_02.png"
        depth = image.replace("sync_image", "sync_groundtruth_depth") if layout == "download" else image
        save(sized(frame.image, *size), where / folders[0] / image)
        save(sized(kitti_steps(frame), *size), where / folders[1] / depth)
        # the released lists give paths of which the last part alone is used
        lines["val" if place % 3 == 2 else "train"].append(f"/some/where/{image} else/{depth} 721.5377")
    if layout == "lists":
        for part, text in lines.items():
            (root / f"kitti_{part}.txt").write_text("\n".join(text))
    return root


def kitti_steps(frame):
    """Four times the depth of a room, in steps of 1/256 m."""
    return np.round(frame.millimetres / 1000 * 4 * 256).astype(np.uint16)
