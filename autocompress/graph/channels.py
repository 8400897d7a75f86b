"""Which channels of a network are tied together: channel identity, propagated through every operator.

Each tensor carries a layout: one id for every channel on its channel axis. Convolutions and linear layers make new ids, elementwise
operators make the ids of their operands equal, concatenation and zero padding join layouts, what is not understood freezes what it reads.
Ids that take part in the same operators form a channel group: channels that can be removed or added one by one, all groups
independently. (Dependency graphs between layers are due to Fang et al. 2023, DepGraph, arXiv 2301.12900; ids for single channels also
cover concatenations, zero-padded shortcuts and added channels.)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from autocompress.graph.nodes import Conv, arguments, is_depthwise, kind_of, module_of, name_of

Ids = NDArray[np.int64]
LAST = 2**62
"""Where a slice ends that is open."""


@dataclass(frozen=True)
class Layout:
    """Ids of the channels of one tensor along `axis`; each covers `repeat` neighbouring entries (after flattening H x W)."""

    ids: Ids
    axis: int
    repeat: int = 1


@dataclass(frozen=True)
class Role:
    """A node's part in the life of a channel: `out`, `in`, `depthwise`, `norm`, `add`, `pad`."""

    node: str
    part: str


@dataclass
class Channels:
    """Result of the propagation: layouts by node name, the class of each id, and what is frozen."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    roles: list[tuple[Role, Ids]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def fresh(self, n: int, axis: int) -> Layout:
        start = len(self.parents)
        self.parents.extend(range(start, start + n))
        return Layout(np.arange(start, start + n), axis)

    def root(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def unify(self, first: Ids, second: Ids) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self.parents[high] = low

    def freeze(self, layout: Layout, reason: str) -> None:
        for index in layout.ids.tolist():
            self.frozen.setdefault(index, reason)

    def play(self, node: fx.Node, part: str, layout: Layout) -> None:
        self.roles.append((Role(node.name, part), layout.ids))

    def roots(self, layout: Layout) -> Ids:
        """The class of each channel of a layout."""
        return np.array([self.root(index) for index in layout.ids.tolist()], dtype=np.int64)


def propagate(module: fx.GraphModule) -> Channels:
    """Follow channel identity through the network. Nodes need `meta["shape"]`."""
    channels = Channels()
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    rules = _Rules(module, channels, {name for name, count in calls.items() if count > 1})
    for node in module.graph.nodes:
        layout = rules.of(node)
        if layout is not None:
            channels.layouts[node.name] = layout
    return channels


@dataclass(frozen=True)
class _Rules:
    module: fx.GraphModule
    channels: Channels
    shared: set[str]

    def of(self, node: fx.Node) -> Layout | None:
        """The layout of a node's value; None for what is no tensor with channels."""
        kind = kind_of(node, self.module)
        if kind == "output":
            self._freeze_inputs(node, "the network's output")
            return None
        shape = node.meta.get("shape")
        if shape is None or len(shape) < 2:
            self._not_a_tensor(node)
            return None
        if kind == "input":
            return self._frozen(node, "the network's input")
        rule = {
            "conv": self._conv, "linear": self._linear, "norm": self._norm, "activation": self._same,
            "identity": self._same, "add": self._join, "mul": self._join, "maxpool": self._pool,
            "avgpool": self._pool, "concat": self._concat, "pad": self._pad, "slice": self._slice, "reshape": self._reshape,
        }.get(kind)  # fmt: skip
        layout = rule(node) if rule is not None else None
        return layout if layout is not None else self._unknown(node)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _inputs(self, node: fx.Node) -> list[Layout]:
        known = self.channels.layouts
        return [known[source.name] for source in node.all_input_nodes if source.name in known]

    def _freeze_inputs(self, node: fx.Node, reason: str) -> None:
        for layout in self._inputs(node):
            self.channels.freeze(layout, reason)

    def _not_a_tensor(self, node: fx.Node) -> None:
        """Reading a size ties nothing; anything else that turns channels into another kind of value is not understood."""
        if name_of(node) != "sym_size":
            self._freeze_inputs(node, f"read by {_title(node)}")

    def _frozen(self, node: fx.Node, reason: str) -> Layout:
        shape = node.meta["shape"]
        axis = 1 if len(shape) != 3 else 2
        layout = self.channels.fresh(shape[axis], axis)
        self.channels.freeze(layout, reason)
        return layout

    def _unknown(self, node: fx.Node) -> Layout:
        reason = f"{_title(node)} is not understood"
        self._freeze_inputs(node, reason)
        return self._frozen(node, reason)

    def _only(self, node: fx.Node) -> Layout | None:
        layouts = self._inputs(node)
        return layouts[0] if len(layouts) == 1 else None

    # -- rules: each returns None for what it does not understand -----------------------------------------------

    def _conv(self, node: fx.Node) -> Layout | None:
        conv, source = module_of(node, self.module), self._only(node)
        if source is None or source.axis != 1 or source.repeat != 1:
            return None
        assert isinstance(conv, Conv)
        if is_depthwise(conv):
            self.channels.play(node, "depthwise", source)
            self._freeze_shared(node, source)
            return source
        target = self.channels.fresh(conv.out_channels, 1)
        if conv.groups > 1:
            reason = f"{_title(node)} is a grouped convolution"
            self.channels.freeze(source, reason)
            self.channels.freeze(target, reason)
        return self._layer(node, source, target)

    def _linear(self, node: fx.Node) -> Layout | None:
        linear, source = module_of(node, self.module), self._only(node)
        last = len(node.meta["shape"]) - 1
        if source is None or source.axis != last:
            return None
        assert isinstance(linear, nn.Linear)
        return self._layer(node, source, self.channels.fresh(linear.out_features, last))

    def _layer(self, node: fx.Node, source: Layout, target: Layout) -> Layout:
        self.channels.play(node, "in", source)
        self.channels.play(node, "out", target)
        self._freeze_shared(node, source)
        self._freeze_shared(node, target)
        return target

    def _freeze_shared(self, node: fx.Node, layout: Layout) -> None:
        if str(node.target) in self.shared:
            self.channels.freeze(layout, f"{node.target} is used more than once")

    def _norm(self, node: fx.Node) -> Layout | None:
        source = self._only(node)
        if source is None or source.axis != 1 or source.repeat != 1:
            return None
        self.channels.play(node, "norm", source)
        self._freeze_shared(node, source)
        return source

    def _same(self, node: fx.Node) -> Layout | None:
        return self._only(node)

    def _join(self, node: fx.Node) -> Layout | None:
        tensors = [source for source in node.all_input_nodes if "shape" in source.meta]
        layouts = self._inputs(node)
        if len(layouts) != len(tensors) or not layouts:
            return None
        if len(layouts) == 1 and len([a for a in node.args if isinstance(a, fx.Node)]) <= 2:
            return layouts[0]  # with a number, or with itself
        first, second = layouts[0], layouts[1]
        same_place = first.axis == second.axis and first.repeat == second.repeat
        ranks = {len(source.meta["shape"]) for source in tensors}
        if not same_place or len(first.ids) != len(second.ids) or len(ranks) != 1:
            return None
        self.channels.unify(first.ids, second.ids)
        if kind_of(node, self.module) == "add":
            self.channels.play(node, "add", first)
        return first

    def _pool(self, node: fx.Node) -> Layout | None:
        source = self._only(node)
        if source is None or source.repeat != 1:
            return None
        given = arguments(node)
        if name_of(node) != "mean":
            return source if source.axis == 1 else None
        before = len(node.all_input_nodes[0].meta["shape"])
        if not given.get("dim"):
            return None
        reduced = {d % before for d in given["dim"]}
        if source.axis in reduced:
            return None
        kept = len(node.meta["shape"]) == before
        return source if kept else Layout(source.ids, source.axis - sum(d < source.axis for d in reduced))

    def _concat(self, node: fx.Node) -> Layout | None:
        layouts, given = self._inputs(node), arguments(node)
        tensors = given["tensors"]
        if len(layouts) != len(tensors):
            return None
        axis = given["dim"] % len(node.meta["shape"])
        if any(layout.axis != axis or layout.repeat != 1 for layout in layouts):
            return None
        by_name = self.channels.layouts
        return Layout(np.concatenate([by_name[t.name].ids for t in tensors]), axis)

    def _pad(self, node: fx.Node) -> Layout | None:
        source, amounts = self._only(node), pad_amounts(node)
        if source is None or amounts is None or source.axis != 1 or source.repeat != 1:
            return None
        if len(amounts) <= 2 * (len(node.meta["shape"]) - 2):
            return source
        front, back = amounts[-2], amounts[-1]
        if len(amounts) != 2 * (len(node.meta["shape"]) - 1) or front < 0 or back < 0:
            return None
        parts = [self.channels.fresh(front, 1).ids, source.ids, self.channels.fresh(back, 1).ids]
        for part in (parts[0], parts[2]):
            self.channels.play(node, "pad", Layout(part, 1))
        return Layout(np.concatenate(parts), 1)

    def _slice(self, node: fx.Node) -> Layout | None:
        source, given = self._only(node), arguments(node)
        whole = (given["start"] or 0, given["step"]) == (0, 1) and (given["end"] is None or given["end"] >= LAST)
        return source if source is not None and (whole or given["dim"] % len(node.meta["shape"]) != source.axis) else None

    def _reshape(self, node: fx.Node) -> Layout | None:
        source = self._only(node)
        before, after = node.all_input_nodes[0].meta.get("shape"), node.meta["shape"]
        if source is None or before is None or source.axis != 1:
            return None
        flattens = len(after) == 2 and after[0] == before[0] and int(np.prod(before[1:])) == after[1]
        if not flattens or not _size_is_free(node):
            return None
        return Layout(source.ids, 1, source.repeat * int(np.prod(before[2:])))


