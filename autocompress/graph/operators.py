"""The operator that a runtime executes for a node of the traced network, at given shapes and bits, and what it takes in the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from autocompress.graph.nodes import Conv, Weighted, arguments, channel_axis, follows_batch, module_of, name_of, relu_of
from autocompress.workload import Operator, OperatorKind, Shape

FUNCTIONS = ("activation", "layernorm", "elementwise", "move", "resize", "recurrent", "einsum")
"""Kinds that several functions share."""
FILTERS = ("filter", "convtranspose")
"""Kinds whose weight is the second input."""
NORM_VECTORS = 4
"""A batch norm that is not folded has weight, bias, mean and variance in the file."""


@dataclass(frozen=True)
class Factor:
    """One of the two layers that stand for a factorised one: the first has `rank` outputs, the second makes the layer's own of these."""

    rank: int
    is_first: bool

    @property
    def suffix(self) -> str:
        """Of its name, behind the layer's."""
        return ".0" if self.is_first else ".1"


def operator_name(node: fx.Node) -> str:
    """Of a layer, that of the module."""
    return str(node.target) if node.op == "call_module" else node.name


def operator_of(
    node: fx.Node, module: fx.GraphModule, kind: OperatorKind, shapes: tuple[Shape, ...],
    *, activation: str | None, has_norm: bool, int8: bool, weight_bits: int, factor: Factor | None,
) -> Operator:  # fmt: skip
    """What runs in place of a node.

    Args:
        module: the network that the node is of.
        shapes: of its inputs that are tensors, then of its output; of a recurrent layer of the inputs only, since it gives several tensors.
        activation: what is fused into it; has_norm: whether a batch norm is.
        factor: which of two layers of low rank it is; None: neither.
    """
    if kind == "recurrent":
        shapes = _in_time(node, shapes)
    *inputs, output = shapes
    layer, name = module_of(node, module), operator_name(node)
    common: dict[str, Any] = {"kind": kind, "bits": 8 if int8 else 32, "activation": activation}
    if not isinstance(layer, Weighted):
        return _without_layer(node, layer, {**common, "name": name}, inputs, output)
    source, target, has_bias, is_pointwise = inputs[0], output, layer.bias is not None or has_norm, False
    if factor is not None:
        name, between = name + factor.suffix, _with_channels(output, channel_axis(node, module), factor.rank)
        if factor.is_first:
            target, activation, has_bias = between, None, False
        else:
            source, is_pointwise = between, True
    common |= {"name": name, "inputs": (source,), "output": target, "activation": activation, "weight_bits": weight_bits}
    if isinstance(layer, nn.Linear):
        return Operator(**common, params=target[-1] * (source[-1] + has_bias))
    groups = layer.groups if layer.groups == 1 else layer.groups * source[1] // layer.in_channels  # they go as a whole
    window = _pointwise(layer) if is_pointwise else _convolved(layer)
    per_filter = source[1] // groups * math.prod(window["kernel"])
    return Operator(**common, **window, params=target[1] * (per_filter + has_bias), groups=groups)


def _vectors(norm: nn.Module) -> int:
    """Vectors of a norm in the file that is not folded; running statistics come with a weight and a bias always."""
    return sum(1 for _ in norm.parameters()) if follows_batch(norm) else NORM_VECTORS


def _without_layer(node: fx.Node, module: nn.Module | None, common: dict[str, Any], inputs: list[Shape], output: Shape) -> Operator:
    """Of anything but a convolution or linear layer that the network holds as a module."""
    kind = common["kind"]
    if kind == "move":
        inputs = [output]  # of a table it reads no more than it gives
    if kind == "norm":
        own: dict[str, Any] = {"params": output[1] * _vectors(module) if module is not None else 0}
    elif kind == "groupnorm":
        own = {"groups": _norm_groups(module, output[1])}
    else:
        own = _filter_window(node, kind, inputs, output) if kind in FILTERS else _window(node)
    function = _function(node) if kind in FUNCTIONS else None
    return Operator(**common, **own, function=function, inputs=tuple(inputs), output=output)


def _function(node: fx.Node) -> str | None:
    """What the operator computes, where that is a function of ATen."""
    given = arguments(node)
    return str(given["equation"]).replace(" ", "") if "equation" in given else relu_of(node) or name_of(node) or None


