"""The distillation loss in closed form, at its zero and at its ends."""

import pytest
import torch
import torch.nn.functional as F

from autocompress.compress.distill import distillation_loss, soft_loss
from autocompress.policy import DistillSpec

TEMPERATURES = [0.5, 1.0, 4.0, 20.0]


def logits(seed: int, n: int = 5, classes: int = 7) -> torch.Tensor:
    return 3 * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_zero_with_zero_gradient_where_logits_are_equal(temperature):
    teacher = logits(0)
    student = (teacher + 2.5).requires_grad_()
    loss = soft_loss(student, teacher, temperature)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad.abs().max() < 1e-12
    assert soft_loss(logits(1), teacher, temperature) > 1e-3


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gradient_is_that_of_finite_differences(temperature):
    student = logits(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_loss(s, logits(0), temperature), (student,))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_closed_form_is_the_batch_mean_of_kl_times_squared_temperature(temperature):
    student, teacher = logits(1), logits(0)
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-10)
    twice = soft_loss(torch.cat([student, student]), torch.cat([teacher, teacher]), temperature)
    assert twice.item() == pytest.approx(expected.item(), rel=1e-10), "a mean does not grow with the batch"


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_alpha_mixes_labels_and_teacher(alpha):
    student, teacher, targets = logits(1), logits(0), torch.tensor([0, 1, 2, 3, 4])
    loss = distillation_loss(student, teacher, targets, DistillSpec(temperature=3.0, alpha=alpha))
    expected = alpha * soft_loss(student, teacher, 3.0) + (1 - alpha) * F.cross_entropy(student, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_teacher_gets_no_gradient():
    teacher = logits(0).requires_grad_()
    soft_loss(logits(1).requires_grad_(), teacher, 2.0).backward()
    assert teacher.grad is None
