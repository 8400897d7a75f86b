"""Law 10: the exported file computes what the student computes, in the arithmetic that its bits promise."""

import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from autocompress.compress.quantize import calibrate, fake_quantize, snap_biases
from autocompress.compress.student import build_student
from autocompress.devices import DeviceProfile, processor
from autocompress.errors import PolicyFailure
from autocompress.export import Provenance, check_parity, compare, load_student, onnx_bytes, require_parity, write_bundle
from autocompress.graph import Graph
from autocompress.policy import Policy, PruneSpec, QuantSpec
from autocompress.search_space import for_device
from laws.networks import graph_of, network, random_policy, with_statistics

SATURATES = processor.int8_saturates(processor.flags())
"""Whether this machine's kernels are exact for int8 weights of 7 bits only."""
HERE = DeviceProfile(runtime="onnxruntime", channel_multiple=1, reduced_range=SATURATES)


def exported(graph, inputs, policy, *, settle=True):
    """(student, file) of the policy as this machine can run it."""
    policy = for_device(policy, HERE)
    student = build_student(graph, policy)
    if any(policy.quant.of(layer.name) < 32 for layer in graph.layers):
        student = fake_quantize(student, policy.quant)
        calibrate(student, inputs.split(16))
        student = snap_biases(student) if settle else student
    return student, onnx_bytes(student, policy.quant, graph.example)


def run(payload, inputs, *, optimised=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    session = onnxruntime.InferenceSession(payload, options, providers=["CPUExecutionProvider"])
    (own,) = session.get_inputs()
    return torch.from_numpy(np.concatenate([session.run(None, {own.name: x.numpy()})[0] for x in inputs.split(own.shape[0])]))


def answers(student, inputs):
    with torch.no_grad():
        return student(inputs)


def agreed(graph, inputs, policy, student, payload):
    """How student and file differ. Raises PolicyFailure where the product refuses the file."""
    return check_parity(answers(student, inputs), run(payload, inputs), policy.quant, [layer.name for layer in graph.layers])


def count(payload, *kinds):
    return sum(node.op_type in kinds for node in onnx.load_from_string(payload).graph.node)


def images(name, n=32, batch=1):
    """(graph of a network, inputs of it)."""
    graph = graph_of(name, batch)
    torch.manual_seed(0)
    return graph, torch.randn(n, *graph.example[0].shape[1:])


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("tiny_resnet", 1),
        ("tiny_resnet", 8),
        ("mobilenet", 8),
        ("vgg11_bn", 1),
        ("efficientnet", 1),
        ("resnext", 1),
        ("group_norms", 1),
        ("shufflenet", 8),
        ("convnext", 1),
        ("vit", 8),
        ("swin", 8),
        ("windows", 1),
        ("up", 1),
        ("recurrent", 1),
    ],
)
def test_float_file_equals_the_student(name, batch):
    graph, inputs = images(name, 8, batch)
    policy = random_policy(graph, 0, widths=True)
    student, payload = exported(graph, inputs, policy)
    parity = agreed(graph, inputs, policy, student, payload)
    assert parity.relative <= 1e-4
    assert count(payload, "QuantizeLinear", "DequantizeLinear") == 0


@pytest.mark.parametrize("reduced_range", [False, True])
@pytest.mark.parametrize("name", ["tiny_resnet", "resnet20"])
def test_int8_file_decides_as_the_student(name, reduced_range):
    if SATURATES and not reduced_range:
        pytest.skip("this processor adds int8 products in 16 bits")
    graph, inputs = images(name)
    student, payload = exported(graph, inputs, Policy(quant=QuantSpec(bits=8, reduced_range=reduced_range)))
    expected = answers(student, inputs)
    parity = compare(expected, run(payload, inputs))
    require_parity(parity, {8})
    assert parity.undecided < 0.2 * len(inputs), "random weights decide some images by less than int8 can tell"
    quantizers = [node for node in student.graph.nodes if node.meta.get("quantizer") == node.target]
    assert count(payload, "QuantizeLinear") == len(quantizers) > 0
    weights = [t for t in onnx.load_from_string(payload).graph.initializer if t.data_type == onnx.TensorProto.INT8]
    largest = max(int(np.abs(onnx.numpy_helper.to_array(t)).max()) for t in weights)
    assert largest == (64 if reduced_range else 127)


