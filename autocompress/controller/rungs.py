"""The rungs of a search: rule out by prediction, appraise untrained, train briefly, train the best fully.

Appraisal (structures that Optuna suggests, reconstructed and compared with the teacher; the forecast rules out) -> short rung (the best of
these, spread over the latencies, then other ways to distil them) -> full rung (policies that lead, spread over the latencies). What comes
before them is in `opening`, what follows in `conclude`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator

from autocompress.candidates.appraisals import Appraised
from autocompress.candidates.proposals import Proposal
from autocompress.controller.choice import Choice, Chooser
from autocompress.controller.findings import Findings
from autocompress.controller.pace import Pace
from autocompress.controller.recovery import at_work
from autocompress.controller.standing import feasible
from autocompress.errors import TooManyFailures
from autocompress.policy import Policy, QuantSpec
from autocompress.ranking.front import gain, measured
from autocompress.ranking.promotion import promoted
from autocompress.records import Attempt, Outcome, Rung
from autocompress.schedule import Division, appraisal_seconds, extended, full_runs, full_seconds
from autocompress.search_space import for_device
from autocompress.study.notes import Note
from autocompress.system.failures import fix_and_resume
from autocompress.trial.objective import evaluate_policy
from autocompress.trial.starting import interrupted_weights

APPRAISED_FIRST, MOST_APPRAISED, APPRAISED_A_TRIAL = 12, 1000, 12
"""Structures that are appraised before Optuna suggests; at most in a search; at most for each policy that `--trials` allows."""
SINGLES_SHARE = 0.5
"""Share of appraisal's time for moving each dimension alone."""
SETTLING_SHARE, MOST_SETTLING, AS_PREDICTED = 0.1, 4, 0.03
"""Share of appraisal's time, and networks at most, for settling what is fast enough; the relative error of prediction that ends it."""
LEAST_TRAINING_S = 1.0
"""Of a short run, however little time is left: some steps are better than none."""
ENOUGH = 0.5
"""Share of the time that a full run would have by now: what was trained to the end for longer is done."""
SAME_FAILURES = 3
"""Short runs in a row that may fail for one reason before the search ends."""
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b")
"""In which the reasons of failures may differ and still be one."""
WORTH_TRAINING = 0.005
"""Share of the original's score: where int8 alone costs more, the unchanged network is trained through its bits, like the others."""


