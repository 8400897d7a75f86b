"""Weights that are computed at every call: folded into the copy, never in the user's own model."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from autocompress.compress.quantize import calibrate, fake_quantize
from autocompress.compress.student import build_student
from autocompress.errors import UsageError
from autocompress.graph import Graph
from autocompress.graph.plain import own_copy
from autocompress.policy import Policy, QuantSpec, StudentSpec

INPUTS = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
WAYS = {
    "spectral_norm": parametrizations.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "old spectral_norm": old_spectral_norm,
    "old weight_norm": old_weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


class Net(nn.Module):
    """The weights of two layers are computed in some way."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second = way(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3)
        self.head = way(nn.Linear(8, 5))

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


@pytest.fixture(params=WAYS)
def way(request):
    return WAYS[request.param]


@pytest.mark.parametrize("opaque", [False, True], ids=["traced", "opaque"])
def test_a_student_has_the_weights_that_were_computed(way, opaque, request):
    if opaque:
        request.getfixturevalue("untraceable")
    torch.manual_seed(0)
    model = Net(way)
    model(INPUTS)  # hooks leave what they computed in the module
    state, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    graph = Graph.trace(model, (INPUTS,))
    assert bool(graph.opaque_reason) is opaque
    student = build_student(graph, Policy())
    quantized = fake_quantize(student, QuantSpec(bits=8))
    calibrate(quantized, [INPUTS])
    assert model.training and [type(module) for module in model.modules()] == types
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the model itself stays as it is"
    layers = [module for module in student.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == len(graph.layers) == 3
    assert all(isinstance(layer.weight, nn.Parameter) for layer in layers)
    with torch.no_grad():
        expected = model.eval()(INPUTS)
        assert torch.allclose(student(INPUTS), expected, atol=1e-5)
        assert (quantized(INPUTS) - expected).abs().max() < 0.05 * (expected.max() - expected.min())


def test_layers_with_computed_weights_can_be_narrower(way):
    torch.manual_seed(0)
    student = build_student(Graph.trace(Net(way), (INPUTS,)), Policy(student=StudentSpec(width=0.5)))
    assert student.get_submodule("first").weight.shape == (4, 3, 3, 3)
    assert student(INPUTS).shape == (4, 5)


def test_a_copy_computes_its_weights_as_the_model_does(way):
    torch.manual_seed(0)
    model = Net(way)
    model(INPUTS)
    duplicate = own_copy(model)
    with torch.no_grad():
        assert torch.allclose(duplicate(INPUTS), model.eval()(INPUTS), atol=1e-6)


def test_a_buffer_that_is_parametrized_stays_a_buffer():
    class Doubled(nn.Module):
        def forward(self, value):
            return 2 * value

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("shift", torch.ones(3, 1, 1))

        def forward(self, x):
            return x + self.shift

    model = nn.Sequential(Shifted(), nn.Conv2d(3, 5, 6), nn.Flatten())
    parametrize.register_parametrization(model[0], "shift", Doubled())
    graph = Graph.trace(model, (INPUTS,))
    assert not graph.opaque_reason
    assert {name for name, _ in graph.module.named_parameters()} == {"1.weight", "1.bias"}
    with torch.no_grad():
        assert torch.allclose(graph.module(INPUTS), model.eval()(INPUTS), atol=1e-6)


def test_a_model_that_cannot_be_copied_is_refused_by_name():
    model = nn.Linear(2, 2)
    model.lock = threading.Lock()
    with pytest.raises(UsageError, match=r"copy\.deepcopy can copy, but it raised TypeError"):
        own_copy(model)