def _size_is_free(node: fx.Node) -> bool:
    """Whether a reshape to n x C leaves C to be inferred (flatten, or -1)."""
    given = arguments(node)
    return name_of(node) == "flatten" or (given.get("size") or given.get("shape") or [0])[-1] == -1


def pad_amounts(node: fx.Node) -> tuple[int, ...] | None:
    """The amounts of a constant zero padding written in the graph, or None."""
    given = arguments(node)
    amounts, mode, value = given.get("pad"), given.get("mode", "constant"), given.get("value")
    if amounts is None or mode != "constant" or value not in (None, 0, 0.0) or not all(isinstance(a, int) for a in amounts):
        return None
    return tuple(amounts)


def _title(node: fx.Node) -> str:
    return name_of(node) or str(node.target)


def group_ids(channels: Channels) -> list[tuple[frozenset[Role], Ids]]:
    """Classes of ids with the same roles: (roles, ids of the classes in order of their first channel)."""
    roles: dict[int, set[Role]] = defaultdict(set)
    for role, ids in channels.roles:
        for index in ids.tolist():
            roles[channels.root(index)].add(role)
    grouped: dict[frozenset[Role], list[int]] = defaultdict(list)
    for root in sorted(roles):
        grouped[frozenset(roles[root])].append(root)
    return [(key, np.array(members, dtype=np.int64)) for key, members in grouped.items()]


def frozen_roots(channels: Channels) -> dict[int, str]:
    """Classes that must stay as they are, with the reason."""
    return {channels.root(index): reason for index, reason in channels.frozen.items()}
