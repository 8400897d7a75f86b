"""ONNX models of single operators, to measure what each costs. Int8 operators have the form that runtimes fuse: uint8 in, uint8 out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from autocompress.graph.nodes import RECURRENT
from autocompress.workload import Operator, Shape

OPSET, IR_VERSION = 21, 10
SCALE, ZERO_POINT = 0.05, 0
WEIGHT_REACH = 60
"""int8 weights stay within 7 bits, so that no processor saturates; speed does not depend on values."""
MOST_PARAMS = 2**28
"""Weights of an operator that is measured alone: a gigabyte in float32."""
STAND_INS, STAND_IN = ("move", "elementwise"), "Abs"
"""Kinds whose model may give another shape than the operator does, and what stands in for functions that are not listed."""
MOST_AXES = 6
"""Of a transposition whose order is looked for among all that there are."""
BINARY = {
    "sub": "Sub", "subtract": "Sub", "div": "Div", "divide": "Div", "true_divide": "Div", "multiply": "Mul", "pow": "Pow", "maximum": "Max",
    "minimum": "Min",
}  # fmt: skip
"""ONNX's operators for functions of ATen; a sum stands in for the others."""
UNARY = {
    "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "rsqrt": "Sqrt", "reciprocal": "Reciprocal", "erf": "Erf", "sin": "Sin", "cos": "Cos",
    "softplus": "Softplus", "selu": "Selu", "celu": "Celu", "neg": "Neg", "negative": "Neg", "floor": "Floor", "round": "Round",
}  # fmt: skip
RECURRENT_NODES = {"lstm": "LSTM", "gru": "GRU"}
"""Of the others the exporter writes every step."""
MAP_AXES = 3
"""Of rows of tokens, at most; maps of images have more. Slices of channels and of tokens take what lies in a row."""
SAME_RANK = ("pad", "slice")
"""Operators that keep the number of axes here; indexing that drops or adds one (`x[:, 0]`, `x[:, None]`) is interpolated."""
ACTIVATIONS = {
    "relu": "Relu", "relu6": "Relu", "hardswish": "HardSwish", "hardsigmoid": "HardSigmoid", "sigmoid": "Sigmoid", "tanh": "Tanh",
    "gelu": "Gelu", "elu": "Elu", "leaky_relu": "LeakyRelu", "mish": "Mish",
}  # fmt: skip


class _NotBuilt(Exception):
    """An operator that no small model stands for: it is interpolated."""


@dataclass
class _Builder:
    """Collects nodes and initialisers of a small graph."""

    int8: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    inputs: list[onnx.ValueInfoProto] = field(default_factory=list)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], **attributes: object) -> str:
        name = f"value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        return name

    def input(self, shape: Shape) -> str:
        name = f"input_{len(self.inputs)}"
        kind = TensorProto.UINT8 if self.int8 else TensorProto.FLOAT
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return self.node("DequantizeLinear", [name, *self._range(f"{name}_range")]) if self.int8 else name

    def _range(self, name: str) -> list[str]:
        scale = self.constant(f"{name}_scale", np.array(SCALE, dtype=np.float32))
        return [scale, self.constant(f"{name}_zero", np.array(ZERO_POINT, dtype=np.uint8))]

    def weight(self, shape: Shape, axis: int) -> str:
        generator = np.random.default_rng(0)
        if not self.int8:
            return self.constant("weight", generator.standard_normal(shape).astype(np.float32) / math.sqrt(math.prod(shape[1:])))
        values = self.constant("weight_int", generator.integers(-WEIGHT_REACH, WEIGHT_REACH + 1, shape, dtype=np.int8))
        scale = self.constant("weight_scale", np.full(shape[axis], 0.01, dtype=np.float32))
        zero = self.constant("weight_zero", np.zeros(shape[axis], dtype=np.int8))
        return self.node("DequantizeLinear", [values, scale, zero], axis=axis)

    def bias(self, n: int) -> str:
        if not self.int8:
            return self.constant("bias", np.zeros(n, dtype=np.float32))
        values = self.constant("bias_int", np.zeros(n, dtype=np.int32))
        scale = self.constant("bias_scale", np.full(n, 0.01 * SCALE, dtype=np.float32))
        return self.node("DequantizeLinear", [values, scale], axis=0)

    def model(self, value: str, shape: Shape | None) -> bytes:
        """shape: of the value; None: whatever it is."""
        kind = TensorProto.UINT8 if self.int8 else TensorProto.FLOAT
        if self.int8:
            value = self.node("QuantizeLinear", [value, *self._range("output_range")])
        output = helper.make_tensor_value_info(value, kind, shape)
        graph = helper.make_graph(self.nodes, "operator", self.inputs, [output], self.constants)
        made: bytes = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION).SerializeToString()
        return made


