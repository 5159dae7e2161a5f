"""Training and testing linear heads on frozen backbones: many models and many heads in one pass over the data."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from torch.nn.utils import clip_grad_norm_

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.evaluation import evaluate
from snd_nerfstudio.probing.examples import Labels, TrainingBatches, image_tensor, step_indices, windowed
from snd_nerfstudio.probing.features import ProbeFeatures, encode
from snd_nerfstudio.probing.heads import LinearHead
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.objectives import Objective, Variant, head_inputs, make_objective
from snd_nerfstudio.probing.progress import Progress, quiet
from snd_nerfstudio.probing.protocols import AnyProbe
from snd_nerfstudio.probing.samples import ProbeDataset, Task
from snd_nerfstudio.probing.token_store import (
    LIMIT_FLAG,
    CachePlace,
    LabelStore,
    TokenStore,
    label_store,
    stored_labels,
    token_store,
)

STATE_FILE = "state.pt"
UNIMPORTANT = ("cache_folder", "cache_limit_gb", "save_every", "workers")
"""Settings that do not change results."""
OF_OTHER_HEADS = ("more_lrs", "repeats")
"""Settings that say which other heads there are, which does not change the result of one."""
OF_EACH_HEAD = ("lr",)
"""Settings that the heads have each for itself."""


@dataclass
class LinearResult:
    """One head's outcome."""

    model: str
    """Label of the model."""
    task: Task
    variant: Variant
    """What tells this head from the model's others: ``lr``, ``repeat``, and ``head_norm`` in segmentation."""
    last: dict[str, float]
    """Scores after the last step; nan where the head diverged."""
    best: dict[str, float]
    """Scores after the best of the steps that were tested, on the test set itself."""
    best_iteration: int
    """How many steps that was."""
    curve: list[dict[str, float]]
    """``iteration``, ``loss`` (mean since the test before) and scores, test by test."""
    seconds: float
    """Of training: the head's steps, and the backbone's where tokens are not cached."""
    tokens_bytes: int
    """Cached tokens of this model, training and test; 0 without a cache."""
    head_file: Path
    """The head's weights after the last step (safetensors)."""


