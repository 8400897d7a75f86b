"""Which of several files of one policy stands for it."""

from __future__ import annotations

from collections.abc import Iterable

from autocompress.controller.front_json import feasible
from autocompress.front import gain
from autocompress.records import Budget, Outcome
from autocompress.scores import by_chance, knows_validation_like_training
from autocompress.setting import Baseline

MOST_SEEN_LOSS = 0.05
"""Share of right answers that longer training may lose on validation examples that the original has seen, and is still believed."""


def believed(outcomes: Iterable[Outcome], limits: Budget, baseline: Baseline) -> list[Outcome]:
    """One outcome a policy: of its files within the budget, else of all, the most accurate; a failure where there is none."""
    kept: dict[str, Outcome] = {}
    for outcome in outcomes:
        before = kept.get(outcome.policy.digest)
        if before is None or _is_better(outcome, before, limits, baseline):
            kept[outcome.policy.digest] = outcome
    return list(kept.values())


def _is_better(outcome: Outcome, before: Outcome, limits: Budget, baseline: Baseline) -> bool:
    """Of two files of one policy. Longer training is believed unless validation contradicts it by more than chance explains.

    A teacher that has seen the validation examples lets what has stayed closest to it look better than it is: then validation
    contradicts only what has lost much.
    """
    is_within, was_within = feasible(outcome, limits), feasible(before, limits)
    if is_within != was_within:
        return is_within
    return gain(outcome) >= gain(before) - _forgiven(outcome, before, baseline)


def _forgiven(outcome: Outcome, before: Outcome, baseline: Baseline) -> float:
    """What an outcome may have lost beside an earlier one, and still be believed."""
    if outcome.rung != "full":
        return 0.0
    longer = before.rung == "short" and (outcome.steps or 0) >= (before.steps or 0)
    chance = by_chance(outcome.val_score, before.val_score)
    seen = longer and knows_validation_like_training(baseline.train_score, baseline.val_score)
    return max(chance, MOST_SEEN_LOSS) if seen else chance
