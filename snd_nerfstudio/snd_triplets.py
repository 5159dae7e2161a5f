"""From a dataset on disk to view triplets: what every method of this package trains on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Optional, Tuple, Type, Union

import numpy as np
import torch
from nerfstudio.configs.dataparser_configs import AnnotatedDataParserUnion
from nerfstudio.data.datamanagers.base_datamanager import DataManager, DataManagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.engine.callbacks import TrainingCallback, TrainingCallbackAttributes
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import track

from data_parsers.any_layout import parse_sides
from data_parsers.multi_scene import MultiSceneConfig
from data_parsers.scannetpp import ScanNetppScenesConfig
from snd_nerfstudio.errors import BrokenFileError, InputError
from snd_nerfstudio.reconstruction.mvsplat.checks import MAX_ANGLE, MIN_BASELINE
from snd_nerfstudio.scenes.faults import Faults, OnError
from snd_nerfstudio.scenes.fingerprint import dataset_fingerprint
from snd_nerfstudio.scenes.frame_cache import FrameCache
from snd_nerfstudio.scenes.frames import Frames, check_frames, depth_bounds, load_views
from snd_nerfstudio.scenes.masks.maker import MaskMaker, MaskSource, build_mask_maker, mask_folder
from snd_nerfstudio.scenes.masks.sam import SamSettings
from snd_nerfstudio.scenes.masks.superpixels import SuperpixelSettings
from snd_nerfstudio.scenes.overlap import scene_geometry
from snd_nerfstudio.scenes.overlap_triplets import OverlapSampler, PairLimits
from snd_nerfstudio.scenes.prefetch import Prefetcher
from snd_nerfstudio.scenes.triplets import (
    NO_BASELINE,
    NoTripletError,
    SceneSampler,
    TargetView,
    TripletIndex,
    TripletSampler,
    growing_gap,
)
from snd_nerfstudio.scenes.views import Views, ViewTriplet
from snd_nerfstudio.snd_frames import SceneImages, scene_images, to_frames

VIEWER_FRAMES = 32
"""Frames of a scene that the viewer draws."""
VIEWER_TRIPLETS = 16
"""Triplets of a scene that the viewer offers."""
MATCHING_ANGLE = 90.0
"""Degrees between the contexts' viewing directions beyond which they are not matched with each other."""


