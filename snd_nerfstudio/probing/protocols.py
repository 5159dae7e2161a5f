"""How linear probes are trained and tested: as in the released code (paper), mended (fixed), or in minutes (smoke).

``paper``: what the released evaluation does, with its defects where they change figures. ``fixed``: padding is left
out of predictions, frames are shuffled, the segmentation head is measured with and without BatchNorm, normals are
judged where there are any. ``smoke``: few steps on cached tokens of whole images.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, Union

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing import schedules
from snd_nerfstudio.probing.augmentation import DepthAugmentation, NormalsAugmentation, SegmentationAugmentation
from snd_nerfstudio.probing.features import FeatureSettings
from snd_nerfstudio.probing.losses import MEAN_ONLY_STEPS, PixelMean

ProtocolName = Literal["paper", "fixed", "smoke"]
Cache = Literal["none", "memory", "disk"]
NormalsMask = Literal["depth", "normal"]
"""Which pixels count: all with depth, or those that have a normal too."""
SMOKE_STEPS = 200
"""Of the linear probes, where it should take minutes."""
KITTI_CROP = (352, 704)
USUAL_CROP = (416, 544)


@dataclass
class LinearProbe:
    """What all linear probes have."""

    protocol: ProtocolName = "fixed"
    """Where these settings started from; for reports."""
    iterations: Optional[int] = None
    """Training steps; None: as many as the epochs make."""
    epochs: Optional[float] = None
    """Passes over the training images, where no number of steps is given."""
    batch: int = 2
    """Images of a step."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    more_lrs: tuple[float, ...] = ()
    """Further learning rates, each with a head of its own that is trained in the same pass."""
    repeats: int = 1
    """Heads of each kind, which start from different random weights."""
    weight_decay: float = 0.01
    """Of AdamW."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    warmup: float = 0.0
    """Share of the steps in which the learning rate rises."""
    clip: Optional[float] = None
    """Largest norm of the gradient; None: no limit."""
    augment: bool = True
    """Change training images at random, cropping included; otherwise they are whole and as they are."""
    shuffle: bool = True
    """Draw images in a new random order in each epoch, or take them by name."""
    drop_last: bool = True
    """Leave out what remains of an epoch when it is no whole batch."""
    features: FeatureSettings = field(default_factory=FeatureSettings)
    """Which tokens the head sees."""
    cache: Cache = "none"
    """Compute tokens once and keep them in half precision in memory or on disk; none: run the backbone each step."""
    cache_folder: Optional[Path] = None
    """Where tokens are kept on disk; None: the folder tokens in that of the results."""
    cache_limit_gb: float = 16.0
    """Gigabytes that all cached tokens and labels may take."""
    eval_every: Optional[int] = None
    """Steps between tests; None: an epoch; 0: only at the end."""
    save_every: int = 500
    """Steps after which the state is saved, from which an interrupted run goes on."""
    workers: int = 2
    """Threads that decode training images."""
    seed: int = 42
    """Of heads, order and random changes."""

    @property
    def rates(self) -> tuple[float, ...]:
        """All learning rates, each once."""
        return tuple(dict.fromkeys((self.lr, *self.more_lrs)))

    def steps_per_epoch(self, images: int) -> int:
        """Batches of one pass over so many images.

        Raises:
            InputError: there are fewer images than one batch has.
        """
        steps = images // self.batch if self.drop_last else math.ceil(images / self.batch)
        if steps < 1:
            raise InputError(f"--batch {self.batch} is more than the {images} training images: give a smaller one.")
        return steps

    def steps(self, images: int) -> int:
        """Training steps on a dataset of so many images."""
        if self.iterations is not None:
            return self.iterations
        return max(round((self.epochs or 1) * self.steps_per_epoch(images)), 1)

    def test_steps(self, images: int) -> set[int]:
        """Numbers of steps after which the heads are tested; the last is always one of them."""
        total = self.steps(images)
        every = self.steps_per_epoch(images) if self.eval_every is None else self.eval_every
        return {*range(every, total, every), total} if every else {total}

    def check(self) -> None:
        """Raise `InputError` where settings are impossible or contradict each other."""
        positive = {
            "batch": self.batch,
            "repeats": self.repeats,
            "save-every": self.save_every,
            "workers": self.workers,
        }
        for name, value in positive.items():
            if value < 1:
                raise InputError(f"--{name} {value} is too small: give 1 or more.")
        if self.iterations is not None and self.iterations < 1:
            raise InputError(f"--iterations {self.iterations} is too small: give 1 or more.")
        if self.epochs is not None and self.epochs <= 0:
            raise InputError(f"--epochs {self.epochs:g} must be above 0.")
        if self.iterations is not None and self.epochs not in (None, type(self)().epochs):
            raise InputError(
                f"--epochs {self.epochs:g} and --iterations {self.iterations} contradict each other: give --iterations "
                "None to train by epochs."
            )
        if min(self.rates) <= 0:
            raise InputError(f"--lr {min(self.rates):g} must be above 0.")
        if not 0 <= self.warmup < 1:
            raise InputError(f"--warmup {self.warmup:g} is a share of the steps: give 0 or more, and less than 1.")
        if self.cache != "none" and self.augment:
            raise InputError(
                f"--cache {self.cache} keeps tokens of whole images as they are, which contradicts --augment: give "
                "--no-augment, or --cache none."
            )


def _cached(settings: LinearProbe, cache: Cache) -> None:
    """Settings for cached tokens."""
    settings.cache = cache
    settings.augment = cache == "none"


@dataclass
class DepthProbe(LinearProbe):
    """Depth from 256 bins (paper appendix A.4; released code)."""

    iterations: Optional[int] = schedules.DEPTH_STEPS
    """Training steps."""
    warmup: float = schedules.DEPTH_WARMUP
    """Share of the steps in which the learning rate rises."""
    clip: Optional[float] = 35.0
    """Largest norm of the gradient; None: no limit."""
    eval_every: Optional[int] = 38_400
    """Steps between tests; None: an epoch; 0: only at the end."""
    beta_cycle: bool = True
    """Let AdamW's first beta fall from 0.95 to 0.85 and rise again (released code); the paper says 0.9."""
    mean_only_steps: int = MEAN_ONLY_STEPS
    """First steps in which the loss looks at the mean error alone."""
    gradient_weight: float = 0.0
    """Of the multi-scale gradient loss, which is 0 in the released code by mistake."""
    crop: Optional[tuple[int, int]] = None
    """Rows and columns of training crops; None: 416 544, for KITTI 352 704, and rooms whole, of whatever size they
    were made."""
    brightness: Optional[tuple[float, float]] = None
    """Random factor on all colours; None: 0.75 1.25, for KITTI 0.9 1.1."""
    flip_average: bool = True
    """Test each image and its mirror image, and take the mean."""
    features: FeatureSettings = field(default_factory=lambda: FeatureSettings(norm=False, class_token=True))
    """Which tokens the head sees."""

    def augmentation(self, dataset: str) -> DepthAugmentation:
        """Random changes to a dataset's training images; its border is cut off before."""
        kitti = dataset == "kitti"
        usual = {"kitti": KITTI_CROP, "rooms": None}.get(dataset, USUAL_CROP)
        return DepthAugmentation(
            crop=self.crop or usual, brightness=self.brightness or ((0.9, 1.1) if kitti else (0.75, 1.25))
        )

    def check(self) -> None:
        super().check()
        if self.beta_cycle and self.betas != DepthProbe().betas:
            raise InputError("--betas has no effect while the first beta is cycled: give --no-beta-cycle too.")
        if not self.augment and (self.crop or self.brightness):
            raise InputError("--crop and --brightness belong to --augment: leave them out, or give --augment.")

    @classmethod
    def paper(cls) -> "DepthProbe":
        """As released."""
        features = FeatureSettings(norm=False, class_token=True, positions="timm", pad_crop="parity")
        return cls(protocol="paper", features=features)

    @classmethod
    def fixed(cls, cache: Cache = "none") -> "DepthProbe":
        """Mended; without augmentation if tokens are cached."""
        settings = cls(protocol="fixed")
        _cached(settings, cache)
        return settings

    @classmethod
    def smoke(cls) -> "DepthProbe":
        """In a minute."""
        settings = cls(
            protocol="smoke", iterations=SMOKE_STEPS, batch=8, lr=1e-2, warmup=0.05, mean_only_steps=10, eval_every=0
        )
        _cached(settings, "memory")
        return settings


