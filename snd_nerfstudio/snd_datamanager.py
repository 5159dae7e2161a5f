"""From a dataset on disk to view triplets and Gaussians."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional, Tuple, Type, Union

import numpy as np
import torch
from nerfstudio.cameras.cameras import Cameras, CameraType
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import DataManager, DataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.utils.rich_utils import CONSOLE
from torch.utils.data import Dataset

from data_parsers.multi_scene import held_out_tail, natural_key
from data_parsers.nerfstudio_scenes import NerfstudioScenesConfig
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.reconstruction import Reconstructor
from snd_nerfstudio.reconstruction.depth import DepthReconstructor
from snd_nerfstudio.scenes.frames import Frames, check_frames, load_views
from snd_nerfstudio.scenes.prefetch import Prefetcher
from snd_nerfstudio.scenes.triplets import NoTripletError, TargetView, TripletIndex, TripletSampler
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.splatting import Gaussians

VIEWER_FRAMES = 32
RECONSTRUCTORS: dict[str, Callable[[], Reconstructor]] = {"depth": DepthReconstructor}
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@dataclass
class SnDDataManagerConfig(DataManagerConfig):
    """View triplets from many scenes, and the frozen reconstructor that turns their contexts into Gaussians."""

    _target: Type = field(default_factory=lambda: SnDDataManager)
    """Target class to instantiate."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=ScanNetppScenesConfig)
    """Layout of the dataset on disk."""
    image_size: Optional[Tuple[int, int]] = None
    """Height and width every frame is resized to; multiples of 112 fit every network exactly. None: by the profile."""
    min_context_gap: Optional[int] = None
    """Fewest frames between the two contexts' positions in the capture. None: by the profile (8)."""
    max_context_gap: Optional[int] = None
    """Most frames between the two contexts' positions in the capture. None: by the profile (12)."""
    target_view: Optional[TargetView] = None
    """Where the target lies: strictly `between` the contexts, `between_or_context`, or at a `context` (ablation E).
    None: by the profile (between)."""
    all_scenes: Optional[bool] = None
    """Train on the held-out scenes too, as the released code does. None: by the profile."""
    masks: Literal["stored", "none"] = "stored"
    """Instance masks: the dataset's own, or none (plain bilinear lifting, no blending)."""
    reconstructor: Literal["depth"] = "depth"
    """What turns the context views into Gaussians: their depth maps."""
    triplets_per_step: int = 1
    """Triplets in one training step (per process)."""
    eval_triplets: int = 16
    """How many held-out triplets are evaluated, spread over the held-out scenes."""
    workers: int = 2
    """Threads that decode and resize ahead of training."""
    prefetch: int = 4
    """Training steps kept ready in advance."""


class SceneImages(Dataset):
    """The frames of one scene as nerfstudio's viewer and renderer want them; only these are decoded for the viewer.

    Args:
        frames: the dataset.
        indices: frames of the scene.
        cameras: nerfstudio's cameras of exactly these frames, scaled to ``size``.
        outputs: the dataparser's, for the scene box.
        size: height and width of the images.
    """

    def __init__(
        self, frames: Frames, indices: np.ndarray, cameras: Cameras, outputs: DataparserOutputs, size: tuple[int, int]
    ) -> None:
        self.cameras = cameras
        self.scene_box = outputs.scene_box
        self.metadata: dict[str, Any] = {}
        self.image_filenames = [frames.image_files[i] for i in indices]
        self._frames, self._indices, self._size = frames, indices, size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, item: int) -> dict[str, Any]:
        """``image`` float ``[H, W, 3]`` in [0, 1]."""
        views = load_views(self._frames, [int(self._indices[item])], self._size, with_masks=False, with_depth=False)
        return {"image_idx": item, "image": views.images[0].permute(1, 2, 0)}


