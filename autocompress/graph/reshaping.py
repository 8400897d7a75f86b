"""Channel identity through operators that only move entries: axes that change places, are merged or taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import fx

from autocompress.graph.channels import Channels, Ids, Layout
from autocompress.graph.nodes import TRANSPOSED, arguments, name_of

Move = Mapping[int, int]
"""Axis before -> axis after, of the axes that stay."""


def moves(node: fx.Node) -> Move | None:
    """Where each axis goes; None for what is no mere move."""
    given, name = arguments(node), name_of(node)
    before = node.all_input_nodes[0].meta["shape"]
    rank = len(before)
    if name == "permute":
        return {axis % rank: place for place, axis in enumerate(given["dims"])}
    if name in TRANSPOSED:
        first, second = TRANSPOSED[name]
        a, b = ((axis if isinstance(axis, int) else given[axis]) % rank for axis in (first, second))
        return {axis: {a: b, b: a}.get(axis, axis) for axis in range(rank)}
    if name in ("movedim", "moveaxis"):
        return _moved(given["source"], given["destination"], rank)
    if name == "unsqueeze":
        place = given["dim"] % (rank + 1)
        return {axis: axis + (axis >= place) for axis in range(rank)}
    if name == "squeeze":
        dims = given.get("dim")
        asked = range(rank) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
        gone = [axis for axis in asked if before[axis] == 1]
        return {axis: axis - sum(d < axis for d in gone) for axis in range(rank) if axis not in gone}
    return None


def _moved(source: int | Sequence[int], destination: int | Sequence[int], rank: int) -> Move:
    """Some axes go where they are wanted; the others keep their order around them."""
    wanted = [[axis % rank for axis in ([axes] if isinstance(axes, int) else axes)] for axes in (source, destination)]
    others = [[axis for axis in range(rank) if axis not in named] for named in wanted]
    return dict(zip(wanted[0] + others[0], wanted[1] + others[1], strict=True))


def tied(ids: Ids, n: int, channels: Channels) -> Ids:
    """One id for every `n` neighbours, which go together."""
    rows = ids.reshape(-1, n)
    channels.unify(rows, rows[:, :1])
    return rows[:, 0]


def split_ids(node: fx.Node, source: Layout, channels: Channels) -> Layout:
    """The layout of a reshaped tensor: axes are merged and taken apart group by group."""
    before, after = node.all_input_nodes[0].meta["shape"], node.meta["shape"]
    layout: dict[int, Ids] = {}
    for old, new in _matched(before, after):
        inside = [axis for axis in old if axis in source]
        if not inside:
            continue
        wide = [axis for axis in new if after[axis] != 1]
        if len(inside) == 1 and len(wide) == 1:
            layout[wide[0]] = _merged(source[inside[0]], [before[axis] for axis in old], old.index(inside[0]))
        elif len(inside) == 1 and before[inside[0]] == int(np.prod([before[axis] for axis in old])) and wide:
            live = _live(node, wide)
            layout[wide[live]] = _tied(source[inside[0]].reshape([after[axis] for axis in wide]), live, channels)
        else:
            for axis in inside:
                channels.freeze(source[axis], f"{name_of(node)} mixes it with others")
    return layout


def _matched(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest groups of neighbouring axes that hold the same entries before and after."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        sizes = [before[i], after[j]]
        while sizes[0] != sizes[1]:
            side, axes, shape = (0, old, before) if sizes[0] < sizes[1] else (1, new, after)
            axes.append(axes[-1] + 1)
            sizes[side] *= shape[axes[-1]]
        groups.append((old, new))
        i, j = old[-1] + 1, new[-1] + 1
    return [*groups, *(([axis], []) for axis in range(i, len(before)))]  # of size 1, as all that is left


def _merged(ids: Ids, sizes: Sequence[int], place: int) -> Ids:
    """Ids of one axis, spread over the entries of all axes that it is merged with."""
    shape = [1] * len(sizes)
    shape[place] = -1
    return np.broadcast_to(ids.reshape(shape), sizes).ravel()


def _tied(ids: Ids, live: int, channels: Channels) -> Ids:
    """Where an axis becomes several, only one of them can change: what has the same place on it goes together."""
    rows = np.moveaxis(ids, live, 0).reshape(ids.shape[live], -1)
    channels.unify(rows, rows[:, :1])
    return rows[:, 0]


def _live(node: fx.Node, axes: Sequence[int]) -> int:
    """Which of the axes that one becomes can change: heads, which come first but for queries, keys and values; in a shuffle the last."""
    if len(axes) == 2 and _is_shuffled(node, axes):
        return 1
    return next((place for place, axis in enumerate(axes) if not _is_taken_apart(node, axis)), 0)


def _is_taken_apart(node: fx.Node, axis: int) -> bool:
    """Whether somebody takes single entries of an axis of the value, as queries, keys and values are."""
    for user in node.users:
        if name_of(user) in ("select", "unbind") and arguments(user)["dim"] % len(node.meta["shape"]) == axis:
            return True
        where = moves(user) if arguments(user) else None
        if where is not None and axis in where and _is_taken_apart(user, where[axis]):
            return True
    return False


def _is_shuffled(node: fx.Node, axes: Sequence[int]) -> bool:
    """Whether the axes only change places and become one again (as in ShuffleNet, Zhang et al. 2018, arXiv 1707.01083)."""
    users = list(node.users)
    if len(users) != 1 or name_of(users[0]) not in ("transpose", "permute"):
        return False
    where = moves(users[0]) or {}
    readers = list(users[0].users)
    swapped = (where.get(axes[0]), where.get(axes[1])) == (axes[1], axes[0])
    return swapped and len(readers) == 1 and name_of(readers[0]) in ("reshape", "flatten")