@dataclass
class TripletDataManagerConfig(DataManagerConfig):
    """View triplets from many scenes."""

    _target: Type = field(default_factory=lambda: TripletDataManager)
    """Target class to instantiate."""
    dataparser: AnnotatedDataParserUnion = field(default_factory=ScanNetppScenesConfig)
    """Layout of the dataset on disk."""
    image_size: Optional[Tuple[int, int]] = None
    """Height and width every frame is resized to; multiples of 112 fit every network exactly. None: by the profile."""
    min_context_gap: Optional[int] = None
    """Fewest frames between the two contexts' positions in the capture. None: by the profile (8)."""
    max_context_gap: Optional[int] = None
    """Most frames between the two contexts' positions in the capture. None: by the profile (12)."""
    initial_max_context_gap: Optional[int] = None
    """Largest gap at step 0; it grows evenly to max-context-gap over gap-warmup-steps. None: max-context-gap."""
    gap_warmup_steps: int = 0
    """Steps until the largest gap is max-context-gap, from initial-max-context-gap on."""
    max_context_angle: Optional[float] = None
    """Most degrees between the contexts' viewing directions; pairs beyond are left out. None: 90 where the contexts are
    matched with each other or chosen by overlap, no limit elsewhere."""
    pairs: Literal["gap", "overlap"] = "gap"
    """How contexts are chosen: by their gap in the capture, or by their overlap, for frames in no useful order."""
    min_overlap: float = 0.3
    """With pairs by overlap: smallest share of either context that the other one sees too."""
    max_overlap: float = 0.8
    """With pairs by overlap: largest such share; frames that show nearly the same teach little."""
    min_context_baseline: Optional[float] = None
    """With pairs by overlap: shortest distance between the contexts' cameras, world units. None: just not the same
    place."""
    max_context_baseline: Optional[float] = None
    """With pairs by overlap: longest distance between the contexts' cameras, world units. None: no limit."""
    target_view: Optional[TargetView] = None
    """Where the target lies: strictly `between` the contexts, `between_or_context`, or at a `context` (ablation E).
    None: by the profile (between)."""
    all_scenes: Optional[bool] = None
    """Train on the held-out scenes too, as the released code does. None: by the profile."""
    masks: MaskSource = "stored"
    """Instance masks: the dataset's own, made with SAM, made of superpixels, or none (plain bilinear lifting, no
    blending)."""
    superpixels: SuperpixelSettings = SuperpixelSettings()  # as a default of the class old runs find it too
    """Of --pipeline.datamanager.masks superpixel."""
    sam: SamSettings = SamSettings()
    """Of --pipeline.datamanager.masks sam."""
    mask_cache: Optional[Path] = None
    """Folder that keeps the masks that are made, by the content of the images and the settings. None: .snd_masks in the
    dataset's folder. snd-data masks fills it ahead of training."""
    near: Optional[float] = None
    """Smallest depth that MVSplat looks for, world units. None: of the dataset, if `bounds` is scene, or else what the
    weights were trained with (released ones: 1; random ones: --pipeline.model.depth-range)."""
    far: Optional[float] = None
    """Largest depth that MVSplat looks for, world units. None: as for near (released ones: 100)."""
    bounds: Literal["checkpoint", "scene"] = "checkpoint"
    """Where near and far come from if they are not given: `scene` reads them off the dataset's depth maps."""
    triplets_per_step: int = 1
    """Triplets in one training step (per process)."""
    triplet_pool: Optional[int] = None
    """Draw all triplets of the training from a fixed list of this many (per process), epoch by epoch in another order;
    the list is drawn at random and may hold a triplet twice. None: new ones at every step."""
    eval_triplets: int = 16
    """How many held-out triplets are evaluated, spread over the held-out scenes."""
    on_error: OnError = "raise"
    """A file that is missing or damaged: `raise` ends the run and names it; `skip` leaves out the triplets it belongs
    to, counts them and names the file; nothing takes their place."""
    changed_data: Literal["raise", "warn"] = "raise"
    """On resuming a run whose dataset has changed since: stop, or warn and go on."""
    frame_cache: Optional[Path] = None
    """Folder that keeps frames as they are trained on: 0.9 MB each at 448 x 672, read in a fraction of the time that
    decoding takes. None: nothing is kept."""
    frame_cache_limit: float = 50.0
    """Most gigabytes that the folder may hold; what comes later is not kept."""
    workers: int = 2
    """Threads that decode and resize ahead of training."""
    prefetch: int = 4
    """Training steps kept ready in advance."""


