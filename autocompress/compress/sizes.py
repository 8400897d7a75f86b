"""Sizes that are written into the operators of a network, as they are in a student with other channels."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx

from autocompress.graph import Graph
from autocompress.graph.nodes import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, arguments, name_of, normalized_axes, pad_amounts, slice_bounds
from autocompress.graph.resize import Selection


def resize_arguments(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """In place; `node` is the student's, and does what its namesake in the graph does with what is left."""
    change = _CHANGES.get(name_of(node))
    if change is not None:
        change(node, graph, selection)


def _reshape(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """Axes that hold channels, where their size is written down: -1 follows by itself."""
    given = arguments(node)
    name = next(name for name in ("shape", "size", "sizes") if name in given)
    first = given["dim"] % len(node.all_input_nodes[0].meta["shape"]) if name_of(node) == "unflatten" else 0
    sizes = list(given[name])
    for axis, roots in graph.roots(node.name).items():
        place = axis - first
        if selection.changes(roots) and 0 <= place < len(sizes) and sizes[place] != -1:
            sizes[place] = _as_written(node, sizes[place], selection.size(roots))
    _set(node, name, sizes)


def _as_written(node: fx.Node, size: object, now: int) -> object:
    """A number, or a product with the number of inputs: the axis holds the channels of all of them."""
    if not isinstance(size, fx.Node):
        return now
    batch = size
    while name_of(batch) != "sym_size":
        batch = batch.all_input_nodes[0]
    with node.graph.inserting_before(node):
        return node.graph.call_function(operator.mul, (batch, now))


def _pad(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """What is added in front of and behind channels follows from the channels that came before and after."""
    amounts, rank = pad_amounts(node), len(node.meta["shape"])
    if amounts is None:
        return
    written = list(arguments(node)["pad"])
    for axis, roots in graph.roots(node.name).items():
        front, back = amounts[axis]
        if front or back:
            place = 2 * (rank - 1 - axis)
            written[place] = selection.size(roots[:front])
            written[place + 1] = selection.size(roots[len(roots) - back :]) if back else 0
    _set(node, "pad", written)


def _slice(node: fx.Node, graph: Graph, selection: Selection) -> None:
    source = node.all_input_nodes[0]
    roots = graph.roots(source.name).get(arguments(node)["dim"] % len(source.meta["shape"]))
    bounds = slice_bounds(node, len(roots)) if roots is not None and selection.changes(roots) else None
    if roots is None or bounds is None:
        return
    for name, place in zip(("start", "end"), bounds, strict=True):
        _set(node, name, selection.size(roots[:place]))


def _split(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """By sizes, where the parts may differ now."""
    axis, source = arguments(node)["dim"] % len(node.all_input_nodes[0].meta["shape"]), node.all_input_nodes[0]
    roots = graph.roots(source.name).get(axis)
    if roots is None or not selection.changes(roots):
        return
    ends = np.cumsum([shape[axis] for shape in node.meta["shapes"]])[:-1]
    node.target = torch.ops.aten.split_with_sizes.default
    node.args, node.kwargs = (source, [selection.size(part) for part in np.split(roots, ends)], axis), {}


def _set(node: fx.Node, name: str, value: Any) -> None:
    """An argument of an operator of ATen, wherever it is written."""
    assert isinstance(node.target, torch._ops.OpOverload)
    place = [argument.name for argument in node.target._schema.arguments].index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def _new(node: fx.Node, graph: Graph, selection: Selection) -> None:
    sizes = list(arguments(node)["size"])
    for axis, roots in graph.roots(node.name).items():
        sizes[axis] = selection.size(roots)
    _set(node, "size", sizes)


def _filter(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """A depthwise convolution has as many groups as channels; channels of other grouped ones do not change."""
    roots = graph.roots(arguments(node)["input"].name).get(1)
    if roots is not None and selection.changes(roots) and arguments(node)["groups"] > 1:
        _set(node, "groups", selection.size(roots))


def _norm(node: fx.Node, graph: Graph, selection: Selection) -> None:
    axes, sizes = normalized_axes(node, graph.module), list(arguments(node)["normalized_shape"])
    for place, axis in enumerate(axes):
        roots = graph.roots(node.name).get(axis)
        if roots is not None:
            sizes[place] = selection.size(roots)
    _set(node, "normalized_shape", sizes)


_CHANGES: dict[str, Callable[[fx.Node, Graph, Selection], None]] = {
    **dict.fromkeys(("reshape", "expand", "unflatten"), _reshape),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _new),
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), _filter),
    "slice": _slice,
    "rms_norm": _norm,
}
