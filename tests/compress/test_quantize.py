"""Rounding laws, gradients, calibration."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from autocompress.compress.quantize import (
    UINT8_MAX,
    ActivationQuantizer,
    RoundedConv,
    RoundedLinear,
    affine,
    calibrate,
    fake_quantize,
    is_quantized,
    largest_int,
    plain_layer,
    round_weight,
    weight_scale,
)
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.train import train_quantized
from autocompress.data import Data, Split
from autocompress.errors import PolicyFailure
from autocompress.graph import Graph
from autocompress.policy import Policy, QuantSpec
from autocompress.testing.models import tiny_resnet

INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8)
magnitudes = st.floats(1e-6, 1e6)


def weights(seed: int, magnitude: float) -> torch.Tensor:
    return torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(seed)) * magnitude


@given(seed=st.integers(0, 10**6), magnitude=magnitudes, bits=st.sampled_from(INTEGER_BITS), reduced=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rounding_errs_by_half_a_step_and_keeps_zero(seed, magnitude, bits, reduced):
    weight = weights(seed, magnitude)
    weight[:, 0, 0, 0] = 0
    rounded, scale = round_weight(weight, bits, reduced), weight_scale(weight, largest_int(bits, reduced)).view(-1, 1, 1, 1)
    assert ((rounded - weight).abs() <= 0.5 * scale * (1 + 1e-4)).all()
    assert (rounded[:, 0, 0, 0] == 0).all()
    steps = rounded / scale
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert steps.abs().max() <= largest_int(bits, reduced) + 1e-3
    assert torch.allclose(round_weight(rounded, bits, reduced), rounded, rtol=1e-5, atol=0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_more_bits_never_have_a_larger_bound(seed):
    weight = weights(seed, 1.0)
    bounds = [weight_scale(weight, largest_int(bits)) for bits in INTEGER_BITS]
    assert all((more < fewer).all() for fewer, more in itertools.pairwise(bounds))
    errors = [float((round_weight(weight, bits) - weight).abs().max()) for bits in (*INTEGER_BITS, 16)]
    assert errors[0] > errors[2] > errors[4] > errors[6] > errors[7]


def test_rounding_commutes_with_a_factor_per_channel():
    """Why a student may be trained with its batch norms and folded at export."""
    weight, factor = weights(0, 1.0), torch.tensor([0.3, -2.0, 1.0, 7.0, -0.01, 4.0]).view(-1, 1, 1, 1)
    assert torch.allclose(round_weight(weight * factor, 8), round_weight(weight, 8) * factor, rtol=1e-5, atol=1e-7)


def test_a_channel_of_zeros_stays_zero():
    assert torch.equal(round_weight(torch.zeros(2, 3), 4), torch.zeros(2, 3))


@given(low=st.floats(-1e4, 0.0), high=st.floats(1e-3, 1e4), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_activations_err_by_half_a_step_inside_the_range(low, high, seed):
    scale, zero_point = affine(low, high)
    assert 0 <= zero_point <= UINT8_MAX
    quantizer = ActivationQuantizer()
    quantizer.scale.fill_(scale)
    quantizer.zero_point.fill_(zero_point)
    quantizer.calibrated.fill_(True)
    inside = torch.rand(50, generator=torch.Generator().manual_seed(seed)) * (high - low) + low
    lowest, highest = -zero_point * scale, (UINT8_MAX - zero_point) * scale
    inside = inside.clamp(lowest, highest)
    assert ((quantizer(inside) - inside).abs() <= 0.5 * scale * (1 + 1e-3)).all()
    assert float(quantizer(torch.zeros(1))) == 0.0
    assert abs(lowest - low) <= scale and abs(highest - high) <= scale
    beyond = quantizer(torch.tensor([low - 5.0, high + 5.0]))
    assert beyond[0] == pytest.approx(lowest, rel=1e-4, abs=1e-6) and beyond[1] == pytest.approx(highest, rel=1e-4, abs=1e-6)


def test_gradient_passes_rounding_and_stops_at_clipping():
    quantizer = ActivationQuantizer()
    quantizer.scale.fill_(0.1)
    quantizer.calibrated.fill_(True)
    x = torch.tensor([0.13, 12.0, 40.0, -3.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.Linear(4, 6)], ids=["conv", "linear"])
def test_rounded_layer_is_the_layer_with_rounded_weights(layer, bits):
    rounded = (RoundedConv if isinstance(layer, nn.Conv2d) else RoundedLinear)(layer, bits, False)
    x = torch.randn(2, 4, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 4)
    expected = torch.func.functional_call(layer, {"weight": round_weight(layer.weight, bits)}, (x,))
    assert torch.allclose(rounded(x), expected, atol=1e-6)
    assert rounded.state_dict().keys() == layer.state_dict().keys()
    assert torch.equal(plain_layer(rounded)(x), layer(x))
    (gradient,) = torch.autograd.grad(rounded(x).square().sum(), rounded.weight)
    twin = nn.Parameter(round_weight(layer.weight.detach(), bits))
    (reference,) = torch.autograd.grad(torch.func.functional_call(layer, {"weight": twin}, (x,)).square().sum(), twin)
    assert torch.allclose(gradient, reference, atol=1e-4)


def quantized_resnet(bits=8):
    torch.manual_seed(0)
    graph = Graph.trace(tiny_resnet(), (torch.randn(1, 3, 32, 32),))
    return graph.module, fake_quantize(graph.module, QuantSpec(bits=bits))


def quantizers(model):
    return [module for module in model.modules() if isinstance(module, ActivationQuantizer)]


def test_uncalibrated_activations_pass_unchanged_and_the_student_is_a_copy():
    student, quantized = quantized_resnet()
    student = copy.deepcopy(student)
    before = {key: value.clone() for key, value in student.state_dict().items()}
    x = torch.randn(4, 3, 32, 32)
    assert is_quantized(quantized) and not is_quantized(student)
    assert (quantized(x) - student(x)).abs().max() < 0.1 * student(x).abs().max(), "weights are rounded, activations are not"
    calibrate(quantized, [x])
    assert all(bool(q.calibrated) for q in quantizers(quantized))
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())


def test_calibration_covers_what_it_sees_and_does_not_depend_on_the_split():
    inputs = torch.randn(32, 3, 32, 32)
    ranges = []
    for size in (8, 16):
        _, quantized = quantized_resnet()
        calibrate(quantized, inputs.split(size))
        assert not any(q.observing or q.samples for q in quantizers(quantized))
        ranges.append([float(q.scale) for q in quantizers(quantized)])
    assert ranges[0] == pytest.approx(ranges[1], rel=0.25)
    first = quantizers(quantized)[0]
    span = float(first.scale) * UINT8_MAX
    assert 0.3 * float(inputs.max() - inputs.min()) <= span <= 1.01 * float(inputs.max() - inputs.min())


def test_calibration_clips_where_that_errs_less():
    """One value far from 400 000 others: what all of them gain from finer steps outweighs its clipping."""
    quantizer = ActivationQuantizer()
    bulk = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).abs()
    values = torch.cat([bulk, torch.tensor([10.0])])
    quantizer.samples = [values]
    quantizer.fit()
    chosen, (scale, zero_point) = quantizer(values), affine(float(values.min()), float(values.max()))
    full = torch.fake_quantize_per_tensor_affine(values, scale, zero_point, 0, UINT8_MAX)
    assert (chosen - values).square().mean() < 0.8 * (full - values).square().mean()
    assert chosen.max() < 9.0


def test_calibration_leaves_observing_when_the_model_fails():
    _, quantized = quantized_resnet()
    with pytest.raises(RuntimeError):
        calibrate(quantized, [torch.randn(1, 5, 32, 32)])
    assert not any(q.observing for q in quantizers(quantized))


def test_ranges_are_fitted_to_batches_that_are_drawn_one_by_one(monkeypatch):
    drawn, prepare = [], Data.prepare
    monkeypatch.setattr(Data, "prepare", lambda self, inputs: drawn.append(len(inputs)) or prepare(self, inputs))
    split = Split(torch.randn(10, 3, 32, 32), torch.arange(10))
    graph = Graph.trace(tiny_resnet().eval(), (split.inputs[:1],))
    monkeypatch.setattr("autocompress.compress.train.CALIBRATION_BATCH", 4)
    train_quantized(build_student(graph, Policy()), QuantSpec(bits=8), Data(split, split, split), TrainPlan(steps=0))
    assert drawn == [4, 4, 2]


def test_ranges_travel_with_the_state():
    _, quantized = quantized_resnet()
    calibrate(quantized, [torch.randn(8, 3, 32, 32)])
    _, other = quantized_resnet()
    other.load_state_dict(quantized.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other.eval()(x), quantized.eval()(x))


@pytest.mark.parametrize("bits", [4, 16])
def test_storage_bits_leave_activations_alone(bits):
    _, quantized = quantized_resnet(bits)
    assert not is_quantized(quantized)
    assert {m.bits for m in quantized.modules() if isinstance(m, (RoundedConv, RoundedLinear))} == {bits}


class Pooled(nn.Module):
    def __init__(self, pool):
        super().__init__()
        self.first, self.second, self.pool = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), pool

    def forward(self, x):
        return self.second(self.pool(torch.relu(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize(
    ("pool", "moves"),
    [
        (nn.MaxPool2d(2), True),
        (nn.AdaptiveMaxPool2d(4), True),
        (lambda x: F.max_pool2d(x, 2), True),
        (lambda x: torch.max_pool2d(x, 2), True),
        (lambda x: F.adaptive_max_pool2d(x, 4), True),
        (nn.AvgPool2d(2), False),
        (lambda x: F.avg_pool2d(x, 2), False),
    ],
    ids=["MaxPool2d", "AdaptiveMaxPool2d", "max_pool2d", "torch.max_pool2d", "adaptive_max_pool2d", "AvgPool2d", "avg_pool2d"],
)
def test_a_pool_that_only_moves_values_keeps_their_range(pool, moves):
    graph = Graph.trace(Pooled(pool), (torch.randn(1, 3, 10, 10),))
    quantized = fake_quantize(graph.module, QuantSpec(bits=8))
    used = [node.target for node in quantized.graph.nodes if node.meta.get("quantizer")]
    assert len(used) == 4, "of the input, of both convolutions and of the pool between them"
    assert (used[1] == used[2]) is moves
    assert len(quantizers(quantized)) == len(set(used))


def test_only_int8_layers_read_rounded_values_of_a_network_in_float():
    """A shortcut beside the one int8 layer of a block stays as exact as it was."""
    net = tiny_resnet()
    graph = Graph.trace(net.eval(), (torch.randn(1, 3, 16, 16),))
    block = next(block for block in graph.blocks)
    quantized = fake_quantize(build_student(graph, Policy()), QuantSpec(layers={block.layers[0]: 8}))
    (layer,) = (node for node in quantized.graph.nodes if str(node.target) == block.layers[0])
    quantizer = layer.all_input_nodes[0]
    assert isinstance(quantized.get_submodule(str(quantizer.target)), ActivationQuantizer)
    assert list(quantizer.users) == [layer]
    assert len(quantizer.all_input_nodes[0].users) > 1, "the shortcut reads what is not rounded"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_have_no_range(bad):
    quantizer = ActivationQuantizer()
    quantizer.observing = True
    quantizer(torch.tensor([0.5, bad, -0.25]))
    with pytest.raises(PolicyFailure, match="activations of a quantized network must be finite"):
        quantizer.fit()


def test_what_an_untraced_network_learns_through_its_bits_is_kept_in_float(untraceable):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    student = build_student(Graph.trace(model.eval(), (torch.randn(1, 3, 8, 8),)), Policy())
    before = {name: value.clone() for name, value in student.state_dict().items()}
    splits = [Split(torch.randn(n, 3, 8, 8), torch.arange(n) % 4) for n in (64, 16, 16)]
    train_quantized(student, QuantSpec(bits=8), Data(*splits, classes=4), TrainPlan(3, batch_size=16, quant_fraction=1.0))
    after = student.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_an_untraced_network_may_ask_a_layer_for_its_sizes(untraceable):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.b(self.a(x.view(-1, self.a.in_features).to(self.a.weight.dtype)))

    graph = Graph.trace(Net().eval(), (torch.randn(1, 6),))
    assert graph.opaque_reason
    quantized = fake_quantize(build_student(graph, Policy()), QuantSpec(bits=8))
    calibrate(quantized, [torch.randn(32, 6)])
    assert quantized(torch.randn(4, 6)).shape == (4, 3)


@pytest.mark.parametrize(
    "end",
    [lambda y: y, lambda y: y.squeeze(-1), lambda y: y * 3.0 + 2000.0, lambda y: torch.sigmoid(y).view(-1), lambda y: F.softmax(y, 1)],
    ids=["as it is", "squeezed", "in units", "a share", "probabilities"],
)
def test_what_leaves_the_network_is_not_rounded_to_256_levels(end):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 1)

        def forward(self, x):
            return end(self.head(torch.relu(self.body(x))))

    graph = Graph.trace(Net().eval(), (torch.randn(2, 4),))
    quantized = fake_quantize(build_student(graph, Policy()), QuantSpec(bits=8))
    assert len(quantizers(quantized)) == 2, "of the input, and between the layers"
    layers = [operator for operator in graph.workload(Policy(quant=QuantSpec(bits=8))).operators if operator.kind == "linear"]
    assert [layer.bits for layer in layers] == [8, 8]
