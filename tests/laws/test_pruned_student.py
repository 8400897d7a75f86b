"""Law 1: the pruned student is the teacher with the contributions of removed channels and dropped blocks zeroed."""

import copy

import pytest
import torch
from torch import nn

from autocompress.compress.compared import compared_features
from autocompress.compress.distill import Compared, ComparedFeatures, observe
from autocompress.compress.hidden import compare_hidden
from autocompress.compress.student import build_student
from autocompress.graph import Graph
from autocompress.graph.nodes import channel_axis
from autocompress.policy import LowRankSpec, Policy, PruneSpec, StudentSpec
from autocompress.testing.reference import Unread
from laws.networks import NETWORKS, graph_of, network, random_policy


@pytest.fixture(scope="module", params=NETWORKS)
def traced(request):
    model, inputs = network(request.param)
    return model.double(), inputs.double(), graph_of(request.param, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(2))
def test_pruned_student_is_the_teacher_without_the_removed_channels(traced, seed):
    model, inputs, graph = traced
    policy = random_policy(graph, seed)
    with torch.no_grad():
        student, expected, full = build_student(graph, policy)(inputs), Unread(graph, policy).run(inputs), model(inputs)
    scale = expected.abs().max()
    assert (student - expected).abs().max() <= 1e-8 * scale
    assert (full - expected).abs().max() > 1e-3 * scale, "the policy must matter, or this test could not fail"


def test_removed_channels_are_gone(traced):
    _, _, graph = traced
    policy = random_policy(graph, 0)
    student, sizes = build_student(graph, policy), graph.sizes(policy)
    assert any(sizes[name] < group.size for name, group in {g.name: g for g in graph.groups if g.prunable}.items())
    dropped = {layer for block in graph.blocks if block.name in policy.student.drop for layer in block.layers}
    for row in graph.describe(policy):
        if row["name"] not in dropped:
            assert student.get_submodule(row["name"]).weight.shape[0] == row["channels"]
    assert not dropped & {name for name, _ in student.named_modules()}


def test_default_policy_changes_nothing(traced):
    model, inputs, graph = traced
    student = build_student(graph, Policy())
    with torch.no_grad():
        assert torch.equal(student(inputs), graph.module(inputs))
        assert torch.allclose(student(inputs), model(inputs), rtol=1e-10, atol=1e-10)
    own = {name.replace("in_proj_", "in_proj."): value for name, value in model.state_dict().items()}
    state = student.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


def test_wider_student_has_more_channels_around_the_teachers(traced):
    _, inputs, graph = traced
    policy = Policy(student=StudentSpec(width=1.5))
    student, again = build_student(graph, policy), build_student(graph, policy)
    assert {row["channels"] / row["teacher_channels"] for row in graph.describe(policy)} - {1.0}
    with torch.no_grad():
        first, second = student(inputs), again(inputs)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second), "added channels must be the same in every build"
    assert student.state_dict().keys() == graph.module.state_dict().keys()


def test_wider_student_starts_as_the_same_function(traced):
    model, inputs, graph = traced
    student = build_student(graph, Policy(student=StudentSpec(width=1.5)))
    assert sum(p.numel() for p in student.parameters()) > 1.3 * sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected, actual = model(inputs), student(inputs)
    assert torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["tiny_resnet", "mobilenet", "shufflenet", "vit", "gates", "recurrent"])
