import copy

import pytest
import tyro
from nerfstudio.configs.method_configs import all_methods
from torch import nn

from snd_nerfstudio.snd_trainer import SnDTrainerConfig


def parsed(method: str, *words: str) -> SnDTrainerConfig:
    """The config that ``ns-train <method>`` makes of some flags."""
    # nerfstudio's default is an integer, which the tests' type checks refuse
    decay = [w for group in ("backbone", "head") for w in (f"--optimizers.{group}.optimizer.weight-decay", "0.0")]
    kind = tyro.conf.SuppressFixed[tyro.conf.FlagConversionOff[SnDTrainerConfig]]
    return tyro.cli(kind, default=copy.deepcopy(all_methods[method]), args=[*words, *decay])


@pytest.mark.parametrize("method", ["snd", "snd-tiny"])
def test_adam_s_epsilon_is_a_flag_of_each_group(method):
    config = parsed(method, "--optimizers.backbone.optimizer.eps", "1e-12")
    epsilons = {}
    for group, settings in config.optimizers.items():
        optimizer = settings["optimizer"].setup([nn.Parameter()])
        epsilons[group] = optimizer.defaults["eps"]
    assert epsilons == {"backbone": 1e-12, "head": 1e-8}


def test_temperatures_and_what_is_trained_and_preserved_are_flags():
    before = parsed("snd").pipeline.model
    assert (before.student_temperature, before.teacher_temperature) == (1.0, 1.0)
    assert (before.trains, before.preserve) == ("lora", "none")
    flags = {
        "student-temperature": 0.1,
        "teacher-temperature": 0.04,
        "trains": "blocks",
        "last-blocks": 2,
        "preserve": "cosine",
        "preserve-weight": 0.01,
    }
    words = [word for name, value in flags.items() for word in (f"--pipeline.model.{name}", str(value))]
    model = parsed("snd", *words).pipeline.model
    assert {name: getattr(model, name.replace("-", "_")) for name in flags} == flags


@pytest.mark.parametrize(("flag", "value"), [("trains", "head"), ("preserve", "l1")])
def test_another_word_is_refused(flag, value, capsys):
    with pytest.raises(SystemExit):
        parsed("snd", f"--pipeline.model.{flag}", value)
    assert f"--pipeline.model.{flag}" in capsys.readouterr().err
