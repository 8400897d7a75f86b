"""Training of students: networks of every shape learn, and all of their weights do."""

import time

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth

import autocompress.compress.train as train_module
from autocompress.compress import arithmetic, memory, norms
from autocompress.compress import rates as rates_module
from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.muon import Muon
from autocompress.compress.optimizer import Optimizer
from autocompress.compress.outputs import relative_errors, variances
from autocompress.compress.rates import Schedule, TrainPlan, one_cycle
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train, train_quantized
from autocompress.data import Data, Split
from autocompress.devices import processor
from autocompress.errors import PolicyFailure
from autocompress.export import compare, onnx_bytes
from autocompress.graph import Graph
from autocompress.policy import DistillSpec, Policy, QuantSpec, StudentSpec
from autocompress.testing.models import tiny_resnet

CLASSES = 4


class LeNet(nn.Module):
    """Flattens a map of 4 x 4 by `view`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4 * 4, CLASSES)

    def forward(self, x):
        x = torch.relu(self.second(F.max_pool2d(torch.relu(self.first(x)), 2)))
        return self.head(x.view(x.size(0), -1))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return Data(
        *(Split(torch.randn(n, 3, 8, 8, generator=generator), torch.arange(n) % CLASSES) for n in (64, 16, 16)),
        classes=CLASSES,
    )


def student_of(model, data, policy=None):
    torch.manual_seed(0)
    return build_student(Graph.trace(model.eval(), (data.example(1),)), policy or Policy())


def learned(student, data, steps=3):
    """Names of the parameters that a few steps change."""
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    train(student, data, TrainPlan(steps=steps, batch_size=16))
    return {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.fixture(params=[False, True], ids=["traced", "opaque"])
def _as_traced(request):
    if request.param:
        request.getfixturevalue("untraceable")


@pytest.mark.usefixtures("_as_traced")
def test_a_network_that_flattens_by_view_is_trained(data):
    student = student_of(LeNet(), data)
    assert learned(student, data) == {name for name, _ in student.named_parameters()}


@pytest.mark.usefixtures("_as_traced")
def test_a_network_that_flattens_by_view_is_trained_in_int8_and_exported(data):
    quant = QuantSpec(bits=8, reduced_range=processor.int8_saturates(processor.flags()))
    student = train_quantized(student_of(LeNet(), data), quant, data, TrainPlan(steps=4, batch_size=16, quant_fraction=0.5))
    session = onnxruntime.InferenceSession(onnx_bytes(student, quant, (data.example(4),)), providers=["CPUExecutionProvider"])
    answers = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: data.example(4).numpy()})[0])
    with torch.no_grad():
        assert compare(student(data.example(4)), answers).relative <= 0.05


def test_a_pruned_network_flattens_by_view_what_is_left(data):
    student = student_of(LeNet(), data, Policy(student=StudentSpec(width=0.5)))
    assert student(data.example(2)).shape == (2, CLASSES)
    assert student.get_submodule("head").in_features < 8 * 4 * 4


def test_bits_that_are_read_as_another_type_stay_a_view(data):
    class Bits(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, CLASSES, 8)

        def forward(self, x):
            return self.conv(x.view(torch.int32).view(torch.float32)).flatten(1)

    assert not Graph.trace(Bits().eval(), (data.example(1),)).opaque_reason


def test_a_loss_of_ones_own_may_take_views_of_maps(data):
    own = Data(
        data.train, data.val, data.test,
        loss=lambda outputs, _: outputs.view(len(outputs), -1).square().mean(), score=lambda *_: 0.0,
    )  # fmt: skip
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3))
    assert learned(student_of(net, data), own)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_all_of_a_frozen_teachers_student_learns(data, width):
    teacher = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )
    teacher.requires_grad_(False)
    student = student_of(teacher, data, Policy(student=StudentSpec(width=width)))
    assert learned(student, data) == {name for name, _ in student.named_parameters()}
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("together", [1, 2 * 6 * 4, 2**24])
def test_muon_updates_matrices_of_one_shape_together_as_each_alone(monkeypatch, together):
    monkeypatch.setattr("autocompress.compress.muon.MOST_TOGETHER", together)
    shapes = [(6, 4), (4, 6), (6, 4), (6, 4), (4, 6), (6, 2, 1, 2), (5, 5)]
    weights = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(i))) for i, shape in enumerate(shapes)]
    alone = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizers = [Muon(weights, lr=0.1, weight_decay=0.01), *(Muon([weight], lr=0.1, weight_decay=0.01) for weight in alone)]
    for step in range(3):
        for index, pair in enumerate(zip(weights, alone, strict=True)):
            for weight in pair:
                weight.grad = (10.0**index) * torch.randn(weight.shape, generator=torch.Generator().manual_seed(100 * step + index))
        for optimizer in optimizers:
            optimizer.step()
    for weight, expected in zip(weights, alone, strict=True):
        torch.testing.assert_close(weight, expected, atol=0.02, rtol=0.02)  # bfloat16, where that is faster


def test_muon_allocates_its_momentum_once(monkeypatch):
    weight, made = nn.Parameter(torch.randn(4, 6)), []
    zeros = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda *arguments, **options: made.append(1) or zeros(*arguments, **options))
    optimizer = Muon([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(4, 6)
        optimizer.step()
    assert len(made) == 1
    assert torch.allclose(optimizer.state[weight]["momentum"], torch.full((4, 6), 1 + 0.95 + 0.95**2))


def trained_as_a_student(net, data, plan):
    train_quantized(net, QuantSpec(), data, plan)


@pytest.mark.parametrize("steps", [4, 80])
@pytest.mark.parametrize("trained", [train, trained_as_a_student], ids=["teacher", "student"])
def test_batch_norms_know_the_weights_that_training_ends_with(data, steps, trained):
    """After a few steps the running statistics would still be those of the beginning."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))
    with torch.no_grad():
        net[0].weight.mul_(30.0)
    trained(net, data, TrainPlan(steps=steps, batch_size=16))
    norm, seen = net[1], net[0](data.train.inputs).detach()
    assert torch.allclose(norm.running_mean, seen.mean((0, 2, 3)), atol=0.2 * float(seen.std()))
    assert torch.allclose(norm.running_var, seen.var((0, 2, 3)), rtol=0.2)
    assert (norm.momentum, norm.training) == (0.1, False)


