"""Which channels stay, by each criterion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from autocompress.compress.student import build_student
from autocompress.graph import Graph
from autocompress.policy import Policy, PruneSpec, StudentSpec

EXAMPLE = torch.zeros(1, 3, 8, 8)


class Plain(nn.Module):
    """One group that one layer makes, with a batch norm behind it."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 5, 3)
        nn.init.uniform_(self.norm.weight, -2.0, 2.0)
        nn.init.uniform_(self.norm.running_var, 0.5, 4.0)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3))


class Halves(nn.Module):
    """Two halves of one layer, computed on apart: which of them a channel belongs to decides how much is computed of each."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 5, 3)

    def forward(self, x):
        a, b = self.first(x).chunk(2, 1)
        return self.second(torch.cat([torch.relu(a), torch.sigmoid(b)], 1)).mean((2, 3))


@torch.no_grad()
def reference(model, criterion):
    """Slowly, filter by filter."""
    gain = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    filters = [(weight * g).double().flatten() for weight, g in zip(model.first.weight, gain, strict=True)]
    return {
        "l2": [float(f.square().sum().sqrt()) for f in filters],
        "l1": [float(f.abs().sum()) for f in filters],
        "median": [sum(float((f - other).norm()) for other in filters) for f in filters],
        "scale": model.norm.weight.abs().tolist(),
    }[criterion]


@pytest.mark.parametrize("criterion", ["l2", "l1", "median", "scale"])
@pytest.mark.parametrize("narrower", ["pruned", "width"])
def test_the_channels_that_stay_are_those_of_the_criterion(criterion, narrower):
    torch.manual_seed(1)
    model = Plain().eval()
    graph = Graph.trace(model, (EXAMPLE,))
    student, ratios = (StudentSpec(widths={"first": 0.5}), {}) if narrower == "width" else (StudentSpec(), {"first": 0.5})
    policy = Policy(student=student, prune=PruneSpec(ratios=ratios, criterion=criterion))
    kept = np.sort(np.argsort(reference(model, criterion))[-8:])
    assert torch.equal(build_student(graph, policy).get_submodule("first").weight, model.first.weight[torch.from_numpy(kept)])


def test_criteria_tell_networks_apart_only_where_channels_go():
    graph = Graph.trace(Plain().eval(), (EXAMPLE,))
    pruned, whole = ([Policy(prune=PruneSpec(ratios=r, criterion=c)) for c in ("l2", "median")] for r in ({"first": 0.5}, {}))
    assert len({graph.structure(policy) for policy in pruned}) == 2
    assert len({graph.structure(policy).shape for policy in pruned}) == len({graph.structure(policy).timed for policy in pruned}) == 1
    assert len({graph.structure(policy) for policy in whole}) == 1
    assert "pruned by 50 % on average by median" in pruned[1].in_words()


def test_where_channels_are_not_alike_the_usual_criterion_decides():
    torch.manual_seed(2)
    graph = Graph.trace(Halves().eval(), (EXAMPLE,))
    (group,) = [group for group in graph.groups if group.prunable]
    policies = [Policy(prune=PruneSpec(ratios={group.name: 0.5}, criterion=c)) for c in ("l2", "l1", "median", "scale")]
    for policy in policies:
        found, predicted = Graph.trace(build_student(graph, policy), (EXAMPLE,)).workload(Policy()), graph.workload(policy)
        assert [operator.signature for operator in found.operators] == [operator.signature for operator in predicted.operators]
        assert found.weight_bytes == predicted.weight_bytes
    assert len({graph.structure(policy) for policy in policies}) == 1, "they are one network"


def test_vocabularies_are_not_compared_word_by_word(monkeypatch):
    monkeypatch.setattr("autocompress.graph.importance.MOST_COMPARED", 4)
    graph = Graph.trace(Plain().eval(), (EXAMPLE,))
    policies = [Policy(prune=PruneSpec(ratios={"first": 0.5}, criterion=criterion)) for criterion in ("l2", "median")]
    chosen = [build_student(graph, policy) for policy in policies]
    assert torch.equal(*(student.get_submodule("first").weight for student in chosen))
