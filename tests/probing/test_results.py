"""Results of probes on disk."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.results import (
    SCHEMA,
    DatasetRecord,
    Measurement,
    ProbeResult,
    file_word,
    find_result,
    finished,
    hash_arrays,
    plain,
    read_result,
    read_results,
    write_result,
)

DATASET = DatasetRecord("nyuv2", "train:ab test:cd", "published", {"train": 795, "test": 654}, ("depth in mm",))
WHAT = Measurement(
    "depth",
    DATASET,
    "dinov2_vits14=snd",
    {
        "registry_name": "dinov2-small",
        "weights": "snd",
        "weights_sha256": {"a.pth": "12"},
        "key_match": {"missing": []},
    },
    "fixed",
    {"lr": 1e-4, "features": {"norm": False}},
    42,
)


def result(what=WHAT, **metrics):
    return finished(what, metrics or {"rmse": 0.5}, {"rmse": 0.4}, 12.34567, "cpu", best_iteration=100)


def test_what_was_written_is_read_again(tmp_path):
    written = result(rmse=0.5, abs_rel=0.1)
    file = write_result(written, tmp_path / "new" / "folder")
    assert read_result(file) == written
    assert file.name.startswith("depth_nyuv2_dinov2-vits14-snd_fixed_") and file.suffix == ".json"


def test_a_file_says_with_what_and_where_it_was_measured(tmp_path):
    content = json.loads(write_result(result(), tmp_path).read_text())
    assert content["schema"] == SCHEMA and content["key"] == WHAT.key
    assert content["versions"]["torch"] == torch.__version__.split("+")[0]
    assert content["machine"]["device"] == "cpu" and content["machine"]["cores"] == os.cpu_count()
    assert content["seconds"] == 12.346 and content["date"].endswith("+00:00")
    assert content["what"]["dataset"]["notes"] == ["depth in mm"]


OTHERS = {
    "task": replace(WHAT, task="nearest"),
    "dataset": replace(WHAT, dataset=replace(DATASET, content_hash="train:ab test:ce")),
    "samples": replace(WHAT, dataset=replace(DATASET, samples={"train": 10, "test": 654})),
    "model": replace(WHAT, model="another"),
    "weights": replace(WHAT, description={**WHAT.description, "weights_sha256": {"a.pth": "13"}}),
    "protocol": replace(WHAT, protocol="paper"),
    "config": replace(WHAT, config={**WHAT.config, "features": {"norm": True}}),
    "seed": replace(WHAT, seed=43),
    "variant": replace(WHAT, variant={"head_norm": "batch"}),
}


@pytest.mark.parametrize("change", OTHERS)
def test_a_measurement_is_found_again_and_no_other_is_taken_for_it(tmp_path, change):
    write_result(result(), tmp_path)
    reordered = replace(WHAT, config=dict(reversed(WHAT.config.items())))
    assert find_result(reordered, tmp_path) == read_results([tmp_path])[0]
    assert find_result(OTHERS[change], tmp_path) is None
    assert OTHERS[change].file_name != WHAT.file_name


def test_a_result_is_not_overwritten_unless_that_is_asked_for(tmp_path):
    file = write_result(result(rmse=0.5), tmp_path)
    before = file.read_text()
    with pytest.raises(InputError, match="exists already.*--again"):
        write_result(result(rmse=0.7), tmp_path)
    assert file.read_text() == before
    write_result(result(rmse=0.7), tmp_path, replace=True)
    assert read_result(file).last == {"rmse": 0.7}
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]  # nothing unfinished is left


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: "[]", "no result of snd-probe"),
        (lambda text: text.replace('"schema": 2', '"schema": 9'), "has schema 9"),
        (lambda text: text.replace('"seconds"', '"minutes"'), "lacks `seconds`"),
        (lambda text: text.replace('"content_hash"', '"hash"'), "lacks `content_hash`"),
        (lambda text: text.replace('"seed": 42', '"seed": "42"'), "lacks `seed`"),
        (lambda text: text.replace('"rmse": 0.5', '"rmse": "good"'), "`last` must be numbers"),
        (lambda text: text.replace('"protocol": "fixed"', '"protocol": "paper"'), "was changed after it was written"),
    ],
)
def test_a_damaged_result_is_refused_by_name(tmp_path, damage, message):
    file = write_result(result(), tmp_path)
    text = damage(file.read_text())
    assert text != file.read_text()
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_result(file)
    assert str(file) in str(caught.value)


def test_a_file_of_that_name_with_another_measurement_is_not_taken(tmp_path):
    file = write_result(result(OTHERS["seed"]), tmp_path)
    file.rename(tmp_path / WHAT.file_name)
    with pytest.raises(InputError, match="another measurement"):
        find_result(WHAT, tmp_path)


def test_results_of_folders_come_in_the_order_of_their_names_and_once(tmp_path):
    names = sorted(write_result(result(what), tmp_path).name for what in (WHAT, OTHERS["task"], OTHERS["protocol"]))
    (tmp_path / "notes.txt").write_text("not a result")
    found = read_results([tmp_path, tmp_path / names[0]])
    assert [entry.what.file_name for entry in found] == names


def test_places_without_results_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        read_results([tmp_path / "missing"])
    with pytest.raises(InputError, match="no result"):
        read_results([tmp_path])


def test_a_folder_that_cannot_be_made_is_a_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written.*--out"):
        write_result(result(), tmp_path / "file" / "folder")


def test_what_json_does_not_have_becomes_something_that_it_has():
    value = {"a": math.nan, 1: (np.float32(2), torch.tensor([1.0, math.inf])), "path": DATASET}
    assert plain(value) == {
        "a": None,
        "1": [2.0, [1.0, None]],
        "path": {
            "name": "nyuv2",
            "content_hash": "train:ab test:cd",
            "split_rule": "published",
            "samples": {"train": 795, "test": 654},
            "notes": ["depth in mm"],
            "part": False,
        },
    }


def test_metrics_that_are_not_numbers_yet_are_null(tmp_path):
    file = write_result(result(rmse=math.nan), tmp_path)
    assert read_result(file).last == {"rmse": None}


def test_the_hash_of_arrays_sees_names_values_types_shapes_and_order():
    array = np.arange(6, dtype=np.int32)
    entries = [("a", [array, array + 1])]
    others = [
        [("b", [array, array + 1])],
        [("a", [array, array + 2])],
        [("a", [array + 1, array])],
        [("a", [array.reshape(2, 3), array + 1])],
        [("a", [array.view(np.uint32), array + 1])],
    ]
    assert hash_arrays(entries) == hash_arrays([("a", [array.copy(), (array + 1)[:]])])
    assert len({hash_arrays(entries), *(hash_arrays(other) for other in others)}) == 6
    columns = np.arange(6).reshape(2, 3)
    assert hash_arrays([("", [columns.T])]) == hash_arrays([("", [np.ascontiguousarray(columns.T)])])


def test_any_label_makes_a_plain_file_name():
    assert file_word("dinov2_vits14=/home/me/weights äö.pth") == "dinov2-vits14-home-me-weights-.pth"
    assert file_word("../..") == "x"
    assert len(file_word("long" * 100)) == 60


def test_a_result_without_training_has_no_best():
    assert ProbeResult(WHAT, {"recall_10px": 50.0}, {}).best_iteration is None