@dataclass
class _Head:
    """A head in training."""

    model: ProbeModel
    variant: Variant
    head: LinearHead
    optimizer: torch.optim.AdamW
    curve: list[dict[str, float]] = field(default_factory=list)
    losses: float = 0.0
    """Sum since the last test."""
    steps: int = 0
    """Number since the last test."""
    seconds: float = 0.0
    tokens_bytes: int = 0
    """Cached tokens of the model."""
    diverged: int = 0
    """The step, counted from 1, whose loss was not finite; the head is left alone from then on. 0: none."""

    def state(self) -> dict[str, Any]:
        return {
            "head": self.head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curve": self.curve,
            "losses": self.losses,
            "steps": self.steps,
            "seconds": self.seconds,
            "tokens_bytes": self.tokens_bytes,
            "diverged": self.diverged,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curve, self.losses = state["curve"], state["losses"]
        self.steps, self.seconds = state["steps"], state["seconds"]
        self.tokens_bytes, self.diverged = state["tokens_bytes"], state["diverged"]


@dataclass
class _Cached:
    """Tokens and labels of both splits, once computed; tokens by the model's label."""

    train_labels: LabelStore
    test_labels: LabelStore
    train: dict[str, TokenStore]
    test: dict[str, list[TokenStore]]
    """Of the images and, if they are needed, of their mirror images."""


def run_linear(
    models: Sequence[ProbeModel],
    train: ProbeDataset,
    test: ProbeDataset,
    settings: AnyProbe,
    folder: Path,
    device: torch.device | str = "cpu",
    progress: Progress = quiet,
    skip: Collection[tuple[str, str]] = (),
) -> list[LinearResult]:
    """Train heads on frozen models, and test them.

    All heads of all models see the same images in the same order. What is random is a function of seed and step, so
    that a run that goes on after an interruption gives, on the CPU, exactly what it would have given.

    Args:
        models: with labels that differ.
        train: opened for the task of the settings.
        test: likewise.
        settings: a probe of `protocols`.
        folder: for the state of the run, weights of heads, and tokens on disk. If it holds an unfinished run of the
            same settings, models and data, that is continued; if a finished one, its results are given.
        device: where models and heads run; the models stay there.
        progress: called with what is being done, how much of it is done, and how much there is.
        skip: heads that are not trained: label of the model, and `variant_name`.

    Returns:
        A result for each head, model after model.

    Raises:
        InputError: settings contradict themselves or the data; the folder holds another run; a sample cannot be read;
            or every head diverged.
    """
    objective = make_objective(settings, train, test)
    if not models or len({model.label for model in models}) < len(models):
        raise InputError("--models needs one model or more, each of them once.")
    hashes = train.content_hash(), test.content_hash()
    folder.mkdir(parents=True, exist_ok=True)
    for model in models:
        model.backbone.to(device)
    heads = _make_heads(models, settings, objective, device, skip)
    key = _run_key(heads, settings, hashes, (train, test))
    done = _load_state(folder, key, heads)
    total = settings.steps(len(train))
    if done < total:
        cached = None
        if settings.cache != "none":
            cached = _cache(models, train, test, settings, objective, folder, hashes, device, progress)
            for entry in heads:
                stores = [cached.train[entry.model.label], *cached.test[entry.model.label]]
                entry.tokens_bytes = sum(store.bytes for store in stores)
        _train(heads, objective, cached, range(done, total), folder, key, device, progress)
    return [_result(entry, objective, folder) for entry in heads]


def _run_key(
    heads: Sequence[_Head], settings: AnyProbe, hashes: tuple[str, str], datasets: Sequence[ProbeDataset]
) -> str:
    unused = (*UNIMPORTANT, *OF_OTHER_HEADS, *OF_EACH_HEAD)
    used = {name: value for name, value in asdict(settings).items() if name not in unused}
    described = [
        (entry.model.label, *(entry.model.description[name] for name in ("state_sha256", "positions")), entry.variant)
        for entry in heads
    ]
    shapes = [(dataset.name, dataset.split, dataset.window, len(dataset)) for dataset in datasets]
    text = json.dumps([type(settings).__name__, used, described, hashes, shapes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _make_heads(
    models: Sequence[ProbeModel],
    settings: AnyProbe,
    objective: Objective,
    device: torch.device | str,
    skip: Collection[tuple[str, str]],
) -> list[_Head]:
    """Heads of one repeat start from the same random numbers whatever else there is."""
    heads = []
    for model in models:
        for variant in objective.variants():
            if (model.label, variant_name(variant)) in skip:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed + variant["repeat"])
                head = objective.make_head(*head_inputs(model, settings), variant)
            head.to(device).train()
            optimizer = torch.optim.AdamW(
                head.parameters(), lr=variant["lr"], betas=settings.betas, weight_decay=settings.weight_decay
            )
            heads.append(_Head(model, variant, head, optimizer))
    return heads


# ---------------------------------------------------------------------- data


def _cache(
    models: Sequence[ProbeModel],
    train: ProbeDataset,
    test: ProbeDataset,
    settings: AnyProbe,
    objective: Objective,
    folder: Path,
    hashes: tuple[str, str],
    device: torch.device | str,
    progress: Progress,
) -> _Cached:
    """Everything that is computed once.

    Raises:
        InputError: it would take more than allowed, which is known from one image.
    """
    _check_cache_size(models, train, test, settings, objective, device)
    kept = (settings.cache_folder or folder / "tokens") if settings.cache == "disk" else None
    used = 0

    def place() -> CachePlace:
        return CachePlace(kept, settings.cache_limit_gb, used)

    labels = []
    for dataset, content in zip((train, test), hashes, strict=True):
        labels.append(label_store(dataset, place(), content, progress))
        used += labels[-1].bytes
    trained, tested = {}, {}
    for model in models:
        features = settings.features
        trained[model.label] = token_store(model, train, features, place(), hashes[0], device=device, progress=progress)
        used += trained[model.label].bytes
        tested[model.label] = []
        for mirrored in (False, True) if objective.mirrors else (False,):
            store = token_store(model, test, features, place(), hashes[1], mirrored, device, progress=progress)
            tested[model.label].append(store)
            used += store.bytes
    return _Cached(*labels, train=trained, test=tested)


def _check_cache_size(
    models: Sequence[ProbeModel],
    train: ProbeDataset,
    test: ProbeDataset,
    settings: AnyProbe,
    objective: Objective,
    device: torch.device | str,
) -> None:
    """Raise `InputError` if tokens and labels of all models together are larger than allowed."""
    total = 0
    for dataset, times in ((train, 1), (test, 1 + objective.mirrors)):
        rows = stored_labels(windowed(dataset, 0), dataset.task)
        total += len(dataset) * sum(array.nbytes for array in rows.values())
        image = image_tensor(windowed(dataset, 0).image)[None].to(device)
        for model in models:
            features = encode(model, image, settings.features)
            parts = [features.tokens] + ([] if features.class_token is None else [features.class_token])
            total += len(dataset) * times * sum(2 * part.numel() for part in parts)
    if total > settings.cache_limit_gb * 1e9:
        raise InputError(
            f"Tokens and labels of {len(models)} models take {total / 1e9:.3g} GB together, more than {LIMIT_FLAG} "
            f"{settings.cache_limit_gb:g} allows: raise it, give fewer --models or a --limit, or --cache none."
        )


def _on(labels: Labels, device: torch.device | str) -> Labels:
    return {kind: value.to(device) for kind, value in labels.items()}


def _by_model(heads: Sequence[_Head]) -> list[tuple[ProbeModel, list[_Head]]]:
    grouped: dict[str, list[_Head]] = {}
    for entry in heads:
        grouped.setdefault(entry.model.label, []).append(entry)
    return [(group[0].model, group) for group in grouped.values()]


# ---------------------------------------------------------------------- training


def _train(
    heads: Sequence[_Head],
    objective: Objective,
    cached: Optional[_Cached],
    steps: range,
    folder: Path,
    key: str,
    device: torch.device | str,
    progress: Progress,
) -> None:
    """The steps that remain, with tests and saved states between them."""
    settings: AnyProbe = objective.settings
    images = len(objective.train)
    tested = settings.test_steps(images)
    batches = TrainingBatches(objective.train, settings) if cached is None else None
    try:
        for step in steps:
            if cached is None:
                assert batches is not None
                pixels, labels = batches(step)
                pixels = pixels.to(device)
                indices = []
            else:
                pixels, indices = None, step_indices(step, images, settings)
                labels = cached.train_labels.batch(indices)
            labels = _on(labels, device)
            for model, group in _by_model(heads):
                began = time.perf_counter()
                if cached is None:
                    assert pixels is not None
                    features = encode(model, pixels, settings.features)
                else:
                    features = cached.train[model.label].batch(indices, device)
                training = [entry for entry in group if not entry.diverged]
                shared = (time.perf_counter() - began) / max(len(training), 1)
                for entry in training:
                    began = time.perf_counter()
                    loss = training_step(
                        objective, entry.head, entry.optimizer, entry.variant["lr"], features, labels, step
                    )
                    entry.losses += loss
                    entry.steps += 1
                    entry.seconds += time.perf_counter() - began + shared
                    if not math.isfinite(loss):
                        entry.diverged = step + 1
                        _say_diverged(entry, heads, objective.train.task, loss)
            if step + 1 in tested:
                _test(heads, objective, cached, step + 1, device, progress)
            if (step + 1) % settings.save_every == 0 or step + 1 in tested:
                _save_state(folder, key, heads, step + 1)
            progress(f"Training {objective.train.task}", step + 1, steps.stop)
    finally:
        if batches is not None:
            batches.close()


def _say_diverged(entry: _Head, heads: Sequence[_Head], task: Task, loss: float) -> None:
    """Say that a head is lost.

    Raises:
        InputError: it was the last one.
    """
    lost = f"The {task} probe of {entry.model.label} has a loss of {loss} in step {entry.diverged}"
    if all(other.diverged for other in heads):
        raise InputError(f"{lost}: give a smaller --lr than {entry.variant['lr']:g}.")
    told = ", ".join(f"{name} {value}" for name, value in entry.variant.items())
    print(f"{lost} ({told}): it has no results, and the others go on.", flush=True)


def training_step(
    objective: Objective,
    head: LinearHead,
    optimizer: torch.optim.AdamW,
    lr: float,
    features: ProbeFeatures,
    labels: Labels,
    step: int,
) -> float:
    """One step of one head; its loss.

    Args:
        objective: gives loss and schedule.
        head: is changed.
        optimizer: of the head.
        lr: peak learning rate.
        features: of a batch.
        labels: of the same batch, on the same device.
        step: from 0.
    """
    settings: AnyProbe = objective.settings
    total = settings.steps(len(objective.train))
    for group in optimizer.param_groups:
        group["lr"] = lr * objective.rate(step, total)
        group["betas"] = objective.betas(step, total)
    loss = objective.loss(head, features, labels, step)
    optimizer.zero_grad()
    loss.backward()
    if settings.clip is not None:
        clip_grad_norm_(head.parameters(), settings.clip)
    optimizer.step()
    return float(loss.detach())


# ---------------------------------------------------------------------- testing


def _test(
    heads: Sequence[_Head],
    objective: Objective,
    cached: Optional[_Cached],
    iteration: int,
    device: torch.device | str,
    progress: Progress,
) -> None:
    """Scores of all heads, added to their curves; nan for those that diverged."""
    for entry in heads:
        # a last step can do that without a loss that tells
        if not entry.diverged and not all(value.isfinite().all() for value in entry.head.parameters()):
            entry.diverged = iteration
            _say_diverged(entry, heads, objective.test.task, math.nan)
    alive = [entry for entry in heads if not entry.diverged]
    groups = [(model, [entry.head for entry in group]) for model, group in _by_model(alive)]
    stores = None if cached is None else cached.test
    labels = None if cached is None else cached.test_labels
    found: dict[int, dict[str, float]] = {}
    rows = evaluate(groups, objective, stores, labels, device, progress)
    for (_, group), of_model in zip(_by_model(alive), rows, strict=True):
        found |= {id(entry): row for entry, row in zip(group, of_model, strict=True)}
    nothing = dict.fromkeys(next(iter(found.values())), math.nan)
    for entry in heads:
        loss = math.nan if entry.diverged else entry.losses / max(entry.steps, 1)
        entry.curve.append({"iteration": float(iteration), "loss": loss, **found.get(id(entry), nothing)})
        entry.losses, entry.steps = 0.0, 0


# ---------------------------------------------------------------------- state and results


def _replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    write(partial)
    os.replace(partial, file)


def _save_state(folder: Path, key: str, heads: Sequence[_Head], iteration: int) -> None:
    state = {"key": key, "iteration": iteration, "heads": [entry.state() for entry in heads]}
    _replace(folder / STATE_FILE, lambda file: torch.save(state, file))


def _load_state(folder: Path, key: str, heads: Sequence[_Head]) -> int:
    """Steps that are done already.

    Raises:
        InputError: the state is of another run, or damaged.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        known, iteration, rows = state["key"], int(state["iteration"]), state["heads"]
    except Exception as error:  # torch raises whatever its readers raise
        raise InputError(f"{file} cannot be read ({type(error).__name__}): delete it to begin anew.") from error
    if known != key:
        raise InputError(
            f"{file} is the state of a probe with other settings, models or data: give another folder, or delete it."
        )
    for entry, row in zip(heads, rows, strict=True):
        entry.load(row)
    return iteration


def variant_name(variant: Variant) -> str:
    """What tells a head from the model's others, as one word."""
    return "-".join(
        f"{name}_{value:g}" if isinstance(value, (int, float)) else f"{name}_{value}" for name, value in variant.items()
    )


def head_file_name(label: str, task: Task, variant: Variant) -> str:
    """A file name that tells the heads of a run apart."""
    described = variant_name(variant)
    # two labels may look alike once they are plain
    digest = hashlib.sha256(label.encode()).hexdigest()[:6]
    plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", label)[-60:]
    return f"{plain}-{digest}-{task}-{described}.safetensors"


def _result(entry: _Head, objective: Objective, folder: Path) -> LinearResult:
    from safetensors.torch import save_file

    label, task = entry.model.label, objective.train.task
    file = folder / head_file_name(label, task, entry.variant)
    tensors = {name: value.detach().cpu().contiguous() for name, value in entry.head.state_dict().items()}
    about = {"model": label, "task": task, **{name: str(value) for name, value in entry.variant.items()}}
    _replace(file, lambda partial: save_file(tensors, partial, about))
    measured = [row for row in entry.curve if not math.isnan(row[objective.best_metric])]
    sign = 1 if objective.better == "lower" else -1
    best = min(measured or entry.curve, key=lambda row: sign * row[objective.best_metric])
    return LinearResult(
        model=label,
        task=task,
        variant=entry.variant,
        last=_scores(entry.curve[-1]),
        best=_scores(best),
        best_iteration=int(best["iteration"]),
        curve=entry.curve,
        seconds=entry.seconds,
        tokens_bytes=entry.tokens_bytes,
        head_file=file,
    )


def _scores(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("iteration", "loss")}
