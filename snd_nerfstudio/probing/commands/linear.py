"""`snd-probe depth`, `normals` and `segmentation`: linear probes on frozen backbones."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.commands.common import (
    Flags,
    announce_done,
    check_block,
    chosen_device,
    open_models,
    open_splits,
    record_of,
    show,
    spread,
)
from snd_nerfstudio.probing.commands.parsing import given, parse_with_defaults
from snd_nerfstudio.probing.examples import image_tensor, windowed
from snd_nerfstudio.probing.features import encode
from snd_nerfstudio.probing.linear import (
    OF_OTHER_HEADS,
    STATE_FILE,
    UNIMPORTANT,
    LinearResult,
    run_linear,
    variant_name,
)
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.objectives import Objective, Variant, head_inputs, make_objective
from snd_nerfstudio.probing.progress import reporting
from snd_nerfstudio.probing.protocols import AnyProbe, DepthProbe, NormalsProbe, SegmentationProbe
from snd_nerfstudio.probing.results import (
    DatasetRecord,
    Measurement,
    ProbeResult,
    file_word,
    find_result,
    finished,
    plain,
    write_result,
)

SMOKE_IMAGES = 80
"""Images of each split of protocol `smoke` unless --limit says otherwise."""
TOKENS = "tokens"
"""Folder, in that of the results, for tokens on disk: trainings with the same ones share them."""
RUNS = "runs"
"""Folder, in that of the results, for heads and the state of trainings."""


Planned = tuple[ProbeModel, Variant, Measurement]
"""A head: of which model, which of its heads, and what it measures."""


@dataclass
class Linear(Flags):
    """Flags of all linear probes; the fields of `probe` are flags without a prefix."""

    split_seed: int = 0
    """Of random splits, where a dataset has no published one: another one tests on other images."""
    pictures: int = 0
    """Draw so many test images, spread evenly, into the folder pictures of --out."""
    probe: Any = None

    def main(self) -> list[ProbeResult]:
        """Train, test, write results and pictures, and print a table.

        Returns:
            A result for each head, model after model.

        Raises:
            InputError: see `run_linear`, `open_models` and `open_dataset`.
        """
        self.check()
        if self.pictures < 0:
            raise InputError(f"--pictures {self.pictures} must be 0 or more.")
        settings: AnyProbe = self.probe
        if settings.cache == "disk" and settings.cache_folder is None:
            settings.cache_folder = self.out / TOKENS
        device = chosen_device(self.device)
        if settings.protocol == "smoke" and self.limit is None:
            self.limit = SMOKE_IMAGES
        train, test = open_splits(self, TASKS[type(settings)], settings.protocol, self.split_seed)
        objective = make_objective(settings, train, test)
        models = open_models(self.models, settings.seed, device)
        check_block(models, settings.features.block, "--features.block")
        record = record_of(train, test)
        planned = [
            (model, variant, measurement(model, settings, record, variant))
            for model in models
            for variant in objective.variants()
        ]
        done = {} if self.again else self._earlier([what for *_, what in planned])
        if len(done) < len(planned):
            trained = self._train(planned, done, train, test, device)
            done |= {key: self._written(what, entry, device) for key, (what, entry) in trained.items()}
        results = [done[what.key] for *_, what in planned]
        draw_predictions(self, models, results, objective, device)
        show(results, self.out)
        return results

    def _train(
        self, planned: Sequence[Planned], done: dict[str, ProbeResult], train: Any, test: Any, device: str
    ) -> dict[str, tuple[Measurement, LinearResult]]:
        """Train all heads that are not done; by the keys of their measurements."""
        missing = [row for row in planned if row[2].key not in done]
        whole, part = (self._run_folder(test.task, rows) for rows in (planned, missing))
        if (whole / STATE_FILE).exists():
            missing, part = planned, whole  # it was killed while results were written
        skip = {(model.label, variant_name(variant)) for model, variant, what in planned}
        skip -= {(model.label, variant_name(variant)) for model, variant, what in missing}
        # in an order that does not depend on that of the command line
        models = sorted({id(row[0]): row[0] for row in missing}.values(), key=lambda model: model.label)
        with reporting() as progress:
            trained = run_linear(models, train, test, self.probe, part, device, progress, skip)
        if self.again:
            (part / STATE_FILE).unlink(missing_ok=True)  # the next time is anew again
        by_head = {(entry.model, variant_name(entry.variant)): entry for entry in trained}
        return {what.key: (what, by_head[model.label, variant_name(variant)]) for model, variant, what in missing}

    def _run_folder(self, task: str, planned: Sequence[Planned]) -> Path:
        """Of the training that measures so much."""
        keys = sorted(what.key for *_, what in planned)
        run = hashlib.sha256("".join(keys).encode()).hexdigest()[:12]
        again = "-again" if self.again else ""  # of its own, so that it too goes on when it was killed
        return self.out / RUNS / file_word(f"{task}-{self.dataset}-{self.probe.protocol}-{run}{again}")

    def _earlier(self, wanted: Sequence[Measurement]) -> dict[str, ProbeResult]:
        """What was measured before, by its key."""
        found = {what.key: find_result(what, self.out) for what in wanted}
        done = {key: result for key, result in found.items() if result is not None}
        for result in done.values():
            announce_done(result, self.out)
        return done

    def _written(self, what: Measurement, entry: LinearResult, device: str) -> ProbeResult:
        details = {
            "curve": entry.curve,
            "tokens_bytes": entry.tokens_bytes,
            "head_file": entry.head_file.relative_to(self.out).as_posix(),
        }
        result = finished(
            what, entry.last, entry.best, entry.seconds, device, best_iteration=entry.best_iteration, details=details
        )
        # of several heads of a model some may be there from before
        write_result(result, self.out, replace=self.again or find_result(what, self.out) is not None)
        return result


@dataclass
class Depth(Linear):
    """Depth by a linear probe with 256 bins (paper, tables 1 and 4): scannetpp, scannet, nyuv2, kitti, rooms."""

    probe: Annotated[DepthProbe, tyro.conf.arg(name="")] = field(default_factory=DepthProbe.fixed)


@dataclass
class Normals(Linear):
    """Surface normals by a linear probe (paper, table 2): nyuv2, rooms."""

    probe: Annotated[NormalsProbe, tyro.conf.arg(name="")] = field(default_factory=NormalsProbe.fixed)


@dataclass
class Segmentation(Linear):
    """Classes by a linear probe (paper, tables 3 and 4): scannetpp, scannet, nyuv2, ade20k, voc2012, rooms."""

    probe: Annotated[SegmentationProbe, tyro.conf.arg(name="")] = field(default_factory=SegmentationProbe.fixed)


TASKS: dict[type, Any] = {DepthProbe: "depth", NormalsProbe: "normals", SegmentationProbe: "segmentation"}
KINDS: dict[type[Any], type[AnyProbe]] = {Depth: DepthProbe, Normals: NormalsProbe, Segmentation: SegmentationProbe}


def preset(kind: type[Any], protocol: str, cache: Any = "none") -> Any:
    """The settings of a protocol.

    Args:
        kind: of a probe.
        protocol: anything but `paper` and `smoke` is `fixed`.
        cache: of `fixed`, which trains without augmentation where tokens are cached.
    """
    if protocol in ("paper", "smoke"):
        return getattr(kind, protocol)()
    return kind.fixed(cache if cache in ("memory", "disk") else "none")


def measurement(model: ProbeModel, settings: AnyProbe, record: DatasetRecord, variant: dict[str, Any]) -> Measurement:
    """What one head measures; settings that do not change its result are left out."""
    unused = (*UNIMPORTANT, *OF_OTHER_HEADS)
    config = {name: value for name, value in asdict(settings).items() if name not in unused} | {"lr": variant["lr"]}
    return Measurement(
        TASKS[type(settings)],
        record,
        model.label,
        plain(model.description),
        settings.protocol,
        plain(config),
        settings.seed,
        plain(variant),
    )


# ---------------------------------------------------------------------- pictures


@torch.no_grad()
def draw_predictions(
    flags: Linear, models: Sequence[ProbeModel], results: Sequence[ProbeResult], objective: Objective, device: str
) -> list[Path]:
    """Draw what the heads say about some test images, with what is true and how far off they are; heads that diverged
    are left out.

    Args:
        flags: how many, and where to.
        models: by their labels in the results.
        results: of heads whose weights lie in the folder.
        objective: of the task.
        device: where the models are.

    Returns:
        The files.

    Raises:
        InputError: a head's weights are gone, or a sample cannot be read.
    """
    from snd_nerfstudio.viewer.pictures import save_png

    task, test, files = objective.test.task, objective.test, []
    places = spread(len(test), flags.pictures)
    named = [row for row in _named(models, results) if row[2].last[objective.best_metric] is not None] if places else []
    heads = {name: (model, _load_head(flags, model, result, objective, device)) for name, model, result in named}
    for place in places:
        sample = windowed(test, place)
        image = image_tensor(sample.image)[None].to(device).float() / 255
        found = {name: _predict(objective, model, head, image) for name, (model, head) in heads.items()}
        picture = _sheet(task, sample, found)
        protocol = objective.settings.protocol
        files.append(flags.out / "pictures" / f"{task}_{test.name}_{protocol}_{file_word(sample.name)}.png")
        save_png(picture, files[-1])
    return files


def _named(
    models: Sequence[ProbeModel], results: Sequence[ProbeResult]
) -> Iterator[tuple[str, ProbeModel, ProbeResult]]:
    """Each result with a name of its own and its model."""
    by_label = {model.label: model for model in models}
    for result in results:
        what = result.what
        others = [other.what.variant for other in results if other.what.model == what.model]
        differs = {name for name, value in what.variant.items() if any(o.get(name) != value for o in others)}
        told = [f"{name} {value}" for name, value in what.variant.items() if name in differs]
        yield f"{what.model} ({', '.join(told)})" if told else what.model, by_label[what.model], result


def _load_head(flags: Flags, model: ProbeModel, result: ProbeResult, objective: Objective, device: str) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = flags.out / str(result.details["head_file"])
    with torch.random.fork_rng(devices=[]):
        head = objective.make_head(*head_inputs(model, objective.settings), result.what.variant)
    try:
        head.load_state_dict(load_file(file), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise InputError(f"Head {file} cannot be read ({error}): measure it anew with --again.") from error
    return head.to(device).eval()


def _predict(objective: Objective, model: ProbeModel, head: Any, image: Tensor) -> Tensor:
    def predict(seen: Tensor) -> Tensor:
        return objective.predict(head, encode(model, seen, objective.settings.features))

    return objective.on_image(image, predict)[0].cpu()


def _sheet(task: str, sample: Any, found: dict[str, Tensor]) -> Tensor:
    from snd_nerfstudio.probing import pictures

    title = f"{task}, {sample.name}"
    if task == "depth":
        truth = torch.from_numpy(sample.depth.copy())
        return pictures.depth_sheet(sample.image, truth, {name: maps[0] for name, maps in found.items()}, title)
    if task == "normals":
        normals = {name: maps[:3].permute(1, 2, 0) for name, maps in found.items()}
        return pictures.normals_sheet(sample.image, torch.from_numpy(sample.normals.copy()), normals, title)
    labels = {name: maps[0] for name, maps in found.items()}
    return pictures.segmentation_sheet(sample.image, torch.from_numpy(sample.labels.copy()), labels, title)


# ---------------------------------------------------------------------- entry points


def _main(kind: type[Any], arguments: Sequence[str], name: str) -> None:
    protocol, cache = given(arguments, "--protocol", "fixed"), given(arguments, "--cache", "none")
    parse_with_defaults(kind, arguments, name, probe=preset(KINDS[kind], protocol, cache)).main()


def depth(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe depth``."""
    _main(Depth, arguments, "depth")


def normals(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe normals``."""
    _main(Normals, arguments, "normals")


def segmentation(arguments: Sequence[str]) -> None:
    """Entry point of ``snd-probe segmentation``."""
    _main(Segmentation, arguments, "segmentation")
