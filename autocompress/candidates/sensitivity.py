"""What each dimension of the space costs by itself, and from that the best policies for a sweep of budgets.

Each dimension is moved alone away from the least compressed policy, and the student is compared with the teacher (`likeness`). Losses
-log(likeness) are taken to add up, as in SPDY (Frantar & Alistarh 2022, arXiv 2201.13096, section 3.1) and HAWQ-V3 (Yao et al. 2021, arXiv
2011.10680). Latencies do not, since a layer costs the product of its channels: they are added up around a policy, the knapsack is solved,
and the sums are made anew around the solution, until it is its own (sequential linear programming). `benchmarks/search_real.py` compares.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress.budget import Budget
from autocompress.candidates.dimensions import Dimensions
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.knapsack import Array, Knapsack
from autocompress.candidates.proposals import Proposal
from autocompress.devices.timing import MOST_DRIFT
from autocompress.policy import Policy

LEVELS = 2
"""Values of a dimension that are tried alone, at most: its far end and the middle; between them losses are interpolated."""
FASTEST_SHARE = 0.3
"""Of the budget's latency: the least that is solved for."""
BUDGET_SPACING_POWER = 1.5
"""Budgets lie at this power of equal steps of their logarithm: the closer together, the nearer they are to the one asked for."""
MOST_LINEARISATIONS = 8
"""Solutions of one budget, each around the one before."""
BITS_LOSS = 0.02
"""Of a change of bits, where none was tried."""
TIE_BREAK_LOSS = 1e-6
"""What any change loses at least: what neither costs nor gains stays as it is."""
LEAST_WORTH = 1e-3
SAME = 1e-6
LEAST_TRIED = 0.5
"""Share of the dimensions that must have been tried before the losses of all are relied upon."""


@dataclass(frozen=True)
class Single:
    """One value of one dimension, all others as in the least compressed policy, and what inheritance says that it loses."""

    dimension: str
    value: Any
    proposal: Proposal
    lost: float


