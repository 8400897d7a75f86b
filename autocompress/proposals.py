"""First policies of a search: spread over the latencies that the budget allows, each the largest network for its latency.

Uniform draws from a space of many dimensions all look like the average policy. Here every kind of dimension (width, depth, prune, bits)
first draws a level, and its dimensions scatter around it, so that policies reach from barely to fully compressed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autocompress.policy import Policy
from autocompress.records import Workload

SCATTER = 0.2
Value = int | float


@dataclass
class LevelSuggester:
    """Draws like `optuna.Trial`, around one level for each kind of dimension, and remembers what it drew."""

    generator: np.random.Generator
    params: dict[str, Value] = field(default_factory=dict)
    _levels: dict[str, float] = field(default_factory=dict)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        return int(self._keep(name, low + min(high - low, math.floor(self._quantile(name) * (high - low + 1)))))

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        quantile = self._quantile(name)
        if log:
            return float(self._keep(name, min(high, low * (high / low) ** quantile)))
        if step is None:
            return float(self._keep(name, min(high, low + quantile * (high - low))))
        steps = math.floor((high - low) / step + 1e-9)
        return float(self._keep(name, min(high, low + step * min(steps, math.floor(quantile * (steps + 1))))))

    def suggest_categorical(self, name: str, choices: list[int]) -> int:
        return int(self._keep(name, choices[min(len(choices) - 1, math.floor(self._quantile(name) * len(choices)))]))

    def _quantile(self, name: str) -> float:
        kind = name.partition(":")[0]
        level = self._levels.setdefault(kind, float(self.generator.random()))
        return float(np.clip(level + SCATTER * self.generator.standard_normal(), 0.0, 1.0))

    def _keep(self, name: str, value: Value) -> Value:
        self.params[name] = value
        return value


@dataclass(frozen=True)
class Proposal:
    """A policy with the parameters that draw it, its workload and its predicted latency in seconds."""

    policy: Policy
    params: dict[str, Value]
    workload: Workload
    latency_s: float

    @property
    def capacity(self) -> float:
        """How much the network can express, as far as its shape tells: geometric mean of arithmetic and weights."""
        return math.sqrt(max(1, self.workload.macs) * max(1, self.workload.params))


def spread_over_latency(candidates: Sequence[Proposal], n: int, limit_s: float) -> list[Proposal]:
    """`n` proposals within `limit_s`, the one of highest capacity in each of `n` latency bins of equal ratio, slowest bin first."""
    within = [c for c in candidates if c.latency_s <= limit_s]
    if not within or n < 1:
        return []
    fastest = min(c.latency_s for c in within)
    edges = np.geomspace(fastest, max(limit_s, fastest * 1.0001), n + 1)
    chosen: dict[str, Proposal] = {}
    for low, high in zip(edges[-2::-1], edges[:0:-1], strict=True):
        members = [c for c in within if low <= c.latency_s <= high]
        if members:
            best = max(members, key=lambda c: c.capacity)
            chosen.setdefault(best.policy.structure_digest, best)
    return list(chosen.values())
