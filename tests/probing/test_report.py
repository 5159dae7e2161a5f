"""Tables of results."""

import csv
import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.report import (
    Cell,
    Column,
    make_tables,
    paper_results,
    paper_value,
    render,
    to_csv,
    to_latex,
    to_markdown,
)
from snd_nerfstudio.probing.results import DatasetRecord, Measurement, ProbeResult

REFERENCE = Path(__file__).parents[3] / "shared" / "specs" / "reference_results.json"
SMALL_SND = {"registry_name": "dinov2-small", "weights": "snd"}
SMALL = {"registry_name": "dinov2-small", "weights": "published"}


def result(model="ours", metrics=None, task="depth", dataset="scannetpp", protocol="paper", about=None, **more):
    record = DatasetRecord(dataset, "hash", "published", {"test": 3}, more.pop("notes", ()))
    best = more.pop("best", {})
    config = more.pop("config", {})
    what = Measurement(task, record, model, about or {"registry_name": "tiny"}, protocol, config, 0, **more)
    return ProbeResult(what, metrics or {"abs_rel": 0.2, "rmse": 0.5}, best)


def cells(tables, label):
    return {column.metric: cell for column, cell in dict(tables[0].rows)[label].items()}


# ---------------------------------------------------------------------- the paper's figures


@pytest.mark.parametrize(
    ("task", "dataset", "metric", "about", "figure"),
    [
        ("depth", "scannetpp", "abs_rel", SMALL_SND, 0.2421),
        ("depth", "kitti", "rmse", {"registry_name": "dinov2-base", "weights": "mef"}, 2.416),
        ("normals", "nyuv2", "rmse", {"registry_name": "dinov2-base", "weights": "hub"}, 31.4),
        ("segmentation", "voc2012", "mIoU", {"registry_name": "dinov2-base", "weights": "snd"}, 85.75),
        ("segmentation", "scannet", "aAcc", {"registry_name": "dinov2-small", "weights": "fit3d-concat"}, 78.53),
        ("depth", "nyuv2", "rmse", {"registry_name": "dinov2-small", "weights": "run", "method": "snd"}, 0.4912),
        # nothing in the paper: FiT3D alone, another size, another metric, another dataset, other weights
        ("depth", "nyuv2", "rmse", {"registry_name": "dinov2-small", "weights": "fit3d"}, None),
        ("depth", "nyuv2", "rmse", {"registry_name": "dinov2-large", "weights": "published"}, None),
        ("depth", "nyuv2", "d1", SMALL, None),
        ("depth", "kitti", "rmse", SMALL, None),
        ("depth", "rooms", "rmse", SMALL, None),
        ("nearest", "nyuv2", "rmse", SMALL, None),
        ("depth", "nyuv2", "rmse", {"registry_name": "dinov2-small", "weights": "random"}, None),
    ],
)
def test_the_papers_figure_is_that_of_the_same_backbone_and_method(task, dataset, metric, about, figure):
    assert paper_value(task, dataset, metric, about) == figure


def test_all_figures_of_the_paper_are_there():
    if not REFERENCE.is_file():
        pytest.skip("the transcription of the paper's tables is not at hand")
    names = {"depth_linear_probe": "depth", "surface_normal_linear_probe": "normals"}
    seen = 0
    for record in json.loads(REFERENCE.read_text())["records"]:
        if record["method"] not in paper_results()["methods"]:
            continue
        task = names.get(record["task"], "segmentation")
        metric = "rmse" if record["metric"] == "rmse_deg" else record["metric"]
        found = paper_results()["results"][task][record["dataset"]][record["backbone"]][record["method"]][metric]
        assert found == record["value"]
        seen += 1
    kept = paper_results()["results"].values()
    models = [method for task in kept for data in task.values() for bone in data.values() for method in bone.values()]
    assert seen == sum(map(len, models)) == 160


# ---------------------------------------------------------------------- tables


def depth_of_nyu(part=False, lr=1e-4, **more):
    from snd_nerfstudio.probing.protocols import DepthProbe
    from snd_nerfstudio.probing.results import plain

    config = plain(DepthProbe.paper()) | {"lr": lr}
    record = DatasetRecord("nyuv2", "hash", "published", {"test": 3}, part=part)
    what = Measurement("depth", record, "ours", SMALL, "paper", config, 0, {"lr": lr, "repeat": 0}, **more)
    return ProbeResult(what, {"abs_rel": 0.2}, {})


