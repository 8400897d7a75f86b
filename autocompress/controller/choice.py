"""Which policy is trained next: a structure that enlarges the front, or another way to distil one that leads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from optuna.trial import Trial

from autocompress.candidates.appraisals import Appraised
from autocompress.candidates.proposals import Proposal, outclassed
from autocompress.controller.findings import Findings
from autocompress.controller.standing import feasible
from autocompress.devices.timing import MOST_DRIFT
from autocompress.graph import Structure
from autocompress.policy import Policy
from autocompress.ranking.front import gain, measured
from autocompress.ranking.promotion import Point, cover, promoted
from autocompress.records import Outcome
from autocompress.suggesters import PartiallyFixed

VARIANT_SHARE = 1 / 4
"""Share of the short runs that distil a known structure in another way, instead of training a new one."""
VARIED = 3
"""Leading policies whose distillation is varied, at most."""
INTERVAL_HEADROOM = MOST_DRIFT
"""Share of the budget that structures leave unused beside that for drift, until one is safely within it: for an interval's upper half."""
MOST_SUGGESTED = 6
"""Ways to distil that are drawn, at most, to find one that was not trained before."""
MOST_MEASURED = 4
"""Untrained networks that are measured, at most, to find one within the budget for the next short run."""
MOST_APPRAISED = 4
"""Untrained networks that are scored, at most, to find one that adds to what was trained."""
COLLAPSED = 0.5
"""Share of the original's score: a network that lost more has failed to train, and rules out nothing. Untrained, of the best worth."""


@dataclass(frozen=True)
class Choice:
    """A policy to train: what it was worth untrained, and where only distillation is new the trial that drew it and the run without it."""

    policy: Policy
    worth: float
    trial: Trial | None = None
    base: Outcome | None = None


def _adding_most(points: Sequence[Point], covered: Sequence[Point]) -> int | None:
    """Index of the point (merit, latency) that adds most to those that are covered; None where each is no better than one of them."""
    adding = [i for i, (merit, latency_s) in enumerate(points) if not any(m >= merit and s <= latency_s for m, s in covered)]
    return adding[cover([points[i] for i in adding], 1, covered)[0]] if adding else None


