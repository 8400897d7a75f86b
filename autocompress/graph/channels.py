"""Which channels of a network are tied together: channel identity, propagated through every operator.

Each tensor carries a layout: for every axis that holds channels one id an entry. Layers make new ids, elementwise operators make the ids
of their operands equal, others move, join or split axes (see `rules`); what is not understood freezes what it reads. Ids that take part
in the same operators form a channel group: channels that can be removed or added one by one, all groups independently. Ids that are equal
go together: the channels of an attention head are one channel here. (Dependency graphs between layers are due to Fang et al. 2023,
DepGraph, arXiv 2301.12900; ids for single channels also cover concatenations, zero-padded shortcuts, heads and added channels.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Layout = Mapping[int, Ids]
"""Ids of the entries of a tensor along each axis that holds channels; other axes cannot change."""


@dataclass(frozen=True)
class Role:
    """A node's part in the life of a channel: `out`, `in`, `depthwise`, `norm`, `add`, `pad`, `parameter`, `product`, `statistic`."""

    node: str
    part: str


@dataclass
class Channels:
    """Result of the propagation: layouts by node name, the class of each id, and what is frozen."""

    layouts: dict[str, Layout] = field(default_factory=dict)
    frozen: dict[int, str] = field(default_factory=dict)
    roles: list[tuple[Role, Ids]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """Neighbours that an operator takes apart."""

    def fresh(self, n: int) -> Ids:
        start = len(self.parents)
        self.parents.extend(range(start, start + n))
        return np.arange(start, start + n)

    def root(self, index: int) -> int:
        while self.parents[index] != index:
            self.parents[index] = self.parents[self.parents[index]]
            index = self.parents[index]
        return index

    def unify(self, first: Ids, second: Ids) -> None:
        """Entry by entry, broadcast to one shape."""
        first, second = np.broadcast_arrays(first, second)
        differ = first != second
        for a, b in zip(first[differ].tolist(), second[differ].tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self.parents[high] = low

    def freeze(self, ids: Ids, reason: str) -> None:
        for index in np.unique(ids).tolist():
            self.frozen.setdefault(index, reason)

    def cut(self, ids: Ids, places: Iterable[int]) -> None:
        """The axis is cut in front of these places."""
        self.cuts += [(int(ids[place - 1]), int(ids[place])) for place in places if 0 < place < len(ids)]

    def play(self, node: str, part: str, ids: Ids) -> None:
        self.roles.append((Role(node, part), ids))

    def roots(self, ids: Ids) -> Ids:
        """The class of each id."""
        return np.array([self.root(index) for index in ids.tolist()], dtype=np.int64)


def group_ids(channels: Channels) -> list[tuple[frozenset[Role], Ids]]:
    """Classes of ids with the same roles: (roles, ids of the classes in order of their first channel)."""
    roles: dict[int, set[Role]] = defaultdict(set)
    for role, ids in channels.roles:
        for index in np.unique(ids).tolist():
            roles[channels.root(index)].add(role)
    grouped: dict[frozenset[Role], list[int]] = defaultdict(list)
    for root in sorted(roles):
        grouped[frozenset(roles[root])].append(root)
    return [(key, np.array(members, dtype=np.int64)) for key, members in grouped.items()]


def frozen_roots(channels: Channels) -> dict[int, str]:
    """Classes that must stay as they are, with the reason."""
    return {channels.root(index): reason for index, reason in channels.frozen.items()}
