"""The distillation loss in closed form, at its zero and at its ends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autocompress.compress.distill import (
    ANGLES,
    ANSWER_LOSSES,
    FEATURE_LOSSES,
    OTHER_CLASSES,
    Answers,
    Compared,
    ComparedFeatures,
    compare_features,
    decoupled_loss,
    difference,
    distance_loss,
    distillation_loss,
    observe,
    relational_loss,
    similarity_loss,
    soft_loss,
    standardized,
)
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


TARGETS = torch.tensor([0, 1, 2, 3, 6])


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ANSWER_LOSSES)
def test_each_loss_of_answers_is_zero_where_they_are_equal_and_its_gradient_is_that_of_finite_differences(kind, temperature):
    loss, teacher = ANSWER_LOSSES[kind], logits(0)
    assert loss(teacher + 2.5, teacher, TARGETS, temperature).item() == pytest.approx(0.0, abs=1e-9)
    student = logits(1).requires_grad_()
    assert loss(student, teacher, TARGETS, temperature).item() > 1e-3
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, TARGETS, temperature), (student,))
    wanted = teacher.clone().requires_grad_()
    loss(student, wanted, TARGETS, temperature).backward()
    assert wanted.grad is None


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_parts_of_the_decoupled_divergence_make_the_divergence(temperature):
    """KL = TCKD + (1 - p) NCKD (Zhao et al. 2022, equation 6), input by input."""
    student, teacher = logits(1), logits(0)
    for row in range(len(TARGETS)):
        own, wanted, target = student[row : row + 1], teacher[row : row + 1], TARGETS[row : row + 1]
        p, q = (wanted / temperature).softmax(1)[0], (own / temperature).softmax(1)[0]
        label = int(target)
        target_class = p[label] * (p[label] / q[label]).log() + (1 - p[label]) * ((1 - p[label]) / (1 - q[label])).log()
        other_classes = (soft_loss(own, wanted, temperature) / temperature**2 - target_class) / (1 - p[label])
        expected = temperature**2 * (target_class + OTHER_CLASSES * other_classes)
        assert decoupled_loss(own, wanted, target, temperature).item() == pytest.approx(expected.item(), rel=1e-8)


def test_two_classes_have_no_others():
    own, wanted, targets = logits(1, classes=2), logits(0, classes=2), TARGETS % 2
    assert decoupled_loss(own, wanted, targets, 2.0).item() == pytest.approx(soft_loss(own, wanted, 2.0).item(), rel=1e-10)


def test_relations_are_the_correlations_of_rows_and_of_columns():
    student, teacher = logits(1), logits(0)
    p, q = (student / 3.0).softmax(1), (teacher / 3.0).softmax(1)

    def unlike(a, b):
        rows = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        return 1 - torch.stack(rows).mean()

    expected = 9.0 * (2 * unlike(p, q) + 2 * unlike(p.T, q.T))
    assert relational_loss(student, teacher, 3.0).item() == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize("kind", ANSWER_LOSSES)
def test_standardized_logits_may_have_any_scale(kind):
    spec = DistillSpec(answers=kind, standardized=True, alpha=1.0)
    student, teacher = logits(1), logits(0)
    first = distillation_loss(student, teacher, TARGETS, spec)
    assert distillation_loss(7.0 * student + 3.0, teacher, TARGETS, spec).item() == pytest.approx(first.item(), rel=1e-6)
    plain = spec.model_copy(update={"standardized": False})
    assert distillation_loss(student, teacher, TARGETS, plain).item() != pytest.approx(first.item(), rel=1e-3)
    assert standardized(torch.ones(2, 4)).abs().max() == 0.0, "of equal logits nothing is left"
    two = [torch.randn(len(TARGETS), 2, requires_grad=True) for _ in range(2)]
    distillation_loss(*two, TARGETS % 2, spec).backward()
    assert two[0].grad.abs().max() > 0, "of two classes all would be alike"


def features(seed: int, channels: int) -> Answers:
    values = torch.randn(6, channels, generator=torch.Generator().manual_seed(seed))
    return Answers(torch.zeros(6, 2), values)


CHANNELS = {1: (torch.tensor([0, 2]), torch.tensor([1, 3]))}
SHARED = ComparedFeatures("linear", Compared("linear", "linear", shared=CHANNELS))


def feature_loss(student: Answers, teacher: Answers, compared: ComparedFeatures) -> torch.Tensor:
    return compare_features(student, teacher, compared, "values")


def test_features_are_compared_channel_by_channel_and_added_ones_are_free():
    teacher, student = features(0, 4), features(1, 3)
    own, wanted = student.features[:, [0, 2]], teacher.features[:, [1, 3]]
    expected = ((own - wanted) ** 2).mean() / wanted.var(0).mean()
    assert feature_loss(student, teacher, SHARED).item() == pytest.approx(expected.item(), rel=1e-5)
    moved = Answers(student.outputs, student.features + torch.tensor([0.0, 5.0, 0.0]))
    assert feature_loss(moved, teacher, SHARED).item() == pytest.approx(expected.item(), rel=1e-5)


def test_equal_features_cost_nothing_and_the_unit_of_features_does_not_matter():
    teacher, student = features(0, 4), features(1, 3)
    same = Answers(student.outputs, torch.stack([teacher.features[:, 1], torch.ones(6), teacher.features[:, 3]], 1))
    assert feature_loss(same, teacher, SHARED).item() == pytest.approx(0.0, abs=1e-12)
    scaled = [Answers(a.outputs, 100 * a.features) for a in (student, teacher)]
    assert feature_loss(*scaled, SHARED).item() == pytest.approx(feature_loss(student, teacher, SHARED).item(), rel=1e-5)


def test_one_image_or_constant_features_have_no_variance_but_a_loss():
    one = [Answers(a.outputs[:1], a.features[:1]) for a in (features(1, 3), features(0, 4))]
    assert torch.isfinite(feature_loss(*one, SHARED))
    flat = Answers(torch.zeros(6, 2), torch.ones(6, 4))
    assert torch.isfinite(feature_loss(features(1, 3), flat, SHARED))


def wide(seed: int, channels: int, n: int = 6) -> torch.Tensor:
    return torch.randn(n, channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


RELATIONS = [kind for kind in FEATURE_LOSSES if kind != "values"]


@pytest.mark.parametrize("kind", RELATIONS)
def test_relations_need_no_common_channels_and_survive_turning_and_scaling(kind):
    loss, wanted = FEATURE_LOSSES[kind], wide(0, 4)
    turned, _ = torch.linalg.qr(wide(1, 9, 9))
    same = 3.0 * torch.cat([wanted, torch.zeros(6, 5, dtype=torch.float64)], dim=1) @ turned
    assert loss(same, wanted).item() == pytest.approx(0.0, abs=1e-9)
    own = wide(2, 9).requires_grad_()
    assert loss(own, wanted).item() > 1e-3
    assert torch.autograd.gradcheck(lambda features: loss(features, wanted), (own,))
    assert torch.isfinite(loss(own[:1], wanted[:1]))
    assert torch.isfinite(loss(torch.ones(6, 9), torch.ones(6, 4)))
    doubled = torch.cat([own.detach(), own.detach()]).requires_grad_()
    loss(doubled, torch.cat([wanted, wanted + 1e-9])).backward()
    assert doubled.grad.abs().max() < 10.0, "inputs that are the same have no direction"


def test_similarities_are_those_of_the_slow_reference():
    own, wanted = wide(0, 5), wide(1, 3)
    expected = 0.0
    for row in range(6):
        mine, theirs = (torch.stack([features[row] @ other for other in features]) for features in (own, wanted))
        expected += (mine / mine.norm() - theirs / theirs.norm()).square().sum() / 6
    assert similarity_loss(own, wanted).item() == pytest.approx(expected.item(), rel=1e-9)


def test_distances_and_angles_are_those_of_the_slow_reference():
    own, wanted = wide(0, 5), wide(1, 3)

    def apart(features):
        distances = torch.tensor([[float((a - b).norm()) for b in features] for a in features])
        return distances / (distances.sum() / 30)

    def angles(features):
        cosines = torch.zeros(6, 6, 6)
        for corner in range(6):
            for one in {*range(6)} - {corner}:
                for other in {*range(6)} - {corner}:
                    cosines[corner, one, other] = F.cosine_similarity(
                        features[one] - features[corner], features[other] - features[corner], dim=0
                    )
        return cosines

    expected = F.smooth_l1_loss(apart(own), apart(wanted)) + ANGLES * F.smooth_l1_loss(angles(own), angles(wanted))
    assert distance_loss(own, wanted).item() == pytest.approx(expected.item(), rel=1e-5)


def test_where_no_channel_is_shared_values_are_compared_by_their_similarities():
    teacher, student = features(0, 4), features(1, 3)
    apart = ComparedFeatures("linear")
    assert feature_loss(student, teacher, apart) == compare_features(student, teacher, SHARED, "similarity")
    assert compare_features(student, teacher, apart, "distances") == distance_loss(student.features, teacher.features)


def test_all_axes_are_cut_to_what_both_have():
    """What mixes tokens reads channels along an axis of its own."""
    own, wanted = torch.arange(12.0).view(1, 3, 4), torch.arange(30.0).view(1, 5, 6)
    cut = Compared(
        "mix", "mix", axis=2, shared={1: (torch.tensor([0, 2]), torch.tensor([1, 4])), 2: (torch.tensor([3]), torch.tensor([5]))}
    )
    assert [value.flatten().tolist() for value in cut.of(own, wanted)] == [[3.0, 11.0], [11.0, 29.0]]


def test_the_difference_is_of_what_there_is():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert difference(one, two, 0.25) == 1.25
    assert (difference(one, None, 0.25), difference(None, two, 0.25), difference(None, None, 0.25)) == (one, two, None)
    nothing = Answers(torch.zeros(2, 3))
    assert compare_features(nothing, nothing, ComparedFeatures(), "values") is None


def test_observing_returns_outputs_and_inputs_of_the_layer_and_leaves_no_trace():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    seen = observe(model, x, "2")
    assert torch.equal(seen.outputs, model(x))
    assert torch.equal(seen.features, model[:2](x))
    assert observe(model, x, None).features is None
    inside = observe(model, x, "2", ("1", "2"))
    assert torch.equal(inside.hidden["1"], model[0](x)) and torch.equal(inside.hidden["2"], inside.features)
    assert not model[1]._forward_pre_hooks and not model[2]._forward_pre_hooks


def test_a_layer_that_is_not_called_is_not_observed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.called, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.called(x)

    assert observe(Net(), torch.randn(5, 3), "called", ("idle",)).hidden == {}


def test_a_layer_that_is_called_by_keyword_is_observed_too():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head(input=2 * x)

    x = torch.randn(4, 3)
    torch.testing.assert_close(observe(Net(), x, "head").features, 2 * x)
