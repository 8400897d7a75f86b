"""Which policies make the same network, however they are spelt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autocompress.candidates.proposals import inheritance
from autocompress.compress.student import build_student
from autocompress.graph import Graph
from autocompress.policy import DistillSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.testing.models import CifarResNet


@pytest.fixture(scope="module")
def graph():
    torch.manual_seed(0)
    return Graph.trace(CifarResNet(2).eval(), (torch.randn(1, 3, 32, 32),))


def dropped(graph):
    """A block, a channel group and a layer that go with it."""
    block = graph.blocks[0]
    group = next(g for g in graph.groups if set(g.producers) <= set(block.layers))
    return block.name, group.name, block.layers[0]


def spelt(graph):
    block, group, layer = dropped(graph)
    other = next(g.name for g in graph.groups if g.prunable and g.name != group)
    drop = StudentSpec(drop=(block,))
    return [
        (Policy(), Policy(distill=DistillSpec(alpha=0.1))),
        (Policy(), Policy(student=StudentSpec(widths={other: 1.0}, multiple=8), prune=PruneSpec(ratios={other: 0.0}))),
        (Policy(quant=QuantSpec(bits=8)), Policy(quant=QuantSpec(layers={layer.name: 8 for layer in graph.layers}))),
        (Policy(), Policy(quant=QuantSpec(reduced_range=True))),
        (Policy(student=drop), Policy(student=drop, prune=PruneSpec(ratios={group: 0.5}), quant=QuantSpec(layers={layer: 4}))),
        (Policy(prune=PruneSpec(ratios={other: 0.25})), Policy(prune=PruneSpec(ratios={other: 0.26}))),
        (Policy(student=StudentSpec(widths={other: 0.5})), Policy(prune=PruneSpec(ratios={other: 0.5}))),
    ]


def test_the_same_network_has_one_structure_however_it_is_spelt(graph):
    for one, other in spelt(graph):
        assert graph.structure(one) == graph.structure(other), other
        assert graph.workload(one) == graph.workload(other)
        assert one == other or one.digest != other.digest
        states = [build_student(graph, policy).state_dict() for policy in (one, other)]
        assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_other_networks_have_other_structures(graph):
    block, group, layer = dropped(graph)
    policies = [
        Policy(), Policy(student=StudentSpec(drop=(block,))), Policy(prune=PruneSpec(ratios={group: 0.5})),
        Policy(student=StudentSpec(width=2.0)), Policy(quant=QuantSpec(bits=8)), Policy(quant=QuantSpec(layers={layer: 8})),
        Policy(quant=QuantSpec(bits=8, reduced_range=True)), Policy(quant=QuantSpec(bits=4)),
    ]  # fmt: skip
    assert len({graph.structure(policy) for policy in policies}) == len(policies)
    assert len({graph.structure(policy).shape for policy in policies}) == 4, "bits are no shape"


def test_a_network_that_is_widened_and_pruned_to_its_size_inherits_all(graph):
    teacher = graph.workload(Policy())
    groups = [group.name for group in graph.groups if group.prunable and not group.stream]

    def kept(width, ratio):
        policy = Policy(student=StudentSpec(widths=dict.fromkeys(groups, width)), prune=PruneSpec(ratios=dict.fromkeys(groups, ratio)))
        return inheritance(graph.workloads(graph.population([policy], grown=False)), teacher)[0]

    assert kept(2.0, 0.5) == kept(3.0, 0.5) == pytest.approx(1.0)
    assert kept(1.0, 0.5) < 0.9
    assert kept(0.5, 0.0) == kept(1.0, 0.5)


class ByKeyword(nn.Module):
    """Two branches that are joined, and a head: every operator is given its tensors by name."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Linear(10, 2)

    def forward(self, x):
        joined = torch.cat(tensors=[self.left(input=x), self.right(input=x)], dim=1)
        return self.head(input=joined.mean((2, 3)))


def test_arguments_by_keyword_are_understood():
    graph = Graph.trace(ByKeyword(), (torch.randn(1, 3, 4, 4),))
    assert not graph.opaque_reason
    assert sorted(group.size for group in graph.groups if group.prunable) == [4, 6]
    assert graph.classifier == "head"


class Frozen(nn.Module):
    """Asks for no gradients on the way, as code with a pretrained part does, and for a constant."""

    def __init__(self):
        super().__init__()
        self.front, self.back, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x):
        with torch.no_grad():
            features = torch.relu(self.front(x))
            place = torch.arange(5.0).sin()
        return self.head(torch.relu(self.back(features)).mean((2, 3))) + place


def test_parts_that_ask_for_no_gradients_are_parts_like_others():
    torch.manual_seed(0)
    model, x = Frozen().eval(), torch.randn(2, 3, 9, 9)
    graph = Graph.trace(model, (x,))
    assert not graph.opaque_reason
    assert [layer.name for layer in graph.layers] == ["front", "back", "head"]
    assert sorted(group.size for group in graph.groups if group.prunable) == [6, 8]
    torch.testing.assert_close(graph.module(x), model(x))


