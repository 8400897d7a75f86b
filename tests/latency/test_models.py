"""Law 5: on a device whose costs are known, the table and the fitted model find them."""

import json

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.networks import network
from torch import nn

from autocompress.compress.quantize import calibrate, fake_quantize
from autocompress.compress.student import build_student
from autocompress.devices import open_device
from autocompress.errors import PolicyFailure
from autocompress.export import onnx_bytes
from autocompress.graph import Graph
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.latency.synthetic import build_onnx, empty_model
from autocompress.latency.table import CHECKED
from autocompress.policy import Policy, PruneSpec, QuantSpec
from autocompress.results import PredictionQuality
from autocompress.testing.devices import Costs, FakeDevice
from autocompress.testing.models import resnet20
from autocompress.workload import Operator, Workload


@pytest.fixture(scope="session")
def graph():
    torch.manual_seed(0)
    return Graph.trace(resnet20(), (torch.randn(1, 3, 32, 32),))


def policies(graph, n, seed=0):
    generator = np.random.default_rng(seed)
    names = [group.name for group in graph.groups if group.prunable]
    blocks = [block.name for block in graph.blocks]
    for _ in range(n):
        yield Policy(
            student={"drop": tuple(b for b in blocks if generator.random() < 0.4)},
            prune=PruneSpec(ratios={name: float(generator.uniform(0, 0.8)) for name in names}),
            quant=QuantSpec(layers={layer.name: int(generator.choice([8, 32])) for layer in graph.layers}),
        )


@pytest.fixture(scope="session")
def workloads(graph):
    return [graph.workload(policy) for policy in policies(graph, 60)]


def calibrated(device, workloads, path=None):
    table = OperatorTable(path)
    table.measure(device, workloads, seconds=60)
    return table


# -- the fake device --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 32])
def test_the_fake_device_takes_for_a_file_what_it_takes_for_its_workload(graph, tmp_path, bits):
    device, policy = FakeDevice(), Policy(prune=PruneSpec(ratios={"layer1.0.conv1": 0.5}), quant=QuantSpec(bits=bits))
    student = build_student(graph, policy)
    if bits == 8:
        student = fake_quantize(student, policy.quant)
        calibrate(student, [torch.randn(4, 3, 32, 32)])
    (tmp_path / "model.onnx").write_bytes(onnx_bytes(student, policy.quant, graph.example))
    (measured,) = device.measure([tmp_path / "model.onnx"])
    assert measured.low == measured.median == measured.high
    assert measured.median == pytest.approx(device.seconds_of(graph.workload(policy)), rel=0.02)


def test_the_fake_device_is_noisy_and_fails_as_scripted(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(empty_model((1, 8)))
    device = FakeDevice(noise=0.05, failures={1: PolicyFailure("scripted")})
    first = device.measure([path])[0]
    assert first.low < first.median < first.high
    with pytest.raises(PolicyFailure, match="scripted"):
        device.measure([path])
    assert device.measure([path])[0].median != first.median
    assert FakeDevice(noise=0.05).measure([path])[0] == first, "the same seed gives the same samples"
    path.write_bytes(b"broken")
    with pytest.raises(PolicyFailure, match=r"model\.onnx"):
        device.measure([path])
    assert device.measure_many([b"broken", empty_model((1, 8))])[0] is None


# -- single operators -------------------------------------------------------------------------------------------------


def test_every_operator_of_a_network_can_be_built_alone(workloads):
    operators = {operator.signature: operator for workload in workloads[:3] for operator in workload.operators}.values()
    device = FakeDevice()
    assert {operator.bits for operator in operators} == {8, 32}
    for operator in operators:
        model = onnx.load_from_string(build_onnx(operator))
        onnx.checker.check_model(model)
        assert device.seconds_of_model(model) == pytest.approx(device.costs.call + device.seconds_of_operator(operator), rel=0.05)


@pytest.mark.parametrize(
    ("source", "target", "steps"),
    [
        ((1, 8, 32, 32), (1, 8, 16, 16), [1, 1, 2, 2]),
        ((1, 8, 33, 33), (1, 8, 17, 17), [1, 1, 2, 2]),
        ((1, 197, 64), (1, 196, 64), [1, 1, 1]),
        ((1, 16, 96), (1, 16, 32), [1, 1, 1]),
        ((1, 8, 32, 32), (1, 4, 32, 31), [1, 1, 1, 1]),
    ],
    ids=["every other position", "of an odd number", "all but one token", "a third of the channels", "half of the channels"],
)
def test_a_slice_takes_what_lies_in_a_row_but_for_positions_of_a_map(source, target, steps):
    operator = Operator(name="slice", kind="slice", inputs=(source,), output=target)
    built = build_onnx(operator)
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(built), strict_mode=True).graph
    constants = {value.name: onnx.numpy_helper.to_array(value).tolist() for value in graph.initializer}
    assert next(value for name, value in constants.items() if "steps" in name) == steps
    assert_measured([operator])


