"""Write a student as ONNX: float32, or real int8 as QuantizeLinear/DequantizeLinear pairs that runtimes fuse.

The graph comes from torch's exporter, with the activations' quantizers in it. What the exporter cannot say is written afterwards:
weights as int8 (or packed) initialisers with one scale a channel, biases of int8 layers as int32 at the product of both scales.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from autocompress.compress.quantize import TINY, UINT8_MAX, ActivationQuantizer, RoundedConv, RoundedLinear, largest_int
from autocompress.errors import PolicyFailure, UsageError, one_line, root_cause
from autocompress.export.fold import fold_norms, plain_weights
from autocompress.policy import QuantSpec
from autocompress.system.quick import quick_export
from autocompress.system.quiet import quiet

OPSET = 21
"""First opset with int4 tensors."""
MOST_BIAS = 2**30
"""An int8 layer adds its bias in int32. A channel whose weights are all but zero gets a coarser scale, so that its bias fits."""


class _FixedQuantizer(nn.Module):
    """An activation quantizer with its range as constants, which is what the exporter understands."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.scale = float(quantizer.scale)
        self.zero_point = int(quantizer.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, UINT8_MAX)


def onnx_bytes(student: fx.GraphModule, quant: QuantSpec, example: tuple[Tensor, ...], names: Sequence[str] = ()) -> bytes:
    """The student as a serialized ONNX model with the example's batch fixed; the student is not changed.

    names: of its inputs; by default those of the traced network.
    Raises PolicyFailure when torch's exporter fails, or a layer's weights would not be in the bits that the policy says.
    """
    module = copy.deepcopy(student).cpu().eval()
    bits = {name: layer.bits for name, layer in module.named_modules() if isinstance(layer, (RoundedConv, RoundedLinear))}
    plain_weights(module)
    fold_norms(module)
    for name, child in list(module.named_modules()):
        if isinstance(child, ActivationQuantizer):
            module.set_submodule(name, _FixedQuantizer(child) if bool(child.calibrated) else nn.Identity())
    model = _export(module, example, names or [node.name for node in module.graph.nodes if node.op == "placeholder"])
    _name_turned_weights(model, {f"{name}.weight": module.get_parameter(f"{name}.weight") for name in bits})
    _require_packed(student, bits, _pack_weights(model, bits, quant.reduced_range))
    _strip(model)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _export(module: fx.GraphModule, example: tuple[Tensor, ...], names: Sequence[str]) -> onnx.ModelProto:
    with quiet("torch.onnx"), quick_export():
        try:
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=OPSET, input_names=names[: len(example)], verbose=False, optimize=True
            )
        except Exception as error:  # the exporter raises many kinds
            raise PolicyFailure(f"the exporter failed: {one_line(root_cause(error)):.200}") from error
    assert program is not None
    model = program.model_proto
    if not any(entry.domain in ("", "ai.onnx") and entry.version >= OPSET for entry in model.opset_import):
        model = onnx.version_converter.convert_version(model, OPSET)
    _name_outputs(model)
    return model


def _name_outputs(model: onnx.ModelProto) -> None:
    names = ["output"] if len(model.graph.output) == 1 else [f"output_{i}" for i in range(len(model.graph.output))]
    renamed = {value.name: name for value, name in zip(model.graph.output, names, strict=True)}
    taken = {name for node in model.graph.node for name in node.output} - set(renamed)
    if taken & set(names):
        return
    for value in model.graph.output:
        value.name = renamed[value.name]
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = renamed.get(name, name)
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _name_turned_weights(model: onnx.ModelProto, weights: dict[str, Tensor]) -> None:
    """Weights that the exporter has transposed, small ones at once, get the names of those that they are made of."""
    held = {value.name: value for value in model.graph.initializer}
    unnamed = {name: numpy_helper.to_array(value) for name, value in held.items() if len(value.dims) == 2 and name not in weights}
    renamed: dict[str, str] = {}
    for name, weight in weights.items():
        if name not in held and weight.dim() == 2:
            turned = weight.detach().numpy().T
            same = (other for other, value in unnamed.items() if value.shape == turned.shape and np.array_equal(value, turned))
            found = next((other for other in same if other not in renamed), None)
            if found is not None:
                held[found].name = renamed[found] = name
    for node in model.graph.node:
        for index, read in enumerate(node.input):
            node.input[index] = renamed.get(read, read)


