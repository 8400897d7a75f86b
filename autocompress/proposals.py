"""First policies of a search: spread over the latencies that the budget allows, each the most promising network for its latency.

Uniform draws from a space of many dimensions all look like the average policy. Here every kind of dimension (width, depth, prune, bits)
first draws a level, and its dimensions scatter around it, so that policies reach from barely to fully compressed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from autocompress.policy import DistillSpec, Policy
from autocompress.records import Workload

SCATTER = 0.2
LEAST_SHARE = 1e-3
"""Of the limit: what is predicted to be faster than that counts as that fast, so that one absurd prediction does not take all bands."""
USUAL: dict[str, float] = DistillSpec().model_dump()
"""Dimensions that first policies leave at their usual value, so that they differ in structure only."""
Value = bool | int | float | str | None
"""What Optuna takes for a parameter."""


@dataclass
class LevelSuggester:
    """Draws like `optuna.Trial`, around one level for each kind of dimension, and remembers what it drew."""

    generator: np.random.Generator
    params: dict[str, Value] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Proposal:
    """A policy with the parameters that draw it, its workload, its predicted latency in seconds, and what it keeps of the teacher.

    inherited_macs: multiply-accumulates that start from the teacher's weights, without added channels.
    """

    policy: Policy
    params: dict[str, Value]
    workload: Workload
    latency_s: float
    inherited_macs: int

    @property
    def capacity(self) -> float:
        """How much the network can express, as far as its shape tells: geometric mean of arithmetic and weights."""
        return math.sqrt(max(1, self.workload.macs) * max(1, self.workload.params))


def without_growth(policy: Policy) -> Policy:
    """The policy with no channels added: what of its student comes from the teacher."""
    student = policy.student
    widths = {group: min(1.0, width) for group, width in student.widths.items()}
    return policy.model_copy(update={"student": student.model_copy(update={"width": min(1.0, student.width), "widths": widths})})


def outclassed(candidate: Proposal, known: Sequence[Proposal]) -> float:
    """How clearly some network of `known` beats the candidate before either is trained; 0 when none does.

    It beats it when it is no slower, keeps more of the teacher and is larger; by the smaller of these two relative differences.
    """

    def lead(other: Proposal) -> float:
        if other.latency_s > candidate.latency_s:
            return 0.0
        return min(1 - candidate.inherited_macs / max(1, other.inherited_macs), 1 - candidate.capacity / other.capacity)

    return max(0.0, *(lead(other) for other in known)) if known else 0.0


def spread_over_latency(candidates: Sequence[Proposal], n: int, limit_s: float) -> list[Proposal]:
    """For `n` latencies inside the range up to `limit_s`, in equal ratios, what inherits most; for every second the largest too.

    The ends of the range are left out: at the slow end stands the unchanged network, and nothing much at the fast one. What inherits
    most leads after little training, what is large may lead after much.
    """
    within = [c for c in candidates if c.latency_s <= limit_s]
    if not within or n < 1:
        return []
    fastest = max(min(c.latency_s for c in within), LEAST_SHARE * limit_s)
    steps = [(limit_s / fastest) ** (-(index + 0.5) / n) * limit_s for index in range(n)]
    chosen: dict[str, Proposal] = {}
    for index, (slowest, next_one) in enumerate(zip(steps, [*steps[1:], 0.0], strict=True)):
        members = [c for c in within if next_one < c.latency_s <= slowest]
        if not members:
            continue
        picks = [max(members, key=lambda c: c.inherited_macs)]
        if index % 2 == 0:
            picks.append(max(members, key=lambda c: c.capacity))
        for pick in picks:
            chosen.setdefault(pick.policy.structure_digest, pick)
    return list(chosen.values())