@pytest.mark.parametrize("name", ["vit", "swin", "tokens"])
def test_what_attention_is_made_of_is_measured_too(name):
    model, inputs = network(name)
    operators = {o.signature: o for o in Graph.trace(model, (inputs[:1],)).workload(Policy()).operators}.values()
    kinds = {operator.kind for operator in operators}
    assert "layernorm" in kinds and kinds & {"attention", "matmul"}
    for operator in operators:
        if operator.kind in ("attention", "matmul", "softmax", "layernorm"):
            built = onnx.shape_inference.infer_shapes(onnx.load_from_string(build_onnx(operator)), check_type=True, strict_mode=True)
            onnx.checker.check_model(built)
            assert open_device("onnxruntime:cpu").measure_many([built.SerializeToString()])[0] > 0


def assert_measured(operators):
    """Each can be built alone, and the real runtime runs it."""
    distinct = [*{operator.signature: operator for operator in operators}.values()]
    models = [build_onnx(operator) for operator in distinct]
    for operator, model in zip(distinct, models, strict=True):
        assert model is not None, operator
        onnx.checker.check_model(onnx.shape_inference.infer_shapes(onnx.load_from_string(model), check_type=True, strict_mode=True))
    seconds = open_device("onnxruntime:cpu").measure_many(models, seconds_each=0.002)
    assert all(each is not None and each > 0 for each in seconds), [o for o, s in zip(distinct, seconds, strict=True) if s is None]


class Words(nn.Module):
    """An embedding, a recurrent layer, and operators that only move, resize or contract."""

    def __init__(self, kind):
        super().__init__()
        self.table, self.read = nn.Embedding(9, 12), kind(12, 20, 2, bidirectional=True)
        self.head = nn.Linear(40, 5)

    def forward(self, words):
        x = self.read(self.table(words).transpose(0, 1))[0]
        x = torch.einsum("tnc,tmc->nmc", x, x).exp() - x.amax(0)
        return self.head(F.interpolate(x.flip(1).transpose(1, 2), scale_factor=2).mean(-1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_measured_layer_by_layer(kind):
    graph = Graph.trace(Words(kind).eval(), (torch.randint(0, 9, (3, 7)),))
    operators = graph.workload(Policy()).operators
    assert {"recurrent", "einsum", "resize", "transpose", "move", "elementwise"} <= {operator.kind for operator in operators}
    (read,) = (operator for operator in operators if operator.kind == "recurrent")
    assert (read.inputs[0], read.output) == ((7, 3, 12), (7, 3, 40))
    assert read.macs == 21 * sum(p.numel() for p in kind(12, 20, 2, bidirectional=True).parameters() if p.dim() == 2)
    half = graph.workload(Policy(prune=PruneSpec(ratios={group.name: 0.5 for group in graph.groups if group.prunable})))
    (fewer,) = (operator for operator in half.operators if operator.kind == "recurrent")
    assert fewer.output == (7, 3, 20) and fewer.macs < 0.5 * read.macs
    assert_measured(operators)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("up", {"convtranspose", "groupnorm"}),
        ("spread", {"filter", "convtranspose", "transpose", "move", "elementwise"}),
        ("statistics", {"groupnorm", "elementwise"}),
        ("group_norms", {"groupnorm"}),
        ("heads", {"transpose", "attention"}),
    ],
)
def test_whatever_takes_time_is_measured(name, kinds):
    model, inputs = network(name)
    operators = Graph.trace(model, (inputs[:1],)).workload(Policy()).operators
    assert kinds <= {operator.kind for operator in operators}
    assert_measured(operators)


