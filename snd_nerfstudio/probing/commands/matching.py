"""`snd-probe correspondence`, `keypoints` and `tracking`: what features find without any training."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import numpy as np
import torch
import tyro

from snd_nerfstudio.backbones.variants import RefinedBackbone
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.common import (
    Flags,
    Found,
    check_block,
    chosen_device,
    encoder,
    measure,
    open_models,
    show,
    spread,
)
from snd_nerfstudio.probing.commands.parsing import given, parse, parse_with_defaults
from snd_nerfstudio.probing.correspondence import NAVI, PROTOCOLS, CorrespondenceSettings, evaluate_pairs
from snd_nerfstudio.probing.features import FeatureSettings
from snd_nerfstudio.probing.keypoints import SPair71k, evaluate_keypoints
from snd_nerfstudio.probing.matching import FeatureMap
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.pairs import NAMES, PairSet, open_pairs
from snd_nerfstudio.probing.pairs.rooms import read_room, room_folders
from snd_nerfstudio.probing.progress import Progress, reporting
from snd_nerfstudio.probing.results import DatasetRecord, Measurement, ProbeResult, hash_arrays, plain
from snd_nerfstudio.probing.tracking import evaluate_tracking, room_tracks

Protocol = Literal["paper", "fixed", "smoke"]
SCANNET_SIZE = (480, 640)
"""Rows and columns that ScanNet's colour images are resized to (released code)."""
MEF_LONGEST = 640 * 14 // 8
"""Pixels of the longer side of an image that MEF sees in its own code."""
SMOKE_PAIRS = 24
"""Pairs of protocol `smoke` unless --limit says otherwise."""


def _limit_longest(longest: int) -> Callable[[int, int], tuple[int, int]]:
    """Sizes of the same shape whose longest side is at most so many pixels."""

    def resized(height: int, width: int) -> tuple[int, int]:
        factor = min(longest / max(height, width), 1.0)
        return max(round(height * factor), 1), max(round(width * factor), 1)

    return resized


def usual_size(dataset: str) -> Optional[tuple[int, int]]:
    """Rows and columns that a dataset's images are resized to before they are measured; None: they stay."""
    return SCANNET_SIZE if dataset in ("scannet-1500", "superglue") else None


def resized_to(size: Optional[tuple[int, int]]) -> Callable[[int, int], tuple[int, int]]:
    """What `common.encoder` takes; None: no image is resized."""
    return lambda height, width: size or (height, width)


def _as_mef(height: int, width: int) -> tuple[int, int]:
    """Images so large that a token covers 8 pixels of one whose longer side has 640 (MEF's own code)."""
    factor = MEF_LONGEST / max(height, width)
    return round(height * factor), round(width * factor)


@dataclass
class Features(Flags):
    """Flags of commands that match features."""

    protocol: Protocol = "fixed"
    """paper: as the released code; fixed: its inaccuracies mended; smoke: fixed, on few samples."""
    seed: int = 0
    """Of random weights, and of the points that are tracked."""
    block: int = -1
    """Transformer block whose tokens are matched; negative ones count from the last."""
    final_norm: bool = False
    """Apply the transformer's final norm; the released code does not."""
    mef_res: Literal["same", "native"] = "same"
    """Size of the images that MEF sees: the same as for the others, or as in its own code (the longer side 1120
    pixels, so that its tokens are finer). The others are not changed by it."""

    def check(self) -> None:
        super().check()
        window, temperature = getattr(self, "window", None), getattr(self, "temperature", 1.0)
        if window is not None and window < 1:
            raise InputError(f"--window {window} must be 1 or more tokens, or None.")
        if temperature <= 0:
            raise InputError(f"--temperature {temperature:g} must be above 0.")
        for name in ("frames", "points", "longest_side"):
            if getattr(self, name, 1) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be 1 or more.")

    def settings(self, **more: Any) -> FeatureSettings:
        """Which tokens."""
        return FeatureSettings(
            block=self.block, norm=self.final_norm, extra_patch_quirk=self.protocol == "paper", **more
        )

    def encoder(
        self, model: ProbeModel, settings: FeatureSettings, resized: Callable[[int, int], tuple[int, int]]
    ) -> Callable[[np.ndarray], FeatureMap]:
        """See `common.encoder`."""
        native = self.mef_res == "native" and isinstance(model.backbone, RefinedBackbone)
        return encoder(model, settings, _as_mef if native else resized)


# ---------------------------------------------------------------------- correspondence