class Squeezed(nn.Module):
    """Drops all axes of size 1: with one input, that of the batch too."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(nn.functional.adaptive_avg_pool2d(torch.relu(self.conv(x)), 1).squeeze())


def test_a_squeeze_that_would_take_the_batch_away_is_no_reason_to_give_up():
    graph = Graph.trace(Squeezed().eval(), (torch.randn(4, 3, 9, 9),))
    assert not graph.opaque_reason
    assert [group.size for group in graph.groups if group.prunable] == [8]


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8, 8))

    def forward(self, x):
        x = self.stem(x)
        y = x + self.outer(x)
        return (y + self.inner(y)) + x


def test_of_blocks_in_a_block_nothing_is_left_that_is_dropped():
    graph = Graph.trace(Blocks().eval(), (torch.randn(1, 3, 8, 8),))
    names = tuple(block.name for block in graph.blocks)
    student = build_student(graph, Policy(student=StudentSpec(drop=names)))
    assert len(names) == 3
    assert {name for name, _ in student.named_parameters()} == {"stem.weight", "stem.bias"}


def test_a_block_that_is_dropped_inside_of_one_that_is_makes_no_other_network():
    graph = Graph.trace(Blocks().eval(), (torch.randn(1, 3, 8, 8),))
    outer = max(graph.blocks, key=lambda block: len(block.layers)).name
    alone = Policy(student=StudentSpec(drop=(outer,)))
    for inner in {block.name for block in graph.blocks} - {outer}:
        both = Policy(student=StudentSpec(drop=tuple(sorted((outer, inner)))))
        same = set(build_student(graph, both).state_dict()) == set(build_student(graph, alone).state_dict())
        assert (graph.structure(both) == graph.structure(alone)) is same
    assert any(
        graph.structure(Policy(student=StudentSpec(drop=tuple(sorted((outer, block.name)))))) == graph.structure(alone)
        for block in graph.blocks
        if block.name != outer
    )


class Queries(nn.Module):
    """Learned queries, improved by layers of their own, look at an image, as decoders of detection do."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 5, 16))
        self.first, self.second, self.key = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)
        self.stem, self.wide, self.narrow, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        query = self.query + self.second(torch.relu(self.first(self.query)))
        places = torch.relu(self.stem(x)).flatten(2).transpose(1, 2)
        seen = torch.softmax(query @ self.key(places).transpose(1, 2), dim=-1) @ places
        return self.head((seen + self.narrow(torch.relu(self.wide(seen)))).mean(1))


def test_layers_that_read_a_parameter_are_constant_and_no_reason_to_give_up():
    model, x = Queries().eval(), torch.randn(1, 3, 8, 8)
    graph = Graph.trace(model, (x,))
    assert not graph.opaque_reason
    assert [layer.name for layer in graph.layers] == ["stem", "key", "wide", "narrow", "head"]
    assert [block.layers for block in graph.blocks] == [("wide", "narrow")]
    assert {"first", "second"} <= {frozen.name for frozen in graph.frozen}
    with torch.no_grad():
        torch.testing.assert_close(build_student(graph, Policy())(x), model(x))
        shallow = build_student(graph, Policy(student=StudentSpec(drop=(graph.blocks[0].name,))))
        narrow = build_student(graph, Policy(prune=PruneSpec(ratios={"wide": 0.5})))
        assert shallow(x).shape == narrow(x).shape == (1, 4)
    assert not hasattr(shallow, "wide")
    assert narrow.narrow.weight.shape == (16, 12)


class Maxout(nn.Module):
    """Pools over channels: of a matrix torch takes the first axis for that of channels."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 32), nn.Linear(16, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool1d(torch.relu(self.first(x)), 16)
        return self.head(torch.relu(self.second(x)))


def test_pooling_over_channels_keeps_them_all():
    graph = Graph.trace(Maxout().eval(), (torch.randn(2, 6),))
    assert not graph.opaque_reason
    assert [group.size for group in graph.groups if group.prunable] == [12]
    policy = Policy(prune=PruneSpec(ratios={group.name: 0.5 for group in graph.groups if group.prunable}))
    assert build_student(graph, policy)(torch.randn(2, 6)).shape == (2, 5)


@pytest.mark.parametrize("pool", [nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(1), nn.MaxPool2d(4)], ids=repr)
def test_pooling_over_places_keeps_channels_free(pool):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 5)).eval()
    graph = Graph.trace(model, (torch.randn(2, 3, 6, 6),))
    assert [group.size for group in graph.groups if group.prunable] == [8]


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(x), x[:, 0] > 0


def test_answers_that_are_no_numbers_can_be_compared():
    assert not Graph.trace(Masked().eval(), (torch.randn(2, 6),)).opaque_reason


def test_a_network_whose_analysis_fails_is_taken_as_a_whole(monkeypatch):
    def fail(module):
        raise IndexError("list index out of range")

    monkeypatch.setattr("autocompress.graph.model_graph.propagate", fail)
    model, x = ByKeyword().eval(), torch.randn(1, 3, 4, 4)
    graph = Graph.trace(model, (x,))
    assert "IndexError: list index out of range" in graph.opaque_reason
    assert not graph.groups
    assert len(graph.layers) == 3
    torch.testing.assert_close(graph.module(x), model(x))