POOLS = {
    "MaxPool2d": (nn.MaxPool2d(3, 2, 1), "MaxPool"),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, padding=1), "MaxPool"),
    "ceil": (lambda x: F.max_pool2d(x, 2, ceil_mode=True), "MaxPool"),
    "AdaptiveMaxPool2d": (nn.AdaptiveMaxPool2d(4), "MaxPool"),
    "AvgPool2d": (nn.AvgPool2d(2), "AveragePool"),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (3, 3), stride=2), "AveragePool"),
    "of the whole map": (lambda x: F.avg_pool2d(x, x.size(3)), "AveragePool"),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d(4), "AveragePool"),
    "mean": (lambda x: x.mean((2, 3), keepdim=True), "ReduceMean"),
}
KERNELS = {
    "MaxPool2d": (3, 3),
    "max_pool2d": (3, 3),
    "ceil": (2, 2),
    "AvgPool2d": (2, 2),
    "avg_pool2d": (3, 3),
    "of the whole map": (11, 11),
}


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("name", POOLS)
def test_a_pool_is_measured_as_what_it_is(name, bits):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), POOLS[name][0]

        def forward(self, x):
            return self.second(self.pool(self.first(x))).flatten(1)

    workload = Graph.trace(Pooled(), (torch.randn(1, 3, 13, 13),)).workload(Policy(quant=QuantSpec(bits=bits)))
    pool = workload.operators[1]
    assert pool.bits == bits
    assert pool.kernel == KERNELS.get(name, ())
    model = onnx.load_from_string(build_onnx(pool))
    assert POOLS[name][1] in {node.op_type for node in model.graph.node}
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)  # raises unless the pool's output has its shape


# -- the table --------------------------------------------------------------------------------------------------------


def test_measured_operators_are_looked_up_and_others_interpolated(workloads):
    device = FakeDevice()
    table = calibrated(device, workloads[:8])
    assert table.call_overhead == pytest.approx(device.costs.call, rel=0.1)
    seen = {operator.signature for workload in workloads[:8] for operator in workload.operators}
    assert len(table) == len(seen)
    for workload in workloads[:8]:
        for operator in workload.operators:
            assert table.lookup(operator) == table.estimate(operator)
            assert table.estimate(operator) == pytest.approx(device.seconds_of_operator(operator), rel=0.05)
    new = [operator for workload in workloads[8:] for operator in workload.operators if operator.signature not in seen]
    assert new
    assert all(table.lookup(operator) is None for operator in new)
    errors = [abs(table.estimate(operator) / device.seconds_of_operator(operator) - 1) for operator in new]
    assert np.median(errors) < 0.1
    assert np.quantile(errors, 0.95) < 0.4


def test_the_table_survives_on_disk(workloads, tmp_path):
    path = tmp_path / "latency" / "table.json"
    table = calibrated(FakeDevice(), workloads[:3], path)
    again = OperatorTable(path)
    assert len(again) == len(table) > 0
    assert again.call_overhead == table.call_overhead
    for workload in workloads[:6]:
        for operator in workload.operators:
            assert again.estimate(operator) == pytest.approx(table.estimate(operator))
    assert again.measure(FakeDevice(), workloads[:3], seconds=60) == 0, "nothing is measured twice"


@pytest.mark.parametrize(("slower", "is_kept"), [(1.02, True), (1.3, False), (0.7, False)])
def test_a_table_of_another_machine_of_the_same_name_is_forgotten(workloads, tmp_path, slower, is_kept):
    """Seen on virtual machines: predictions were 16 % off, and the most accurate networks within the budget were ruled out unseen."""
    path, usual = tmp_path / "table.json", Costs()
    before = calibrated(FakeDevice(usual), workloads[:3], path)
    asked = []

    class Other(FakeDevice):
        def measure_many(self, models, *, seconds_each=0.02):
            asked.extend(models)
            return super().measure_many(models, seconds_each=seconds_each)

    other = Other(Costs(**{name: slower * value for name, value in usual.model_dump().items()}))
    again = OperatorTable(path)
    measured = again.measure(other, workloads[:3], seconds=60)
    operators = [operator for workload in workloads[:3] for operator in workload.operators if before.lookup(operator)]
    ratios = [again.lookup(operator) / before.lookup(operator) for operator in operators]
    assert np.median(ratios) == pytest.approx(1.0 if is_kept else slower, rel=0.02)
    assert (measured == 0) is is_kept
    assert is_kept is (len(asked) <= CHECKED)


def test_a_table_that_cannot_be_kept_is_measured_all_the_same(workloads, tmp_path):
    (tmp_path / "file").write_text("")
    table = calibrated(FakeDevice(), workloads[:1], tmp_path / "file" / "latency" / "table.json")
    assert len(table) > 0
    (tmp_path / "folder.json").mkdir()
    assert len(calibrated(FakeDevice(), workloads[:1], tmp_path / "folder.json")) > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 1}', '{"call_overhead_s": 1, "entries": [{"operator": {}, "seconds": 1}]}'])
