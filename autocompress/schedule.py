"""How a search divides its time, and which policies climb to the upper rung."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from autocompress.front import measured, ranks
from autocompress.records import Outcome

CALIBRATION_SHARE = 0.08
CALIBRATION_CAP_S = 120.0
SHORT_SHARE = 0.35
SHORT_RUNS = 9
FULL_FACTOR = 5.0
MOST_FULL_RUNS = 6


@dataclass(frozen=True)
class Clock:
    """Time of one search against its promise, in seconds of a monotonic clock."""

    started: float
    total: float
    reserve: float = 0.0
    """Kept for the end: re-measuring the front, scoring the test set, writing the report."""

    @classmethod
    def start(cls, total: float, already: float = 0.0) -> Clock:
        return cls(time.monotonic() - already, total)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Until the reserve begins; never negative."""
        return max(0.0, self.total - self.reserve - self.elapsed)

    def with_reserve(self, seconds: float) -> Clock:
        return Clock(self.started, self.total, min(seconds, 0.3 * self.total))


def calibration_seconds(clock: Clock) -> float:
    return min(CALIBRATION_CAP_S, CALIBRATION_SHARE * clock.total, 0.5 * clock.left)


@dataclass(frozen=True)
class Division:
    """Seconds for the short rung as a whole and for one short run (training, export and measuring)."""

    short_total: float
    short_each: float

    @classmethod
    def of(cls, left: float, overhead: float) -> Division:
        """Divide what is `left`; a run is never shorter than twice its overhead (export, scoring, measuring)."""
        total = SHORT_SHARE * left
        return cls(total, max(total / SHORT_RUNS, 2.0 * overhead))


def full_runs(left: float, short_each: float, candidates: int) -> int:
    """How many policies share the time that is left, each with about FULL_FACTOR short runs' worth."""
    affordable = int(left / max(FULL_FACTOR * short_each, 1e-9))
    return max(0, min(MOST_FULL_RUNS, candidates, max(1, affordable)))


def promoted(outcomes: Sequence[Outcome], n: int) -> list[Outcome]:
    """`n` outcomes for the upper rung: by non-domination rank, and within a rank those that lie furthest apart in latency.

    Distances are ratios of latencies; the most accurate of the first rank always climbs.
    """
    candidates = measured(list(outcomes))
    if not candidates or n < 1:
        return []
    gains = np.array([o.val_score.gain for o in candidates if o.val_score])
    logs = np.log([o.latency_s.median for o in candidates if o.latency_s])
    rank = ranks(np.column_stack([gains, np.exp(logs)]))
    chosen: list[int] = [int(np.lexsort((-gains, rank))[0])]
    while len(chosen) < min(n, len(candidates)):
        rest = [i for i in range(len(candidates)) if i not in chosen]
        best_rank = min(rank[i] for i in rest)
        level = [i for i in rest if rank[i] == best_rank]
        chosen.append(max(level, key=lambda i: min(abs(logs[i] - logs[j]) for j in chosen)))
    return [candidates[i] for i in chosen]


def rank_correlation(below: Sequence[float], above: Sequence[float]) -> float | None:
    """Spearman's rho between two rungs; None below three pairs or when one side is constant."""
    if len(below) < 3 or len(set(below)) < 2 or len(set(above)) < 2:
        return None
    return float(spearmanr(below, above).statistic)
