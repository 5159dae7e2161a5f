"""Weights for a backbone, from wherever they are: read strictly, with a report of what became of every key.

`load_backbone_weights` is the entry. It is asked by a string ``NAME_OR_PATH[::OPTION]...``, see `parse_request`.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from snd_nerfstudio.backbones import downloads
from snd_nerfstudio.backbones.layouts import LayoutError, State
from snd_nerfstudio.backbones.registry import BackboneSpec, PositionEmbedding, find_backbone
from snd_nerfstudio.backbones.weight_files import read_adapter_config, read_content, stated_sha256
from snd_nerfstudio.backbones.weight_readers import Context, Reading, Which, read_any
from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError

FLAG = "--pipeline.model.weights"


# ------------------------------------------------------------------ what comes out


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


@dataclass(frozen=True)
class WeightReport:
    """What became of every key of some weights."""

    source: str
    """Path or address."""
    layout: str
    """As which they were read."""
    files: dict[str, str]
    """SHA-256 of each file that was read, by its name."""
    matched: tuple[str, ...]
    """Keys of the backbone that have their weights; in timm's names, as all keys of the backbone."""
    missing: tuple[str, ...] = ()
    """Keys of the backbone that have none."""
    unexpected: tuple[str, ...] = ()
    """Keys that nothing explains, or that this backbone does not have."""
    reshaped: tuple[str, ...] = ()
    """Keys of another shape than the backbone's, or no floating-point numbers."""
    set_aside: dict[str, str] = field(default_factory=dict)
    """Keys that are explained but are no weights of the backbone, with the reason."""
    differing: Optional[int] = None
    """Number of matched tensors that differ from the base; None where that is not known."""
    compared: str = ""
    """With what, or why with nothing."""
    assumptions: tuple[str, ...] = ()
    """What was taken for granted because nothing in the files says it."""
    licence: str = "not known"
    """Of the weights, as far as their publishers, or the export or run they are from, say."""

    @property
    def complete(self) -> bool:
        """Whether every key of the backbone and of the files is explained."""
        return not (self.missing or self.unexpected or self.reshaped)

    def problems(self) -> str:
        """What is not explained: counts and first keys of each kind."""
        kinds = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", self.reshaped))
        return "; ".join(f"{len(keys)} {kind} ({_first(keys)})" for kind, keys in kinds if keys)

    def summary(self) -> str:
        """One short paragraph."""
        parts = [f"Weights from {self.source} ({self.layout} layout): {len(self.matched)} tensors matched"]
        if self.differing is None:
            parts[0] += f", not compared with the base ({self.compared})"
        else:
            parts[0] += f", {self.differing} differ from {self.compared}"
        for reason in dict.fromkeys(self.set_aside.values()):
            keys = [key for key, why in self.set_aside.items() if why == reason]
            parts.append(f"{len(keys)} keys set aside, {reason} ({keys[0]}{', ...' if len(keys) > 1 else ''})")
        parts += [f"assumed: {assumption}" for assumption in self.assumptions]
        parts += [f"SHA-256 of {name}: {digest[:12]}..." for name, digest in list(self.files.items())[:3]]
        if not self.complete:
            parts.append(f"NOT explained: {self.problems()}")
        return "; ".join(parts) + "."

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.set_aside.items():
            reasons.setdefault(reason, []).append(key)
        return {
            "source": self.source,
            "layout": self.layout,
            "licence": self.licence,
            "files": dict(self.files),
            "matched": len(self.matched),
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "reshaped": list(self.reshaped),
            "set_aside": {why: {"count": len(keys), "first": keys[:3]} for why, keys in reasons.items()},
            "differing": self.differing,
            "compared": self.compared,
            "assumptions": list(self.assumptions),
        }


@dataclass(frozen=True)
class LoadedWeights:
    """Weights that fit a backbone: ``vit.load_state_dict(loaded.state)`` takes them."""

    state: State
    """timm's keys, all of them."""
    report: WeightReport
    """What became of every key."""
    refine: Optional[State] = None
    """A 3x3 convolution that follows the final norm (MEF): ``weight`` and ``bias``."""
    original: Optional[State] = None
    """The published weights, where the tokens of both are to be used side by side (FiT3D)."""
    positions: Optional[PositionEmbedding] = None
    """How the position embedding was resized when these weights were trained, as in ``BackboneSpec.positions``; None
    where nothing says it, as only runs and exports do."""


class WeightError(InputError):
    """Weights do not fit; the message has counts and first keys."""

    def __init__(self, message: str, report: WeightReport) -> None:
        super().__init__(message)
        self.report = report