def test_input_model_stays_as_it_is(name):
    model, inputs = network(name)
    model.train()
    next(model.parameters()).requires_grad_(False)
    model.register_forward_hook(lambda *_: None)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    frees = [parameter.requires_grad for parameter in model.parameters()]
    hooks = [list(module._forward_hooks) for module in model.modules()]
    flags = [getattr(module, "inplace", None) for module in model.modules()]
    random_state = torch.get_rng_state()
    graph = Graph.trace(model, (inputs,))
    build_student(graph, random_policy(graph, 1, widths=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert frees == [parameter.requires_grad for parameter in model.parameters()]
    assert hooks == [list(module._forward_hooks) for module in model.modules()]
    assert flags == [getattr(module, "inplace", None) for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())


def test_the_graph_can_be_used_again():
    graph = graph_of("tiny_resnet")
    before = copy.deepcopy(graph.module.state_dict())
    student = build_student(graph, random_policy(graph, 3))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(9.0)
    assert all(torch.equal(value, before[key]) for key, value in graph.module.state_dict().items())


def test_the_least_important_channels_go():
    model, inputs = network("tiny_resnet")
    with torch.no_grad():
        model.layer1[0].conv1.weight[5:9] = 0
    graph = Graph.trace(model, (inputs,))
    policy = Policy(prune=PruneSpec(ratios={"layer1.0.conv1": 0.25}))
    student = build_student(graph, policy)
    assert student.get_submodule("layer1.0.conv1").weight.shape[0] == 12
    with torch.no_grad():
        model.layer1[0].conv2.weight[:, 5:9] = 0
        assert torch.allclose(student(inputs), model(inputs), atol=1e-5)


def rows_of(graph, layer, selection):
    """Rows of the teacher's weights that a layer of the student has, and which they are there."""
    node = next(node for node in graph.module.graph.nodes if node.target == layer)
    rows = graph.index(node.name, channel_axis(node, graph.module), selection)
    rows = torch.arange(len(graph.module.get_submodule(layer).weight)) if rows is None else torch.from_numpy(rows)
    return torch.arange(len(rows))[rows >= 0], rows[rows >= 0]


@pytest.mark.parametrize("seed", [1])
def test_what_is_compared_is_what_the_same_weights_read(traced, seed):
    """Columns of a layer's weights belong to the channels that it reads, whatever was pruned, added or dropped before it."""
    model, _, graph = traced
    policy = random_policy(graph, seed, widths=True)
    compared, student = compared_features(graph, policy, graph), build_student(graph, policy)
    for layer in (compared.features, *compared.hidden):
        own, teachers = student.get_submodule(layer.layer), model.get_submodule(layer.counterpart)
        if getattr(own, "groups", 1) > 1:
            continue
        mine, theirs = rows_of(graph, layer.counterpart, graph.selection(policy))
        columns = Compared("", "", shared={1: layer.shared[layer.axis]} if layer.axis in layer.shared else {})
        assert torch.equal(*columns.of(own.weight[mine], teachers.weight[theirs])), layer
    weight, (kept, _) = student.get_submodule(compared.classifier).weight, compared.features.shared.get(1, (None, None))
    rest = sorted(set(range(weight.shape[1])) - set(kept.tolist())) if kept is not None else []
    assert not weight[:, rest].any(), "what is not shared was added, and is not read at first"


@pytest.mark.parametrize("seed", [1])
def test_hidden_features_of_student_and_teacher_have_one_shape(traced, seed):
    model, inputs, graph = traced
    policy = random_policy(graph, seed, widths=True)
    compared = compared_features(graph, policy, graph)
    with torch.no_grad():
        own = observe(build_student(graph, policy), inputs, None, [layer.layer for layer in compared.hidden])
        teachers = observe(model, inputs, None, [layer.counterpart for layer in compared.hidden])
    assert len(own.hidden) == len(teachers.hidden) == len(compared.hidden)
    for layer in compared.hidden:
        mine, theirs = layer.of(own.hidden[layer.layer], teachers.hidden[layer.counterpart])
        assert mine.shape == theirs.shape, layer
    assert not compared.hidden or torch.isfinite(compare_hidden(own, teachers, compared))


def test_a_wider_student_starts_with_its_teachers_features(traced):
    model, inputs, graph = traced
    policy = Policy(student=StudentSpec(width=1.5))
    compared = compared_features(graph, policy, graph)
    with torch.no_grad():
        own = observe(build_student(graph, policy), inputs, compared.classifier, [layer.layer for layer in compared.hidden])
        teachers = observe(model, inputs, compared.classifier, [layer.counterpart for layer in compared.hidden])
    assert torch.allclose(*compared.features.of(own.features, teachers.features), rtol=1e-8, atol=1e-8)
    assert compared.hidden
    for layer in compared.hidden:
        assert torch.allclose(*layer.of(own.hidden[layer.layer], teachers.hidden[layer.counterpart]), rtol=1e-8, atol=1e-8), layer


def test_a_student_of_another_architecture_shares_no_channel(traced):
    _, _, graph = traced
    compared = compared_features(graph, Policy(student=StudentSpec(reference="torchvision:resnet18")), graph)
    assert compared == ComparedFeatures(graph.classifier)


class Tokens(nn.Module):
    """Mixes positions by a linear layer over the last axis, while channels lie along another one (as ResMLP does)."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.inner, self.head = nn.Conv1d(3, 16, 1), nn.Linear(6, 6), nn.Conv1d(16, 16, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.mix(x)
        return self.head((x + self.inner(torch.relu(x))).mean(2))


class Shared(nn.Module):
    """One layer in three blocks, before and after a stride, each with a layer of its own behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.own = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for place, own in enumerate(self.own):
            x = nn.functional.avg_pool2d(x, 2) if place == 2 else x
            x = x + own(torch.relu(self.shared(x)))
        return self.head(x.mean((2, 3)))


class Headless(nn.Module):
    """Ends in a convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.last(x + self.inner(x)).mean((2, 3))


@pytest.mark.parametrize(("net", "shape", "read"), [
    (Tokens, (2, 3, 6), {"inner"}),
    (Shared, (2, 3, 8, 8), {"own.0", "own.1"}),
    (Headless, (2, 3, 6, 6), {"last"}),
])  # fmt: skip
def test_students_of_unusual_networks_are_compared_where_that_makes_sense(net, shape, read):
    torch.manual_seed(0)
    model, inputs = net().eval(), torch.randn(shape)
    graph = Graph.trace(model, (inputs,))
    ratios = {group.name: 0.5 for group in graph.groups if group.prunable}
    policy = Policy(student=StudentSpec(drop=(graph.blocks[-1].name,), multiple=1), prune=PruneSpec(ratios=ratios))
    for chosen in (policy, policy.model_copy(update={"student": StudentSpec(multiple=1)})):
        compared = compared_features(graph, chosen, graph)
        own = observe(build_student(graph, chosen), inputs, None, [layer.layer for layer in compared.hidden])
        teachers = observe(model, inputs, None, [layer.counterpart for layer in compared.hidden])
        for layer in compared.hidden:
            mine, theirs = layer.of(own.hidden[layer.layer], teachers.hidden[layer.counterpart])
            assert mine.shape == theirs.shape, layer
        assert "shared" not in {layer.layer for layer in compared.hidden}
    assert read & {layer.layer for layer in compared.hidden} or not graph.blocks


def test_a_factorised_layer_is_compared_at_the_first_of_its_two():
    model, inputs = network("tiny_resnet")
    graph = Graph.trace(model, (inputs,))
    usual = compared_features(graph, Policy(), graph)
    policy = Policy(low_rank=LowRankSpec(kept={layer.counterpart: 0.5 for layer in usual.hidden}))
    compared, student = compared_features(graph, policy, graph), build_student(graph, policy)
    assert [layer.counterpart for layer in compared.hidden] == [layer.counterpart for layer in usual.hidden]
    assert {layer.layer for layer in compared.hidden} == {f"{name}.0" for name in graph.ranks(policy)} != set()
    assert len(observe(student, inputs, None, [layer.layer for layer in compared.hidden]).hidden) == len(compared.hidden)


class Around(nn.Module):
    """Something between two convolutions."""

    def __init__(self, between, **held):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 1), nn.Linear(16, 5)
        self.between = between
        for name, module in held.items():
            setattr(self, name, module)

    def forward(self, x):
        x = self.between(self, torch.relu(self.first(x)))
        return self.head(torch.relu(self.second(x)).mean((2, 3)))


PRUNED = {
    "gram": lambda net, x: torch.einsum("ncd,ndhw->nchw", torch.einsum("nchw,ndhw->ncd", x, x) / 64, x),
    "gate": lambda net, x: x * torch.sigmoid(torch.einsum("nchw->nhw", x))[:, None],
    "maps of all inputs": lambda net, x: (x.reshape(-1, 8, 8) - x.reshape(-1, 8, 8).mean(0)).reshape(x.shape),
    "variance": lambda net, x: x / torch.sqrt(x.var(1, keepdim=True, correction=0) + 1e-5),
}
FROZEN = {
    "sample variance": (lambda net, x: x / torch.sqrt(x.var(1, keepdim=True) + 1e-5), {}),
    "sample deviation": (lambda net, x: x / (x.std(1, keepdim=True, correction=3) + 1e-3), {}),
    "shared layer norm": (
        lambda net, x: net.norm(net.norm(x.permute(0, 2, 3, 1)) + 1.0).permute(0, 3, 1, 2),
        {"norm": nn.LayerNorm(24, elementwise_affine=False)},
    ),
    "shared group norm": (lambda net, x: net.norm(net.norm(x) + 1.0), {"norm": nn.GroupNorm(4, 24, affine=False)}),
}


@pytest.mark.parametrize("ratio", [0.5, 0.95])
@pytest.mark.parametrize("way", PRUNED)
def test_what_products_and_statistics_leave_out_is_gone(way, ratio):
    torch.manual_seed(0)
    model, inputs = Around(PRUNED[way]).double().eval(), torch.randn(3, 3, 8, 8).double()
    graph, policy = Graph.trace(model, (inputs,)), Policy(prune=PruneSpec(ratios={"first": ratio}))
    with torch.no_grad():
        found, expected = build_student(graph, policy)(inputs), Unread(graph, policy).run(inputs)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12) and not torch.allclose(found, model(inputs), rtol=1e-3)


@pytest.mark.parametrize("way", FROZEN)
def test_what_may_be_nothing_or_is_read_in_two_places_stays(way):
    between, held = FROZEN[way]
    inputs = torch.randn(3, 3, 8, 8)
    graph = Graph.trace(Around(between, **held).eval(), (inputs,))
    assert not graph.opaque_reason
    assert [group.name for group in graph.groups if group.prunable] == ["second"]