def empty_model(shape: Shape) -> bytes:
    """A model that does nothing: what a call costs by itself."""
    builder = _Builder(int8=False)
    return builder.model(builder.node("Identity", [builder.input(shape)]), shape)


def build_onnx(operator: Operator) -> bytes | None:
    """The operator alone as an ONNX model with random weights; None for what cannot be built alone."""
    builder = _Builder(int8=operator.bits == 8)
    makers = {
        "conv": _conv, "linear": _linear, "add": _pairwise, "mul": _pairwise, "maxpool": _pool, "avgpool": _pool,
        "norm": _norm, "activation": _activation, "concat": _concat, "pad": _pad, "slice": _slice,
        "matmul": _matmul, "softmax": _softmax, "attention": _attention, "layernorm": _layer_norm, "groupnorm": _group_norm,
        "filter": _filter, "convtranspose": _filter, "recurrent": _recurrent, "einsum": _einsum, "resize": _resize, "transpose": _transpose,
        "move": _move, "elementwise": _elementwise,
    }  # fmt: skip
    maker = makers.get(operator.kind)
    if maker is None or not (operator.inputs or operator.kind in STAND_INS):
        return None
    if _weights(operator) > MOST_PARAMS or (operator.kind in SAME_RANK and len(operator.inputs[0]) != len(operator.output)):
        return None
    try:
        value = maker(builder, operator)
    except (_NotBuilt, ArithmeticError, LookupError, ValueError):  # or of shapes that no maker has met
        return None
    if operator.activation in ("relu", "relu6") and operator.kind != "activation":
        value = builder.node("Relu", [value])
    return builder.model(value, operator.output if operator.kind not in STAND_INS else None)


def _weights(operator: Operator) -> int:
    """How many numbers the model holds, about."""
    return sum(map(math.prod, operator.inputs[1:])) if operator.kind in ("filter", "convtranspose", "recurrent") else operator.params


