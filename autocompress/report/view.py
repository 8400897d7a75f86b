"""The words for what a search found: scores and latencies as text, the answer in one sentence, and what to beware of."""

from __future__ import annotations

import os
from pathlib import Path

from autocompress.ranking.ranks import is_low
from autocompress.ranking.scores import is_share, score_interval, validation_beats_test
from autocompress.records import FEWEST_FOR_TAIL, Measurement, Parity, Score
from autocompress.results import BaselineEntry, Results
from autocompress.units import counted, format_duration, format_size

BEATEN = "Nothing that was measured is better than the original."
LEAST_PAIRS = 5
"""Runs from which on a low rank correlation is hardly an accident."""


def format_score(score: Score | None) -> str:
    """0.9339 accuracy -> `"93.39 %"`; any other score as a number."""
    if score is None:
        return "-"
    return f"{100 * score.value:.2f} %" if is_share(score) else f"{score.value:.4g}"


def headline(results: Results) -> str:
    """The answer in one sentence."""
    best, limit = results.best_entry, results.budget.in_words()
    if best is None:
        if not results.points:
            return "No policy has been measured."
        if any(entry.feasible for entry in results.points):
            return "The original is within the budget, and nothing that was measured is better." if results.has_budget else BEATEN
        fastest = min(results.points, key=lambda entry: entry.latency_s.high)
        took = format_duration(fastest.latency_s.high)
        return f"Nothing that was measured meets the budget ({limit}): the fastest policy took {took}."
    within = f", within the budget ({limit})" if results.has_budget else ""
    speed = f"{best.speedup:.2f} times " + ("faster than" if best.speedup >= 1 else "the speed of")
    score = best.test_score or best.val_score
    return f"{speed} the original at {format_score(score)} {score.name}{within}."


def details(results: Results) -> list[str]:
    """The numbers behind the headline: latency, score and size against the original's, with 95 % intervals."""
    best, original = results.best_entry, results.baseline
    if best is None:
        return []
    lines = [f"latency {latency_line(best.latency_s)}, original {format_duration(original.latency_s.median)}"]
    scores = ((best.val_score, original.val_score, "validation"), (best.test_score, original.test_score, "test"))
    lines += [score_line(score, other, split) for score, other, split in scores if score is not None]
    lines.append(f"size {format_size(best.size_bytes)}, original {format_size(original.size_bytes)}")
    return lines + ([f"the file {agreement(best.parity)}"] if best.parity is not None else [])


def agreement(parity: Parity) -> str:
    """How far a file does what the network that it was exported from does."""
    if parity.differing is None:
        return f"differs from the network that it was exported from by {100 * parity.relative:.2g} % at most ({parity.n} inputs)"
    ties = f" ({parity.undecided} of the others are near ties)" if parity.undecided else ""
    return f"decides as the network that it was exported from on {parity.n - parity.differing} of {parity.n} inputs{ties}"


def latency_line(latency: Measurement) -> str:
    """`"9.87 ms (95 % interval 9.8 ms to 9.95 ms, p95 10.1 ms, at most 10.3 ms, n = 120)"`, and whether it is noisy."""
    spread = f"95 % interval {format_duration(latency.low)} to {format_duration(latency.high)}"
    noise = f"; noisy: {latency.noise_reason}" if latency.noisy else ""
    bound = "at most" if latency.n >= FEWEST_FOR_TAIL else "the longest took"
    tail = f"p95 {format_duration(latency.p95)}" + (f", {bound} {format_duration(latency.tail)}" if latency.p95_high is not None else "")
    return f"{format_duration(latency.median)} ({spread}, {tail}, n = {latency.n}{noise})"


def score_line(score: Score, original: Score | None, split: str) -> str:
    """One score with its interval, beside the original's."""
    interval = score_interval(score)
    spread = f"95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f} %, " if interval else ""
    examples = f"{spread}{score.n} {split} examples" if score.n else split
    return f"{score.name} {format_score(score)} ({examples}), original {format_score(original)}"


def caveats(results: Results, run: Path | None = None) -> list[str]:
    """What a reader should know before trusting the numbers: each a sentence with its cure; usually none.

    run: the folder of the search, where its files are looked for.
    """
    told = (
        _failed(results), _seen_validation(results.baseline), _noisy_front(results), _lying_ladder(results), _few_for_the_tail(results)
    )  # fmt: skip
    return [text for text in (*told, _deleted(results, run) if run is not None else "") if text]


def _failed(results: Results) -> str:
    """Of many policies some fail; where most do, the search has found less than it could."""
    failed, trained = results.failures, [entry for entry in results.points if not entry.is_untrained]
    if len(failed) <= len(trained):
        return ""
    return (
        f"{counted(len(failed), 'policy', 'policies')} failed, the first at its {failed[0].stage} stage: {failed[0].reason}. Mend that "
        "(tracebacks are in failures.log), and resume the search"
    )


def _deleted(results: Results, run: Path) -> str:
    gone = [entry.id for entry in results.listed if not os.path.isfile(run / (entry.artifact or ""))]  # noqa: PTH113
    if not gone:
        return ""
    return (
        f"the files of {', '.join(gone)} are no longer in {str(run)!r}. Resume the search: it leaves them out, and may make them again "
        "where it has time"
    )


def _few_for_the_tail(results: Results) -> str:
    """A budget of the 95th percentile that is held against the largest of a few samples."""
    few = [entry.id for entry in results.front if entry.latency_s.n < FEWEST_FOR_TAIL] if results.budget.p95_s is not None else []
    if not few:
        return ""
    return (
        f"the 95th percentile of {', '.join(few)} was estimated from fewer than {FEWEST_FOR_TAIL} calls, and may lie above all of them. "
        "Export measures again, or search longer"
    )


def _seen_validation(original: BaselineEntry) -> str:
    val, test = original.val_score, original.test_score
    if not validation_beats_test(val, test):
        return ""
    return (
        f"the original scores {format_score(val)} on validation but {format_score(test)} on test examples: it was probably trained on the "
        "validation examples, so that validation favours students that stay close to it. Compare test scores; better, validate on "
        "examples that it has not seen"
    )


def _noisy_front(results: Results) -> str:
    noisy = [entry.id for entry in results.front if entry.latency_s.noisy]
    if not noisy:
        return ""
    return f"the latency of {', '.join(noisy)} was noisy. End other programs, then `autocompress export` measures again"


def _lying_ladder(results: Results) -> str:
    """Only full training is the last word."""
    short, full = results.ladder.appraised_short_spearman, results.ladder.short_full_spearman
    if full is not None and is_low(full) and results.ladder.full_runs >= LEAST_PAIRS:
        return (
            f"short training ranked policies unlike full training (rank correlation {full:.2f}), so that better ones may have been passed "
            "over. Search longer"
        )
    if short is not None and is_low(short):
        return (
            f"untrained, policies were ranked unlike by short training (rank correlation {short:.2f} at the same latency), so that better "
            "ones may have been passed over. Search longer"
        )
    return ""