def test_snapped_biases_leave_only_the_rounding_of_floats():
    """Most outputs are then equal to the last bit but those of float; rounded at export only, hardly any is."""
    graph, inputs = images("tiny_resnet", 64)
    equal = []
    for settle in (False, True):
        student, payload = exported(graph, inputs, Policy(quant=QuantSpec(bits=8)), settle=settle)
        expected = answers(student, inputs)
        differences = (run(payload, inputs) - expected).abs().amax(1) / (expected.max() - expected.min())
        assert differences.mean() <= 0.01, "even so the difference stays below what int8 can tell apart"
        equal.append(float((differences <= 1e-5).float().mean()))
    assert equal[1] >= 0.8
    assert equal[0] <= 0.6


@pytest.mark.parametrize("name", ["tiny_resnet", "mobilenet"])
def test_every_int8_convolution_has_an_int8_kernel(name, tmp_path):
    graph, inputs = images(name, 16)
    _, payload = exported(graph, inputs, Policy(quant=QuantSpec(bits=8)))
    run(payload, inputs[:1], optimised=tmp_path / "optimised.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") == count(payload, "Conv") > 0
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & set(kinds)


@pytest.mark.parametrize(
    ("name", "bits", "low_rank"),
    [
        ("tiny_resnet", (8, 32), True),
        ("tiny_resnet", (2, 3, 4, 5, 6, 7, 8, 16, 32), False),
        ("resnet20", (4, 8), True),
        ("vit", (8, 32), True),
        ("swin", (4, 8), False),
        ("convnext", (8,), False),
        ("resnext", (8, 32), False),
    ],
    ids=str,
)
def test_mixed_bits(name, bits, low_rank):
    graph, inputs = images(name)
    policy = random_policy(graph, 3, bits=bits, low_rank=low_rank)
    student, payload = exported(graph, inputs, policy)
    agreed(graph, inputs, policy, student, payload)


def test_storage_bits_pack_smaller_and_compute_the_same():
    graph, inputs = images("tiny_resnet")
    sizes = []
    for bits in (32, 16, 4):
        policy = Policy(quant=QuantSpec(bits=bits))
        student, payload = exported(graph, inputs, policy)
        assert agreed(graph, inputs, policy, student, payload).relative <= 2e-3
        sizes.append(len(payload))
    assert sizes[1] < 0.62 * sizes[0]
    assert sizes[2] < 0.40 * sizes[0]


def test_export_does_not_change_the_student():
    graph, inputs = images("tiny_resnet", 8)
    student, _ = exported(graph, inputs, Policy(quant=QuantSpec(bits=8)))
    before = {key: value.clone() for key, value in student.state_dict().items()}
    onnx_bytes(student, QuantSpec(bits=8), (inputs[:1],))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    assert any(isinstance(module, nn.BatchNorm2d) for module in student.modules())


def test_file_runs_without_torch(tmp_path):
    graph, inputs = images("tiny_resnet", 8)
    student, payload = exported(graph, inputs, Policy(quant=QuantSpec(bits=8)))
    (tmp_path / "model.onnx").write_bytes(payload)
    np.save(tmp_path / "x.npy", inputs[:1].numpy())
    script = """
        import sys
        import numpy, onnxruntime
        session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
        numpy.save("y.npy", session.run(None, {session.get_inputs()[0].name: numpy.load("x.npy")})[0])
        assert "torch" not in sys.modules
        assert "autocompress" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(script)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert compare(answers(student, inputs[:1]), torch.from_numpy(np.load(tmp_path / "y.npy"))).differing == 0


class SharedLayer(nn.Module):
    """One convolution that is called twice."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(self.conv(torch.relu(self.conv(x))).mean((2, 3)))


def test_shared_layer_in_int8():
    inputs = torch.randn(32, 3, 8, 8)
    student, payload = exported(Graph.trace(SharedLayer().eval(), (inputs[:1],)), inputs, Policy(quant=QuantSpec(bits=8)), settle=False)
    expected = answers(student, inputs)
    assert (run(payload, inputs) - expected).abs().max() <= 0.05 * (expected.max() - expected.min())


class SharedGate(nn.Module):
    """A linear layer with large biases, called on inputs of other sizes, as the channel gates of CBAM are."""

    def __init__(self):
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 8), nn.Linear(8, 10)
        nn.init.uniform_(self.gate.bias, 2.0, 4.0)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        mean = x.mean((2, 3))
        return self.head(torch.relu(self.gate(mean)) + torch.relu(self.gate(8.0 * mean)))


def test_a_shared_layer_adds_its_bias_in_the_unit_of_each_call():
    torch.manual_seed(0)
    inputs = torch.randn(64, 3, 8, 8)
    student, payload = exported(Graph.trace(SharedGate().eval(), (inputs[:1],)), inputs, Policy(quant=QuantSpec(bits=8)), settle=False)
    expected = answers(student, inputs)
    assert (run(payload, inputs) - expected).abs().max() <= 0.02 * (expected.max() - expected.min())


