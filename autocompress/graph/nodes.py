"""What each node of a traced network is, which nodes a runtime fuses into one operator, and which run in int8.

Used by the tracer (workloads), by quantization (where fake quantizers go) and by the exporter, so that all three agree.
A traced network is a `torch.fx.GraphModule` of ATen's operators, and of modules of torch.nn where they hold weights (see `exported`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn

from autocompress.workload import OperatorKind

NodeKind = OperatorKind | Literal["input", "reshape", "identity", "output"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
Weighted = Conv | nn.Linear
"""Layers whose channels and bits are searched."""
_LAYERS: dict[type, NodeKind] = {nn.Conv1d: "conv", nn.Conv2d: "conv", nn.Conv3d: "conv", nn.Linear: "linear"}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_MODULES: tuple[tuple[tuple[type[nn.Module], ...], NodeKind], ...] = (
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "norm"),
    ((nn.Dropout, nn.Dropout2d, nn.Identity), "identity"),
    ((nn.AdaptiveMaxPool2d,), "maxpool"),
    ((nn.LayerNorm,), "layernorm"),
    ((nn.GroupNorm,), "groupnorm"),
)
TRANSPOSED: Mapping[str, tuple[int | str, int | str]] = {
    "transpose": ("dim0", "dim1"), "swapdims": ("dim0", "dim1"), "swapaxes": ("axis0", "axis1"), "t": (0, -1), "mT": (-2, -1),
    "adjoint": (-2, -1),
}  # fmt: skip
"""What lets two axes change places: which, or the names of the arguments that say it."""
TURNS = ("permute", "movedim", "moveaxis", *TRANSPOSED)
"""What lets axes change places."""
CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
"""As functions, whose weight is an argument."""
TRANSPOSED_CONVOLUTIONS = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
UPSAMPLING = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d", "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d",
    "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Recurrent layers, and their gates, which are so many rows of the weights for each hidden unit."""
_KINDS: dict[NodeKind, tuple[str, ...]] = {
    "add": ("add",),
    "mul": ("mul",),
    "activation": (
        "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish",
    ),
    "maxpool": ("max_pool2d",),
    "avgpool": ("avg_pool2d", "adaptive_avg_pool2d", "mean"),
    "concat": ("cat",),
    "pad": ("pad", "constant_pad_nd"),
    "slice": ("slice",),
    "reshape": ("reshape", "reshape_as", "flatten", "unflatten"),
    "identity": ("detach",),
    "matmul": ("matmul", "bmm", "mm"),
    "softmax": ("softmax", "log_softmax"),
    "attention": ("scaled_dot_product_attention",),
    "layernorm": ("rms_norm",),
    "groupnorm": ("instance_norm",),
    "filter": (*CONVOLUTIONS, "linear"),
    "convtranspose": TRANSPOSED_CONVOLUTIONS,
    "recurrent": (*RECURRENT,),
    "einsum": ("einsum",),
    "resize": UPSAMPLING,
    "transpose": TURNS,
    "move": (
        "roll", "flip", "repeat", "tile", "repeat_interleave", "stack", "select", "index", "index_select", "gather", "embedding",
        "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "im2col", "col2im", "unfold", "grid_sampler",
    ),
    "other": (
        "unsqueeze", "squeeze", "expand", "expand_as", "to", "type_as", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
        "new_full", "zeros", "ones", "full", "arange", "alpha_dropout", "feature_alpha_dropout",
    ),
}  # fmt: skip
"""Operators of ATen by what they are here. "other" costs nothing; what is not listed is "elementwise"."""
_OPERATORS: dict[str, NodeKind] = {name: kind for kind, names in _KINDS.items() for name in names}
HANDING_ON = ("reshape", "identity", "transpose", "add", "mul", "activation", "elementwise", "softmax", "other")
"""Kinds of which one that reads a single value makes something as fine as that."""
FOLLOWERS = ("add", "maxpool", "avgpool", "concat", "pad", "slice", "reshape", "identity")
"""Kinds that a runtime keeps in int8 where all their inputs are."""
SIX = (0.0, 6.0)
"""Limits of the hard tanh that is a ReLU6."""
ATEN = "aten::"


