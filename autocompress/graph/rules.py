"""What becomes of channel identity in each operator of ATen.

A rule gives the layout of a node's value from those of what it reads, and says in passing which ids are the same, and which cannot change.
It raises NotUnderstood for what it does not cover: then everything that the node reads is frozen.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from torch import fx

from autocompress.graph.channels import Channels, Ids, Layout
from autocompress.graph.flow import PRODUCT, STATISTIC, Flow, NotUnderstood, axis_of, title
from autocompress.graph.nodes import TURNS, UPSAMPLING, arguments, is_about_sizes, name_of, pad_amounts, reduced_axes, slice_bounds
from autocompress.graph.reshaping import moves, split_ids, tied
from autocompress.graph.weighted_rules import WEIGHTED, Rule, of_attribute, of_module, spatial

_SAME = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish", "selu", "celu",
    "softplus", "softsign", "hardshrink", "softshrink", "threshold", "log_sigmoid", "exp", "exp2", "expm1",
    "square", "neg", "negative", "abs", "absolute", "sign", "erf", "sin", "cos", "tan", "atan", "sinh", "cosh",
    "floor", "ceil", "round", "clamp", "clamp_min", "clamp_max", "clip", "nan_to_num", "isnan", "logical_not",
    "detach", "to", "type_as", "zeros_like", "ones_like", "full_like",
)  # fmt: skip
_PARTIAL = ("log", "log1p", "log2", "log10", "sqrt", "rsqrt", "reciprocal", "pow")
"""Functions that are not finite for every number."""
_JOIN = (
    "add", "sub", "subtract", "rsub", "mul", "multiply", "div", "divide", "true_divide", "floor_divide", "remainder", "maximum", "minimum",
    "where", "masked_fill", "addcmul", "addcdiv", "lerp", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
)  # fmt: skip
_SPATIAL = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "max_pool1d_with_indices",
    "max_pool2d_with_indices", "max_pool3d_with_indices", *UPSAMPLING,
)  # fmt: skip
REDUCTIONS = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm")
"""What makes one value of all entries along an axis."""


def propagate(module: fx.GraphModule) -> Channels:
    """Follow channel identity through the network. Nodes need `meta["shape"]`; ids are those of a batch of the example's size."""
    channels = Channels()
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    flow = Flow(module, channels, {name for name, count in calls.items() if count > 1})
    for node in module.graph.nodes:
        channels.layouts[node.name] = _layout(flow, node)
    return channels


def _layout(flow: Flow, node: fx.Node) -> Layout:
    """The layout of a node's value; without axes for what is no tensor with channels."""
    if node.op == "output":
        flow.freeze_all(node, "the network's output")
    if node.op in ("output", "placeholder") or is_about_sizes(node):
        return {}
    if node.op == "get_attr":
        return of_attribute(flow, node)
    rule = of_module if node.op == "call_module" else _RULES.get(name_of(node), _unknown)
    try:
        return rule(flow, node)
    except NotUnderstood as why:
        line = node.meta.get("line")
        flow.freeze_all(node, (str(why) or f"{title(node)} is not understood") + (f" ({line})" if line else ""))
        return {}


def _unknown(_: Flow, __: fx.Node) -> Layout:
    raise NotUnderstood


def _same(flow: Flow, node: fx.Node) -> Layout:
    first, *others = node.all_input_nodes
    if any("shape" in other.meta for other in others):
        raise NotUnderstood
    return flow.known(first)


def _partial(flow: Flow, node: fx.Node) -> Layout:
    """What is added may be zero or negative, where these have no value: such channels are not grown."""
    layout, power = _same(flow, node), arguments(node).get("exponent")
    is_whole = isinstance(power, (int, float)) and power >= 0 and power == int(power)
    for ids in () if is_whole else layout.values():
        flow.channels.play(node.name, STATISTIC, ids)
    return layout


def _first(flow: Flow, node: fx.Node) -> Layout:
    return flow.known(node.all_input_nodes[0])


def _join(flow: Flow, node: fx.Node) -> Layout:
    tensors = [source for source in node.all_input_nodes if "shape" in source.meta]
    layout = flow.joined(tensors, node.meta["shape"], range(len(node.meta["shape"])), title(node))
    streams = [source for source in tensors if source.op != "get_attr"]
    if name_of(node) == "add" and len(streams) > 1:
        for ids in layout.values():
            flow.channels.play(node.name, "add", ids)
    return layout


