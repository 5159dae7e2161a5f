import sys
import threading
import traceback

import pytest
import torch
from torch import nn

from snd_nerfstudio.distillation.ema import EMATeacher, call_with
from snd_nerfstudio.distillation.head import DINOHead, HeadSettings


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
        self.head = nn.Linear(3, 4)
        self.backbone[0].bias.requires_grad_(False)


def test_only_trainable_parameters_are_shadowed():
    teacher = EMATeacher(Pair())
    assert set(teacher.values()) == {"backbone.0.weight", "head.weight", "head.bias"}
    assert set(teacher.values("head")) == {"weight", "bias"}


def test_an_update_is_the_weighted_mean():
    student = Pair()
    teacher = EMATeacher(student)
    before = teacher.values()["head.weight"].clone()
    with torch.no_grad():
        student.head.weight += 1.0
    teacher.update(student, 0.9)
    torch.testing.assert_close(teacher.values()["head.weight"], before + 0.1)
    teacher.update(student, 1.0)
    torch.testing.assert_close(teacher.values()["head.weight"], before + 0.1)
    teacher.update(student, 0.0)
    torch.testing.assert_close(teacher.values()["head.weight"], student.head.weight.detach())


def test_the_teacher_runs_with_its_own_values_and_the_student_s_frozen_ones():
    student = Pair()
    teacher = EMATeacher(student)
    x = torch.randn(5, 2)
    expected = student.eval().backbone(x)
    with torch.no_grad():
        student.backbone[0].weight += 1.0
    torch.testing.assert_close(teacher.call(student, "backbone", x), expected)
    assert not torch.allclose(student.backbone(x), expected)


def test_the_teacher_can_run_any_method_of_a_submodule_with_its_own_values():
    student = nn.Module()
    student.head = DINOHead(12, HeadSettings(hidden=16, bottleneck=8, prototypes=20))
    teacher = EMATeacher(student)
    x = torch.randn(5, 12)
    expected = [part.detach() for part in student.head.parts(x)]
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1.0
    for found, value in zip(teacher.call(student, "head", x, method="parts"), expected, strict=True):
        assert torch.equal(found, value) and not found.requires_grad
    assert not torch.allclose(student.head.parts(x)[1], expected[1], atol=1e-2)


def test_the_teacher_has_no_dropout_unless_asked_and_leaves_the_student_s_mode_alone():
    student = Pair().train()
    teacher = EMATeacher(student)
    x = torch.randn(200, 2)
    assert torch.equal(teacher.call(student, "backbone", x), teacher.call(student, "backbone", x))
    assert not torch.equal(
        teacher.call(student, "backbone", x, dropout=True), teacher.call(student, "backbone", x, dropout=True)
    )
    assert student.backbone[1].training


def test_a_module_runs_with_other_values_in_place_of_some_and_keeps_its_own():
    module = Pair().backbone.train()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    own, x = module[0].weight, torch.randn(5, 2)
    other = torch.randn(3, 2)
    found = call_with(module, {"0.weight": other}, x)
    torch.testing.assert_close(found, x @ other.T + module[0].bias)
    assert not found.requires_grad
    assert module[0].weight is own and own.requires_grad and module.training and module[1].training
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())
    torch.testing.assert_close(call_with(module, {}, x), module.eval()(x).detach())


def test_a_module_that_runs_with_other_values_drops_out_only_if_asked():
    module, x = Pair().backbone.eval(), torch.randn(200, 2)
    values = {"0.weight": torch.ones(3, 2)}
    assert torch.equal(call_with(module, values, x), call_with(module, values, x))
    dropped = call_with(module, values, x, dropout=True)
    assert 0.3 < (dropped == 0).float().mean() < 0.7 and not module.training and not module[1].training


def test_a_module_that_fails_with_other_values_is_left_as_it_was():
    module = Pair().backbone.train()
    own = module[0].weight
    with pytest.raises(RuntimeError):
        call_with(module, {"0.weight": torch.ones(3, 2)}, torch.randn(5, 7))
    assert module[0].weight is own and module.training and module[1].training


def test_a_render_that_is_interrupted_anywhere_leaves_the_student_its_own_weights():
    """Nerfstudio's viewer raises from a trace function between any two lines; here, at each line in turn."""
    student = Pair().eval()
    teacher = EMATeacher(student)
    with torch.no_grad():
        student.backbone[0].weight += 1.0
    own = student.backbone[0].weight
    x = torch.randn(5, 2)
    outcomes = []

    def interrupted_at(line):
        seen = 0

        def trace(frame, event, argument):
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == line:
                    raise InterruptedError
            return trace

        sys.settrace(trace)
        try:
            teacher.call(student, "backbone", x)
            outcomes.append("finished")
        except Exception as error:  # jaxtyping's check, on while tests run, wraps it when it is hit itself
            sys.settrace(None)
            outcomes.append(
                "interrupted" if "InterruptedError" in "".join(traceback.format_exception(error)) else error
            )
        finally:
            sys.settrace(None)

    while "finished" not in outcomes and len(outcomes) < 5000:
        # a thread of its own, as the viewer has: grad mode and trace function belong to the thread
        thread = threading.Thread(target=interrupted_at, args=(len(outcomes) + 1,))
        thread.start()
        thread.join()
        assert student.backbone[0].weight is own, len(outcomes)
    assert outcomes[-1] == "finished" and set(outcomes[:-1]) == {"interrupted"}


def test_a_momentum_outside_the_unit_interval_is_refused():
    student = Pair()
    with pytest.raises(ValueError, match="momentum"):
        EMATeacher(student).update(student, 1.7)


def test_matches_the_released_code(golden):
    vectors = golden("snd_head_loss_ema")

    def load(side):
        module = nn.Module()
        module.backbone = nn.Linear(3, 2)
        module.dino_head = nn.Module()
        module.dino_head.mlp = nn.Sequential(
            nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8)
        )
        module.dino_head.last_layer = nn.Module()
        for name in ("weight_g", "weight_v"):
            value = vectors[f"ema.{side}.dino_head.last_layer.{name}"]
            module.dino_head.last_layer.register_parameter(name, nn.Parameter(value.clone()))
        prefix = f"ema.{side}."
        module.load_state_dict({k[len(prefix) :]: v for k, v in vectors.items() if k.startswith(prefix)})
        return module

    for momentum in (0.999, 0.0, 1.0):
        teacher = EMATeacher(load("teacher_before"))
        teacher.update(load("student"), momentum)
        for name, value in teacher.values().items():
            torch.testing.assert_close(value, vectors[f"ema.m{momentum}.{name}"], rtol=0, atol=3e-7)
