"""What a student takes over of a relative is what both have of their teacher, entry by entry."""

import pytest
import torch

from autocompress.compress.inherit import inherit
from autocompress.compress.student import build_student
from autocompress.policy import LowRankSpec, Policy, PruneSpec, StudentSpec
from laws.networks import NETWORKS, graph_of, random_policy


def moved(state):
    """The weights of a relative that has learned something."""
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request):
    return graph_of(request.param)


def test_a_relative_that_has_learned_nothing_changes_nothing(graph):
    policy, of = random_policy(graph, 1), random_policy(graph, 11)
    student, expected = build_student(graph, policy), build_student(graph, policy).state_dict()
    share = inherit(student, graph, policy, build_student(graph, of).state_dict(), of)
    assert 0 < share <= 1
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


def test_what_is_taken_over_is_counted(graph):
    policy, of = random_policy(graph, 0), random_policy(graph, 10)
    student, before = build_student(graph, policy), build_student(graph, policy).state_dict()
    share = inherit(student, graph, policy, moved(build_student(graph, of).state_dict()), of)
    changed = {name: parameter != before[name] for name, parameter in student.named_parameters()}
    total = sum(flags.numel() for flags in changed.values())
    assert share == pytest.approx(sum(int(flags.sum()) for flags in changed.values()) / total)
    assert all(torch.equal(parameter[changed[name]], (before[name] + 1)[changed[name]]) for name, parameter in student.named_parameters())


@pytest.mark.parametrize("width", [0.5, 1.5])
def test_a_student_of_the_same_policy_takes_over_all(graph, width):
    policy = Policy(student=StudentSpec(width=width))
    trained = moved(build_student(graph, policy).state_dict())
    student = build_student(graph, policy)
    assert inherit(student, graph, policy, trained, policy) == 1.0
    assert all(torch.equal(value, trained[name]) for name, value in student.state_dict().items())


def test_a_smaller_student_is_cut_from_the_relative():
    graph = graph_of("tiny_resnet")
    inner = [group.name for group in graph.groups if group.prunable and not group.stream]
    of, policy = (Policy(prune=PruneSpec(ratios=dict.fromkeys(inner, ratio))) for ratio in (0.25, 0.5))
    student = build_student(graph, policy)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    assert inherit(student, graph, policy, moved(build_student(graph, of).state_dict()), of) == 1.0
    assert all(torch.equal(parameter, before[name] + 1) for name, parameter in student.named_parameters())


def test_added_channels_are_taken_over_in_their_order():
    graph = graph_of("tiny_resnet")
    of, policy = (Policy(student=StudentSpec(width=width)) for width in (1.5, 2.0))
    wider, student = build_student(graph, of), build_student(graph, policy)
    with torch.no_grad():
        for number, parameter in enumerate(wider.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 1e6 * (number + 1))
    share = inherit(student, graph, policy, wider.state_dict(), of)
    assert share == pytest.approx(sum(p.numel() for p in wider.parameters()) / sum(p.numel() for p in student.parameters()))
    taken = torch.cat([p[p >= 1e6].flatten() for p in student.parameters()])
    given = torch.cat([p.flatten() for p in wider.parameters()])
    assert torch.equal(taken.sort().values, given.sort().values)


def test_layers_of_low_rank_are_left_alone():
    graph = graph_of("tiny_resnet")
    name = next(layer.name for layer in graph.layers if layer.factorable)
    of, policy = (Policy(low_rank=LowRankSpec(kept={name: kept})) for kept in (0.75, 0.5))
    for one, other in ((policy, of), (policy, Policy()), (Policy(), policy), (policy, policy)):
        student, before = build_student(graph, one), build_student(graph, one).state_dict()
        assert 0 < inherit(student, graph, one, moved(build_student(graph, other).state_dict()), other) < 1
        own = {key: value for key, value in student.state_dict().items() if key.startswith(f"{name}.")}
        assert own
        assert all(torch.equal(value, before[key]) for key, value in own.items())