# ------------------------------------------------------------------ what is asked for


@dataclass(frozen=True)
class WeightRequest:
    """What the user asks for."""

    what: str
    """A known name or a path."""
    which: Which = "teacher"
    """Of a file or run that has both."""
    alpha: Optional[float] = None
    """Scale of adapters times their rank, where the file does not say it."""
    base: Optional[str] = None
    """Weights beneath adapters that come without their base; None: the published ones."""
    concatenated: bool = False
    """Tokens of the published weights beside these."""
    given: frozenset[str] = frozenset()
    """Options that the user wrote."""


def parse_request(weights: str, flag: str = FLAG) -> WeightRequest:
    """Take ``NAME_OR_PATH[::OPTION]...`` apart.

    Options: ``teacher`` or ``student`` of a file or run that has both (teacher by default); ``alpha=NUMBER`` and
    ``base=NAME_OR_PATH`` for low-rank adapters; ``concat`` for tokens beside those of the published weights.

    Raises:
        InputError: an option is unknown or has no proper value.
    """
    what, *options = weights.split("::")
    request = WeightRequest(what)
    for option in options:
        name, _, value = option.partition("=")
        if option in ("teacher", "student"):
            request = replace(request, which=option)  # type: ignore
            name = "which"
        elif option == "concat":
            request = replace(request, concatenated=True)
        elif name == "base" and value:
            request = replace(request, base=value)
        elif name == "alpha" and re.fullmatch(r"\d+(\.\d+)?", value) and float(value) > 0:
            request = replace(request, alpha=float(value))
        else:
            raise InputError(
                f"{flag} {weights}: `::{option}` is no option. After a name or path there may be ::teacher, "
                "::student, ::concat, ::alpha=NUMBER or ::base=PATH."
            )
        request = replace(request, given=request.given | {name})
    return request


def load_backbone_weights(spec: BackboneSpec, vit: nn.Module, weights: str, flag: str = FLAG) -> LoadedWeights:
    """Weights for a backbone by name or path; ``random`` is none of them.

    Args:
        spec: the backbone.
        vit: its timm model, which is only looked at.
        weights: see `parse_request`. Names: ``published``, and those of `downloads.known_weights`. Paths: a file, a
            folder written by peft, transformers or ``ns-export snd-backbone``, a run's folder or its ``config.yml``.
        flag: that the user gave it by, for messages.

    Raises:
        InputError: nothing is known by that name, a download failed, or the weights do not fit: then it is a
            `WeightError` with the report.
    """
    request = parse_request(weights, flag)
    known = downloads.known_weights(spec)
    if request.what == "published":
        _refuse_unused(request, set(), flag)
        loaded = LoadedWeights(*_published(spec, flag))
    elif request.what in known:
        loaded = _known(known[request.what], spec, vit, request, flag)
        request = replace(request, concatenated=request.concatenated or known[request.what].concatenated)
    else:
        file = Path(request.what).expanduser()
        if not file.exists():
            names = ", ".join(f"`{name}`" for name in ("published", "random", *known))
            raise InputError(
                f"{flag} {request.what}: no such file. For {spec.architecture} there are {names}; or give a "
                ".safetensors, .pth or .ckpt file, an exported folder, or a run's config.yml."
            )
        loaded = read_weights(file, spec, vit, flag, request)
    if request.concatenated:
        loaded = replace(loaded, original=_published(spec, flag)[0])
    return loaded


def _known(
    source: downloads.Source, spec: BackboneSpec, vit: nn.Module, request: WeightRequest, flag: str
) -> LoadedWeights:
    _refuse_unused(request, {"concat", "base"} if source.needs_base else {"concat"}, flag)
    file = downloads.fetch(source, flag)
    try:
        loaded = read_weights(file, spec, vit, flag, request)
    except InputError as error:
        remedy = f"{error} The file came from {source.url}; if it is damaged, delete it to fetch it again."
        raise WeightError(remedy, error.report) if isinstance(error, WeightError) else InputError(remedy) from error
    report = replace(loaded.report, source=source.url, licence=source.licence)
    if source.differs and report.differing == 0:
        raise WeightError(f"{flag} {request.what}: {source.url} is the published base itself, unchanged.", report)
    return replace(loaded, report=report, positions=source.positions)


