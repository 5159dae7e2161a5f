"""Tables of results, the paper's figures beside ours, in Markdown, CSV and LaTeX.

The same results give the same bytes, in whatever order they are given.
"""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Optional

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.results import Measurement, ProbeResult, plain

Which = Literal["last", "best"]
Format = Literal["markdown", "csv", "latex"]

TITLES = {
    "depth": "Depth",
    "normals": "Surface normals",
    "segmentation": "Semantic segmentation",
    "correspondence": "Correspondence",
    "keypoints": "Keypoints",
    "tracking": "Tracking",
    "nearest": "Depth of the nearest tokens",
}
"""Tasks in the order of the tables."""
SHOWN: dict[str, tuple[str, ...]] = {
    "depth": ("abs_rel", "rmse", "d1"),
    "nearest": ("abs_rel", "rmse", "d1"),
    "normals": ("rmse", "mean", "median", "d1", "d2", "d3"),
    "segmentation": ("aAcc", "mIoU", "mAcc"),
}
"""Metrics in the tables; of other tasks all. CSV has all of all."""
BOOKKEEPING = ("protocol", "seed")
"""Settings that change nothing of how one head is trained and tested, or that tell heads apart by themselves."""
LOWER_IS_BETTER = ("abs_rel", "rmse", "rmse_log", "log10", "silog", "sq_rel", "mean", "median", "rmse_pooled")
"""Of every other metric more is better."""
NAMES = {"abs_rel": "AbsRel", "rmse": "RMSE", "d1": "δ1", "d2": "δ2", "d3": "δ3"}
"""As tables have them; other metrics have their own names."""
NORMALS_NAMES = {"rmse": "RMSE °", "mean": "mean °", "median": "median °"}
NORMALS_NAMES |= {"d1": "<11.25°", "d2": "<22.5°", "d3": "<30°"}
"""Likewise, of surface normals: shares of pixels below three angles."""
BACKBONES = {"dinov2-small": "vits14", "dinov2-base": "vitb14"}
"""The paper's name of a backbone of the registry."""
METHODS = {
    "published": "dinov2",
    "hub": "dinov2",
    "snd": "snd",
    "fit3d-concat": "fit3d",  # the paper evaluates it beside the original features
    "mef": "mef",
}
"""The paper's name of known weights."""


@dataclass(frozen=True)
class Column:
    """What one column of a table holds."""

    dataset: str
    protocol: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """One value of a table."""

    value: Optional[float]
    paper: Optional[float] = None
    """The paper's, of the same backbone and method."""
    best: bool = False
    """No value of the column is better."""


@dataclass(frozen=True)
class Table:
    """The results of one task."""

    task: str
    columns: list[Column]
    rows: list[tuple[str, dict[Column, Cell]]]
    """Label of the model and its values."""
    notes: list[str] = field(default_factory=list)
    """What must be read with the numbers."""


@cache
def paper_results() -> dict[str, Any]:
    """What the paper reports, with units and caveats; see the file's `source`."""
    return json.loads((files("snd_nerfstudio.probing") / "paper_results.json").read_text(encoding="utf-8"))


def paper_names(description: Mapping[str, Any]) -> Optional[tuple[str, str]]:
    """Backbone and method as the paper names them; None for what it has no results of.

    Args:
        description: of a model: `registry_name`; `weights`, a known name; or `method`, that of a
            training run.
    """
    backbone = BACKBONES.get(str(description.get("registry_name")))
    method = METHODS.get(str(description.get("weights")))
    if str(description.get("method", "")).startswith("snd"):
        method = "snd"
    return None if backbone is None or method is None else (backbone, method)


def paper_value(task: str, dataset: str, metric: str, description: Mapping[str, Any]) -> Optional[float]:
    """The paper's figure for a model; None where there is none."""
    names = paper_names(description)
    if names is None:
        return None
    found: Any = paper_results()["results"]
    for name in (task, dataset, *names, metric):
        found = found.get(name, {})
    return found if isinstance(found, (int, float)) else None


# ---------------------------------------------------------------------- tables


def make_tables(results: Sequence[ProbeResult], which: Which = "last") -> list[Table]:
    """One table for each task: a row for each model, a column for each metric of each dataset and protocol.

    Heads of one model, and results that differ only in settings or the copy of the dataset, have rows of their own.

    Args:
        results: any number of them; the same one twice counts once.
        which: metrics after training, or the best on the test set; where nothing was trained they are the same.

    Raises:
        InputError: there is no result.
    """
    if not results:
        raise InputError("There is no result to report: name files or folders with --results.")
    unique = sorted({result.what.key: result for result in results}.values(), key=_order)
    tasks = dict.fromkeys([*TITLES, *sorted(result.what.task for result in unique)])
    grouped = {task: [result for result in unique if result.what.task == task] for task in tasks}
    return [_table(task, group, which) for task, group in grouped.items() if group]


def _order(result: ProbeResult) -> tuple[str, ...]:
    what = result.what
    return what.dataset.name, what.protocol, what.model, what.key


