"""What a running search has found: its outcomes in the journal, its front in RUN/front.json, and its user who is told."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.budget import Budget
from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.forecast import Forecast
from autocompress.compress.arithmetic import training_hardware
from autocompress.compress.train import Tick
from autocompress.controller.front_json import baseline_entry, entry, ladder_of, layer_changes, predictions, progress_point
from autocompress.controller.standing import believed, feasible, front_of
from autocompress.devices.timing import MOST_DRIFT
from autocompress.errors import PolicyFailure
from autocompress.export import library_versions, now
from autocompress.policy import Policy
from autocompress.ranking.front import measured
from autocompress.records import Failure, FailureStage, Measurement, Outcome, Score, TakenOver
from autocompress.report.view import format_score
from autocompress.results import FailedPolicy, Ladder, ProgressPoint, Results
from autocompress.schedule import Clock
from autocompress.setup.setting import Baseline, Setting
from autocompress.study.backup import back_up
from autocompress.study.database import DATABASE
from autocompress.study.journal import Journal
from autocompress.study.notes import Note
from autocompress.system.progress import Progress, Status
from autocompress.system.run_folder import FRONT, write_atomically
from autocompress.task import Task
from autocompress.units import format_duration, format_size

SCORES = ("train_score", "val_score", "test_score")
"""Of the original."""
SLOW_BASELINE_QUANTILE = 0.9
"""Quantile of what the original took that stands for a slow moment: the slowest of all may be an accident."""
MADE_BY = ("autocompress", "torch", "optuna", "onnx")
"""Libraries that networks are made with."""


@dataclass
class Findings:
    """What a search has found so far, and what must survive of it, in the journal."""

    task: Task
    run: Path
    journal: Journal
    forecast: Forecast
    clock: Clock
    progress: Progress
    history: list[ProgressPoint]
    best: Outcome | None = None
    per_example_s: float = 0.0
    """What the original's file takes to answer one example."""
    taken_over: TakenOver = field(default_factory=TakenOver)

    @functools.cached_property
    def appraisals(self) -> Appraisals:
        """What policies are worth untrained, with what a resumed search knew of it."""
        found = Appraisals(self.journal, self.forecast)
        found.recall()
        return found

    @property
    def setting(self) -> Setting:
        return self.forecast.setting

    @setting.setter
    def setting(self, setting: Setting) -> None:
        self.forecast.setting = setting

    @property
    def limits(self) -> Budget:
        """The budget as it was asked for: what measured files are held against."""
        return self.forecast.limits

    @property
    def budget(self) -> Budget:
        """The same in seconds, for the original as it is known now."""
        return self.limits.against(self.setting.baseline.latency_s.median)

    @property
    def drift(self) -> float:
        """By how much a file may be slower when it is measured once more, at the end.

        As the original has shown, where the budget is in seconds; beside a relative one the original is as slow then.
        """
        medians = [latency.median for latency in self.setting.baseline_history]
        if not medians or (self.limits.latency_s is None and self.limits.p95_s is None):
            return MOST_DRIFT
        return max(MOST_DRIFT, float(np.quantile(medians, SLOW_BASELINE_QUANTILE)) / statistics.median(medians) - 1)

    def outcomes(self) -> list[Outcome]:
        """One outcome a policy, see `believed`."""
        return believed(self.journal.outcomes, self.limits, self.setting.baseline)

    @property
    def short_runs(self) -> list[Outcome]:
        """What was trained briefly, in vain or not, in the order in which it was."""
        return [o for o in self.journal.outcomes if o.rung == "short"]

    def stays_within(self, outcome: Outcome) -> bool:
        """Whether it is within the budget by as much as it may be slower when it is measured at the end (`drift`)."""
        return feasible(outcome, self.limits, margin=self.drift)

    @property
    def climbers(self) -> list[Outcome]:
        """Short runs within the budget: what may be trained to the end."""
        return [o for o in self.short_runs if feasible(o, self.limits)]

    def is_within_budget(self) -> bool:
        """Whether anything that was trained, by another search perhaps, is."""
        return any(o.rung != "unchanged" and feasible(o, self.limits) for o in self.journal.outcomes)

    def gain_without(self, share: float) -> float:
        """What is left of the original's validation score when it loses this share of it."""
        original = self.setting.baseline.val_score
        return original.gain - share * abs(original.gain) if original is not None else -math.inf

    def front(self) -> list[Outcome]:
        """What is worth having by now, fastest first."""
        return front_of(self.outcomes(), self.limits, self.setting.baseline, self.forecast.structure)

    def look_for_best(self) -> None:
        """Note the slowest of the front as `best`: the most accurate, unless `front_of` has spared it."""
        front = self.front()
        self.best = front[-1] if front else None

    def results(self) -> Results:
        """What front.json holds now."""
        baseline, outcomes, every = self.setting.baseline, self.outcomes(), self.journal.outcomes
        front = front_of(outcomes, self.limits, baseline, self.forecast.structure)
        on_front = {o.id for o in front}
        points = {
            o.id: entry(o, baseline, self.limits, layer_changes(self.forecast, o.policy), dominated=o.id not in on_front)
            for o in measured(outcomes)
        }
        return Results(
            task=self.task.model_dump(mode="json"),
            device=self.setting.device.name,
            environment=self._environment(),
            budget=self.budget,
            baseline=baseline_entry(baseline, self.run),
            front=tuple(points[o.id] for o in front),
            points=tuple(points.values()),
            best=front[-1].id if front else None,
            progress=tuple(self.history),
            prediction=predictions(every, self.forecast.structure, self.forecast.model.held_out_error()),
            ladder=self.ladder(),
            failures=tuple(FailedPolicy(id=o.id, stage=o.failure.stage, reason=o.failure.reason) for o in every if o.failure is not None),
            trials=self.journal.finished,
            elapsed_s=self.clock.elapsed,
            spent_s=self.setting.ledger.spent(),
        )

    def _environment(self) -> dict[str, str]:
        """Of the device, and of the machine that searches: another one, perhaps, so that what both have is the device's."""
        made_by = {name: known for name, known in library_versions().items() if name in MADE_BY}
        return made_by | {"trained_on": training_hardware(), "written": now()} | self.setting.device.environment()

    def ladder(self) -> Ladder:
        """How many policies stood on each rung of the search, and whether each rung ranked them as the one below it."""
        every = measured(self.journal.outcomes)
        short, full = ([o for o in every if o.rung == rung] for rung in ("short", "full"))
        appraised = {"appraised": len(self.appraisals), "foreseen_appraised_spearman": self.appraisals.agreement()}
        return ladder_of(short, full, self.forecast.structure, **appraised)

    def keep(self, outcome: Outcome) -> None:
        """Record what became of a policy, learn from it, and tell of it."""
        self.journal.record(outcome)
        self.adopt_drifted_baseline()
        self.look_for_best()
        self.forecast.learn([outcome])
        self.history.append(progress_point(self.outcomes(), self.setting.baseline, self.limits, self.clock.elapsed, self.journal.finished))
        self.journal.note(Note.PROGRESS, [point.model_dump(mode="json") for point in self.history])
        self.note_time()
        self.note_untrained()
        self.save()
        self.announce(outcome)

    def adopt_drifted_baseline(self) -> None:
        """Where the original is no longer what it was when the search began, what is predicted is held against what it takes now."""
        baseline, recent = self.setting.baseline, self.setting.recent_baseline
        if abs(recent.median / baseline.latency_s.median - 1) > MOST_DRIFT:
            self.record_baseline(replace(baseline, latency_s=recent))

    def note_untrained(self) -> None:
        """Keep what networks took that were only measured: a resumed search predicts by them too."""
        measured_only = self.forecast.untrained.values()
        self.journal.note(Note.UNTRAINED, [[policy.model_dump(mode="json", by_alias=True), took] for policy, took in measured_only])

    def note_time(self) -> None:
        """Keep how much time has passed, and on what: a resumed search goes on from there."""
        self.journal.note(Note.ELAPSED_S, self.clock.elapsed)
        self.journal.note(Note.SPENT_S, self.setting.ledger.spent())

    def save(self) -> Results:
        """Write RUN/front.json, and a copy of the database: a killed search leaves a folder that can be shown, exported and resumed."""
        results = self.results()
        write_atomically(self.run / FRONT, results.to_json())
        back_up(self.run / DATABASE)
        return results

    def announce(self, outcome: Outcome) -> None:
        """One line for the user."""
        if outcome.failure is not None:
            self.progress.message(f"policy {outcome.id} failed ({outcome.failure.stage}): {outcome.failure.reason}")
        elif outcome.val_score is not None and outcome.latency_s is not None:
            words = outcome.policy.in_words(distilled=outcome.rung != "unchanged")
            self.progress.message(
                f"policy {outcome.id}: {format_score(outcome.val_score)} {outcome.val_score.name}, "
                f"{format_duration(outcome.latency_s.median)}, {format_size(outcome.size_bytes)} ({words})"
            )

    def lose(self, outcome: Outcome, error: PolicyFailure, stage: FailureStage) -> None:
        """Its file no longer works: it was damaged or taken away, or the runtime fails on it now."""
        lost = outcome.model_copy(update={"failure": Failure(stage=stage, reason=error.message)})
        self.journal.record(lost)
        self.announce(lost)

    def record_baseline(self, baseline: Baseline) -> None:
        """What is known of the original by now, for good: a resumed search begins with it."""
        self.setting = replace(self.setting, baseline=baseline)
        scores = {name: getattr(baseline, name) for name in SCORES}
        known = {"latency_s": baseline.latency_s, **scores}
        self.journal.note(Note.ORIGINAL, {name: _json(record) for name, record in known.items()})

    def note_taken_over(self, taken: TakenOver) -> None:
        """Keep what there is of another search by now."""
        self.taken_over = taken
        self.journal.note(Note.TAKEN_OVER, taken.model_dump(mode="json"))

    @property
    def own_outcomes(self) -> list[Outcome]:
        """What this search has made itself; while that is nothing, all there is."""
        return [o for o in self.journal.outcomes if o.id not in self.taken_over.ids] or self.journal.outcomes

    def recall(self) -> None:
        """Take up what a resumed search knew, the original as it was measured last included."""
        baseline, known = self.setting.baseline, self.journal.noted(Note.ORIGINAL)
        if known is not None:
            scores: dict[str, Any] = {name: Score.model_validate(known[name]) if known.get(name) is not None else None for name in SCORES}
            baseline = replace(baseline, latency_s=Measurement.model_validate(known["latency_s"]), **scores)
        self.record_baseline(baseline)
        for policy, took in self.journal.noted(Note.UNTRAINED) or []:
            self.forecast.note_untrained(Policy.model_validate(policy), took)
        self.taken_over = TakenOver.model_validate(self.journal.noted(Note.TAKEN_OVER) or {})
        self.look_for_best()

    # -- what the user sees --------------------------------------------------------------------------------------------

    def percent(self, phase: str) -> Tick:
        """Shows how much of a phase is done, given as share."""
        return lambda done: self.show(phase, round(100 * done), 100)

    def show(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """Live progress: phase, policies tried, best so far, time left."""
        best, words = self.best, ""
        if best is not None and best.val_score is not None and best.latency_s is not None:
            words = f"{format_score(best.val_score)} at {format_duration(best.latency_s.median)}"
        self.progress.update(Status(phase, done, total, len(self.history), words, self.clock.until_end))


def _json(record: Any) -> Any:
    return None if record is None else record.model_dump(mode="json")