def to_frames(outputs: DataparserOutputs) -> Frames:
    """Nerfstudio's description of a dataset in the package's conventions; here the dataset's poses change axes.

    Outputs of our own dataparsers name scenes, masks and depth in their metadata; those of any other one are taken as
    a single scene in the order of its file names.

    Raises:
        InputError: the cameras are not perspective ones, or there are none.
    """
    cameras, metadata = outputs.cameras, outputs.metadata
    count = len(outputs.image_filenames)
    if count == 0:
        raise InputError("The dataset has no frames.")
    if not (cameras.camera_type == CameraType.PERSPECTIVE.value).all():
        raise InputError(
            f"The cameras of {outputs.image_filenames[0]} (and others) are not perspective ones: undistort the images "
            "to pinholes first, e.g. with ns-process-data or the dataset's own tool."
        )
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3] = cameras.camera_to_worlds.double().numpy()
    intrinsics = np.tile(np.eye(3), (count, 1, 1))
    for place, values in (((0, 0), cameras.fx), ((1, 1), cameras.fy), ((0, 2), cameras.cx), ((1, 2), cameras.cy)):
        intrinsics[:, place[0], place[1]] = values.flatten().double().numpy()
    sizes = torch.stack([cameras.height.flatten(), cameras.width.flatten()], dim=1).numpy()
    distortion = None if cameras.distortion_params is None else cameras.distortion_params.double().numpy()
    unit = float(metadata.get("depth_unit_scale_factor", 1e-3)) * outputs.dataparser_scale
    order = np.empty(count, dtype=np.int64)
    order[_by_name(outputs)] = np.arange(count)
    return Frames(
        image_files=outputs.image_filenames,
        camera_to_worlds=poses @ OPENGL_TO_OPENCV,
        intrinsics=intrinsics,
        sizes=sizes,
        scene_index=np.asarray(metadata.get("scene_index", np.zeros(count, dtype=np.int64))),
        frame_order=np.asarray(metadata.get("frame_order", order)),
        scene_names=tuple(metadata.get("scene_names", [outputs.image_filenames[0].parent.name])),
        distortion=distortion,
        mask_files=metadata.get("instance_filenames"),
        depth_files=metadata.get("depth_filenames"),
        depth_scale=np.asarray(metadata.get("depth_scale", np.full(count, unit)), dtype=np.float64),
    )


def _by_name(outputs: DataparserOutputs) -> np.ndarray:
    """Frame numbers in the natural order of their file names."""
    names = [str(file) for file in outputs.image_filenames]
    return np.array(sorted(range(len(names)), key=lambda frame: natural_key(names[frame])), dtype=np.int64)


def _subset(outputs: DataparserOutputs, chosen: np.ndarray) -> DataparserOutputs:
    """Some frames of a foreign dataparser's single scene."""
    metadata = dict(outputs.metadata)
    for name in ("depth_filenames", "instance_filenames"):
        if metadata.get(name) is not None:
            metadata[name] = [metadata[name][i] for i in chosen]
    return DataparserOutputs(
        image_filenames=[outputs.image_filenames[i] for i in chosen],
        cameras=outputs.cameras[torch.from_numpy(chosen)],
        scene_box=outputs.scene_box,
        metadata=metadata,
        dataparser_transform=outputs.dataparser_transform,
        dataparser_scale=outputs.dataparser_scale,
    )