def _table(task: str, results: Sequence[ProbeResult], which: Which) -> Table:
    labels, conditions = _labels(results), _conditions(results)
    columns: dict[Column, None] = {}
    values: dict[str, dict[Column, tuple[float, Optional[float]]]] = {}
    for result in results:
        what = result.what
        row = values.setdefault(labels[what.key], {})
        for metric, value in _metrics(result, which).items():
            column = Column(what.dataset.name, conditions[what.key], metric)
            columns[column] = None
            if value is not None:
                comparable = conditions[what.key] == what.protocol and not what.dataset.part
                paper = paper_value(task, what.dataset.name, metric, what.description) if comparable else None
                row[column] = value, paper
    best = {}
    for column in columns:
        best[column] = _best(column.metric, [row[column][0] for row in values.values() if column in row])
    rows = [
        (label, {column: Cell(value, paper, value == best[column]) for column, (value, paper) in row.items()})
        for label, row in sorted(values.items())
    ]
    return Table(task, list(columns), rows, _notes(task, results, rows, which))


def _conditions(results: Sequence[ProbeResult]) -> dict[str, str]:
    """Protocol of each result by its key, with what was changed of it, and told apart by the copy of the data: only
    what was measured alike stands in one column."""
    names, copies = {}, {}
    for result in results:
        what = result.what
        changed = _changed(what)
        names[what.key] = f"{what.protocol}, changed: {' '.join(changed)}" if changed else what.protocol
        used = [what.dataset.content_hash, what.dataset.split_rule, sorted(what.dataset.samples.items())]
        used.append(what.revision)
        used.append([_used(what, name) for name in changed])
        copies[what.key] = hashlib.sha256(json.dumps(used, default=str).encode()).hexdigest()[:6]
    places: dict[tuple[str, str], set[str]] = {}
    for result in results:
        places.setdefault((result.what.dataset.name, names[result.what.key]), set()).add(copies[result.what.key])
    return {
        what.key: name + (f" #{copies[what.key]}" if len(places[what.dataset.name, name]) > 1 else "")
        for what, name in ((result.what, names[result.what.key]) for result in results)
    }


def _changed(what: Measurement) -> list[str]:
    """Settings of a linear probe that are not its protocol's."""
    from snd_nerfstudio.probing.protocols import PROBES

    if what.task not in PROBES or what.protocol not in ("paper", "fixed", "smoke"):
        return []
    usual = plain(getattr(PROBES[what.task], what.protocol)())
    names = [name for name in what.config if name not in BOOKKEEPING and name in usual]
    return [name for name in names if _used(what, name) != usual[name]]


def _used(what: Measurement, name: str) -> Any:
    """What a setting was for one head: those of one training may have learning rates of their own."""
    return what.variant.get(name, what.config.get(name)) if name == "lr" else what.config.get(name)


def _metrics(result: ProbeResult, which: Which) -> dict[str, Optional[float]]:
    return result.best if which == "best" and result.best else result.last


def _labels(results: Sequence[ProbeResult]) -> dict[str, str]:
    """Label of each result by its key, longer where two would fall into one cell: by what tells heads apart, and by
    the beginning of the key where that is not enough."""
    whats = [result.what for result in results]
    labels = {what.key: what.model for what in whats}
    for same in _collisions(whats, labels):
        names = [name for name in same[0].variant if len({str(what.variant.get(name)) for what in same}) > 1]
        for what in same:
            if names:
                labels[what.key] += f" ({', '.join(f'{name} {what.variant.get(name)}' for name in names)})"
    for same in _collisions(whats, labels):
        for what in same:
            labels[what.key] += f" #{what.key[:6]}"
    return labels


def _collisions(whats: Sequence[Measurement], labels: Mapping[str, str]) -> list[list[Measurement]]:
    """Measurements of one dataset and protocol with the same label."""
    places: dict[tuple[str, str, str], list[Measurement]] = {}
    for what in whats:
        places.setdefault((what.dataset.name, what.protocol, labels[what.key]), []).append(what)
    return [same for same in places.values() if len(same) > 1]


def _best(metric: str, values: Sequence[float]) -> Optional[float]:
    if len(values) < 2:
        return None  # alone it is nothing to be proud of
    own = metric.rpartition("/")[2]  # before it stands which pixels are judged
    return min(values) if own in LOWER_IS_BETTER else max(values)


def _notes(task: str, results: Sequence[ProbeResult], rows: Sequence[Any], which: Which) -> list[str]:
    notes = []
    protocols = sorted({result.what.protocol for result in results})
    caveats = paper_results()["caveats"]
    if any(cell.paper is not None for _, row in rows for cell in row.values()):
        notes.append(f"In brackets: the paper's figure ({paper_results()['tables'].get(task, 'its tables')}).")
        others = [name for name in protocols if name != "paper"]
        if others:
            notes.append(
                f"PROTOCOLS DIFFER: {', '.join(others)} is not how the paper's figures were measured. Compare models "
                "within a column; the distance to the brackets says little."
            )
        notes += [*caveats.get(task, ()), *caveats["all"]]
    if task == "correspondence" and any(result.what.dataset.name == "scannet-1500" for result in results):
        notes += caveats[task]
    if which == "best" and any(result.best for result in results):
        notes.append("Best on the test set itself while training: too good by as much as that selection gains.")
    if "smoke" in protocols:
        notes.append("Protocol smoke tries everything out; its numbers are no measure of a backbone.")
    for result in results:
        what = result.what
        samples = ", ".join(f"{count} {split}" for split, count in sorted(what.dataset.samples.items()))
        notes.append(f"{what.dataset.name} ({what.protocol}): {samples}; split: {what.dataset.split_rule}.")
        notes += [f"{what.dataset.name}: {note}" for note in what.dataset.notes]
        newest = max(other.what.revision for other in results)
        if what.revision < newest:
            notes.append(
                f"{what.model} on {what.dataset.name} was measured by an earlier version: --again measures anew."
            )
        if what.description.get("weights") == "random":
            notes.append(f"{what.model} has random weights.")
    return list(dict.fromkeys(notes))


