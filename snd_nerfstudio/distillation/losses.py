"""What the student is asked to match (paper section 3.5, equation 5), always in float32 or better.

With the paper's 65,536 prototypes the logits of one 576 x 880 view take 666 MB, those of the teacher as much again,
and autograd keeps more of that size. `prototype_cross_entropy` computes the same loss and gradients from a few
hundred tokens at a time. `quadratic_cross_entropy` is its second-order approximation, which needs no logits at all.
`prototype_loss` is the plain version that both are tested against.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**24
"""Logits of one side that `prototype_cross_entropy` holds at once: 256 tokens' at 65,536 prototypes, 67 MB."""


@dataclass(frozen=True)
class PrototypeLoss:
    """Cross-entropy over prototypes, and the two parts it is made of: ``CE = H(teacher) + KL``."""

    cross_entropy: Float[Tensor, ""]
    """Nats per token; carries the gradient."""
    teacher_entropy: Float[Tensor, ""]
    """Nats per token: the least the cross-entropy can be."""
    kl: Float[Tensor, ""]
    """Nats per token, computed term by term: at 65,536 prototypes it is the fourth decimal of the cross-entropy."""


def prototype_loss(
    student_logits: Float[Tensor, "n k"],
    teacher_logits: Float[Tensor, "n k"],
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> PrototypeLoss:
    """Soft-target cross-entropy between teacher and student, averaged over tokens.

    ``CE = -1/n sum_n sum_k p_nk log q_nk``, ``p = softmax(teacher / T_t)``, ``q = softmax(student / T_s)``

    This is the plain twin of `prototype_cross_entropy`, which training uses: tests compare the two.

    Args:
        student_logits: with gradient.
        teacher_logits: taken as constants.
        student_temperature: T_s.
        teacher_temperature: T_t.

    Returns:
        The loss and its parts, float32 (float64 for float64 logits).
    """
    precise = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = F.log_softmax(student_logits.to(precise) / student_temperature, dim=-1)
    log_p = F.log_softmax(teacher_logits.detach().to(precise) / teacher_temperature, dim=-1)
    p = log_p.exp()
    cross_entropy = -(p * log_q).sum(dim=-1).mean()
    return PrototypeLoss(
        cross_entropy=cross_entropy,
        teacher_entropy=-(p * log_p).sum(dim=-1).mean(),
        kl=(p * (log_p - log_q.detach())).sum(dim=-1).mean(),
    )


@torch.no_grad()
def prototype_kl_per_token(
    student_features: Float[Tensor, "n d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_features: Float[Tensor, "n d"],
    teacher_prototypes: Float[Tensor, "k d"],
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> Float[Tensor, "n"]:
    """KL of `prototype_loss` token by token, nats: for pictures. Arguments as of `prototype_cross_entropy`."""
    precise = torch.promote_types(student_features.dtype, torch.float32)
    rows = max(1, max_logits // len(student_prototypes))
    found = [student_features.new_zeros(0, dtype=precise)]
    with torch.autocast(student_features.device.type, enabled=False):
        for student, teacher in zip(student_features.split(rows), teacher_features.split(rows), strict=True):
            log_q = F.log_softmax(student.to(precise) @ student_prototypes.to(precise).T / student_temperature, dim=1)
            log_p = F.log_softmax(teacher.to(precise) @ teacher_prototypes.to(precise).T / teacher_temperature, dim=1)
            found.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
    return torch.cat(found)


def prototype_cross_entropy(
    student_features: Float[Tensor, "n d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_features: Float[Tensor, "n d"],
    teacher_prototypes: Float[Tensor, "k d"],
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
    max_logits: int = MAX_LOGITS,
) -> PrototypeLoss:
    """`prototype_loss` of ``features prototypes^T``, without ever holding all logits.

    Tokens are taken in chunks, ``max(1, max_logits // k)`` at a time. A token's softmax needs nothing of other
    tokens, and neither does the gradient of its logits, ``(q - p) / (n T_s)``. So one pass over the
    chunks gives the loss and the exact gradients: with ``dz`` for that of the logits, ``dz prototypes`` for
    features and ``dz^T features``, a sum over chunks, for prototypes. The backward pass only multiplies them by what
    comes from above.
    There are no second derivatives: a gradient taken with ``create_graph=True`` cannot be differentiated again.

    Autocast has no effect. On CUDA, matrix products follow ``torch.backends.cuda.matmul.allow_tf32``.

    Args:
        student_features: with gradient; in a DINO head they have length 1, which is not needed here.
        student_prototypes: with gradient, unless they are frozen.
        teacher_features: taken as constants.
        teacher_prototypes: taken as constants.
        student_temperature: T_s.
        teacher_temperature: T_t.
        max_logits: how many logits of the student, and as many of the teacher, to hold at once.

    Returns:
        The loss and its parts, float32 (float64 for float64 features); only ``cross_entropy`` has a gradient.

    Raises:
        ValueError: ``max_logits`` is less than 1.
    """
    if max_logits < 1:
        raise ValueError(f"max_logits {max_logits} must be at least 1")
    precise = torch.promote_types(student_features.dtype, torch.float32)
    student = [student_features.to(precise), student_prototypes.to(precise)]
    teacher = [teacher_features.detach().to(precise), teacher_prototypes.detach().to(precise)]
    if not torch.is_grad_enabled():  # the function below cannot see it
        student = [part.detach() for part in student]
    cross_entropy, teacher_entropy, kl = _ChunkedCrossEntropy.apply(
        *student, *teacher, student_temperature, teacher_temperature, max_logits
    )
    return PrototypeLoss(cross_entropy=cross_entropy, teacher_entropy=teacher_entropy, kl=kl)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy, teacher entropy and KL; gradients are computed on the way forward, where the softmaxes are."""

    @staticmethod
    def forward(
        ctx: Any,
        student_features: Float[Tensor, "n d"],
        student_prototypes: Float[Tensor, "k d"],
        teacher_features: Float[Tensor, "n d"],
        teacher_prototypes: Float[Tensor, "k d"],
        student_temperature: float,
        teacher_temperature: float,
        max_logits: int,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        with torch.autocast(student_features.device.type, enabled=False):
            means, features_gradient, prototypes_gradient = _chunked(
                student_features / student_temperature,
                student_prototypes,
                teacher_features / teacher_temperature,
                teacher_prototypes,
                max_logits,
                *ctx.needs_input_grad[:2],
            )
        if features_gradient is not None:
            features_gradient /= student_temperature
        ctx.save_for_backward(features_gradient, prototypes_gradient)
        cross_entropy, teacher_entropy, kl = means.unbind()
        ctx.mark_non_differentiable(teacher_entropy, kl)
        return cross_entropy, teacher_entropy, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Float[Tensor, ""], *_: Any) -> tuple[Optional[Tensor], ...]:
        gradients = [None if gradient is None else gradient * upstream for gradient in ctx.saved_tensors]
        return (*gradients, None, None, None, None, None)


def _chunked(
    student_features: Float[Tensor, "n d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_features: Float[Tensor, "n d"],
    teacher_prototypes: Float[Tensor, "k d"],
    max_logits: int,
    to_features: bool,
    to_prototypes: bool,
) -> tuple[Float[Tensor, "3"], Optional[Float[Tensor, "n d"]], Optional[Float[Tensor, "k d"]]]:
    """Means of cross-entropy, teacher entropy and KL at temperature 1; the gradients of the first where asked for."""
    n, k = len(student_features), len(student_prototypes)
    rows = min(n, max(1, max_logits // k))
    student_buffer, teacher_buffer = student_features.new_empty(rows, k), student_features.new_empty(rows, k)
    # softmaxes need a third buffer: a few rows, which stay in a cache, but enough to be worth the calls
    block = min(rows, max(1, rows // 8, 2**20 // k))
    scratch = student_features.new_empty(block, k)
    parts = student_features.new_empty(4, n)
    features_gradient = torch.empty_like(student_features) if to_features else None
    prototypes_gradient = torch.empty_like(student_prototypes) if to_prototypes else None
    for start in range(0, n, rows):
        chunk = slice(start, min(start + rows, n))
        count = chunk.stop - start
        student = torch.mm(student_features[chunk], student_prototypes.T, out=student_buffer[:count])
        teacher = torch.mm(teacher_features[chunk], teacher_prototypes.T, out=teacher_buffer[:count])
        for first in range(0, count, block):
            some = slice(first, min(first + block, count))
            _softmax_difference(
                student[some],
                teacher[some],
                scratch[: some.stop - first],
                parts[:, start + first : start + some.stop],
                to_features or to_prototypes,
            )
        to_logits = teacher  # times n
        if features_gradient is not None:
            torch.mm(to_logits, student_prototypes, out=features_gradient[chunk])
        if prototypes_gradient is not None:
            prototypes_gradient.addmm_(to_logits.T, student_features[chunk], beta=float(start > 0), alpha=1 / n)
    if features_gradient is not None:
        features_gradient /= n
    student_log_sum, teacher_log_sum, teacher_mean, difference = parts.double()
    entropy = teacher_log_sum - teacher_mean
    kl = difference - (teacher_log_sum - student_log_sum)
    means = torch.stack([entropy + kl, entropy, kl]).mean(dim=1).to(student_features.dtype)
    return means, features_gradient, prototypes_gradient


def _softmax_difference(
    student: Float[Tensor, "r k"],
    teacher: Float[Tensor, "r k"],
    scratch: Float[Tensor, "r k"],
    parts: Float[Tensor, "4 r"],
    with_difference: bool,
) -> None:
    """Put ``q - p``, the difference of the softmaxes of two sets of logits, where the teacher's logits are.

    ``parts`` gets the ``log sum exp`` of student and of teacher, ``sum p teacher`` and ``sum p (teacher - student)``.
    """
    student_log_sum, teacher_log_sum, teacher_mean, difference = parts
    p = torch.softmax(teacher, dim=1, out=scratch)
    # the largest softmax is 1 / sum exp(logits - largest logit)
    torch.sub(teacher.amax(dim=1), p.amax(dim=1).log(), out=teacher_log_sum)
    teacher *= p
    torch.sum(teacher, dim=1, out=teacher_mean)
    teacher.addcmul_(p, student, value=-1)
    torch.sum(teacher, dim=1, out=difference)
    q = torch.softmax(student, dim=1, out=teacher)
    torch.sub(student.amax(dim=1), q.amax(dim=1).log(), out=student_log_sum)
    if with_difference:
        q -= p


def quadratic_cross_entropy(
    student_features: Float[Tensor, "n d"],
    student_prototypes: Float[Tensor, "k d"],
    teacher_features: Float[Tensor, "n d"],
    teacher_prototypes: Float[Tensor, "k d"],
    student_temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> PrototypeLoss:
    """`prototype_loss` of ``features prototypes^T`` to second order in the logits, which it does not form.

    With ``a`` and ``b`` a token's logits of teacher and student, divided by their temperatures, and variances over
    the ``k`` prototypes, all equally likely:

    ``KL(p || q) = 1/2 Var(a - b)``, ``H(p) = ln k - 1/2 Var(a)``, ``CE = H + KL``, each up to the third order.

    Logits are linear in the prototypes, so ``Var(a - b) = u_s C_ss u_s - 2 u_t C_ts u_s + u_t C_tt u_t`` with ``u``
    the features divided by the temperatures and ``C`` the covariances of the prototypes' rows. Nothing is assumed of
    the prototypes: they may be of any length, unevenly spread, and differ between teacher and student. What is assumed
    is that logits vary little, so that every softmax is nearly uniform: at temperature 1 unit prototypes see to it, at
    0.04 they do not.

    Arguments, result and the limits of its gradient are those of `prototype_cross_entropy`.
    """
    precise = torch.promote_types(student_features.dtype, torch.float32)
    with torch.autocast(student_features.device.type, enabled=False):
        u_s = student_features.to(precise) / student_temperature
        u_t = teacher_features.detach().to(precise) / teacher_temperature
        student, teacher = student_prototypes.to(precise), teacher_prototypes.detach().to(precise)
        c_ss, c_ts, c_tt = _Covariances.apply(student, teacher)
        student_variance = ((u_s @ c_ss) * u_s).sum(dim=1)
        teacher_variance = ((u_t @ c_tt) * u_t).sum(dim=1)
        covariance = ((u_t @ c_ts) * u_s).sum(dim=1)
        kl = (student_variance - 2 * covariance + teacher_variance).mean() / 2
        entropy = math.log(len(teacher)) - teacher_variance.mean() / 2
    return PrototypeLoss(cross_entropy=entropy + kl, teacher_entropy=entropy, kl=kl.detach())


class _Covariances(torch.autograd.Function):
    """Of the rows of two matrices that belong together: ``C_ss``, ``C_ts``, ``C_tt``; gradient for the first alone.

    Autograd would keep up to four matrices of the prototypes' size on the way back; by hand it is the result alone.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Float[Tensor, "k d"], teacher: Float[Tensor, "k d"]
    ) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        means = student.mean(dim=0), teacher.mean(dim=0)
        ctx.save_for_backward(student, teacher, *means)
        c_ss = _covariance(student, student, means[0], means[0])
        c_ts = _covariance(teacher, student, means[1], means[0])
        c_tt = _covariance(teacher, teacher, means[1], means[1])
        ctx.mark_non_differentiable(c_tt)
        return c_ss, c_ts, c_tt

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, to_ss: Float[Tensor, "d d"], to_ts: Float[Tensor, "d d"], _: Any
    ) -> tuple[Optional[Float[Tensor, "k d"]], None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        student, teacher, student_mean, teacher_mean = ctx.saved_tensors
        both = (to_ss + to_ss.T) / len(student)  # the student stands on both sides of C_ss
        one = to_ts / len(student)
        gradient = (student @ both).addmm_(teacher, one)
        gradient -= student_mean @ both + teacher_mean @ one
        return gradient, None


def _covariance(
    a: Float[Tensor, "k c"], b: Float[Tensor, "k d"], a_mean: Float[Tensor, "c"], b_mean: Float[Tensor, "d"]
) -> Float[Tensor, "c d"]:
    """``a^T b / k`` less the product of the means."""
    return torch.outer(a_mean, b_mean).addmm_(a.T, b, beta=-1, alpha=1 / len(a))


def cosine_similarity(a: Float[Tensor, "n c"], b: Float[Tensor, "n c"]) -> Float[Tensor, "n"]:
    """Cosine between tokens, float32 or better."""
    precise = torch.promote_types(a.dtype, torch.float32)
    return F.cosine_similarity(a.to(precise), b.to(precise), dim=-1)


def preservation(
    student: Float[Tensor, "n c"], original: Float[Tensor, "n c"], measure: Literal["l2", "cosine"]
) -> Float[Tensor, ""]:
    """How far the student's tokens ``s`` are from those of the backbone before training, ``o``; against forgetting.

    ``l2``: ``1/(n c) sum_n sum_c (s_nc - o_nc)^2``. ``cosine``: ``1 - 1/n sum_n cos(s_n, o_n)``.

    Args:
        student: with gradient.
        original: taken as constants.
        measure: which of the two.

    Returns:
        The mean, float32 or better.
    """
    if measure == "cosine":
        return 1 - cosine_similarity(student, original.detach()).mean()
    precise = torch.promote_types(student.dtype, torch.float32)
    return (student.to(precise) - original.detach().to(precise)).square().mean()
