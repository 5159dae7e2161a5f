import copy
import sys

import pytest
import torch
import yaml
from nerfstudio.configs.base_config import ViewerConfig
from nerfstudio.configs.method_configs import all_methods

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.snd_trainer import SnDTrainerConfig, WarmupCosine, WarmupCosineConfig


@pytest.fixture
def finished(tiny_config, clean_writers):
    """A six-step run with a checkpoint every two steps."""
    tiny_config.steps_per_save = 2
    tiny_config.save_only_latest_checkpoint = False
    trainer = tiny_config.setup()
    trainer.setup()
    trainer.train()
    return trainer


def resume(tiny_config, trainer, **settings):
    config = copy.deepcopy(tiny_config)
    config.load_dir = trainer.checkpoint_dir
    config.timestamp = "resumed"
    for name, value in settings.items():
        setattr(config, name, value)
    resumed = config.setup()
    resumed.setup()
    return resumed


def test_resuming_ends_in_the_same_weights(tiny_config, finished):
    resumed = resume(tiny_config, finished, load_step=2)
    resumed.train()
    assert resumed.step == finished.step == 5
    for key, value in finished.pipeline.state_dict().items():
        assert torch.equal(resumed.pipeline.state_dict()[key], value), key
    assert resumed.config.max_num_iterations == 6


@pytest.mark.slow
def test_resuming_is_exact_with_all_of_the_backbone_trained_and_its_tokens_preserved(tiny_config, request):
    tiny_config.pipeline.model.trains, tiny_config.pipeline.model.preserve = "full", "cosine"
    finished = request.getfixturevalue("finished")
    resumed = resume(tiny_config, finished, load_step=2)
    resumed.train()
    state = finished.pipeline.state_dict()
    assert any("pos_embed" in key for key in state)
    for key, value in state.items():
        assert torch.equal(resumed.pipeline.state_dict()[key], value), key


def test_a_run_is_not_resumed_with_something_else_to_train(tiny_config, finished):
    tiny_config.pipeline.model.trains = "full"
    with pytest.raises(InputError, match="was trained with --pipeline.model.trains lora, and this model has .* full"):
        resume(tiny_config, finished)


def test_a_checkpoint_whose_optimiser_has_other_groups_is_of_an_earlier_version(tiny_config, finished):
    file = max(finished.checkpoint_dir.glob("*.ckpt"))
    state = torch.load(file, weights_only=True)
    state["optimizers"]["adapters"] = state["optimizers"].pop("backbone")
    torch.save(state, file)
    with pytest.raises(InputError, match="of an earlier version .* but not resumed"):
        resume(tiny_config, finished)


def test_a_base_on_disk_is_written_down_with_its_whole_path(tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"")
    for given, kept in (("w.safetensors::student", f"{tmp_path}/w.safetensors::student"), ("random", "random")):
        tiny_config.pipeline.model.weights = given
        tiny_config.save_config()
        assert tiny_config.pipeline.model.weights == kept


def test_schedules_get_the_length_of_the_training_unless_they_have_one(tiny_config, finished):
    assert tiny_config.optimizers["head"]["scheduler"].steps is None  # the given config is not changed
    rates = [finished.optimizers.schedulers[group].get_last_lr()[0] for group in ("backbone", "head")]
    assert rates == pytest.approx([0.0, 0.0], abs=1e-9)
    config = copy.deepcopy(tiny_config)
    config.optimizers["head"]["scheduler"].steps = 1000
    config.pipeline.profile = "official"
    trainer = config.setup()
    trainer.setup()
    schedulers = trainer.optimizers.schedulers
    # halfway through their warm-up of 1 %: 5 of 1,000 steps and 1,500 of 300,011
    factors = {group: schedulers[group].lr_lambdas[0] for group in schedulers}
    assert factors["head"](5) == pytest.approx(0.52) and factors["backbone"](1500) == pytest.approx(0.52, abs=1e-3)


