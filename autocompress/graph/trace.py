"""Trace a user's network into a `torch.fx.GraphModule` whose leaves are modules of torch.nn.

The user's model is copied first and never touched. What cannot be traced becomes an *opaque* graph, one call of the whole copy: its layers
can still be quantized and distilled, but nothing of its structure can change.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from autocompress.errors import UsageError, one_line
from autocompress.graph.nodes import annotate_kinds, is_leaf
from autocompress.graph.plain import fold_computed_weights, own_copy

OPAQUE = "model"
TOLERANCE = 1e-4
FIRST = ("input", "tensors")
"""How torch calls the first argument of a module or function of one or several tensors."""
OUT_OF_PLACE = {
    operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul, operator.itruediv: operator.truediv,
}  # fmt: skip
VIEWS = {"view": "reshape", "view_as": "reshape_as"}
"""Training keeps images channels last, and no view flattens such a map: the operator that copies where it must stands in."""


@dataclass(frozen=True)
class Traced:
    """A traced copy of the model in eval mode; `reason` says why it is opaque, or is empty."""

    module: fx.GraphModule
    reason: str = ""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Traced:
    """Trace `model` on a batch of example inputs; every tensor node carries `meta["shape"]`, batch included.

    Raises UsageError when the model itself does not run on the example.
    """
    duplicate = own_copy(model)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        try:
            expected = duplicate(*_copies(example))
        except Exception as error:  # whatever the user's own code raises
            raise UsageError(
                f"the model does not run on its example input: {one_line(error)}",
                hint="model and data must belong together: does model(inputs[:1]) run on inputs of the data?",
            ) from None
    fold_computed_weights(duplicate)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        try:
            module = _symbolic(own_copy(duplicate))  # which changes modules that the traced network shares with what was traced
            if not _same(module(*_copies(example)), expected):
                return _opaque(duplicate, example, "the traced network computes something else")
        except Exception as error:  # torch.fx raises many kinds, and runs the user's own code
            return _opaque(duplicate, example, f"torch.fx cannot trace it: {one_line(error)}")
        annotate_shapes(module, example)
        return Traced(module)


def untraced(model: nn.Module, example: tuple[Tensor, ...], reason: str) -> Traced:
    """A copy of the model as an opaque graph."""
    duplicate = own_copy(model)
    fold_computed_weights(duplicate)
    with torch.inference_mode():
        return _opaque(duplicate, example, reason)


def _copies(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A network may change its inputs in place."""
    return tuple(tensor.clone() for tensor in example)


def _symbolic(model: nn.Module) -> fx.GraphModule:
    module = fx.GraphModule(model, _Tracer().trace(model))
    _normalise(module)
    module.graph.lint()
    module.recompile()
    return module.eval()


def _normalise(module: fx.GraphModule) -> None:
    """Out-of-place operators only, so that blocks can be removed without aliasing; no identities; what is read comes by position."""
    order = {node: position for position, node in enumerate(module.graph.nodes)}
    overwriting = {name for name, leaf in module.named_modules() if getattr(leaf, "inplace", False)}
    for name in overwriting:
        module.get_submodule(name).inplace = False  # type: ignore[assignment]
    for node in order:
        named = next((name for name in FIRST if name in node.kwargs), None)
        if named is not None and not node.args:
            node.args = (node.kwargs[named],)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name != named}
        if _put_out_of_place(node) or (node.op == "call_module" and node.target in overwriting):
            _read_instead(node, order)
        if node.op == "call_method" and node.target in VIEWS and not _views_other_bits(node):
            node.target = VIEWS[str(node.target)]
        if node.op == "call_module" and type(module.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.all_input_nodes[0])
            module.graph.erase_node(node)
    module.delete_all_unused_submodules()
    annotate_kinds(module)


def _put_out_of_place(node: fx.Node) -> bool:
    """Let a function or method that overwrites its first input return its result only; whether it was one."""
    target = node.target
    if node.op == "call_function" and target in OUT_OF_PLACE:
        node.target = OUT_OF_PLACE[target]
    elif node.op == "call_function" and node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif node.op == "call_method" and str(target).endswith("_") and callable(getattr(Tensor, str(target)[:-1], None)):
        node.target = str(target)[:-1]
    else:
        return False
    return True


def _read_instead(node: fx.Node, order: dict[fx.Node, int]) -> None:
    """What would read the overwritten input after the node reads its result. (Other views of the same memory are found by comparing.)"""
    overwritten = node.args[0]
    if not isinstance(overwritten, fx.Node):
        return
    for reader in list(overwritten.users):
        if order[reader] > order[node]:
            reader.replace_input_with(overwritten, node)


def _views_other_bits(node: fx.Node) -> bool:
    """`x.view(torch.uint8)` reads the same bytes as another type: no reshape."""
    return bool(node.kwargs) or any(isinstance(argument, torch.dtype) for argument in node.args)


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
        return isinstance(outputs, Tensor) and torch.allclose(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE)
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
            n.meta["shape"] = tuple(value.shape)
        return value


@torch.inference_mode()
def annotate_shapes(module: fx.GraphModule, example: tuple[Tensor, ...]) -> None:
    """Write `meta["shape"]` of every tensor node by running the example."""
    with torch.random.fork_rng(devices=[]):
        _Shapes(module).run(*_copies(example))