def test_what_was_measured_otherwise_has_no_figure_of_the_paper_beside_it():
    def figures(*results):
        (table,) = make_tables(results)
        return [cell.paper for _, row in table.rows for cell in row.values()]

    assert figures(depth_of_nyu()) == [paper_value("depth", "nyuv2", "abs_rel", SMALL)] != [None]
    assert figures(depth_of_nyu(part=True)) == figures(depth_of_nyu(lr=1e-2)) == [None]
    (table,) = make_tables([depth_of_nyu(), depth_of_nyu(lr=1e-2)])
    assert [column.protocol for column in table.columns] == ["paper", "paper, changed: lr"]


def test_results_of_an_earlier_version_stand_in_a_column_of_their_own():
    (table,) = make_tables([depth_of_nyu(), depth_of_nyu(revision=0)])
    assert len(table.columns) == 2 and any("earlier version" in note for note in table.notes)


def test_the_best_of_each_column_is_marked_by_what_is_better():
    tables = make_tables(
        [
            result("a", {"abs_rel": 0.3, "rmse": 0.5, "d1": 0.9}),
            result("b", {"abs_rel": 0.2, "rmse": 0.5, "d1": 0.8}),
            result("c", {"abs_rel": None, "rmse": 0.6, "d1": 0.7}),
        ]
    )
    marked = {label: [metric for metric, cell in cells(tables, label).items() if cell.best] for label in "abc"}
    assert marked == {"a": ["rmse", "d1"], "b": ["abs_rel", "rmse"], "c": []}
    assert "abs_rel" not in cells(tables, "c")


def test_of_errors_over_other_pixels_less_is_better_too():
    both = [
        result(name, {"depth/rmse": value, "depth/d1": value}, task="normals")
        for name, value in (("a", 1.0), ("b", 2.0))
    ]
    tables = make_tables(both)
    assert [metric for metric, cell in cells(tables, "a").items() if cell.best] == ["depth/rmse"]
    assert [metric for metric, cell in cells(tables, "b").items() if cell.best] == ["depth/d1"]


def test_a_model_alone_is_not_the_best():
    assert not any(cell.best for cell in cells(make_tables([result("a")]), "a").values())


def test_a_row_is_a_model_and_a_column_a_metric_of_a_dataset_and_protocol():
    tables = make_tables(
        [
            result("a", {"rmse": 1.0}, dataset="nyuv2"),
            result("a", {"rmse": 2.0}, dataset="kitti", protocol="fixed"),
            result("b", {"mIoU": 30.0}, task="segmentation"),
        ]
    )
    assert [table.task for table in tables] == ["depth", "segmentation"]
    assert tables[0].rows == [
        ("a", {Column("kitti", "fixed", "rmse"): Cell(2.0), Column("nyuv2", "paper", "rmse"): Cell(1.0)})
    ]


def test_heads_of_one_model_are_told_apart_by_what_differs():
    heads = [
        result("a", {"mIoU": value}, task="segmentation", variant={"lr": 0.001, "head_norm": norm})
        for norm, value in (("none", 1.0), ("batch", 2.0))
    ]
    assert [label for label, _ in make_tables(heads)[0].rows] == ["a (head_norm batch)", "a (head_norm none)"]


def test_results_with_other_settings_get_rows_of_their_own():
    both = [result("a", {"rmse": value}, config={"lr": value}) for value in (1.0, 2.0)]
    labels = {label for label, _ in make_tables(both)[0].rows}
    assert labels == {f"a #{entry.what.key[:6]}" for entry in both} and len(labels) == 2


def test_only_what_was_measured_alike_stands_in_one_column():
    usual = result("a", {"rmse": 1.0}, about=SMALL_SND, config={"iterations": 307_200, "seed": 1})
    short = result("b", {"rmse": 0.5}, about=SMALL_SND, config={"iterations": 10, "seed": 1})
    (table,) = make_tables([usual, short])
    rows = dict(table.rows)
    assert rows["a"] == {Column("scannetpp", "paper", "rmse"): Cell(1.0, 0.3299)}
    # the paper's figure is not beside what was measured otherwise, and nothing is best of different things
    assert rows["b"] == {Column("scannetpp", "paper, changed: iterations", "rmse"): Cell(0.5)}


def test_other_copies_of_a_dataset_have_columns_of_their_own():
    one = result("a", {"rmse": 1.0}, about=SMALL_SND)
    fewer = replace(one.what.dataset, content_hash="other", samples={"test": 1})
    (table,) = make_tables([one, replace(one, what=replace(one.what, model="b", dataset=fewer))])
    columns = {column.protocol for column in table.columns}
    assert len(columns) == 2 and all(column.startswith("paper #") for column in columns)
    assert not any(cell.best or cell.paper for _, row in table.rows for cell in row.values())


