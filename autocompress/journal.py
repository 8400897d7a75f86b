"""The journal of a search: what became of every policy, and what a resumed search has to know. It is written before it is believed.

An Optuna trial is one policy with its parameters; what became of it at each rung is an Outcome among the study's attributes, in the same
database, so that a killed search loses nothing that was finished. One process writes it, and so it is read once.
"""

from __future__ import annotations

import json
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from autocompress.policy import Policy
from autocompress.records import Outcome

OUTCOME = "outcome:"
MAX_RETRIES = 2
RULED_OUT_SCORE = 0.0


class Journal:
    """A study, and the outcomes that are kept in it."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self._notes = study.user_attrs
        kept = {key.removeprefix(OUTCOME): value for key, value in self._notes.items() if key.startswith(OUTCOME) and value is not None}
        self._outcomes = {id: Outcome.model_validate_json(json.dumps(kept[id])) for id in kept}

    # -- outcomes and notes ---------------------------------------------------------------------------------------

    @property
    def outcomes(self) -> list[Outcome]:
        """All outcomes so far, in the order of their ids."""
        return [self._outcomes[id] for id in sorted(self._outcomes)]

    def record(self, outcome: Outcome) -> None:
        """Keep an outcome for good, in place of an earlier one of its id."""
        self.study.set_user_attr(OUTCOME + outcome.id, json.loads(outcome.model_dump_json(by_alias=True)))
        self._outcomes[outcome.id] = outcome

    def forget(self, outcome: Outcome) -> None:
        """Take an outcome back: its policy may be tried again."""
        self.study.set_user_attr(OUTCOME + outcome.id, None)
        del self._outcomes[outcome.id]

    def note(self, key: str, value: Any) -> None:
        """Keep a JSON value beside the outcomes."""
        self.study.set_user_attr(key, value)
        self._notes[key] = value

    def noted(self, key: str) -> Any:
        """A value that was kept, by this search or by the one that it resumes; None where there is none."""
        return self._notes.get(key)

    # -- trials ---------------------------------------------------------------------------------------------------

    def tell_ruled_out(self, trial: Trial, policy: Policy, latency_s: float, *, over_budget: float, outclassed: float) -> None:
        """A policy that prediction rules out: complete, with a constraint violated, so that the sampler learns from it."""
        trial.set_user_attr("policy", policy.digest)
        trial.set_constraint("budget", over_budget)
        trial.set_constraint("outclassed", outclassed)
        self.study.tell(trial, [RULED_OUT_SCORE, latency_s])

    def tell_outcome(self, trial: Trial, outcome: Outcome, violation: float) -> None:
        """The result of a policy that was realised; a failure teaches the sampler nothing about latency or accuracy."""
        trial.set_user_attr("policy", outcome.policy.digest)
        trial.set_user_attr("outcome", outcome.id)
        if outcome.failure is not None or outcome.val_score is None or outcome.latency_s is None:
            trial.set_user_attr("failure", outcome.failure.reason if outcome.failure else "no score")
            self.study.tell(trial, state=TrialState.FAIL)
            return
        trial.set_constraint("budget", violation)
        trial.set_constraint("outclassed", 0.0)
        self.study.tell(trial, [outcome.val_score.gain, outcome.latency_s.median])

    def abandon(self, trial: Trial) -> None:
        """A trial that was interrupted: its policy waits for --resume."""
        if not self.study.get_trials(deepcopy=False)[trial.number].state.is_finished():
            self.study.tell(trial, state=TrialState.FAIL)
            self._queue_again(trial)

    def retire_lost_trials(self) -> int:
        """Fail the trials that a killed search left running and queue their policies again, at most twice; how many there were."""
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
    def is_waiting(self) -> bool:
        """Whether a policy is queued: one that was interrupted comes again before anything new."""
        return bool(self._trials(TrialState.WAITING))

    @property
    def asked(self) -> int:
        """How many trials there are, waiting ones included."""
        return len(self._trials())

    @property
    def finished(self) -> int:
        """How many trials are finished, ruled-out ones included."""
        return len(self._trials(TrialState.COMPLETE, TrialState.FAIL))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)