@dataclass
class Correspondence(Features):
    """Correspondence of posed images with depth (paper, figure 7): scannet-1500, superglue, navi or rooms."""

    settings_of_pairs: Annotated[CorrespondenceSettings, tyro.conf.arg(name="")] = field(
        default_factory=lambda: PROTOCOLS["fixed"]
    )
    size: Optional[tuple[int, int]] = None
    """Rows and columns that images are resized to. None: 480 640 for ScanNet, the files' for the others."""
    pair_seed: Optional[int] = None
    """Of pairs that are drawn, in rooms and NAVI: another one measures other pairs. None: the usual one."""
    pictures: int = 0
    """Draw so many pairs, spread evenly, into the folder pictures of --out."""

    def main(self) -> list[ProbeResult]:
        """Measure, draw, and print a table."""
        self.check()
        if self.dataset not in NAMES:
            raise InputError(f"--dataset {self.dataset} has no posed pairs: take one of {', '.join(NAMES)}.")
        if self.pictures < 0 or (self.size is not None and min(self.size) < 1):
            raise InputError(f"--pictures {self.pictures} must be 0 or more, and --size {self.size} 1 or more pixels.")
        device = chosen_device(self.device)
        pairs = open_pairs(self.dataset, self.data, self.pair_seed)
        limit = SMOKE_PAIRS if self.limit is None and self.protocol == "smoke" else self.limit
        chosen = pairs if limit is None else pairs.spread(limit)
        models = open_models(self.models, self.seed, device)
        size = self.size or usual_size(self.dataset)
        check_block(models, self.block, "--block")
        record = pairs_record(self.dataset, chosen, len(pairs))
        settings = self.settings_of_pairs
        features = self.settings(input_norm=settings.norm)
        recorded = {"matching": settings, "features": features, "size": size, "mef_res": self.mef_res}
        config = plain(recorded)

        def encode(model: Any) -> Any:
            return self.encoder(model, features, resized_to(size))

        def run(model: Any, step: Callable[[], None]) -> Found:
            found = evaluate_pairs(chosen, encode(model), settings, lambda _: step()).plain()
            metrics = {f"recall_{name}px": value for name, value in found["pixels"].items()}
            metrics |= {f"recall_{name}cm": value for name, value in found["centimetres"].items()}
            metrics |= {f"bin_{entry['low']:g}-{entry['high']:g}": entry["recall"] for entry in found["bins"]}
            return Found(metrics, found)

        results = measure(
            self,
            models,
            lambda model: Measurement(
                "correspondence", record, model.label, model.description, self.protocol, config, self.seed
            ),
            run,
            len(chosen),
            device,
        )
        self._draw(chosen, models, encode)
        show(results, self.out)
        return results

    def _draw(self, pairs: PairSet, models: Sequence[Any], encode: Callable[[Any], Any]) -> None:
        from snd_nerfstudio.probing.pictures import correspondence_sheet
        from snd_nerfstudio.viewer.pictures import save_png

        encoders = {model.label: encode(model) for model in models}
        for place in spread(len(pairs), self.pictures):
            pair = pairs[place]
            maps = {label: (one(pair.images[0]), one(pair.images[1])) for label, one in encoders.items()}
            picture = correspondence_sheet(pair, maps, title=f"{self.dataset}, {pair.name}")
            name = f"correspondence_{self.dataset}_{self.protocol}_{place:05d}.png"
            save_png(picture, self.out / "pictures" / name)


def _counted(items: Iterable[Any], total: int, what: str, progress: Progress) -> Iterator[Any]:
    for done, item in enumerate(items, start=1):
        yield item
        progress(what, done, total)


def pairs_record(name: str, pairs: PairSet, total: int) -> DatasetRecord:
    """What a result says about a set of pairs; every pair is read once, so that its content is hashed.

    Raises:
        InputError: a file cannot be read.
    """
    with reporting() as progress:
        counted = _counted(pairs, len(pairs), "Reading pairs", progress)
        content = hash_arrays(
            (pair.name, [*pair.images, *pair.depths, *pair.intrinsics, pair.relative_pose]) for pair in counted
        )
    rule = "published list" if name in ("scannet-1500", "superglue") else "drawn with a seed"
    rule += "" if len(pairs) == total else f", {len(pairs)} of {total}"
    return DatasetRecord(name, content, rule, {"pairs": len(pairs)}, part=len(pairs) < total)