def fed_nodes(root: fx.GraphModule) -> set[fx.Node]:
    """What depends on an input, other than on how many there are; the rest is one constant, wherever an exporter computes it."""
    fed: set[fx.Node] = set()
    for node in root.graph.nodes:
        if node.op == "placeholder" or not (fed.isdisjoint(node.all_input_nodes) or is_about_sizes(node)):
            fed.add(node)
    return fed


def constant_layers(root: fx.GraphModule) -> set[str]:
    """Layers that read no input, as those of positions do."""
    fed = fed_nodes(root)
    return {str(node.target) for node in root.graph.nodes if kind_of(node, root) in ("conv", "linear") and node not in fed}


def drop_unread(graph: fx.Graph) -> None:
    """Remove nodes that nobody reads. torch keeps some of those that may draw random numbers, as attention may."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def module_of(node: fx.Node, root: nn.Module) -> nn.Module | None:
    """The leaf module that the node calls, or None."""
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def kind_of(node: fx.Node, root: nn.Module) -> NodeKind:
    """What the node computes, in the vocabulary of `NodeKind`; the tracer keeps the answer in `meta["kind"]`."""
    known: NodeKind | None = node.meta.get("kind")
    return known if known is not None else _classify(node, root)


def annotate_kinds(root: fx.GraphModule) -> None:
    """Keep every node's kind with the node, so that it is looked up once."""
    calls = Counter(str(node.target) for node in root.graph.nodes if node.op == "call_module")
    for node in root.graph.nodes:
        node.meta["kind"] = _classify(node, root)
        node.meta["relu"] = _relu_name(node)
        node.meta["is_folded_norm"] = _is_folded(node, root, calls)


def is_layer(module: nn.Module | None) -> bool:
    """Exactly a convolution or linear layer of torch.nn: a subclass may compute its weights in another way, or never be called."""
    return type(module) in _LAYERS


def is_norm(module: nn.Module | None) -> bool:
    """Whether this is a norm of torch.nn, with weights or without."""
    return isinstance(module, _NORMS)


def is_leaf(module: nn.Module) -> bool:
    """Whether a network calls this module as one operator: what torch.nn holds, but no container."""
    own = type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and type(module) is not nn.Module
    return own and not isinstance(module, _CONTAINERS)


