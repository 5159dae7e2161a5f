import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from snd_nerfstudio.distillation.head import DINOHead, HeadSettings
from snd_nerfstudio.distillation.losses import (
    cosine_similarity,
    preservation,
    prototype_cross_entropy,
    prototype_kl_per_token,
    prototype_loss,
    quadratic_cross_entropy,
)


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


# ---------------------------------------------------------------------- in chunks


class Watched(TorchDispatchMode):
    """Notes every operation, and the largest piece of memory that any of them returned (in elements)."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def unit_rows(count, width, dtype=torch.float64):
    return F.normalize(torch.randn(count, width, dtype=dtype), dim=-1)


def features_and_prototypes(n=11, k=23, d=6, noise=0.3, dtype=torch.float64):
    """Student's features and prototypes, as leaves, and teacher's, which are a little different."""
    torch.manual_seed(0)
    student = unit_rows(n, d, dtype), unit_rows(k, d, dtype)
    teacher = [F.normalize(part + noise * torch.randn_like(part) / d**0.5, dim=-1) for part in student]
    return *(part.requires_grad_() for part in student), *teacher


def plain(features, prototypes, teacher_features, teacher_prototypes, *temperatures):
    return prototype_loss(features @ prototypes.T, teacher_features @ teacher_prototypes.T, *temperatures)


def gradients(loss, parts):
    return torch.autograd.grad(loss.cross_entropy, parts[:2])


def values(loss):
    return torch.stack([loss.cross_entropy, loss.teacher_entropy, loss.kl]).detach()


@pytest.mark.parametrize("max_logits", [1, 23, 2 * 23, 4 * 23 + 5, 11 * 23, 10**6])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 0.04)])
def test_chunks_give_the_plain_loss_and_the_plain_gradients(max_logits, temperatures):
    parts = features_and_prototypes()
    chunked, whole = prototype_cross_entropy(*parts, *temperatures, max_logits), plain(*parts, *temperatures)
    torch.testing.assert_close(values(chunked), values(whole), rtol=0, atol=1e-12)
    assert chunked.cross_entropy.requires_grad and not (
        chunked.kl.requires_grad or chunked.teacher_entropy.requires_grad
    )
    for found, expected in zip(gradients(chunked, parts), gradients(whole, parts), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_chunks_give_the_plain_gradients_to_all_of_the_head_and_to_its_input():
    torch.manual_seed(0)
    settings = HeadSettings(hidden=16, bottleneck=8, prototypes=20)
    student, teacher = DINOHead(12, settings).double(), DINOHead(12, settings).double()
    torch.nn.init.uniform_(student.last_layer.weight_g, 0.5, 2.0)
    tokens, wanted = torch.randn(2, 9, 12, dtype=torch.float64)
    tokens.requires_grad_()
    leaves = [tokens, *student.parameters()]
    chunked = prototype_cross_entropy(*student.parts(tokens), *teacher.parts(wanted), 0.5, 0.25, max_logits=4 * 20)
    whole = prototype_loss(student(tokens), teacher(wanted), 0.5, 0.25)
    # three times the loss: what comes from above must be passed on
    found = torch.autograd.grad(3 * chunked.cross_entropy, leaves)
    for gradient, expected in zip(found, torch.autograd.grad(3 * whole.cross_entropy, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_gradients_of_the_chunks_are_the_differences_of_their_loss():
    *student, teacher_features, teacher_prototypes = features_and_prototypes(n=5, k=7, d=3)

    def loss(features, prototypes):
        return prototype_cross_entropy(
            features, prototypes, teacher_features, teacher_prototypes, 0.5, 0.3, max_logits=15
        ).cross_entropy

    assert torch.autograd.gradcheck(loss, student)


def test_in_float32_chunks_are_no_less_accurate_than_the_plain_loss():
    exact = features_and_prototypes(n=100, k=4096, d=64)
    single = [part.detach().float().requires_grad_(part.requires_grad) for part in exact]
    truth, truths = plain(*exact), gradients(plain(*exact), exact)
    loss = prototype_cross_entropy(*single, max_logits=4096 * 32)
    assert loss.cross_entropy.dtype == torch.float32
    assert float(loss.cross_entropy) == pytest.approx(float(truth.cross_entropy), rel=1e-6)
    assert float(loss.kl) == pytest.approx(float(truth.kl), rel=1e-4)
    ours, usuals = gradients(loss, single), gradients(plain(*single), single)
    for found, usual, expected in zip(ours, usuals, truths, strict=True):
        error = (found - expected).norm() / expected.norm()
        assert error < 1e-5 and error < 1.5 * (usual - expected).norm() / expected.norm()


def test_very_unequal_logits_do_no_harm():
    parts = features_and_prototypes(dtype=torch.float32)
    chunked, whole = prototype_cross_entropy(*parts, 1e-3, 1e-3, 50), plain(*parts, 1e-3, 1e-3)
    torch.testing.assert_close(values(chunked), values(whole), rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradients(chunked, parts), gradients(whole, parts), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "k", "max_logits", "most"), [(64, 512, 2048, 2048), (3, 512, 2048, 1536), (9, 512, 1, 512)]
)
def test_chunks_never_hold_more_logits_than_they_may_or_than_one_token_has(n, k, max_logits, most):
    parts = features_and_prototypes(n=n, k=k, d=1)  # so that the prototypes are no larger than a token's logits
    with Watched() as watched:
        gradients(prototype_cross_entropy(*parts, max_logits=max_logits), parts)
    assert watched.largest == most


def test_only_the_gradients_that_are_wanted_are_computed():
    features, prototypes, *teacher = features_and_prototypes()

    def products(*student, differentiate=True):
        with Watched() as watched, torch.set_grad_enabled(differentiate):
            loss = prototype_cross_entropy(*student, *teacher, max_logits=4 * 23)  # three chunks
        assert loss.cross_entropy.requires_grad == differentiate
        return watched.operations["mm"], watched.operations["addmm_"]

    assert products(features, prototypes) == (3 * 3, 3)
    assert products(features, prototypes.detach()) == (3 * 3, 0)
    assert products(features.detach(), prototypes) == (3 * 2, 3)
    assert products(features, prototypes, differentiate=False) == (3 * 2, 0)
    torch.testing.assert_close(
        gradients(prototype_cross_entropy(features, prototypes.detach(), *teacher), (features,))[0],
        gradients(plain(features, prototypes, *teacher), (features,))[0],
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.parametrize("loss", [prototype_cross_entropy, quadratic_cross_entropy])
def test_autocast_leaves_the_losses_from_features_alone(loss):
    parts = features_and_prototypes(dtype=torch.float32)
    outside = loss(*parts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(*parts)
    assert torch.equal(values(inside), values(outside)) and inside.cross_entropy.dtype == torch.float32
    for found, expected in zip(gradients(inside, parts), gradients(outside, parts), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("loss", [prototype_cross_entropy, quadratic_cross_entropy])
def test_of_the_losses_from_features_too_only_the_student_gets_a_gradient(loss):
    parts = [part.detach().requires_grad_() for part in features_and_prototypes()]
    loss(*parts).cross_entropy.backward()
    assert [part.grad is not None for part in parts] == [True, True, False, False]


def test_chunks_of_no_logits_are_refused():
    with pytest.raises(ValueError, match="max_logits 0 must be at least 1"):
        prototype_cross_entropy(*features_and_prototypes(), max_logits=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_chunks_on_the_gpu_give_what_they_give_on_the_cpu():
    parts = features_and_prototypes(n=100, k=1000, d=32)
    moved = [part.detach().cuda().requires_grad_(part.requires_grad) for part in parts]
    for loss in (prototype_cross_entropy, quadratic_cross_entropy):
        here, there = loss(*parts), loss(*moved)
        torch.testing.assert_close(values(there).cpu(), values(here), rtol=0, atol=1e-12)
        for found, expected in zip(gradients(there, moved), gradients(here, parts), strict=True):
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


# ---------------------------------------------------------------------- token by token


@pytest.mark.parametrize("max_logits", [1, 23, 2 * 23, 4 * 23 + 5, 11 * 23, 10**6])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.1, 0.04)])
def test_the_divergence_of_each_token_is_its_share_of_the_loss(max_logits, temperatures):
    parts = features_and_prototypes()
    found = prototype_kl_per_token(*parts, *temperatures, max_logits)
    assert found.shape == (11,) and not found.requires_grad
    assert float(found.mean()) == pytest.approx(float(plain(*parts, *temperatures).kl), abs=1e-12)
    for place in (0, 4, 10):
        one = parts[0][place : place + 1], parts[1], parts[2][place : place + 1], parts[3]
        assert float(found[place]) == pytest.approx(float(plain(*one, *temperatures).kl), abs=1e-12)


def test_the_divergence_of_each_token_is_zero_for_the_teacher_itself_and_of_no_token_it_is_empty():
    features, prototypes, *_ = features_and_prototypes(dtype=torch.float32)
    assert prototype_kl_per_token(features, prototypes, features, prototypes).abs().max() < 1e-6
    nothing = prototype_kl_per_token(features[:0], prototypes, features[:0], prototypes)
    assert nothing.shape == (0,) and nothing.dtype == torch.float32


def test_the_divergence_of_each_token_is_computed_in_float32_and_never_of_more_logits_than_it_may():
    parts = features_and_prototypes(n=64, k=512, d=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Watched() as watched:
        found = prototype_kl_per_token(*parts, max_logits=2048)
    assert watched.largest == 2048
    assert torch.equal(found, prototype_kl_per_token(*parts, max_logits=2048)) and found.dtype == torch.float32


# ---------------------------------------------------------------------- to second order


def cosine(a, b):
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_two_prototypes_to_second_order_by_hand():
    # prototypes 1 and -1: logits of the teacher 0.3, -0.3 (variance 0.09), of the student 0.1, -0.1; T_t 1, T_s 0.5
    prototypes = torch.tensor([[1.0], [-1.0]])
    loss = quadratic_cross_entropy(torch.tensor([[0.1]]), prototypes, torch.tensor([[0.3]]), prototypes, 0.5, 1.0)
    assert float(loss.kl) == pytest.approx((0.3 - 0.2) ** 2 / 2)
    assert float(loss.teacher_entropy) == pytest.approx(math.log(2) - 0.09 / 2)
    assert float(loss.cross_entropy) == pytest.approx(float(loss.teacher_entropy) + float(loss.kl))


def test_what_the_second_order_leaves_out_is_of_the_third():
    """Uneven prototypes with a mean, others for the teacher: halve the logits, and an eighth of the error is left."""
    torch.manual_seed(0)
    spread = torch.linspace(0.2, 2.0, 6, dtype=torch.float64)
    student = 0.7 + spread * torch.randn(50, 6, dtype=torch.float64)
    teacher = student + 0.5 * torch.randn(50, 6, dtype=torch.float64)
    features = torch.randn(2, 9, 6, dtype=torch.float64) / 6
    errors = []
    for size in (0.1, 0.05, 0.025):
        parts = size * features[0], student, size * features[1], teacher
        exact, approximate = values(plain(*parts, 0.9, 1.1)), values(quadratic_cross_entropy(*parts, 0.9, 1.1))
        assert float(approximate[2]) == pytest.approx(float(exact[2]), rel=2 * size)
        errors.append((approximate - exact).abs())
    for larger, smaller in zip(errors[:-1], errors[1:], strict=True):
        assert (larger / smaller > 6).all()


def test_the_quadratic_gradients_are_the_differences_of_its_loss():
    *student, teacher_features, teacher_prototypes = features_and_prototypes(n=5, k=7, d=3)

    def loss(features, prototypes):
        return quadratic_cross_entropy(
            features, prototypes, teacher_features, teacher_prototypes, 0.5, 0.3
        ).cross_entropy

    assert torch.autograd.gradcheck(loss, student)


@pytest.mark.parametrize(
    ("temperature", "kl", "to_features"), [(1.0, 1e-3, 0.9999), (0.1, 1e-2, 0.995), (0.04, 0.05, 0.93)]
)
@pytest.mark.parametrize("prototypes", ["equal", "different"])
def test_the_second_order_is_near_the_whole_at_temperature_1_and_less_so_below(
    temperature, kl, to_features, prototypes
):
    """64 tokens that differ by noise of 0.05 per channel, 16,384 prototypes of 256 channels."""
    torch.manual_seed(0)
    student_prototypes = unit_rows(16384, 256, torch.float32)
    teacher_prototypes = student_prototypes
    if prototypes == "different":
        teacher_prototypes = F.normalize(student_prototypes + 0.02 * torch.randn(16384, 256), dim=-1)
    teacher = unit_rows(64, 256, torch.float32)
    student = F.normalize(teacher + 0.05 * torch.randn(64, 256), dim=-1)
    parts = student.requires_grad_(), student_prototypes.clone().requires_grad_(), teacher, teacher_prototypes
    exact = prototype_cross_entropy(*parts, temperature, temperature)
    approximate = quadratic_cross_entropy(*parts, temperature, temperature)
    assert float(approximate.kl) == pytest.approx(float(exact.kl), rel=kl)
    expected, found = gradients(exact, parts), gradients(approximate, parts)
    assert cosine(found[0], expected[0]) > to_features
    if temperature == 1.0:
        assert cosine(found[1], expected[1]) > 0.99
        assert float(approximate.cross_entropy) == pytest.approx(float(exact.cross_entropy), abs=1e-4)


# ---------------------------------------------------------------------- against forgetting


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("l2", (1 + 9 + 16 + 4) / 4),  # differences (1, -3) and (4, 2)
        ("cosine", 1 - (0.6 + 0.0) / 2),  # (3, 4) against (2, 0) times any length: 0.6; (5, 0) against (0, 2): 0
    ],
)
def test_how_far_tokens_have_moved_by_hand(measure, expected):
    if measure == "l2":
        student, original = torch.tensor([[2.0, 1.0], [5.0, 2.0]]), torch.tensor([[1.0, 4.0], [1.0, 0.0]])
    else:
        student, original = torch.tensor([[3.0, 4.0], [5.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    assert float(preservation(student, original, measure)) == pytest.approx(expected)
    assert float(preservation(original, original, measure)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("measure", ["l2", "cosine"])
def test_only_the_student_is_drawn_back_and_in_float32(measure):
    torch.manual_seed(0)
    student, original = torch.randn(5, 7).bfloat16().requires_grad_(), torch.randn(5, 7, requires_grad=True)
    moved = preservation(student, original, measure)
    moved.backward()
    assert moved.dtype == torch.float32 and original.grad is None and student.grad.abs().max() > 0
    exact = preservation(student.double(), original.double(), measure)
    assert exact.dtype == torch.float64 and float(moved) == pytest.approx(float(exact), rel=1e-5)
    with torch.no_grad():
        nearer = student.float() - 0.1 * student.grad.float()
        assert preservation(nearer, original, measure) < moved