def _glu(flow: Flow, node: fx.Node) -> Layout:
    source, axis = flow.only(node), axis_of(node, "dim")
    if axis not in source:
        return source
    first, second = np.split(source[axis], 2)
    flow.channels.cut(source[axis], [len(first)])
    flow.channels.unify(first, second)
    return {**source, axis: first}


def _softmax(flow: Flow, node: fx.Node) -> Layout:
    source, axis = flow.only(node), axis_of(node, "dim")
    flow.freeze_axes(source, [axis], f"{title(node)} adds over them")
    return source


def _reduce(flow: Flow, node: fx.Node) -> Layout:
    """In a student, one value of all entries that are left."""
    source, gone, given = flow.only(node), reduced_axes(node), arguments(node)
    if name_of(node) in ("var", "std") and given.get("unbiased", given.get("correction", 1)) not in (False, 0):
        flow.freeze_axes(source, gone, f"{title(node)} divides by less than their number, which may be nothing")
    for axis in gone:
        if axis in source:
            flow.channels.play(node.name, STATISTIC, source[axis])
    if given.get("keepdim"):
        return {axis: ids for axis, ids in source.items() if axis not in gone}
    return {axis - sum(d < axis for d in gone): ids for axis, ids in source.items() if axis not in gone}


def _along(flow: Flow, node: fx.Node) -> Layout:
    source, given = flow.only(node), arguments(node)
    rank = len(node.meta["shape"])
    flow.freeze_axes(source, [axis % rank for axis in given["dims"] or range(rank)], f"{title(node)} moves along them")
    return source


def _concat(flow: Flow, node: fx.Node) -> Layout:
    tensors = [tensor for tensor in arguments(node)["tensors"] if isinstance(tensor, fx.Node)]
    if len(tensors) != len(arguments(node)["tensors"]) or len({len(t.meta["shape"]) for t in tensors}) != 1:
        raise NotUnderstood
    axis = axis_of(node, "dim", of=len(node.meta["shape"]))
    shape = node.meta["shape"]
    layout = flow.joined(tensors, shape, [other for other in range(len(shape)) if other != axis], title(node))
    parts = [flow.known(tensor).get(axis) for tensor in tensors]
    if any(part is not None for part in parts):
        layout[axis] = np.concatenate([
            part if part is not None else flow.fixed(tensor.meta["shape"][axis]) for part, tensor in zip(parts, tensors, strict=True)
        ])  # fmt: skip
    return layout