def leaves(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of all leaves, each once; what is inside a leaf is not listed."""
    leaf: str | None = None
    for name, module in root.named_modules(prefix=prefix):  # what is inside a module follows it
        if leaf is not None and (not leaf or name.startswith(f"{leaf}.")):
            continue
        leaf = name if is_leaf(module) else None
        if leaf is not None:
            yield name, module


def _classify(node: fx.Node, root: nn.Module) -> NodeKind:
    if node.op == "placeholder":
        return "input"
    if node.op == "output":
        return "output"
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        known = _LAYERS.get(type(module)) or next((kind for types, kind in _MODULES if isinstance(module, types)), None)
        return known or "other"
    if not isinstance(node.target, torch._ops.OpOverload) or is_about_sizes(node):
        return "other"
    kind = _OPERATORS.get(name_of(node), "elementwise")
    if arguments(node).get("alpha", 1) != 1:
        return "elementwise"
    return "move" if kind == "pad" and not _pads_zeros_or_copies(node) else kind


def _pads_zeros_or_copies(node: fx.Node) -> bool:
    """Whether what it adds is within the range of its input, zero included: an infinity in front of a pool of maxima is not."""
    given = arguments(node)
    return given.get("mode", "constant") != "constant" or given.get("value") in (None, 0, 0.0)


def name_of(node: fx.Node) -> str:
    """The name of the function that the node calls, without ATen's own prefix and overloads; empty where it calls none."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target._schema.name).removeprefix(ATEN)
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def arguments(node: fx.Node) -> dict[str, Any]:
    """What an operator of ATen is called with, by the names of its schema, defaults included; empty for any other node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {}
    expected = node.target._schema.arguments
    defaults = {a.name: a.default_value for a in expected if a.has_default_value()}
    return defaults | dict(zip((a.name for a in expected), node.args, strict=False)) | node.kwargs


def pad_amounts(node: fx.Node) -> dict[int, tuple[int, int]] | None:
    """How much a constant zero padding adds in front of and behind each axis, or None."""
    given = arguments(node)
    amounts, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value")
    if amounts is None or mode != "constant" or value not in (None, 0, 0.0) or not all(isinstance(a, int) for a in amounts):
        return None
    rank = len(node.meta["shape"])
    padded = {rank - 1 - axis: (amounts[2 * axis], amounts[2 * axis + 1]) for axis in range(len(amounts) // 2)}
    return {axis: padded.get(axis, (0, 0)) for axis in range(rank)}


def slice_bounds(node: fx.Node, size: int) -> tuple[int, int] | None:
    """Where a slice of an axis of so many entries begins and ends; None for one that skips entries, or whose bounds are computed."""
    given = arguments(node)
    start, end = given["start"], given["end"]
    if given["step"] != 1 or not all(bound is None or isinstance(bound, int) for bound in (start, end)):
        return None
    first, last, _ = slice(start, end).indices(size)
    return first, max(first, last)


def value_of(node: fx.Node, root: nn.Module) -> Any:
    """What a node that reads an attribute of the network reads."""
    value: Any = root
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def relu_of(node: fx.Node) -> str | None:
    """`"relu"` or `"relu6"` when the node is an activation that int8 kernels absorb, else None."""
    return node.meta["relu"] if "relu" in node.meta else _relu_name(node)


def _relu_name(node: fx.Node) -> str | None:
    name = name_of(node)
    if name == "hardtanh":
        given = arguments(node)
        return "relu6" if (given["min_val"], given["max_val"]) == SIX else None
    return name if name in ("relu", "relu6") else None


def operands(node: fx.Node) -> list[fx.Node]:
    """What a node reads, as often as it does: `x + x` reads it twice, where `all_input_nodes` names it once."""
    found: list[fx.Node] = []

    def note(source: fx.Node) -> fx.Node:
        found.append(source)
        return source

    fx.node.map_arg((node.args, node.kwargs), note)
    return found


def is_about_sizes(node: fx.Node) -> bool:
    """Whether the value is a number that follows from the size of the batch."""
    return "shape" not in node.meta and "shapes" not in node.meta and node.op == "call_function"


def channel_axis(node: fx.Node, root: nn.Module) -> int:
    """Axis of the channels that a layer or norm makes."""
    return len(node.meta["shape"]) - 1 if kind_of(node, root) == "linear" else 1


def normalized_axes(node: fx.Node, root: nn.Module) -> range:
    """Axes over which a layer norm, or a norm by the root mean square, normalises together: the last ones."""
    norm, rank = module_of(node, root), len(node.meta["shape"])
    shape = norm.normalized_shape if isinstance(norm, nn.LayerNorm) else arguments(node)["normalized_shape"]
    return range(rank - len(shape), rank)


def reduced_axes(node: fx.Node) -> list[int]:
    """Axes of its input that a mean, a sum or the like reduces to one value."""
    dims, rank = arguments(node).get("dim"), len(node.all_input_nodes[0].meta["shape"])
    return sorted({axis % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank))})


def is_depthwise(layer: nn.Module | None) -> bool:
    """Whether this is a convolution of each channel by itself."""
    return isinstance(layer, Conv) and 1 < layer.groups == layer.in_channels == layer.out_channels


def is_depthwise_call(node: fx.Node) -> bool:
    """Whether this function is a convolution, or a transposed one, of each channel by itself."""
    given = arguments(node)
    filters, channels, groups = given["weight"].meta["shape"], given["input"].meta["shape"][1], given["groups"]
    return isinstance(groups, int) and 1 < groups == channels == filters[0] and filters[1] == 1


def follows_batch(module: nn.Module | None) -> bool:
    """Whether this is a batch norm without running statistics: what it makes of an input depends on the others of its batch."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is None


def is_folded_norm(node: fx.Node) -> bool:
    """Whether the node is a batch norm that becomes a part of the layer before it."""
    return bool(node.meta.get("is_folded_norm"))


def _is_folded(node: fx.Node, root: nn.Module, calls: Mapping[str, int]) -> bool:
    """Unless one of both is called elsewhere too; a linear layer's norm may average over another axis than that of its channels."""
    source = node.all_input_nodes[0] if node.all_input_nodes else node
    if any(calls.get(str(each.target), 0) > 1 for each in (source, node)):
        return False
    same_axis = kind_of(source, root) != "linear" or len(source.meta.get("shape", ())) == 2
    return kind_of(node, root) == "norm" and same_axis and not follows_batch(module_of(node, root))


@dataclass(frozen=True)
class Fused:
    """A head node with the nodes that a runtime folds into it: batch norm, then ReLU."""

    head: fx.Node
    norm: fx.Node | None = None
    relu: fx.Node | None = None

    @property
    def tail(self) -> fx.Node:
        """The node whose value leaves the fused operator."""
        return self.relu or self.norm or self.head


def fused(head: fx.Node, root: nn.Module) -> Fused:
    """Follow single-use edges: conv/linear -> batch norm -> ReLU; add -> ReLU."""
    kind, norm, last = kind_of(head, root), None, head
    if kind in ("conv", "linear"):
        user = _only_user(last)
        if user is not None and is_folded_norm(user):
            norm = last = user
    if kind in ("conv", "linear", "add"):
        user = _only_user(last)
        if user is not None and relu_of(user):
            return Fused(head, norm, user)
    return Fused(head, norm)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def int8_tensors(root: fx.GraphModule, bits_of: Callable[[str], int]) -> dict[str, str]:
    """Names of nodes whose value is held in int8, with the reason (`"layer"`, `"follows"` or `"feeds"`).

    The value of a fused convolution or linear layer with 8 bits is int8 (at the tail of the fusion), except of the one
    that makes the network's output. Adds, pools, concats, pads, slices and reshapes stay in int8 when all their inputs
    are. What feeds an 8-bit layer from float32 is quantized for these layers alone ("feeds"): whatever else reads it reads the float.

    Args:
        bits_of: layer name (module path) -> bits of the policy.
    """
    held: dict[str, str] = {}
    inner = _inner_nodes(root)
    for node in root.graph.nodes:
        kind = kind_of(node, root)
        if kind in ("conv", "linear") and bits_of(str(node.target)) == 8:
            tail = fused(node, root).tail
            if not _reaches_output_only(tail, root):
                held[tail.name] = "layer"
        elif _is_tensor(node) and kind in FOLLOWERS and node.name not in inner:
            sources = [source for source in node.all_input_nodes if _is_tensor(source)]
            tail = fused(node, root).tail
            if sources and all(source.name in held for source in sources) and not _reaches_output_only(tail, root):
                held[tail.name] = "follows"
    for node in root.graph.nodes:
        if kind_of(node, root) in ("conv", "linear") and bits_of(str(node.target)) == 8:
            held.setdefault(node.all_input_nodes[0].name, "feeds")
    return held


def _inner_nodes(root: fx.GraphModule) -> set[str]:
    inner: set[str] = set()
    for node in root.graph.nodes:
        if kind_of(node, root) in ("conv", "linear", "add"):
            chain = fused(node, root)
            inner |= {part.name for part in (chain.norm, chain.relu) if part is not None}
    return inner


def _is_tensor(node: fx.Node) -> bool:
    return "shape" in node.meta


def _reaches_output_only(node: fx.Node, root: nn.Module) -> bool:
    """Whether the network's output is all that becomes of a value, perhaps in another shape, unit or function of each number."""
    return all(kind_of(user, root) == "output" or (hands_on(user, root) and _reaches_output_only(user, root)) for user in node.users)


def hands_on(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node is a function of one value of the network, number by number but for their places: what it says is as fine as that."""
    kind = kind_of(node, root)
    if not _is_tensor(node) or kind not in HANDING_ON or (kind == "other" and node.op == "call_module"):
        return False
    return sum(operand.op != "get_attr" for operand in operands(node) if _is_tensor(operand)) == 1
