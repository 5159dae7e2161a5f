import pytest

from snd_nerfstudio.errors import InputError
from snd_nerfstudio.profiles import PROFILES, resolve
from snd_nerfstudio.snd_datamanager import SnDDataManagerConfig
from snd_nerfstudio.snd_model import SnDModelConfig, SupervisionConfig
from snd_nerfstudio.snd_pipeline import SnDPipelineConfig, resolved
from snd_nerfstudio.supervision.settings import SupervisionSettings


def test_every_profile_decides_the_same_fields():
    assert len({frozenset(values) for values in PROFILES.values()}) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_every_decided_field_exists_and_is_left_open_by_default(profile):
    config = SnDPipelineConfig(profile=profile)
    open_fields = {
        name: value
        for part in (config.datamanager, config.model, config.model.supervision)
        for name, value in vars(part).items()
    }
    for name in PROFILES[profile]:
        if name != "schedule_steps":  # the trainer's, through the pipeline
            assert open_fields[name] is None, name


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_sets_fields_and_nothing_else(profile):
    config = resolved(SnDPipelineConfig(profile=profile))
    for part in (config.datamanager, config.model, config.model.supervision):
        for name, value in vars(part).items():
            if name in PROFILES[profile]:
                assert value == PROFILES[profile][name], name
    assert config.model.supervision.settings().blending == 0.5


def test_what_the_user_sets_wins():
    config = SnDPipelineConfig(
        profile="official",
        datamanager=SnDDataManagerConfig(max_context_gap=11),
        model=SnDModelConfig(teacher_dropout=False, supervision=SupervisionConfig(pooling="area")),
    )
    result = resolved(config)
    assert result.datamanager.max_context_gap == 11 and result.datamanager.min_context_gap == 8
    assert result.model.teacher_dropout is False and result.model.supervision.pooling == "area"
    assert config.model.supervision.align_corners is None  # the given config is not changed


def test_the_fixed_profile_is_what_the_supervision_functions_default_to():
    assert resolved(SnDPipelineConfig()).model.supervision.settings() == SupervisionSettings()


def test_an_unknown_profile_is_refused_with_the_choices():
    with pytest.raises(InputError, match="fixed, paper, official"):
        resolve(SnDModelConfig(), "best")