@pytest.mark.parametrize("dropped", [nn.Dropout2d(0.9), StochasticDepth(0.9, "row")], ids=["maps", "layers"])
def test_batch_norms_do_not_see_what_is_dropped_in_training_only(data, dropped):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), dropped, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, CLASSES))
    train(net, data, TrainPlan(steps=4, batch_size=16))
    seen = net[0](data.train.inputs).detach()
    assert torch.allclose(net[2].running_var, seen.var((0, 2, 3)), rtol=0.2)


@pytest.mark.parametrize(
    ("to_learn", "steps", "muon", "sgd"),
    [
        (1.0, 30, 1.0, 1.0),
        (0.5, 30, 1.0, 0.125),
        (0.3, 30, 0.75, 0.1),
        (0.15, 30, 0.5, 0.1),
        (0.03, 30, 0.1, 0.1),
        (0.0, 30, 0.05, 0.1),
        (0.0, 300, 0.5, 1.0),
        (0.03, 150, 0.25, 0.5),
        (0.0, 3000, 0.5, 1.0),
    ],
)
def test_a_student_with_much_to_lose_is_trained_gently_where_steps_are_few(to_learn, steps, muon, sgd):
    so_far = Schedule(TrainPlan(steps, to_learn=to_learn))
    so_far.done = steps // 2
    cycle = one_cycle(0.5)
    assert so_far.rates == pytest.approx((sgd * cycle, muon * cycle), rel=0.01)


def test_how_many_steps_there_will_be_is_told_by_the_clock():
    so_far = Schedule(TrainPlan(10**9, time.monotonic() + 10.0, to_learn=0.0))
    assert so_far.rates == (0.0, 0.0), "before the first step nobody knows"
    so_far._started -= 10.0
    so_far._allowed += 10.0
    so_far.done = 15
    cycle = one_cycle(0.5)
    assert so_far.rates == pytest.approx((0.1 * cycle, 0.05 * cycle), rel=0.05)


@pytest.mark.parametrize("trained", [train, trained_as_a_student], ids=["teacher", "student"])
def test_training_that_diverges_begins_again_at_lower_rates(data, trained, monkeypatch):
    rates, step = [], Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, given: rates.append(self._parts[0][1]) or step(self, given))
    net = student_of(LeNet(), data)
    trained(net, data, TrainPlan(steps=60, batch_size=16, learning_rate=1e3))
    assert len(set(rates)) > 1 and rates[-60:] == [min(rates)] * 60, "rates that are bearable are kept to the end"
    assert all(torch.isfinite(parameter).all() for parameter in net.parameters())


def test_training_that_diverges_at_any_rate_fails_and_says_so(data):
    net = student_of(LeNet(), data)
    with torch.no_grad():
        net.get_parameter("head.bias").fill_(float("nan"))
    with pytest.raises(PolicyFailure, match="training diverged: the loss must stay finite, but is nan at step 0"):
        train(net, data, TrainPlan(steps=3, batch_size=16))


