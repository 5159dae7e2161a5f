import pytest

from snd_nerfstudio.distillation.schedule import warmup_cosine


def test_the_paper_s_schedule_at_its_landmarks():
    peak = 2e-5
    assert peak * warmup_cosine(0, 50_000) == pytest.approx(8e-7)
    assert peak * warmup_cosine(500, 50_000) == pytest.approx(2e-5)
    assert peak * warmup_cosine(25_250, 50_000) == pytest.approx(1e-5)
    assert peak * warmup_cosine(50_000, 50_000) == pytest.approx(0.0, abs=1e-12)
    assert warmup_cosine(60_000, 50_000) == 0.0


def test_the_released_code_s_schedule_is_hardly_decayed_at_50_000():
    assert 2e-5 * warmup_cosine(50_000, 300_011) == pytest.approx(1.88e-5, rel=2e-3)


def test_factors_are_python_floats():
    assert type(warmup_cosine(3, 10)) is float and type(warmup_cosine(9, 10)) is float


def test_a_single_step_is_possible():
    assert warmup_cosine(0, 1) <= 1.0
