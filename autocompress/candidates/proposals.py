"""First policies of a search: over all latencies that the budget allows, what promises most.

Uniform draws from a space of many dimensions all look like the average policy. Here every kind of dimension first draws a level, and its
dimensions scatter around it (`LevelSuggester`), so that policies reach from barely to fully compressed; the best of these are then
varied. What inherits most leads after little training; wider networks are for the sampler to find.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.graph import Workloads
from autocompress.policy import Policy
from autocompress.workload import Operator, Shape, Workload

CELLS, KEPT_EACH = 64, 8
"""Of a pool by latency: so many parts of equal ratio, and of each so many proposals."""
LEAST_RANGE = 1.5
LEAST_LEFT = 1e-3


@dataclass(frozen=True)
class Proposal:
    """A policy with the parameters that draw it, its workload, its predicted latency in seconds, and what to expect of it untrained.

    inheritance: share of the teacher's arithmetic that the student starts from, see `inheritance`.
    capacity: how much the network can express, as far as its shape tells, see `capacity`.
    """

    policy: Policy
    params: dict[str, Any]
    workload: Workload
    latency_s: float
    inheritance: float
    capacity: float

    @property
    def fingerprint(self) -> tuple[float, ...]:
        """Numbers in which two different networks hardly ever agree."""
        return self.latency_s, self.inheritance, self.capacity, self.workload.weight_bytes

    @property
    def promise(self) -> float:
        """What it starts from, times the root of what it can become: of networks that inherit alike the larger one learns more.

        The root, because a large network also takes more of the time in which all must be trained.
        """
        return self.inheritance * math.sqrt(self.capacity)


def elites(proposals: Sequence[Proposal], limit_s: float, merit: Callable[[Proposal], Any]) -> list[list[Proposal]]:
    """The KEPT_EACH of most merit of each of CELLS latencies, best first; empty cells are left out.

    The cells are of equal ratio, from the fastest (which stays in any case) to `limit_s`; where nothing is as fast as that, or hardly, to
    LEAST_RANGE times the fastest. Proposals that are alike in all that is known of them count once.
    """
    fastest = min(proposals, key=lambda p: p.latency_s)
    limit_s = max(limit_s, LEAST_RANGE * fastest.latency_s)
    step = math.log(limit_s / fastest.latency_s) / CELLS
    cells: defaultdict[int, dict[tuple[float, ...], Proposal]] = defaultdict(dict)
    for proposal in proposals:
        if proposal.latency_s <= limit_s:
            cell = min(CELLS - 1, int(math.log(proposal.latency_s / fastest.latency_s) / step))
            cells[cell].setdefault(proposal.fingerprint, proposal)
    found = [heapq.nlargest(KEPT_EACH, cells[cell].values(), key=merit) for cell in sorted(cells)]
    if fastest not in found[0]:
        found[0].append(fastest)
    return found


def inheritance(students: Workloads, teacher: Workload) -> list[float]:
    """Share of the teacher's multiply-accumulates that are left, as geometric mean over the resolutions at which it computes.

    A network that keeps one stage and drops another has lost more than the sum says. `students` are without added channels.
    """
    whole: Counter[Shape] = Counter()
    for operator in teacher.operators:
        whole[_resolution(operator)] += operator.macs
    resolutions = [resolution for resolution, macs in whole.items() if macs]
    if not resolutions:
        return [1.0] * len(students)
    left = students.total([functools.partial(_share, resolution, whole[resolution]) for resolution in resolutions])
    return [float(share) for share in np.exp(np.log(np.maximum(left, LEAST_LEFT)).mean(0))]


def capacity(students: Workloads) -> list[float]:
    """Geometric mean of multiply-accumulates and parameters."""
    macs, params = students.total([lambda operator: operator.macs, lambda operator: operator.params])
    return [float(size) for size in np.sqrt(np.maximum(1, macs) * np.maximum(1, params))]


def _share(resolution: Shape, macs: int, operator: Operator) -> float:
    return operator.macs / macs if _resolution(operator) == resolution else 0.0


def _resolution(operator: Operator) -> Shape:
    """Positions at which it computes: of maps their sides, of tokens and steps their number."""
    if operator.kind == "recurrent":
        return operator.output[:1]
    return operator.output[2:] if operator.kernel else operator.output[1:-1]


def outclassed(candidate: Proposal, known: Sequence[Proposal]) -> float:
    """How clearly some network of `known` beats the candidate before either is trained; 0 when none does.

    It beats it when it is no slower, keeps more of the teacher and is larger; by the smaller of these two relative differences.
    """

    def lead(other: Proposal) -> float:
        if other.latency_s > candidate.latency_s:
            return 0.0
        return min(1 - candidate.inheritance / other.inheritance, 1 - candidate.capacity / other.capacity)

    return max(0.0, *(lead(other) for other in known)) if known else 0.0