@dataclass
class NormalsProbe(LinearProbe):
    """Normals with an uncertainty (Bae et al. 2021; Probe3D; released code)."""

    epochs: Optional[float] = 10.0
    """Passes over the training images, where no number of steps is given."""
    batch: int = 8
    """Images of a step."""
    lr: float = 5e-4
    """Peak learning rate of AdamW."""
    warmup: float = schedules.NORMALS_WARMUP
    """Share of the steps in which the learning rate rises."""
    drop_last: bool = False
    """Leave out what remains of an epoch when it is no whole batch."""
    train_mask: NormalsMask = "normal"
    """Pixels that are trained on: all with depth, or those that have a normal too."""
    test_masks: tuple[NormalsMask, ...] = ("normal", "depth")
    """Pixels that are judged; the scores of each mask but the first have its name before theirs."""
    features: FeatureSettings = field(default_factory=lambda: FeatureSettings(norm=False))
    """Which tokens the head sees."""

    def augmentation(self, dataset: str) -> NormalsAugmentation:
        """Random changes to training images."""
        return NormalsAugmentation()

    def check(self) -> None:
        super().check()
        if not self.test_masks:
            raise InputError("--test-masks needs one mask or more: depth, normal.")

    @classmethod
    def paper(cls) -> "NormalsProbe":
        """As released: frames by name, pixels without a normal counted as wrong."""
        features = FeatureSettings(norm=False, pad_crop="parity", extra_patch_quirk=True)
        return cls(protocol="paper", shuffle=False, train_mask="depth", test_masks=("depth",), features=features)

    @classmethod
    def fixed(cls, cache: Cache = "none") -> "NormalsProbe":
        """Mended; without augmentation if tokens are cached."""
        settings = cls(protocol="fixed")
        _cached(settings, cache)
        return settings

    @classmethod
    def smoke(cls) -> "NormalsProbe":
        """In a minute."""
        settings = cls(protocol="smoke", iterations=SMOKE_STEPS, lr=5e-3, eval_every=0)
        _cached(settings, "memory")
        return settings