def _conv(builder: _Builder, operator: Operator) -> str:
    source, target = operator.inputs[0], operator.output
    weight = builder.weight((target[1], source[1] // operator.groups, *operator.kernel), axis=0)
    pads = list(operator.padding or [(k - 1) // 2 for k in operator.kernel]) * 2
    return builder.node(
        "Conv", [builder.input(source), weight, builder.bias(target[1])], kernel_shape=list(operator.kernel), group=operator.groups,
        strides=list(operator.stride), pads=pads, dilations=list(operator.dilation or [1] * len(operator.kernel)),
    )  # fmt: skip


def _linear(builder: _Builder, operator: Operator) -> str:
    source, target = operator.inputs[0], operator.output
    if len(source) == 2:
        weight = builder.weight((target[-1], source[-1]), axis=0)
        return builder.node("Gemm", [builder.input(source), weight, builder.bias(target[-1])], transB=1)
    product = builder.node("MatMul", [builder.input(source), builder.weight((source[-1], target[-1]), axis=1)])
    has_bias = operator.params > source[-1] * target[-1]
    return builder.node("Add", [product, builder.constant("bias", np.zeros(target[-1], dtype=np.float32))]) if has_bias else product


def _pairwise(builder: _Builder, operator: Operator) -> str:
    shapes = operator.inputs if len(operator.inputs) == 2 else (operator.inputs[0], operator.inputs[0])
    return builder.node(operator.kind.capitalize(), [builder.input(shape) for shape in shapes])


def _pool(builder: _Builder, operator: Operator) -> str:
    """A window that is not known follows from the shapes, as that of an adaptive pool does."""
    source, target = operator.inputs[0], operator.output
    value, largest = builder.input(source), operator.kind == "maxpool"
    kind = "MaxPool" if largest else "AveragePool"
    if operator.kernel:
        sizes = zip(source[-2:], target[-2:], operator.kernel, operator.stride, operator.padding, strict=False)
        rounds_up = any((a + 2 * pad - kernel) // stride + 1 < b for a, b, kernel, stride, pad in sizes)
        return builder.node(
            kind, [value], kernel_shape=list(operator.kernel), strides=list(operator.stride), pads=list(operator.padding) * 2,
            ceil_mode=int(rounds_up),
        )  # fmt: skip
    if target[:2] == source[:2] and len(target) == len(source) and (largest or math.prod(target[2:]) > 1):
        strides = [max(1, a // b) for a, b in zip(source[2:], target[2:], strict=True)]
        window = [a - (b - 1) * stride for a, b, stride in zip(source[2:], target[2:], strides, strict=True)]
        return builder.node(kind, [value], kernel_shape=window, strides=strides)
    axes = builder.constant("axes", np.array(_reduced(source, target), dtype=np.int64))
    return builder.node("ReduceMean", [value, axes], keepdims=int(len(target) == len(source)))


def _reduced(source: Shape, target: Shape) -> tuple[int, ...]:
    """Axes of which one value is made, the last ones where the shapes allow several."""
    if len(source) == len(target):
        return tuple(axis for axis, (a, b) in enumerate(zip(source, target, strict=True)) if a != b) or tuple(range(2, len(source)))
    ways = combinations(reversed(range(len(source))), len(source) - len(target))
    found = next((axes for axes in ways if tuple(size for axis, size in enumerate(source) if axis not in axes) == target), None)
    if found is None:
        raise _NotBuilt
    return found


def _norm(builder: _Builder, operator: Operator) -> str:
    n = operator.inputs[0][1]
    ones = [builder.constant(name, np.ones(n, dtype=np.float32)) for name in ("scale", "shift", "mean", "variance")]
    return builder.node("BatchNormalization", [builder.input(operator.inputs[0]), *ones])


def _matmul(builder: _Builder, operator: Operator) -> str:
    first, second = operator.inputs if len(operator.inputs) == 2 else operator.inputs * 2
    return builder.node("MatMul", [builder.input(first), builder.input(second)])


def _softmax(builder: _Builder, operator: Operator) -> str:
    return builder.node("Softmax", [builder.input(operator.inputs[0])], axis=-1)


def _attention(builder: _Builder, operator: Operator) -> str:
    """As the exporter writes it: softmax(Q K^T * scale) V. One tensor may be several of the three; a mask is left out."""
    shapes = operator.inputs[:3] if len(operator.inputs) >= 3 else (operator.inputs[0], operator.inputs[-1], operator.inputs[-1])
    query, key, value = (builder.input(shape) for shape in shapes)
    axes = list(range(len(shapes[1])))
    turned = builder.node("Transpose", [key], perm=[*axes[:-2], axes[-1], axes[-2]])
    scale = builder.constant("attention_scale", np.array(shapes[0][-1] ** -0.5, dtype=np.float32))
    scores = builder.node("MatMul", [builder.node("Mul", [query, scale]), turned])
    return builder.node("MatMul", [builder.node("Softmax", [scores], axis=-1), value])


def _layer_norm(builder: _Builder, operator: Operator) -> str:
    n = operator.inputs[0][-1]
    if operator.function == "rms_norm":
        return _rms_norm(builder, operator, n)
    ones = [builder.constant(name, np.ones(n, dtype=np.float32)) for name in ("scale", "shift")]
    return builder.node("LayerNormalization", [builder.input(operator.inputs[0]), *ones], axis=-1)


def _rms_norm(builder: _Builder, operator: Operator, n: int) -> str:
    """As the exporter writes it (RMSNormalization is of a later opset)."""
    value, axes = builder.input(operator.inputs[0]), builder.constant("axes", np.array([-1], dtype=np.int64))
    two, little = (builder.constant(name, np.array(number, dtype=np.float32)) for name, number in (("two", 2.0), ("little", 1e-6)))
    mean = builder.node("ReduceMean", [builder.node("Pow", [value, two]), axes])
    factor = builder.node("Reciprocal", [builder.node("Sqrt", [builder.node("Add", [mean, little])])])
    return builder.node("Mul", [builder.node("Mul", [value, factor]), builder.constant("scale", np.ones(n, dtype=np.float32))])


def _group_norm(builder: _Builder, operator: Operator) -> str:
    channels = operator.inputs[0][1]
    ones = [builder.constant(name, np.ones(channels, dtype=np.float32)) for name in ("scale", "shift")]
    if operator.groups == channels:
        return builder.node("InstanceNormalization", [builder.input(operator.inputs[0]), *ones])
    return builder.node("GroupNormalization", [builder.input(operator.inputs[0]), *ones], num_groups=operator.groups)


def _filter(builder: _Builder, operator: Operator) -> str:
    """A layer with any weight: a linear one, a convolution, or a transposed one, whose output may be padded."""
    if not operator.kernel:
        outputs, inputs = operator.inputs[1]
        return builder.node("MatMul", [builder.input(operator.inputs[0]), builder.weight((inputs, outputs), axis=1)])
    source, target, kernel = operator.inputs[0], operator.output, operator.kernel
    stride, dilation = operator.stride or (1,) * len(kernel), operator.dilation or (1,) * len(kernel)
    pads = operator.padding or tuple((k - 1) // 2 for k in kernel)
    own: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": stride,
        "dilations": dilation,
        "pads": (*pads, *pads),
        "group": operator.groups,
    }
    if operator.kind == "convtranspose":
        reached = [(a - 1) * s - 2 * p + d * (k - 1) + 1 for a, s, p, d, k in zip(source[2:], stride, pads, dilation, kernel, strict=True)]
        own["output_padding"] = [b - a for a, b in zip(reached, target[2:], strict=True)]
    kind = "ConvTranspose" if operator.kind == "convtranspose" else "Conv"
    return builder.node(kind, [builder.input(source), builder.weight(operator.inputs[1], axis=0)], **own)


def _recurrent(builder: _Builder, operator: Operator) -> str:
    """One node a layer, both directions together."""
    kind = RECURRENT_NODES.get(operator.function or "")
    if kind is None:
        raise _NotBuilt
    gates = RECURRENT[operator.function or ""]
    weights = [shape for shape in operator.inputs[1:] if len(shape) == 2]
    hidden = weights[1][1]
    directions = operator.output[2] // hidden
    if len(weights) % (2 * directions) or weights[0][0] != gates * hidden:
        raise _NotBuilt  # states that are projected have other weights
    own: dict[str, Any] = {"hidden_size": hidden, "direction": "bidirectional" if directions > 1 else "forward"}
    if kind == "GRU":
        own["linear_before_reset"] = 1
    value, (steps, batch, _) = builder.input(operator.inputs[0]), operator.output
    size = builder.constant("size", np.array([steps, batch, directions * hidden], dtype=np.int64))
    for layer, (_, width) in enumerate(weights[:: 2 * directions]):
        shapes = {"inward": (directions, gates * hidden, width), "own": (directions, gates * hidden, hidden)}
        held = [builder.constant(f"{part}_{layer}", np.full(shape, 0.01, dtype=np.float32)) for part, shape in shapes.items()]
        made = builder.node("Transpose", [builder.node(kind, [value, *held], **own)], perm=[0, 2, 1, 3])
        value = builder.node("Reshape", [made, size])
    return value


def _einsum(builder: _Builder, operator: Operator) -> str:
    return builder.node("Einsum", [builder.input(shape) for shape in operator.inputs], equation=operator.function)


def _resize(builder: _Builder, operator: Operator) -> str:
    name, sizes = operator.function or "", builder.constant("sizes", np.array(operator.output, dtype=np.int64))
    source = builder.input(operator.inputs[0])
    if "nearest" in name:
        own = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return builder.node("Resize", [source, "", "", sizes], mode="nearest", **own)
    return builder.node("Resize", [source, "", "", sizes], mode="cubic" if "cubic" in name else "linear")


def _transpose(builder: _Builder, operator: Operator) -> str:
    """In the first order of the axes that makes the output's shape."""
    source = operator.inputs[0]
    if not 1 < len(source) == len(operator.output) <= MOST_AXES:
        raise _NotBuilt
    _, *orders = permutations(range(len(source)))  # the first changes nothing
    axes = next((axes for axes in orders if tuple(source[axis] for axis in axes) == operator.output), orders[-1])
    return builder.node("Transpose", [builder.input(source)], perm=axes)


def _move(builder: _Builder, operator: Operator) -> str:
    return builder.node(STAND_IN, [builder.input(operator.output)])


def _elementwise(builder: _Builder, operator: Operator) -> str:
    """Of two tensors, or of the larger of what it reads and makes."""
    name, shapes, target = operator.function or "", operator.inputs, operator.output
    if len(shapes) > 1 and _broadcast(*shapes[:2]) == target:
        return builder.node(BINARY.get(name, "Add"), [builder.input(shape) for shape in shapes[:2]])
    source = max([target, *shapes[:1]], key=math.prod)
    return builder.node(UNARY.get(name, STAND_IN), [builder.input(source)])


def _broadcast(first: Shape, second: Shape) -> Shape | None:
    try:
        return np.broadcast_shapes(first, second)
    except ValueError:
        return None


def _activation(builder: _Builder, operator: Operator) -> str:
    value = builder.input(operator.inputs[0])
    if operator.function == "silu":
        return builder.node("Mul", [value, builder.node("Sigmoid", [value])])
    return builder.node(ACTIVATIONS.get(operator.function or "relu", "Relu"), [value])


def _concat(builder: _Builder, operator: Operator) -> str:
    first = operator.inputs[0]
    axis = next((i for i in range(len(first)) if operator.output[i] != first[i]), 1)
    return builder.node("Concat", [builder.input(shape) for shape in operator.inputs], axis=axis)


def _pad(builder: _Builder, operator: Operator) -> str:
    source = operator.inputs[0]
    extra = [b - a for a, b in zip(source, operator.output, strict=True)]
    amounts = builder.constant("amounts", np.array([e // 2 for e in extra] + [e - e // 2 for e in extra], dtype=np.int64))
    return builder.node("Pad", [builder.input(source), amounts])


def _slice(builder: _Builder, operator: Operator) -> str:
    source, target = operator.inputs[0], operator.output
    axes = np.arange(len(source), dtype=np.int64)
    are_maps = len(source) > MAP_AXES
    steps = [_stride(*sizes) if are_maps and axis >= 2 else 1 for axis, sizes in enumerate(zip(source, target, strict=True))]
    ends = [whole if step > 1 else part for whole, part, step in zip(source, target, steps, strict=True)]
    names = [
        builder.constant("starts", np.zeros(len(source), dtype=np.int64)), builder.constant("ends", np.array(ends, dtype=np.int64)),
        builder.constant("axes", axes), builder.constant("steps", np.array(steps, dtype=np.int64)),
    ]  # fmt: skip
    return builder.node("Slice", [builder.input(source), *names])


def _stride(whole: int, part: int) -> int:
    """The step from one position in a map that is taken to the next, as shortcuts take them; what is cut off an end is no step."""
    step = -(-whole // part)
    return step if -(-whole // step) == part else 1
