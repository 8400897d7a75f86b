"""Law 2: a policy's workload, known by arithmetic, is the workload of its student; its bytes are those of the file."""

import math

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from autocompress.compress.quantize import calibrate, fake_quantize
from autocompress.compress.student import build_student
from autocompress.errors import UsageError
from autocompress.export import onnx_bytes
from autocompress.graph import Graph
from autocompress.policy import LowRankSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from laws.networks import NETWORKS, graph_of, random_policy

HEADER = 1_000
PER_NODE = 400
"""Names, attributes and shapes: bytes of the file that are not weights."""


@pytest.fixture(scope="module", params=NETWORKS)
def graph(request):
    return graph_of(request.param)


@pytest.mark.parametrize(("seed", "multiple", "low_rank"), [(0, 1, False), (1, 8, True)])
def test_workload_is_that_of_the_traced_student(graph, seed, multiple, low_rank):
    policy = random_policy(graph, seed, widths=True, multiple=multiple, low_rank=low_rank)
    predicted = graph.workload(policy)
    again = Graph.trace(build_student(graph, policy), graph.example)
    assert not again.opaque_reason
    actual = again.workload(Policy())
    signatures = [[operator.signature for operator in workload.operators] for workload in (predicted, actual)]
    assert signatures[0] == signatures[1], "everything but the names of functional operators"
    assert (predicted.macs, predicted.params, predicted.weight_bytes) == (actual.macs, actual.params, actual.weight_bytes)
    untouched = graph.workload(Policy())
    assert (predicted.macs, predicted.weight_bytes) != (untouched.macs, untouched.weight_bytes)


def test_many_workloads_at_once_are_those_of_each_policy(graph):
    policies = [random_policy(graph, s, widths=s % 2 == 0, bits=(8, 32), multiple=8, low_rank=s % 3 == 0) for s in range(12)]
    policies += [policy.model_copy(update={"quant": QuantSpec(bits=8)}) for policy in policies[:4]] + [Policy()]
    for grown in (True, False):
        together = graph.workloads(graph.population(policies, grown=grown))
        alone = [graph.workload(policy, grown=grown) for policy in policies]
        assert list(together) == alone
        macs, params = together.total([lambda operator: operator.macs, lambda operator: operator.params])
        assert macs.tolist() == [workload.macs for workload in alone]
        assert params.tolist() == [workload.params for workload in alone]


def test_dimensions_with_too_many_combinations_are_numbered_all_the_same(graph, monkeypatch):
    policies = [random_policy(graph, seed, widths=True, bits=(8, 32), low_rank=True) for seed in range(6)]
    before = list(graph.workloads(graph.population(policies)))
    monkeypatch.setattr("autocompress.graph.workloads.MOST_CODES", 2)
    assert list(graph.workloads(graph.population(policies))) == before


def test_params_and_macs_are_those_of_the_modules(graph):
    policy = random_policy(graph, 1)
    student = build_student(graph, policy)
    macs = 0

    def count(module, inputs, output):
        nonlocal macs
        macs += output.numel() * math.prod(module.weight.shape[1:])

    layers = [module for module in student.modules() if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear))]
    for layer in layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        student(*graph.example)
    workload = graph.workload(policy)
    assert sum(operator.macs for operator in workload.operators if operator.kind in ("conv", "linear")) == macs
    weights = sum(layer.weight.numel() for layer in layers)
    assert weights <= workload.params <= sum(p.numel() for p in student.parameters()) + weights // 10


def test_channels_are_rounded_to_the_multiple(graph):
    policy = random_policy(graph, 2, widths=True, multiple=8)
    for name, size in graph.sizes(policy).items():
        group = next(group for group in graph.groups if group.name == name)
        multiple = min(8 // math.gcd(8, group.unit), group.size)
        assert size == group.size or size % multiple == 0


def file_bytes(graph: Graph, policy: Policy) -> bytes:
    student = build_student(graph, policy)
    if any(policy.quant.of(layer.name) < 32 for layer in graph.layers):
        student = fake_quantize(student, policy.quant)
        calibrate(student, [graph.example[0]])
    return onnx_bytes(student, policy.quant, graph.example)


@pytest.mark.parametrize(
    ("name", "bits"), [("tiny_resnet", (32,)), ("tiny_resnet", (8,)), ("resnet20", (4, 8, 16, 32)), ("mobilenet", (8,))], ids=str
)
def test_predicted_bytes_are_those_of_the_file(name, bits):
    graph = graph_of(name)
    policy = random_policy(graph, 5, bits=bits, low_rank=True)
    payload = file_bytes(graph, policy)
    model = onnx.load_from_string(payload)
    predicted = graph.workload(policy).weight_bytes
    tensors = sum(len(t.raw_data) or numpy_helper.to_array(t).nbytes for t in model.graph.initializer)
    assert predicted <= tensors <= predicted + 16 * len(model.graph.node), "the rest: scales of activations and shapes"
    assert tensors <= len(payload) <= tensors + HEADER + PER_NODE * len(model.graph.node)


def test_fewer_bits_take_fewer_bytes(graph):
    sizes = [graph.workload(Policy(quant=QuantSpec(bits=bits))).weight_bytes for bits in (32, 16, 8, 4)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_shared_layers_and_loose_tensors_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))
            self.register_buffer("window", torch.rand(8, 8))

        def forward(self, x):
            return self.conv(self.conv(x * self.window) + self.offset).mean((2, 3))

    graph = Graph.trace(Tied().eval(), (torch.randn(1, 4, 8, 8),))
    assert graph.workload(Policy()).weight_bytes == 4 * (4 * 4 * 9 + 4 + 64)


def test_names_that_are_not_there_are_refused():
    graph = graph_of("tiny_resnet")
    for policy in (
        Policy(student=StudentSpec(drop=("layer9",))),
        Policy(student=StudentSpec(widths={"layer9": 0.5})),
        Policy(prune=PruneSpec(ratios={"linear": 0.5})),
        Policy(quant=QuantSpec(layers={"layer9": 8})),
        Policy(low_rank=LowRankSpec(kept={"layer9": 0.5})),
        Policy(low_rank=LowRankSpec(kept={"linear": 0.5})),
    ):
        with pytest.raises(UsageError, match=r"layer9|linear"):
            build_student(graph, policy)


@pytest.mark.parametrize("rows", [2, 400])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_weights_of_a_layer_that_reads_no_input_are_counted_as_they_are_in_the_file(rows, bits):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.place, self.head = nn.Conv2d(3, 64, 3), nn.Linear(rows, 64), nn.Linear(64, 10)
            self.register_buffer("grid", torch.rand(1, rows))

        def forward(self, x):
            return self.head(torch.relu(self.stem(x)).mean((2, 3)) + self.place(self.grid.expand(x.shape[0], rows)))

    graph, policy = Graph.trace(Positions().eval(), (torch.randn(1, 3, 8, 8),)), Policy(quant=QuantSpec(bits=bits))
    assert {layer.name for layer in graph.layers} == {"stem", "head"}
    assert "place" in {part.name for part in graph.frozen if "reads no input" in part.reason}
    payload, predicted = file_bytes(graph, policy), graph.workload(policy).weight_bytes
    nodes = len(onnx.load_from_string(payload).graph.node)
    assert predicted - 4 * 64 * (rows + 1) * (rows == 2) <= len(payload) <= predicted + 4 * rows + HEADER + PER_NODE * nodes
