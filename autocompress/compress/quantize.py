"""Fake quantization: the arithmetic of int8 and of packed storage, in float, with a gradient.

Weights of 8-bit layers are rounded per output channel, symmetric, with the scale at the largest magnitude; activations per
tensor, uint8, affine, on the nodes that graph/nodes.py names. The gradient passes straight through rounding (Bengio et al.
2013, arXiv 1308.3432) and stops at clipping. A per-channel symmetric scale follows any per-channel factor exactly, so a
student is trained with its batch norms and folded at export (fold then quantize = quantize then fold; cf. Jacob et al.
2018, arXiv 1712.05877, section 3.2).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.batch import Inputs, call_network
from autocompress.errors import PolicyFailure
from autocompress.graph.nodes import Conv, Weighted, constant_layers, fused, int8_tensors, is_layer, kind_of, leaves
from autocompress.graph.trace import is_opaque
from autocompress.policy import QuantSpec

INT8_MAX = 127
REDUCED_MAX = 64
"""vpmaddubsw adds two products of uint8 and int8 in 16 bits: 2 * 255 * 64 is the most that fits."""
UINT8_MAX = 255
CALIBRATION_INPUTS, CALIBRATION_BATCH = 512, 64
"""That ranges are fitted to, as a rule, and at once."""
SAMPLES = 32_768
"""Values of a tensor that its range is fitted to, from eight batches."""
CLIP_FRACTIONS = tuple(0.3 + 0.02 * step for step in range(36))
TINY = 1e-8
MOVERS = ("reshape", "identity", "slice", "pad", "maxpool")
"""Kinds of operators whose outputs are values of their input."""


def largest_int(bits: int, reduced_range: bool = False) -> int:
    """Largest magnitude of a symmetric integer weight of `bits` bits."""
    if bits == 8:
        return REDUCED_MAX if reduced_range else INT8_MAX
    return 2 ** (bits - 1) - 1


def weight_scale(weight: Tensor, largest: int) -> Tensor:
    """Scale per output channel (first axis): max|w| / largest, never zero."""
    return weight.detach().flatten(1).abs().amax(1).clamp_min(TINY) / largest


def round_weight(weight: Tensor, bits: int, reduced_range: bool = False) -> Tensor:
    """The value that a weight has after storage in `bits` bits (16: IEEE half precision)."""
    if bits == 16:
        return weight.to(torch.float16).to(weight.dtype)
    scale = weight_scale(weight, largest_int(bits, reduced_range)).view((-1,) + (1,) * (weight.dim() - 1))
    return torch.round(weight / scale) * scale


def _straight_through(weight: Tensor, bits: int, reduced_range: bool) -> Tensor:
    """The rounded weight; with the scale at the largest magnitude nothing is clipped, so the gradient is that of the identity."""
    return weight + (round_weight(weight.detach(), bits, reduced_range) - weight.detach())


class _Rounded(nn.Module):
    """A layer that computes with rounded weights. Holds the layer's own parameters under their own names."""

    def __init__(self, layer: Weighted, bits: int, reduced_range: bool) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.plain = _Plain(layer)
        self.bits = bits
        self.reduced_range = reduced_range

    @property
    def rounded(self) -> Tensor:
        return _straight_through(self.weight, self.bits, self.reduced_range)

    def __getattr__(self, name: str) -> Any:
        """Sizes and the like are the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "plain" not in self.__dict__:
                raise
            return getattr(self.plain.layer, name)


class RoundedConv(_Rounded):
    """A convolution with rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        return self.plain.layer._conv_forward(x, self.rounded, self.bias)


