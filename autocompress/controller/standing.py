"""Where measured policies stand: within the budget or not, how fast beside the original, which file counts, what is on the front."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

from autocompress.budget import Budget
from autocompress.graph import Structure
from autocompress.policy import Policy
from autocompress.ranking.front import cost, gain, measured, pareto_front
from autocompress.ranking.scores import by_chance, knows_validation_like_training
from autocompress.records import Outcome
from autocompress.setup.setting import Baseline

MOST_SEEN_LOSS = 0.05
"""Share of right answers that longer training may lose on validation examples that the original has seen, and is still believed."""


def feasible(outcome: Outcome, limits: Budget, *, margin: float = 0.0) -> bool:
    """Whether the outcome's artifact was measured within the budget as it was asked for, by this margin, and is still there."""
    return outcome.failure is None and outcome.latency_s is not None and limits.allows(outcome.latency_s, outcome.size_bytes, margin=margin)


def speedup(outcome: Outcome, baseline: Baseline) -> float:
    """How many times as fast as the original a measured file is: as that was beside it, else as it is known now."""
    assert outcome.latency_s is not None
    return 1 / outcome.latency_s.relative(baseline.latency_s.median)


def front_of(outcomes: Sequence[Outcome], limits: Budget, baseline: Baseline, structure: Callable[[Policy], Structure]) -> list[Outcome]:
    """The front of what was measured within the budget, fastest first; without a budget everything is within it.

    Of the ways to distil one network, which take the same time, one that is believed: what is measured of them differs by noise. What was
    trained to the end stays beside what was trained briefly, unless that is faster and better by more than is forgiven. What the original
    itself beats, where it is within the budget, is worth nothing to anybody.
    """
    within = sorted((o for o in measured(outcomes) if feasible(o, limits)), key=lambda o: o.rung == "full")  # the longest trained last
    networks = believed(within, limits, baseline, lambda o: structure(o.policy))
    best = pareto_front(networks)
    front = sorted((o for o in networks if o in best or _is_spared(o, networks, baseline)), key=cost)
    budget = limits.against(baseline.latency_s.median)
    if baseline.val_score is None or not budget.allows(baseline.latency_s, baseline.size_bytes):
        return front
    return [o for o in front if gain(o) > baseline.val_score.gain or speedup(o, baseline) > 1]


def believed(
    outcomes: Iterable[Outcome], limits: Budget, baseline: Baseline, what: Callable[[Outcome], Hashable] = lambda o: o.policy.digest
) -> list[Outcome]:
    """One outcome a policy: of its files within the budget, else of all, the most accurate; a failure where there is none.

    what: other than policies, of which there is to be one outcome each.
    """
    kept: dict[Hashable, Outcome] = {}
    for outcome in outcomes:
        before = kept.get(what(outcome))
        if before is None or _is_better(outcome, before, limits, baseline):
            kept[what(outcome)] = outcome
    return list(kept.values())


def _is_better(outcome: Outcome, before: Outcome, limits: Budget, baseline: Baseline) -> bool:
    """Of two files of one network. Longer training is believed unless validation contradicts it by more than chance explains.

    A teacher that has seen the validation examples lets what has stayed closest to it look better than it is: then validation
    contradicts only what has lost much.
    """
    is_within, was_within = feasible(outcome, limits), feasible(before, limits)
    if is_within != was_within:
        return is_within
    return gain(outcome) >= gain(before) - _forgiven(outcome, before, baseline)


def _is_spared(outcome: Outcome, others: Sequence[Outcome], baseline: Baseline) -> bool:
    """Whether longer training made a network that only validation examples speak against which the original has seen."""
    beside = [o for o in others if o is not outcome and cost(o) <= cost(outcome)]
    knows = knows_validation_like_training(baseline.train_score, baseline.val_score)
    return knows and all(gain(outcome) > gain(o) - (_forgiven(outcome, o, baseline) if o.rung == "short" else 0.0) for o in beside)


def _forgiven(outcome: Outcome, before: Outcome, baseline: Baseline) -> float:
    """What an outcome may have lost beside an earlier one, and still be believed."""
    if outcome.rung != "full":
        return 0.0
    longer = before.rung == "short" and (outcome.steps or 0) >= (before.steps or 0)
    chance = by_chance(outcome.val_score, before.val_score)
    seen = longer and knows_validation_like_training(baseline.train_score, baseline.val_score)
    return max(chance, MOST_SEEN_LOSS) if seen else chance
