"""What structures are worth before anything is trained: each is a trial of the study, with its likeness to the teacher and its latency."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from optuna.distributions import BaseDistribution
from optuna.trial import FixedTrial, Trial

from autocompress.candidates.forecast import Forecast
from autocompress.candidates.likeness import Likeness
from autocompress.candidates.proposals import Proposal, outclassed
from autocompress.candidates.sensitivity import Sensitivity
from autocompress.errors import UsageError
from autocompress.graph import Structure
from autocompress.policy import Policy
from autocompress.ranking.ranks import partial_rank_correlation
from autocompress.study.journal import AppraisedTrial, Journal
from autocompress.study.notes import Note
from autocompress.system.failures import refused

MOST_RULED_OUT = 150
"""Suggestions in a row that prediction rules out before the search turns to its own draws."""
RECENT_APPRAISALS = 7
"""The last so many appraisals say what one takes."""
MOST_REPEATED = 50
"""Suggestions in a row that were appraised before: then the space is exhausted."""


@dataclass(frozen=True)
class Appraised:
    """A proposal, and what it is worth: its likeness to the teacher; where there are students of another architecture, its promise."""

    proposal: Proposal
    worth: float

    @property
    def policy(self) -> Policy:
        return self.proposal.policy

    @property
    def latency_s(self) -> float:
        return self.proposal.latency_s


@dataclass
class Appraisals:
    """What was appraised so far, one of each structure; what a resumed search had appraised is read from its trials."""

    journal: Journal
    forecast: Forecast
    _seconds: list[float] = field(default_factory=list)
    _known: dict[Structure, Appraised] = field(default_factory=dict)

    @functools.cached_property
    def _likeness(self) -> Likeness:
        with refused("the original cannot answer the examples that students are compared on"):
            return Likeness(self.forecast.setting)

    @property
    def seconds_each(self) -> float:
        """What an appraisal took lately, as a rule; 0 before the first."""
        return statistics.median_low(self._seconds[-RECENT_APPRAISALS:] or [0.0])

    @functools.cached_property
    def _original(self) -> Proposal:
        return self.forecast.proposal(Policy(), {})

    @functools.cached_property
    def sensitivity(self) -> Sensitivity:
        """What the dimensions of the space lose by themselves, as far as they were appraised."""

        def worth(policy: Policy) -> float | None:
            known = self.of(policy)
            return known.worth if known is not None else None

        return Sensitivity(self.forecast, worth)

    def promise(self, proposal: Proposal) -> float:
        """In units of the original's."""
        return proposal.promise / self._original.promise

    def _worth(self, proposal: Proposal) -> float:
        return self._likeness(proposal.policy) if self.forecast.setting.one_architecture else self.promise(proposal)

    @property
    def failures(self) -> list[str]:
        """Why students of this search could not be compared with the teacher; they count as if nothing were left of it."""
        return self._likeness.failures if self._seconds and self.forecast.setting.one_architecture else []

    def recall(self) -> None:
        """Take up what the trials of a resumed search say; what a function of the user's draws otherwise by now is left out.

        Of several policies of one structure the first is kept, as it was when they were appraised.
        """
        for trial in self.journal.appraised():
            drawn = self._drawn_again(trial)
            if drawn is not None:
                proposal, _ = drawn
                self._known.setdefault(self.forecast.structure(proposal.policy), Appraised(proposal, trial.worth))

    def take_over(self, trial: AppraisedTrial) -> None:
        """Believe what another search of the same subject has appraised, unless its trial stands for another policy on this device."""
        drawn = self._drawn_again(trial)
        if drawn is None or drawn[0].policy.digest != trial.digest or drawn[0].policy in self:
            return
        proposal, distributions = drawn
        violation = self.forecast.violation(proposal.workload, proposal.latency_s)
        with suppress(ValueError):  # beyond what the space draws by now
            self.journal.add_appraised(trial, distributions, latency_s=proposal.latency_s, violation=violation)
            self._known[self.forecast.structure(proposal.policy)] = Appraised(proposal, trial.worth)

    def _drawn_again(self, trial: AppraisedTrial) -> tuple[Proposal, dict[str, BaseDistribution]] | None:
        """What a trial's parameters stand for in this space, and where they were drawn from; None where they are none of it."""
        fixed = FixedTrial(trial.params)
        try:
            return self.forecast.proposal(self.forecast.suggest(fixed), trial.params), fixed.distributions
        except (UsageError, ValueError):
            return None

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, policy: object) -> bool:
        return isinstance(policy, Policy) and self.forecast.structure(policy) in self._known

    def of(self, policy: Policy) -> Appraised | None:
        """What is known of a policy's structure."""
        return self._known.get(self.forecast.structure(policy))

    def within_budget(self, *, margin: float = 0.0) -> list[Appraised]:
        """All that is within the budget by this margin, with latencies as they are predicted by now."""
        return [
            Appraised(p, known.worth)
            for known in self._known.values()
            for p in self.forecast.within_budget([known.proposal], margin=margin)
        ]

    def best_that_may_be_within_budget(self) -> Proposal | None:
        """Worth most of what is within the budget as measured, or as far as prediction leaves open; of equals the fastest."""
        best_first = sorted(self._known.values(), key=lambda known: (-known.worth, known.latency_s))
        return next((known.proposal for known in best_first if self.forecast.least_excess(known.proposal) <= 0), None)

    def suggested(self, leading: Sequence[Proposal], patience_s: float) -> Appraised | None:
        """Appraise what Optuna suggests next and prediction does not rule out; what it rules out on the way costs milliseconds and is told.

        Ruled out is what is over the budget, and what one of the `leading` networks, which were trained, already beats in latency, size and
        inheritance at once. None where all suggestions were known or ruled out for so long.
        """
        until, repeated = time.monotonic() + patience_s, 0
        for _ in range(MOST_RULED_OUT):
            if time.monotonic() > until or repeated >= MOST_REPEATED or self.journal.is_exhausted:
                break
            trial = self.journal.study.ask()
            proposal = self.forecast.proposal(self.forecast.suggest(trial), trial.params)
            shortfall, over_budget = outclassed(proposal, leading), self.forecast.least_excess(proposal)
            if over_budget > 0 or shortfall > 0:
                latency_s = self.forecast.latency_s(proposal)
                self.journal.tell_ruled_out(trial, latency_s, over_budget=over_budget, outclassed=shortfall)
            elif proposal.policy in self:
                self._tell(trial, proposal)
                repeated += 1
            else:
                return self._tell(trial, proposal)
        return None

    def appraise(self, proposal: Proposal) -> Appraised:
        """Appraise this one, as a trial that the sampler learns from; before it what an interrupted search left waiting.

        Optuna hands out waiting trials in the order in which they came.
        """
        self.journal.study.enqueue_trial(proposal.params)
        for _ in range(self.journal.waiting):
            trial = self.journal.study.ask()
            appraised = self._tell(trial, self.forecast.proposal(self.forecast.suggest(trial), trial.params))
        return appraised

    def _tell(self, trial: Trial, proposal: Proposal) -> Appraised:
        """What the structure is worth, told to the sampler; an interrupted appraisal waits."""
        structure = self.forecast.structure(proposal.policy)
        found = self._known.get(structure)
        if found is None:
            if self.forecast.setting.one_architecture:
                _ = self._likeness  # what is made once is not what each takes
            started = time.monotonic()
            try:
                with self.forecast.setting.ledger.spend("appraise"):
                    found = Appraised(proposal, self._worth(proposal))
            except BaseException:
                self.journal.abandon(trial)
                raise
            self._seconds.append(time.monotonic() - started)
            self._known[structure] = found
        violation = self.forecast.violation(proposal.workload, proposal.latency_s)
        self.journal.tell_appraised(trial, proposal.policy, found.worth, proposal.latency_s, violation)
        return found

    def agreement(self) -> float | None:
        """Whether policies of the same latency are ranked as their worth does: by what is foreseen of them, else by their promise.

        None of students of another architecture, of which nothing else is known than their promise.
        """
        if not self.forecast.setting.one_architecture:
            return None
        every, foreseen = [*self._known.values()], [a.proposal.promise for a in self._known.values()]
        if self.is_sensitivity_known:
            alone = {self.forecast.structure(single.proposal.policy) for single in self.sensitivity.levels}
            every = [appraised for structure, appraised in self._known.items() if structure not in alone]
            foreseen = self.sensitivity.foreseen([appraised.proposal for appraised in every]).tolist()
        return partial_rank_correlation(foreseen, [a.worth for a in every], [a.latency_s for a in every])

    def start_with_dimensions(self) -> None:
        """From now on, in a resumed search too, what is foreseen of policies is what their dimensions lose alone."""
        if not self.journal.noted(Note.DIMENSIONS_FIRST):
            self.journal.note(Note.DIMENSIONS_FIRST, True)

    @property
    def is_sensitivity_known(self) -> bool:
        """Whether dimensions were to be appraised alone, and enough of them were."""
        return bool(self.journal.noted(Note.DIMENSIONS_FIRST)) and self.sensitivity.missing == 0
