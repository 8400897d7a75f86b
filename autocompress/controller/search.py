"""The search itself: rule out by prediction, appraise untrained, train shortly, train the best fully.

Phases: calibrate -> check that the budget can be met -> appraisal (structures that Optuna suggests, repaired and compared with the teacher;
the forecast rules out) -> short rung (the best of these, spread over the latencies, then other ways to distil them) -> full rung
(policies that lead, spread over the latencies). What follows them is in `final`.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from optuna.trial import Trial

from autocompress.candidates.appraisals import Appraised
from autocompress.candidates.proposals import Proposal, outclassed
from autocompress.controller.content import feasible
from autocompress.controller.findings import Findings
from autocompress.devices.timing import MOST_DRIFT
from autocompress.errors import TooManyFailures
from autocompress.front import gain, measured
from autocompress.graph import Structure
from autocompress.objective import evaluate_policy
from autocompress.policy import Policy, QuantSpec
from autocompress.preparation import limit_validation, score_original
from autocompress.records import Outcome
from autocompress.schedule import (
    FULL_FACTOR,
    LEAST_COST,
    LEAST_FULL_STEPS,
    MOST_COST,
    TELLING_MARGIN,
    TELLING_STEPS,
    Division,
    appraisal_seconds,
    calibration_seconds,
    cover,
    extended,
    full_runs,
    full_seconds,
    pool_seconds,
    promoted,
    reserve_seconds,
    teacher_seconds,
    validation_seconds,
)
from autocompress.search_space import Otherwise, fitted

WITHOUT_FRONT = 0.8
"""Share of the time until the end that short runs may use while nothing within the budget was found: the end has little to measure then."""
VARIANT_SHARE = 1 / 4
"""Share of the short runs that distil a known structure in another way, instead of training a new one."""
VARIED = 3
"""Leading policies whose distillation is varied, at most."""
APPRAISED_FIRST, MOST_APPRAISED, APPRAISED_A_TRIAL = 12, 1000, 12
"""Structures that are appraised before Optuna suggests; at most in a search; at most for each policy that `--trials` allows."""
CLEAR = 2 * MOST_DRIFT
"""Share of the budget that structures leave unused until one is safely within it: for drift, and for an interval's upper half."""
SINGLES_SHARE = 0.5
"""Share of appraisal's time for moving each dimension alone."""
UNKNOWN_OVERHEAD_S = 5.0
"""Seconds that a policy costs beside training, until one has told."""
LEAST_TRAINING_S = 1.0
SAME_FAILURES = 3
"""Short runs in a row that may fail for one reason before the search ends."""
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b")
MOST_MEASURED = 4
"""Untrained networks that are measured, at most, to find one within the budget for the next short run."""
COLLAPSED = 0.5
"""Share of the original's score: a network that lost more has failed to train, and rules out nothing."""
WORTH_TRAINING = 0.005
"""Share of the original's score: where int8 alone costs more, the unchanged network is trained through its bits, like the others."""
GUESSING = 0.05
"""Share of the way from guessing to no error: an original that has not gone so far looks untrained, which is told."""


@dataclass(frozen=True)
class Choice:
    """A policy to train: what it was worth untrained, and where only distillation is new the trial that drew it and the run without it."""

    policy: Policy
    worth: float
    trial: Trial | None = None
    base: Outcome | None = None