def _norm_groups(norm: nn.Module | None, channels: int) -> int:
    """Groups of channels that are normalised together, which go as a whole; one stays one, and a function normalises each by itself."""
    if not isinstance(norm, nn.GroupNorm):
        return channels
    return 1 if norm.num_groups == 1 else channels * norm.num_groups // norm.num_channels


def _in_time(node: fx.Node, inputs: tuple[Shape, ...]) -> tuple[Shape, ...]:
    """Shapes of what a recurrent layer reads and gives, steps x batch x channels, with its weights between; without a batch that is 1."""
    given, first = arguments(node), inputs[0]
    held = inputs[len(inputs) - len(given["params"]) :]
    steps, batch = first[:2] if len(first) == 3 else (first[0], 1)
    if given.get("batch_first") and len(first) == 3:
        steps, batch = batch, steps
    hidden = held[1][1]  # of what a step reads of the one before
    return (steps, batch, first[-1]), *held, (steps, batch, (1 + bool(given.get("bidirectional"))) * hidden)


def _filter_window(node: fx.Node, kind: OperatorKind, inputs: list[Shape], output: Shape) -> dict[str, Any]:
    """How a convolution moves whose weight is its second input; a linear layer has no kernel. Groups follow from the channels."""
    given, kernel = arguments(node), inputs[1][2:]
    if not kernel:
        return {}
    each = {name: value for name in ("stride", "padding", "dilation") if isinstance(value := given.get(name), (list, tuple))}
    window = {name: tuple(value) * (len(kernel) if len(value) == 1 else 1) for name, value in each.items()}
    if given["padding"] == "valid":
        window["padding"] = (0,) * len(kernel)
    channels = output[1] if kind == "convtranspose" else inputs[0][1]
    return window | {"kernel": kernel, "groups": max(1, channels // inputs[1][1])}


def _with_channels(shape: Shape, axis: int, n: int) -> Shape:
    return (*shape[:axis], n, *shape[axis + 1 :])


def _convolved(layer: Conv) -> dict[str, tuple[int, ...]]:
    """How a convolution moves over its input."""
    padding = tuple(layer.padding) if not isinstance(layer.padding, str) else ()
    return {"kernel": tuple(layer.kernel_size), "stride": tuple(layer.stride), "padding": padding, "dilation": tuple(layer.dilation)}


def _pointwise(layer: Conv) -> dict[str, tuple[int, ...]]:
    """The same for one of as many axes that looks at one position."""
    ones, none = (1,) * len(layer.kernel_size), (0,) * len(layer.kernel_size)
    return {"kernel": ones, "stride": ones, "padding": none, "dilation": ones}


def _window(node: fx.Node) -> dict[str, tuple[int, ...]]:
    """Kernel, stride and padding of a pool whose window is written down."""
    given = arguments(node)
    if "kernel_size" not in given:
        return {}
    kernel = given["kernel_size"]
    window = {"kernel": kernel, "stride": given["stride"] or kernel, "padding": given["padding"]}
    pairs = {name: tuple(value * 2 if len(value) == 1 else value) for name, value in window.items() if isinstance(value, list)}
    known = len(pairs) == len(window) and all(isinstance(size, int) for pair in pairs.values() for size in pair)
    return pairs if known else {}  # sizes may be computed from the input's


def weight_bytes(operator: Operator) -> int:
    """Bytes that an operator's weights and biases take in the file."""
    if operator.kind not in ("conv", "linear"):
        return 4 * operator.params
    source, target = operator.inputs[0], operator.output
    is_conv = operator.kind == "conv"
    channels = target[1] if is_conv else target[-1]
    weights = channels * (source[1] // operator.groups * math.prod(operator.kernel) if is_conv else source[-1])
    fused_bias = is_conv or len(source) == 2
    return packed_bytes(weights, operator.params - weights, channels, operator.weight_bits, fused_bias=fused_bias)


def packed_bytes(weights: int, biases: int, channels: int, bits: int, *, fused_bias: bool = True) -> int:
    """Weights in containers of 4, 8, 16 or 32 bits; below 16 with a float32 scale and a zero point a channel.

    Biases are float32, but in an int8 operator int32 with a float32 scale and an int32 zero point each.
    """
    if bits >= 16:
        return weights * bits // 8 + 4 * biases
    container = 4 if bits <= 4 else 8
    integers = math.ceil(weights * container / 8) + math.ceil(channels * container / 8)
    return integers + 4 * channels + (12 if bits == 8 and fused_bias else 4) * biases