class TripletDataManager(DataManager):
    """Reads the dataset, draws triplets and loads them in the background.

    Every field that a profile may decide must be resolved (``snd_nerfstudio.profiles.resolve``) before.

    Args:
        config: resolved config.
        device: where triplets are moved to.
        test_mode: nerfstudio's; both splits are always known, nothing is decoded before it is needed.
        world_size: number of processes.
        local_rank: of this process; its triplets differ from the others'.
        seed: of the triplets.
    """

    config: TripletDataManagerConfig

    def __init__(
        self,
        config: TripletDataManagerConfig,
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
        self._check_gap_growth()
        self.includes_time = False
        if config.data is not None:
            config.dataparser.data = Path(config.data)
        self.faults = Faults(config.on_error, CONSOLE.log)
        train_outputs, eval_outputs = self._parse()
        self.train_dataparser_outputs = train_outputs
        folder = mask_folder(config.mask_cache, config.dataparser.data)
        self.mask_maker: Optional[MaskMaker] = build_mask_maker(
            config.masks, config.superpixels, config.sam, folder, CONSOLE.log
        )
        self.frame_cache: Optional[FrameCache] = None
        if config.frame_cache is not None:
            self.frame_cache = FrameCache(config.frame_cache, config.frame_cache_limit * 1e9, CONSOLE.log)
        self.train_frames, self.triplets = self._prepare(train_outputs)
        self._report()
        self.eval_frames: Optional[Frames] = None
        self.eval_indices: list[TripletIndex] = []
        """The held-out triplets."""
        try:
            self.eval_frames, eval_sampler = self._prepare(eval_outputs)
            self.eval_indices = eval_sampler.spread(config.eval_triplets)
        except NoTripletError as error:
            CONSOLE.log(f"[yellow]Nothing is held out for evaluation: {error}")
        self.train_dataset = self.scene_images(self.shown_scenes[0])  # type: ignore
        self.eval_dataset = None
        if self.eval_indices and self.eval_frames is not None:
            self.eval_dataset = scene_images(
                self.eval_frames, eval_outputs, 0, self.size, VIEWER_FRAMES, self.faults.note
            )  # type: ignore
        self._prefetcher = Prefetcher(self._load_step, config.workers, config.prefetch)

    # ------------------------------------------------------------------ what a method asks for

    @property
    def needs_depth(self) -> bool:
        """Whether training reads the contexts' depth maps, so that every frame must have one."""
        return False

    @property
    def needs_overlap(self) -> bool:
        """Whether the contexts are matched with each other, so that they must look in similar directions."""
        return False

    @property
    def targets_per_pair(self) -> int:
        """Target views of each pair of contexts in a training step."""
        return 1

    @cached_property
    def depth_range(self) -> tuple[Optional[float], Optional[float]]:
        """Near and far of the plane sweep in world units, each None where neither flags nor bounds say.

        Raises:
            InputError: they are out of order, or the scene's bounds are asked for and there is no depth.
        """
        near, far = self.config.near, self.config.far
        if self.config.bounds == "scene" and (near is None or far is None):
            lowest, highest = depth_bounds(self.train_frames, note=self.faults.note)
            near, far = lowest if near is None else near, highest if far is None else far
            CONSOLE.log(f"Depths in this dataset: near {near:.2f}, far {far:.2f}.")
        if (near is not None and near <= 0) or (near is not None and far is not None and far <= near):
            raise InputError(
                f"--pipeline.datamanager.near {near} and --pipeline.datamanager.far {far}: 0 < near < far is needed."
            )
        return near, far

    @property
    def with_masks(self) -> bool:
        """Whether views have instance masks, read or made."""
        return self.config.masks != "none"

    @property
    def max_context_angle(self) -> Optional[float]:
        """Most degrees between the contexts' viewing directions, or None."""
        if self.config.max_context_angle is None and (self.needs_overlap or self.config.pairs == "overlap"):
            return MATCHING_ANGLE
        return self.config.max_context_angle

    @property
    def min_baseline(self) -> float:
        """Shortest distance between the contexts' cameras, world units."""
        needed = MIN_BASELINE * min(self.config.near or 1, 1) if self.needs_overlap else NO_BASELINE
        given = self.config.min_context_baseline
        return needed if given is None else max(given, needed)

    def max_context_gap(self, step: int) -> int:
        """The largest gap between contexts that a training step may draw."""
        initial, final = self.config.initial_max_context_gap, self.config.max_context_gap
        assert final is not None
        return final if initial is None else growing_gap(step, initial, final, self.config.gap_warmup_steps)

    # ------------------------------------------------------------------ setting up

    def _check_config(self) -> None:
        if min(self.size) < 14:
            raise InputError(f"--pipeline.datamanager.image-size {self.size}: a side is shorter than one patch.")
        for name in ("triplets_per_step", "workers", "prefetch", "eval_triplets"):
            if getattr(self.config, name) < 1:
                raise InputError(f"--pipeline.datamanager.{name.replace('_', '-')} must be at least 1.")
        if self.config.frame_cache_limit <= 0:
            raise InputError("--pipeline.datamanager.frame-cache-limit must be above 0 gigabytes.")
        if self.config.triplet_pool is not None and self.config.triplet_pool < 1:
            raise InputError("--pipeline.datamanager.triplet-pool must be at least 1, or None.")
        if self.config.triplet_pool is not None and self.config.gap_warmup_steps:
            raise InputError(
                "--pipeline.datamanager.triplet-pool and --pipeline.datamanager.gap-warmup-steps: gaps cannot grow "
                "where the triplets are fixed; leave one of the two."
            )
        angle, widest = self.config.max_context_angle, MAX_ANGLE if self.needs_overlap else 180
        if angle is not None and not 0 < angle <= widest:
            raise InputError(
                f"--pipeline.datamanager.max-context-angle {angle:g}: give degrees above 0 and up to {widest:g}"
                f"{', beyond which MVSplat takes no pair.' if self.needs_overlap else ' (no limit).'}"
            )

        self._check_pairs()

    def _check_pairs(self) -> None:
        config = self.config
        if config.pairs == "overlap":
            if config.min_context_baseline is not None and not config.min_context_baseline >= 0:
                raise InputError(
                    f"--pipeline.datamanager.min-context-baseline {config.min_context_baseline:g}: give a distance "
                    "in world units, 0 or more."
                )
            self._pair_limits.check()
            if config.gap_warmup_steps or config.initial_max_context_gap is not None:
                raise InputError(
                    "--pipeline.datamanager.initial-max-context-gap and --pipeline.datamanager.gap-warmup-steps are "
                    "of gaps: leave them out with --pipeline.datamanager.pairs overlap."
                )
        elif config.min_context_baseline is not None or config.max_context_baseline is not None:
            raise InputError(
                "--pipeline.datamanager.min-context-baseline and --pipeline.datamanager.max-context-baseline limit "
                "pairs chosen by overlap: add --pipeline.datamanager.pairs overlap, or leave them out."
            )

    @property
    def _pair_limits(self) -> PairLimits:
        config = self.config
        return PairLimits(
            min_overlap=config.min_overlap,
            max_overlap=config.max_overlap,
            min_baseline=self.min_baseline,
            max_baseline=config.max_context_baseline,
            max_angle=self.max_context_angle,
        )

    def _check_gap_growth(self) -> None:
        config = self.config
        low, initial, high = config.min_context_gap, config.initial_max_context_gap, config.max_context_gap
        if (initial is None) != (config.gap_warmup_steps == 0) or config.gap_warmup_steps < 0:
            raise InputError(
                f"--pipeline.datamanager.initial-max-context-gap {initial}, --pipeline.datamanager.gap-warmup-steps "
                f"{config.gap_warmup_steps}: give both a gap and at least 1 step for gaps that grow, or None and 0 for "
                "gaps that do not."
            )
        if initial is not None and not low <= initial <= high:  # type: ignore
            raise InputError(
                f"--pipeline.datamanager.initial-max-context-gap {initial}: it must lie between "
                f"--pipeline.datamanager.min-context-gap ({low}) and --pipeline.datamanager.max-context-gap ({high})."
            )

    def _parse(self) -> tuple[DataparserOutputs, DataparserOutputs]:
        if self.config.all_scenes and isinstance(self.config.dataparser, MultiSceneConfig):
            CONSOLE.log("[yellow]Training on all scenes: the held-out metrics are then of scenes seen in training.")
        return parse_sides(self.config.dataparser, bool(self.config.all_scenes))

    def _prepare(self, outputs: DataparserOutputs) -> tuple[Frames, SceneSampler]:
        config = self.config
        frames = to_frames(outputs)
        check_frames(frames, self.config.masks == "stored", self.needs_depth, self.faults.note)
        if config.pairs == "overlap":
            return frames, self._overlap_sampler(frames)
        sampler = TripletSampler(
            frames.scene_index,
            frames.frame_order,
            frames.camera_to_worlds,
            frames.scene_names,
            config.min_context_gap,  # type: ignore
            config.max_context_gap,  # type: ignore
            config.target_view,  # type: ignore
            max_angle=self.max_context_angle,
            min_baseline=self.min_baseline,
        )
        return frames, sampler

    def _overlap_sampler(self, frames: Frames) -> OverlapSampler:
        config, with_depth = self.config, frames.has_depth
        if not with_depth and (config.near is None or config.far is None):
            CONSOLE.log(
                "[yellow]Not every frame has a depth map: overlaps are those of frusta, and near and far are guessed "
                "from how far the cameras are spread; --pipeline.datamanager.near and --pipeline.datamanager.far say "
                "better."
            )
        return OverlapSampler(
            frames.scene_index,
            frames.frame_order,
            lambda indices: scene_geometry(frames, indices, config.near, config.far, with_depth, self.faults.note),
            frames.scene_names,
            self._pair_limits,
            config.target_view,  # type: ignore
            lambda scenes: track(
                scenes,
                f"Overlaps from {'depth maps' if with_depth else 'frusta'}",
                total=len(frames.scene_names),
                console=CONSOLE,
                transient=True,
            ),
        )

    def _report(self) -> None:
        sampler, frames = self.triplets, self.train_frames
        CONSOLE.log(
            f"Training on {len(frames)} frames of {len(sampler.usable_scenes)} scenes, {sampler.num_pairs} context "
            f"pairs, resized to {self.size[0]}x{self.size[1]}."
        )
        if sampler.skipped_scenes:
            CONSOLE.log(f"[yellow]Without a context pair, left out: {', '.join(sampler.skipped_scenes[:10])}")
        if sampler.zero_baseline_pairs:
            CONSOLE.log(f"[yellow]{sampler.zero_baseline_pairs} context pairs without baseline are left out.")
        if sampler.opposite_pairs and self.config.pairs == "gap":
            CONSOLE.log(
                f"[yellow]{sampler.opposite_pairs} context pairs that look more than {sampler.max_angle:g} degrees "
                "apart are left out."
            )
        stretch = (self.size[1] / self.size[0]) / (frames.sizes[:, 1] / frames.sizes[:, 0])
        if max(stretch.max(), 1 / stretch.min()) > 1.05:
            height, width = (int(n) for n in frames.sizes[0])
            fitting = max(round(self.size[1] * height / width / 14), 1) * 14
            CONSOLE.log(
                f"[yellow]Frames of {height}x{width} are stretched to {self.size[0]}x{self.size[1]}; "
                f"--pipeline.datamanager.image-size {fitting} {self.size[1]} would keep their shape."
            )

    @property
    def summary(self) -> dict[str, Any]:
        """What was trained on, in a few values that JSON can hold; no paths."""
        return {
            "kind": type(self.config.dataparser).__name__.removesuffix("Config"),
            "name": Path(self.config.data or getattr(self.config.dataparser, "data", "")).name,
            "scenes": len(self.triplets.usable_scenes),
            "frames": len(self.train_frames),
            "context_pairs": self.triplets.num_pairs,
            "held_out_frames": len(self.eval_frames) if self.eval_frames is not None else 0,
            "instance_masks": self.with_masks,
            "mask_source": self.config.masks,
            "image_size": list(self.size),
            "fingerprint": self.fingerprint,
        }

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Hashes by which a changed dataset is noticed."""
        config = self.config
        follows_depth = self.mask_maker is not None and self.mask_maker.uses_depth
        with_depth = self.needs_depth or follows_depth or config.pairs == "overlap" or config.bounds == "scene"
        sides = {"training": self.train_frames, "held out": self.eval_frames}
        hashes: dict[str, str] = {}
        for side, frames in sides.items():
            kinds = {"cameras": "none"}
            if frames is not None:
                kinds = dataset_fingerprint(frames, config.masks == "stored", with_depth)
            hashes |= {f"{side}: {kind}": value for kind, value in kinds.items()}
        return hashes

    def check_unchanged(self, summary: dict[str, Any], file: Path) -> None:
        """Compare the dataset with that of a run that is to be resumed.

        Args:
            summary: of the run, see `summary`.
            file: it was read from.

        Raises:
            InputError: they differ, and `changed_data` is raise.
        """
        before = summary.get("fingerprint") or {}
        changed = [what for what, value in self.fingerprint.items() if before.get(what, value) != value]
        if not changed:
            return
        own = self.summary
        counted = ("scenes", "frames", "held_out_frames")
        changes = [f"{name.replace('_', ' ')}: {summary.get(name)} then, {own[name]} now" for name in counted
                   if summary.get(name) != own[name]]  # fmt: skip
        what = "; ".join(changes or [f"other {', '.join(changed)}"])
        message = f"The dataset {self.config.dataparser.data} has changed since the run of {file.parent} began ({what})"
        if self.config.changed_data == "raise":
            raise InputError(
                f"{message}: restore it, start a new run, or go on all the same with "
                "--pipeline.datamanager.changed-data warn."
            )
        CONSOLE.log(f"[bold yellow]{message}; going on with it as it is now.")

    # ------------------------------------------------------------------ triplets

    def load(self, frames: Frames, index: TripletIndex, with_depth: bool = False) -> ViewTriplet:
        """Read a triplet's files.

        Args:
            frames: of which split.
            index: which frames.
            with_depth: give contexts and target their depth maps if every frame has one.
        """
        all_depth = with_depth and frames.has_depth

        def views(indices: list[int], depth: bool) -> Views:
            stored = self.config.masks == "stored"
            return load_views(frames, indices, self.size, stored, depth, self.mask_maker, self.frame_cache)

        return ViewTriplet(
            context=views(list(index.context), all_depth or self.needs_depth),
            target=views([index.target, *index.more_targets], all_depth),
            scene=frames.scene_names[int(frames.scene_index[index.target])],
        )

    def _load_step(self, step: int) -> list[Union[ViewTriplet, BrokenFileError]]:
        """Its triplets; in the place of one that cannot be read, the reason."""
        loaded: list[Union[ViewTriplet, BrokenFileError]] = []
        for index in self.step_indices(step):
            try:
                loaded.append(self.load(self.train_frames, index))
            except BrokenFileError as error:
                loaded.append(error)
        return loaded

    def step_indices(self, step: int) -> list[TripletIndex]:
        """The triplets of a training step: a function of (seed, step, rank) alone."""
        items = self.config.triplets_per_step
        if self.config.triplet_pool is None:
            gap, targets = self.max_context_gap(step), self.targets_per_pair
            return [self.triplets.draw(self.seed, step, self.rank, item, gap, targets) for item in range(items)]
        return [self.pool_index(number) for number in self._pool_numbers(step)]

    def _pool_numbers(self, step: int) -> list[int]:
        size, items = self.config.triplet_pool, self.config.triplets_per_step
        assert size is not None
        numbers = []
        for place in range(step * items, (step + 1) * items):
            epoch, within = divmod(place, size)
            order = np.random.default_rng([self.seed, epoch, self.rank]).permutation(size)
            numbers.append(int(order[within]))
        return numbers

    def pool_index(self, number: int) -> TripletIndex:
        """A triplet of the fixed list (`triplet_pool`)."""
        return self.triplets.draw(self.seed, number, self.rank, 0, None, self.targets_per_pair)

    def next_train(self, step: int) -> list[ViewTriplet]:  # type: ignore[override]
        """The triplets of a training step, on the device: a function of (seed, step, rank) alone.

        Where broken files are skipped there may be fewer of them, or none.

        Raises:
            InputError: a file cannot be read, and `on_error` is raise; or for many steps there was nothing to read.
        """
        triplets = []
        for loaded in self._prefetcher.get(step):
            if isinstance(loaded, BrokenFileError):
                self.faults.note(loaded, f"a triplet of step {step}", "training")
            else:
                triplets.append(loaded.to(self.device))
        self.faults.end_step(len(triplets))
        return triplets

    @property
    def num_eval_triplets(self) -> int:
        """How many held-out triplets there are; 0 if nothing could be held out."""
        return len(self.eval_indices)

    def eval_triplet(self, number: int, with_depth: bool = False) -> ViewTriplet:
        """A held-out triplet, on the device.

        Args:
            number: below ``num_eval_triplets``.
            with_depth: give contexts and target their depth maps if every held-out frame has one.
        """
        assert self.eval_frames is not None
        return self.load(self.eval_frames, self.eval_indices[number], with_depth).to(self.device)

    def train_triplets(self, count: int, with_depth: bool = False) -> list[ViewTriplet]:
        """Training triplets spread over scenes and paths, on the device.

        Args:
            count: at most how many.
            with_depth: give contexts and targets their depth maps if every training frame has one.
        """
        return self._readable(self.train_frames, self.triplets.spread(count), with_depth)

    def eval_triplets(self, numbers: Sequence[int], with_depth: bool = False) -> list[ViewTriplet]:
        """Several held-out triplets, on the device; see `eval_triplet`."""
        assert self.eval_frames is not None
        return self._readable(self.eval_frames, [self.eval_indices[number] for number in numbers], with_depth)

    def _readable(self, frames: Frames, indices: Sequence[TripletIndex], with_depth: bool) -> list[ViewTriplet]:
        """Those triplets that can be read.

        Raises:
            BrokenFileError: a file cannot be read, and `on_error` is raise.
        """
        triplets = []
        for index in indices:
            try:
                triplets.append(self.load(frames, index, with_depth).to(self.device))
            except BrokenFileError as error:
                self.faults.note(error, "a triplet that was to be looked at")
        return triplets

    # ------------------------------------------------------------------ what nerfstudio and its viewer ask for

    @property
    def shown_scenes(self) -> list[str]:
        """The training scenes that the viewer can show."""
        return [self.train_frames.scene_names[scene] for scene in self.triplets.usable_scenes.tolist()]

    def _scene_number(self, name: str) -> int:
        return int(self.triplets.usable_scenes[self.shown_scenes.index(name)])

    def scene_images(self, scene: str) -> SceneImages:
        """Some frames of a training scene, as the viewer draws them."""
        return scene_images(
            self.train_frames,
            self.train_dataparser_outputs,
            self._scene_number(scene),
            self.size,
            VIEWER_FRAMES,
            self.faults.note,
        )

    def shown_indices(self, scene: str) -> list[TripletIndex]:
        """Triplets of a training scene that the viewer can show; the one in the middle of the scene comes first."""
        number = self._scene_number(scene)
        spread = self.triplets.spread_over(number, VIEWER_TRIPLETS)
        (middle,) = self.triplets.spread_over(number, 1)
        return [middle, *(index for index in spread if index != middle)]

    def shown_name(self, index: TripletIndex) -> str:
        """Its frames, for a menu: contexts -> target."""
        first, second, target = (self.train_frames.image_files[i].stem for i in (*index.context, index.target))
        return f"{first}, {second} -> {target}"

    def shown(self, index: TripletIndex) -> ViewTriplet:
        """A training triplet for the viewer, on the device."""
        return self.load(self.train_frames, index).to(self.device)

    @cached_property
    def shown_triplet(self) -> ViewTriplet:
        """The training triplet that the viewer shows first: of those that can be read."""
        for scene in self.shown_scenes:
            for index in self.shown_indices(scene):
                try:
                    return self.shown(index)
                except BrokenFileError as error:
                    self.faults.note(error, "a triplet for the viewer")
        raise InputError("No training triplet that the viewer could show can be read.")

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