def _published(spec: BackboneSpec, flag: str) -> tuple[State, WeightReport]:
    """timm's published weights, as timm itself loads them."""
    from snd_nerfstudio.backbones.timm_models import create_vit

    if not spec.source:
        raise InputError(f"This {spec.architecture} has no published weights: give {flag} random or a file.")
    on_the_hub = spec.source.startswith("https://huggingface.co/")
    url = f"{spec.source}/resolve/main/{downloads.PUBLISHED_FILES[0]}" if on_the_hub else spec.source
    state: State = {}

    def get() -> Path:
        state.update(create_vit(spec, pretrained=True).state_dict())
        return downloads.in_hub_cache(spec.source) or Path()

    file = downloads.downloaded(get, url, flag, otherwise=f"; or start from noise with {flag} random")
    files = {}
    if file != Path():
        downloads.check_sha256(file, downloads.hub_checksum(file), url, flag)
        files = {file.name: downloads.hub_checksum(file) or sha256(file)}
    report = WeightReport(
        url,
        "timm",
        files,
        tuple(sorted(state)),
        differing=0,
        compared="the published weights",
        licence=spec.licence,
    )
    return state, report


# ------------------------------------------------------------------ reading


def read_weights(
    file: Path,
    spec: BackboneSpec,
    vit: nn.Module,
    flag: str = FLAG,
    request: Optional[WeightRequest] = None,
    base: Optional[State] = None,
) -> LoadedWeights:
    """Read a file or folder of any supported layout and check it against a backbone.

    Args:
        file: see `load_backbone_weights`.
        spec: the backbone.
        vit: its timm model, which is only looked at.
        flag: that the user gave it by, for messages.
        request: options; None: none of them.
        base: weights beneath adapters that come without their base, in timm's keys. None: those of the request, or
            the published ones.

    Raises:
        InputError: it cannot be read; nothing of it is taken over.
        WeightError: not every key is explained.
    """
    asked = request or WeightRequest(str(file))

    def beneath() -> State:
        if base is not None:
            return base
        try:
            return load_backbone_weights(spec, vit, asked.base or "published", flag).state
        except InputError as error:
            raise InputError(
                f"{flag} {file} holds adapters without the weights that they belong to, and those could not be had: "
                f"{error} If they are on this machine, say where: {flag} {file}::base=PATH."
            ) from error

    context = Context(vit.state_dict(), beneath, asked.which, asked.alpha)
    run = file / "config.yml" if file.is_dir() and (file / "config.yml").is_file() else file
    if run.name == "config.yml":
        reading, files = _read_run(run, spec, context, flag)
    else:
        content, files, about = read_content(file, flag)
        unchecked = _check_manifest(about.get("manifest"), spec, files[0], flag)
        context.adapters = read_adapter_config(about.get("adapter_config"), files[0], flag)
        try:
            reading = read_any(content, context)
        except LayoutError as error:
            raise InputError(f"{flag} {file} cannot be used: {error}.") from error
        stated = about.get("manifest", {}).get("position_embedding")
        positions = stated if stated in get_args(PositionEmbedding) else None
        assumptions = (*reading.assumptions, *unchecked)
        licence = str(about.get("manifest", {}).get("base_licence", ""))
        reading = replace(reading, assumptions=assumptions, positions=positions, licence=licence)
    _refuse_unused(asked, context.used | {"concat"}, flag)
    checksums = {path.name: sha256(path) for path in files}
    return _checked(reading, context.expected, spec, str(file), checksums, flag)


def _read_run(config: Path, spec: BackboneSpec, context: Context, flag: str) -> tuple[Reading, list[Path]]:
    """One of our own runs: teacher or student of its newest checkpoint, adapters merged; and that checkpoint's file."""
    from snd_nerfstudio.backbones.build import build_trainable
    from snd_nerfstudio.snd_pipeline import load_trained_model

    try:
        about, model, step = load_trained_model(config)
    except InputError as error:
        raise InputError(f"{flag} {config} cannot be used as weights: {error}") from error
    trained = about.pipeline.model
    _check_same_backbone(trained.backbone, spec, f"The run {config}", flag)
    context.used.add("which")
    before = build_trainable(trained.backbone, trained.weights, about.pipeline.seed)
    state = model.merged_backbone(context.which).vit.state_dict()
    reading = Reading(
        "run",
        state,
        base=before.vit.state_dict(),
        base_name=f"what the run started from ({trained.weights})",
        positions=model.student.backbone.positions,
        licence=licence_of(before.weight_report),
    )
    return reading, [config.parent / about.relative_model_dir / f"step-{step:09d}.ckpt"]


def licence_of(report: Optional[WeightReport]) -> str:
    """Licence of weights with this report; None are random ones."""
    return "none (random weights)" if report is None else report.licence


def _check_same_backbone(name: str, spec: BackboneSpec, whose: str, flag: str) -> None:
    if find_backbone(name) != spec:
        raise InputError(
            f"{whose} has the backbone {name}, not {spec.architecture}: give --pipeline.model.backbone {name}, or "
            f"other weights with {flag}."
        )