def test_a_damaged_table_is_measured_again(workloads, tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    table = OperatorTable(path)
    assert len(table) == 0 and table.call_overhead == 0.0
    assert table.measure(FakeDevice(), workloads[:1], seconds=60) > 0
    assert json.loads(path.read_text())["entries"]


def test_operators_that_do_not_run_are_left_to_interpolation(workloads):
    class Refuses(FakeDevice):
        def measure_many(self, models, *, seconds_each=0.02):
            times = super().measure_many(models, seconds_each=seconds_each)
            return [None if index % 2 else seconds for index, seconds in enumerate(times)]

    table = calibrated(Refuses(), workloads[:8])
    wanted = {operator.signature: operator for workload in workloads[:8] for operator in workload.operators}
    missing = [operator for operator in wanted.values() if table.lookup(operator) is None]
    assert missing
    assert all(table.estimate(operator) > 0 for operator in missing)


def test_an_operator_that_brings_the_runtime_down_costs_only_itself(workloads):
    fatal = build_onnx(max((o for o in workloads[0].operators if o.kind == "conv"), key=lambda o: o.macs))

    class Crashes(FakeDevice):
        def measure_many(self, models, *, seconds_each=0.02):
            if fatal in models:
                raise PolicyFailure("the runtime crashed with SIGSEGV")
            return super().measure_many(models, seconds_each=seconds_each)

    sound, table = calibrated(FakeDevice(), workloads[:1]), calibrated(Crashes(), workloads[:1])
    lost = {o.signature for o in workloads[0].operators if sound.lookup(o) is not None and table.lookup(o) is None}
    assert len(lost) == 1


def test_tables_of_other_devices_are_other_files(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = FakeDevice()
    other.name = "other"
    paths = {OperatorTable.for_device(device)._path for device in (FakeDevice(), FakeDevice(), other)}
    assert len(paths) == 2
    assert all(path.is_relative_to(tmp_path) for path in paths)


def test_an_empty_table_estimates_something_positive(workloads):
    assert OperatorTable().estimate(workloads[0].operators[0]) > 0


# -- whole networks ---------------------------------------------------------------------------------------------------


def test_a_device_that_is_the_sum_of_its_operators_is_recovered_exactly(workloads):
    device = FakeDevice()
    model = FittedLatencyModel(calibrated(device, workloads))
    for workload in workloads:
        assert model.predict(workload).value == pytest.approx(device.seconds_of(workload), rel=0.02)
    model.fit([(workload, device.seconds_of(workload)) for workload in workloads[:20]])
    for workload in workloads[20:]:
        prediction = model.predict(workload)
        assert prediction.value == pytest.approx(device.seconds_of(workload), rel=0.02)
        assert prediction.low <= device.seconds_of(workload) <= prediction.high
    assert model.held_out_error().median_error < 0.02
    assert model.held_out_error().spearman > 0.99


def test_fitting_finds_what_single_operators_do_not_show(workloads):
    """Inside a network this device computes int8 at half, float32 at double the cost of single operators."""
    alone, whole = FakeDevice(), FakeDevice(Costs(mac=2e-10, mac_int8=0.2e-10, node=2e-6))
    table = calibrated(alone, workloads)
    model = FittedLatencyModel(table)

    def error(pairs):
        return float(np.median([abs(model.predict(w).value / s - 1) for w, s in pairs]))

    pairs = [(workload, whole.seconds_of(workload)) for workload in workloads]
    before = error(pairs[40:])
    errors = []
    for n in (5, 40):
        model.fit(pairs[:n])
        errors.append(error(pairs[40:]))
    assert before > 0.2
    assert errors[1] < 0.02
    assert errors[1] <= errors[0] < before


@pytest.mark.parametrize("noise", [0.03, 0.1, 0.4])
def test_the_interval_covers_what_it_has_not_seen_at_the_stated_rate(workloads, noise):
    device, generator = FakeDevice(), np.random.default_rng(1)
    table = calibrated(device, workloads)
    covered = []
    for _ in range(12):
        pairs = [(w, device.seconds_of(w) * float(np.exp(noise * generator.standard_normal()))) for w in workloads]
        order = generator.permutation(len(pairs))
        model = FittedLatencyModel(table)
        model.fit([pairs[i] for i in order[:30]])
        for index in order[30:]:
            prediction = model.predict(pairs[index][0])
            covered.append(prediction.low <= pairs[index][1] <= prediction.high)
    assert 0.84 <= np.mean(covered) <= 0.97, "90 % are stated"


def test_an_error_is_one_of_the_whole_latency(workloads):
    """Of networks that hardly take longer than a call, what is beside the call is nearly nothing."""
    device = FakeDevice(Costs(call=1.0))
    model = FittedLatencyModel(calibrated(device, workloads[:10]))
    model.fit([(workload, (1 + 0.01 * (-1) ** i) * device.seconds_of(workload)) for i, workload in enumerate(workloads[:10])])
    assert model.held_out_error().median_error < 0.03


def test_too_few_points_change_nothing(workloads):
    model = FittedLatencyModel(calibrated(FakeDevice(), workloads[:3]))
    before = model.predict(workloads[0])
    model.fit([(workloads[0], 1.0), (workloads[1], 2.0)])
    assert model.predict(workloads[0]) == before
    assert model.held_out_error() == PredictionQuality(n=0, median_error=None, spearman=None)
    assert before.low < before.value < before.high


def test_the_explanation_adds_up_to_the_prediction(workloads):
    device = FakeDevice()
    model = FittedLatencyModel(calibrated(device, workloads[:10]))
    model.fit([(workload, 1.3 * device.seconds_of(workload)) for workload in workloads[:10]])
    for workload in workloads[:5]:
        rows = model.seconds_by_operator(workload)
        assert [name for name, _ in rows] == [operator.name for operator in workload.operators]
        assert model.table.call_overhead + sum(s for _, s in rows) == pytest.approx(model.predict(workload).value)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_operators_never_seen_are_predicted_finite_and_positive(channels):
    operators = tuple(
        Operator(name=str(i), kind="conv", inputs=((1, c, 8, 8),), output=(1, c, 8, 8), kernel=(3, 3), stride=(1, 1), padding=(1, 1))
        for i, c in enumerate(channels)
    )
    prediction = FittedLatencyModel(OperatorTable()).predict(Workload(operators=operators, weight_bytes=0))
    assert 0 < prediction.low < prediction.value < prediction.high < 1


def test_many_at_once_are_predicted_as_one_by_one(graph, workloads):
    many = [*policies(graph, 12, seed=3)]
    model = FittedLatencyModel(calibrated(FakeDevice(), workloads))
    model.fit([(workload, 1e-3 * (1 + workload.macs / 1e7)) for workload in workloads[:20]])
    assert model.values(graph.workloads(graph.population(many))) == pytest.approx([model.predict(graph.workload(p)).value for p in many])


def mixed(graph, n):
    """Policies whose bits change from layer to layer, so that values pass from int8 to float32 and back."""
    names = [layer.name for layer in graph.layers]
    generator = np.random.default_rng(5)
    return [Policy(quant=QuantSpec(bits=8, layers={name: int(generator.choice([8, 32])) for name in names})) for _ in range(n)]


def test_what_passes_from_int8_to_float_and_back_takes_time(graph, workloads):
    """Seen on mixed networks: the slower beside their operators, the more values pass."""
    device, each = FakeDevice(), 1.5e-9
    many = [graph.workload(policy) for policy in mixed(graph, 40)]
    assert all(sum(workload.converted) > 0 for workload in many)
    assert not any(graph.workload(Policy()).converted)
    pairs = [(workload, device.seconds_of(workload) + each * sum(workload.converted)) for workload in many]
    model = FittedLatencyModel(calibrated(device, workloads + many))
    before = [abs(model.predict(workload).value / seconds - 1) for workload, seconds in pairs]
    model.fit(pairs[:12])
    after = [abs(model.predict(workload).value / seconds - 1) for workload, seconds in pairs[12:]]
    assert np.median(before) > 0.05 > 0.02 > np.median(after)


def test_what_passes_is_counted_for_many_as_for_one(graph):
    many = [*mixed(graph, 6), *policies(graph, 12, seed=4)]
    assert graph.workloads(graph.population(many)).converted().tolist() == [sum(graph.workload(policy).converted) for policy in many]


def test_a_runtime_that_cannot_run_the_empty_network_ends_nothing(workloads):
    class Starved(FakeDevice):
        def measure_many(self, models, *, seconds_each=0.02):
            raise PolicyFailure("the runtime crashed with SIGKILL")

    assert calibrated(Starved(), workloads[:1]).call_overhead == 0.0