@dataclass(eq=False)
class Chooser:
    """Chooses by what was found so far."""

    findings: Findings

    def choose(self, pool: list[Proposal]) -> Choice | None:
        """A structure, or in its turn another way to distil one; the other where there is none. None when the space is exhausted.

        pool: policies to fall back on where too few were appraised.
        """
        if len(self._variants) + 1 <= VARIANT_SHARE * (len(self.findings.short_runs) + 1):
            return self._variant() or self._new_structure(pool)
        return self._new_structure(pool) or self._variant()

    # -- structures ----------------------------------------------------------------------------------------------------

    def _new_structure(self, pool: list[Proposal]) -> Choice | None:
        """The next structure to train, distilled as usual; what measuring rules out teaches the forecast, which then leads to another.

        Until the search is safe, one that is within the budget by a margin where there is one.
        """
        margins = (0.0,) if self._is_safe() else (self.findings.drift + INTERVAL_HEADROOM, 0.0)
        leaders = (self._measured_leader(pool, margin) for margin in margins)
        leader = next((leader for leader in leaders if leader is not None), None) or self._least_over_budget(pool)
        return Choice(leader.policy, leader.worth) if leader is not None else None

    def leading(self) -> list[Proposal]:
        """Networks that may rule out others: within the budget (the unchanged one by a margin), and not gone wrong in training."""
        findings = self.findings
        least = findings.gain_without(COLLAPSED)
        known = [o for o in measured(findings.journal.outcomes) if feasible(o, findings.limits) and gain(o) >= least]
        sound = [o for o in known if o.rung != "unchanged" or findings.stays_within(o)]  # else nothing is left near it
        proposals = [findings.forecast.proposal(o.policy, {}) for o in sound]
        return [replace(p, latency_s=findings.forecast.latency_s(p)) for p in proposals]

    def promising(self, pool: list[Proposal], leading: list[Proposal], margin: float = 0.0) -> list[Proposal]:
        """Of the pool, with latencies as predicted by now: within the budget, not trained before and not outclassed."""
        forecast, known = self.findings.forecast, self._trained_structures()
        within = forecast.within_budget(pool, margin=margin)
        return [p for p in within if forecast.structure(p.policy) not in known and outclassed(p, leading) <= 0]

    def spread(self, pool: list[Proposal], n: int) -> list[Proposal]:
        """The `n` of the pool that promise to cover most beside what was trained, and the unchanged network."""
        promising = self.promising(pool, self.leading())
        points = [(self._promise(p), p.latency_s) for p in promising]
        return [promising[index] for index in cover(points, n, self._covered(lambda appraised: self._promise(appraised.proposal)))]

    def _promise(self, proposal: Proposal) -> float:
        """In units of the original's, which no student that is made of it promises to surpass."""
        promise = self.findings.appraisals.promise(proposal)
        return min(1.0, promise) if self.findings.setting.one_architecture else promise

    def _is_safe(self) -> bool:
        """Whether something that has not gone wrong in training will be within the budget when it is measured at the end."""
        findings, least = self.findings, self.findings.gain_without(COLLAPSED)
        return any(o.rung != "unchanged" and findings.stays_within(o) and gain(o) >= least for o in findings.journal.outcomes)

    def _measured_leader(self, pool: list[Proposal], margin: float) -> Appraised | None:
        """The first to lead that is within the budget by this margin when it is measured, untrained.

        Where one turns out slower than even the refitted forecast says, the others may be so too: the next must have that much headroom, if
        any has. Where all that were tried miss, the nearest of them, but only if no margin was asked for and nothing is within the budget
        yet.
        """
        forecast, missed, aim = self.findings.forecast, list[tuple[float, Appraised]](), margin
        for _ in range(MOST_MEASURED):
            without = {forecast.structure(leader.policy) for _, leader in missed}
            leader = self._leader(pool, aim, without) or self._leader(pool, margin, without)
            if leader is None:
                return None
            excess = forecast.settled_excess(leader.proposal, margin=margin)
            if excess <= 0:
                return leader
            missed.append((excess, leader))
            slower = forecast.latency_s(leader.proposal) / forecast.predict(leader.policy).value
            aim = max(aim, (1 + margin) * slower - 1)
        return min(missed, key=lambda miss: miss[0])[1] if margin == 0 and not self.findings.is_within_budget() else None

    def _leader(self, pool: list[Proposal], margin: float, without: set[Structure]) -> Appraised | None:
        """What, as appraised, adds most to those that were trained, and the unchanged network.

        Where nothing that was appraised adds to these, some that promise to are appraised; where none of them does either, what is best
        of all the same.
        """
        for _ in range(MOST_APPRAISED):
            leader = self._appraised_leader(margin, without, self._covered(lambda appraised: appraised.worth))
            if leader is not None:
                return leader
            proposal = self._promising_leader(pool, margin, without, self._covered(lambda appraised: self._promise(appraised.proposal)))
            if proposal is None:
                break
            self.findings.appraisals.appraise(proposal)
        leader = self._appraised_leader(margin, without)
        if leader is not None:
            return leader
        proposal = self._promising_leader(pool, margin, without)
        return self.findings.appraisals.appraise(proposal) if proposal is not None else None

    def _appraised_leader(self, margin: float, without: set[Structure], covered: Sequence[Point] = ()) -> Appraised | None:
        candidates = self._untrained(margin, without)
        best = _adding_most([(a.worth, a.latency_s) for a in candidates], covered)
        return candidates[best] if best is not None else None

    def _promising_leader(
        self, pool: list[Proposal], margin: float, without: set[Structure], covered: Sequence[Point] = ()
    ) -> Proposal | None:
        candidates = self._unappraised(pool, margin, without)
        best = _adding_most([(self._promise(p), p.latency_s) for p in candidates], covered)
        return candidates[best] if best is not None else None

    def _unappraised(self, pool: list[Proposal], margin: float, without: set[Structure]) -> list[Proposal]:
        """Of the pool: what is promising, was not appraised and is none of these."""
        structure, appraisals = self.findings.forecast.structure, self.findings.appraisals
        promising = self.promising(pool, self.leading(), margin)
        return [p for p in promising if p.policy not in appraisals and structure(p.policy) not in without]

    def _least_over_budget(self, pool: list[Proposal]) -> Appraised | None:
        """Where nothing is within the budget as predicted, and nothing was: what misses it by least, since predictions err."""
        forecast, known = self.findings.forecast, self._trained_structures()
        rest = [p for p in pool if forecast.structure(p.policy) not in known]
        if not rest or self.findings.is_within_budget():
            return None
        return self.findings.appraisals.appraise(min(rest, key=lambda p: forecast.violation(p.workload, forecast.latency_s(p))))

    def _covered(self, merit: Callable[[Appraised], float]) -> list[Point]:
        """(merit, latency) of what was trained, and of the unchanged network if it stays within the budget: what is beside these waits."""
        findings, forecast = self.findings, self.findings.forecast
        trained = {forecast.structure(o.policy): o.policy for o in findings.journal.outcomes if o.rung != "unchanged"}
        known = map(findings.appraisals.of, trained.values())
        points = [(merit(appraised), forecast.latency_s(appraised.proposal)) for appraised in known if appraised is not None]
        unchanged = [o for o in findings.journal.outcomes if o.rung == "unchanged" and findings.stays_within(o)]
        return [*points, *((1.0, forecast.latency_s(forecast.proposal(o.policy, {}))) for o in unchanged)]

    def _untrained(self, margin: float, without: set[Structure]) -> list[Appraised]:
        """Of what was appraised: within the budget as predicted by now, not trained before, not outclassed and none of these.

        A margin is no reason to train what has lost most of what the others within the budget are worth.
        """
        known, leading, appraisals = self._trained_structures() | without, self.leading(), self.findings.appraisals
        candidates = appraisals.within_budget(margin=margin)
        if margin > 0 and self.findings.setting.one_architecture:
            least = COLLAPSED * max((a.worth for a in appraisals.within_budget()), default=0.0)
            candidates = [a for a in candidates if a.worth >= least]
        return [a for a in candidates if self.findings.forecast.structure(a.policy) not in known and outclassed(a.proposal, leading) <= 0]

    def _trained_structures(self) -> set[Structure]:
        return {self.findings.forecast.structure(o.policy) for o in self.findings.journal.outcomes}

    # -- other ways to distil ------------------------------------------------------------------------------------------

    def _variant(self) -> Choice | None:
        """One of the policies that lead, distilled as Optuna suggests; None where none leads, or the space has nothing new to suggest.

        Each of them in turn: of a space with few ways to distil, what is suggested has often been trained before.
        """
        findings, variants = self.findings, self._variants
        usual = [o for o in findings.climbers if o.id not in variants]
        leading = [o for o in promoted(usual, VARIED) if findings.appraisals.of(o.policy) is not None]
        for turn in range(MOST_SUGGESTED if leading else 0):
            base = leading[(len(variants) + turn) % len(leading)]
            appraised, trial = findings.appraisals.of(base.policy), findings.journal.distillations.ask()
            assert appraised is not None
            policy = findings.forecast.space(PartiallyFixed(appraised.proposal.params, trial))
            if trial.params and all(o.policy != policy for o in findings.journal.outcomes):
                return Choice(policy, appraised.worth, trial, base)
            findings.journal.tell_distillation(trial, None)
            if not trial.params:
                return None
        return None

    @property
    def _variants(self) -> set[str]:
        """Ids of the short runs that were distilled in another way than the first of their structure."""
        first: dict[Structure, str] = {}
        structure = self.findings.forecast.structure
        return {o.id for o in self.findings.short_runs if first.setdefault(structure(o.policy), o.id) != o.id}
