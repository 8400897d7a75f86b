"""Reconstructing a student: it computes what it can of its teacher's function, before any training."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from laws.networks import NETWORKS, network, random_policy
from torch import nn

from autocompress.compress import reconstruct as module
from autocompress.compress.reconstruct import TeacherActivations, examples_for, reconstruct
from autocompress.compress.student import build_student
from autocompress.graph import Graph
from autocompress.policy import Policy, PruneSpec, StudentSpec
from autocompress.testing.models import tiny_resnet

N = 64


def inputs_like(example, n=N, seed=1):
    return torch.randn(n, *example.shape[1:], generator=torch.Generator().manual_seed(seed))


def distance(student, teacher, inputs):
    """Mean square difference of the outputs, in units of the teacher's variance."""
    with torch.no_grad():
        wanted = teacher(inputs)
        return float((student(inputs) - wanted).square().mean() / wanted.var())


def settled(model, inputs):
    """The network with batch norms that know these inputs, as those of a trained network do."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        model.train()(inputs)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def reconstructed(graph, policy, inputs, **options):
    student = build_student(graph, policy)
    reconstruct(student, TeacherActivations(graph, inputs), policy, **options)
    return student


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "vgg11_bn"])  # its wide layers only take longer
def test_a_reconstructed_student_is_nearer_to_its_teacher_on_inputs_that_it_has_not_seen(name, monkeypatch):
    monkeypatch.setattr(module, "MOST_INPUTS", 2200 if name == "resnext" else 1200)
    model, example = network(name)
    seen, unseen = inputs_like(example), inputs_like(example, 16, seed=2)
    graph = Graph.trace(settled(model, seen), (example,))
    policy = random_policy(graph, 1, widths=True)
    before, after = settled(build_student(graph, policy), seen), reconstructed(graph, policy, seen)
    assert distance(after, model, seen) < 0.7 * distance(before, model, seen)
    assert distance(after, model, unseen) < distance(before, model, unseen)


def test_the_teacher_itself_stays_what_it_is():
    model = tiny_resnet()
    inputs = torch.randn(N, 3, 32, 32)
    graph = Graph.trace(settled(model, inputs), (inputs[:1],))
    assert distance(reconstructed(graph, Policy(), inputs), model, inputs) < 1e-6


class Twins(nn.Module):
    """Of the four channels inside, the last two are the first two again: without them nothing is lost."""

    def __init__(self, groups=1):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.inner = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
        self.last = nn.Conv2d(4, 5, 1)
        with torch.no_grad():
            self.first.weight[2:] = self.first.weight[:2]
            self.norm.weight[2:] = 0.5
            if groups == 4:
                self.inner.weight[2:], self.inner.bias[2:] = self.inner.weight[:2], self.inner.bias[:2]

    def forward(self, x):
        return self.last(self.inner(torch.relu(self.norm(self.first(x)))))


def test_a_filter_that_had_decayed_to_nothing_gets_the_length_of_its_neighbours():
    """In front of a norm its gradient is the larger the shorter it is: seen in ResNet-20, whose first step undid what it was fitted for."""
    torch.manual_seed(0)
    inputs, model = torch.randn(N, 3, 8, 8), Twins(1)
    with torch.no_grad():
        model.first.weight[1] *= 1e-4
    model = settled(model, inputs)
    graph = Graph.trace(model, (inputs[:1],))
    student = reconstructed(graph, Policy(prune=PruneSpec(ratios={"first": 0.5}), student=StudentSpec(multiple=1)), inputs)
    whole = reconstructed(graph, Policy(), inputs)
    lengths = whole.first.weight.flatten(1).norm(dim=1)
    assert lengths.min() >= 0.99 * model.first.weight.flatten(1).norm(dim=1).median()
    assert distance(whole, model, inputs) < 1e-4, "the norm makes up for it"
    assert distance(student, model, inputs) < 1.0


@pytest.mark.parametrize("groups", [1, 4])
def test_what_channels_say_twice_is_not_lost_with_one_of_them(groups):
    torch.manual_seed(0)
    inputs = torch.randn(N, 3, 8, 8)
    model = settled(Twins(groups), inputs)
    graph = Graph.trace(model, (inputs[:1],))
    policy = Policy(prune=PruneSpec(ratios={"first": 0.5}), student=StudentSpec(multiple=1))
    assert distance(build_student(graph, policy), model, inputs) > 0.02
    assert distance(reconstructed(graph, policy, inputs), model, inputs) < 1e-4


def test_a_block_does_the_work_of_the_one_that_was_dropped_behind_it():
    """The second block adds the same again as the first, so that the first alone can do it."""

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.a, self.b = (nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)) for _ in range(2))
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.a(x)
            return self.head(x + 0.3 * self.b(x))

    torch.manual_seed(0)
    model, inputs = Doubled().eval(), torch.randn(N, 3, 16, 16)
    with torch.no_grad():  # a linear map of the neighbourhood of one pixel
        model.b[0].weight[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0.0
    graph = Graph.trace(model, (inputs[:1],))
    policy = Policy(student=StudentSpec(drop=("b",)))
    student = reconstructed(graph, policy, inputs)
    head = copy.deepcopy(student.head.weight)
    torch.testing.assert_close(head, model.head.weight, atol=0.05, rtol=0.05)
    assert distance(student, model, inputs) < 0.2 * distance(build_student(graph, policy), model, inputs)


def test_without_time_nothing_is_fitted_and_norms_are_settled():
    inputs = torch.randn(N, 3, 32, 32)
    graph = Graph.trace(settled(tiny_resnet(), inputs), (inputs[:1],))
    policy = random_policy(graph, 0)
    student, inherited = reconstructed(graph, policy, inputs, until=time.monotonic() - 1.0), build_student(graph, policy)
    for name, value in inherited.named_parameters():
        assert torch.equal(student.get_parameter(name), value), name
    assert any(not torch.equal(student.get_buffer(name), value) for name, value in inherited.named_buffers())


def test_a_reconstruction_is_the_same_whenever_it_is_made():
    inputs = torch.randn(N, 3, 32, 32)
    graph = Graph.trace(tiny_resnet().eval(), (inputs[:1],))
    policy = random_policy(graph, 0)
    one, other = reconstructed(graph, policy, inputs).state_dict(), reconstructed(graph, policy, inputs).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_layer_that_is_used_twice_stays_as_it_was():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.shared, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.shared(torch.relu(self.shared(torch.relu(self.stem(x))))))

    torch.manual_seed(0)
    model, inputs = Twice().eval(), torch.randn(N, 3, 8, 8)
    graph = Graph.trace(model, (inputs[:1],))
    student = reconstructed(graph, Policy(), inputs)
    assert torch.equal(student.shared.weight, model.shared.weight)


def test_a_norm_that_is_called_twice_keeps_its_statistics():
    """Those of its last call would be wrong in the first, to which what follows has been fitted."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.second, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.head(self.norm(self.second(torch.relu(self.norm(self.stem(x))))))

    torch.manual_seed(0)
    model, inputs = Twice().eval(), 3.0 + torch.randn(N, 3, 8, 8)
    student = reconstructed(Graph.trace(model, (inputs[:1],)), Policy(), inputs)
    assert torch.equal(student.norm.running_mean, model.norm.running_mean)


