"""Whether any policy of a space can meet a budget; a search says so before it spends its time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autocompress.budget import Budget
from autocompress.candidates.forecast import FEASIBILITY_SLACK, Forecast, Untrained
from autocompress.candidates.pool import DRAWS
from autocompress.candidates.proposals import Proposal
from autocompress.errors import InfeasibleBudget
from autocompress.policy import Policy
from autocompress.search_space import fastest, smallest
from autocompress.suggesters import LevelSuggester
from autocompress.units import format_duration, format_size
from autocompress.workload import Workload

CURE_MARGIN = 1.02
"""A suggested budget leaves this much room above what was measured."""
MOST_PROBES = 6
"""Networks that are measured before a budget is refused that the last of them misses by less than predictions are off."""


@dataclass(frozen=True)
class Feasibility:
    """Asked first of the ends of the space, which takes seconds, and once the device is known of all that was drawn."""

    forecast: Forecast

    def require_hope(self) -> None:
        """Before the device is profiled: raises InfeasibleBudget when the ends of the space are far over a limit. Takes seconds.

        Over one of bytes at all, where they are the ends: an own space may have other names for what these are guessed from.
        """
        forecast = self.forecast
        generator = np.random.default_rng(forecast.setting.seed)
        drawn = [forecast.suggest(LevelSuggester(generator)) for _ in range(DRAWS)]
        for limits, ends, cost in (
            (forecast.limits.of_time, fastest(forecast.suggest), _arithmetic),
            (forecast.limits.of_size, [smallest(forecast.suggest)], _weight_bytes),
        ):
            if limits == Budget():
                continue
            known = forecast.proposals([*ends, *drawn], [{}] * (len(ends) + len(drawn)))
            least = min(known, key=lambda proposal: cost(proposal.workload)).policy
            is_certain = limits.of_time == Budget() and least in ends  # bytes follow from the shape, seconds do not
            self._require_one_within(limits, limits if is_certain else limits.times(FEASIBILITY_SLACK), [least, *ends])

    def _require_one_within(self, limits: Budget, wide: Budget, policies: Sequence[Policy]) -> None:
        """Raises InfeasibleBudget for the limits when all of these are over the `wide` ones, with the nearest of them."""
        forecast = self.forecast
        measured = list[Untrained]()
        for policy in {policy.digest: policy for policy in policies}.values():
            found = forecast.measure_untrained(policy)
            forecast.add_to_baseline_history(found)
            if found is None or forecast.violation_of(found, wide) <= 0:
                return
            measured.append(found)
        raise self._infeasible(limits, min(measured, key=lambda found: forecast.violation_of(found, limits)))

    def require_feasible(self, pool: Sequence[Proposal]) -> None:
        """Raises InfeasibleBudget unless some policy can meet the limits: on time, and where size is limited too both together."""
        forecast = self.forecast
        waiting = [*(forecast.proposal(policy, {}) for policy in fastest(forecast.suggest)), *pool]
        self._require_time(waiting)
        self._require_both([*waiting, forecast.proposal(smallest(forecast.suggest), {})])

    def _require_time(self, waiting: list[Proposal]) -> None:
        """Where that is open by prediction, up to MOST_PROBES of those that are predicted to be fastest are measured.

        Until one is within the limits, or no other can be.
        """
        forecast = self.forecast
        limits, budget, measured = forecast.limits.of_time, forecast.budget.of_time, list[Untrained]()
        for _ in range(MOST_PROBES):
            nearest = min(waiting, key=lambda p: forecast.model.predict(p.workload).value)
            predicted = forecast.model.predict(nearest.workload)
            if forecast.violation(nearest.workload, predicted.high, budget) <= 0:
                return
            if measured and forecast.violation(nearest.workload, predicted.low, budget) > 0:
                break
            found = forecast.measure_untrained(nearest.policy)
            if found is not None and forecast.violation_of(found, limits) <= 0:
                return
            measured += [found] if found is not None else []
            forecast.refit()
            waiting = [p for p in waiting if p.fingerprint != nearest.fingerprint]
            if not waiting:
                break
        if measured:
            raise self._infeasible(limits, min(measured, key=lambda found: forecast.violation_of(found, limits)))

    def _require_both(self, waiting: Sequence[Proposal]) -> None:
        """What is small enough may be far too slow, and what is fast enough far too large: bits that have no kernel are small, not fast.

        By a wide margin, since those drawn so far are not all that there are.
        """
        forecast = self.forecast
        wide = forecast.budget.times(FEASIBILITY_SLACK)
        if wide.size_bytes is None or wide.of_time == Budget():
            return

        def miss(proposal: Proposal) -> float:
            return forecast.violation(proposal.workload, forecast.model.predict(proposal.workload).low, wide)

        nearest = min(waiting, key=miss)
        found = forecast.measure_untrained(nearest.policy) if miss(nearest) > 0 else None
        if found is not None and forecast.violation_of(found, forecast.limits.times(FEASIBILITY_SLACK)) > 0:
            raise self._infeasible(forecast.limits, found)

    def _infeasible(self, limits: Budget, found: Untrained) -> InfeasibleBudget:
        """With the smallest budgets that work, of the kinds that do not: a time, its 95th percentile, a size."""
        forecast = self.forecast
        budget, latency = limits.against(forecast.recent_baseline_s), forecast.usual(found)
        policy, size_bytes = found.policy, found.size_bytes
        cures, binds = [], ""
        if budget.latency_s is not None and latency.high > budget.latency_s:
            cures.append(format_duration(CURE_MARGIN * latency.high))
        if budget.p95_s is not None and latency.tail > budget.p95_s:
            cures.append(f"p95={format_duration(CURE_MARGIN * latency.tail)}")
        if cures:
            binds = self._binds(forecast.workload(policy))
        if budget.size_bytes is not None and size_bytes > budget.size_bytes:
            cures.append(format_size(CURE_MARGIN * size_bytes))
        which = "nearest" if limits.of_time != Budget() != limits.of_size else "fastest" if budget.size_bytes is None else "smallest"
        reason = f"; the time goes to {binds}" if binds else ""
        told = " ".join(f"--budget {cure.replace(' ', '')}" for cure in cures)
        return InfeasibleBudget(
            f"no policy of the space meets the budget ({forecast.budget.in_words()}): the {which} "
            f"takes {format_duration(latency.high)} and {format_size(size_bytes)} ({policy.in_words()})",
            hint=f"the smallest budget that works here is about {told}{reason}; or use a wider space",
            smallest_latency_s=latency.high,
            binds=binds,
        )

    def _binds(self, workload: Workload) -> str:
        """What takes most of the time: with seconds where operators have been measured, else by arithmetic."""
        forecast = self.forecast
        if len(forecast.model.table):
            parts = heapq.nlargest(3, forecast.model.seconds_by_operator(workload), key=lambda part: part[1])
            return ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in parts)
        return ", ".join(operator.name for operator in heapq.nlargest(3, workload.operators, key=lambda operator: operator.macs))


def _arithmetic(workload: Workload) -> int:
    """Bits multiplied: what a network takes as far as its arithmetic tells."""
    return sum(operator.macs * operator.bits for operator in workload.operators)


def _weight_bytes(workload: Workload) -> int:
    return workload.weight_bytes