def test_protocols_are_told_apart_wherever_the_paper_is_beside():
    fixed = make_tables([result("a", about=SMALL_SND, protocol="fixed")])[0].notes
    paper = make_tables([result("a", about=SMALL_SND, protocol="paper")])[0].notes
    nothing = make_tables([result("a", dataset="rooms", protocol="fixed")])[0].notes
    assert any(note.startswith("PROTOCOLS DIFFER: fixed") for note in fixed)
    assert not any(note.startswith("PROTOCOLS DIFFER") for note in paper + nothing)
    assert any("the paper's figure (tables 1 and 4)" in note for note in fixed)
    assert not any("paper's figure" in note for note in nothing)


def test_notes_of_the_dataset_and_of_random_weights_are_printed_once():
    random_weights = {"registry_name": "tiny", "weights": "random"}
    notes = make_tables([result(name, about=random_weights, notes=("near duplicates",)) for name in "ab"])[0].notes
    assert notes.count("scannetpp: near duplicates") == 1
    assert "a has random weights." in notes and "b has random weights." in notes


def test_the_best_on_the_test_set_is_only_shown_with_a_warning():
    trained = result("a", {"rmse": 0.5}, best={"rmse": 0.4})
    assert cells(make_tables([trained]), "a")["rmse"].value == 0.5
    chosen = make_tables([trained], "best")
    assert cells(chosen, "a")["rmse"].value == 0.4
    assert any("Best on the test set" in note for note in chosen[0].notes)
    untrained = make_tables([result("a", {"recall_5px": 3.0}, task="correspondence")], "best")
    assert cells(untrained, "a")["recall_5px"].value == 3.0
    assert not any("Best on the test set" in note for note in untrained[0].notes)


def test_no_result_is_a_users_mistake():
    with pytest.raises(InputError, match="no result"):
        make_tables([])


# ---------------------------------------------------------------------- formats

TWO = [
    result("ours_a|b", {"abs_rel": 0.25, "rmse": 0.34567, "silog": 9.0}, about=SMALL_SND),
    result("plain", {"abs_rel": 0.3, "rmse": 0.3}, about=SMALL),
]


def test_markdown_has_the_best_in_bold_and_the_paper_in_brackets():
    lines = to_markdown(make_tables(TWO)).splitlines()
    assert lines[0] == "## Depth"
    assert lines[2] == "| model | scannetpp (paper) AbsRel | scannetpp (paper) RMSE |"
    assert lines[4] == r"| ours_a\|b | **0.2500** (0.2421) | 0.3457 (0.3299) |"
    assert lines[5] == "| plain | 0.3000 (0.2811) | **0.3000** (0.3777) |"


def test_csv_has_every_value_as_it_is():
    rows = list(csv.DictReader(io.StringIO(to_csv(make_tables(TWO)))))
    assert len(rows) == 5
    first = {"task": "depth", "dataset": "scannetpp", "protocol": "paper", "model": "ours_a|b"}
    assert rows[1] == {**first, "metric": "rmse", "value": "0.34567", "best": "0", "paper": "0.3299"}
    assert rows[2] == {**first, "metric": "silog", "value": "9.0", "best": "0", "paper": ""}


def test_latex_escapes_what_it_must():
    text = to_latex(make_tables(TWO))
    assert r"ours\_a|b & \textbf{0.2500} (0.2421) & 0.3457 (0.3299) \\" in text
    assert r"& \multicolumn{2}{c}{scannetpp (paper)} \\" in text
    normals = make_tables([result("100 %", {"rmse": 30.0, "d1": 0.5}, task="normals")])
    assert r"100 \% & 30.00 & 0.5000 \\" in to_latex(normals)
    assert r"RMSE $^\circ$ & $<$11.25$^\circ$" in to_latex(normals)


def test_missing_values_are_dashes():
    results = [result("a", {"abs_rel": None, "rmse": 1.0}), result("b", {"abs_rel": 0.1}, dataset="kitti")]
    assert "| a | - | - | 1.0000 |" in to_markdown(make_tables(results))
    assert r"a & - & - & 1.0000 \\" in to_latex(make_tables(results))


@pytest.mark.parametrize("form", ["markdown", "csv", "latex"])
def test_the_order_of_the_results_makes_no_difference(form):
    results = [
        result(model, {"rmse": value, "abs_rel": 0.1}, dataset=dataset, protocol=protocol, about=SMALL)
        for model, value in (("a", 1.0), ("b", 2.0))
        for dataset in ("nyuv2", "scannet")
        for protocol in ("paper", "fixed")
    ] + [replace(TWO[0])]
    texts = set()
    for seed in range(5):
        shuffled = results + results[:3]  # some of them twice
        random.Random(seed).shuffle(shuffled)
        texts.add(render(make_tables(shuffled), form))
    assert len(texts) == 1
