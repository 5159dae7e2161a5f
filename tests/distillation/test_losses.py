import math

import pytest
import torch

from snd_nerfstudio.distillation.head import DINOHead, HeadSettings
from snd_nerfstudio.distillation.losses import cosine_similarity, prototype_loss


def test_two_prototypes_by_hand():
    teacher = torch.log(torch.tensor([[0.25, 0.75]]))
    student = torch.log(torch.tensor([[0.5, 0.5]]))
    loss = prototype_loss(student, teacher)
    assert float(loss.cross_entropy) == pytest.approx(math.log(2))
    assert float(loss.teacher_entropy) == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert float(loss.kl) == pytest.approx(math.log(2) - float(loss.teacher_entropy))


def test_temperatures_divide_the_logits():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    cold = prototype_loss(student, teacher, 0.5, 0.25)
    assert float(cold.cross_entropy) == pytest.approx(
        float(prototype_loss(student / 0.5, teacher / 0.25).cross_entropy)
    )


def test_only_the_student_gets_a_gradient():
    student = torch.randn(3, 4, requires_grad=True)
    teacher = torch.randn(3, 4, requires_grad=True)
    prototype_loss(student, teacher).cross_entropy.backward()
    assert teacher.grad is None
    # d CE / d z = (softmax(student) - softmax(teacher)) / n
    torch.testing.assert_close(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / 3)


def test_it_is_computed_in_float32_even_for_half_precision_logits():
    logits = torch.randn(4, 65536, dtype=torch.bfloat16) * 0.1
    loss = prototype_loss(logits, logits)
    assert loss.cross_entropy.dtype == torch.float32
    assert abs(float(loss.kl)) < 1e-6 and float(loss.teacher_entropy) == pytest.approx(math.log(65536), abs=0.02)


@pytest.mark.parametrize(
    ("case", "channels", "settings"),
    [
        ("n3", 12, HeadSettings(layers=3, hidden=16, bottleneck=8, prototypes=20)),
        ("n2", 6, HeadSettings(layers=2, hidden=16, bottleneck=8, prototypes=10)),
        ("n1", 6, HeadSettings(layers=1, hidden=16, bottleneck=8, prototypes=10)),
    ],
)
def test_head_loss_and_gradients_match_the_released_code(golden, case, channels, settings):
    vectors = golden("snd_head_loss_ema")

    def load(side):
        head = DINOHead(channels, settings)
        prefix = f"head.{case}.{side}."
        head.load_state_dict({k[len(prefix) :]: v for k, v in vectors.items() if k.startswith(prefix)})
        return head

    student, teacher = load("student"), load("teacher")
    features = {
        side: vectors[f"head.{case}.{side}_features"].permute(0, 1, 3, 4, 2).reshape(-1, channels)
        for side in ("student", "teacher")
    }
    features["student"].requires_grad_(True)
    student_logits, teacher_logits = student(features["student"]), teacher(features["teacher"])
    torch.testing.assert_close(student_logits, vectors[f"head.{case}.student_logits"], rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher_logits, vectors[f"head.{case}.teacher_logits"], rtol=0, atol=1e-6)
    loss = prototype_loss(student_logits, teacher_logits).cross_entropy
    torch.testing.assert_close(loss.reshape(1), vectors[f"head.{case}.loss"], rtol=0, atol=1e-6)
    loss.backward()
    expected = vectors[f"head.{case}.grad_student_features"].permute(0, 1, 3, 4, 2).reshape(-1, channels)
    torch.testing.assert_close(features["student"].grad, expected, rtol=1e-4, atol=1e-7)
    for name, parameter in student.named_parameters():
        key = f"head.{case}.grad.{name}"
        if key in vectors:
            torch.testing.assert_close(parameter.grad, vectors[key], rtol=1e-4, atol=1e-7)


def test_cosine_similarity_by_hand():
    a, b = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [3.0, 3.0]])
    torch.testing.assert_close(cosine_similarity(a, b), torch.tensor([0.0, 1.0]))