def _pad(flow: Flow, node: fx.Node) -> Layout:
    source, amounts = dict(flow.only(node)), pad_amounts(node)
    rank = len(node.meta["shape"])
    if amounts is None:  # with something else than zeros, as reflection or numbers
        given = arguments(node)["pad"]
        axes = [rank - 1 - axis for axis in range(len(given) // 2) if any(given[2 * axis : 2 * axis + 2])]
        flow.freeze_axes(source, axes, f"{title(node)} adds to them")
        return {axis: ids for axis, ids in source.items() if axis not in axes}
    for axis in list(source):
        front, back = amounts[axis]
        if front < 0 or back < 0:
            raise NotUnderstood
        parts = [flow.channels.fresh(front), source[axis], flow.channels.fresh(back)]
        for part in (parts[0], parts[2]):
            if len(part):
                flow.channels.play(node.name, "pad", part)
        source[axis] = np.concatenate(parts)
    return source


def _slice(flow: Flow, node: fx.Node) -> Layout:
    source, axis = flow.only(node), axis_of(node, "dim")
    if axis not in source:
        return source
    bounds = slice_bounds(node, len(source[axis]))
    if bounds is None:
        raise NotUnderstood
    first, last = bounds
    flow.channels.cut(source[axis], (first, last))
    return {**source, axis: source[axis][first:last]}


def _select(flow: Flow, node: fx.Node) -> Layout:
    source, axis = flow.only(node), axis_of(node, "dim")
    flow.freeze_axes(source, [axis], f"{title(node)} takes one of them")
    return {other - (other > axis): ids for other, ids in source.items() if other != axis}


def _split(flow: Flow, node: fx.Node) -> Layout:
    source, axis = flow.only(node), axis_of(node, "dim")
    shapes = node.meta["shapes"]
    if name_of(node) == "unbind":
        flow.freeze_axes(source, [axis], f"{title(node)} takes them apart")
        layout = {other - (other > axis): ids for other, ids in source.items() if other != axis}
        flow.parts[node.name] = [layout] * len(shapes)
        return {}
    ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
    if axis in source:
        flow.channels.cut(source[axis], ends.tolist())
    own = np.split(source[axis], ends) if axis in source else [None] * len(shapes)
    rest = {other: ids for other, ids in source.items() if other != axis}
    flow.parts[node.name] = [rest if part is None else {**rest, axis: part} for part in own]
    return {}


def _part(flow: Flow, node: fx.Node) -> Layout:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if source.name not in flow.parts or not isinstance(index, int):
        raise NotUnderstood
    return flow.parts[source.name][index]


def _repeat(flow: Flow, node: fx.Node) -> Layout:
    source, given = dict(flow.only(node)), arguments(node)
    if not isinstance(given.get("repeats"), int) or not isinstance(given.get("dim"), int):
        raise NotUnderstood
    axis = axis_of(node, "dim")
    return {**source, axis: np.repeat(source[axis], given["repeats"])} if axis in source else source


def _tile(flow: Flow, node: fx.Node) -> Layout:
    """The whole tensor again and again, along any of its axes and along new ones in front."""
    source, given, rank = flow.only(node), arguments(node), len(node.meta["shape"])
    times = list(given["repeats"] if "repeats" in given else given["dims"])
    times = [1] * (rank - len(times)) + times
    shift = rank - len(node.all_input_nodes[0].meta["shape"])
    if not all(isinstance(times[axis + shift], int) for axis in source):
        raise NotUnderstood
    return {axis + shift: np.tile(ids, times[axis + shift]) for axis, ids in source.items()}


def _stack(flow: Flow, node: fx.Node) -> Layout:
    """The tensors are the entries of a new axis."""
    tensors = [tensor for tensor in arguments(node)["tensors"] if isinstance(tensor, fx.Node)]
    shape, axis = tensors[0].meta["shape"], axis_of(node, "dim", of=len(node.meta["shape"]))
    layout = flow.joined(tensors, shape, range(len(shape)), title(node))
    return {other + (other >= axis): ids for other, ids in layout.items()}


def _into_space(flow: Flow, node: fx.Node) -> Layout:
    """A channel's values at one position are those of several channels before, which go together."""
    source, rank, factor = flow.only(node), len(node.meta["shape"]), arguments(node)["upscale_factor"]
    flow.freeze_axes(source, [rank - 2, rank - 1], f"{title(node)} spreads over them")
    return {axis: tied(ids, factor**2, flow.channels) if axis == rank - 3 else ids for axis, ids in source.items() if axis <= rank - 3}


def _out_of_space(flow: Flow, node: fx.Node) -> Layout:
    """Several channels for one."""
    source, rank, factor = flow.only(node), len(node.meta["shape"]), arguments(node)["downscale_factor"]
    flow.freeze_axes(source, [rank - 2, rank - 1], f"{title(node)} takes them apart")
    return {axis: np.repeat(ids, factor**2) if axis == rank - 3 else ids for axis, ids in source.items() if axis <= rank - 3}


def _shuffle(flow: Flow, node: fx.Node) -> Layout:
    """Groups lose the same places, so that they stay of one size."""
    source = flow.only(node)
    if 1 not in source:
        return source
    rows = source[1].reshape(arguments(node)["groups"], -1)
    flow.channels.unify(rows, rows[:1])
    return {**source, 1: rows.T.ravel()}


def _expand(flow: Flow, node: fx.Node) -> Layout:
    source, before = flow.only(node), node.all_input_nodes[0].meta["shape"]
    shift = len(node.meta["shape"]) - len(before)
    flow.freeze_axes(source, [axis for axis in source if before[axis] == 1], f"{title(node)} repeats it")
    return {axis + shift: ids for axis, ids in source.items() if before[axis] != 1}


def _expand_as(flow: Flow, node: fx.Node) -> Layout:
    source, other = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node.all_input_nodes[0],) * 2
    return flow.joined([source, other], node.meta["shape"], range(len(node.meta["shape"])), title(node))


def _move(flow: Flow, node: fx.Node) -> Layout:
    source = flow.only(node)
    where = moves(node)
    if where is None:
        raise NotUnderstood
    flow.freeze_axes(source, [axis for axis in source if axis not in where], f"{title(node)} leaves them out")
    return {where[axis]: ids for axis, ids in source.items() if axis in where}


def _reshape(flow: Flow, node: fx.Node) -> Layout:
    source, *like = node.all_input_nodes
    layout = split_ids(node, flow.known(source), flow.channels)
    for other in like if name_of(node) == "reshape_as" else ():
        for axis, size in enumerate(node.meta["shape"]):
            pair = [ids for ids in (layout.get(axis), flow.known(other).get(axis)) if ids is not None]
            flow.joined_ids(pair, 2 if size > 1 else len(pair), title(node))
    return layout


def _matmul(flow: Flow, node: fx.Node) -> Layout:
    first, second = (arguments(node)[name] for name in (("self", "other") if name_of(node) == "matmul" else ("self", "mat2")))
    rank, ranks = len(node.meta["shape"]), (len(first.meta["shape"]), len(second.meta["shape"]))
    if min(ranks) < 2:
        raise NotUnderstood
    rows, columns = flow.known(first), flow.known(second)
    flow.contract(rows.get(ranks[0] - 1), columns.get(ranks[1] - 2), node)
    layout = flow.joined([first, second], node.meta["shape"], range(rank - 2), title(node))
    if ranks[0] - 2 in rows:
        layout[rank - 2] = rows[ranks[0] - 2]
    if ranks[1] - 1 in columns:
        layout[rank - 1] = columns[ranks[1] - 1]
    return layout


def _attention(flow: Flow, node: fx.Node) -> Layout:
    """softmax(Q K^T / sqrt(size of a head)) V of batch x heads x tokens x size (Vaswani et al. 2017, arXiv 1706.03762)."""
    given = arguments(node)
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    rank = len(node.meta["shape"])
    if any(len(t.meta["shape"]) != rank for t in (query, key, value)):
        raise NotUnderstood
    for tensor in (query, key):
        flow.freeze_axes(flow.known(tensor), [rank - 1], f"{title(node)} scales by their number")
    for tensor in (key, value):
        flow.freeze_axes(flow.known(tensor), [rank - 2], f"{title(node)} adds over them")
    tensors = [query, key, value, *([mask] if isinstance(mask, fx.Node) else [])]
    layout = flow.joined(tensors, node.meta["shape"], range(rank - 2), title(node))
    for tensor, axis in ((query, rank - 2), (value, rank - 1)):
        if axis in flow.known(tensor):
            layout[axis] = flow.known(tensor)[axis]
    return layout


def _einsum(flow: Flow, node: fx.Node) -> Layout:
    given = arguments(node)
    equation, tensors = given["equation"].replace(" ", ""), list(given["tensors"])
    if "." in equation or "->" not in equation:
        raise NotUnderstood
    terms, result = equation.split("->")
    found: dict[str, list[Ids]] = {}
    places = [(label, axis, tensor) for term, tensor in zip(terms.split(","), tensors, strict=True) for axis, label in enumerate(term)]
    for label, axis, tensor in places:
        if axis in flow.known(tensor):
            found.setdefault(label, []).append(flow.known(tensor)[axis])
    for label, known in found.items():
        flow.channels.play(node.name, PRODUCT, known[0])
        flow.joined_ids(known, sum(label == other for other, _, _ in places), title(node))
    return {axis: found[label][0] for axis, label in enumerate(result) if label in found}


_RULES: dict[str, Rule] = WEIGHTED | {
    name: rule
    for rule, names in (
        (_same, _SAME), (_partial, _PARTIAL), (_join, _JOIN), (spatial, _SPATIAL), (_reduce, REDUCTIONS),
        (_softmax, ("softmax", "_softmax", "log_softmax", "cumsum", "cumprod")),
        (_reshape, ("reshape", "reshape_as", "flatten", "unflatten")),
        (_move, (*TURNS, "unsqueeze", "squeeze")), (_along, ("roll", "flip")),
        (_expand, ("expand",)), (_expand_as, ("expand_as",)), (_repeat, ("repeat_interleave",)), (_tile, ("repeat", "tile")),
        (_split, ("split", "split_with_sizes", "chunk", "unbind")), (_part, ("getitem",)), (_concat, ("cat",)), (_stack, ("stack",)),
        (_into_space, ("pixel_shuffle",)), (_out_of_space, ("pixel_unshuffle",)), (_shuffle, ("channel_shuffle",)), (_slice, ("slice",)),
        (_select, ("select",)), (_pad, ("pad", "constant_pad_nd")), (_matmul, ("matmul", "bmm", "mm")), (_glu, ("glu",)),
        (_attention, ("scaled_dot_product_attention",)), (_einsum, ("einsum",)), (_first, ("beside",)),
    )
    for name in names
}  # fmt: skip
