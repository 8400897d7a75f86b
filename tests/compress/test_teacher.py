"""Cached answers are the answers."""

import copy
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from autocompress.compress.teacher import HIDDEN_SHARE, Teacher
from autocompress.data import Data, Split

N, FEATURES, CLASSES = 20, 4, 3
EPOCH_BYTES = N * CLASSES * 4
TOLERANCE = 0.03
"""Answers may be computed in bfloat16."""


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.rows, self.largest, self.slow_calls = nn.Linear(FEATURES, CLASSES), 0, 0, 0

    def forward(self, x):
        if self.slow_calls:
            self.slow_calls -= 1
            time.sleep(0.1)
        self.rows += len(x)
        self.largest = max(self.largest, len(x))
        return self.linear(x)


def view(indices, epoch, seed=0):
    """The inputs of an epoch: a function of epoch and index, as data with augmentation is."""
    rows = [torch.randn(FEATURES, generator=torch.Generator().manual_seed(1000 * epoch + int(i))) for i in indices]
    return torch.stack(rows)


def make(cache_bytes=10 * EPOCH_BYTES, classifier=None, most=256, classes=CLASSES, is_augmented=True):
    val = Split(view(range(N), 9), torch.zeros(N, dtype=torch.int64))
    data = SimpleNamespace(train=range(N), val=val, view=view, at_most=lambda n, limit: min(n, most), classes=classes, prepare=torch.clone)
    data.is_augmented, data.decides = is_augmented, classes is not None
    return Teacher(Counting().eval(), data, classifier=classifier, cache_bytes=cache_bytes)


@pytest.mark.parametrize("cache_bytes", [0, EPOCH_BYTES, 2 * EPOCH_BYTES, 10 * EPOCH_BYTES])
def test_cached_answers_are_fresh_answers(cache_bytes):
    teacher = make(cache_bytes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        for epoch in (0, 1, 2, 0):
            for indices in torch.randperm(N, generator=generator).split(6):
                inputs = view(indices, epoch)
                answers = teacher.answers(indices, inputs, epoch)
                assert torch.allclose(answers.outputs, teacher.model.linear(inputs), atol=TOLERANCE)
                assert answers.features is None
                assert not answers.outputs.requires_grad


def test_an_answer_is_paid_for_once():
    teacher = make()
    for _ in range(3):
        for epoch in (0, 1):
            for indices in torch.arange(N).split(5):
                teacher.answers(indices, view(indices, epoch), epoch)
    assert teacher.model.rows == 2 * N


def test_a_batch_that_is_partly_known_is_answered():
    teacher = make()
    teacher.answers(torch.arange(5), view(range(5), 0), 0)
    inputs = view(range(3, 9), 0)
    assert torch.allclose(teacher.answers(torch.arange(3, 9), inputs, 0).outputs, teacher.model.linear(inputs), atol=TOLERANCE)


def test_the_cache_keeps_to_its_limit():
    teacher = make(2 * EPOCH_BYTES)
    everything = torch.arange(N)
    for _ in range(2):
        for epoch in (0, 1, 2):
            teacher.answers(everything, view(everything, epoch), epoch)
    assert teacher.model.rows == (3 + 1) * N, "two of three fit"


def test_features_are_what_the_classifier_was_given_and_are_kept_with_the_answers():
    teacher = make(classifier="linear")
    inputs = view(range(N), 0)
    for _ in range(2):
        answers = teacher.answers(torch.arange(N), inputs, 0)
        assert torch.equal(answers.features, inputs)
        assert torch.allclose(answers.outputs, teacher.model.linear(inputs), atol=TOLERANCE)
    assert teacher.model.rows == N


@pytest.mark.parametrize("known", [False, True])
def test_hidden_features_are_told_of_some_of_a_batch_and_not_kept(known):
    teacher, inputs = make(), view(range(N), 0)
    if known:
        teacher.answers(torch.arange(N), inputs, 0)
    before = teacher.model.rows
    answers = teacher.answers(torch.arange(N), inputs, 0, ("linear",))
    some = math.ceil(HIDDEN_SHARE * N)
    assert torch.equal(answers.hidden["linear"], inputs[:some]) and len(answers.outputs) == N
    assert torch.allclose(answers.outputs, teacher.model.linear(inputs), atol=TOLERANCE)
    assert teacher.model.rows - before == (some if known else N)
    assert teacher.answers(torch.arange(N), inputs, 0).hidden == {}


def test_what_a_layer_read_is_told_as_it_was_when_the_layer_read_it():
    """A network may overwrite it afterwards."""

    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, CLASSES), nn.Linear(FEATURES, CLASSES)

        def forward(self, x):
            x = 1.0 * x
            aside = self.first(x)
            return aside + self.second(x.zero_())

    teacher, inputs = make(), view(range(N), 0)
    teacher.model = Overwriting().eval()
    told = teacher.answers(torch.arange(N), inputs, 0, ("first", "second")).hidden
    assert torch.equal(told["first"], inputs[: len(told["first"])]) and not told["second"].any()