def correspondence(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe correspondence``."""
    protocol = given(arguments, "--protocol", "fixed")
    settings = PROTOCOLS["paper" if protocol == "paper" else "fixed"]
    if given(arguments, "--dataset", "rooms") == "navi":
        own = ("pixels", "bins", "binned_by", "binned_threshold")
        settings = replace(settings, **{name: getattr(NAVI, name) for name in own})
    parse_with_defaults(Correspondence, arguments, "correspondence", settings_of_pairs=settings).main()


# ---------------------------------------------------------------------- keypoints


@dataclass
class Keypoints(Features):
    """Semantic keypoints (SPair-71k): carried from one image to another by the most similar token."""

    dataset: Literal["spair"] = "spair"
    """Name of the dataset."""
    split: Literal["trn", "val", "test"] = "test"
    """Which pairs."""
    categories: tuple[str, ...] = ()
    """Only these; none: all."""
    alpha: float = 0.1
    """A keypoint is right within this share of the longer side of the object's box."""
    window: Optional[int] = None
    """Average over so many tokens around the best one, weighted by similarity. None: take its centre."""
    temperature: float = 0.05
    """Of these weights."""
    longest_side: int = 672
    """Pixels; larger images are resized to it, their shape kept."""

    def main(self) -> list[ProbeResult]:
        """Measure and print a table."""
        self.check()
        device = chosen_device(self.device)
        pairs = SPair71k(self.data, self.split, categories=self.categories or None)
        total = len(pairs)
        limit = SMOKE_PAIRS if self.limit is None and self.protocol == "smoke" else self.limit
        if limit is not None:
            pairs.names = [pairs.names[place] for place in spread(total, limit)]
        models = open_models(self.models, self.seed, device)
        check_block(models, self.block, "--block")
        with reporting() as progress:
            counted = _counted(pairs, len(pairs), "Reading pairs", progress)
            content = hash_arrays((pair.name, [*pair.images, *pair.points, *pair.boxes]) for pair in counted)
        rule = f"published {self.split}" + ("" if len(pairs) == total else f", {len(pairs)} of {total}")
        record = DatasetRecord("spair", content, rule, {self.split: len(pairs)}, part=len(pairs) < total)
        features = self.settings()
        config = plain(
            {name: getattr(self, name) for name in ("alpha", "window", "temperature", "longest_side", "mef_res")}
        )
        config["features"] = plain(features)

        def run(model: Any, step: Callable[[], None]) -> Found:
            def counted() -> Any:
                for pair in pairs:
                    yield pair
                    step()

            encode = self.encoder(model, features, _limit_longest(self.longest_side))
            found = evaluate_keypoints(counted(), encode, self.alpha, self.window, self.temperature)
            metrics = {name: getattr(found, name) for name in ("per_image", "per_point", "category_mean")}
            return Found(metrics, found.plain())

        results = measure(
            self,
            models,
            lambda model: Measurement(
                "keypoints", record, model.label, model.description, self.protocol, config, self.seed
            ),
            run,
            len(pairs),
            device,
        )
        show(results, self.out)
        return results


def keypoints(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe keypoints``."""
    parse(Keypoints, arguments, "keypoints").main()


# ---------------------------------------------------------------------- tracking


@dataclass
class Tracking(Features):
    """Points followed through a walk around procedural rooms, measured as TAP-Vid does."""

    dataset: Literal["rooms"] = "rooms"
    """Name of the dataset."""
    frames: int = 24
    """Of each video."""
    points: int = 128
    """Of each video, drawn in its first frame."""
    window: Optional[int] = None
    """Average over so many tokens around the best one, weighted by similarity. None: take its centre."""
    temperature: float = 0.05
    """Of these weights."""

    def main(self) -> list[ProbeResult]:
        """Measure and print a table."""
        self.check()
        device = chosen_device(self.device)
        folders = room_folders(Path(self.data), "val")
        chosen = folders if self.limit is None else [folders[place] for place in spread(len(folders), self.limit)]
        videos = [
            room_tracks(read_room(folder), frames=self.frames, count=self.points, seed=self.seed) for folder in chosen
        ]
        models = open_models(self.models, self.seed, device)
        check_block(models, self.block, "--block")
        content = hash_arrays(
            (folder.name, [*frames, tracks.positions.numpy(), tracks.visible.numpy()])
            for folder, (frames, tracks) in zip(chosen, videos, strict=True)
        )
        part = len(chosen) < len(folders)
        record = DatasetRecord("rooms", content, "rooms for validation", {"videos": len(videos)}, part=part)
        features = self.settings()
        config = plain({name: getattr(self, name) for name in ("frames", "points", "window", "temperature", "mef_res")})
        config["features"] = plain(features)

        def run(model: Any, step: Callable[[], None]) -> Found:
            encode = self.encoder(model, features, resized_to(None))

            def counted(image: np.ndarray) -> Any:
                step()
                return encode(image)

            with torch.no_grad():
                found = evaluate_tracking(videos, counted, self.window, self.temperature)
            metrics = {"average": found.average, **{f"within_{name}px": v for name, v in found.within.items()}}
            return Found(metrics, found.plain())

        results = measure(
            self,
            models,
            lambda model: Measurement(
                "tracking", record, model.label, model.description, self.protocol, config, self.seed
            ),
            run,
            len(videos) * self.frames,
            device,
        )
        show(results, self.out)
        return results


def tracking(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe tracking``."""
    parse(Tracking, arguments, "tracking").main()
