"""The state of a walk along a network's operators, and what rules do with the ids of channels that they meet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from autocompress.graph.channels import Channels, Ids, Layout
from autocompress.graph.nodes import arguments, name_of

PRODUCT = "product"
"""Part in the life of channels that a function multiplies: what is added would not be multiplied with zeros."""


STATISTIC = "statistic"
"""Part in the life of channels of which something is computed together, as a norm's mean: it would change with what is added."""


class NotUnderstood(Exception):
    """What a node does to channels is not covered; the message says in what way, or is empty."""


def title(node: fx.Node) -> str:
    """How a reason calls the node."""
    return name_of(node) or str(node.target)


def axis_of(node: fx.Node, name: str, of: int | None = None) -> int:
    """An axis that an argument names, counted from the front; `of` how many there are, else as many as those of the first input."""
    axis = arguments(node)[name]
    if not isinstance(axis, int):
        raise NotUnderstood
    return axis % (of or len(node.all_input_nodes[0].meta["shape"]))


class Flow:
    """Channels of the nodes so far.

    Args:
        shared: modules that are called more than once.
    """

    def __init__(self, module: fx.GraphModule, channels: Channels, shared: set[str]) -> None:
        self.module = module
        self.channels = channels
        self.shared = shared
        self.parts: dict[str, list[Layout]] = {}
        """Layouts of the tensors that a node with several gives."""

    def known(self, node: Any) -> Layout:
        """The layout of a node's value; without axes for what is no node."""
        return self.channels.layouts[node.name] if isinstance(node, fx.Node) else {}

    def freeze_all(self, node: fx.Node, reason: str) -> None:
        """Whatever the node reads."""
        for source in node.all_input_nodes:
            for layout in (self.known(source), *self.parts.get(source.name, ())):
                self.freeze(layout, reason)

    def freeze(self, layout: Layout, reason: str) -> None:
        """All axes of a layout."""
        for ids in layout.values():
            self.channels.freeze(ids, reason)

    def freeze_axes(self, layout: Layout, axes: Sequence[int], reason: str) -> None:
        """Those of these axes that hold channels."""
        self.freeze({axis: layout[axis] for axis in axes if axis in layout}, reason)

    def own_axes(self, node: fx.Node, sizes: Sequence[int]) -> Layout:
        """New ids for every axis of a tensor that the network holds."""
        layout = {axis: self.channels.fresh(size) for axis, size in enumerate(sizes) if size > 1}
        for ids in layout.values():
            self.channels.play(node.name, "parameter", ids)
        return layout

    def fixed(self, n: int) -> Ids:
        """Ids of entries that cannot change, beside others that can."""
        ids = self.channels.fresh(n)
        self.channels.freeze(ids, "it is read from what cannot change")
        return ids

    def only(self, node: fx.Node) -> Layout:
        """The layout of the one tensor that the node reads."""
        tensors = [source for source in node.all_input_nodes if "shape" in source.meta]
        if len(tensors) != 1:
            raise NotUnderstood
        return self.known(tensors[0])

    def joined(self, tensors: Sequence[fx.Node], shape: Sequence[int], axes: Iterable[int], title: str) -> dict[int, Ids]:
        """These axes of operands that are broadcast to one shape."""
        found = {axis: self.joined_axis(tensors, len(shape) - axis, shape[axis], title) for axis in axes}
        return {axis: ids for axis, ids in found.items() if ids is not None}

    def joined_axis(self, tensors: Sequence[fx.Node], from_end: int, size: int, title: str) -> Ids | None:
        """Ids that all operands have are the same; an operand of one entry, or without the axis, is spread over those of the others."""
        ids_of: list[Ids | None] = []
        for tensor in tensors:
            place = len(tensor.meta["shape"]) - from_end
            ids = self.known(tensor).get(place)
            if place >= 0 and tensor.meta["shape"][place] == size:
                ids_of.append(ids)
            elif ids is not None:
                self.channels.freeze(ids, f"{title} spreads it over others")
        return self.joined_ids([ids for ids in ids_of if ids is not None], len(ids_of), title)

    def joined_ids(self, known: Sequence[Ids], wanted: int, title: str) -> Ids | None:
        """Ids of the same axis of several tensors, which are as many as `wanted` where it can change in all of them."""
        for ids in known[1:]:
            self.channels.unify(known[0], ids)
        if known and len(known) < wanted:
            self.channels.freeze(known[0], f"{title} joins it with what cannot change")
        return known[0] if known else None

    def follow(self, own: Ids | None, channels: Ids | None, title: str) -> None:
        """An axis of a weight is as long as there are channels."""
        self.joined_ids([ids for ids in (own, channels) if ids is not None], 2, title)

    def contract(self, first: Ids | None, second: Ids | None, node: fx.Node) -> None:
        """What is multiplied pairwise and added up: both lose the same."""
        if first is not None and second is not None:
            self.channels.unify(first, second)
            self.channels.play(node.name, PRODUCT, first)
        for ids in (first, second):
            if ids is not None and (first is None or second is None):
                self.channels.freeze(ids, f"{title(node)} multiplies it with what cannot change")
