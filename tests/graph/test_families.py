"""Networks of torchvision: none crashes, what can change is found, what cannot says why, and a random policy builds and runs."""

import re

import pytest
import torch
import torchvision
from laws.networks import random_policy
from torch import nn

from autocompress.compress.quantize import RoundedConv, RoundedLinear, calibrate, fake_quantize
from autocompress.compress.student import build_student
from autocompress.errors import UsageError
from autocompress.graph import Graph
from autocompress.policy import Policy, QuantSpec

SIZES = {"inception_v3": 96}
OPTIONS = {"inception_v3": {"init_weights": False}}
FOUND = {  # name: (layers, channel groups, of these prunable, droppable blocks)
    "resnet18": (21, 13, 12, 5),
    "resnet50": (54, 38, 37, 12),
    "vgg11": (10, 10, 9, 0),
    "densenet121": (121, 121, 120, 0),
    "mobilenet_v2": (53, 26, 25, 10),
    "mobilenet_v3_large": (64, 31, 30, 10),
    "efficientnet_b0": (82, 41, 40, 9),
    "shufflenet_v2_x1_0": (57, 40, 31, 0),
    "inception_v3": (95, 95, 94, 0),
    "swin_t": (53, 29, 28, 24),
}


def make(name):
    torch.manual_seed(0)
    if name.startswith("vgg"):
        model = torchvision.models.get_model(name, init_weights=False)
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(2), nn.Sequential(nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10))
    else:
        model = torchvision.models.get_model(name, num_classes=10, **OPTIONS.get(name, {}))
    size = SIZES.get(name, 64)
    return model.eval(), torch.randn(1, 3, size, size)


@pytest.fixture(scope="module", params=FOUND)
def family(request):
    model, inputs = make(request.param)
    return request.param, model, inputs, Graph.trace(model, (inputs,))


def test_what_can_change_is_found(family):
    name, model, _, graph = family
    layers = [key for key, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear)) and "aux" not in key.lower()]
    prunable = sum(group.prunable for group in graph.groups)
    found = (len(graph.layers), len(graph.groups), prunable, len(graph.blocks))
    assert not graph.opaque_reason
    assert found == FOUND[name]
    if name != "swin_t":
        assert {layer.name for layer in graph.layers} == set(layers)


def test_what_is_frozen_has_a_reason(family):
    _, _, _, graph = family
    frozen = {group.name for group in graph.groups if not group.prunable}
    assert {part.name for part in graph.frozen} == frozen
    assert all(part.reason for part in graph.frozen)
    assert any("output" in part.reason for part in graph.frozen), "the classes can never be removed"
    assert all(not group.reason for group in graph.groups if group.prunable)


def test_a_random_policy_builds_and_runs(family):
    _, model, inputs, graph = family
    policy = random_policy(graph, 1, widths=True)
    student = build_student(graph, policy)
    with torch.no_grad():
        output = student(inputs)
        assert output.shape == model(inputs).shape
        assert torch.isfinite(output).all()
        assert student(torch.randn(3, *inputs.shape[1:])).shape == (3, 10), "the batch is free"
    assert graph.workload(policy).macs < 2 * graph.workload(type(policy)()).macs


def test_inner_groups_of_bottlenecks_are_prunable_and_streams_are_marked():
    model, inputs = make("resnet50")
    groups = {group.name: group for group in Graph.trace(model, (inputs,)).groups}
    for block in ("layer1.1", "layer4.2"):
        for conv in ("conv1", "conv2"):
            group = groups[f"{block}.{conv}"]
            assert group.prunable and not group.stream
            assert group.consumers == (f"{block}.conv{int(conv[-1]) + 1}",)
    stream = next(group for group in groups.values() if "layer1.2.conv3" in group.producers)
    assert stream.stream and stream.size == 256
    assert {"layer1.0.conv3", "layer1.0.downsample.0", "layer1.1.conv3"} <= set(stream.producers)


def test_blocks_of_resnet18_are_those_with_an_identity_shortcut():
    model, inputs = make("resnet18")
    blocks = {block.name: block for block in Graph.trace(model, (inputs,)).blocks}
    assert set(blocks) == {"layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"}
    assert blocks["layer2.1"].layers == ("layer2.1.conv1", "layer2.1.conv2")


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3)) if x.sum() > 0 else self.conv(-x).mean((2, 3))