def test_features_count_in_the_cache():
    teacher = make(EPOCH_BYTES, classifier="linear")
    for _ in range(2):
        teacher.answers(torch.arange(N), view(range(N), 0), 0)
    assert teacher.model.rows == 2 * N, "outputs alone would fit"


@pytest.mark.parametrize(("keepable", "views"), [(3, 16), (5, 4), (9, 8), (100, 16)])
def test_as_many_views_are_prepared_as_can_be_kept(keepable, views):
    """Fewer than four, and answers are computed as they are asked for: then every epoch has a view of its own."""
    teacher = make(keepable * EPOCH_BYTES)
    teacher.prepare(seconds=60.0)
    assert teacher.views == views
    asked = teacher.model.rows
    for epoch in range(views if keepable > 3 else 0):
        teacher.answers(torch.arange(N), view(range(N), epoch), epoch)
    assert teacher.model.rows == asked


def test_a_teacher_whose_answers_depend_on_the_batch_is_asked_for_each():
    """In the order of the classes, as data sets are stored, its norms would see one class at a time."""
    teacher = make()
    norm = nn.BatchNorm1d(FEATURES, track_running_stats=False)
    mixing = Teacher(nn.Sequential(norm, teacher.model).eval(), teacher._data)
    mixing.prepare(seconds=60.0)
    assert teacher.model.rows == 0
    indices = torch.tensor([3, 7, 11])
    for others in (indices, torch.arange(N)):
        inputs = view(others, 0)
        wanted = teacher.model.linear(norm(inputs))
        assert torch.allclose(mixing.answers(others, inputs, 0).outputs, wanted, atol=TOLERANCE)


def test_data_that_every_epoch_shows_alike_is_answered_once():
    teacher = make(is_augmented=False)
    assert {teacher.view(epoch) for epoch in range(20)} == {0}
    teacher.prepare(seconds=60.0)
    asked = teacher.model.rows
    teacher.answers(torch.arange(N), view(range(N), 0), teacher.view(7))
    assert (teacher.views, teacher.model.rows) == (1, asked)


@pytest.mark.parametrize(("slow_calls", "views", "asked"), [(1, 8, None), (100, 16, 2)])
def test_a_first_call_that_loads_kernels_does_not_make_a_teacher_slow(slow_calls, views, asked):
    """Of a GPU the first takes a second, which says nothing of the others; of a network that stays slow, no more is asked."""
    teacher = make(9 * EPOCH_BYTES, most=1)
    teacher.model.slow_calls = slow_calls
    teacher.prepare(seconds=2.0)
    assert teacher.views == views
    assert asked is None or teacher.model.rows <= asked


def test_a_batch_of_huge_inputs_is_smaller():
    teacher = make(most=7)
    teacher.prepare(seconds=60.0)
    assert teacher.model.rows > N
    assert teacher.model.largest == 7


def test_a_full_cache_costs_no_memory(monkeypatch):
    """A view of a large data set is gigabytes: it must not be allocated to find out that there is no room."""
    from autocompress.compress import teacher as module

    teacher = make(EPOCH_BYTES)
    teacher.answers(torch.arange(N), view(range(N), 0), 0)
    monkeypatch.setattr(module._Kept, "room_for", lambda *_: pytest.fail("allocated"))
    answers = teacher.answers(torch.arange(5), view(range(5), 1), 1)
    assert answers.outputs.shape == (5, CLASSES)


