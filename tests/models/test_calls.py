from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import fx, nn

from autocompress.batch import Batch
from autocompress.errors import UsageError
from autocompress.graph import Graph
from autocompress.models import example_for, in_float32, simplify_call


def net():
    return nn.Linear(4, 3)


class Answers(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.head, self.aux, self.outputs = nn.Linear(4, 3), nn.Linear(4, 2), outputs

    def forward(self, x):
        return self.outputs(self.head(x), self.aux(x))


@pytest.mark.parametrize(
    ("outputs", "name"),
    [
        (lambda y, a: {"loss": a.mean(), "logits": y}, "logits"),
        (lambda y, a: OrderedDict(out=y, aux=a), "out"),
        (lambda y, a: {"last_hidden_state": y, "pooler_output": a}, "last_hidden_state"),
        (lambda y, a: {"mine": y}, "mine"),
    ],
)
def test_of_several_outputs_by_name_the_main_one_is_taken(outputs, name):
    model, x = Answers(outputs).eval(), torch.randn(2, 4)
    names = set(model.state_dict())
    assert simplify_call(model, x) == name
    assert torch.equal(model(x), model.head(x))
    graph = Graph.trace(model, (x,))
    assert [layer.name for layer in graph.layers] == ["head"]
    with torch.no_grad():
        assert torch.equal(graph.module(x), model.head(x))
    assert set(model.state_dict()) == names, "weights have the names that they had"


@pytest.mark.parametrize("outputs", [lambda y, a: y, lambda y, a: {"boxes": y, "kinds": a}, lambda y, a: (y, a), lambda y, a: {"mine": 1}])
def test_outputs_of_which_none_is_known_to_be_the_main_one_stay(outputs):
    model = Answers(outputs).eval()
    assert simplify_call(model, torch.randn(2, 4)) == ""
    assert not model._forward_hooks
    assert simplify_call(model, torch.randn(2, 5)) == "", "what does not run is told by who runs it"


@pytest.mark.parametrize(
    ("written", "shape", "dtype"),
    [("4", (2, 4), torch.float32), ("3x8x9", (2, 3, 8, 9), torch.float32), ("128:int64", (2, 128), torch.int64)],
)
def test_an_input_is_written_as_sizes_and_a_type(written, shape, dtype):
    example = example_for(net(), "own", 2, written)
    assert (tuple(example.shape), example.dtype) == (shape, dtype)


@pytest.mark.parametrize(("written", "names"), [("4:float32,3x8:bool", ()), ("ids=4, mask=3x8:bool", ("ids", "mask"))])
def test_several_inputs_are_separated_by_commas(written, names):
    example = example_for(net(), "own", 2, written)
    assert example.names == names
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in example.tensors] == [((2, 4), torch.float32), ((2, 3, 8), torch.bool)]


def test_one_input_may_have_a_name():
    assert example_for(net(), "own", 2, "pixels=4").names == ("pixels",)


class Keywords(nn.Module):
    """Takes whatever is named."""

    def forward(self, **named):
        return named["a"] - named["b"]


def test_inputs_go_to_the_arguments_of_their_names():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    model = Keywords()
    assert simplify_call(model, Batch((b, a), ("b", "a"))) == ""
    assert torch.equal(model(b, a), a - b)
    assert torch.equal(copy.deepcopy(model)(b, a), a - b)
    graph = Graph.trace(model, (b, a))
    assert not graph.opaque_reason
    assert torch.equal(graph.module(b, a), a - b)


def test_a_model_that_is_given_again_takes_other_names():
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    model = Keywords()
    for names, tensors in ((("a", "b"), (a, b)), (("b", "a"), (b, a))):
        simplify_call(model, Batch(tensors, names))
        assert torch.equal(model(*tensors), a - b)


@pytest.mark.parametrize(("model", "name"), [(net(), "c"), (net(), "not a name"), (Keywords(), "class")])
def test_inputs_of_no_argument_are_refused(model, name):
    with pytest.raises(UsageError, match=f"has no '{name}'") as error:
        simplify_call(model, Batch((torch.rand(1, 4),), (name,)))
    assert "its arguments are" in error.value.hint


def test_inputs_of_a_traced_module_have_no_names():
    with pytest.raises(UsageError, match="have no names"):
        simplify_call(fx.symbolic_trace(net()), Batch((torch.rand(1, 4),), ("input",)))


@pytest.mark.parametrize("written", ["", "3,", "3,4", "3x", "0x3", "4:text", "-1x3", "3x4:", "x", "=3", "a b=3"])
def test_an_input_that_is_written_otherwise_is_refused(written):
    with pytest.raises(UsageError, match="an input is written as its sizes"):
        example_for(net(), "own", 1, written)


def test_a_model_may_answer_otherwise_in_training():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x) if self.training else {"out": self.head(x)}

    model, x = Both().eval(), torch.randn(2, 4)
    assert simplify_call(model, x) == "out"
    assert torch.equal(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(precision):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    weight = model[0].weight.detach().clone()
    assert in_float32(model) is model
    made = in_float32(model.to(precision))
    assert {value.dtype for value in made.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.allclose(made[0].weight, weight, rtol=0.01)