class RoundedLinear(_Rounded):
    """A linear layer with rounded weights."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded, self.bias)


class _Plain:
    """The geometry of a layer, outside the module tree so that its weights are listed once."""

    def __init__(self, layer: Weighted) -> None:
        self.layer: Any = copy.copy(layer)
        self.layer._parameters = dict.fromkeys(layer._parameters)


def plain_layer(rounded: _Rounded) -> nn.Module:
    """The ordinary layer with the weights that training updates, not rounded."""
    layer: nn.Module = copy.copy(rounded.plain.layer)
    layer._parameters = {name: rounded._parameters.get(name) for name in ("weight", "bias")}
    return layer.train(rounded.training)


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to 256 levels; zero is one of them, so zero padding is exact.

    Until calibrated it is the identity. The range is set once by calibration and stays while the student trains through it: a range that
    follows every batch would change what a short run learns to tolerate. Ranges are buffers, saved with the student.
    """

    scale: Tensor
    zero_point: Tensor
    calibrated: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("calibrated", torch.tensor(False))
        self.observing = False
        self.samples: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.observing:
            self.samples.append(_sample(x.detach().float()))
            return x
        if torch.compiler.is_exporting() or bool(self.calibrated):
            return torch.fake_quantize_per_tensor_affine(x.float(), self.scale, self.zero_point, 0, UINT8_MAX)
        return x

    def fit(self) -> None:
        """Choose the range from the observed samples: the clipping with the least squared error on a grid.

        (Optimal clipping in the sense of Banner et al. 2019, arXiv 1810.05723, by search instead of a distribution's formula.)
        Raises PolicyFailure for samples that are not finite: no range holds them.
        """
        values = torch.cat(self.samples)
        self.samples = []
        if not bool(values.isfinite().all()):
            raise PolicyFailure("the activations of a quantized network must be finite, but some are NaN or infinite")
        low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
        fractions = torch.tensor(CLIP_FRACTIONS)
        best = float(fractions[_squared_errors(values, low, high, fractions).argmin()])
        scale, zero_point = affine(low * best, high * best)
        self.scale.fill_(scale)
        self.zero_point.fill_(zero_point)
        self.calibrated.fill_(True)


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of uint8 for the range [low, high] with low <= 0 <= high."""
    scale = max((high - low) / UINT8_MAX, TINY)
    return scale, round(-low / scale)


def _squared_errors(values: Tensor, low: float, high: float, fractions: Tensor) -> Tensor:
    """Mean squared rounding error of the values for each fraction of the range [low, high]."""
    scale, zero_point = affine(low, high)
    scales = (scale * fractions).clamp_min(TINY).view(-1, 1)
    rounded = (torch.round(values / scales) + zero_point).clamp_(0, UINT8_MAX).sub_(zero_point).mul_(scales)
    return rounded.sub_(values).square_().mean(1)


def _sample(x: Tensor) -> Tensor:
    """At most SAMPLES / 8 values of a batch, evenly spaced, and the extremes."""
    flat = x.flatten()
    step = -(-flat.numel() // (SAMPLES // 8)) | 1  # odd, so that it does not fall on the same column of every row
    return torch.cat([flat[::step], flat.min().view(1), flat.max().view(1)])


def fake_quantize(student: fx.GraphModule, quant: QuantSpec) -> fx.GraphModule:
    """A copy of the student whose layers compute as their bits say. Calibrate it before use."""
    quantized = copy.deepcopy(student)
    quant = _shared_bits(quantized, quant)
    if is_opaque(quantized):
        _quantize_opaque(quantized, quant)
        return quantized
    quant = quant.model_copy(update={"layers": {**quant.layers, **dict.fromkeys(constant_layers(quantized), 32)}})
    held = int8_tensors(quantized, quant.of)
    for node in list(quantized.graph.nodes):
        if kind_of(node, quantized) in ("conv", "linear"):
            name = str(node.target)
            quantized.set_submodule(name, _rounded(quantized.get_submodule(name), quant.of(name), quant.reduced_range))
    for node in list(quantized.graph.nodes):
        if node.name in held:
            readers = [user for user in node.users if held[node.name] != "feeds" or _is_int8_layer(user, quantized, quant)]
            _insert_quantizer(quantized, node, readers)
    quantized.recompile()
    return quantized


def _is_int8_layer(node: fx.Node, module: fx.GraphModule, quant: QuantSpec) -> bool:
    return kind_of(node, module) in ("conv", "linear") and quant.of(str(node.target)) == 8


def _shared_bits(module: nn.Module, quant: QuantSpec) -> QuantSpec:
    """A file holds a weight that several modules share once: they get the most bits that any of them has, float where one is no layer."""
    sharing: dict[int, dict[str, int]] = defaultdict(dict)
    for name, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            sharing[id(parameter)][name] = quant.of(name) if is_layer(part) else 32
    shared = {name: max(bits.values()) for bits in sharing.values() if len(bits) > 1 for name in bits}
    return quant.model_copy(update={"layers": {**quant.layers, **shared}}) if shared else quant


def _insert_quantizer(module: fx.GraphModule, node: fx.Node, readers: Sequence[fx.Node]) -> None:
    """Let these read the rounded values.

    What only moves values keeps its source's quantizer: the same module at both ends, so that a runtime stays in int8.
    """
    source = next((n for n in node.all_input_nodes if n.meta.get("quantizer")), None)
    moves = kind_of(node, module) in MOVERS and source is not None and len(node.all_input_nodes) == 1
    name = source.meta["quantizer"] if moves and source is not None else f"quantizer_{node.name}"
    if not moves:
        module.add_submodule(name, ActivationQuantizer())
    with module.graph.inserting_after(node):
        quantizer = module.graph.call_module(name, (node,))
    quantizer.meta.update({"shape": node.meta.get("shape"), "quantizer": name, "kind": "identity", "relu": None})
    for reader in readers:
        reader.replace_input_with(node, quantizer)


def _rounded(layer: nn.Module, bits: int, reduced_range: bool) -> nn.Module:
    if bits == 32 or isinstance(layer, _Rounded):  # a layer that is called twice is rounded once
        return layer
    if isinstance(layer, nn.Linear):
        return RoundedLinear(layer, bits, reduced_range and bits == 8)
    assert isinstance(layer, Conv)
    return RoundedConv(layer, bits, reduced_range and bits == 8)


class QuantizedInput(nn.Module):
    """A layer of an untraced network behind a quantizer of its input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.quantizer = ActivationQuantizer()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.quantizer(x))

    def __getattr__(self, name: str) -> Any:
        """The network's own code may ask the layer for its sizes or its type."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":
                raise
            return getattr(self.layer, name)


def float_state(quantized: nn.Module) -> dict[str, Any]:
    """The state of a network with fake quantizers by the names that it has without."""
    inside = {f"{name}.layer.": f"{name}." for name, module in quantized.named_modules() if isinstance(module, QuantizedInput)}
    state = {}
    for name, value in quantized.state_dict().items():
        wrapped = next((prefix for prefix in inside if name.startswith(prefix)), None)
        state[name if wrapped is None else inside[wrapped] + name.removeprefix(wrapped)] = value
    return state


def _quantize_opaque(module: fx.GraphModule, quant: QuantSpec) -> None:
    layers = [(name, leaf) for name, leaf in leaves(module) if is_layer(leaf)]
    for name, layer in layers:
        bits = quant.of(name)
        rounded = _rounded(layer, bits, quant.reduced_range)
        module.set_submodule(name, QuantizedInput(rounded) if bits == 8 else rounded)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Set the range of every activation quantizer from what passes through it on these inputs, in float."""
    quantizers = [m for m in model.modules() if isinstance(m, ActivationQuantizer)]
    if not quantizers:
        return
    model.eval()
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        for batch in batches:
            call_network(model, batch)
    finally:
        for quantizer in quantizers:
            quantizer.observing = False
    for quantizer in quantizers:
        if quantizer.samples:
            quantizer.fit()


