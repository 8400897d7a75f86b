"""What becomes of channel identity in each operator of ATen, and in the modules that hold weights.

A rule gives the layout of a node's value from those of what it reads, and says in passing which ids are the same, and which cannot change.
It raises NotUnderstood for what it does not cover: then everything that the node reads is frozen.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocompress.graph.channels import Channels, Ids, Layout
from autocompress.graph.nodes import Conv, arguments, is_about_sizes, is_depthwise, module_of, name_of, value_of
from autocompress.graph.reshaping import Move, moves, split_ids

LAST = 2**62
"""Where a slice ends that is open."""

_SAME = (
    "relu", "relu6", "hardtanh", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "leaky_relu", "elu", "tanh", "mish", "selu", "celu",
    "softplus", "log_sigmoid", "exp", "log", "sqrt", "rsqrt", "square", "neg", "abs", "erf", "sin", "cos", "reciprocal", "clamp",
    "clamp_min", "clamp_max", "pow", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as", "lift_fresh_copy",
)  # fmt: skip
_JOIN = ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "masked_fill", "addcmul", "lerp")
_SPATIAL = (
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
    "adaptive_avg_pool3d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d",
)  # fmt: skip
_REDUCE = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp")
_NEW = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full")
_RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Gates, and so rows of the weights, of each hidden unit."""


PRODUCT = "product"
"""Of channels that are multiplied with each other: what is added would not be multiplied with zeros."""


class NotUnderstood(Exception):
    """What a node does to channels is not covered; the message says in what way, or is empty."""


def propagate(module: fx.GraphModule) -> Channels:
    """Follow channel identity through the network. Nodes need `meta["shape"]`; ids are those of a batch of the example's size."""
    channels = Channels()
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    rules = _Rules(module, channels, {name for name, count in calls.items() if count > 1})
    for node in module.graph.nodes:
        channels.layouts[node.name] = rules.of(node)
    return channels