@dataclass
class SegmentationProbe(LinearProbe):
    """Classes by one linear layer (paper appendix A.4; released code)."""

    iterations: Optional[int] = schedules.SEGMENTATION_STEPS
    """Training steps."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    warmup: float = schedules.SEGMENTATION_WARMUP
    """Share of the steps in which the learning rate rises."""
    eval_every: Optional[int] = 40_000
    """Steps between tests; None: an epoch; 0: only at the end."""
    head_norm: Literal["none", "batch", "both"] = "both"
    """BatchNorm before the linear layer: without (released code), with (DINOv2), or a head of each kind."""
    loss_over: PixelMean = "valid"
    """Divide the loss by the labelled pixels, or by all of them (released code)."""
    crop: Optional[int] = None
    """Side of training crops; None: 512."""
    long_side: int = 2048
    """Pixels that the longer side of a test image, and of a training image at ratio 1, may have."""
    short_side: Optional[int] = 512
    """Likewise for the shorter side; None: test images keep their size."""
    window: Optional[int] = 512
    """Side of the windows that slide over test images; None: images are seen whole."""
    stride: int = 341
    """Pixels between windows."""

    def augmentation(self, dataset: str) -> SegmentationAugmentation:
        """Random changes to training images."""
        return SegmentationAugmentation(
            long_side=self.long_side, short_side=self.short_side or 512, crop=self.crop or 512
        )

    def check(self) -> None:
        super().check()
        if not self.augment and self.crop:
            raise InputError("--crop belongs to --augment: leave it out, or give --augment.")
        if self.cache != "none" and (self.window is not None or self.short_side is not None):
            raise InputError(
                f"--cache {self.cache} keeps tokens of whole images, which contradicts --window and --short-side: "
                "give --window None --short-side None, or --cache none."
            )
        if self.window is not None and (self.window < 1 or self.stride < 1):
            raise InputError("--window and --stride are pixels: give 1 or more.")

    @classmethod
    def paper(cls) -> "SegmentationProbe":
        """As released: no BatchNorm, the loss over ignored pixels too."""
        features = FeatureSettings(positions="timm", pad_crop="parity")
        return cls(protocol="paper", head_norm="none", loss_over="all", features=features)

    @classmethod
    def fixed(cls, cache: Cache = "none") -> "SegmentationProbe":
        """Mended; without augmentation and windows if tokens are cached."""
        settings = cls(protocol="fixed")
        _cached(settings, cache)
        if cache != "none":
            settings = dataclasses.replace(settings, window=None, short_side=None)
        return settings

    @classmethod
    def smoke(cls) -> "SegmentationProbe":
        """In a minute."""
        settings = cls(
            protocol="smoke",
            iterations=SMOKE_STEPS,
            batch=8,
            lr=1e-2,
            warmup=0.05,
            eval_every=0,
            window=None,
            short_side=None,
        )
        _cached(settings, "memory")
        return settings


AnyProbe = Union[DepthProbe, NormalsProbe, SegmentationProbe]
PROBES: dict[str, type[AnyProbe]] = {"depth": DepthProbe, "normals": NormalsProbe, "segmentation": SegmentationProbe}
"""The settings of each task."""
