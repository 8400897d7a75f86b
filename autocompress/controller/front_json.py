"""Results (`autocompress.results`, front.json) made of what a search has found."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.budget import Budget
from autocompress.candidates.forecast import Forecast
from autocompress.controller.standing import feasible, speedup
from autocompress.graph import Structure
from autocompress.policy import Policy, StudentSpec
from autocompress.ranking.front import gain, hypervolume, measured
from autocompress.ranking.ranks import partial_rank_correlation, rank_correlation
from autocompress.records import Outcome
from autocompress.results import BaselineEntry, Entry, Ladder, LayerChange, PredictionQuality, Predictions, ProgressPoint
from autocompress.setup.setting import Baseline


def entry(outcome: Outcome, baseline: Baseline, limits: Budget, layers: tuple[LayerChange, ...], *, dominated: bool) -> Entry:
    """One measured policy as front.json and the report show it."""
    shared = {name: getattr(outcome, name) for name in Entry.model_fields.keys() & Outcome.model_fields.keys()}
    return Entry(
        **shared,
        digest=outcome.policy.digest,
        speedup=speedup(outcome, baseline),
        feasible=feasible(outcome, limits),
        dominated=dominated,
        layers=layers,
    )


def baseline_entry(baseline: Baseline, run: Path) -> BaselineEntry:
    """The original as front.json shows it."""
    return BaselineEntry(
        train_score=baseline.train_score,
        val_score=baseline.val_score,
        test_score=baseline.test_score,
        latency_s=baseline.latency_s,
        size_bytes=baseline.size_bytes,
        artifact=str(baseline.path.relative_to(run)),
    )


def layer_changes(forecast: Forecast, policy: Policy) -> tuple[LayerChange, ...]:
    """Every layer with its predicted seconds in the network that the student is derived from, unchanged, and in the student."""
    layers, unchanged = forecast.setting.graph_of(policy).describe(policy), Policy(student=StudentSpec(reference=policy.student.reference))
    before, after = (_by_layer(forecast.model.seconds_by_operator(forecast.workload(p)), layers) for p in (unchanged, policy))
    return tuple(LayerChange(**layer, teacher_latency_s=before.get(layer["name"]), latency_s=after.get(layer["name"])) for layer in layers)


def _by_layer(operators: Iterable[tuple[str, float]], layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each layer, however often it is called; LAYER.0 and LAYER.1 stand for one that is factorised."""
    names, seconds = {layer["name"] for layer in layers}, defaultdict[str, float](float)
    for name, own in operators:
        seconds[name if name in names else name.rpartition(".")[0]] += own
    return seconds


def predictions(outcomes: Sequence[Outcome], structure: Callable[[Policy], Structure], held_out: PredictionQuality) -> Predictions:
    """Predicted against measured latency of all measured structures, as predicted before they were measured for the first time."""
    first = {structure(o.policy): o for o in reversed(measured(outcomes))}.values()
    pairs = [(o.predicted_latency_s.value, o.latency_s.median) for o in first if o.predicted_latency_s and o.latency_s]
    errors = [abs(predicted / actual - 1) for predicted, actual in pairs]
    return Predictions(
        n=len(pairs),
        median_error=statistics.median(errors) if errors else None,
        spearman=rank_correlation([p for p, _ in pairs], [a for _, a in pairs]),
        held_out=held_out,
    )


def ladder_of(short: Sequence[Outcome], full: Sequence[Outcome], structure: Callable[[Policy], Structure], **appraised: Any) -> Ladder:
    """Whether short runs ranked policies as they had been appraised at the same latency, and full runs as short ones had.

    Of the runs of one structure that differ in distillation, the first one is compared with what it was worth.

    appraised: what `Ladder` says of appraisal.
    """
    first = {structure(o.policy): o for o in reversed(short)}.values()
    triples = [(o.worth, o.val_score.gain, o.latency_s.median) for o in first if o.worth is not None and o.val_score and o.latency_s]
    foretold = partial_rank_correlation(*([triple[side] for triple in triples] for side in range(3)))
    scores = {o.policy.digest: o.val_score.gain for o in short if o.val_score}
    both = [(scores[o.policy.digest], o.val_score.gain) for o in full if o.val_score and o.policy.digest in scores]
    return Ladder(
        short_runs=len(short),
        full_runs=len(full),
        appraised_short_spearman=foretold,
        short_full_spearman=rank_correlation([a for a, _ in both], [b for _, b in both]),
        **appraised,
    )


def progress_point(outcomes: Sequence[Outcome], baseline: Baseline, limits: Budget, elapsed_s: float, trials: int) -> ProgressPoint:
    """Hypervolume and the best score within the budget, so far.

    The reference is the original's latency and a score of 0; for scores below 0, twice the original's.
    """
    usual = baseline.latency_s.median
    points = [(gain(o), usual / speedup(o, baseline)) for o in measured(outcomes)]
    within = [o.val_score for o in measured(outcomes) if o.val_score and feasible(o, limits)]
    worst = min(0.0, 2.0 * baseline.val_score.gain) if baseline.val_score is not None else 0.0
    return ProgressPoint(
        elapsed_s=elapsed_s,
        trials=trials,
        hypervolume=hypervolume(np.array(points), (worst, usual)),
        best_val=max(within, key=lambda score: score.gain).value if within else None,
    )