@dataclass
class Sensitivity:
    """What the values of each dimension lose, and the policies that lose least in all.

    worth: what a policy's student was found to be worth, from 0 to 1; None where it was not tried.
    """

    forecast: Forecast
    worth: Callable[[Policy], float | None]

    # -- the space ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def base(self) -> Proposal:
        """The least compressed policy, away from which dimensions are moved."""
        return self._space.base

    @functools.cached_property
    def _space(self) -> Dimensions:
        return Dimensions(self.forecast)

    @functools.cached_property
    def singles(self) -> list[list[Single]]:
        """Of each dimension, one for each value."""
        base = self.base

        def single(name: str, proposal: Proposal) -> Single:
            return Single(name, proposal.params[name], proposal, max(0.0, math.log(base.inheritance / proposal.inheritance)))

        return [[single(name, proposal) for proposal in beside] for name, beside in self._space.around(base.params).items()]

    # -- what is tried and what it says ------------------------------------------------------------------------------

    def untried(self) -> Iterator[Proposal]:
        """What to try next, alone: the far end of each dimension first, then what lies between; what saves most time first."""
        same = self.forecast.structure(self.base.policy) == self.forecast.structure(Policy())
        if not same and self.worth(self.base.policy) is None:
            yield self.base
        for level in range(LEVELS):
            here = [ladder[level] for ladder in self._ladders if level < len(ladder)]
            for single in sorted(here, key=lambda single: single.proposal.latency_s):
                if self.worth(single.proposal.policy) is None:
                    yield single.proposal

    @property
    def missing(self) -> int:
        """How many dimensions must be tried yet before the losses are relied upon; at most half of them are guessed."""
        tried = sum(any(self.worth(single.proposal.policy) is not None for single in ladder) for ladder in self._ladders)
        return max(0, math.ceil(LEAST_TRIED * len(self._ladders)) - tried)

    @property
    def levels(self) -> list[Single]:
        """All that may be tried alone."""
        return [*itertools.chain(*self._ladders)]

    @functools.cached_property
    def _ladders(self) -> list[list[Single]]:
        """Of each dimension that has something to try: what to try, from the far end."""
        return [ladder for ladder in map(self._levels, self.singles) if ladder]

    def _levels(self, singles: Sequence[Single]) -> list[Single]:
        """The values of a dimension that are worth trying, evenly spaced from the far end; none of those that gain nothing."""
        apart = sorted((single for single in singles if self._costs_something(single) and self._saves(single)), key=lambda s: s.lost)
        places = dict.fromkeys(int(place) for place in np.linspace(len(apart) - 1, 0, LEVELS + 1)[:LEVELS])
        return [apart[place] for place in places] if apart else []

    def _costs_something(self, single: Single) -> bool:
        """Whether the student is not the same function: it has lost channels or blocks, or has other bits."""
        return single.lost > SAME or single.proposal.policy.quant != self.base.policy.quant

    def _saves(self, single: Single) -> bool:
        """Time, or bytes where they are limited."""
        saves_bytes = self._limits_bytes and single.proposal.workload.weight_bytes < self.base.workload.weight_bytes
        return saves_bytes or single.proposal.latency_s < self.base.latency_s

    def losses(self) -> list[Array]:
        """Of each dimension, one a value: as tried, else interpolated over what is lost, else as the others lose for as much.

        Of bits inheritance says nothing: those that were not tried lose as much as the worst that were.
        """
        known = [self._known(singles) for singles in self.singles]
        slopes = [max(losses.values()) / lost for losses in known if (lost := max(losses)) > SAME]
        slope = float(np.median(slopes)) if slopes else 1.0
        bits = [self._loss(single) for single in itertools.chain(*self.singles) if self._changes_bits_only(single)]
        worst = max((loss for loss in bits if loss is not None), default=BITS_LOSS)
        return [self._interpolated(singles, losses, slope, worst) for singles, losses in zip(self.singles, known, strict=True)]

    def _changes_bits_only(self, single: Single) -> bool:
        return single.lost <= SAME and self._costs_something(single)

    def _known(self, singles: Sequence[Single]) -> dict[float, float]:
        """Losses that were found, by what inheritance says is lost."""
        found = {single.lost: self._loss(single) for single in singles}
        return {0.0: 0.0} | {lost: loss for lost, loss in found.items() if loss is not None and lost > SAME}

    def _loss(self, single: Single) -> float | None:
        if not self._costs_something(single):
            return 0.0
        worth, whole = self.worth(single.proposal.policy), self.worth(self.base.policy)
        return max(0.0, math.log((whole or 1.0) / max(worth, LEAST_WORTH))) if worth is not None else None

    def _interpolated(self, singles: Sequence[Single], known: Mapping[float, float], slope: float, bits: float) -> Array:
        lost = sorted(known)
        values = np.array([known[place] for place in lost])
        own = values[-1] / lost[-1] if lost[-1] > SAME else slope

        def loss(single: Single) -> float:
            found = self._loss(single)
            if found is not None:
                return found
            if self._changes_bits_only(single):
                return bits
            return float(np.interp(single.lost, lost, values)) + own * max(0.0, single.lost - lost[-1])

        name = singles[0].dimension
        return np.array([loss(single) + TIE_BREAK_LOSS * (single.value != self.base.params.get(name)) for single in singles])

    def foreseen(self, proposals: Sequence[Proposal]) -> Array:
        """What policies of the space are worth as far as the losses of their dimensions tell; thousands at once take milliseconds."""
        choices = np.array([[self._index(singles, proposal) for singles in self.singles] for proposal in proposals], dtype=np.int64)
        losses = self.losses()
        free = Knapsack(losses, [np.zeros((len(values), 0)) for values in losses])
        return np.exp(-free.totals(choices.reshape(len(proposals), len(losses)))[0])

    def _index(self, singles: Sequence[Single], proposal: Proposal) -> int:
        """The value of this dimension that the policy has, or the nearest one that is looked at."""
        name, values = singles[0].dimension, [single.value for single in singles]
        value = proposal.params.get(name, self.base.params.get(name, values[0]))
        if value in values or not isinstance(value, (int, float)):
            return values.index(value) if value in values else 0
        return int(np.argmin([abs(other - value) for other in values]))

    # -- the best policies ---------------------------------------------------------------------------------------------

    def best(self, n: int, *, until: float = math.inf) -> Iterator[Proposal]:
        """Policies of least loss for `n` budgets, from just below the one asked for down to FASTEST_SHARE of it; different ones.

        Ends at `until` (`time.monotonic()`), or with a budget that nothing keeps.
        """
        losses, current, found = self.losses(), self.base, set[tuple[float, ...]]()
        for place in np.linspace(0, 1, n) ** BUDGET_SPACING_POWER if losses else ():
            share = FASTEST_SHARE**place / (1 + MOST_DRIFT)
            solution = self._solved(losses, current, share * self._most_latency_s, until)
            if solution is None:
                return
            current = solution
            if solution.fingerprint not in found:
                found.add(solution.fingerprint)
                yield solution

    def _solved(self, losses: Sequence[Array], start: Proposal, limit_s: float, until: float) -> Proposal | None:
        """Of the solutions that are found from this start on, the one of least loss that keeps the limits as predicted.

        Each differs from the one before in at most half as many dimensions (a trust region), since sums hold near by only.
        """
        current, best, least, changes = start, None, math.inf, len(losses)
        for _ in range(MOST_LINEARISATIONS):
            if time.monotonic() > until:
                break
            knapsack, limits, here = self._linearised(losses, current, limit_s)
            chosen = knapsack.best(limits, near=here, changes=changes)
            if chosen is None:
                break
            following = self._space.drawn([{s[index].dimension: s[index].value for s, index in zip(self.singles, chosen, strict=True)}])[0]
            loss = float(knapsack.totals(np.array([chosen]))[0][0])
            if loss < least and following.latency_s <= limit_s and self._excess_bytes(following) <= 0:
                best, least = following, loss
            if chosen == here:
                break
            current, changes = following, max(1, changes // 2)
        return best

    def _linearised(self, losses: Sequence[Array], centre: Proposal, limit_s: float) -> tuple[Knapsack, Array, list[int]]:
        """The knapsack around a policy, its limits (of time, and of bytes where they are limited; relative), and the policy in it."""
        around, here = self._space.around(centre.params), self._costs(centre, limit_s)
        costs = [np.array([self._costs(p, limit_s) - here for p in around[singles[0].dimension]]) for singles in self.singles]
        limits = np.array([1.0, 0.0])[: len(here)] - here
        return Knapsack(losses, costs), limits, [self._index(singles, centre) for singles in self.singles]

    def _costs(self, proposal: Proposal, limit_s: float) -> Array:
        share = proposal.latency_s / limit_s
        return np.array([share, self._excess_bytes(proposal)] if self._limits_bytes else [share])

    def _excess_bytes(self, proposal: Proposal) -> float:
        return self.forecast.violation(proposal.workload, proposal.latency_s, self.forecast.budget.of_size)

    @property
    def _limits_bytes(self) -> bool:
        return self.forecast.budget.size_bytes is not None

    @property
    def _most_latency_s(self) -> float:
        """Seconds as predicted that are within the budget's limits on time, by the upper end of their interval; else the original's."""
        limits = self.forecast.budget.of_time
        if limits == Budget():
            return self.forecast.latency_limit
        unit_s = self.forecast.latency_limit
        return unit_s / (1 + self.forecast.violation(self.base.workload, self.forecast.upper(unit_s), limits))