def _check_manifest(
    manifest: Optional[Mapping[str, Any]], spec: BackboneSpec, file: Path, flag: str
) -> tuple[str, ...]:
    """What an export says about itself must be true, and fit; returns what it does not say."""
    if manifest is None:
        return ()
    name, stated = manifest.get("backbone"), stated_sha256(manifest, file.name)
    if isinstance(name, str):
        _check_same_backbone(name, spec, f"The export {file.parent}", flag)
    if stated is None:
        return (f"the manifest.json has no checksum of {file.name}",)
    downloads.check_sha256(file, stated, "the file of its manifest.json", flag)
    return ()


# ------------------------------------------------------------------ checking


def _checked(
    reading: Reading, expected: State, spec: BackboneSpec, source: str, files: dict[str, str], flag: str
) -> LoadedWeights:
    """Compare key by key.

    Raises:
        WeightError: not every key is explained.
        InputError: a value is not finite.
    """
    state, common = reading.state, sorted(expected.keys() & reading.state.keys())
    wrong = [key for key in common if not _is_like(state[key], expected[key])]
    matched = tuple(key for key in common if key not in wrong)
    assumptions = reading.assumptions
    precisions = {str(state[key].dtype).removeprefix("torch.") for key in matched} - {"float32"}
    if precisions:
        assumptions = (*assumptions, f"stored as {', '.join(sorted(precisions))}, used as float32")
    report = WeightReport(
        source=source,
        layout=reading.layout,
        files=files,
        matched=matched,
        missing=tuple(sorted(expected.keys() - state.keys())),
        unexpected=tuple(sorted({*reading.unknown, *(state.keys() - expected.keys())})),
        reshaped=tuple(wrong),
        set_aside=reading.set_aside,
        assumptions=assumptions,
        licence=reading.licence or WeightReport.licence,
    )
    if not report.complete:
        hint = "Nothing of it was loaded. "
        if len(report.missing) > len(expected) // 2:
            hint += "It seems to be of another model: "
        raise WeightError(
            f"{flag} {source} does not fit the backbone {spec.architecture} (read in the {reading.layout} layout): "
            f"{report.problems()}. {hint}Give weights of the same model in timm's, DINOv2's or transformers' layout.",
            report,
        )
    converted = {key: state[key].detach().to(expected[key].dtype) for key in matched}
    broken = [key for key, value in converted.items() if not value.isfinite().all()]
    if broken:
        raise InputError(f"{flag} {source} has a NaN or infinite value in {len(broken)} tensors ({broken[0]}).")
    if reading.base is not None:
        differing, compared = count_differing(converted, reading.base), reading.base_name
    else:
        differing, compared = _compare_with_published(converted, spec)
    report = replace(report, differing=differing, compared=compared)
    return LoadedWeights(converted, report, refine=reading.refine, positions=reading.positions)


def _is_like(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == expected.shape


def count_differing(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> int:
    """Number of tensors that are not exactly those of the base."""
    return sum(key not in base or not torch.equal(value.float(), base[key].float()) for key, value in state.items())


def _compare_with_published(state: State, spec: BackboneSpec) -> tuple[Optional[int], str]:
    """With the published weights if they are on this machine; nothing is downloaded for it."""
    if not spec.source:
        return None, "it has no published weights"
    file = downloads.in_hub_cache(spec.source)
    if file is None:
        return None, "the published weights are not on this machine"
    try:
        content, _, _ = read_content(file, FLAG)
        published = read_any(content, Context(state, dict))
    except (InputError, LayoutError):
        return None, "the published weights on this machine cannot be read"
    if published.state.keys() != state.keys():
        return None, "the published weights on this machine are in another layout"
    return count_differing(state, published.state), "the published weights"


def _refuse_unused(request: WeightRequest, used: set[str], flag: str) -> None:
    unused = sorted(request.given - used)
    if unused:
        meaning = {
            "which": "::teacher and ::student choose from a run or a file that has both",
            "alpha": "::alpha is for low-rank adapters that come without adapter_config.json",
            "base": "::base is for low-rank adapters that come without their base",
            "concat": "::concat is for weights that differ from the published ones",
        }
        raise InputError(f"{flag} {request.what}: {meaning[unused[0]]}, and this is none. Leave it out.")


def fingerprint(tensors: Mapping[str, Tensor]) -> UInt8[Tensor, "32"]:
    """SHA-256 over names, shapes and bytes of some tensors, to recognise a base model again."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