def test_answers_can_be_targets_of_any_loss():
    """Tensors of inference mode cannot be saved for a backward pass."""
    answers = make(0).answers(torch.arange(5), view(range(5), 0), 0)
    weights = torch.ones(CLASSES, requires_grad=True)
    torch.nn.functional.mse_loss(answers.outputs * weights, answers.outputs).backward()
    assert weights.grad is not None


@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classes", "numbers"])
def test_a_student_is_as_far_from_its_teacher_as_their_answers(classes):
    teacher = make(classes=classes)
    same, other = copy.deepcopy(teacher.model).train(), copy.deepcopy(teacher.model)
    with torch.no_grad():
        other.linear.weight.neg_()
        other.linear.bias.neg_()
    assert teacher.distance(same) == pytest.approx(0.0, abs=TOLERANCE)
    assert not same.training
    assert teacher.distance(other) == 1.0


def test_the_distance_of_decisions_is_the_share_that_differs():
    teacher = make()
    last = copy.deepcopy(teacher.model)
    with torch.no_grad():
        last.linear.bias[CLASSES - 1] += 1e3
    decisions = teacher.model(view(range(N), 9)).argmax(1)
    assert teacher.distance(last) == pytest.approx(float((decisions != CLASSES - 1).float().mean()), abs=1.5 / N), "bfloat16 may turn one"


class Reading(nn.Module):
    """Its classifier reads a map in the order of its channels."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.linear, self.read = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, CLASSES), read

    def forward(self, x):
        return self.linear(self.read(self.conv(x)))

    def to(self, device):
        raise AssertionError("models have a `to` of their own, which takes devices only")


def picky(x):
    assert x.is_contiguous()
    return x.flatten(1)


@pytest.mark.parametrize(
    ("read", "layout"),
    [
        (lambda x: x.flatten(1), torch.channels_last),
        (lambda x: x.view(len(x), -1), torch.contiguous_format),
        (lambda x: x.as_strided((len(x), 288), (288, 1)), torch.contiguous_format),
        (picky, torch.contiguous_format),
    ],
    ids=["any", "raises", "differs", "asserts"],
)
def test_a_teacher_is_asked_in_the_layout_that_is_fast_where_its_code_takes_it(read, layout):
    images = torch.randn(N, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = SimpleNamespace(
        train=range(N),
        view=lambda indices, *_: images[indices],
        at_most=lambda n, limit: n,
        classes=CLASSES,
        decides=True,
        is_augmented=True,
    )
    model = Reading(read).eval()
    with torch.no_grad():
        wanted = model(images)
    answers = Teacher(model, data).answers(torch.arange(N), images, 0)
    torch.testing.assert_close(answers.outputs, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert model.conv.weight.is_contiguous(memory_format=layout)


def test_a_teacher_without_memory_for_large_batches_answers_as_it_is_asked():
    class Narrow(Counting):
        def forward(self, x):
            if len(x) > 16:
                raise RuntimeError("CUDA out of memory")
            return super().forward(x)

    teacher = make()
    teacher.model = Narrow().eval()
    teacher.prepare(seconds=60.0)
    indices = torch.arange(8)
    answers = teacher.answers(indices, view(indices, 0), 0)
    assert torch.allclose(answers.outputs, teacher.model.linear(view(indices, 0)), atol=TOLERANCE)


def test_a_loss_that_takes_views_has_its_unit_too():
    """Of several outputs in thousands the loss of a constant answer is some million."""
    inputs, targets = torch.randn(64, FEATURES), 1000 * torch.randn(64, CLASSES)
    split = Split(inputs, targets)
    data = Data(split, split, split, loss=lambda o, t: (o.view(-1) - t.view(-1)).square().mean(), score=lambda o, t: 0.0)
    _, unit = Teacher(Counting().eval(), data).units
    assert 0.5e6 < unit < 2e6
