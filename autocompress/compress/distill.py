"""Loss of a student that learns from labels and from a teacher's answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from autocompress.policy import DistillSpec


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher_T || student_T), mean over the batch (Hinton et al. 2015, arXiv 1503.02531, section 2).

    Args:
        student_logits, teacher_logits: n x classes. The gradient reaches the student only.
        temperature: T > 0; both sides are softmax(logits / T). T^2 keeps the gradient's size independent of T.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * temperature**2


def distillation_loss(student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, spec: DistillSpec) -> Tensor:
    """alpha * soft_loss + (1 - alpha) * cross_entropy(student, targets)."""
    hard = F.cross_entropy(student_logits, targets)
    return spec.alpha * soft_loss(student_logits, teacher_logits, spec.temperature) + (1 - spec.alpha) * hard