class Rungs:
    """A running search: each rung chooses among what the one below it has found."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self._pace = Pace(findings)
        self._chooser = Chooser(findings)

    # -- appraisal -----------------------------------------------------------------------------------------------------

    def appraise(self, pool: list[Proposal]) -> None:
        """Find out what structures are worth untrained: first what is likely to be best at each latency, then what Optuna suggests."""
        seconds = appraisal_seconds(self.findings.clock)
        self._evaluate_unchanged()
        self._appraise(pool, seconds)
        self._settle_best_appraised(time.monotonic() + SETTLING_SHARE * seconds)
        if failures := self.findings.appraisals.failures:
            self.findings.progress.message(f"{len(failures)} untrained students could not be scored, the first for: {failures[0]}")
        if reason := self.findings.journal.sampler_failure:
            self.findings.progress.message(f"the sampler failed, so that some structures were drawn at random: {reason}")

    def _appraise(self, pool: list[Proposal], seconds: float) -> None:
        findings = self.findings
        appraisals, trials = findings.appraisals, findings.task.trials
        started, leading = time.monotonic(), self._chooser.leading()
        taken = findings.taken_over.appraised
        own = min(MOST_APPRAISED, APPRAISED_A_TRIAL * trials) if trials is not None else MOST_APPRAISED
        most = taken + own
        first = self._first(pool, started + seconds, taken + round(SINGLES_SHARE * own))
        while not self._is_over() and len(appraisals) < most:
            until = started + extended(seconds, appraisals.agreement())
            if time.monotonic() + appraisals.seconds_each >= until:
                return
            findings.show("scoring untrained students", round(100 * (time.monotonic() - started) / (until - started)), 100)
            proposal = next(first, None)
            if proposal is not None:
                appraisals.appraise(proposal)
            elif self._suggested(leading, until) is None:
                return

    def _suggested(self, leading: list[Proposal], until: float) -> Appraised | None:
        """What Optuna suggests; nothing of another architecture, whose promise is all that is known: by that the pool was drawn."""
        if not self.findings.setting.one_architecture:
            return None
        return self.findings.appraisals.suggested(leading, until - time.monotonic())

    def _evaluate_unchanged(self) -> None:
        """The teacher itself in int8, where the device has kernels for it and it may be within the budget: a point for little."""
        findings = self.findings
        forecast, profile = findings.forecast, findings.setting.device.profile
        if 8 not in profile.bits or findings.clock.left <= 0 or any(o.rung == "unchanged" for o in findings.journal.outcomes):
            return
        policy = for_device(Policy(quant=QuantSpec(bits=8)), profile)
        if forecast.least_excess(forecast.proposal(policy, {})) > 0:
            return
        findings.show("the unchanged network in int8")
        attempt = self._attempt(policy, "int8", "unchanged")
        with at_work(findings, attempt):
            outcome = evaluate_policy(findings.setting, attempt, seconds=0.0, limits=findings.limits)
        findings.keep(outcome)

    def _first(self, pool: list[Proposal], until: float, most_with_singles: int) -> Iterator[Proposal]:
        """What is appraised before Optuna suggests: the dimensions alone, then what loses least by them; in short, what promises most."""
        appraisals = self.findings.appraisals
        yield from self._singles(time.monotonic() + SINGLES_SHARE * (until - time.monotonic()), most_with_singles)
        if appraisals.is_sensitivity_known:
            self._settle_near_budget(time.monotonic() + SETTLING_SHARE * (until - time.monotonic()))
            best = appraisals.sensitivity.best(APPRAISED_FIRST, until=until)
        else:
            best = iter(self._chooser.spread(pool, APPRAISED_FIRST))
        for proposal in best:
            if proposal.policy not in appraisals:
                yield proposal

    def _settle_near_budget(self, until: float) -> None:
        """Measure what should be best within the budget, untrained, until it takes what was predicted.

        It is not like the networks that predictions were fitted on, which are drawn at random. Where it is faster than predicted the most
        accurate policies would be ruled out unseen (in an hour's search on ResNet-56 it took 0.34 of the original's time instead of 0.39,
        and the budget was 0.45).
        """
        sensitivity = self.findings.appraisals.sensitivity
        for error in self._settle(lambda: next(sensitivity.best(1, until=until), None), until):
            if error < AS_PREDICTED:
                return

    def _settle_best_appraised(self, until: float) -> None:
        """Measure, untrained, what was worth most of all that may be within the budget, until that is known of the best.

        What is over it by a little as predicted would never be trained, and it is what most users are after.
        """
        for _ in self._settle(self.findings.appraisals.best_that_may_be_within_budget, until):
            pass

    def _settle(self, best: Callable[[], Proposal | None], until: float) -> Iterator[float]:
        """Measure, untrained, what is best as far as is known, which each measurement may change; yields the error of its prediction."""
        forecast = self.findings.forecast
        for _ in range(MOST_SETTLING):
            if self._is_over() or time.monotonic() > until:
                return
            chosen = best()
            if chosen is None or forecast.is_measured(chosen.policy) or forecast.measure_untrained(chosen.policy) is None:
                return
            forecast.refit()
            yield abs(forecast.latency_s(chosen) / chosen.latency_s - 1)

    def _singles(self, until: float, most: int) -> Iterator[Proposal]:
        """Dimensions alone, until then and up to so many appraisals; no more where that is too little to learn from.

        Students of another architecture have nothing of the teacher to lose.
        """
        appraisals = self.findings.appraisals
        if not self.findings.setting.one_architecture or time.monotonic() >= until:
            return
        appraisals.start_with_dimensions()
        for single in appraisals.sensitivity.untried():
            needed, left = appraisals.sensitivity.missing, until - time.monotonic()
            if left < max(1, needed) * appraisals.seconds_each or len(appraisals) + max(1, needed) > most:
                return
            yield single

    # -- short training ------------------------------------------------------------------------------------------------

    def short_rung(self, pool: list[Proposal]) -> None:
        """Train many policies a little: the best structures, spread over the latencies; then these distilled in other ways."""
        started, left = time.monotonic(), self.findings.clock.left
        while not self._has_reached_target() and not self._has_enough():
            begun, division = time.monotonic(), self._pace.division(left)
            if not self._pace.room_for_short(started + self._pace.short_seconds(division), division):
                return
            choice = self._chooser.choose(pool)
            if choice is None:
                self.findings.progress.message("the search space is exhausted: every policy that can be drawn was trained before")
                return
            self._train_briefly(choice, begun, division)

    def _train_briefly(self, choice: Choice, begun: float, division: Division) -> None:
        """Train what was chosen from `begun` on."""
        findings, pace = self.findings, self._pace
        left, chosen_in = pace.left_for_short() - pace.finishing(), time.monotonic() - begun
        attempt = self._attempt(choice.policy, findings.journal.next_id(), "short", worth=choice.worth)
        with at_work(findings, attempt):
            outcome = evaluate_policy(
                findings.setting,
                attempt,
                seconds=max(LEAST_TRAINING_S, pace.relative_cost(choice.policy) * division.training),
                latest=time.monotonic() + max(LEAST_TRAINING_S, left),
                limits=findings.limits,
                tick=findings.percent(f"short training, policy {len(findings.short_runs) + 1}"),
            )
        findings.keep(outcome.model_copy(update={"seconds": outcome.seconds + chosen_in}))
        if choice.trial is not None and choice.base is not None:
            findings.journal.tell_distillation(choice.trial, gain(outcome) - gain(choice.base) if outcome.failure is None else None)
        self._require_progress()

    def _require_progress(self) -> None:
        """Raises TooManyFailures when the last policies all failed for one reason: then the reason is not the policy.

        Reasons that differ in their numbers only (the step at which training diverged) are one.
        """
        failures = [o.failure for o in self.findings.short_runs[-SAME_FAILURES:] if o.failure is not None]
        if len(failures) == SAME_FAILURES and len({(f.stage, NUMBER.sub("N", f.reason)) for f in failures}) == 1:
            stage, reason = failures[-1].stage, failures[-1].reason
            raise TooManyFailures(
                f"{SAME_FAILURES} policies in a row failed to {stage}: {reason}",
                hint=fix_and_resume(self.findings.setting.log, stage),
            )

    # -- full training -------------------------------------------------------------------------------------------------

    @property
    def is_at_full_rung(self) -> bool:
        """Whether this search was interrupted on its last rung, and is to do no more than it was: it goes on there."""
        return bool(self.findings.climbers) and self.findings.journal.noted(Note.FULL_RUNG) == self._limits

    @property
    def _limits(self) -> list[float | None]:
        """What ends the rungs before the last one."""
        task = self.findings.task
        return [self.findings.clock.total, task.trials, task.target_accuracy]

    def full_rung(self) -> None:
        """Continue the leading policies until the time is used."""
        findings, pace, goes_on = self.findings, self._pace, self.is_at_full_rung
        findings.journal.note(Note.FULL_RUNG, self._limits)
        trials, each = findings.task.trials, pace.full_each()
        climbing = self._climbing(each, goes_on=goes_on)
        costs = [pace.step_cost(outcome.policy) for outcome in climbing]
        gaps = [findings.gain_without(0.0) - gain(outcome) for outcome in climbing]
        for position, outcome in enumerate(climbing):
            if self._is_over():
                return
            seconds = full_seconds(findings.clock.left, costs[position:], gaps[position:], each, trials) - pace.finishing()
            if seconds <= 0:
                return
            before = [o for o in findings.journal.outcomes if o.rung == "full" and o.policy.digest == outcome.policy.digest]
            attempt = outcome.again(f"{outcome.id}-full{len(before) + 1 if before else ''}", "full")
            with at_work(findings, attempt):
                trained = evaluate_policy(
                    findings.setting,
                    attempt,
                    seconds=seconds,
                    latest=time.monotonic() + findings.clock.left - pace.finishing(),
                    limits=findings.limits,
                    continues=[outcome, *measured(before)][-1].id,
                    tick=findings.percent(f"full training {position + 1} of {len(climbing)}"),
                )
            findings.keep(trained)

    def _climbing(self, each: float, *, goes_on: bool) -> list[Outcome]:
        """What is trained to the end, where each is meant to have so many seconds; whose training was interrupted comes first.

        What was trained to the end already is done, where the search `goes_on` as it was interrupted there. One that may take longer than
        it did, or has this from another search, trains it further unless that was for about as long as it would be by now.

        Those that cover most beside what is trained to the end already, or in no need of it. All that was trained briefly counts, however
        little it has learned: of what a student then lacks, long training leaves the smaller a share the more it was. Of runs that differ
        in distillation only, the best: time is worth more in one network than in two of the same. All are compared by their short runs,
        that is after training of about the same length.
        """
        findings, structure = self.findings, self.findings.forecast.structure
        enough = ENOUGH * (min(each, findings.clock.left) - self._pace.finishing()) if not goes_on else 0.0
        every = (o for o in findings.journal.outcomes if o.rung == "full")
        full = [o for o in every if o.failure is not None or o.training_s >= enough]
        done, known = {o.policy.digest for o in full}, {structure(o.policy) for o in measured(full)}
        candidates = [o for o in [*findings.climbers, *self._hurt_by_bits()] if o.policy.digest not in done]
        leading = {structure(o.policy): o for o in sorted(candidates, key=gain) if structure(o.policy) not in known}
        candidates = [o for o in candidates if leading.get(structure(o.policy)) is o]
        climbs = {o.id for o in candidates}
        settled = self._by_short_runs(
            o
            for o in findings.outcomes()
            if (o.rung == "unchanged" and o.id not in climbs and findings.stays_within(o)) or o.policy.digest in done
        )
        own = sum(o.id not in findings.taken_over.ids for o in full)
        count = full_runs(findings.clock.left, each, len(candidates), findings.task.trials, done=own)
        begun = [o for o in candidates if interrupted_weights(findings.setting, o.policy).exists()][:count]
        rest, merit = [o for o in candidates if o not in begun], gain if self._pace.short_runs_tell() else self._worth
        return [*begun, *promoted(rest, count - len(begun), [*settled, *begun], merit, least=min)]

    def _by_short_runs(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Those within the budget; for each the best short run of its structure, where there is one: candidates are known by theirs."""
        findings, structure = self.findings, self.findings.forecast.structure
        briefly = {structure(o.policy): o for o in sorted(measured(findings.short_runs), key=gain)}
        return [briefly.get(structure(o.policy), o) for o in outcomes if feasible(o, findings.limits)]

    def _hurt_by_bits(self) -> list[Outcome]:
        """The unchanged network in int8 where calibrating alone costs accuracy: training through the bits may win that back."""
        findings = self.findings
        least = findings.gain_without(WORTH_TRAINING)
        return [o for o in findings.journal.outcomes if o.rung == "unchanged" and feasible(o, findings.limits) and gain(o) < least]

    @staticmethod
    def _worth(outcome: Outcome) -> float:
        """What a policy was worth untrained; the unchanged network is its own teacher."""
        return 1.0 if outcome.rung == "unchanged" else outcome.worth or 0.0

    def _attempt(self, policy: Policy, id: str, rung: Rung, *, worth: float | None = None) -> Attempt:
        predicted = self.findings.forecast.first_prediction(policy)
        return Attempt(id=id, policy=policy, rung=rung, predicted_latency_s=predicted, worth=worth)

    # -- when it ends --------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        return self.findings.clock.left <= 0 or self._has_reached_target()

    def _has_reached_target(self) -> bool:
        """By what will still be within the budget when it is measured once more."""
        findings, target = self.findings, self.findings.task.target_accuracy
        if target is None:
            return False
        safe = [o.val_score for o in findings.front() if o.val_score is not None and findings.stays_within(o)]
        return any(score.gain >= score.model_copy(update={"value": target}).gain for score in safe[-1:])  # which is what ships

    def _has_enough(self) -> bool:
        """Whether as many policies were trained as `--trials` allows."""
        findings, trials = self.findings, self.findings.task.trials
        return trials is not None and len({o.id for o in findings.short_runs}.difference(findings.taken_over.ids)) >= trials
