"""front.json, read back as typed data: what tables, plots and the report are drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from autocompress.errors import RunFolderError, UsageError
from autocompress.policy import Policy, explain
from autocompress.ranks import is_low
from autocompress.records import Budget, Measurement, Prediction, Score
from autocompress.references import nearest
from autocompress.units import format_duration, format_size

BEATEN = "Nothing that was measured is better than the original."
SEEN_GAP = 0.01
"""Least difference of validation and test accuracy that tells of a model that has seen the validation examples."""
LEAST_PAIRS = 5
"""Runs from which on a low rank correlation is hardly an accident."""


class _Read(BaseModel):
    """Keys that a later version may have added are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerChange(_Read):
    """One layer of the teacher and what a policy makes of it; latencies (seconds) are predictions."""

    name: str
    kind: str = ""
    teacher_channels: int
    channels: int
    bits: int = 32
    dropped: bool = False
    teacher_latency_s: float | None = None
    latency_s: float | None = None


class Entry(_Read):
    """One measured policy."""

    id: str
    digest: str = ""
    policy: Policy
    val_score: Score
    test_score: Score | None = None
    latency_s: Measurement
    search_latency_s: Measurement | None = None
    predicted_latency_s: Prediction | None = None
    size_bytes: int
    speedup: float
    feasible: bool
    dominated: bool = False
    artifact: str | None = None
    layers: tuple[LayerChange, ...] = ()

    @property
    def words(self) -> str:
        return self.policy.in_words()


class Original(_Read):
    """The teacher as exported and measured; scores are missing when the search ended before they were taken."""

    val_score: Score | None = None
    test_score: Score | None = None
    latency_s: Measurement
    size_bytes: int
    artifact: str | None = None


class ProgressPoint(_Read):
    """State of the search at one time: seconds since its start, evaluated trials, hypervolume of the front."""

    elapsed_s: float
    trials: int
    hypervolume: float
    best_val: float | None = None


class FailedTrial(_Read):
    """A policy that did not become an artifact."""

    id: str
    stage: str
    reason: str


class Results(_Read):
    """Everything that a finished or interrupted search says of itself."""

    task: dict[str, Any] = {}
    device: str = ""
    environment: dict[str, Any] = {}
    budget: Budget = Budget()
    baseline: Original
    front: tuple[Entry, ...] = ()
    points: tuple[Entry, ...] = ()
    best: str | None = None
    progress: tuple[ProgressPoint, ...] = ()
    prediction: dict[str, Any] = {}
    ladder: dict[str, Any] = {}
    failures: tuple[FailedTrial, ...] = ()
    elapsed_s: float = 0.0
    spent_s: dict[str, float] = {}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Validate the content of front.json; raises RunFolderError that names the field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RunFolderError(f"front.json is damaged: {explain(error)}", hint="resume the search: it writes the file again") from None

    @property
    def model(self) -> str:
        return str(self.task.get("model", "model"))

    @property
    def best_entry(self) -> Entry | None:
        return next((entry for entry in self.points if entry.id == self.best), None)

    @property
    def listed(self) -> tuple[Entry, ...]:
        """What a table shows: the front, or all that was measured when nothing is on it; fastest first."""
        return self.front or tuple(sorted(self.points, key=lambda entry: entry.latency_s.median))

    @property
    def limits(self) -> Budget:
        """The budget as it was asked for, which may be relative; `budget` is the same in seconds."""
        asked = self.task.get("budget")
        return Budget.parse(tuple(asked)) if asked else self.budget

    @property
    def has_budget(self) -> bool:
        return self.budget != Budget()

    def pick(self, name: str) -> Entry:
        """The policy called `name`: its id, the first digits of its digest, or `best`. Raises UsageError."""
        wanted = self.best if name == "best" else name
        for entry in self.points:
            if wanted and (entry.id == wanted or (len(wanted) >= 6 and entry.digest.startswith(wanted))):
                return entry
        if name == "best" and self.points:
            why = "better than the original" if any(entry.feasible for entry in self.points) else "within the budget"
            raise UsageError(f"no measured policy is {why}", hint="name one by its id; `show` lists them")
        if name == "best":
            failed = f"; the first failed to {self.failures[0].stage}: {self.failures[0].reason}" if self.failures else ""
            raise UsageError(f"no policy has been measured{failed}", hint="search again, with --resume")
        raise UsageError(f"no measured policy has the id {name!r}", hint=nearest(name, [e.id for e in self.points]))


def is_share(score: Score) -> bool:
    """Whether the score is a share of right answers, to be shown in percent."""
    return score.name.startswith(("accuracy", "top")) and 0.0 <= score.value <= 1.0


def format_score(score: Score | None) -> str:
    """0.9339 accuracy -> `"93.39 %"`; any other score as a number."""
    if score is None:
        return "-"
    return f"{100 * score.value:.2f} %" if is_share(score) else f"{score.value:.4g}"


def score_interval(score: Score) -> tuple[float, float] | None:
    """95 % interval of a share of n answers (Wilson 1927, JASA 22, 209-212); None for other scores."""
    if not is_share(score) or score.n < 1:
        return None
    z, p, n = 1.959964, score.value, score.n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


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
    return lines


def latency_line(latency: Measurement) -> str:
    """`"9.87 ms (95 % interval 9.8 ms to 9.95 ms, p95 10.1 ms, n = 120)"`, and whether it is noisy."""
    spread = f"95 % interval {format_duration(latency.low)} to {format_duration(latency.high)}"
    noise = f"; noisy: {latency.noise_reason}" if latency.noisy else ""
    return f"{format_duration(latency.median)} ({spread}, p95 {format_duration(latency.p95)}, n = {latency.n}{noise})"


def score_line(score: Score, original: Score | None, split: str) -> str:
    """One score with its interval, beside the original's."""
    interval = score_interval(score)
    spread = f"95 % interval {100 * interval[0]:.2f} to {100 * interval[1]:.2f} %, " if interval else ""
    examples = f"{spread}{score.n} {split} examples" if score.n else split
    return f"{score.name} {format_score(score)} ({examples}), original {format_score(original)}"


def caveats(results: Results) -> list[str]:
    """What a reader should know before trusting the numbers: each a sentence with its cure; usually none."""
    return [text for text in (_seen_validation(results.baseline), _noisy_front(results), _lying_ladder(results)) if text]


def _seen_validation(original: Original) -> str:
    val, test = original.val_score, original.test_score
    if val is None or test is None:
        return ""
    spread_val, spread_test = score_interval(val), score_interval(test)
    if not spread_val or not spread_test or spread_val[0] <= spread_test[1] or val.value - test.value < SEEN_GAP:
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
    short, rho, runs = (results.ladder.get(key) for key in ("appraised_short_spearman", "short_full_spearman", "full_runs"))
    if isinstance(rho, float) and is_low(rho) and (runs or 0) >= LEAST_PAIRS:
        return (
            f"short training ranked policies unlike full training (rank correlation {rho:.2f}), so that better ones may have been passed "
            "over. Search longer"
        )
    if isinstance(short, float) and is_low(short):
        return (
            f"untrained, policies were ranked unlike by short training (rank correlation {short:.2f} at the same latency), so that better "
            "ones may have been passed over. Search longer"
        )
    return ""
