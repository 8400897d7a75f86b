"""The journal of a search: what became of every policy, and what a resumed search has to know. It is written before it is believed.

A trial of the study is one structure with its parameters, appraised or ruled out; a trial of `distillations` is one way of distilling a
structure that was trained before. What became of a policy by training is an Outcome among the study's attributes, in the same database,
so that a killed search loses nothing that was finished. One process writes it, and so it is read once.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from autocompress.policy import Policy
from autocompress.records import Attempt, Outcome
from autocompress.study.fallback import OrRandom, ends_study
from autocompress.study.notes import Note

OUTCOME = "outcome:"
MAX_RETRIES = 2
RULED_OUT_WORTH = 0.0
WORTH, DIGEST = "worth", "digest"
MOST_KILLS = 2
"""How often a search may be killed over one policy, as by a system that has run out of memory, before a resumed one leaves it."""


def outcomes_in(study: optuna.Study) -> dict[str, Outcome]:
    """The outcomes that a study keeps, by id. Raises ValueError where they are of a version that kept other things."""
    kept = {key.removeprefix(OUTCOME): value for key, value in study.user_attrs.items() if key.startswith(OUTCOME) and value is not None}
    return {id: Outcome.model_validate_json(json.dumps(value)) for id, value in kept.items()}


@dataclass(frozen=True)
class AppraisedTrial:
    """What a trial says of a structure: its parameters, its worth, and the digest of the policy that it was as this device runs it."""

    params: dict[str, Any]
    worth: float
    digest: str


def appraised_in(study: optuna.Study) -> list[AppraisedTrial]:
    """All that a study's trials say was appraised."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    told = [(trial.params, trial.user_attrs) for trial in trials if WORTH in trial.user_attrs]
    return [AppraisedTrial(params, attributes[WORTH], attributes.get(DIGEST, "")) for params, attributes in told]


def _plain(record: Attempt) -> Any:
    """As JSON."""
    return json.loads(record.model_dump_json(by_alias=True))