@torch.no_grad()
def snap_biases(student: fx.GraphModule) -> fx.GraphModule:
    """Move the biases of int8 layers to values that a file can hold: multiples of input scale x weight scale (in place).

    An int8 layer adds its bias in the accumulator's unit. Rounded at export only, that is by far the largest difference between file and
    student; once training is over the student can take the rounded biases itself. With a batch norm it is the folded bias that moves.
    """
    modules = dict(student.named_modules())
    for node in student.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        source = modules.get(str(node.all_input_nodes[0].target)) if node.all_input_nodes else None
        if not isinstance(layer, _Rounded) or layer.bits != 8 or not isinstance(source, ActivationQuantizer):
            continue
        norm = fused(node, student).norm
        _snap(layer, modules[str(norm.target)] if norm is not None else None, float(source.scale))
    return student


def _snap(layer: _Rounded, norm: Any, input_scale: float) -> None:
    unit = input_scale * weight_scale(layer.weight, largest_int(8, layer.reduced_range)).double()
    bias = layer.bias.double() if layer.bias is not None else torch.zeros_like(unit)
    held = layer.bias
    if norm is not None:
        factor = (norm.weight if norm.weight is not None else 1.0) / (norm.running_var.double() + norm.eps).sqrt()
        bias = (bias - norm.running_mean) * factor + (norm.bias if norm.bias is not None else 0.0)
        unit, held = unit * factor.abs(), norm.bias
    unit = unit.clamp_min(TINY**2)
    if held is not None:
        held += (torch.round(bias / unit) * unit - bias).to(held.dtype)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of the model computes in int8."""
    return any(isinstance(m, ActivationQuantizer) for m in model.modules())