# ---------------------------------------------------------------------- formats


def render(tables: Sequence[Table], form: Format) -> str:
    """Tables as text.

    Args:
        tables: of `make_tables`.
        form: `csv` has one line for each value; the others have the metrics of `SHOWN`.
    """
    return {"markdown": to_markdown, "csv": to_csv, "latex": to_latex}[form](tables)


def to_markdown(tables: Sequence[Table]) -> str:
    """Best values in bold, the paper's in brackets, notes below each table."""
    parts = []
    for table in tables:
        columns = shown_columns(table)
        header = [f"{c.dataset} ({c.protocol}) {_name(table.task, c.metric)}" for c in columns]
        lines = [f"## {TITLES.get(table.task, table.task)}", ""]
        lines += [_markdown_row(["model", *header]), _markdown_row(["---", *["---:"] * len(columns)])]
        for label, row in table.rows:
            lines.append(_markdown_row([label, *(_text(table.task, c, row.get(c), "**{}**") for c in columns)]))
        lines += ["", *(f"* {note}" for note in table.notes)]
        parts.append("\n".join(lines).rstrip())
    return "\n\n".join(parts) + "\n"


def to_csv(tables: Sequence[Table]) -> str:
    """One line for each value, unrounded."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["task", "dataset", "protocol", "model", "metric", "value", "best", "paper"])
    for table in tables:
        for label, row in table.rows:
            for c in table.columns:
                cell = row.get(c)
                if cell is not None:
                    paper = "" if cell.paper is None else cell.paper
                    writer.writerow(
                        [table.task, *(c.dataset, c.protocol), label, c.metric, cell.value, int(cell.best), paper]
                    )
    return text.getvalue()


def to_latex(tables: Sequence[Table]) -> str:
    r"""A `tabular` for each task, the best values in `\textbf`; notes are comments."""
    parts = []
    for table in tables:
        columns = shown_columns(table)
        groups = list(dict.fromkeys((c.dataset, c.protocol) for c in columns))
        widths = [sum((c.dataset, c.protocol) == group for c in columns) for group in groups]
        titles = [_tex(f"{dataset} ({protocol})") for dataset, protocol in groups]
        heads = [rf"\multicolumn{{{n}}}{{c}}{{{title}}}" for n, title in zip(widths, titles, strict=True)]
        lines = [f"% {TITLES.get(table.task, table.task)}", rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\hline"]
        lines.append(" & ".join(["", *heads]) + r" \\")
        lines.append(" & ".join(["model", *(_tex(_name(table.task, c.metric)) for c in columns)]) + r" \\ \hline")
        for label, row in table.rows:
            cells = [_text(table.task, c, row.get(c), r"\textbf{{{}}}") for c in columns]
            lines.append(" & ".join([_tex(label), *cells]) + r" \\")
        lines += [r"\hline", r"\end{tabular}", *(f"% {note}" for note in table.notes)]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def shown_columns(table: Table) -> list[Column]:
    """The columns that are printed: the metrics of `SHOWN`, those of a dataset beside each other in this order."""
    groups = dict.fromkeys((c.dataset, c.protocol) for c in table.columns)
    chosen = []
    for group in groups:
        own = {c.metric: c for c in table.columns if (c.dataset, c.protocol) == group}
        chosen += [own[name] for name in SHOWN.get(table.task, own) if name in own]
    return chosen


def _name(task: str, metric: str) -> str:
    return (NORMALS_NAMES if task == "normals" else NAMES).get(metric, metric.replace("_", " "))


def _text(task: str, column: Column, cell: Optional[Cell], bold: str) -> str:
    if cell is None or cell.value is None:
        return "-"
    digits = 4 if task in ("depth", "nearest") or column.metric in ("d1", "d2", "d3") else 2
    value = f"{cell.value:.{digits}f}"
    value = bold.format(value) if cell.best else value
    return value if cell.paper is None else f"{value} ({cell.paper:.{digits}f})"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _tex(text: str) -> str:
    named = {"\\": r"\textbackslash{}", "δ": r"$\delta$", "°": r"$^\circ$", "<": "$<$", "~": r"\textasciitilde{}"}
    return "".join(rf"\{letter}" if letter in "&%$#_{}" else named.get(letter, letter) for letter in text)