@pytest.mark.parametrize("trained", [train, trained_as_a_student], ids=["teacher", "student"])
def test_training_that_diverges_when_its_time_is_over_fails(data, trained, monkeypatch):
    """It would give back a student that was not trained."""
    calls = []

    def loss(*arguments):
        calls.append(arguments)
        return torch.tensor(1.0 if len(calls) == 1 else float("nan"), requires_grad=True)

    monkeypatch.setattr(train_module, "loss_of", loss)
    monkeypatch.setattr(Optimizer, "step", lambda *_: time.sleep(0.3))
    with pytest.raises(PolicyFailure, match="training diverged"):
        trained(student_of(LeNet(), data), data, TrainPlan(steps=10**9, deadline=time.monotonic() + 0.31, batch_size=16))
    assert len(calls) == 2


def test_a_loss_that_is_not_finite_before_the_first_step_is_tried_once(data, monkeypatch):
    calls = []
    monkeypatch.setattr(train_module, "loss_of", lambda *_: calls.append(1) or torch.tensor(float("nan")))
    with pytest.raises(PolicyFailure, match="nan at step 0"):
        train(student_of(LeNet(), data), data, TrainPlan(steps=3, batch_size=16))
    assert len(calls) == 1


@pytest.mark.parametrize(("changes", "asked"), [({}, True), ({"hidden": 0.0}, False), ({"features": 0.0}, False)])
def test_hidden_features_are_asked_of_the_teacher_only_where_they_are_compared(data, changes, asked):
    torch.manual_seed(0)
    net = tiny_resnet()
    graph = Graph.trace(net.eval(), (data.example(1),))
    policy = Policy(student=StudentSpec(drop=(graph.blocks[0].name,)))
    compared, wanted = compared_features(graph, policy, graph), []
    teacher = Teacher(net, data, classifier=graph.classifier)
    answers = teacher.answers
    teacher.answers = lambda *arguments: wanted.append(arguments[-1]) or answers(*arguments)
    train(
        build_student(graph, policy),
        data,
        TrainPlan(2, batch_size=16),
        distillation=Distillation(teacher, DistillSpec(**changes), compared),
    )
    assert wanted == [[layer.counterpart for layer in compared.hidden] if asked else []] * 2 and compared.hidden


class Hungry(nn.Module):
    """Has memory for so many inputs at a time."""

    def __init__(self, most, error):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.most, self.error, self.asked = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, CLASSES)), most, error, []

    def forward(self, x):
        self.asked.append(len(x))
        if len(x) > self.most:
            raise self.error
        return self.net(x)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()]
)
def test_where_memory_runs_out_batches_are_taken_in_parts_with_the_same_gradient(data, error, monkeypatch):
    monkeypatch.setitem(arithmetic._bf16_faster, "cpu", False)
    plan = TrainPlan(3, batch_size=32)
    whole, parts = (train(Hungry(most, error), data, plan) for most in (32, 8))
    assert whole.asked == [32] * 3
    assert parts.asked[:2] == [32, 16], "by halves"
    assert set(parts.asked[3:]) == {8} and len(parts.asked[3:]) >= 4 * 3 - 1, "and so from then on"
    torch.testing.assert_close(parts.net[1].weight, whole.net[1].weight)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a shape does not fit")])
def test_what_parts_do_not_mend_is_told(data, error):
    model = Hungry(2, error)
    with pytest.raises(RuntimeError, match=str(error)):
        train(model, data, TrainPlan(3, batch_size=32))
    assert min(model.asked) == (8 if isinstance(error, torch.OutOfMemoryError) else 32)


@pytest.mark.parametrize(("share", "parts"), [(1.2, 1), (0.7, 2), (0.3, 4), (0.01, 8)])
def test_a_batch_that_does_not_fit_the_memory_is_taken_in_parts_from_the_start(data, monkeypatch, share, parts):
    """A process that takes more than there is would be killed."""
    student = student_of(LeNet(), data)
    each = 4 * (3 * 8 * 8 + 2 * 6 * 8 * 8 + 6 * 4 * 4 + 2 * 8 * 4 * 4 + 8 * 4 * 4 + CLASSES)
    monkeypatch.setattr(memory, "free_memory", lambda device: share * 64 * each / memory.MEMORY_SHARE)
    sizes = []
    student.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    train(student, data, TrainPlan(2, batch_size=64))
    assert sizes[: 2 * parts] == [64 // parts] * 2 * parts


class Scaled(nn.Module):
    """Predicts prices in another currency."""

    def __init__(self, scale, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES))
        self.scale = scale

    def forward(self, x):
        return self.scale * self.net(x)