class _Rules:
    def __init__(self, module: fx.GraphModule, channels: Channels, shared: set[str]) -> None:
        self._module = module
        self._channels = channels
        self._shared = shared
        self._parts: dict[str, list[Layout]] = {}
        """Layouts of the tensors that a node with several gives."""
        self._rules: dict[str, Callable[[fx.Node], Layout]] = {
            name: rule
            for rule, names in (
                (self._same, _SAME), (self._join, _JOIN), (self._spatial, _SPATIAL), (self._reduce, _REDUCE), (self._new, _NEW),
                (self._softmax, ("softmax", "_softmax", "log_softmax")), (self._prelu, ("prelu",)), (self._glu, ("glu",)),
                (self._reshape, ("view", "reshape", "flatten", "unflatten", "reshape_as", "view_as")),
                (self._move, ("permute", "transpose", "t", "unsqueeze", "squeeze")), (self._along, ("roll", "flip")),
                (self._expand, ("expand",)), (self._expand_as, ("expand_as",)), (self._repeat, ("repeat_interleave",)),
                (self._split, ("split", "split_with_sizes", "chunk", "unbind")), (self._part, ("getitem",)),
                (self._concat, ("cat",)), (self._slice, ("slice",)), (self._select, ("select",)), (self._pad, ("pad", "constant_pad_nd")),
                (self._matmul, ("matmul", "bmm")), (self._attention, ("scaled_dot_product_attention",)), (self._einsum, ("einsum",)),
                (self._embedding, ("embedding",)), (self._index, ("index",)), (self._first, ("beside",)),
                (self._recurrent, _RECURRENT), (self._transposed_conv, ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")),
            )
            for name in names
        }  # fmt: skip

    def of(self, node: fx.Node) -> Layout:
        """The layout of a node's value; without axes for what is no tensor with channels."""
        if node.op == "output":
            self._freeze_all(node, "the network's output")
        if node.op in ("output", "placeholder") or is_about_sizes(node):
            return {}
        if node.op == "get_attr":
            return self._attribute(node)
        rule = self._module_rule if node.op == "call_module" else self._rules.get(name_of(node), self._unknown)
        try:
            return rule(node)
        except NotUnderstood as why:
            line = node.meta.get("line")
            self._freeze_all(node, (str(why) or f"{_title(node)} is not understood") + (f" ({line})" if line else ""))
            return {}

    def _unknown(self, _: fx.Node) -> Layout:
        raise NotUnderstood

    # -- helpers ------------------------------------------------------------------------------------------------

    def _known(self, node: Any) -> Layout:
        return self._channels.layouts[node.name] if isinstance(node, fx.Node) else {}

    def _freeze_all(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            for layout in (self._known(source), *self._parts.get(source.name, ())):
                self._freeze(layout, reason)

    def _freeze(self, layout: Layout, reason: str) -> None:
        for ids in layout.values():
            self._channels.freeze(ids, reason)

    def _freeze_axes(self, layout: Layout, axes: Sequence[int], reason: str) -> None:
        self._freeze({axis: layout[axis] for axis in axes if axis in layout}, reason)

    def _moved(self, layout: Layout, where: Move) -> Layout:
        return {where[axis]: ids for axis, ids in layout.items() if axis in where}

    def _attribute(self, node: fx.Node) -> Layout:
        """Every axis of a parameter may have to follow channels; what is only an index may not."""
        value = value_of(node, self._module)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return {}
        return self._own_axes(node, value.shape)

    def _own_axes(self, node: fx.Node, sizes: Sequence[int]) -> Layout:
        layout = {axis: self._channels.fresh(size) for axis, size in enumerate(sizes) if size > 1}
        for ids in layout.values():
            self._channels.play(node.name, "parameter", ids)
        return layout

    def _new(self, node: fx.Node) -> Layout:
        """What has one value throughout may follow as well, where its size is written down."""
        sizes = arguments(node)["size"]
        return self._own_axes(node, [size if isinstance(size, int) else 1 for size in sizes])

    # -- modules ------------------------------------------------------------------------------------------------

    def _module_rule(self, node: fx.Node) -> Layout:
        module = module_of(node, self._module)
        rules: tuple[tuple[Any, Callable[[fx.Node], Layout]], ...] = (
            (Conv, self._conv), (nn.Linear, self._linear), (nn.modules.batchnorm._BatchNorm, self._batch_norm),
            (nn.LayerNorm, self._layer_norm), (nn.GroupNorm, self._group_norm), (nn.modules.dropout._DropoutNd, self._same),
            (nn.AdaptiveMaxPool2d, self._spatial),
        )  # fmt: skip
        rule = next((rule for types, rule in rules if isinstance(module, types)), None)
        if rule is None or module is None:
            raise NotUnderstood
        layout = rule(node)
        if str(node.target) in self._shared and any(True for _ in itertools.chain(module.parameters(), module.buffers())):
            for each in (layout, self._known(node.all_input_nodes[0])):
                self._freeze(each, f"{node.target} is used more than once")
        return layout

    def _conv(self, node: fx.Node) -> Layout:
        conv, source = module_of(node, self._module), self._known(node.all_input_nodes[0])
        assert isinstance(conv, Conv)
        if node.all_input_nodes[0].meta["shape"][:1] != node.meta["shape"][:1] or len(node.meta["shape"]) != conv.weight.dim():
            raise NotUnderstood(f"{node.target} reads what is no batch")
        self._freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} slides along them")
        if is_depthwise(conv) and 1 in source:
            self._channels.play(node.name, "depthwise", source[1])
            return {1: source[1]}
        target = self._channels.fresh(conv.out_channels)
        if conv.groups > 1:
            self._tie_groups(source.get(1), target, conv.groups)
        self._between(node, source.get(1), target)
        return {1: target}

    def _tie_groups(self, source: Ids | None, target: Ids, groups: int) -> None:
        """What a group of filters reads and makes goes together: whole groups can be removed."""
        rows = target.reshape(groups, -1)
        self._channels.unify(rows, rows[:, :1])
        if source is None:
            self._channels.freeze(target, "its groups of filters read what cannot change")
        else:
            self._channels.unify(source.reshape(groups, -1), rows[:, :1])

    def _linear(self, node: fx.Node) -> Layout:
        linear, source = module_of(node, self._module), self._known(node.all_input_nodes[0])
        assert isinstance(linear, nn.Linear)
        last = len(node.meta["shape"]) - 1
        target = self._channels.fresh(linear.out_features)
        self._between(node, source.get(last), target)
        return {axis: ids for axis, ids in source.items() if axis != last} | {last: target}

    def _between(self, node: fx.Node, source: Ids | None, target: Ids) -> None:
        if source is not None:
            self._channels.play(node.name, "in", source)
        self._channels.play(node.name, "out", target)

    def _batch_norm(self, node: fx.Node) -> Layout:
        source = self._known(node.all_input_nodes[0])
        self._freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} averages over them")
        if 1 in source:
            self._channels.play(node.name, "norm", source[1])
        return {axis: ids for axis, ids in source.items() if axis == 1}

    def _layer_norm(self, node: fx.Node) -> Layout:
        norm, source = module_of(node, self._module), self._known(node.all_input_nodes[0])
        assert isinstance(norm, nn.LayerNorm)
        rank = len(node.meta["shape"])
        self._freeze_axes(source, range(rank - len(norm.normalized_shape), rank), f"{node.target} normalises over all of them together")
        return source

    def _group_norm(self, node: fx.Node) -> Layout:
        """What is normalised together goes together."""
        norm, source = module_of(node, self._module), self._known(node.all_input_nodes[0])
        assert isinstance(norm, nn.GroupNorm)
        if 1 in source:
            rows = source[1].reshape(norm.num_groups, -1)
            self._channels.unify(rows, rows[:, :1])
            self._channels.play(node.name, "norm", source[1])
        self._freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} averages over them")
        return {axis: ids for axis, ids in source.items() if axis == 1}

    # -- entry by entry -----------------------------------------------------------------------------------------

    def _same(self, node: fx.Node) -> Layout:
        first, *others = node.all_input_nodes
        if any("shape" in other.meta for other in others):
            raise NotUnderstood
        return self._known(first)

    def _first(self, node: fx.Node) -> Layout:
        return self._known(node.all_input_nodes[0])

    def _join(self, node: fx.Node) -> Layout:
        tensors = [source for source in node.all_input_nodes if "shape" in source.meta]
        layout = self._joined(tensors, node.meta["shape"], range(len(node.meta["shape"])), _title(node))
        streams = [source for source in tensors if source.op != "get_attr"]
        if name_of(node) == "add" and len(streams) > 1:
            for ids in layout.values():
                self._channels.play(node.name, "add", ids)
        return layout

    def _joined(self, tensors: Sequence[fx.Node], shape: Sequence[int], axes: Iterable[int], title: str) -> dict[int, Ids]:
        """These axes of operands that are broadcast to one shape."""
        found = {axis: self._joined_axis(tensors, len(shape) - axis, shape[axis], title) for axis in axes}
        return {axis: ids for axis, ids in found.items() if ids is not None}

    def _joined_axis(self, tensors: Sequence[fx.Node], from_end: int, size: int, title: str) -> Ids | None:
        """Ids that all operands have are the same; an operand of one entry, or without the axis, is spread over those of the others."""
        ids_of: list[Ids | None] = []
        for tensor in tensors:
            place = len(tensor.meta["shape"]) - from_end
            ids = self._known(tensor).get(place)
            if place >= 0 and tensor.meta["shape"][place] == size:
                ids_of.append(ids)
            elif ids is not None:
                self._channels.freeze(ids, f"{title} spreads it over others")
        return self._joined_ids([ids for ids in ids_of if ids is not None], len(ids_of), title)

    def _joined_ids(self, known: Sequence[Ids], wanted: int, title: str) -> Ids | None:
        """Ids of the same axis of several tensors, which are as many as `wanted` where it can change in all of them."""
        for ids in known[1:]:
            self._channels.unify(known[0], ids)
        if known and len(known) < wanted:
            self._channels.freeze(known[0], f"{title} joins it with what cannot change")
        return known[0] if known else None

    def _prelu(self, node: fx.Node) -> Layout:
        source, weight = node.all_input_nodes
        layout, own = self._known(source), self._known(weight)
        if 0 in own and 1 in layout:
            self._channels.unify(own[0], layout[1])
        elif 0 in own:
            raise NotUnderstood
        return layout

    def _glu(self, node: fx.Node) -> Layout:
        source, axis = self._only(node), self._axis(node, "dim")
        if axis not in source:
            return source
        first, second = np.split(source[axis], 2)
        self._channels.cut(source[axis], [len(first)])
        self._channels.unify(first, second)
        return {**source, axis: first}

    # -- over an axis -------------------------------------------------------------------------------------------

    def _only(self, node: fx.Node) -> Layout:
        tensors = [source for source in node.all_input_nodes if "shape" in source.meta]
        if len(tensors) != 1:
            raise NotUnderstood
        return self._known(tensors[0])

    def _axis(self, node: fx.Node, name: str, of: int | None = None) -> int:
        axis = arguments(node)[name]
        if not isinstance(axis, int):
            raise NotUnderstood
        return axis % (of or len(node.all_input_nodes[0].meta["shape"]))

    def _softmax(self, node: fx.Node) -> Layout:
        source, axis = self._only(node), self._axis(node, "dim")
        self._freeze_axes(source, [axis], f"{_title(node)} adds over them")
        return source

    def _spatial(self, node: fx.Node) -> Layout:
        """What slides over a map keeps its channels."""
        source = self._only(node)
        self._freeze_axes(source, [axis for axis in source if axis != 1], f"{_title(node)} slides along them")
        return {axis: ids for axis, ids in source.items() if axis == 1}

    def _reduce(self, node: fx.Node) -> Layout:
        source, given = self._only(node), arguments(node)
        rank = len(node.all_input_nodes[0].meta["shape"])
        dims = given.get("dim")
        gone = {axis % rank for axis in ([dims] if isinstance(dims, int) else dims or range(rank))}
        self._freeze_axes(source, sorted(gone), f"{_title(node)} reduces over them")
        if given.get("keepdim"):
            return {axis: ids for axis, ids in source.items() if axis not in gone}
        return {axis - sum(d < axis for d in gone): ids for axis, ids in source.items() if axis not in gone}

    def _along(self, node: fx.Node) -> Layout:
        source, given = self._only(node), arguments(node)
        rank = len(node.meta["shape"])
        self._freeze_axes(source, [axis % rank for axis in given["dims"] or range(rank)], f"{_title(node)} moves along them")
        return source

    def _concat(self, node: fx.Node) -> Layout:
        tensors = [tensor for tensor in arguments(node)["tensors"] if isinstance(tensor, fx.Node)]
        if len(tensors) != len(arguments(node)["tensors"]) or len({len(t.meta["shape"]) for t in tensors}) != 1:
            raise NotUnderstood
        axis = self._axis(node, "dim", of=len(node.meta["shape"]))
        shape = node.meta["shape"]
        layout = self._joined(tensors, shape, [other for other in range(len(shape)) if other != axis], _title(node))
        parts = [self._known(tensor).get(axis) for tensor in tensors]
        if any(part is not None for part in parts):
            layout[axis] = np.concatenate([
                part if part is not None else self._fixed(tensor.meta["shape"][axis]) for part, tensor in zip(parts, tensors, strict=True)
            ])  # fmt: skip
        return layout

    def _fixed(self, n: int) -> Ids:
        """Ids of entries that cannot change, beside others that can."""
        ids = self._channels.fresh(n)
        self._channels.freeze(ids, "it is read from what cannot change")
        return ids

    def _pad(self, node: fx.Node) -> Layout:
        source, amounts = dict(self._only(node)), pad_amounts(node)
        rank = len(node.meta["shape"])
        if amounts is None:  # with something else than zeros, as reflection or numbers
            given = arguments(node)["pad"]
            axes = [rank - 1 - axis for axis in range(len(given) // 2) if any(given[2 * axis : 2 * axis + 2])]
            self._freeze_axes(source, axes, f"{_title(node)} adds to them")
            return {axis: ids for axis, ids in source.items() if axis not in axes}
        for axis in list(source):
            front, back = amounts[axis]
            if front < 0 or back < 0:
                raise NotUnderstood
            parts = [self._channels.fresh(front), source[axis], self._channels.fresh(back)]
            for part in (parts[0], parts[2]):
                if len(part):
                    self._channels.play(node.name, "pad", part)
            source[axis] = np.concatenate(parts)
        return source

    def _slice(self, node: fx.Node) -> Layout:
        source, given, axis = self._only(node), arguments(node), self._axis(node, "dim")
        start, end, step = given["start"] or 0, given["end"] if given["end"] is not None else LAST, given["step"]
        if axis not in source or (start == 0 and end >= LAST and step == 1):
            return source
        if not isinstance(start, int) or not isinstance(end, int) or step != 1:
            raise NotUnderstood
        first, last, _ = slice(start, end).indices(len(source[axis]))
        self._channels.cut(source[axis], (first, last))
        return {**source, axis: source[axis][first:last]}

    def _select(self, node: fx.Node) -> Layout:
        source, axis = self._only(node), self._axis(node, "dim")
        self._freeze_axes(source, [axis], f"{_title(node)} takes one of them")
        return {other - (other > axis): ids for other, ids in source.items() if other != axis}

    def _split(self, node: fx.Node) -> Layout:
        source, axis = self._only(node), self._axis(node, "dim")
        shapes = node.meta["shapes"]
        if name_of(node) == "unbind":
            self._freeze_axes(source, [axis], f"{_title(node)} takes them apart")
            layout = {other - (other > axis): ids for other, ids in source.items() if other != axis}
            self._parts[node.name] = [layout] * len(shapes)
            return {}
        ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
        if axis in source:
            self._channels.cut(source[axis], ends.tolist())
        own = np.split(source[axis], ends) if axis in source else [None] * len(shapes)
        rest = {other: ids for other, ids in source.items() if other != axis}
        self._parts[node.name] = [rest if part is None else {**rest, axis: part} for part in own]
        return {}

    def _part(self, node: fx.Node) -> Layout:
        source, index = node.args
        assert isinstance(source, fx.Node)
        if source.name not in self._parts or not isinstance(index, int):
            raise NotUnderstood
        return self._parts[source.name][index]

    def _repeat(self, node: fx.Node) -> Layout:
        source, given = dict(self._only(node)), arguments(node)
        if not isinstance(given.get("repeats"), int) or not isinstance(given.get("dim"), int):
            raise NotUnderstood
        axis = self._axis(node, "dim")
        return {**source, axis: np.repeat(source[axis], given["repeats"])} if axis in source else source

    # -- shapes -------------------------------------------------------------------------------------------------

    def _expand(self, node: fx.Node) -> Layout:
        source, before = self._only(node), node.all_input_nodes[0].meta["shape"]
        shift = len(node.meta["shape"]) - len(before)
        self._freeze_axes(source, [axis for axis in source if before[axis] == 1], f"{_title(node)} repeats it")
        return {axis + shift: ids for axis, ids in source.items() if before[axis] != 1}

    def _expand_as(self, node: fx.Node) -> Layout:
        source, other = node.all_input_nodes if len(node.all_input_nodes) == 2 else (node.all_input_nodes[0],) * 2
        return self._joined([source, other], node.meta["shape"], range(len(node.meta["shape"])), _title(node))

    def _move(self, node: fx.Node) -> Layout:
        source = self._only(node)
        where = moves(node)
        if where is None:
            raise NotUnderstood
        self._freeze_axes(source, [axis for axis in source if axis not in where], f"{_title(node)} leaves them out")
        return self._moved(source, where)

    def _reshape(self, node: fx.Node) -> Layout:
        source, *like = node.all_input_nodes
        if "dtype" in arguments(node):  # the same bits as another type
            raise NotUnderstood
        layout = split_ids(node, self._known(source), self._channels)
        for other in like if name_of(node) in ("reshape_as", "view_as") else ():
            for axis, size in enumerate(node.meta["shape"]):
                pair = [ids for ids in (layout.get(axis), self._known(other).get(axis)) if ids is not None]
                self._joined_ids(pair, 2 if size > 1 else len(pair), _title(node))
        return layout

    # -- products -----------------------------------------------------------------------------------------------

    def _matmul(self, node: fx.Node) -> Layout:
        first, second = (arguments(node)[name] for name in (("self", "other") if name_of(node) == "matmul" else ("self", "mat2")))
        rank, ranks = len(node.meta["shape"]), (len(first.meta["shape"]), len(second.meta["shape"]))
        if min(ranks) < 2:
            raise NotUnderstood
        rows, columns = self._known(first), self._known(second)
        self._contract(rows.get(ranks[0] - 1), columns.get(ranks[1] - 2), node)
        layout = self._joined([first, second], node.meta["shape"], range(rank - 2), _title(node))
        if ranks[0] - 2 in rows:
            layout[rank - 2] = rows[ranks[0] - 2]
        if ranks[1] - 1 in columns:
            layout[rank - 1] = columns[ranks[1] - 1]
        return layout

    def _contract(self, first: Ids | None, second: Ids | None, node: fx.Node) -> None:
        """What is multiplied pairwise and added up: both lose the same."""
        if first is not None and second is not None:
            self._channels.unify(first, second)
            self._channels.play(node.name, PRODUCT, first)
        for ids in (first, second):
            if ids is not None and (first is None or second is None):
                self._channels.freeze(ids, f"{_title(node)} multiplies it with what cannot change")

    def _attention(self, node: fx.Node) -> Layout:
        """softmax(Q K^T / sqrt(size of a head)) V of batch x heads x tokens x size (Vaswani et al. 2017, arXiv 1706.03762)."""
        given = arguments(node)
        query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
        rank = len(node.meta["shape"])
        if given.get("enable_gqa") or any(len(t.meta["shape"]) != rank for t in (query, key, value)):
            raise NotUnderstood
        for tensor in (query, key):
            self._freeze_axes(self._known(tensor), [rank - 1], f"{_title(node)} scales by their number")
        for tensor in (key, value):
            self._freeze_axes(self._known(tensor), [rank - 2], f"{_title(node)} adds over them")
        tensors = [query, key, value, *([mask] if isinstance(mask, fx.Node) else [])]
        layout = self._joined(tensors, node.meta["shape"], range(rank - 2), _title(node))
        for tensor, axis in ((query, rank - 2), (value, rank - 1)):
            if axis in self._known(tensor):
                layout[axis] = self._known(tensor)[axis]
        return layout

    def _einsum(self, node: fx.Node) -> Layout:
        given = arguments(node)
        equation, tensors = given["equation"].replace(" ", ""), list(given["tensors"])
        if "." in equation or "->" not in equation:
            raise NotUnderstood
        terms, result = equation.split("->")
        found: dict[str, list[Ids]] = {}
        places = [(label, axis, tensor) for term, tensor in zip(terms.split(","), tensors, strict=True) for axis, label in enumerate(term)]
        for label, axis, tensor in places:
            if axis in self._known(tensor):
                found.setdefault(label, []).append(self._known(tensor)[axis])
        for label, known in found.items():
            self._channels.play(node.name, PRODUCT, known[0])
            self._joined_ids(known, sum(label == other for other, _, _ in places), _title(node))
        return {axis: found[label][0] for axis, label in enumerate(result) if label in found}

    # -- functions that are given weights -------------------------------------------------------------------------

    def _transposed_conv(self, node: fx.Node) -> Layout:
        given = arguments(node)
        weight, source = self._known(given["weight"]), self._known(given["input"])
        if given["groups"] != 1 or given["weight"].op != "get_attr" or 1 not in weight:
            raise NotUnderstood
        self._freeze_axes(source, [axis for axis in source if axis != 1], f"{_title(node)} slides along them")
        self._follow(weight.get(0), source.get(1), _title(node))
        self._channels.play(given["weight"].name, "out", weight[1])
        if isinstance(given["bias"], fx.Node):
            self._follow(self._known(given["bias"]).get(0), weight[1], _title(node))
        return {1: weight[1]}

    def _recurrent(self, node: fx.Node) -> Layout:
        """Hidden units of all layers and directions go together, since one tensor holds their states."""
        given, name = arguments(node), _title(node)
        states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
        directions, of_one = 1 + given["bidirectional"], 4 if given["has_biases"] else 2
        weights = [self._known(weight) for weight in given["params"]]
        if (
            len(given["input"].meta["shape"]) != 3
            or len(weights) != given["num_layers"] * directions * of_one
            or any(0 not in weight for weight in weights)
        ):
            raise NotUnderstood
        hidden, source = weights[1].get(1), self._known(given["input"]).get(2)
        if hidden is None:
            raise NotUnderstood
        for first in range(0, len(weights), of_one):
            inward, own, *biases = weights[first : first + of_one]
            for weight in (inward, own, *biases):
                self._channels.unify(weight[0], np.tile(hidden, _RECURRENT[name]))
            self._channels.unify(own[1], hidden)
            self._follow(inward.get(1), source, name)
            self._channels.play(given["params"][first].name, "out", inward[0])
            if (first // of_one + 1) % directions == 0:
                source = np.tile(hidden, directions)
        for state in states:
            self._follow(self._known(state).get(2), hidden, name)
        rows = [self._known(given["input"]).get(axis) for axis in (0, 1)]
        self._freeze({axis: ids for axis, ids in enumerate(rows) if ids is not None}, f"{name} runs along them")
        self._parts[node.name] = [{2: np.tile(hidden, directions)}, *([{2: hidden}] * len(states))]
        return {}

    def _follow(self, own: Ids | None, channels: Ids | None, title: str) -> None:
        """An axis of a weight is as long as there are channels."""
        self._joined_ids([ids for ids in (own, channels) if ids is not None], 2, title)

    # -- tables -------------------------------------------------------------------------------------------------

    def _embedding(self, node: fx.Node) -> Layout:
        table = self._known(arguments(node)["weight"])
        self._freeze_axes(table, [0], f"{_title(node)} looks them up")
        return {len(node.meta["shape"]) - 1: table[1]} if 1 in table else {}

    def _index(self, node: fx.Node) -> Layout:
        """Rows that are looked up in one axis by an index of any shape."""
        given = arguments(node)
        source, indices = given["self"], list(given["indices"])
        used = [axis for axis, index in enumerate(indices) if index is not None]
        if len(used) != 1 or any(self._known(index) for index in indices) or indices[used[0]].meta["dtype"] is torch.bool:
            raise NotUnderstood
        (axis,) = used
        more = len(indices[axis].meta["shape"]) - 1
        layout = self._known(source)
        self._freeze_axes(layout, [axis], f"{_title(node)} looks them up")
        return {other + more * (other > axis): ids for other, ids in layout.items() if other != axis}


def pad_amounts(node: fx.Node) -> dict[int, tuple[int, int]] | None:
    """How much a constant zero padding adds in front of and behind each axis, or None."""
    given = arguments(node)
    amounts, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value")
    if amounts is None or mode != "constant" or value not in (None, 0, 0.0) or not all(isinstance(a, int) for a in amounts):
        return None
    rank = len(node.meta["shape"])
    padded = {rank - 1 - axis: (amounts[2 * axis], amounts[2 * axis + 1]) for axis in range(len(amounts) // 2)}
    return {axis: padded.get(axis, (0, 0)) for axis in range(rank)}


def _title(node: fx.Node) -> str:
    return name_of(node) or str(node.target)