class Accumulates(nn.Module):
    """Each channel depends on those in front of it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3)

    def forward(self, x):
        return self.second(torch.logcumsumexp(self.first(x), dim=1)).mean((2, 3))


def test_control_flow_that_depends_on_the_data_takes_the_examples_path_and_says_so():
    inputs = torch.ones(1, 3, 8, 8)
    model = DataDependent().eval()
    graph = Graph.trace(model, (inputs,))
    assert not graph.opaque_reason
    assert [layer.name for layer in graph.layers] == ["conv"]
    assert "depends on the data" in graph.frozen[0].reason and "test_families.py" in graph.frozen[0].reason
    with torch.no_grad():
        assert torch.equal(graph.module(inputs), model(inputs))


def test_a_network_that_export_refuses_becomes_opaque_with_a_reason(untraceable):
    graph = Graph.trace(DataDependent(), (torch.ones(1, 3, 8, 8),))
    assert graph.opaque_reason == "torch.export cannot trace it: RuntimeError: no such operator"
    assert [layer.name for layer in graph.layers] == ["model.conv"]
    assert graph.frozen[0].reason == graph.opaque_reason


def test_an_operator_that_is_not_understood_freezes_what_it_touches():
    graph = Graph.trace(Accumulates(), (torch.ones(1, 3, 8, 8),))
    assert not graph.opaque_reason
    assert not any(group.prunable for group in graph.groups)
    assert re.fullmatch(
        r"logcumsumexp is not understood \(test_families\.py:\d+\)", next(f.reason for f in graph.frozen if f.name == "first")
    )


def test_a_model_that_does_not_run_is_a_usage_error():
    with pytest.raises(UsageError, match="does not run on its example"):
        Graph.trace(nn.Conv2d(3, 4, 3), (torch.ones(1, 5, 8, 8),))


class Attends(nn.Module):
    """Weights inside modules that are called as one operator, beside layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.act = nn.Conv2d(3, 8, 4, stride=4), nn.PReLU()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attention, self.recurrent = nn.MultiheadAttention(8, 2, batch_first=True), nn.LSTM(8, 8, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.encoder(self.act(self.embed(x)).flatten(2).transpose(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.recurrent(x)[0])).mean(1)


WHOLE = {"act": "PReLU", "recurrent": "LSTM"}
WHOLE_WHERE_OPAQUE = {**WHOLE, "encoder": "TransformerEncoderLayer", "attention": "MultiheadAttention"}
INSIDE = {
    "encoder.self_attn.in_proj",
    "encoder.self_attn.out_proj",
    "encoder.linear1",
    "encoder.linear2",
    "attention.in_proj",
    "attention.out_proj",
}


@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
def test_weights_inside_one_operator_are_no_layers_and_say_so(opaque, request):
    if opaque:
        request.getfixturevalue("untraceable")
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 16, 16)
    model = Attends().eval()
    graph = Graph.trace(model, (inputs[:1],))
    assert bool(graph.opaque_reason) is opaque
    layers = {"embed", "head"} | (set() if opaque else INSIDE)
    assert {layer.name.removeprefix("model.") for layer in graph.layers} == layers
    reasons = {part.name.removeprefix("model."): part.reason for part in graph.frozen}
    for name, kind in (WHOLE_WHERE_OPAQUE if opaque else WHOLE).items():
        pruned = "not" if kind == "LSTM" and not opaque else "neither pruned nor"
        assert reasons[name] == f"{kind} is one operator here: its weights are {pruned} quantized"
    assert "norm" not in reasons
    quantized = fake_quantize(build_student(graph, Policy()), QuantSpec(bits=8))
    calibrate(quantized, [inputs])
    rounded = {name for name, module in quantized.named_modules() if isinstance(module, (RoundedConv, RoundedLinear))}
    assert {name.removeprefix("model.").removesuffix(".layer") for name in rounded} == layers
    with torch.no_grad():
        assert (quantized(inputs) - model(inputs)).abs().max() < 0.1 * model(inputs).abs().max()


class OwnLinear(nn.Linear):
    """Computes its weights in a way of its own."""

    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x, self.weight.square())


def test_a_layer_of_which_another_is_computed_is_no_layer():
    inputs = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 6), OwnLinear(6, 5), nn.Linear(5, 3)).eval()
    graph = Graph.trace(model, (inputs[:1],))
    assert {layer.name for layer in graph.layers} == {"0", "2"}
    with torch.no_grad():
        assert torch.allclose(build_student(graph, Policy())(inputs), model(inputs), atol=1e-6)


class Weighs(nn.Module):
    """Reads a weight of a layer in another way than the layer does."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)) * self.first.weight.diagonal())


def test_a_layer_whose_weight_something_else_reads_is_no_layer():
    inputs = torch.randn(3, 4)
    model = Weighs().eval()
    graph = Graph.trace(model, (inputs[:1],))
    assert {layer.name for layer in graph.layers} == {"second"}
    with torch.no_grad():
        assert torch.equal(build_student(graph, Policy())(inputs), model(inputs))


class Loose(nn.Module):
    """Multiplies by parameters of its own, held by no layer."""

    def __init__(self):
        super().__init__()
        self.part = nn.Module()
        self.first, self.part.inner, self.head = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6, 5)), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(torch.relu(x @ self.first) @ self.part.inner))


def test_a_product_with_a_parameter_is_a_layer():
    torch.manual_seed(0)
    inputs, model = torch.randn(3, 4), Loose().eval()
    graph = Graph.trace(model, (inputs[:1],))
    assert not graph.opaque_reason
    assert {layer.name for layer in graph.layers} == {"first_linear", "part.inner_linear", "head"}
    with torch.no_grad():
        assert torch.allclose(build_student(graph, Policy())(inputs), model(inputs), atol=1e-6)