def test_large_networks_are_fitted_at_fewer_positions(monkeypatch):
    """What their layers compute at all of them would not fit the memory."""
    inputs = inputs_like(torch.empty(1, 3, 16, 16))
    graph = Graph.trace(settled(tiny_resnet(), inputs), (inputs[:1],))
    taken = []
    recorded = module._Recorder.of
    monkeypatch.setattr(module._Recorder, "of", lambda self, given: taken.append(recorded(self, given)) or taken[-1])
    for most in (2**30, 2**20):
        monkeypatch.setattr(module, "TARGET_BYTES", most)
        policy = Policy(student=StudentSpec(width=0.5))
        module.reconstruct(build_student(graph, policy), TeacherActivations(graph, inputs), policy)
    usual, least = (sum(rows.nbytes for rows in known.values()) for known in taken)
    assert usual > 2**21
    assert least <= 1.5 * 2**20


@pytest.mark.parametrize("kernel", [1, 3, (5, 3)])
@pytest.mark.parametrize("stride", [1, (2, 1)])
@pytest.mark.parametrize("padding", [0, (1, 2)])
@pytest.mark.parametrize(("dilation", "groups"), [(1, 1), (2, 1), (1, 2)])
def test_patches_are_what_a_convolution_multiplies(kernel, stride, padding, dilation, groups):
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups, bias=False)
    value = inputs_like(torch.empty(1, 4, 13, 11), n=700)
    with torch.no_grad():
        wanted = module._rows_of(layer(value), module.ROWS, last=False)
        found = torch.einsum(
            "rgi,goi->rgo", module._patches(layer, value, module.ROWS), layer.weight.view(groups, 6 // groups, -1)
        ).flatten(1)
    assert len(wanted) < 13 * 11 * len(value), "at some positions"
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kept_bytes", [20_000, 2**28])
def test_what_the_teacher_computes_is_kept_for_the_next_student_unless_it_is_too_much(monkeypatch, kept_bytes):
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    runs, record = [], module._Recorder.of
    monkeypatch.setattr(module._Recorder, "of", lambda self, inputs: runs.append(1) or record(self, inputs))
    graph = Graph.trace(settled(tiny_resnet(), inputs_like(torch.empty(1, 3, 16, 16))), (torch.randn(1, 3, 16, 16),))
    shared, policy = TeacherActivations(graph, inputs_like(torch.empty(1, 3, 16, 16))), Policy(student=StudentSpec(width=0.5))
    students = [build_student(graph, policy) for _ in range(2)]
    for student in students:
        reconstruct(student, shared, policy)
    assert len(runs) == (2 if kept_bytes < 2**28 else 1)
    assert bool(shared._kept) == (kept_bytes == 2**28), "a part of it would save nothing"
    for name, value in reconstructed(graph, policy, shared.inputs).state_dict().items():
        assert all(torch.equal(student.state_dict()[name], value) for student in students), name


def test_large_maps_are_reconstructed_on_fewer_examples(monkeypatch):
    graph = Graph.trace(tiny_resnet().eval(), (torch.randn(1, 3, 32, 32),))
    assert examples_for(graph) == module.MOST_EXAMPLES
    monkeypatch.setattr(module, "MAP_BYTES", 4 * 32 * 32 * 16 * 10)
    assert 1 <= examples_for(graph) <= 10


def test_a_table_of_words_is_no_map(monkeypatch):
    """A model of text was reconstructed on, and judged by, as many inputs as fit beside so many vocabularies."""
    words = torch.randint(0, 1000, (1, 8))
    graph = Graph.trace(nn.Sequential(nn.Embedding(1000, 16), nn.Flatten(), nn.Linear(128, 4)).eval(), (words,))
    monkeypatch.setattr(module, "MAP_BYTES", 4 * 1000 * 16)
    assert examples_for(graph) > 100


@pytest.mark.parametrize(("kind", "sizes"), [(nn.Conv1d, (57,)), (nn.Conv3d, (5, 7, 6))])
@pytest.mark.parametrize("groups", [1, 2])
def test_patches_of_signals_and_videos_too(kind, sizes, groups):
    layer = kind(4, 6, 3, 2, 1, groups=groups, bias=False)
    value = inputs_like(torch.empty(1, 4, *sizes), n=400)
    with torch.no_grad():
        wanted = module._rows_of(layer(value), module.ROWS, last=False)
        found = torch.einsum(
            "rgi,goi->rgo", module._patches(layer, value, module.ROWS), layer.weight.view(groups, 6 // groups, -1)
        ).flatten(1)
    torch.testing.assert_close(found, wanted)


def test_a_network_of_signals_is_reconstructed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 16, 5, padding=2), nn.ReLU(), nn.Conv1d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()  # fmt: skip
    inputs = inputs_like(torch.empty(1, 3, 32))
    graph = Graph.trace(model, (inputs[:1],))
    policy = Policy(prune=PruneSpec(ratios={group.name: 0.5 for group in graph.groups if group.prunable}))
    before, after = build_student(graph, policy).eval(), reconstructed(graph, policy, inputs)
    assert distance(after, model, inputs) < 0.7 * distance(before, model, inputs)
    assert not torch.equal(before.get_submodule("2").weight, after.get_submodule("2").weight)
