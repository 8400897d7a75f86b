"""New layouts: which channels stay, and where added ones go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Roots = NDArray[np.int64]
NEW = -1


@dataclass(frozen=True)
class Selection:
    """For every id class: whether it stays (`keep`), and how many new channels follow it (`added`)."""

    keep: NDArray[np.bool_]
    added: NDArray[np.int64]

    def size(self, roots: Roots) -> int:
        """Number of channels that a layout has afterwards."""
        return int(self.keep[roots].sum() + self.added[roots].sum())

    def index(self, roots: Roots) -> Roots:
        """For each new position the old one that it takes its weights from, or NEW; neighbours of one class stay together."""
        positions: list[Roots] = []
        starts = np.flatnonzero(np.concatenate([[True], roots[1:] != roots[:-1]])) if len(roots) else np.zeros(0, dtype=np.int64)
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(roots)], strict=False):
            root = roots[start]
            if self.keep[root]:
                positions.append(np.arange(start, end))
            if self.added[root]:
                positions.append(np.full(int(self.added[root]) * (end - start), NEW))
        return np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)

    def changes(self, roots: Roots) -> bool:
        return not bool(self.keep[roots].all()) or bool(self.added[roots].any())


@dataclass(frozen=True)
class Groups:
    """Channel groups that may change.

    order: group -> its id classes, most important first. ends: group -> last class of each of its contiguous runs; added channels are
    spread equally over them, so that every tensor that shares the group stays aligned.
    """

    order: Mapping[str, Roots]
    ends: Mapping[str, Roots]

    def select(self, n_classes: int, sizes: Mapping[str, int]) -> Selection:
        """Choose channels for new group sizes; groups left out keep theirs."""
        keep = np.ones(n_classes, dtype=bool)
        added = np.zeros(n_classes, dtype=np.int64)
        for group, size in sizes.items():
            extra, ends = size - len(self.order[group]), self.ends[group]
            if extra < 0:
                keep[self.order[group][size:]] = False
            elif extra > 0:
                share, rest = divmod(extra, len(ends))
                added[ends] = share
                added[ends[:rest]] += 1
        return Selection(keep, added)

    def count(self, group: str, roots: Roots, sizes: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each size that the group may have: how many channels of a layout belong to it, as `select` would choose them."""
        order, ends = self.order[group], self.ends[group]
        times = np.bincount(roots, minlength=int(order.max()) + 1)
        share, rest = np.divmod(np.maximum(sizes - len(order), 0), len(ends))
        kept = _running(times[order])[np.minimum(sizes, len(order))]
        return kept + share * times[ends].sum() + _running(times[ends])[rest]


def _running(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums of the first 0, 1, 2, ... entries."""
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])


def run_ends(members: Roots, layouts: Iterable[Roots]) -> Roots:
    """Classes of a group after which, in some layout, a channel of another group follows; at least the last class."""
    inside = set(members.tolist())
    ends: set[int] = set()
    for roots in layouts:
        row = roots.tolist()
        ends |= {row[i] for i in range(len(row)) if row[i] in inside and (i + 1 == len(row) or row[i + 1] not in inside)}
    return np.array(sorted(ends or {int(members[-1])}), dtype=np.int64)


def are_alike(members: Roots, layouts: Iterable[Roots]) -> bool:
    """Whether every layout has each class of a group as often as the others: then their number alone decides its size."""
    for roots in layouts:
        times = np.bincount(roots, minlength=int(members.max()) + 1)[members]
        if times.min() != times.max():
            return False
    return True