class Positions(nn.Module):
    """A layer that reads no input, as the positions of ConViT do."""

    def __init__(self):
        super().__init__()
        self.stem, self.place, self.head = nn.Conv2d(3, 8, 3), nn.Linear(2, 8), nn.Linear(8, 10)
        self.register_buffer("grid", torch.rand(1, 2))

    def forward(self, x):
        return self.head(torch.relu(self.stem(x)).mean((2, 3)) + self.place(self.grid.expand(x.shape[0], 2)))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_layer_that_reads_no_input_is_a_constant_in_the_file(bits):
    torch.manual_seed(0)
    inputs, model = torch.randn(32, 3, 8, 8), Positions().eval()
    student, payload = exported(Graph.trace(model, (inputs[:1],)), inputs, Policy(quant=QuantSpec(bits=bits)))
    assert torch.equal(student.get_submodule("place").weight, model.place.weight)
    assert (run(payload, inputs) - answers(student, inputs)).abs().max() <= 0.05 * answers(student, inputs).abs().max()


class TiedLayers(nn.Module):
    """Three convolutions, of which two have one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(torch.relu(self.stem(x))))))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("layers", [{}, {"second": 32}, {"first": 32}, {"first": 4}], ids=str)
def test_tied_weights_are_exported_and_loaded(layers, tmp_path):
    torch.manual_seed(0)
    inputs, policy = torch.randn(32, 3, 12, 12), for_device(Policy(quant=QuantSpec(bits=8, layers=layers)), HERE)
    graph = Graph.trace(TiedLayers().eval(), (inputs[:1],))
    student, payload = exported(graph, inputs, policy)
    expected = answers(student, inputs)
    differences = (run(payload, inputs) - expected).abs().amax(1) / (expected.max() - expected.min())
    assert differences.median() <= 1e-5, "biases are settled, so that only the rounding of floats is left"
    write_bundle(tmp_path, student, policy, inputs[:1], Provenance(model="own:tied"))
    loaded = load_student(tmp_path, graph, policy)
    assert torch.equal(answers(loaded, inputs), expected)


class WithoutStatistics(nn.Module):
    """Its batch norms use the batch's own mean and variance, in eval mode too."""

    def __init__(self, *, affine):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8, track_running_stats=False, affine=affine)
        self.last = nn.BatchNorm1d(8, track_running_stats=False, affine=affine)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.head(self.last(x.mean((2, 3))))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bits", [8, 32])
def test_norms_without_running_statistics_are_exported_as_they_are(bits, affine):
    torch.manual_seed(0)
    inputs, policy = torch.randn(32, 3, 12, 12), Policy(prune=PruneSpec(ratios={"first": 0.25}), quant=QuantSpec(bits=bits))
    graph = Graph.trace(WithoutStatistics(affine=affine).eval(), (inputs[:16],))
    student, payload = exported(graph, inputs, policy)
    expected = torch.cat([answers(student, part) for part in inputs.split(16)])
    assert not torch.allclose(answers(student, inputs), expected, atol=1e-3), "answers depend on the batch"
    difference = (run(payload, inputs) - expected).abs().max()
    assert difference <= (0.05 if bits == 8 else 1e-4) * (expected.max() - expected.min())


def test_channel_without_weights_keeps_its_bias():
    """A channel whose weights have decayed away still adds its bias; its own scale would let the int32 bias overflow."""
    model, _ = network("tiny_resnet")
    inputs = torch.randn(16, 3, 32, 32)
    with torch.no_grad():
        model.conv1.weight[3] *= 1e-12
        model.bn1.bias[3] = 2.0
    student, payload = exported(Graph.trace(model, (inputs[:1],)), inputs, Policy(quant=QuantSpec(bits=8)))
    expected = answers(student, inputs)
    assert (run(payload, inputs) - expected).abs().max() <= 0.05 * (expected.max() - expected.min())


