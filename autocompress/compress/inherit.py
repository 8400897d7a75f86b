"""Let a student begin with what a relative has learned: another student of the same teacher that was trained already.

Both are cut from one teacher, so that of each entry of their weights is known which of the teacher's it was, or where it was added. What
both have is taken over; what only the new student has stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from autocompress.compress.student import origins
from autocompress.graph import Graph
from autocompress.graph.nodes import Conv, Weighted
from autocompress.graph.resize import NEW, Roots, Selection
from autocompress.policy import Policy

MOST_ADDED = 2**20
"""Channels that are added in one place."""
Pair = tuple[Roots | None, Roots | None]
"""Where the entries of two students along an axis come from, see `origins`."""
Shared = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Positions along an axis that two students have in common: in the one, and in the other."""


@torch.no_grad()
def inherit(student: fx.GraphModule, graph: Graph, policy: Policy, relative: Mapping[str, Tensor], of: Policy) -> float:
    """Give a student, in place, the weights that a relative of it has; the share of its parameters that these are.

    Layers of low rank are left out: what the two that stand for one hand over is theirs alone.

    Args:
        student: what `build_student` makes of the teacher's graph and the policy.
        relative: the relative's state dict, of the policy `of`.
    """
    whole, axes = graph.module.state_dict(), dict(_axes(student, graph, policy, of))
    own, given = {name for name, _ in student.named_parameters()}, 0
    for name, value in student.state_dict().items():
        known = axes.get(name, [])
        if name not in relative or name not in whole or (not known and relative[name].shape != value.shape):  # of dropped blocks
            continue
        pairs: list[Pair] = [known[axis] if axis < len(known) else (None, None) for axis in range(value.dim())]
        shared = [_shared(mine, theirs, size) for (mine, theirs), size in zip(pairs, whole[name].shape, strict=True)]
        places, sources = _places([first for first, _ in shared]), _places([second for _, second in shared])
        value[places] = relative[name][sources].to(value.dtype)
        given += value[places].numel() if name in own else 0
    return given / max(1, sum(parameter.numel() for parameter in student.parameters()))


def _axes(student: fx.GraphModule, graph: Graph, policy: Policy, of: Policy) -> Iterator[tuple[str, list[Pair]]]:
    """(tensor, for each axis where the entries of either student come from) of whatever follows channels."""
    selections, teachers = (graph.selection(policy), graph.selection(of)), dict(graph.module.named_modules())
    for node in student.graph.nodes:
        target = str(node.target)
        if node.op == "get_attr":
            yield target, _pairs(node, student, graph, selections)
        elif node.op == "call_module" and target in teachers:  # what has two of low rank in its place is not
            module, pairs = teachers[target], _pairs(node, student, graph, selections)
            grouped = isinstance(module, Conv) and module.groups > 1
            yield f"{target}.weight", pairs[:1] if grouped else pairs
            for name in ("bias", "running_mean", "running_var"):
                yield f"{target}.{name}", pairs[:1] if isinstance(module, Weighted) else pairs


def _pairs(node: fx.Node, student: fx.GraphModule, graph: Graph, selections: Sequence[Selection]) -> list[Pair]:
    mine, theirs = (origins(node, student, graph, selection) for selection in selections)
    return [*zip(mine, theirs, strict=True)]


def _places(axes: Sequence[NDArray[np.int64]]) -> tuple[Tensor, ...]:
    """The entries of a tensor at these positions of each axis."""
    return tuple(torch.from_numpy(index) for index in np.ix_(*axes)) if axes else ()


def _shared(mine: Roots | None, theirs: Roots | None, size: int) -> Shared:
    """size: of the axis in the teacher."""
    whole = np.arange(size)
    own, other = (_keys(whole if index is None else index) for index in (mine, theirs))
    _, first, second = np.intersect1d(own, other, return_indices=True)
    return first, second


def _keys(index: Roots) -> NDArray[np.int64]:
    """A number for each entry: of one of the teacher's its position, of an added one also how many have been added there before it."""
    added = index == NEW
    place = np.maximum.accumulate(np.where(added, -1, index)) if len(index) else index
    starts = np.maximum.accumulate(np.where(added, -1, np.arange(len(index)))) if len(index) else index
    return (place + 1) * MOST_ADDED + np.arange(len(index)) - starts
