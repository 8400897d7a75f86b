"""The end of a search: its front is measured together once more, and scored on the test split for the first and only time."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from autocompress.controller.findings import Findings
from autocompress.data import Split, sample
from autocompress.errors import PolicyFailure, one_line
from autocompress.export import is_intact
from autocompress.records import Measurement, Outcome, Score
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.setup.setting import Setting
from autocompress.study.notes import Note
from autocompress.system.failures import policy_errors
from autocompress.trial.beside_baseline import believable, measure_beside_baseline, seconds_for
from autocompress.trial.evaluate import score_artifact

FINAL_SECONDS_EACH, LEAST_FINAL_SECONDS_EACH = 1.5, 0.3
FINAL_SHARE = 0.6
"""Of the time that is left at the end: for measuring the front; the test set and the report take the rest."""
LEAST_TEST = 256
MOST_OVERTIME = 0.05
"""Of the search's time: what so many test examples may take beyond it; of slower models there are fewer, but FEWEST_EXAMPLES."""


def conclude(findings: Findings) -> None:
    """Measure the front and score it; again what has come onto it, where the test split has shown that a file fails.

    A front that was concluded before, with nothing new on it, stays as it was told: to measure it once more in no time says less.
    """
    if _is_concluded(findings):
        return
    known: set[str] = set()
    measure_front(findings, known)
    score_test(findings)
    while measure_front(findings, known):
        score_test(findings)


def _is_concluded(findings: Findings) -> bool:
    """Whether every file of the front is still there, was measured with the others and scored on the test split, as the original was."""
    front = findings.front()
    is_told = all(o.test_score is not None and o.search_latency_s is not None for o in front)
    is_whole = all(is_intact((findings.run / (o.artifact or "")).parent) for o in front)
    return is_told and is_whole and findings.setting.baseline.test_score is not None


def measure_front(findings: Findings, known: set[str]) -> bool:
    """Measure the front's files together, interleaved with the baseline; a point stays within the budget only if both times it was.

    What leaves the budget may let points onto the front that were behind it, so that it is measured until all of it has been.

    Args:
        known: ids of what has been measured so before; added to.

    Returns whether there was anything to measure, and time.
    """
    before = len(known)
    while front := [o for o in findings.front() if o.id not in known]:
        if known and findings.clock.until_end < 0:
            break
        findings.show("measuring the front", 0, len(front))
        baseline, again = _measured_again(findings, front)
        if baseline is not None and not known:
            findings.record_baseline(replace(findings.setting.baseline, latency_s=baseline))
        for outcome, latency in again:
            last, first = believable(latency, outcome.predicted_latency_s), outcome.search_latency_s or outcome.latency_s
            findings.journal.record(outcome.model_copy(update={"latency_s": last, "search_latency_s": first}))
        known |= {o.id for o in front}
    return len(known) > before


def _measured_again(findings: Findings, front: list[Outcome]) -> tuple[Measurement | None, list[tuple[Outcome, Measurement]]]:
    """Latencies of the baseline and of these, all together; one by one where that fails, and what fails even so is lost.

    Where not even the baseline can be measured, which was so often before, nothing is said against any of them.
    """
    setting, left = findings.setting, max(0.0, findings.clock.until_end)
    wanted = seconds_for(findings.limits, setting.baseline.latency_s.median, FINAL_SECONDS_EACH)
    seconds = max(LEAST_FINAL_SECONDS_EACH, min(wanted, FINAL_SHARE * left / (len(front) + 1)))
    until = time.monotonic() + FINAL_SHARE * left

    def measure(paths: list[Path]) -> list[Measurement]:
        with policy_errors(setting.log):
            return measure_beside_baseline(setting, paths, seconds_each=seconds, until=until)

    paths = {o.id: findings.run / (o.artifact or "") for o in front}
    with contextlib.suppress(PolicyFailure):
        baseline, *others = measure([*paths.values()])
        return baseline, list(zip(front, others, strict=True))
    try:
        (baseline,) = measure([])
    except PolicyFailure as error:
        findings.progress.message(f"the front cannot be measured once more, so that it stands as it was measured before: {one_line(error)}")
        return None, []
    again: list[tuple[Outcome, Measurement]] = []
    for outcome in front:
        try:
            baseline, latency = measure([paths[outcome.id]])
        except PolicyFailure as error:
            findings.lose(outcome, error, "measure")
        else:
            again.append((outcome, latency))
    return baseline, again


def score_test(findings: Findings) -> None:
    """The one look at the test set: the baseline and the front that is reported, each once, resumed or not.

    Where the whole of it would take longer than the search may, a part of it that is always the same.
    """
    setting, front = findings.setting, findings.front()
    left = max(0.0, findings.clock.until_end)
    slowness = 1 + sum(o.latency_s.median for o in front if o.latency_s) / setting.baseline.latency_s.median
    per_example_s = max(1e-9, findings.per_example_s * slowness)
    least = min(LEAST_TEST, int(MOST_OVERTIME * findings.clock.total / per_example_s))
    affordable = min(setting.most_answers, max(FEWEST_EXAMPLES, least, int(left / per_example_s)))
    wanted = findings.journal.noted(Note.TEST_EXAMPLES) or min(len(setting.data.test), affordable)
    findings.journal.note(Note.TEST_EXAMPLES, wanted)
    test = sample(setting.data.test, wanted)
    if len(test) < len(setting.data.test):
        findings.progress.message(
            f"scoring {len(test)} of {len(setting.data.test)} test examples: all would take more time or memory than the search may"
        )
    findings.show("scoring the test set", 0, len(front) + 1)
    if setting.baseline.test_score is None:
        try:
            score = _score(setting, setting.baseline.path, test)
        except PolicyFailure as error:  # the original has answered the validation split: something is wrong with these examples
            findings.progress.message(f"the test split cannot be scored, so there are no test scores: {error.message}")
            return
        findings.record_baseline(replace(setting.baseline, test_score=score))
    for done, outcome in enumerate(front):
        findings.show("scoring the test set", done + 1, len(front) + 1)
        if outcome.test_score is None:
            _score_test_of(findings, outcome, test)


def _score_test_of(findings: Findings, outcome: Outcome, test: Split) -> None:
    try:
        score = _score(findings.setting, findings.run / (outcome.artifact or ""), test)
    except PolicyFailure as error:
        findings.lose(outcome, error, "test")
        return
    findings.journal.record(outcome.model_copy(update={"test_score": score}))


def _score(setting: Setting, path: Path, test: Split) -> Score:
    """Of a file on the test split. Raises PolicyFailure where that fails."""
    with policy_errors(setting.log), setting.ledger.spend("score"):
        return score_artifact(setting.device, path, setting.data, test, setting.batch)
