"""What the student is asked to match (paper section 3.5, equation 5), always in float32."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


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


def cosine_similarity(a: Float[Tensor, "n c"], b: Float[Tensor, "n c"]) -> Float[Tensor, "n"]:
    """Cosine between tokens, float32 or better."""
    precise = torch.promote_types(a.dtype, torch.float32)
    return F.cosine_similarity(a.to(precise), b.to(precise), dim=-1)
