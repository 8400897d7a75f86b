"""Trace a user's network into a `torch.fx.GraphModule` of operators, and of modules of torch.nn where they hold weights.

The user's model is copied first and never touched. What cannot be traced becomes an *opaque* graph, one call of the whole copy: its layers
can still be quantized and distilled, but nothing of its structure can change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.errors import UsageError, one_line
from autocompress.graph.exported import exported
from autocompress.graph.nodes import annotate_kinds
from autocompress.graph.plain import fold_computed_weights, own_copy

OPAQUE = "model"
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Traced:
    """A traced copy of the model in eval mode; `reason` says why it is opaque, or is empty."""

    module: fx.GraphModule
    reason: str = ""


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Traced:
    """Trace `model` on a batch of example inputs; every tensor node carries `meta["shape"]`, batch included.

    Raises UsageError when the model itself does not run on the example.
    """
    duplicate = own_copy(model)
    with torch.random.fork_rng(devices=[]):
        try:
            expected = _run(duplicate, example)
        except Exception as error:  # whatever the user's own code raises
            raise UsageError(
                f"the model does not run on its example input: {one_line(error)}",
                hint="model and data must belong together: does model(inputs[:1]) run on inputs of the data?",
            ) from None
    fold_computed_weights(duplicate)
    with torch.random.fork_rng(devices=[]):
        try:
            module = exported(own_copy(duplicate), example)
            annotate_shapes(module, example)
            annotate_kinds(module)
            if _same(_run(module, example), expected):
                return Traced(module)
            reason = "the traced network computes something else"
        except Exception as error:  # torch.export raises many kinds, and runs the user's own code
            reason = f"torch.export cannot trace it: {one_line(error)}"
    return _opaque(duplicate, example, reason)


def untraced(model: nn.Module, example: tuple[Tensor, ...], reason: str) -> Traced:
    """A copy of the model as an opaque graph."""
    duplicate = own_copy(model)
    fold_computed_weights(duplicate)
    return _opaque(duplicate, example, reason)


@torch.no_grad()
def _run(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
    return model(*_copies(example))


def _copies(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A network may change its inputs in place."""
    return tuple(tensor.clone() for tensor in example)


def is_opaque(module: nn.Module) -> bool:
    """Whether this is a network that could not be traced, or a copy of one."""
    return isinstance(module, fx.GraphModule) and bool(module.meta.get(OPAQUE))


def _opaque(model: nn.Module, example: tuple[Tensor, ...], reason: str) -> Traced:
    root = nn.Module()
    root.add_module(OPAQUE, model)
    graph = fx.Graph()
    inputs = [graph.placeholder(f"input_{index}") for index in range(len(example))]
    own = [graph.call_method("clone", (placeholder,)) for placeholder in inputs]  # which it may change in place
    graph.output(graph.call_module(OPAQUE, tuple(own)))
    module = fx.GraphModule(root, graph).eval()
    module.meta[OPAQUE] = True
    annotate_shapes(module, example)
    return Traced(module, reason)


def _same(outputs: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        if not isinstance(outputs, Tensor) or (outputs.shape, outputs.dtype) != (expected.shape, expected.dtype):
            return False
        if not (expected.is_floating_point() or expected.is_complex()) or not expected.numel():
            return torch.equal(outputs, expected)
        scale = float(expected.abs().max())
        return torch.allclose(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
    if isinstance(expected, dict):
        return isinstance(outputs, dict) and all(key in outputs and _same(outputs[key], expected[key]) for key in expected)
    if isinstance(expected, (tuple, list)):
        return len(outputs) == len(expected) and all(_same(a, b) for a, b in zip(outputs, expected, strict=True))
    return bool(outputs == expected)


class _Shapes(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        n.meta.pop("shape", None)
        if isinstance(value, Tensor):
            n.meta["shape"], n.meta["dtype"] = tuple(value.shape), value.dtype
        elif isinstance(value, (tuple, list)) and value and all(isinstance(part, Tensor) for part in value):
            n.meta["shapes"] = [tuple(part.shape) for part in value]
        return value


@torch.no_grad()
def annotate_shapes(module: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Write `meta["shape"]` of every tensor node, `meta["shapes"]` where there are several tensors, by running the example."""
    with torch.random.fork_rng(devices=[]):
        _Shapes(module).run(*_copies(example))
