"""What a student learns from its teacher: answers (logits), and the features that they are read from."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.policy import DistillSpec

TINY = 1e-8


@dataclass(frozen=True)
class Answers:
    """What a network says of n inputs: its outputs, and where they were observed the features (n x channels) they are read from."""

    outputs: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class SharedFeatures:
    """The inputs of the classifier that student and teacher share.

    Args:
        layer: name of the linear layer that makes the outputs, the same in both.
        student, teacher: index of each shared channel in the features of either.
    """

    layer: str
    student: Tensor
    teacher: Tensor


def observe(model: nn.Module, inputs: Tensor, layer: str | None) -> Answers:
    """Outputs of the model, together with what its linear layer of this name was given (n x channels)."""
    if layer is None:
        return Answers(model(inputs))
    seen: list[Tensor] = []

    def note(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append(arguments[0] if arguments else named["input"])

    handle = model.get_submodule(layer).register_forward_pre_hook(note, with_kwargs=True)
    try:
        outputs = model(inputs)
    finally:
        handle.remove()
    return Answers(outputs, seen[-1])


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


def feature_loss(student: Answers, teacher: Answers, shared: SharedFeatures) -> Tensor:
    """Mean squared difference of the shared features, in units of the teacher's variance over the batch.

    A student whose features are the teacher's has its answers, since the classifier is inherited (SimKD: Chen et al. 2022, arXiv
    2203.14001, equation 3, where a projector stands in for channels that correspond).
    """
    assert student.features is not None and teacher.features is not None
    own = student.features.float()[:, shared.student.to(student.features.device)]
    wanted = teacher.features.detach().to(own.device)[:, shared.teacher.to(own.device)]
    variance = wanted.var(0).mean() if len(wanted) > 1 else wanted.square().mean()
    return F.mse_loss(own, wanted) / (variance + TINY)