class SnDDataManager(DataManager):
    """Reads the dataset, draws triplets, loads them in the background and reconstructs their Gaussians.

    Every field that a profile may decide must be resolved (``snd_nerfstudio.profiles.resolve``) before.

    Args:
        config: resolved config.
        device: where triplets are moved to.
        test_mode: nerfstudio's; both splits are always known, nothing is decoded before it is needed.
        world_size: number of processes.
        local_rank: of this process; its triplets differ from the others'.
        seed: of the triplets.
    """

    config: SnDDataManagerConfig

    def __init__(
        self,
        config: SnDDataManagerConfig,
        device: Union[torch.device, str] = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        world_size: int = 1,
        local_rank: int = 0,
        seed: int = 42,
        **kwargs: Any,
    ) -> None:
        torch.nn.Module.__init__(self)  # nerfstudio's own constructor would set up pixel samplers
        assert config.image_size is not None and config.target_view is not None
        assert config.min_context_gap is not None and config.max_context_gap is not None
        self.config = config
        self.device = device
        self.rank = local_rank
        self.seed = seed
        self.size: tuple[int, int] = config.image_size
        self._check_config()
        self.includes_time = False
        if config.data is not None:
            config.dataparser.data = Path(config.data)
        self.reconstructor: Reconstructor = RECONSTRUCTORS[config.reconstructor]()
        train_outputs, eval_outputs = self._parse()
        self.train_dataparser_outputs = train_outputs
        self.train_frames, self.triplets = self._prepare(train_outputs)
        self._report()
        self.eval_frames: Optional[Frames] = None
        self._eval_indices: list[TripletIndex] = []
        try:
            self.eval_frames, eval_sampler = self._prepare(eval_outputs)
            self._eval_indices = eval_sampler.spread(config.eval_triplets)
        except NoTripletError as error:
            CONSOLE.log(f"[yellow]Nothing is held out for evaluation: {error}")
        self.train_dataset = self._scene_images(self.train_frames, train_outputs, self.shown_scene)  # type: ignore
        self.eval_dataset = None
        if self._eval_indices and self.eval_frames is not None:
            self.eval_dataset = self._scene_images(self.eval_frames, eval_outputs, 0)  # type: ignore
        self._prefetcher = Prefetcher(self._load_step, config.workers, config.prefetch)

    def _check_config(self) -> None:
        if min(self.size) < 14:
            raise InputError(f"--pipeline.datamanager.image-size {self.size}: a side is shorter than one patch.")
        for name in ("triplets_per_step", "workers", "prefetch", "eval_triplets"):
            if getattr(self.config, name) < 1:
                raise InputError(f"--pipeline.datamanager.{name.replace('_', '-')} must be at least 1.")

    def _parse(self) -> tuple[DataparserOutputs, DataparserOutputs]:
        root = self.config.dataparser.data
        if not root.exists():
            raise InputError(f"--data {root}: no such file or folder.")
        parser = self.config.dataparser.setup()
        if isinstance(self.config.dataparser, (ScanNetppScenesConfig, NerfstudioScenesConfig)):
            if self.config.all_scenes:
                CONSOLE.log("[yellow]Training on all scenes: the held-out metrics are then of scenes seen in training.")
            train = parser.get_dataparser_outputs(split="all" if self.config.all_scenes else "train")
            return train, parser.get_dataparser_outputs(split="val")
        train = parser.get_dataparser_outputs(split="train")
        # another parser's split takes every n-th frame; triplets need neighbours, so its training frames are cut here
        order = _by_name(train)
        if len(order) < 3:
            raise InputError(f"--data {root}: {len(order)} training frames; a triplet needs at least three.")
        tail = held_out_tail(len(order))
        kept = order if self.config.all_scenes else order[: len(order) - tail]
        return _subset(train, kept), _subset(train, order[len(order) - tail :])

    def _prepare(self, outputs: DataparserOutputs) -> tuple[Frames, TripletSampler]:
        config = self.config
        frames = to_frames(outputs)
        check_frames(frames, self.with_masks, self.reconstructor.needs_depth)
        sampler = TripletSampler(
            frames.scene_index,
            frames.frame_order,
            frames.camera_to_worlds[:, :3, 3],
            frames.scene_names,
            config.min_context_gap,  # type: ignore
            config.max_context_gap,  # type: ignore
            config.target_view,  # type: ignore
        )
        return frames, sampler

    def _report(self) -> None:
        sampler, frames = self.triplets, self.train_frames
        CONSOLE.log(
            f"Training on {len(frames)} frames of {len(sampler.usable_scenes)} scenes, {sampler.num_pairs} context "
            f"pairs, resized to {self.size[0]}x{self.size[1]}."
        )
        if sampler.skipped_scenes:
            CONSOLE.log(f"[yellow]Too short for a triplet, left out: {', '.join(sampler.skipped_scenes[:10])}")
        if sampler.zero_baseline_pairs:
            CONSOLE.log(f"[yellow]{sampler.zero_baseline_pairs} context pairs without baseline are left out.")
        stretch = (self.size[1] / self.size[0]) / (frames.sizes[:, 1] / frames.sizes[:, 0])
        if max(stretch.max(), 1 / stretch.min()) > 1.05:
            height, width = (int(n) for n in frames.sizes[0])
            fitting = max(round(self.size[1] * height / width / 14), 1) * 14
            CONSOLE.log(
                f"[yellow]Frames of {height}x{width} are stretched to {self.size[0]}x{self.size[1]}; "
                f"--pipeline.datamanager.image-size {fitting} {self.size[1]} would keep their shape."
            )

    @property
    def with_masks(self) -> bool:
        """Whether instance masks are read."""
        return self.config.masks == "stored"

    @property
    def shown_scene(self) -> int:
        """The training scene that the viewer shows."""
        return int(self.triplets.usable_scenes[0])

    def _scene_images(self, frames: Frames, outputs: DataparserOutputs, scene: int) -> SceneImages:
        indices = np.flatnonzero(frames.scene_index == scene)
        indices = indices[np.argsort(frames.frame_order[indices], kind="stable")]
        indices = indices[np.unique(np.linspace(0, len(indices) - 1, VIEWER_FRAMES).round().astype(int))]
        cameras = outputs.cameras[torch.from_numpy(indices)]
        height, width = self.size
        cameras.fx = cameras.fx * width / cameras.width
        cameras.cx = cameras.cx * width / cameras.width
        cameras.fy = cameras.fy * height / cameras.height
        cameras.cy = cameras.cy * height / cameras.height
        cameras.width = torch.full_like(cameras.width, width)
        cameras.height = torch.full_like(cameras.height, height)
        cameras.distortion_params = None
        return SceneImages(frames, indices, cameras, outputs, self.size)

    def _load(self, frames: Frames, index: TripletIndex) -> ViewTriplet:
        def views(indices: list[int], with_depth: bool) -> Views:
            return load_views(frames, indices, self.size, self.with_masks, with_depth)

        return ViewTriplet(
            context=views(list(index.context), self.reconstructor.needs_depth),
            target=views([index.target], with_depth=False),
            scene=frames.scene_names[int(frames.scene_index[index.target])],
        )

    def _load_step(self, step: int) -> list[ViewTriplet]:
        draws = [self.triplets.draw(self.seed, step, self.rank, item) for item in range(self.config.triplets_per_step)]
        return [self._load(self.train_frames, draw) for draw in draws]

    def next_train(self, step: int) -> list[ViewTriplet]:  # type: ignore[override]
        """The triplets of a training step, on the device: a function of (seed, step, rank) alone."""
        return [triplet.to(self.device) for triplet in self._prefetcher.get(step)]

    @property
    def num_eval_triplets(self) -> int:
        """How many held-out triplets there are; 0 if nothing could be held out."""
        return len(self._eval_indices)

    def eval_triplet(self, number: int) -> ViewTriplet:
        """A held-out triplet, on the device."""
        assert self.eval_frames is not None
        return self._load(self.eval_frames, self._eval_indices[number]).to(self.device)

    def train_triplets(self, count: int) -> list[ViewTriplet]:
        """At most ``count`` training triplets, spread over scenes and paths, on the device."""
        return [self._load(self.train_frames, index).to(self.device) for index in self.triplets.spread(count)]

    @cached_property
    def shown_triplet(self) -> ViewTriplet:
        """The training triplet whose Gaussians the viewer shows: one in the middle of the shown scene."""
        (triplet,) = self.train_triplets(1)
        return triplet

    def reconstruct(self, context: Views) -> Gaussians:
        """Gaussians of a pair of context views, without gradient."""
        with torch.no_grad():
            return self.reconstructor(context)

    def get_train_rays_per_batch(self) -> int:
        """Target pixels per step: what nerfstudio paces the viewer by."""
        return self.config.triplets_per_step * self.size[0] * self.size[1]

    def get_datapath(self) -> Path:
        """Where the dataset is."""
        return self.config.dataparser.data

    def get_training_callbacks(
        self, training_callback_attributes: TrainingCallbackAttributes
    ) -> list[TrainingCallback]:
        """None."""
        return []

    def get_param_groups(self) -> dict[str, list[torch.nn.Parameter]]:
        """Nothing here is trained."""
        return {}