def test_losses_of_ones_own_do_not_depend_on_the_unit_of_what_is_predicted(data, monkeypatch):
    """Of targets in the thousands every run would diverge, of thousandths none learn."""
    monkeypatch.setitem(arithmetic._bf16_faster, "cpu", False)
    learned = []
    for scale in (1.0, 1000.0):
        generator = torch.Generator().manual_seed(0)
        splits = [
            Split(part.inputs, scale * torch.randn(len(part), CLASSES, generator=generator)) for part in (data.train, data.val, data.test)
        ]
        own = Data(*splits, loss=F.mse_loss, score=lambda outputs, targets: 0.0)
        student = Scaled(scale, seed=1)
        distillation = Distillation(Teacher(Scaled(scale, seed=2).eval(), own), DistillSpec(alpha=0.5))
        train(student, own, TrainPlan(4, batch_size=16), distillation=distillation)
        learned.append(student.net[2].weight.detach())
    torch.testing.assert_close(*learned, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(learned[0], Scaled(1.0, seed=1).net[2].weight, atol=1e-3), "it has learned something"


def test_a_short_training_leaves_time_for_what_follows_it(monkeypatch):
    """Norms and ranges took the time of all training through fake quantization."""
    now = [100.0]
    monkeypatch.setattr(rates_module.time, "monotonic", lambda: now[0])
    steps = Schedule(TrainPlan(10**9, deadline=200.0))
    steps.done, now[0] = 10, 150.0
    assert steps.progress == pytest.approx(0.5)
    steps.upkeep = lambda done: 4.0
    assert steps.progress == pytest.approx(0.7), "four steps of 5 s are to come"
    steps.upkeep = lambda done: 400.0
    assert steps.progress == pytest.approx(0.5 + rates_module.MOST_UPKEEP)
    upkeep, cost = norms.upkeep(tiny_resnet(), begun=5, calibrated=4.0), norms.FORWARD_COST
    assert [upkeep(done) for done in (5, 15, 5 + norms.FEW_STEPS)] == pytest.approx([4 * cost, 14 * cost, 4 * cost])
    assert norms.upkeep(LeNet())(10) == 0.0, "it has no norms"


@pytest.mark.parametrize(
    ("momentum", "steps", "repaired"), [(0.1, 60, False), (0.01, 60, True), (3e-4, 60, True), (None, 60, True), (0.1, 20, True)]
)
def test_norms_that_are_slower_than_training_are_estimated_once_more(data, momentum, steps, repaired):
    """Those of MnasNet take ten thousand steps; with what they began with its students would answer at random."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.Linear(144, CLASSES))
    norms.reestimate_norms(net, data, TrainPlan(steps, batch_size=16), steps)
    seen = float((net[1].running_mean - torch.zeros(4)).abs().max())
    assert (seen > 1e-3) is repaired
    assert net[1].momentum == momentum
    assert bool(norms.upkeep(net)(steps)) is repaired


def test_numbers_are_learned_in_float32_where_bfloat16_would_round_them_away(data, monkeypatch):
    """Around 2000 it has steps of 8."""
    monkeypatch.setitem(arithmetic._bf16_faster, "cpu", True)
    numbers = Data(data.train, data.val, data.test, loss=lambda o, t: o.mean(), score=lambda o, t: 0.0)
    for offset, exact in ((0.0, False), (2000.0, True)):
        model = LeNet()
        with torch.no_grad():
            model.head.bias += offset
        teacher = Teacher(model.eval(), numbers)
        answers = teacher.answers(torch.arange(16), data.view(torch.arange(16), 0), 0).outputs
        with torch.no_grad():
            wanted = model(data.view(torch.arange(16), 0))
        assert bool((answers == wanted).all()) is exact
        assert bool(relative_errors(answers, wanted).max() < 0.05**2)
    assert not (Teacher(model, data).answers(torch.arange(16), data.view(torch.arange(16), 0), 0).outputs == wanted).all(), (
        "decisions bear it"
    )


def test_each_output_counts_in_its_own_unit():
    """The variance of years and of logarithms of prices together is that of their means."""
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(200, 3, generator=generator) * torch.tensor([15.0, 0.5, 0.0]) + torch.tensor([2000.0, 12.0, 7.0])
    assert variances(wanted).flatten().tolist() == pytest.approx([225.0, 0.25, 49.0], rel=0.3)
    constant = wanted.mean(0, keepdim=True).expand_as(wanted)
    assert relative_errors(constant, wanted).tolist() == pytest.approx([1.0, 1.0, 0.0], abs=0.02)
    assert variances(torch.zeros(4)).tolist() == [1.0]
    assert variances(torch.randn(5, 2, 3, 3)).shape == (1, 2, 1, 1)
