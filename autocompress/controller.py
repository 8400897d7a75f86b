"""The search itself: rule out by prediction, train shortly, train the best fully.

Phases: calibrate -> check that the budget can be met -> short rung (policies spread over the latencies, then Optuna suggests; the
forecast rules out) -> full rung (policies that lead, spread over the latencies). What follows them is in `final`.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from dataclasses import replace

from optuna.trial import Trial

from autocompress.content import feasible
from autocompress.errors import TooManyFailures
from autocompress.findings import Findings, gain
from autocompress.front import measured
from autocompress.objective import realise
from autocompress.policy import Policy, QuantSpec
from autocompress.preparation import limit_validation, score_original
from autocompress.proposals import Proposal, aims, outclassed
from autocompress.records import Outcome
from autocompress.schedule import (
    Division,
    calibration_seconds,
    full_runs,
    full_seconds,
    pool_seconds,
    promoted,
    reserve_seconds,
    teacher_seconds,
    validation_seconds,
)
from autocompress.search_space import fitted

WITHOUT_FRONT = 0.8
"""Of the time until the end: what training may take while nothing within the budget waits to be measured once more."""
FIRST_SHARE = 2 / 3
"""Of the short runs: those whose policies are chosen by prediction, all with the usual distillation, before Optuna suggests."""
UNKNOWN_OVERHEAD_S = 5.0
SAME_FAILURES = 3
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b")
ASK_SHARE = 0.1
"""Of a short run's time: how long suggestions are ruled out before a random draw takes their place."""
MOST_RULED_OUT = 150
"""Suggestions in a row that prediction rules out before a random draw takes their place."""
MOST_MEASURED = 8
"""Of the policies that promise most: how many are measured in search of one that is within the budget."""
COLLAPSED = 0.5
"""Share of the original's score that a network has to lose before its training counts as failed."""
WORTH_TRAINING = 0.005
"""Share of the original's score that its own network in int8 has to lose before it is trained like the others."""
GUESSING = 0.05
"""Share of the way from guessing to no error that an original has to go to look trained."""