def _pack_weights(model: onnx.ModelProto, bits: dict[str, int], reduced_range: bool) -> set[str]:
    """Replace the float weights of layers below 32 bits by integers and DequantizeLinear (16: by half precision and Cast); of which."""
    graph = model.graph
    initializers = {value.name: value for value in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    first: list[onnx.NodeProto] = []
    done: set[str] = set()
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
            continue
        source, transposed = _weight_name(node, producers)
        layer_bits = bits.get(source.removesuffix(".weight"), 32)
        if source not in initializers or layer_bits == 32 or source in done:
            continue
        done.add(source)
        weight = numpy_helper.to_array(initializers[source]).astype(np.float32)
        axis = _channel_axis(node, transposed)
        if layer_bits == 16:
            first += _as_half(graph, source, weight)
            continue
        scale = _scales(weight, axis, largest_int(layer_bits, reduced_range and layer_bits == 8))
        step = _input_scale(node, producers, initializers) if layer_bits == 8 else None
        # an integer bias is in the unit of one call's input: other calls of the layer would add it wrongly scaled
        if step is not None and len(node.input) > 2 and node.input[2] in initializers and readers[node.input[2]] == 1:
            bias = numpy_helper.to_array(initializers[node.input[2]]).astype(np.float64)
            scale = np.maximum(scale, np.abs(bias) / (step * MOST_BIAS)).astype(np.float32)
            first += _integer_bias(graph, node.input[2], bias, (step * scale.astype(np.float64)).astype(np.float32))
        first += _as_integers(graph, source, weight, scale, axis, layer_bits)
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    return {source.removesuffix(".weight") for source in done}


def _require_packed(student: fx.GraphModule, bits: dict[str, int], packed: set[str]) -> None:
    """Raises PolicyFailure unless the weights of every layer below 32 bits were found; layers that share weights share a name."""
    weights = {layer: id(student.get_submodule(layer).weight) for layer in bits}
    found = {weights[layer] for layer in packed}
    called = {str(node.target) for node in student.graph.nodes if node.op == "call_module" and node.users}
    for layer in sorted(called & set(bits)):
        if bits[layer] < 32 and weights[layer] not in found:
            raise PolicyFailure(f"the exporter wrote the weights of {layer} under another name: they would stay float32 in the file")


def _weight_name(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> tuple[str, bool]:
    maker = producers.get(node.input[1])
    if maker is not None and maker.op_type == "Transpose":
        return maker.input[0], True
    return node.input[1], False


def _channel_axis(node: onnx.NodeProto, transposed: bool) -> int:
    if node.op_type == "Conv" or transposed:
        return 0
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    return 0 if node.op_type == "Gemm" and flags.get("transB") else 1


def _scales(weight: NDArray[np.float32], axis: int, largest: int) -> NDArray[np.float32]:
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale: NDArray[np.float32] = (np.maximum(np.abs(weight).max(others), TINY) / largest).astype(np.float32)
    return scale


def _as_integers(
    graph: onnx.GraphProto, name: str, weight: NDArray[np.float32], scale: NDArray[np.float32], axis: int, bits: int
) -> list[onnx.NodeProto]:
    shape = [1] * weight.ndim
    shape[axis] = -1
    values = np.rint(weight / scale.reshape(shape)).astype(np.int8)
    kind = TensorProto.INT4 if bits <= 4 else TensorProto.INT8
    _replace(graph, name, helper.make_tensor(f"{name}.int", kind, values.shape, _packed(values, bits), raw=True))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    zeros = np.zeros(len(scale), dtype=np.int8)
    graph.initializer.append(helper.make_tensor(f"{name}.zero", kind, zeros.shape, _packed(zeros, bits), raw=True))
    return [
        helper.make_node("DequantizeLinear", [f"{name}.int", f"{name}.scale", f"{name}.zero"], [name], axis=axis, name=f"{name}.dequantize")
    ]


def _packed(values: NDArray[np.int8], bits: int) -> bytes:
    """int8 as it is; int4 two to a byte, the first in the low half (ONNX)."""
    if bits > 4:
        return values.tobytes()
    flat = values.reshape(-1).astype(np.uint8) & 0x0F
    flat = np.append(flat, np.zeros(len(flat) % 2, dtype=np.uint8))
    return (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()


def _as_half(graph: onnx.GraphProto, name: str, weight: NDArray[np.float32]) -> list[onnx.NodeProto]:
    _replace(graph, name, numpy_helper.from_array(weight.astype(np.float16), f"{name}.half"))
    return [helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT, name=f"{name}.cast")]


def _input_scale(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], initializers: dict[str, TensorProto]) -> float | None:
    """Scale of a layer's quantized input, or None where it is not quantized."""
    source = producers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear" or source.input[1] not in initializers:
        return None
    return float(numpy_helper.to_array(initializers[source.input[1]]))


def _integer_bias(graph: onnx.GraphProto, name: str, bias: NDArray[np.float64], scale: NDArray[np.float32]) -> list[onnx.NodeProto]:
    """int32 at scale input x weight, the accumulator's own unit; the kernel then adds it for nothing."""
    values = np.rint(bias / scale).astype(np.int32)
    _replace(graph, name, numpy_helper.from_array(values, f"{name}.int"))
    graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), dtype=np.int32), f"{name}.zero"))
    return [
        helper.make_node("DequantizeLinear", [f"{name}.int", f"{name}.scale", f"{name}.zero"], [name], axis=0, name=f"{name}.dequantize")
    ]


def _replace(graph: onnx.GraphProto, name: str, value: TensorProto) -> None:
    index = next(i for i, old in enumerate(graph.initializer) if old.name == name)
    del graph.initializer[index]
    graph.initializer.append(value)


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = _read(graph)
    kept = [value for value in graph.initializer if value.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that a graph reads, or gives back; bodies of loops and branches read what is around them."""
    bodies = [body for node in graph.node for a in node.attribute for body in (*([a.g] if a.HasField("g") else []), *a.graphs)]
    own = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    return own.union(*map(_read, bodies))


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's notes (stack traces with this machine's paths can outweigh the weights) and shapes that a runtime infers."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def check_onnx(path: Path) -> onnx.ModelProto:
    """Load and check a foreign ONNX file before any runtime sees it.

    onnx >= 1.21 refuses external data that leaves the file's folder. Raises UsageError for what is damaged or refused.
    """
    if not path.is_file():
        raise UsageError(f"the file {str(path)!r} does not exist", hint="give an ONNX file, or a model such as torchvision:resnet18")
    try:
        model = onnx.load(path)
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf, checker and file system each raise their own kinds
        raise UsageError(
            f"{str(path)!r} is not a valid ONNX model: {one_line(error):.160}",
            hint="export it again; it may have been cut short, or its external data lie elsewhere",
        ) from None
    return model
