"""The command ``snd-probe``, on small rooms and tiny backbones with random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from snd_nerfstudio import snd_probe
from snd_nerfstudio.backbones.build import build_backbone
from snd_nerfstudio.checksums import sha256
from snd_nerfstudio.errors import InputError
from snd_nerfstudio.probing.models import ProbeModel
from snd_nerfstudio.probing.pairs import RoomPairs, RoomPairsSettings
from snd_nerfstudio.probing.report import make_tables
from snd_nerfstudio.probing.results import read_result, read_results
from tests.probing.backbones import refined, tiny_model
from tests.probing.datasets.writers import write_scannetpp, write_voc2012
from tests.probing.pairs.trees import write_scannet, write_superglue
from tests.probing.test_keypoints import tree  # noqa: F401  a small SPair-71k

TINY = "tiny=random"


@pytest.fixture
def probe(rooms, tmp_path):
    """Runs a measuring command on the rooms and gives the results that are then there."""

    def run(command, *flags, models=(TINY,), data=rooms):
        arguments = [command, "--models", *models, "--data", data, "--out", tmp_path, "--device", "cpu", *flags]
        snd_probe.main(list(map(str, arguments)))
        return read_results([tmp_path])

    return run


def pictures(folder, beginning=""):
    """Names of the pictures, each of which can be decoded."""
    files = sorted((folder / "pictures").glob(f"{beginning}*.png"))
    assert all(np.asarray(Image.open(file)).ndim == 3 for file in files)
    return [file.name for file in files]


# ---------------------------------------------------------------------- finding the command


def test_the_overview_names_all_commands_and_datasets(capsys):
    from snd_nerfstudio.probing.datasets import DATASETS
    from snd_nerfstudio.probing.pairs import NAMES

    snd_probe.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in snd_probe.COMMANDS)
    assert snd_probe.LINEAR_DATASETS == tuple(DATASETS)
    assert snd_probe.PAIR_DATASETS == (*NAMES, "spair")
    assert " ".join(snd_probe.LINEAR_DATASETS) in printed and " ".join(snd_probe.PAIR_DATASETS) in printed


@pytest.mark.parametrize("name", snd_probe.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        snd_probe.main([name, "--help"])
    assert ended.value.code == 0
    assert f"snd-probe {name}" in capsys.readouterr().out


def test_an_unknown_command_is_named():
    with pytest.raises(InputError, match="knows no `dept`: take one of depth, normals"):
        snd_probe.main(["dept"])


def test_nothing_heavy_is_loaded_before_it_is_known_what_to_do():
    program = "import sys, snd_nerfstudio.snd_probe as p; p.main([])\n"
    program += "print([m for m in ('torch', 'tyro') if m in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------- --check


def check(*arguments):
    with pytest.raises(SystemExit) as ended:
        snd_probe.main(list(map(str, arguments)))
    return ended.value.code


def test_a_dataset_that_is_whole_passes_the_check(rooms, capsys):
    assert check("rooms", "--check", rooms) == 0
    assert f"rooms in {rooms}: nothing is missing." in capsys.readouterr().out


def test_a_damaged_file_between_those_that_are_looked_at_needs_a_thorough_check(rooms, tmp_path, capsys):
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    damaged = sorted((copy / "scenes").glob("*/depth/*.png"))[3]
    damaged.write_bytes(damaged.read_bytes()[:-200])
    assert check("rooms", "--check", copy, "--task", "depth") == 0
    assert check("rooms", "--check", copy, "--task", "depth", "--thorough") == 1
    printed = capsys.readouterr()
    assert str(damaged) in printed.out and "depth, test: 60 of 60" in printed.err


def test_what_is_missing_is_said_and_the_code_is_one(rooms, tmp_path, capsys):
    copy = tmp_path / "rooms"
    shutil.copytree(rooms, copy)
    gone = sorted((copy / "scenes").glob("*/depth/*.png"))[3]
    gone.unlink()
    assert check("rooms", "--check", copy) == 1
    assert str(gone) in capsys.readouterr().out
    assert check("rooms", "--check", copy, "--task", "pairs") == 1


def test_a_folder_that_is_something_else_fails_every_check(tmp_path, capsys):
    for name in {*snd_probe.LINEAR_DATASETS, *snd_probe.PAIR_DATASETS}:
        assert check(name, "--check", tmp_path) == 1, name
        assert str(tmp_path) in capsys.readouterr().out


# ---------------------------------------------------------------------- matching


def test_correspondence_writes_what_was_measured_and_with_what(probe, tmp_path):
    (found,) = probe("correspondence", "--limit", 4, "--pictures", 2)
    what = found.what
    assert (what.task, what.dataset.name, what.model, what.protocol) == ("correspondence", "rooms", TINY, "fixed")
    assert what.dataset.samples == {"pairs": 4} and len(what.dataset.content_hash) == 64
    assert what.config["matching"]["scale"] == 0.25 and what.config["features"]["norm"] is False
    assert what.description["registry_name"] == "tiny" and len(what.description["state_sha256"]) == 64
    assert set(found.last) == {
        *(f"recall_{name}" for name in ("5px", "10px", "20px", "1cm", "2cm", "5cm")),
        *(f"bin_{name}" for name in ("0-15", "15-30", "30-60", "60-180")),
    }
    assert 0 <= found.last["recall_5px"] <= found.last["recall_10px"] <= found.last["recall_20px"] <= 100
    assert len(found.details["each"]) == found.details["pairs"] == 4
    assert len(pictures(tmp_path, "correspondence_rooms_")) == 2


def test_what_is_there_already_is_not_measured_again_unless_asked_for(probe, tmp_path, capsys):
    (first,) = probe("correspondence", "--limit", 2)
    file = tmp_path / first.what.file_name
    before = file.stat().st_mtime_ns
    probe("correspondence", "--limit", 2)
    assert "Already measured" in capsys.readouterr().out and file.stat().st_mtime_ns == before
    (again,) = probe("correspondence", "--limit", 2, "--again")
    assert "Already measured" not in capsys.readouterr().out and file.stat().st_mtime_ns > before
    assert again.last == first.last
    assert len(probe("correspondence", "--limit", 2, "--matches", 50)) == 2


def test_the_papers_protocol_is_another_measurement(probe):
    probe("correspondence", "--limit", 3, "--protocol", "paper")
    paper, fixed = sorted(probe("correspondence", "--limit", 3), key=lambda found: found.what.protocol != "paper")
    assert (paper.what.protocol, fixed.what.protocol) == ("paper", "fixed")
    assert paper.what.config["features"]["input_norm"] == "half"
    assert paper.what.config["matching"]["pad_crop"] == "parity"
    assert fixed.what.config["features"]["input_norm"] == "imagenet"
    assert paper.last != fixed.last and paper.what.dataset == fixed.what.dataset


def test_a_flag_overrides_the_protocol(probe):
    (found,) = probe("correspondence", "--limit", 2, "--protocol", "paper", "--norm", "imagenet")
    assert found.what.config["features"]["input_norm"] == "imagenet"
    assert found.what.config["matching"]["pad_crop"] == "parity"


@pytest.mark.parametrize(("name", "write"), [("scannet-1500", write_scannet), ("superglue", write_superglue)])
def test_published_pairs_are_resized_as_in_the_released_code(probe, rooms, tmp_path, name, write):
    data = tmp_path / "data"
    data.mkdir()
    write(data, RoomPairs(rooms, RoomPairsSettings(pairs=2)))
    assert check(name, "--check", data) == 0
    (found,) = probe("correspondence", "--dataset", name, "--protocol", "paper", data=data)
    assert found.what.config["size"] == [480, 640] and found.what.dataset.samples == {"pairs": 2}
    assert found.what.dataset.split_rule == "published list"
    (table,) = make_tables([found])
    assert any("figure 7 is a plot" in note for note in table.notes) == (name == "scannet-1500")


def test_mef_sees_images_as_large_as_in_its_own_code_if_asked_to():
    from snd_nerfstudio.probing.commands.matching import Correspondence, resized_to

    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    grids = {}
    for mef_res in ("same", "native"):
        flags = Correspondence((), Path(), mef_res=mef_res)
        for model in (ProbeModel.from_backbone("mef", refined()), tiny_model()):
            values = flags.encoder(model, flags.settings(), resized_to(None))(image).values
            grids[model.label, mef_res] = tuple(values.shape[-2:])
    # 56 x 84 enlarged to 747 x 1120, which is padded to whole patches of 14
    assert grids["mef", "native"] == (54, 80)
    assert grids["mef", "same"] == grids[tiny_model().label, "same"] == grids[tiny_model().label, "native"] == (4, 6)


def test_another_seed_draws_other_pairs(probe):
    (first,) = probe("correspondence", "--limit", 4)
    other = next(found for found in probe("correspondence", "--limit", 4, "--pair-seed", 5) if found != first)
    assert other.what.dataset.content_hash != first.what.dataset.content_hash


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("tracking", ("--window", "-1"), "--window -1"),
        ("tracking", ("--frames", "0"), "--frames 0"),
        ("depth", ("--features.block", "99"), "--features.block 99"),
        ("depth", ("--epochs", "1"), "--epochs 1 and --iterations 307200 contradict"),
        ("depth", ("--betas", "0.9", "0.99"), "--betas has no effect"),
        ("normals", ("--epochs", "0"), "--epochs 0 must be above 0"),
    ],
)
def test_settings_that_would_have_no_effect_or_are_impossible_are_refused(probe, command, flags, message):
    with pytest.raises(InputError, match=message):
        probe(command, *flags)


def test_points_are_tracked(probe):
    (found,) = probe("tracking", "--frames", 4, "--points", 20)
    assert found.what.dataset.samples == {"videos": 1} and found.details["points"] == 20
    assert found.last["average"] == pytest.approx(np.mean([found.last[f"within_{n}px"] for n in (1, 2, 4, 8, 16)]))


def test_depth_of_the_nearest_tokens_is_measured(probe):
    (found,) = probe("nearest", "--limit", 6, "--neighbours", 4)
    assert found.what.dataset.samples == {"train": 6, "test": 6} and len(found.details["images"]) == 6
    mean = np.mean([image["rmse"] for image in found.details["images"]])
    assert found.last["rmse"] == pytest.approx(mean)
    # rooms are two to ten metres large: what is near in feature space is not off by more than that
    assert 0 < found.last["rmse"] < 8


def test_the_bank_of_tokens_is_never_larger_than_asked_for_and_of_all_images(probe):
    probe("nearest", "--limit", 6, "--neighbours", 4, "--most-tokens", 12)
    both = probe("nearest", "--limit", 6, "--neighbours", 4, "--most-tokens", 48)
    assert {found.details["bank_tokens"] for found in both} == {12, 48}


def test_keypoints_are_carried(probe, tree):  # noqa: F811
    (found,) = probe("keypoints", "--longest-side", 56, data=tree)
    assert found.what.dataset.name == "spair" and found.what.dataset.samples == {"test": 2}
    assert set(found.details["categories"]) == {"aeroplane", "cat"} and found.details["points"] == 3


def test_both_backbones_of_a_run_can_be_measured(probe, adapted_run):
    models = (f"{adapted_run}@original", str(adapted_run))
    teacher, original = sorted(
        probe("correspondence", "--limit", 2, models=models), key=lambda r: "original" in r.what.model
    )
    assert teacher.what.model == "run@teacher" and original.what.model == "run@original"
    assert teacher.what.description["method"] == "snd-tiny" and teacher.what.description["step"] == 1
    (name,) = teacher.what.description["weights_sha256"]
    assert name.startswith("step-") and teacher.last != original.last


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--limit", "0"), "--limit 0"),
        (("--device", "toaster"), "--device toaster"),
        (("--dataset", "nyuv2"), "--dataset nyuv2 has no posed pairs"),
        (("--block", "99"), "--block 99: tiny=random has 4 blocks, so give -4 to 3"),
        (("--size", "0", "5"), "--size"),
    ],
)
def test_impossible_flags_are_named(probe, flags, message):
    with pytest.raises(InputError, match=message):
        probe("correspondence", *flags)


def test_a_model_that_is_named_twice_or_not_known_is_refused(probe):
    with pytest.raises(InputError, match="names a model twice"):
        probe("correspondence", models=(TINY, TINY))
    with pytest.raises(InputError, match="--models"):
        probe("correspondence", models=("dinov9",))
    with pytest.raises(InputError, match=r"config.yml@pupil: behind the @ stands one of teacher"):
        probe("correspondence", models=("config.yml@pupil",))


# ---------------------------------------------------------------------- linear probes

FEW = ("--protocol", "smoke", "--iterations", 3, "--batch", 2, "--limit", 4)


@pytest.mark.parametrize(
    ("task", "metrics"), [("depth", {"abs_rel", "rmse", "d1"}), ("normals", {"rmse", "mean", "median", "d1"})]
)
def test_a_linear_probe_is_trained_measured_and_drawn(probe, tmp_path, task, metrics):
    (found,) = probe(task, *FEW, "--pictures", 1)
    what = found.what
    assert what.task == task and what.protocol == "smoke" and what.dataset.samples == {"train": 4, "test": 4}
    assert what.config["iterations"] == 3 and metrics <= set(found.last) and metrics <= set(found.best)
    assert found.best_iteration == 3 and (tmp_path / found.details["head_file"]).is_file()
    assert "4 of 120" in what.dataset.split_rule and "4 of 60" in what.dataset.split_rule
    assert len(pictures(tmp_path, f"{task}_rooms_smoke_")) == 1


def test_each_head_of_a_segmentation_probe_has_a_result(probe, tmp_path):
    results = probe("segmentation", *FEW, "--pictures", 1)
    assert [found.what.variant["head_norm"] for found in results] in (["none", "batch"], ["batch", "none"])
    assert results[0].last != results[1].last and set(results[0].last) == {"aAcc", "mIoU", "mAcc"}
    assert len(pictures(tmp_path, "segmentation_")) == 1


@pytest.mark.parametrize(
    ("task", "name", "write", "flags"),
    [
        ("depth", "scannetpp", write_scannetpp, FEW),
        ("segmentation", "voc2012", write_voc2012, FEW),
        # crops, flips and windows of the released code; images are enlarged to 512 pixels for that
        ("segmentation", "scannetpp", write_scannetpp, ("--protocol", "paper", "--iterations", 1, "--limit", 2)),
    ],
)
def test_published_layouts_are_probed(probe, rooms, tmp_path, task, name, write, flags):
    write(rooms, tmp_path / "data")
    assert check(name, "--check", tmp_path / "data", "--task", task) == 0
    found = probe(task, "--dataset", name, *flags, data=tmp_path / "data")[0]
    assert (found.what.task, found.what.dataset.name, found.what.protocol) == (task, name, flags[1])
    assert all(value is not None and value >= 0 for value in found.last.values())


def test_a_trained_probe_is_not_trained_again_and_another_model_is_added(probe, tmp_path, capsys):
    weights = tmp_path / "weights" / "other.safetensors"
    weights.parent.mkdir()
    save_file(build_backbone("tiny", "random", seed=1).vit.state_dict(), weights)
    (first,) = probe("depth", *FEW)
    file = tmp_path / first.what.file_name
    before = file.read_bytes()
    results = probe("depth", *FEW, "--pictures", 1, models=(TINY, f"tiny={weights}"))
    assert "Already measured" in capsys.readouterr().out and file.read_bytes() == before
    other = next(found for found in results if found.what.model != TINY)
    assert other.what.description["weights_sha256"] == {"other.safetensors": sha256(weights)}
    assert other.what.description["key_match"] is not None and other.last != first.last
    assert len(pictures(tmp_path, "depth_")) == 1  # of both models


def test_measured_again_a_probe_gives_the_same(probe):
    (first,) = probe("depth", *FEW)
    (again,) = probe("depth", *FEW, "--again")
    assert again.last == first.last and again.details["curve"] == first.details["curve"]


def test_further_heads_are_added_to_those_that_are_there(probe, tmp_path, capsys):
    """A head does not depend on the others, nor on the order in which models are named."""
    (first,) = probe("depth", *FEW)
    file = tmp_path / first.what.file_name
    before = file.read_bytes()
    more = probe("depth", *FEW, "--repeats", 2, "--more-lrs", 1e-3)
    assert len(more) == 4 and file.read_bytes() == before and "Already measured" in capsys.readouterr().out
    assert len({(found.what.variant["lr"], found.what.variant["repeat"]) for found in more}) == 4
    count = len(list((tmp_path / "runs").iterdir()))
    probe("depth", *FEW, "--repeats", 2, "--more-lrs", 1e-3)
    assert len(list((tmp_path / "runs").iterdir())) == count


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(rooms, tmp_path):
    (tmp_path / "file").write_text("")
    for command in ("depth", "correspondence"):
        flags = ["--models", TINY, "--data", str(rooms), "--out", str(tmp_path / "file" / "probes")]
        with pytest.raises(InputError, match=r"--out .*file/probes cannot be written"):
            snd_probe.main([command, *flags])


def test_tokens_on_disk_are_shared_by_trainings_and_counted_before_they_are_made(probe, tmp_path):
    flags = ("--protocol", "fixed", "--cache", "disk", "--batch", 2, "--limit", 4, "--iterations", 2)
    probe("depth", *flags)
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "tokens").rglob("*.npy")}
    probe("depth", *flags, "--lr", 1e-3)
    assert kept == {file: file.stat().st_mtime_ns for file in (tmp_path / "tokens").rglob("*.npy")}
    # 6 x 4 tokens of 96 channels and a class token, 4 training and 8 test images with their mirror images, labels
    size = 12 * 2 * 96 * 25 + 8 * 56 * 84 * 4
    for limit, enough in ((size + 1, True), (size - 1, False)):
        more = ("--lr", 2e-4 + 1e-4 * enough, "--cache-limit-gb", limit / 1e9)
        if enough:
            probe("depth", *flags, *more)
        else:
            with pytest.raises(InputError, match="Tokens and labels of 1 models take .* GB together, more than"):
                probe("depth", *flags, *more)


def test_the_default_protocol_runs_on_rooms_of_any_size(probe):
    (found,) = probe("depth", "--iterations", 1, "--limit", 2)
    assert found.what.protocol == "fixed" and found.what.config["augment"] and found.last["rmse"] > 0


def test_results_that_were_not_all_written_are_written_without_training_anew(probe, tmp_path, monkeypatch):
    """The second of three files is lost, as if the command had been killed before it was there."""
    flags = (*FEW, "--more-lrs", 1e-3, 1e-4)
    before = probe("depth", *flags)
    (tmp_path / before[1].what.file_name).unlink()
    monkeypatch.setattr("snd_nerfstudio.probing.linear.training_step", None)
    assert [found.last for found in probe("depth", *flags)] == [found.last for found in before]


def test_a_head_that_diverges_is_reported_empty_and_not_drawn(probe, tmp_path):
    results = probe("depth", *FEW, "--more-lrs", 1e30, "--pictures", 1)
    lost, kept = sorted(results, key=lambda found: found.last["rmse"] is not None)
    assert lost.what.variant["lr"] == 1e30 and set(lost.last.values()) == {None} and kept.last["rmse"] > 0
    assert len(pictures(tmp_path, "depth_")) == 1
    assert make_tables(results)


def test_settings_begin_with_the_protocol_and_flags_change_them():
    from snd_nerfstudio.probing.commands.linear import Depth, preset
    from snd_nerfstudio.probing.commands.parsing import given, parse_with_defaults
    from snd_nerfstudio.probing.protocols import DepthProbe

    arguments = ["--models", TINY, "--data", "x", "--protocol=paper", "--lr", "0.5", "--features.block", "2"]
    protocol = given(arguments, "--protocol", "fixed")
    settings = parse_with_defaults(Depth, arguments, "depth", probe=preset(DepthProbe, protocol)).probe
    paper = DepthProbe.paper()
    assert protocol == "paper" and (settings.lr, settings.features.block) == (0.5, 2)
    assert settings.features.pad_crop == paper.features.pad_crop == "parity"
    assert settings.iterations == paper.iterations == 307_200
    assert preset(DepthProbe, "fixed", "memory").augment is False


# ---------------------------------------------------------------------- looking and reporting


def test_two_views_are_drawn_with_one_basis_and_their_matches(rooms, tmp_path, capsys):
    flags = ["visualize", "--models", TINY, "--data", str(rooms), "--count", "1", "--scale", "global_minmax"]
    snd_probe.main([*flags, "--out", str(tmp_path / "pictures")])
    kinds = [name.split("_")[-1] for name in pictures(tmp_path)]
    assert sorted(kinds) == ["kmeans.png", "kmeans.png", "matches.png", "pca.png", "pca.png", "sheet.png"]
    assert "Wrote 6 pictures" in capsys.readouterr().out


def test_any_images_are_drawn_without_matches(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        Image.effect_noise((90, 60), 80 + number).convert("RGB").save(folder / f"{number}.png")
    flags = ["--models", TINY, "--data", str(folder), "--dataset", "images", "--out", str(tmp_path / "pictures")]
    snd_probe.main(["visualize", *flags])
    assert len(pictures(tmp_path, "images_")) == 5


def test_a_report_has_all_results_in_every_format(probe, tmp_path, capsys):
    probe("correspondence", "--limit", 2)
    probe("tracking", "--frames", 3, "--points", 10)
    capsys.readouterr()
    snd_probe.main(["report", "--results", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "## Correspondence" in printed and "## Tracking" in printed and f"| {TINY} |" in printed
    snd_probe.main(["report", "--results", str(tmp_path), "--format", "all", "--out", str(tmp_path / "report")])
    names = sorted(file.name for file in (tmp_path / "report").iterdir())
    assert names == ["correspondence_rooms_fixed_0.png", "report.csv", "report.md", "report.tex"]
    assert (tmp_path / "report" / "report.md").read_text() in printed
    snd_probe.main(["report", "--results", str(tmp_path), "--tasks", "tracking"])
    assert "## Correspondence" not in capsys.readouterr().out


def test_a_report_of_nothing_is_a_users_mistake(tmp_path):
    with pytest.raises(InputError, match="no result"):
        snd_probe.main(["report", "--results", str(tmp_path)])


def test_smoke_tries_every_task_and_makes_tables_and_pictures(rooms, tmp_path, capsys):
    flags = ["--models", TINY, "--data", str(rooms), "--out", str(tmp_path), "--device", "cpu"]
    snd_probe.main(["smoke", *flags, "--iterations", "2", "--limit", "8", "--pictures", "1"])
    tasks = [found.what.task for found in read_results([tmp_path])]
    assert sorted(tasks) == sorted(
        ["depth", "normals", "segmentation", "segmentation", "correspondence", "tracking", "nearest"]
    )
    table = (tmp_path / "report" / "report.md").read_text()
    assert all(f"## {title}" in table for title in ("Depth", "Surface normals", "Semantic segmentation", "Tracking"))
    assert "no measure of a backbone" in table
    for beginning in ("depth_", "normals_", "segmentation_", "correspondence_"):
        assert len(pictures(tmp_path, beginning)) == 1
    assert "snd-probe smoke took" in capsys.readouterr().out
    for file in tmp_path.glob("*.json"):
        assert json.loads(file.read_text())["what"]["protocol"] == "smoke" and read_result(file).seconds > 0