class Opaque(nn.Module):
    """What torch.export refuses, where the fixture says so."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.layer(x).mean((2, 3)))


@pytest.mark.parametrize("layers", [{}, {"model.layer.0": 32, "model.layer.3": 4}], ids=str)
@pytest.mark.usefixtures("untraceable")
def test_opaque_network_is_quantized_and_exported(layers):
    inputs = torch.randn(32, 3, 12, 12)
    torch.manual_seed(1)
    model = with_statistics(Opaque())
    policy = Policy(quant=QuantSpec(bits=8, layers=layers))
    graph = Graph.trace(model, (inputs[:1],))
    assert graph.opaque_reason
    assert graph.frozen[0].reason == graph.opaque_reason
    assert not graph.blocks and not graph.groups
    student, payload = exported(graph, inputs, policy, settle=False)
    kinds = {t.data_type for t in onnx.load_from_string(payload).graph.initializer}
    assert onnx.TensorProto.INT8 in kinds
    assert (onnx.TensorProto.INT4 in kinds) == bool(layers)
    expected = answers(student, inputs)
    assert (run(payload, inputs) - expected).abs().max() <= 0.05 * (expected.max() - expected.min())
    assert graph.workload(policy).weight_bytes <= len(payload)


def test_a_layer_whose_weights_the_exporter_renames_never_passes_for_int8(monkeypatch):
    from autocompress.export import onnx as exporter

    find = exporter._weight_name

    def renamed(node, producers):
        name, transposed = find(node, producers)
        return ("val_7" if name == "conv1.weight" else name), transposed

    monkeypatch.setattr(exporter, "_weight_name", renamed)
    graph, inputs = images("tiny_resnet")
    with pytest.raises(PolicyFailure, match="weights of conv1 under another name"):
        exported(graph, inputs, Policy(quant=QuantSpec(bits=8)))


def test_a_planted_error_is_found():
    graph, inputs = images("tiny_resnet")
    for bits in (4, 8, 32):
        policy = Policy(quant=QuantSpec(bits=bits))
        student, payload = exported(graph, inputs, policy)
        with torch.no_grad():
            student.get_submodule("layer3.0.bn2").bias += torch.randn(64)
        with pytest.raises(PolicyFailure, match="export mismatch"):
            agreed(graph, inputs, policy, student, payload)


def test_what_the_exporter_cannot_do_is_told_by_its_cause_and_not_by_its_advice(monkeypatch):
    def fail(*_, **__):
        try:
            raise ValueError("no such operator: lgamma")
        except ValueError as error:
            raise RuntimeError("Failed to export the model. Next steps:\n- create an issue") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    inputs = torch.zeros(1, 3, 4, 4)
    graph = Graph.trace(nn.Conv2d(3, 4, 1), (inputs,))
    with pytest.raises(PolicyFailure, match="the exporter failed: ValueError: no such operator: lgamma"):
        exported(graph, inputs, Policy())


def small(net, *shape):
    torch.manual_seed(0)
    return Graph.trace(with_statistics(net), (torch.randn(1, *shape),)), torch.randn(32, *shape)


def test_a_pad_that_holds_no_value_of_its_input_has_no_part_in_int8():
    """As in front of a pool of maxima: an infinity has no range, and a huge number would leave no other value any bits."""

    class Net(nn.Module):
        def __init__(self, fill):
            super().__init__()
            self.a, self.b, self.fill = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), fill

        def forward(self, x):
            x = nn.functional.pad(torch.relu(self.a(x)), (0, 1, 0, 1), value=self.fill)
            return self.b(nn.functional.max_pool2d(x, 2)).mean((2, 3))

    for fill in (-float("inf"), -1e9):
        graph, inputs = small(Net(fill), 3, 12, 12)
        policy = Policy(quant=QuantSpec(bits=8))
        assert agreed(graph, inputs, policy, *exported(graph, inputs, policy)).relative < 0.05
        student, _ = exported(graph, inputs, policy)
        with torch.no_grad():
            assert compare(student(inputs), graph.module(inputs)).relative < 0.1, "the others keep their bits"


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize(
    ("layer", "width"),
    [(nn.Linear(12, 8), 8), (nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Conv1d(3, 8, 3)), 16)],
    ids=["linear", "conv"],
)
def test_a_norm_without_a_weight_is_folded(layer, width, bits):
    graph, inputs = small(nn.Sequential(layer, nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(width, 4)), 12)
    policy = Policy(quant=QuantSpec(bits=bits))
    student, payload = exported(graph, inputs, policy)
    assert count(payload, "BatchNormalization") == 0
    assert agreed(graph, inputs, policy, student, payload).relative < 0.05


def test_what_only_the_body_of_a_loop_reads_stays_in_the_file():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(20, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.table(x))

    torch.manual_seed(0)
    words = torch.randint(0, 20, (1, 5))
    graph = Graph.trace(Net().eval(), (words,))
    payload = onnx_bytes(build_student(graph, Policy()), QuantSpec(), (words,))
    onnx.checker.check_model(onnx.load_from_string(payload))
    assert compare(answers(graph.module, words), run(payload, words)).relative < 1e-4
