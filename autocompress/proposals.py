"""First policies of a search: over all latencies that the budget allows, what inherits most of the teacher.

Uniform draws from a space of many dimensions all look like the average policy. Here every kind of dimension (width, depth, prune, bits)
first draws a level, and its dimensions scatter around it, so that policies reach from barely to fully compressed; the best of these are
then varied. What inherits most leads after little training; wider networks are for the sampler to find.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autocompress.graph import Workloads
from autocompress.policy import DistillSpec, Policy
from autocompress.records import Operator, Shape, Workload

SCATTER = 0.2
VARIED = 1.5
"""Dimensions that a variation changes, on average."""
LEAST_LEFT = 1e-3
CLEARANCE = 1.05
LARGEST_RANGE = 1e3
"""One absurd prediction does not stretch the bands beyond all others."""
USUAL: dict[str, float] = {f"distill:{name}": value for name, value in DistillSpec().model_dump().items()}
"""Dimensions that first policies leave at their usual value, so that they differ in structure only."""


@dataclass
class LevelSuggester:
    """Draws like `optuna.Trial`, around one level for each kind of dimension, and remembers what it drew."""

    generator: np.random.Generator
    params: dict[str, Any] = field(default_factory=dict)
    _levels: dict[str, float] = field(default_factory=dict)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        quantile = self._quantile(name)
        if log:
            return int(self._keep(name, min(high, round(low * (high / low) ** quantile))))
        steps = (high - low) // step
        return int(self._keep(name, low + step * min(steps, math.floor(quantile * (steps + 1)))))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        if low <= USUAL.get(name, math.inf) <= high and step is None:
            return float(self._keep(name, USUAL[name]))
        quantile = self._quantile(name)
        if log:
            return float(self._keep(name, min(high, low * (high / low) ** quantile)))
        if step is None:
            return float(self._keep(name, min(high, low + quantile * (high - low))))
        steps = math.floor((high - low) / step + 1e-9)
        return float(self._keep(name, min(high, low + step * min(steps, math.floor(quantile * (steps + 1))))))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._keep(name, choices[min(len(choices) - 1, math.floor(self._quantile(name) * len(choices)))])

    def _quantile(self, name: str) -> float:
        kind = name.partition(":")[0]
        level = self._levels.setdefault(kind, float(self.generator.random()))
        return float(np.clip(level + SCATTER * self.generator.standard_normal(), 0.0, 1.0))

    def _keep(self, name: str, value: Any) -> Any:
        self.params[name] = value
        return value


@dataclass
class Variation(LevelSuggester):
    """Draws a policy again, but for one or two of its dimensions."""

    parent: dict[str, Any] = field(default_factory=dict)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        if self._stays(name) and low <= self.parent[name] <= high:
            return int(self._keep(name, self.parent[name]))
        return super().suggest_int(name, low, high, step=step, log=log)

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        if self._stays(name) and low <= self.parent[name] <= high:
            return float(self._keep(name, self.parent[name]))
        return super().suggest_float(name, low, high, step=step, log=log)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if self._stays(name) and self.parent[name] in choices:
            return self._keep(name, self.parent[name])
        return super().suggest_categorical(name, choices)

    def _stays(self, name: str) -> bool:
        return name in self.parent and self.generator.random() >= VARIED / len(self.parent)


@dataclass(frozen=True)
class Proposal:
    """A policy with the parameters that draw it, its workload, its predicted latency in seconds, and what it keeps of the teacher.

    inheritance: share of the teacher's arithmetic that the student starts from, see `inheritance`.
    """

    policy: Policy
    params: dict[str, Any]
    workload: Workload
    latency_s: float
    inheritance: float

    @property
    def capacity(self) -> float:
        """How much the network can express, as far as its shape tells: geometric mean of arithmetic and weights."""
        return math.sqrt(max(1, self.workload.macs) * max(1, self.workload.params))


def inheritance(students: Workloads, teacher: Workload) -> list[float]:
    """Share of the teacher's multiply-accumulates that are left, as geometric mean over the resolutions at which it computes.

    A network that keeps one stage and drops another has lost more than the sum says. `students` are without added channels.
    """
    whole: Counter[Shape] = Counter()
    for operator in teacher.operators:
        whole[operator.output[2:]] += operator.macs
    resolutions = [resolution for resolution, macs in whole.items() if macs]
    if not resolutions:
        return [1.0] * len(students)
    left = students.total([functools.partial(_share, resolution, whole[resolution]) for resolution in resolutions])
    return [float(share) for share in np.exp(np.log(np.maximum(left, LEAST_LEFT)).mean(0))]


def _share(resolution: Shape, macs: int, operator: Operator) -> float:
    return operator.macs / macs if operator.output[2:] == resolution else 0.0


def outclassed(candidate: Proposal, known: Sequence[Proposal]) -> float:
    """How clearly some network of `known` beats the candidate before either is trained; 0 when none does.

    It beats it when it is no slower, keeps more of the teacher and is larger; by the smaller of these two relative differences.
    """

    def lead(other: Proposal) -> float:
        if other.latency_s > candidate.latency_s:
            return 0.0
        return min(1 - candidate.inheritance / other.inheritance, 1 - candidate.capacity / other.capacity)

    return max(0.0, *(lead(other) for other in known)) if known else 0.0


@dataclass(frozen=True)
class Band:
    """Latencies in seconds, from above `fastest` to `slowest`."""

    fastest: float
    slowest: float

    def __contains__(self, latency_s: object) -> bool:
        return isinstance(latency_s, float) and self.fastest < latency_s <= self.slowest

    def leader(self, candidates: Sequence[Proposal]) -> Proposal | None:
        """What inherits most of those that are predicted to lie in the band, clear of its slow end: predictions are off by some percent."""
        members = [c for c in candidates if self.fastest < c.latency_s <= self.slowest / CLEARANCE]
        return max(members, key=lambda c: c.inheritance, default=None)


def bands(candidates: Sequence[Proposal], n: int, limit_s: float) -> list[Band]:
    """`n` bands of equal ratio, slowest first, over the latencies of the candidates up to `limit_s`.

    Half a band at the slow end is left out: there stands the unchanged network, and what is predicted there may be over the budget.
    """
    within = [c.latency_s for c in candidates if c.latency_s <= limit_s]
    if not within or n < 1:
        return []
    ratio = min(LARGEST_RANGE, limit_s / min(within)) ** (1 / n)
    edges = [limit_s * ratio ** -(index + 0.5) for index in range(n)]
    return [Band(fastest, slowest) for slowest, fastest in zip(edges, [*edges[1:], 0.0], strict=True)]
