"""Layers of low rank: two ordinary layers that stand for one."""

from __future__ import annotations

import copy

import pytest
import torch
from laws.networks import graph_of, random_policy
from torch import nn

from autocompress.compress.low_rank import leading_factors
from autocompress.compress.reconstruct import TeacherActivations, reconstruct
from autocompress.compress.student import build_student
from autocompress.graph import Graph
from autocompress.policy import LowRankSpec, Policy, PruneSpec, rank_of
from autocompress.testing.models import tiny_resnet


def of_low_rank(graph, kept=0.5):
    return Policy(low_rank=LowRankSpec(kept={layer.name: kept for layer in graph.layers if layer.factorable}))


@pytest.mark.parametrize("name", ["tiny_resnet", "mobilenet", "vgg11_bn", "vit", "swin", "shufflenet"])
@pytest.mark.parametrize("seed", range(2))
def test_it_is_the_student_whose_weights_are_the_products(name, seed):
    graph = graph_of(name, dtype=torch.float64)
    policy = random_policy(graph, seed, widths=True, low_rank=True)
    student = build_student(graph, policy)
    whole = build_student(graph, policy.model_copy(update={"low_rank": LowRankSpec()}))
    ranks = dict(graph.structure(policy).ranks)
    assert ranks
    for layer, rank in ranks.items():
        own, (first, second) = whole.get_submodule(layer), student.get_submodule(layer)
        product = second.weight.flatten(1) @ first.weight.flatten(1)
        values = torch.linalg.svdvals(own.weight.flatten(1))
        lost = (product - own.weight.flatten(1)).square().sum()
        assert float(lost.detach()) == pytest.approx(float(values[rank:].detach().square().sum()), rel=1e-6, abs=1e-9), (
            "no matrix of this rank is nearer"
        )
        assert first.weight.numel() + second.weight.numel() < own.weight.numel()
        with torch.no_grad():
            own.weight.copy_(product.view_as(own.weight))
    with torch.no_grad():
        expected, actual = whole(*graph.example), student(*graph.example)
    assert (actual - expected).abs().max() <= 1e-8 * expected.abs().max()


def test_layers_that_have_no_lower_rank_stay_whole():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.depthwise = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16)
            self.twice, self.one, self.inner = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 1, 1), nn.Linear(36, 20)
            self.tied, self.head = nn.Linear(20, 20), nn.Linear(20, 10)
            self.other = nn.Linear(20, 20)
            self.other.weight = self.tied.weight

        def forward(self, x):
            x = self.one(self.twice(self.twice(self.depthwise(self.stem(x)))))
            return self.head(self.other(self.tied(self.inner(x.flatten(1)))))

    graph = Graph.trace(Net().eval(), (torch.randn(1, 3, 10, 10),))
    assert [layer.name for layer in graph.layers if layer.factorable] == ["stem", "inner"]
    assert rank_of(36, 20, 0.01, 16) == 0, "where not even one multiple saves anything"
    policy = Policy(low_rank=LowRankSpec(kept={"inner": 0.1}))
    assert graph.ranks(policy) == {"inner": 1}
    wide = policy.model_copy(update={"student": policy.student.model_copy(update={"multiple": 16})})
    assert graph.ranks(wide) == {}
    assert graph.structure(wide).shape == graph.structure(Policy()).shape


def test_the_rank_follows_the_channels_that_pruning_leaves():
    graph = graph_of("tiny_resnet")
    name = next(layer.name for layer in graph.layers if layer.factorable and layer.group in {g.name for g in graph.groups if g.prunable})
    alone = Policy(low_rank=LowRankSpec(kept={name: 0.5}))
    group = next(layer.group for layer in graph.layers if layer.name == name)
    both = alone.model_copy(update={"prune": PruneSpec(ratios={group: 0.5})})
    assert 0 < graph.ranks(both)[name] < graph.ranks(alone)[name]


def test_no_other_product_of_this_rank_makes_more_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(12, 20, generator=generator)
    inputs = torch.randn(400, 20, generator=generator) * torch.linspace(0.05, 3.0, 20)
    inputs = inputs @ torch.linalg.qr(torch.randn(20, 20, generator=generator))[0]
    left, right = leading_factors(filters, inputs, 5, centred=False)
    wanted = inputs @ filters.T
    lost = (wanted - inputs @ (left @ right).T).square().sum()
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(wanted)[5:].square().sum()), rel=1e-4)
    u, s, vh = torch.linalg.svd(filters)
    plain = u[:, :5] * s[:5] @ vh[:5]
    assert lost < 0.8 * (wanted - inputs @ plain.T).square().sum()


def test_constant_outputs_need_no_rank_where_a_bias_makes_them():
    inputs = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * 0.1 + 5.0
    filters = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    left, right = leading_factors(filters, inputs, 2, centred=True)
    varied = (inputs - inputs.mean(0)) @ filters.T
    lost = (varied - (inputs - inputs.mean(0)) @ (left @ right).T).square().sum()
    assert float(lost) == pytest.approx(float(torch.linalg.svdvals(varied)[2:].square().sum()), rel=1e-3)


def test_reconstruction_makes_more_of_a_rank_than_the_weights_alone():
    torch.manual_seed(0)
    model, inputs = tiny_resnet().eval(), torch.randn(96, 3, 32, 32)
    with torch.no_grad():
        model.train()(inputs)
        model.eval()
        wanted = model(inputs[64:])
    graph = Graph.trace(model, (inputs[:1],))
    policy = of_low_rank(graph, 0.4)
    student = build_student(graph, policy)
    reconstructed, second_only = copy.deepcopy(student), copy.deepcopy(student)
    reconstruct(reconstructed, TeacherActivations(graph, inputs[:64]), policy)
    for node in second_only.graph.nodes:  # then nothing is known of the first layers, and the second ones are fitted as any other
        if "first_of" in node.meta:
            node.meta["first_of"] = "nothing"
    reconstruct(second_only, TeacherActivations(graph, inputs[:64]), policy)
    with torch.no_grad():
        lost = [float((net(inputs[64:]) - wanted).square().mean() / wanted.var()) for net in (student, second_only, reconstructed)]
    assert lost[2] < 0.8 * lost[0]
    assert lost[2] < lost[1]
