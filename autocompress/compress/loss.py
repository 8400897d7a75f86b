"""What a student is trained by: the task's own loss, and what it learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autocompress.batch import Inputs
from autocompress.compress.arithmetic import fast_arithmetic
from autocompress.compress.distill import Compared, ComparedFeatures, compare_features, difference, distillation_loss, observe
from autocompress.compress.hidden import compare_hidden
from autocompress.compress.teacher import Teacher
from autocompress.data import Data
from autocompress.policy import DistillSpec

FEATURE_SCALE = 25.0
"""Weight of the difference of features beside the loss of answers, which is T^2 times a divergence: 16 times at the default T = 4 only."""


@dataclass(frozen=True)
class Distillation:
    """What a student learns from: a teacher, how much of it, and the features that are compared (None: answers only)."""

    teacher: Teacher
    spec: DistillSpec
    features: ComparedFeatures | None = None

    @property
    def hidden_layers(self) -> tuple[Compared, ...]:
        """Layers inside whose inputs are compared."""
        return self.features.hidden if self.features is not None and self.spec.features and self.spec.hidden else ()


def loss_of(
    model: nn.Module, data: Data, indices: Tensor, inputs: Inputs, view: int, distillation: Distillation | None, device: torch.device
) -> Tensor:
    """Mean loss of examples of the training split, of `indices`, whose `inputs` are those of this view."""
    targets = data.train.targets[indices].to(device)
    features = distillation.features if distillation is not None else None
    hidden = distillation.hidden_layers if distillation is not None else ()
    with distillation.teacher.arithmetic(device) if distillation is not None else fast_arithmetic(device):
        own = [compared.layer for compared in hidden]
        student = observe(model, inputs.to(device), features.classifier if features is not None else None, own)
    outputs = student.outputs.float().contiguous()  # a loss of one's own may take views of it
    if distillation is None:
        return data.loss(outputs, targets) if data.loss is not None else F.cross_entropy(outputs, targets)
    counterparts = [compared.counterpart for compared in hidden]
    teacher, spec = distillation.teacher.answers(indices, inputs, view, counterparts), distillation.spec
    answers = teacher.outputs.to(device)
    if data.loss is not None:
        variance, constant = distillation.teacher.units
        unlike = ((outputs - answers).square() / variance.to(device)).mean()
        loss = spec.alpha * unlike + (1 - spec.alpha) * data.loss(outputs, targets) / constant
    else:
        loss = distillation_loss(outputs, answers, targets, spec)
    if features is None:
        return loss
    at_end, inside = compare_features(student, teacher, features, spec.feature_loss), compare_hidden(student, teacher, features)
    apart = difference(at_end, inside, spec.hidden)
    return loss if apart is None else (1 - spec.features) * loss + spec.features * FEATURE_SCALE * apart
