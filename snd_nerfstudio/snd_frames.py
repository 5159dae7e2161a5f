"""Nerfstudio's description of a dataset in the package's own terms, and some of it back for nerfstudio's viewer."""

from typing import Any

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from torch.utils.data import Dataset

from data_parsers.any_layout import described
from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.scenes.frames import Frames, Note, load_views, raise_it

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


def to_frames(outputs: DataparserOutputs) -> Frames:
    """Nerfstudio's description of a dataset in the package's conventions; here the dataset's poses change axes.

    Outputs of our own dataparsers name scenes, masks and depth in their metadata; those of any other one are taken as
    a single scene in the order of its file names.

    Raises:
        InputError: the cameras are not perspective ones, or there are none.
    """
    cameras = outputs.cameras
    count = len(outputs.image_filenames)
    if count == 0:
        raise InputError("The dataset has no frames.")
    perspective = (cameras.camera_type == CameraType.PERSPECTIVE.value).flatten().numpy()
    if not perspective.all():
        raise InputError(
            f"The cameras of {outputs.image_filenames[int(np.argmin(perspective))]} (and others) are not perspective "
            "ones: undistort the images to pinholes first, e.g. with ns-process-data or the dataset's own tool."
        )
    metadata = described(outputs)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3] = cameras.camera_to_worlds.double().numpy()
    intrinsics = np.tile(np.eye(3), (count, 1, 1))
    for place, values in (((0, 0), cameras.fx), ((1, 1), cameras.fy), ((0, 2), cameras.cx), ((1, 2), cameras.cy)):
        intrinsics[:, place[0], place[1]] = values.flatten().double().numpy()
    sizes = torch.stack([cameras.height.flatten(), cameras.width.flatten()], dim=1).numpy()
    distortion = None if cameras.distortion_params is None else cameras.distortion_params.double().numpy()
    return Frames(
        image_files=outputs.image_filenames,
        camera_to_worlds=poses @ OPENGL_TO_OPENCV,
        intrinsics=intrinsics,
        sizes=sizes,
        scene_index=np.asarray(metadata["scene_index"]),
        frame_order=np.asarray(metadata["frame_order"]),
        scene_names=tuple(metadata["scene_names"]),
        distortion=distortion,
        mask_files=metadata["instance_filenames"],
        depth_files=metadata["depth_filenames"],
        depth_scale=np.asarray(metadata["depth_scale"], dtype=np.float64),
    )


class SceneImages(Dataset):
    """The frames of one scene as nerfstudio's viewer and renderer want them; only these are decoded for the viewer.

    Args:
        frames: the dataset.
        indices: frames of the scene.
        cameras: nerfstudio's cameras of exactly these frames, scaled to ``size``.
        outputs: the dataparser's, for the scene box.
        size: height and width of the images.
        note: called with each frame that cannot be read; raises the error, or does not, and then the frame is grey.
    """

    def __init__(
        self,
        frames: Frames,
        indices: np.ndarray,
        cameras: Cameras,
        outputs: DataparserOutputs,
        size: tuple[int, int],
        note: Note = raise_it,
    ) -> None:
        self.cameras = cameras
        self.scene_box = outputs.scene_box
        self.metadata: dict[str, Any] = {}
        self.image_filenames = [frames.image_files[i] for i in indices]
        self._frames, self._indices, self._size, self._note = frames, indices, size, note

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """``image`` float ``[H, W, 3]`` in [0, 1]."""
        try:
            views = load_views(self._frames, [int(self._indices[item])], self._size, with_masks=False, with_depth=False)
        except BrokenFileError as error:
            self._note(error, "a picture of the viewer")
            return {"image_idx": item, "image": torch.full((*self._size, 3), 0.5)}
        return {"image_idx": item, "image": views.images[0].permute(1, 2, 0)}


def scene_images(
    frames: Frames,
    outputs: DataparserOutputs,
    scene: int,
    size: tuple[int, int],
    most: int,
    note: Note = raise_it,
) -> SceneImages:
    """At most ``most`` frames of a scene, spread evenly over its capture.

    Args:
        frames: the dataset.
        outputs: the dataparser's, of the same frames.
        scene: number of the scene.
        size: height and width to resize to.
        most: how many frames.
        note: called with each frame that cannot be read; raises the error, or does not, and then the frame is grey.
    """
    indices = np.flatnonzero(frames.scene_index == scene)
    indices = indices[np.argsort(frames.frame_order[indices], kind="stable")]
    indices = indices[np.unique(np.linspace(0, len(indices) - 1, most).round().astype(int))]
    cameras = outputs.cameras[torch.from_numpy(indices)]
    height, width = size
    cameras.fx = cameras.fx * width / cameras.width
    cameras.cx = cameras.cx * width / cameras.width
    cameras.fy = cameras.fy * height / cameras.height
    cameras.cy = cameras.cy * height / cameras.height
    cameras.width = torch.full_like(cameras.width, width)
    cameras.height = torch.full_like(cameras.height, height)
    cameras.distortion_params = None
    return SceneImages(frames, indices, cameras, outputs, size, note)