class Search(Findings):
    """A running search: how it comes to know, and which policy it trains next."""

    # -- phases -------------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Learn to predict latency, for a share of the time, and from what a resumed search had measured."""
        self.forecast.calibrate(calibration_seconds(self.clock), self.task.seed, self.show)
        self.follow_original()
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
        self.clock = self.clock.with_reserve(reserve_seconds(self.clock.total, self.per_example_s, len(data.test), latency))

    def ask_teacher(self) -> None:
        """Answer the training data ahead, so that no student pays for what the others read."""
        seconds = teacher_seconds(self.clock)
        with self.setting.ledger.spend("teach"):
            self.setting.teacher.prepare(seconds, lambda done, total: self.show("asking the teacher", done, total))

    def appraise(self, pool: list[Proposal]) -> None:
        """Find out what structures are worth untrained: first what is likely to be best at each latency, then what Optuna suggests."""
        self._evaluate_unchanged()
        started, seconds, leading = time.monotonic(), appraisal_seconds(self.clock), self._leading()
        most = min(MOST_APPRAISED, APPRAISED_A_TRIAL * self.task.trials) if self.task.trials is not None else MOST_APPRAISED
        first = self._first(pool, leading, started + seconds, most)
        while not self._stop() and len(self.appraisals) < most:
            until = started + extended(seconds, self.appraisals.agreement())
            if time.monotonic() + self.appraisals.seconds_each >= until:
                return
            self.show("appraising untrained students", round(100 * (time.monotonic() - started) / (until - started)), 100)
            proposal = next(first, None)
            if proposal is not None:
                self.appraisals.appraise(proposal)
            elif self.appraisals.suggested(leading, until - time.monotonic()) is None:
                return

    def _first(self, pool: list[Proposal], leading: list[Proposal], until: float, most: int) -> Iterator[Proposal]:
        """What is appraised before Optuna suggests: the dimensions alone, then what loses least by them; in short, what promises most."""
        yield from self._singles(time.monotonic() + SINGLES_SHARE * (until - time.monotonic()), round(SINGLES_SHARE * most))
        if self.appraisals.is_sensitivity_known:
            best = self.appraisals.sensitivity.best(APPRAISED_FIRST, until=until)
        else:
            promising = self._promising(pool, leading)
            best = (promising[index] for index in cover([(p.promise, p.latency_s) for p in promising], APPRAISED_FIRST))
        for proposal in best:
            if proposal.policy not in self.appraisals:
                yield proposal

    def _singles(self, until: float, most: int) -> Iterator[Proposal]:
        """Dimensions alone, until then and up to so many appraisals; no more where that is too little to learn from.

        Students of another architecture have nothing of the teacher to lose.
        """
        self.appraisals.dimensions_come_first = self.forecast.setting.one_architecture and time.monotonic() < until
        if not self.appraisals.dimensions_come_first:
            return
        sensitivity = self.appraisals.sensitivity
        for single in sensitivity.untried():
            needed, left = sensitivity.missing, until - time.monotonic()
            if left < max(1, needed) * self.appraisals.seconds_each or len(self.appraisals) + max(1, needed) > most:
                return
            yield single

    def short_rung(self, pool: list[Proposal]) -> None:
        """Train many policies a little: the best structures, spread over the latencies; then these distilled in other ways."""
        started, left = time.monotonic(), self.clock.left
        while not self._stop() and not self._enough():
            begun, division = time.monotonic(), self._division(left)
            if not self._room_for_short(started + self._short_seconds(division), division):
                return
            choice = self._next(pool)
            if choice is None:
                self.progress.message("the search space is exhausted: every policy that can be drawn was trained before")
                return
            self._train_shortly(choice, begun, division)

    def _short_seconds(self, division: Division) -> float:
        """More than its share where appraisal does not foretell what short training makes of policies, and these runs tell."""
        return extended(division.short_total, self.ladder()["appraised_short_spearman"] if self._short_runs_tell() else None)

    def _division(self, left: float) -> Division:
        return Division.of(left, self._overhead(), TELLING_MARGIN * TELLING_STEPS * self._step_seconds())

    def _step_seconds(self) -> float:
        """What a step of training took, as a rule; 0 before the first."""
        return statistics.median_low([o.training_s / o.steps for o in self.journal.outcomes if o.steps] or [0.0])

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
        return [o for o in self.journal.outcomes if o.rung == "short" and feasible(o, self.limits)]

    def _hurt_by_bits(self) -> list[Outcome]:
        """The unchanged network in int8 where calibrating alone costs accuracy: training through the bits may win that back."""
        least = self._gain_without(WORTH_TRAINING)
        return [o for o in self.journal.outcomes if o.rung == "unchanged" and feasible(o, self.limits) and gain(o) < least]

    def _gain_without(self, share: float) -> float:
        """What is left of the original's validation score when it loses this share of it."""
        original = self.setting.baseline.val_score
        return original.gain - share * abs(original.gain) if original is not None else -math.inf

    def _evaluate_unchanged(self) -> None:
        """The teacher itself in int8, where the device has kernels for it and it may be within the budget: a point for little."""
        profile = self.setting.device.profile
        if 8 not in profile.bits or self.clock.left <= 0 or any(o.rung == "unchanged" for o in self.journal.outcomes):
            return
        policy = fitted(Policy(quant=QuantSpec(bits=8)), profile)
        if self.forecast.excess(self.forecast.proposal(policy, {}), measuring=False) > 0:
            return
        predicted = self.forecast.foretell(policy)
        self.show("the unchanged network in int8")
        self.keep(evaluate_policy(self.setting, policy, id="int8", rung="unchanged", seconds=0.0, predicted=predicted))

    def _next(self, pool: list[Proposal]) -> Choice | None:
        """A structure, or in its turn another way to distil one; the other where there is none. None when the space is exhausted."""
        if len(self._variants) + 1 <= VARIANT_SHARE * (self._short_count() + 1):
            return self._variant() or self._structure(pool)
        return self._structure(pool) or self._variant()

    def _structure(self, pool: list[Proposal]) -> Choice | None:
        """The next structure to train, as usual; what measuring rules out teaches the forecast, which then leads to another.

        Until the search is safe, one that is within the budget by a margin where there is one.
        """
        margins = (0.0,) if self._is_safe() else (CLEAR, 0.0)
        leaders = (self._measured_leader(pool, margin) for margin in margins)
        leader = next((leader for leader in leaders if leader is not None), None) or self._least_over_budget(pool)
        return Choice(leader.policy, leader.worth) if leader is not None else None

    def _is_safe(self) -> bool:
        """Whether something was within the budget by what a machine may drift until it is measured once more, at the end."""
        return any(feasible(o, self.limits, margin=MOST_DRIFT) for o in self._climbers())

    def _measured_leader(self, pool: list[Proposal], margin: float) -> Appraised | None:
        """The first to lead that measuring does not rule out either; without a margin, else what misses the budget by least of those tried.

        Where one turns out to be slower than predicted the others are likely to be so too: the next is faster by as much where one is.
        """
        missed, aim = list[tuple[float, Appraised]](), margin
        for _ in range(MOST_MEASURED):
            leader = self._leader(pool, aim) or self._leader(pool, margin)
            if leader is None:
                break
            excess = self.forecast.excess(leader.proposal, margin=margin)
            if excess <= 0:
                return leader
            missed.append((excess, leader))
            aim = (1 + aim) * (1 + excess) - 1
        return min(missed, key=lambda miss: miss[0])[1] if missed and margin == 0 else None

    def _leader(self, pool: list[Proposal], margin: float) -> Appraised | None:
        """What, as appraised, adds most to those that were trained; of what is not appraised, as its promise says."""
        candidates = self._untrained(margin)
        if candidates:
            covered = self._covered(lambda appraised: appraised.worth)
            return candidates[cover([(a.worth, a.latency_s) for a in candidates], 1, covered)[0]]
        promising, promise = self._promising(pool, self._leading(), margin), self.appraisals.promise
        if not promising:
            return None
        covered = self._covered(lambda appraised: promise(appraised.proposal))
        return self.appraisals.appraise(promising[cover([(promise(p), p.latency_s) for p in promising], 1, covered)[0]])

    def _least_over_budget(self, pool: list[Proposal]) -> Appraised | None:
        """Where nothing is within the budget as predicted, and nothing was: what misses it by least, since predictions err."""
        known = self._trained_structures()
        rest = [p for p in pool if self.forecast.structure(p.policy) not in known]
        if not rest or self._climbers():
            return None
        return self.appraisals.appraise(min(rest, key=lambda p: self.forecast.violation(p.workload, self.forecast.latency_s(p))))

    def _covered(self, merit: Callable[[Appraised], float]) -> list[tuple[float, float]]:
        """(merit, latency) of what was trained, in vain or not, and of the unchanged network within the budget: what is beside it waits."""
        short = [o for o in self.journal.outcomes if o.rung == "short" and o.predicted_latency_s is not None]
        known = [(self.appraisals.of(o.policy), o.predicted_latency_s) for o in short]
        unchanged = [o for o in self.journal.outcomes if o.rung == "unchanged" and feasible(o, self.limits)]
        points = [(merit(appraised), predicted.value) for appraised, predicted in known if appraised is not None and predicted is not None]
        return [*points, *((1.0, o.latency_s.median) for o in unchanged if o.latency_s is not None)]

    def _untrained(self, margin: float) -> list[Appraised]:
        """Of what was appraised: within the budget as predicted by now, not trained before and not outclassed."""
        known, leading = self._trained_structures(), self._leading()
        candidates = self.appraisals.within_budget(margin=margin)
        return [a for a in candidates if self.forecast.structure(a.policy) not in known and outclassed(a.proposal, leading) <= 0]

    def _promising(self, pool: list[Proposal], leading: list[Proposal], margin: float = 0.0) -> list[Proposal]:
        """Of the pool, with latencies as predicted by now: within the budget, not trained before and not outclassed."""
        known = self._trained_structures()
        within = self.forecast.again(pool, margin=margin)
        return [p for p in within if self.forecast.structure(p.policy) not in known and outclassed(p, leading) <= 0]

    def _trained_structures(self) -> set[Structure]:
        return {self.forecast.structure(o.policy) for o in self.journal.outcomes}

    def _leading(self) -> list[Proposal]:
        """Networks that may rule out others: within the budget, and with a score that says that their training has not gone wrong."""
        least = self._gain_without(COLLAPSED)
        sound = [o for o in measured(self.journal.outcomes) if feasible(o, self.limits) and gain(o) >= least]
        return [self.forecast.proposal(o.policy, {}) for o in sound]

    def _variant(self) -> Choice | None:
        """One of the policies that lead, distilled as Optuna suggests; None where none leads, or the space has nothing to suggest."""
        usual = [o for o in self._climbers() if o.id not in self._variants]
        leading = [o for o in promoted(usual, VARIED) if self.appraisals.of(o.policy) is not None]
        if not leading:
            return None
        base = leading[len(self._variants) % len(leading)]
        appraised, trial = self.appraisals.of(base.policy), self.journal.distillations.ask()
        assert appraised is not None
        policy = self.forecast.space(Otherwise(appraised.proposal.params, trial))
        if not trial.params or any(o.policy == policy for o in self.journal.outcomes):
            self.journal.tell_distillation(trial, None)
            return None
        return Choice(policy, appraised.worth, trial, base)

    @property
    def _variants(self) -> set[str]:
        """Ids of the short runs that were distilled in another way than the first of their structure."""
        first: dict[Structure, str] = {}
        short = [o for o in self.journal.outcomes if o.rung == "short"]
        return {o.id for o in short if first.setdefault(self.forecast.structure(o.policy), o.id) != o.id}

    def _train_shortly(self, choice: Choice, begun: float, division: Division) -> None:
        """Train what was chosen from `begun` on."""
        number = self._short_count() + 1
        left, chosen_in = self._left_for_short() - self._finishing(), time.monotonic() - begun
        outcome = evaluate_policy(
            self.setting,
            choice.policy,
            id=self.journal.next_id(),
            rung="short",
            seconds=max(LEAST_TRAINING_S, self._relative_cost(choice.policy) * division.training),
            latest=time.monotonic() + max(LEAST_TRAINING_S, left),
            predicted=self.forecast.foretell(choice.policy),
            worth=choice.worth,
            tick=self.percent(f"short training, policy {number}"),
        )
        self.keep(outcome.model_copy(update={"seconds": outcome.seconds + chosen_in}))
        if choice.trial is not None and choice.base is not None:
            self.journal.tell_distillation(choice.trial, gain(outcome) - gain(choice.base) if outcome.failure is None else None)
        self._require_progress()

    def _relative_cost(self, policy: Policy) -> float:
        """What a step of a short run costs beside those before, as a rule: runs of about as many steps can be compared."""
        known = [self._step_cost(o.policy) for o in self.journal.outcomes if o.rung == "short" and o.steps]
        return min(MOST_COST, max(LEAST_COST, self._step_cost(policy) / statistics.median_low(known))) if known else 1.0

    def full_rung(self) -> None:
        """Continue the leading policies until the time is used."""
        done = {o.policy.digest for o in self.journal.outcomes if o.rung == "full"}
        candidates = [o for o in [*self._climbers(), *self._hurt_by_bits()] if o.policy.digest not in done]
        each = self._full_each()
        trials = self.task.trials
        count = full_runs(self.clock.left, each, len(candidates), trials)
        climbs = {o.id for o in candidates}
        settled = [o for o in self.outcomes() if (o.rung == "unchanged" and o.id not in climbs) or o.policy.digest in done]
        climbing = promoted(candidates, count, settled, gain if self._short_runs_tell() else self._worth)
        costs = [self._step_cost(outcome.policy) for outcome in climbing]
        for position, outcome in enumerate(climbing):
            if self._stop():
                return
            share = full_seconds(self.clock.left, costs[position:], each, trials)
            seconds = share - self._finishing()
            if seconds <= 0:
                return
            name = f"full training {position + 1} of {len(climbing)}"
            self.keep(
                evaluate_policy(
                    self.setting,
                    outcome.policy,
                    id=f"{outcome.id}-full",
                    rung="full",
                    seconds=seconds,
                    latest=time.monotonic() + self.clock.left - self._finishing(),
                    predicted=outcome.predicted_latency_s,
                    continues=outcome.id,
                    tick=self.percent(name),
                )
            )

    def _short_runs_tell(self) -> bool:
        """Whether they were long enough to rank policies better than appraisal did."""
        steps = [o.steps for o in measured(self.journal.outcomes) if o.rung == "short"]
        return not steps or statistics.median_low(steps) >= TELLING_STEPS

    def _worth(self, outcome: Outcome) -> float:
        """What a policy was worth untrained; the unchanged network is its own."""
        appraised = self.appraisals.of(outcome.policy)
        return appraised.worth if appraised is not None else 1.0

    def _full_each(self) -> float:
        """Seconds that one full run is meant to take, in a search of this length on this machine."""
        training = FULL_FACTOR * self._division(self.clock.total).training
        return max(training, LEAST_FULL_STEPS * self._step_seconds()) + self._finishing()

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

    def _short_count(self) -> int:
        return sum(o.rung == "short" for o in self.journal.outcomes)

    def _overhead(self) -> float:
        """Seconds that a short run costs beside training, as a rule: where the machine was restless, measuring took longer.

        Before the first, as much as the unchanged network in int8, and its repair about as much as an appraisal.
        """
        outcomes = measured(self.journal.outcomes)
        if short := [o.seconds - o.training_s for o in outcomes if o.rung == "short"]:
            return statistics.median_low(short)
        unchanged = [o.seconds - o.training_s for o in outcomes if o.rung == "unchanged"]
        return statistics.median_low(unchanged or [UNKNOWN_OVERHEAD_S]) + self.appraisals.seconds_each

    def _finishing(self) -> float:
        """Seconds that any run costs after its training."""
        known = [o.finishing_s for o in measured(self.journal.outcomes) if o.finishing_s]
        return statistics.median_low(known or [UNKNOWN_OVERHEAD_S])

    def _stop(self) -> bool:
        if self.clock.left <= 0:
            return True
        if self.task.target_accuracy is None or self.best is None or self.best.val_score is None:
            return False
        score, target = self.best.val_score, self.task.target_accuracy
        return score.gain >= score.model_copy(update={"value": target}).gain

    def _enough(self) -> bool:
        return self.task.trials is not None and self._short_count() >= self.task.trials