class Journal:
    """Two studies, and the outcomes that are kept in the first."""

    def __init__(self, study: optuna.Study, distillations: optuna.Study) -> None:
        self.study = study
        self.distillations = distillations
        self._notes = study.user_attrs
        self._outcomes = outcomes_in(study)
        self.is_exhausted = False
        """Whether the sampler has said that there is nothing else to draw, as those that walk a grid do."""

    # -- outcomes and notes ---------------------------------------------------------------------------------------

    @property
    def outcomes(self) -> list[Outcome]:
        """All outcomes so far, in the order of their ids."""
        return [self._outcomes[id] for id in sorted(self._outcomes)]

    @property
    def has_begun(self) -> bool:
        """Whether anything was made of the teacher: a policy, or an appraisal."""
        return bool(self._outcomes) or bool(self.appraised())

    def next_id(self) -> str:
        """For an outcome to come: a number that none has yet."""
        numbers = [int(id.partition("-")[0]) for id in self._outcomes if id.partition("-")[0].isdecimal()]
        return f"{max(numbers, default=-1) + 1:05d}"

    def record(self, outcome: Outcome) -> None:
        """Keep an outcome for good, in place of an earlier one of its id."""
        self.study.set_user_attr(OUTCOME + outcome.id, _plain(outcome))
        self._outcomes[outcome.id] = outcome

    def forget(self, outcome: Outcome) -> None:
        """Take an outcome back: its policy may be tried again."""
        self.study.set_user_attr(OUTCOME + outcome.id, None)
        del self._outcomes[outcome.id]

    @contextmanager
    def at_work(self, attempt: Attempt, how: Mapping[str, Any]) -> Iterator[None]:
        """Keep what is worked on, and how, while it is: nothing else can tell afterwards what a search was killed over."""
        self.note(Note.AT_WORK, {"how": dict(how), "attempt": _plain(attempt)})
        try:
            yield
        finally:
            self.note(Note.AT_WORK, None)

    def note_kill(self) -> None:
        """Count what was worked on when the search was killed, where it was."""
        if (last := self.noted(Note.AT_WORK)) is not None:
            self.note(Note.KILLED, [*(self.noted(Note.KILLED) or []), last])
            self.note(Note.AT_WORK, None)

    def killed_over(self, how: Mapping[str, Any]) -> list[Attempt]:
        """What this search was killed over MOST_KILLS times by now, working in this way."""
        times = defaultdict[tuple[str, str], list[Attempt]](list)
        for kept in self.noted(Note.KILLED) or []:
            if "attempt" not in kept:  # of an earlier version
                continue
            attempt = Attempt.model_validate_json(json.dumps(kept["attempt"]))
            if kept["how"] == dict(how):
                times[attempt.policy.digest, attempt.rung].append(attempt)
        return [attempts[-1] for attempts in times.values() if len(attempts) >= MOST_KILLS]

    def note(self, key: Note, value: Any) -> None:
        """Keep a JSON value beside the outcomes."""
        self.study.set_user_attr(key.value, value)
        self._notes[key] = value

    def noted(self, key: Note) -> Any:
        """A value that was kept, by this search or by the one that it resumes; None where there is none."""
        return self._notes.get(key)

    # -- trials ---------------------------------------------------------------------------------------------------

    def tell_ruled_out(self, trial: Trial, latency_s: float, *, over_budget: float, outclassed: float) -> None:
        """A policy that prediction rules out: complete, with a constraint violated, so that the sampler learns from it."""
        trial.set_constraint("budget", over_budget)
        trial.set_constraint("outclassed", outclassed)
        self._tell(trial, [RULED_OUT_WORTH, latency_s])

    def tell_appraised(self, trial: Trial, policy: Policy, worth: float, latency_s: float, violation: float) -> None:
        """What a policy is worth before it is trained."""
        trial.set_user_attr(DIGEST, policy.digest)
        trial.set_user_attr(WORTH, worth)
        trial.set_constraint("budget", violation)
        trial.set_constraint("outclassed", 0.0)
        self._tell(trial, [worth, latency_s])

    def add_appraised(
        self, trial: AppraisedTrial, distributions: dict[str, BaseDistribution], *, latency_s: float, violation: float
    ) -> None:
        """The same of a policy that this study need not ask for, in one go: another search has appraised it."""
        self.study.add_trial(
            create_trial(
                values=[trial.worth, latency_s],
                params={name: trial.params[name] for name in distributions},
                distributions=distributions,
                user_attrs={WORTH: trial.worth, DIGEST: trial.digest},
                constraints={"budget": violation, "outclassed": 0.0},
            )
        )

    def _tell(self, trial: Trial, values: list[float]) -> None:
        try:
            self.study.tell(trial, values)
        except RuntimeError as error:  # the trial is told by then
            if not ends_study(error):
                raise
            self.is_exhausted = True

    def appraised(self) -> list[AppraisedTrial]:
        """All that was appraised."""
        return appraised_in(self.study)

    def tell_distillation(self, trial: Trial, advantage: float | None) -> None:
        """By how much a student learned more than with the usual distillation; None where its training failed."""
        self.distillations.tell(trial, advantage, state=TrialState.COMPLETE if advantage is not None else TrialState.FAIL)

    @property
    def sampler_failure(self) -> str | None:
        """Why the sampler could not suggest what it should have, where that was so."""
        sampler = self.study.sampler
        return sampler.failure if isinstance(sampler, OrRandom) else None

    def abandon(self, trial: Trial) -> None:
        """A trial that was interrupted: its structure waits for --resume."""
        if not self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            self.study.tell(trial, state=TrialState.FAIL)
            self._queue_again(trial)

    def retire_lost_trials(self) -> int:
        """Fail the trials that a killed search left running and queue their structures again, at most twice; how many there were."""
        for trial in self.distillations.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.distillations.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        lost = self._trials(TrialState.RUNNING)
        for trial in lost:
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            self._queue_again(trial)
        return len(lost)

    def _queue_again(self, trial: Trial | FrozenTrial) -> None:
        retries = int(trial.user_attrs.get("retries", 0))
        if retries < MAX_RETRIES and trial.params:
            self.study.enqueue_trial(dict(trial.params), user_attrs={"retries": retries + 1})

    @property
    def asked(self) -> int:
        """How many trials there are, waiting ones included."""
        return len(self._trials())

    @property
    def waiting(self) -> int:
        """How many trials wait to be asked for."""
        return len(self._trials(TrialState.WAITING))

    @property
    def finished(self) -> int:
        """How many trials of structures are finished, ruled-out ones included."""
        return len(self._trials(TrialState.COMPLETE, TrialState.FAIL))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)