@pytest.mark.parametrize(("name", "value"), [("mixed_precision", True), ("gradient_accumulation_steps", {"head": 4})])
def test_settings_that_would_spoil_training_are_refused(tiny_config, name, value):
    setattr(tiny_config, name, value)
    with pytest.raises(InputError, match=name.replace("_", "-")):
        tiny_config.setup()


def test_a_schedule_without_a_length_is_refused():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)])
    with pytest.raises(InputError, match="--max-num-iterations"):
        WarmupCosine(WarmupCosineConfig()).get_scheduler(optimizer, 1.0)


def test_a_write_that_fails_keeps_the_checkpoints_that_are_there(finished, monkeypatch):
    before = sorted(finished.checkpoint_dir.iterdir())

    def no_space(state, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", no_space)
    finished.config.save_only_latest_checkpoint = True
    with pytest.raises(InputError, match="No space left on device"):
        finished.save_checkpoint(99)
    assert sorted(finished.checkpoint_dir.iterdir()) == before
    assert not list(finished.base_dir.glob(".*partial"))


def test_a_damaged_or_missing_checkpoint_is_named(tiny_config, finished):
    newest = finished.checkpoint_dir / "step-000000005.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded.*--load-step"):
        resume(tiny_config, finished)
    with pytest.raises(InputError, match=r"no step-\*\.ckpt there"):
        resume(tiny_config, finished, load_dir=finished.base_dir)
    with pytest.raises(InputError, match="cannot be loaded"):
        resume(tiny_config, finished, load_step=3)


# ---------------------------------------------------------------------- where the viewer listens


@pytest.mark.parametrize("method", ["snd", "snd-tiny", "mvsplat", "mvsplat-tiny"])
def test_viewers_listen_on_this_machine_alone_also_those_that_are_opened_later(monkeypatch, method):
    monkeypatch.setattr(sys, "argv", ["ns-viewer", "--load-config", "config.yml"])
    config = copy.deepcopy(all_methods[method])
    assert config.viewer.websocket_host == "127.0.0.1"
    others = ViewerConfig(websocket_port=7123)
    assert others.websocket_host == "0.0.0.0"  # nerfstudio's own default, or there was nothing to test
    config.viewer = others  # as ns-viewer does
    assert config.viewer.websocket_host == "127.0.0.1" and config.viewer.websocket_port == 7123


@pytest.mark.parametrize(
    "flags",
    [
        ["--viewer.websocket-host", "0.0.0.0"],
        ["--viewer.websocket_host", "0.0.0.0"],
        ["--viewer.websocket-host=0.0.0.0"],
        ["--viewer.websocket_host=0.0.0.0"],
    ],
)
def test_viewers_listen_elsewhere_if_they_are_told_to(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["ns-viewer", "--load-config", "config.yml", *flags])
    config = copy.deepcopy(all_methods["snd-tiny"])
    config.viewer = ViewerConfig(websocket_host="0.0.0.0")
    assert config.viewer.websocket_host == "0.0.0.0"


def test_a_config_that_is_made_with_a_host_keeps_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ns-train"])
    config = SnDTrainerConfig(method_name="snd", viewer=ViewerConfig(websocket_host="0.0.0.0"))
    assert config.viewer.websocket_host == "0.0.0.0"
    assert copy.deepcopy(config).viewer.websocket_host == "0.0.0.0"
    assert yaml.load(yaml.dump(config), Loader=yaml.Loader).viewer.websocket_host == "0.0.0.0"  # noqa: S506


def test_a_config_survives_being_written_and_read(tiny_config, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ns-viewer"])
    tiny_config.viewer.websocket_port = 7123
    read = yaml.load(yaml.dump(tiny_config), Loader=yaml.Loader)  # noqa: S506
    assert type(read) is SnDTrainerConfig and read == tiny_config
    read.viewer = ViewerConfig()
    assert read.viewer.websocket_host == "127.0.0.1"
