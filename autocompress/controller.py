"""The search itself: rule out by prediction, train shortly, train the best fully, measure the front once more.

Phases: calibrate -> check that the budget can be met -> short rung (policies spread over the latencies, then Optuna suggests; the
forecast rules out) -> full rung (policies that lead, spread over the latencies) -> final measurement of the front and, once, the test set.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial

from autocompress import study as journal
from autocompress.compress.train import Tick
from autocompress.content import entry, feasible, front_of, ladder_quality, prediction_quality, progress_point
from autocompress.data import Split, sample
from autocompress.errors import PolicyFailure, TooManyFailures
from autocompress.evaluate import score_artifact
from autocompress.export import is_intact
from autocompress.forecast import Forecast
from autocompress.front import measured, pick
from autocompress.objective import Setting, fails_policy, failure_of, realise
from autocompress.policy import Policy, QuantSpec
from autocompress.preparation import limit_validation, score_baseline
from autocompress.progress import Progress
from autocompress.proposals import Proposal, aims, outclassed
from autocompress.records import Budget, Measurement, Outcome, Score
from autocompress.run_folder import write_atomically
from autocompress.schedule import (
    Clock,
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
from autocompress.task import Task
from autocompress.units import format_duration, format_size
from autocompress.view import format_score

FIRST_POLICIES = 8
"""Of the short runs: those that are chosen by prediction, before Optuna suggests."""
UNKNOWN_OVERHEAD_S = 5.0
SAME_FAILURES = 3
NUMBER = re.compile(r"\d+(\.\d+)?(e[-+]?\d+)?|\bnan\b|\binf\b")
ASK_SHARE = 0.1
"""Of a short run's time: how long suggestions are ruled out before a random draw takes their place."""
MOST_RULED_OUT = 150
"""Suggestions in a row that prediction rules out before a random draw takes their place."""
FINAL_SECONDS_EACH, LEAST_FINAL_SECONDS_EACH = 1.5, 0.3
FINAL_SHARE = 0.6
"""Of the time that is left at the end: for measuring the front; the test set and the report take the rest."""
LEAST_TEST = 256
COLLAPSED = 0.5
"""Share of the original's score that a network has to lose before its training counts as failed."""
WORTH_TRAINING = 0.005
"""Share of the original's score that its own network in int8 has to lose before it is trained like the others."""
GUESSING = 0.05
"""Share of the way from guessing to no error that an original has to go to look trained."""