class Search(Findings):
    """A running search: how it comes to know, and which policy it trains next."""

    # -- phases -------------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Learn to predict latency, for a share of the time, and from what a resumed search had measured."""
        self.forecast.calibrate(calibration_seconds(self.clock), self.task.seed, self.show)
        self.forecast.learn(measured(self.journal.outcomes))

    def propose(self) -> list[Proposal]:
        """Policies to begin with, and to fall back on; raises InfeasibleBudget when none can meet the budget."""
        seed = self.task.seed + self.journal.asked
        self.show("choosing first policies")
        pool = self.forecast.pool(seed, pool_seconds(self.clock))
        if self.best is None:
            self.forecast.require_feasible(pool)
        return pool

    def score_original(self) -> None:
        """The original's validation score; how many examples validate a policy, and how much time the end of the search needs."""
        whole = len(self.setting.data.val)
        self.setting = limit_validation(self.setting, validation_seconds(self.clock), self.journal.noted("val_examples"))
        data = self.setting.data
        self.journal.note("val_examples", len(data.val))
        if len(data.val) < whole:
            self.progress.message(f"validating on {len(data.val)} of {whole} examples: all would take too much of the search's time")
        self.show("scoring the original")
        started = time.monotonic()
        score = score_original(self.setting)
        self.keep_original(replace(self.setting.baseline, val_score=score))
        self.per_example_s = (time.monotonic() - started) / len(data.val)
        guess = 1 / data.classes if data.classes else 0.0
        if data.score is None and score.value < guess + GUESSING * (1 - guess):
            cure = "search longer (--search-time)" if self.task.is_demo else "give its trained weights (--weights FILE)"
            self.progress.message(f"the original scores {100 * score.value:.1f} %, hardly more than guessing: {cure}")
        latency = self.setting.baseline.latency_s.median
        self.clock = self.clock.with_reserve(reserve_seconds(self.per_example_s * len(data.test), latency))

    def ask_teacher(self) -> None:
        """Answer the training data ahead, so that no student pays for what the others read."""
        seconds = teacher_seconds(self.clock)
        self.setting.teacher.prepare(seconds, lambda done, total: self.show("asking the teacher", done, total))

    def short_rung(self, pool: list[Proposal]) -> None:
        """Train many policies a little: first some spread over the latencies, then what Optuna suggests."""
        self._evaluate_unchanged()
        division = Division.of(self.clock.left, self._overhead())
        until = time.monotonic() + division.short_total
        runs = min(division.short_total / division.short_each, self.task.trials or math.inf)
        first, duplicates = math.ceil(FIRST_SHARE * runs), 0
        while self._room_for_short(until, division) and not self._stop() and not self._enough():
            trial, policy = self._next(first, pool, ASK_SHARE * division.short_each)
            twin = self._twin(policy)
            if twin is not None:
                self.journal.tell_outcome(trial, twin, self._violation(twin))
                duplicates += 1
                if duplicates >= 50:
                    self.progress.message("the search space is exhausted: every suggestion was evaluated before")
                    return
                continue
            duplicates = 0
            deadline = time.monotonic() + max(1.0, min(division.short_each, self._left_for_short()) - self._overhead())
            self._evaluate(trial, policy, f"{trial.number:05d}", deadline)

    def _room_for_short(self, until: float, division: Division) -> bool:
        """Whether another short run fits. Until one is within the budget they take what time there is: nothing else could use it."""
        if not self._climbers():
            return self._left_for_short() > self._overhead()
        return time.monotonic() + 0.5 * division.short_each < until

    def _left_for_short(self) -> float:
        """Seconds until short runs must have ended; while there is no front to measure, little is kept for the end."""
        return self.clock.left if self._climbers() else max(self.clock.left, WITHOUT_FRONT * self.clock.until_end)

    def _climbers(self) -> list[Outcome]:
        """Short runs within the budget; training longer changes no latency."""
        return [o for o in self.journal.outcomes if o.rung == "short" and feasible(o, self.budget)]

    def _hurt_by_bits(self) -> list[Outcome]:
        """The unchanged network in int8 where calibrating alone costs accuracy: training through the bits may win that back."""
        least = self._gain_without(WORTH_TRAINING)
        return [o for o in self.journal.outcomes if o.rung == "unchanged" and feasible(o, self.budget) and gain(o) < least]

    def _gain_without(self, share: float) -> float:
        """What is left of the original's validation score when it loses this share of it."""
        original = self.setting.baseline.val_score
        return original.gain - share * abs(original.gain) if original is not None else -math.inf

    def _evaluate_unchanged(self) -> None:
        """The teacher itself in int8, where the device has kernels for it: a free point, and the reference of every search."""
        profile = self.setting.device.profile
        if 8 not in profile.bits or self.clock.left <= 0 or any(o.rung == "unchanged" for o in self.journal.outcomes):
            return
        policy = fitted(Policy(quant=QuantSpec(bits=8)), profile)
        predicted = self.forecast.foretell(policy)
        self.show("the unchanged network in int8")
        self.keep(realise(self.setting, policy, id="int8", rung="unchanged", deadline=time.monotonic(), predicted=predicted))

    def _next(self, first: int, pool: list[Proposal], patience_s: float) -> tuple[Trial, Policy]:
        """What waits from an interrupted search; else `first` policies spread over the latencies; after these, what Optuna suggests."""
        leading = self._leading()
        if self._short_count() < first and not self.journal.is_waiting:
            leader = self._leader_within_budget(pool, leading)
            if leader is not None:
                self.journal.study.enqueue_trial(leader.params)
        return self._ask(pool, leading, patience_s)

    def _leader_within_budget(self, pool: list[Proposal], leading: list[Proposal]) -> Proposal | None:
        """The next of the first policies; those that measuring rules out teach the forecast, which then names others."""
        for _ in range(MOST_MEASURED):
            leader = self._leader(self._promising(pool, leading))
            if leader is None or self.forecast.excess(leader) <= 0:
                return leader
        return None

    def _leader(self, promising: list[Proposal]) -> Proposal | None:
        """What promises most where the next policy is worth most."""
        short = [o for o in self.journal.outcomes if o.rung == "short"]
        known = [(o.latency_s.median, gain(o)) for o in measured(short) if o.latency_s is not None and feasible(o, self.budget)]
        tried = [o.predicted_latency_s.value for o in short if o.predicted_latency_s is not None]
        latencies = [p.latency_s for p in promising]
        leaders = (band.leader(promising) for band in aims(known, tried, latencies, self.forecast.latency_limit))
        return next((leader for leader in leaders if leader is not None), None)

    def _ask(self, pool: list[Proposal], leading: list[Proposal], patience_s: float) -> tuple[Trial, Policy]:
        """The next policy that prediction does not rule out; what it rules out on the way costs milliseconds (seconds where it has to be
        measured) and is told.

        Ruled out is what is over the budget, and what a network that was trained already beats in latency, size and inheritance at once.
        """
        forecast, until = self.forecast, time.monotonic() + patience_s
        for _ in range(MOST_RULED_OUT):
            if time.monotonic() > until:
                break
            trial = self.journal.study.ask()
            proposal = forecast.proposal(forecast.suggest(trial), trial.params)
            shortfall = outclassed(proposal, leading)
            over_budget = forecast.excess(proposal, measuring=shortfall <= 0)
            if over_budget <= 0 and shortfall <= 0:
                return trial, proposal.policy
            latency_s = forecast.latency_s(proposal)
            self.journal.tell_ruled_out(trial, proposal.policy, latency_s, over_budget=over_budget, outclassed=shortfall)
        self.journal.study.enqueue_trial(self._fallback(pool, leading).params)
        trial = self.journal.study.ask()
        return trial, forecast.suggest(trial)

    def _fallback(self, pool: list[Proposal], leading: list[Proposal]) -> Proposal:
        """A draw that is promising and new, where there is one; else one within the budget; the fastest when none is."""
        choices = self._promising(pool, leading) or self.forecast.again(pool)
        return choices[self.journal.finished % len(choices)] if choices else min(pool, key=lambda p: p.latency_s)

    def _promising(self, pool: list[Proposal], leading: list[Proposal]) -> list[Proposal]:
        """Of the pool, with latencies as predicted by now: within the budget, not evaluated before and not outclassed."""
        known = {self.forecast.structure(o.policy) for o in self.journal.outcomes}
        return [p for p in self.forecast.again(pool) if self.forecast.structure(p.policy) not in known and outclassed(p, leading) <= 0]

    def _leading(self) -> list[Proposal]:
        """Networks that may rule out others: within the budget, and with a score that says that their training has not gone wrong."""
        least = self._gain_without(COLLAPSED)
        sound = [o for o in measured(self.journal.outcomes) if feasible(o, self.budget) and gain(o) >= least]
        return [self.forecast.proposal(o.policy, {}) for o in sound]

    def _evaluate(self, trial: Trial, policy: Policy, id: str, deadline: float) -> None:
        name = f"short training, policy {self._short_count() + 1}"
        try:
            outcome = realise(
                self.setting,
                policy,
                id=id,
                rung="short",
                deadline=deadline,
                predicted=self.forecast.foretell(policy),
                tick=self.percent(name),
            )
        except BaseException:
            self.journal.abandon(trial)
            raise
        self.keep(outcome)
        self.journal.tell_outcome(trial, outcome, self._violation(outcome))
        self._require_progress()

    def full_rung(self) -> None:
        """Continue the leading policies until the time is used."""
        done = {o.policy.digest for o in self.journal.outcomes if o.rung == "full"}
        candidates = [o for o in [*self._climbers(), *self._hurt_by_bits()] if o.policy.digest not in done]
        each = Division.of(self.clock.total, self._overhead()).short_each
        trials = self.task.trials
        count = full_runs(self.clock.left, each, len(candidates), trials)
        climbs = {o.id for o in candidates}
        settled = [o for o in self.outcomes() if (o.rung == "unchanged" and o.id not in climbs) or o.policy.digest in done]
        climbing = promoted(candidates, count, settled)
        costs = [self._step_cost(outcome.policy) for outcome in climbing]
        for position, outcome in enumerate(climbing):
            if self._stop():
                return
            share = full_seconds(self.clock.left, costs[position:], each, trials)
            deadline = time.monotonic() + share - self._overhead()
            if deadline <= time.monotonic():
                return
            name = f"full training {position + 1} of {len(climbing)}"
            self.keep(
                realise(
                    self.setting,
                    outcome.policy,
                    id=f"{outcome.id}-full",
                    rung="full",
                    deadline=deadline,
                    predicted=outcome.predicted_latency_s,
                    continues=outcome.id,
                    tick=self.percent(name),
                )
            )

    def _step_cost(self, policy: Policy) -> float:
        """What a training step of the student costs, up to a factor: as its latency in float32 tells, in which it is trained."""
        return self.forecast.predict(policy.model_copy(update={"quant": QuantSpec()})).value

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def _require_progress(self) -> None:
        """Raises TooManyFailures when the last policies all failed for one reason: then the reason is not the policy.

        Reasons that differ in their numbers only (the step at which training diverged) are one.
        """
        last = [o for o in self.journal.outcomes if o.rung == "short"][-SAME_FAILURES:]
        failures = [o.failure for o in last if o.failure is not None]
        if len(failures) == SAME_FAILURES and len({(f.stage, NUMBER.sub("N", f.reason)) for f in failures}) == 1:
            stage, reason = failures[-1].stage, failures[-1].reason
            raise TooManyFailures(f"{SAME_FAILURES} policies in a row failed to {stage}: {reason}", hint="mend that, then --resume")

    def _twin(self, policy: Policy) -> Outcome | None:
        structure = self.forecast.structure(policy)
        alike = (o for o in self.journal.outcomes if o.policy.distill == policy.distill)
        return next((o for o in alike if self.forecast.structure(o.policy) == structure), None)

    def _violation(self, outcome: Outcome) -> float:
        if outcome.latency_s is None:
            return 1.0
        return self.budget.violation(outcome.latency_s.high, outcome.size_bytes, outcome.latency_s.p95)

    def _short_count(self) -> int:
        return sum(o.rung == "short" for o in self.journal.outcomes)

    def _overhead(self) -> float:
        """Seconds that a policy costs beside training, as a rule: where the machine was restless, measuring took longer."""
        spent = [o.seconds - o.training_s for o in measured(self.journal.outcomes)]
        return statistics.median_low(spent) if spent else UNKNOWN_OVERHEAD_S

    def _stop(self) -> bool:
        if self.clock.left <= 0:
            return True
        if self.task.target_accuracy is None or self.best is None or self.best.val_score is None:
            return False
        score, target = self.best.val_score, self.task.target_accuracy
        return score.gain >= score.model_copy(update={"value": target}).gain

    def _enough(self) -> bool:
        return self.task.trials is not None and self._short_count() >= self.task.trials
