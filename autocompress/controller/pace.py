"""What runs have cost so far, and what that makes of the time that is left."""

from __future__ import annotations

import functools
import statistics
import time
from dataclasses import dataclass

from autocompress.controller.findings import Findings
from autocompress.policy import Policy, QuantSpec
from autocompress.ranking.front import measured
from autocompress.schedule import (
    FULL_FACTOR,
    LEAST_COST,
    LEAST_FULL_STEPS,
    MOST_COST,
    TELLING_MARGIN,
    TELLING_STEPS,
    Division,
    extended,
)
from autocompress.study.journal import MOST_KILLS
from autocompress.study.notes import Note
from autocompress.trial.objective import training_step_seconds

WITHOUT_FRONT = 0.8
"""Share of the time until the end that short runs may use while nothing within the budget was found: the end has little to measure then."""
PROBE_SHARE = 0.01
"""Share of the time for the steps of training that tell what a step takes."""
LEAST_OVERHEAD_S = 5.0
"""Seconds that a policy is taken to cost beside training, at least, until one has told."""


@dataclass(eq=False)
class Pace:
    """Seconds for the runs of one search, from what its own so far have taken: another one may have run on another machine."""

    findings: Findings

    # -- what a run costs ----------------------------------------------------------------------------------------------

    def overhead(self) -> float:
        """Seconds that a short run costs beside training, as a rule: where the machine was restless, measuring took longer.

        Before the first, as much as the unchanged network in int8, and its reconstruction about as much as an appraisal.
        """
        outcomes = measured(self.findings.own_outcomes)
        if short := [o.seconds - o.training_s for o in outcomes if o.rung == "short"]:
            return statistics.median_low(short)
        unchanged = [o.seconds - o.training_s for o in outcomes if o.rung == "unchanged"]
        return statistics.median_low(unchanged or [self._guessed()]) + self.findings.appraisals.seconds_each

    def finishing(self) -> float:
        """Seconds that any run costs after its training."""
        known = [o.finishing_s for o in measured(self.findings.own_outcomes) if o.finishing_s]
        return statistics.median_low(known or [self._guessed()])

    def _guessed(self) -> float:
        """Seconds for exporting, scoring and measuring a policy before one has told: as the networks took that were measured untrained."""
        findings, spent = self.findings, self.findings.setting.ledger.spent()
        each = (spent.get("export", 0.0) + spent.get("measure", 0.0)) / max(1, len(findings.forecast.networks))
        return max(LEAST_OVERHEAD_S, each + findings.per_example_s * len(findings.setting.data.val))

    def step_seconds(self) -> float:
        """What a step of training took, as a rule; before the first, what one of a network just within the budget is likely to take."""
        known = [o.training_s / o.steps for o in self.findings.own_outcomes if o.steps]
        return statistics.median_low(known) if known else self._probed

    @functools.cached_property
    def _probed(self) -> float:
        """0 where the search was killed over these steps time and again: the original takes more memory than its students."""
        findings, batch_size = self.findings, self.findings.setting.batch_size
        kills = (findings.journal.noted(Note.PROBING) or []).count(batch_size)
        if kills >= MOST_KILLS:
            return 0.0
        findings.journal.note(Note.PROBING, [batch_size] * (kills + 1))
        try:
            seconds = training_step_seconds(findings.setting, time.monotonic() + PROBE_SHARE * findings.clock.total)
        finally:
            findings.journal.note(Note.PROBING, None)
        return min(1.0, findings.forecast.latency_limit / findings.setting.baseline.latency_s.median) * seconds

    def step_cost(self, policy: Policy) -> float:
        """What a training step of the student costs, up to a factor: as its latency in float32 tells, in which it is trained."""
        return self.findings.forecast.predict(policy.model_copy(update={"quant": QuantSpec()})).value

    def relative_cost(self, policy: Policy) -> float:
        """What a step of a short run costs beside those before, as a rule: runs of about as many steps can be compared."""
        known = [self.step_cost(o.policy) for o in self.findings.short_runs if o.steps]
        return min(MOST_COST, max(LEAST_COST, self.step_cost(policy) / statistics.median_low(known))) if known else 1.0

    # -- what a run may take -------------------------------------------------------------------------------------------

    def division(self, left: float) -> Division:
        """How so many seconds are divided among short runs, and what follows them."""
        return Division.of(left, self.overhead(), TELLING_MARGIN * TELLING_STEPS * self.step_seconds())

    def short_seconds(self, division: Division) -> float:
        """More than its share where appraisal does not foretell what short training makes of policies, and these runs tell."""
        return extended(division.short_total, self.findings.ladder().appraised_short_spearman if self.short_runs_tell() else None)

    def room_for_short(self, until: float, division: Division) -> bool:
        """Whether another short run fits. Until one is within the budget they take what time there is: nothing else could use it."""
        if not self.findings.is_within_budget():
            return self.left_for_short() > self.overhead()
        return time.monotonic() + 0.5 * division.short_each < until

    def left_for_short(self) -> float:
        """Seconds until short runs must have ended; while there is no front to measure, little is kept for the end."""
        clock = self.findings.clock
        return clock.left if self.findings.is_within_budget() else max(clock.left, WITHOUT_FRONT * clock.until_end)

    def full_each(self) -> float:
        """Seconds that one full run is meant to take, in a search of this length on this machine."""
        training = FULL_FACTOR * self.division(self.findings.clock.total).training
        return max(training, LEAST_FULL_STEPS * self.step_seconds()) + self.finishing()

    def short_runs_tell(self) -> bool:
        """Whether they were long enough to rank policies better than appraisal did."""
        steps = [o.steps for o in measured(self.findings.short_runs)]
        return not steps or statistics.median_low(steps) >= TELLING_STEPS