@dataclass
class Search:
    """State of one running search; everything that must survive is in the study."""

    task: Task
    run: Path
    study: optuna.Study
    forecast: Forecast
    clock: Clock
    progress: Progress
    points: list[dict[str, Any]]
    best: Outcome | None = None
    per_example_s: float = 0.0
    """What the original's file takes to answer one example."""

    @property
    def setting(self) -> Setting:
        return self.forecast.setting

    @setting.setter
    def setting(self, setting: Setting) -> None:
        self.forecast.setting = setting

    @property
    def budget(self) -> Budget:
        return self.forecast.budget

    # -- phases -------------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        """Learn to predict latency, for a share of the time, and from what a resumed search had measured."""
        self.forecast.calibrate(calibration_seconds(self.clock), self.task.seed, self._show)
        self.forecast.learn(measured(journal.outcomes(self.study)))

    def propose(self) -> list[Proposal]:
        """Policies to begin with, and to fall back on; raises InfeasibleBudget when none can meet the budget."""
        seed = self.task.seed + len(self.study.get_trials(deepcopy=False))
        pool = self.forecast.pool(seed, pool_seconds(self.clock))
        if self.best is None:
            self.forecast.require_feasible(pool)
        return pool

    def score_original(self) -> None:
        """The original's validation score; how many examples validate a policy, and how much time the end of the search needs."""
        whole = len(self.setting.data.val)
        self.setting = limit_validation(self.setting, validation_seconds(self.clock), self.study.user_attrs.get("val_examples"))
        data = self.setting.data
        journal.remember(self.study, "val_examples", len(data.val))
        if len(data.val) < whole:
            self.progress.message(f"validating on {len(data.val)} of {whole} examples: all would take too much of the search's time")
        started = time.monotonic()
        self.setting = score_baseline(self.setting)
        self.per_example_s = (time.monotonic() - started) / len(data.val)
        score = self.setting.baseline.val_score
        guess = 1 / data.classes if data.classes else 0.0
        if data.classes and score is not None and score.value < guess + GUESSING * (1 - guess):
            self.progress.message(
                f"the original scores {100 * score.value:.1f} %, hardly more than guessing: give its trained weights (--weights FILE)"
            )
        latency = self.setting.baseline.latency_s.median
        self.clock = self.clock.with_reserve(reserve_seconds(self.per_example_s * len(data.test), latency))

    def ask_teacher(self) -> None:
        """Answer the training data ahead, so that no student pays for what the others read."""
        seconds = teacher_seconds(self.clock)
        self.setting.teacher.prepare(seconds, lambda done, total: self._show("asking the teacher", done, total))

    def short_rung(self, pool: list[Proposal]) -> None:
        """Train many policies a little: first some spread over the latencies, then what Optuna suggests."""
        self._evaluate_unchanged()
        division = Division.of(self.clock.left, self._overhead())
        until = time.monotonic() + division.short_total
        duplicates = 0
        while self._room_for_short(until, division) and not self._stop() and not self._enough():
            trial, policy = self._next(pool, ASK_SHARE * division.short_each)
            twin = self._twin(policy)
            if twin is not None:
                journal.tell_outcome(self.study, trial, twin, self._violation(twin))
                duplicates += 1
                if duplicates >= 50:
                    self.progress.message("the search space is exhausted: every suggestion was evaluated before")
                    return
                continue
            duplicates = 0
            deadline = time.monotonic() + max(1.0, min(division.short_each, self.clock.left) - self._overhead())
            self._evaluate(trial, policy, f"{trial.number:05d}", deadline)

    def _room_for_short(self, until: float, division: Division) -> bool:
        """Whether another short run fits. Until one is within the budget they take what time there is: nothing else could use it."""
        if not self._climbers():
            return self.clock.left > self._overhead()
        return time.monotonic() + 0.5 * division.short_each < until

    def _climbers(self) -> list[Outcome]:
        """Short runs within the budget; training longer changes no latency."""
        return [o for o in journal.outcomes(self.study) if o.rung == "short" and feasible(o, self.budget)]

    def _hurt_by_bits(self) -> list[Outcome]:
        """The unchanged network in int8 where calibrating alone costs accuracy: training through the bits may win that back."""
        least = self._gain_without(WORTH_TRAINING)
        return [o for o in journal.outcomes(self.study) if o.rung == "unchanged" and feasible(o, self.budget) and _gain(o) < least]

    def _gain_without(self, share: float) -> float:
        """What is left of the original's validation score when it loses this share of it."""
        original = self.setting.baseline.val_score
        return original.gain - share * abs(original.gain) if original is not None else -math.inf

    def _evaluate_unchanged(self) -> None:
        """The teacher itself in int8, where the device has kernels for it: a free point, and the reference of every search."""
        profile = self.setting.device.profile
        if 8 not in profile.bits or any(o.rung == "unchanged" for o in journal.outcomes(self.study)):
            return
        policy = Policy(quant=QuantSpec(bits=8, reduced_range=profile.reduced_range))
        predicted = self.forecast.predict(policy)
        self._keep(realise(self.setting, policy, id="int8", rung="unchanged", deadline=time.monotonic(), predicted=predicted))

    def _next(self, pool: list[Proposal], patience_s: float) -> tuple[Trial, Policy]:
        """What waits from an interrupted search; else some policies spread over the latencies; after these, what Optuna suggests."""
        leading = self._leading()
        if self._short_count() < FIRST_POLICIES and not journal.is_waiting(self.study):
            leader = self._leader(self._promising(pool, leading))
            if leader is not None:
                self.study.enqueue_trial(leader.params)
        return self._ask(pool, leading, patience_s)

    def _leader(self, promising: list[Proposal]) -> Proposal | None:
        """What promises most where the next policy is worth most."""
        known = [(o.latency_s.median, _gain(o)) for o in measured(journal.outcomes(self.study)) if o.rung == "short" and o.latency_s]
        fastest_s = min((p.latency_s for p in promising), default=self.forecast.latency_limit)
        leaders = (band.leader(promising) for band in aims(known, fastest_s, self.forecast.latency_limit))
        return next((leader for leader in leaders if leader is not None), None)

    def _ask(self, pool: list[Proposal], leading: list[Proposal], patience_s: float) -> tuple[Trial, Policy]:
        """The next policy that prediction does not rule out; what it rules out on the way costs milliseconds and is told.

        Ruled out is what is over the budget, and what a network that was trained already beats in latency, size and inheritance at once.
        """
        forecast, until = self.forecast, time.monotonic() + patience_s
        for _ in range(MOST_RULED_OUT):
            if time.monotonic() > until:
                break
            trial = self.study.ask()
            proposal = forecast.proposal(forecast.suggest(trial), trial.params)
            over_budget = forecast.violation(proposal.workload, forecast.model.predict(proposal.workload).low)
            shortfall = outclassed(proposal, leading)
            if over_budget <= 0 and shortfall <= 0:
                return trial, proposal.policy
            journal.tell_ruled_out(self.study, trial, proposal.policy, proposal.latency_s, over_budget=over_budget, outclassed=shortfall)
        self.study.enqueue_trial(self._fallback(pool, leading).params)
        trial = self.study.ask()
        return trial, forecast.suggest(trial)

    def _fallback(self, pool: list[Proposal], leading: list[Proposal]) -> Proposal:
        """A draw that is promising and new, where there is one; else one within the budget; the fastest when none is."""
        choices = self._promising(pool, leading) or self.forecast.again(pool)
        return choices[journal.count_trials(self.study) % len(choices)] if choices else min(pool, key=lambda p: p.latency_s)

    def _promising(self, pool: list[Proposal], leading: list[Proposal]) -> list[Proposal]:
        """Of the pool, with latencies as predicted by now: within the budget, not evaluated before and not outclassed."""
        known = {self.forecast.structure(o.policy) for o in journal.outcomes(self.study)}
        return [p for p in self.forecast.again(pool) if self.forecast.structure(p.policy) not in known and outclassed(p, leading) <= 0]

    def _leading(self) -> list[Proposal]:
        """Networks that may rule out others: within the budget, and with a score that says that their training has not gone wrong."""
        least = self._gain_without(COLLAPSED)
        sound = [o for o in measured(journal.outcomes(self.study)) if feasible(o, self.budget) and _gain(o) >= least]
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
                predicted=self.forecast.predict(policy),
                tick=self._percent(name),
            )
        except BaseException:
            journal.abandon(self.study, trial)
            raise
        self._keep(outcome)
        journal.tell_outcome(self.study, trial, outcome, self._violation(outcome))
        self._require_progress()

    def full_rung(self) -> None:
        """Continue the leading policies until the time is used."""
        done = {o.policy.digest for o in journal.outcomes(self.study) if o.rung == "full"}
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
            self._keep(
                realise(
                    self.setting,
                    outcome.policy,
                    id=f"{outcome.id}-full",
                    rung="full",
                    deadline=deadline,
                    predicted=outcome.predicted_latency_s,
                    continues=outcome.id,
                    tick=self._percent(name),
                )
            )

    def _step_cost(self, policy: Policy) -> float:
        """What a training step of the student costs, up to a factor: as its latency in float32 tells, in which it is trained."""
        return self.forecast.predict(policy.model_copy(update={"quant": QuantSpec()})).value

    def measure_front(self) -> None:
        """Measure the front's files together, interleaved with the baseline; a point stays within the budget only if both times it was.

        What leaves the budget may let points onto the front that were behind it, so that it is measured until all of it has been.
        """
        known: set[str] = set()
        while front := [o for o in front_of(self.outcomes(), self.budget) if o.id not in known]:
            if known and self.clock.elapsed > self.clock.total:
                return
            self._show("measuring the front", 0, len(front))
            baseline, again = self._measured_again(front)
            if baseline is not None and not known:
                self.setting = replace(self.setting, baseline=replace(self.setting.baseline, latency_s=baseline))
                self.forecast.budget = self.task.limits.against(baseline)
            for outcome, latency in again:
                journal.record(self.study, outcome.model_copy(update={"latency_s": latency}))
            known |= {o.id for o in front}

    def _measured_again(self, front: list[Outcome]) -> tuple[Measurement | None, list[tuple[Outcome, Measurement]]]:
        """Latencies of the baseline and of these, all together; one by one where that fails, and what fails even so is lost."""
        setting = self.setting
        left = (self.clock.total - self.clock.elapsed) / (len(front) + 1)
        seconds = max(LEAST_FINAL_SECONDS_EACH, min(FINAL_SECONDS_EACH, FINAL_SHARE * left))
        paths = {o.id: self.run / (o.artifact or "") for o in front}
        try:
            baseline, *others = setting.device.measure([setting.baseline.path, *paths.values()], seconds_each=seconds)
        except PolicyFailure:
            baseline = None
        else:
            return baseline, list(zip(front, others, strict=True))
        again: list[tuple[Outcome, Measurement]] = []
        for outcome in front:
            try:
                baseline, latency = setting.device.measure([setting.baseline.path, paths[outcome.id]], seconds_each=seconds)
            except PolicyFailure as error:
                self._lose(outcome, error, "measure")
            else:
                again.append((outcome, latency))
        return baseline, again

    def _lose(self, outcome: Outcome, error: Exception, stage: str) -> None:
        """Its file no longer works: it was damaged or taken away, or the runtime fails on it now."""
        lost = outcome.model_copy(update={"failure": failure_of(error, stage)})
        journal.record(self.study, lost)
        self._announce(lost)

    def score_test(self) -> None:
        """The one look at the test set: the baseline and the front that is reported, each once, resumed or not.

        Where the whole of it would take longer than the search may, a part of it that is always the same.
        """
        setting, front = self.setting, front_of(self.outcomes(), self.budget)
        left = max(0.0, self.clock.total - self.clock.elapsed)
        slowness = 1 + sum(o.latency_s.median for o in front if o.latency_s) / setting.baseline.latency_s.median
        affordable = int(left / max(1e-9, self.per_example_s * slowness))
        wanted = self.study.user_attrs.get("test_examples") or min(len(setting.data.test), max(LEAST_TEST, affordable))
        journal.remember(self.study, "test_examples", wanted)
        test = sample(setting.data.test, wanted)
        self._show("scoring the test set", 0, len(front) + 1)
        known = self.study.user_attrs.get("original_test_score")
        score = Score.model_validate(known) if known else score_artifact(setting.baseline.path, setting.data, test, setting.batch)
        journal.remember(self.study, "original_test_score", score.model_dump(mode="json"))
        self.setting = replace(setting, baseline=replace(setting.baseline, test_score=score))
        for done, outcome in enumerate(front):
            self._show("scoring the test set", done + 1, len(front) + 1)
            if outcome.test_score is None:
                self._score_test_of(outcome, test)

    def _score_test_of(self, outcome: Outcome, test: Split) -> None:
        try:
            score = score_artifact(self.run / (outcome.artifact or ""), self.setting.data, test, self.setting.batch)
        except Exception as error:
            if not fails_policy(error):
                raise
            self._lose(outcome, error, "test")
            return
        journal.record(self.study, outcome.model_copy(update={"test_score": score}))

    def retry_failures(self) -> int:
        """What made policies fail may be mended by now; a file that was lost but is intact comes back. How many there were."""
        failed = [o for o in journal.outcomes(self.study) if o.failure is not None]
        for outcome in failed:
            if outcome.artifact is not None and is_intact((self.run / outcome.artifact).parent):
                journal.record(self.study, outcome.model_copy(update={"failure": None}))
            else:
                journal.forget(self.study, outcome)
        return len(failed)

    def recall(self) -> None:
        """Take up what a resumed search knew."""
        self.best = pick(self.outcomes(), self.budget)

    # -- bookkeeping --------------------------------------------------------------------------------------------

    def outcomes(self) -> list[Outcome]:
        """One outcome a policy: the most accurate file of it, whichever rung made it; a failure where there is none."""
        kept: dict[str, Outcome] = {}
        for outcome in journal.outcomes(self.study):
            before = kept.get(outcome.policy.digest)
            if before is None or _gain(outcome) >= _gain(before):
                kept[outcome.policy.digest] = outcome
        return list(kept.values())

    def content(self) -> dict[str, Any]:
        """What front.json holds now."""
        baseline, results = self.setting.baseline, self.outcomes()
        front = front_of(results, self.budget)
        on_front = {o.id for o in front}
        entries = [entry(o, baseline, self.budget, self._layers(o.policy), dominated=o.id not in on_front) for o in measured(results)]
        every = journal.outcomes(self.study)
        best = pick(results, self.budget)
        return {
            "schema": 1,
            "task": self.task.model_dump(mode="json"),
            "device": self.setting.device.name,
            "environment": self.setting.device.environment(),
            "budget": self.budget.model_dump(mode="json"),
            "baseline": {
                "val_score": _json(baseline.val_score),
                "test_score": _json(baseline.test_score),
                "latency_s": _json(baseline.latency_s),
                "size_bytes": baseline.size_bytes,
                "artifact": str(baseline.path.relative_to(self.run)),
            },
            "front": [e for e in sorted(entries, key=lambda e: e["latency_s"]["median"]) if e["id"] in on_front],
            "points": entries,
            "best": best.id if best is not None else None,
            "progress": self.points,
            "prediction": prediction_quality(every, self.forecast.structure) | {"held_out": self.forecast.model.held_out_error()},
            "ladder": ladder_quality(
                {o.policy.digest: o for o in every if o.rung == "short" and o.failure is None},
                {o.policy.digest: o for o in every if o.rung == "full" and o.failure is None},
            ),
            "failures": [{"id": o.id, **o.failure.model_dump()} for o in every if o.failure is not None],
            "trials": journal.count_trials(self.study),
            "elapsed_s": self.clock.elapsed,
        }

    def _layers(self, policy: Policy) -> list[dict[str, Any]]:
        """Every layer with its predicted seconds in the original and in the policy's student."""
        forecast = self.forecast
        before, after = (dict(forecast.model.explain(forecast.workload(p))) for p in (Policy(), policy))
        return [
            layer | {"teacher_latency_s": before.get(layer["name"]), "latency_s": after.get(layer["name"])}
            for layer in self.setting.graph_of(policy).describe(policy)
        ]

    def _keep(self, outcome: Outcome) -> None:
        journal.record(self.study, outcome)
        self.best = pick(self.outcomes(), self.budget)
        self.forecast.learn([outcome])
        self.points.append(
            progress_point(self.outcomes(), self.setting.baseline, self.budget, self.clock.elapsed, journal.count_trials(self.study))
        )
        journal.remember(self.study, "progress", self.points)
        journal.remember(self.study, "elapsed_s", self.clock.elapsed)
        self.write_front()
        self._announce(outcome)

    def write_front(self) -> None:
        """Write RUN/front.json: after every policy, so that a killed search leaves a folder that can be shown and exported."""
        write_atomically(self.run / "front.json", json.dumps(self.content(), indent=1))

    def _announce(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            self.progress.message(f"policy {outcome.id} failed ({outcome.failure.stage}): {outcome.failure.reason}")
        elif outcome.val_score is not None and outcome.latency_s is not None:
            self.progress.message(
                f"policy {outcome.id}: {format_score(outcome.val_score)} {outcome.val_score.name}, "
                f"{format_duration(outcome.latency_s.median)}, {format_size(outcome.size_bytes)} ({outcome.policy.in_words()})"
            )

    def _require_progress(self) -> None:
        """Raises TooManyFailures when the last policies all failed for one reason: then the reason is not the policy.

        Reasons that differ in their numbers only (the step at which training diverged) are one.
        """
        last = [o for o in journal.outcomes(self.study) if o.rung == "short"][-SAME_FAILURES:]
        failures = [o.failure for o in last if o.failure is not None]
        if len(failures) == SAME_FAILURES and len({(f.stage, NUMBER.sub("N", f.reason)) for f in failures}) == 1:
            stage, reason = failures[-1].stage, failures[-1].reason
            raise TooManyFailures(f"{SAME_FAILURES} policies in a row failed to {stage}: {reason}", hint="mend that, then --resume")

    def _twin(self, policy: Policy) -> Outcome | None:
        structure = self.forecast.structure(policy)
        alike = (o for o in journal.outcomes(self.study) if o.policy.distill == policy.distill)
        return next((o for o in alike if self.forecast.structure(o.policy) == structure), None)

    def _violation(self, outcome: Outcome) -> float:
        if outcome.latency_s is None:
            return 1.0
        return self.budget.violation(outcome.latency_s.high, outcome.size_bytes, outcome.latency_s.p95)

    def _short_count(self) -> int:
        return sum(o.rung == "short" for o in journal.outcomes(self.study))

    def _overhead(self) -> float:
        """Seconds that a policy costs beside training, as a rule: where the machine was restless, measuring took longer."""
        spent = [o.seconds - o.training_s for o in measured(journal.outcomes(self.study))]
        return statistics.median_low(spent) if spent else UNKNOWN_OVERHEAD_S

    def _stop(self) -> bool:
        if self.clock.left <= 0:
            return True
        if self.task.target_accuracy is None or self.best is None or self.best.val_score is None:
            return False
        return self.best.val_score.value >= self.task.target_accuracy

    def _enough(self) -> bool:
        return self.task.trials is not None and self._short_count() >= self.task.trials

    def _percent(self, phase: str) -> Tick:
        return lambda done: self._show(phase, round(100 * done), 100)

    def _show(self, phase: str, done: int, total: int | None) -> None:
        best, words = self.best, ""
        if best is not None and best.val_score is not None and best.latency_s is not None:
            words = f"{format_score(best.val_score)} at {format_duration(best.latency_s.median)}"
        self.progress.update(phase=phase, done=done, total=total, best=words, seconds_left=self.clock.total - self.clock.elapsed)


def _gain(outcome: Outcome) -> float:
    return outcome.val_score.gain if outcome.val_score is not None and outcome.failure is None else -math.inf


def _json(record: Any) -> Any:
    return None if record is None else record.model_dump(mode="json")
