"""What another search of the same model and data has learned, taken over: accuracy depends on no budget and hardly on the device.

What was appraised is believed. Networks that were trained are measured here, and scored where the device is another; so that training
goes into what the new front lacks.
"""

from __future__ import annotations

import time
from pathlib import Path

from autocompress.controller.findings import Findings
from autocompress.controller.recovery import at_work
from autocompress.errors import PolicyFailure, UsageError
from autocompress.export import is_intact
from autocompress.ranking.front import gain, measured
from autocompress.ranking.promotion import cover
from autocompress.records import Outcome
from autocompress.search_space import for_device
from autocompress.study.journal import Journal
from autocompress.trial.objective import evaluate_again

WARM_START_SHARE = 0.3
"""Of the time that is left, at most, for measuring what another search has trained, and as much again for its appraisals."""


def take_over(findings: Findings, known: Journal, run: Path) -> None:
    """Take over what the journal of another search, in the folder `run`, knows; once, however often this search is resumed."""
    seconds = WARM_START_SHARE * findings.clock.left
    if seconds <= 0:
        return
    missed = _take_over_files(findings, known, run, time.monotonic() + seconds)
    missed += _take_over_appraisals(findings, known, time.monotonic() + seconds)
    taken = findings.taken_over
    findings.note_taken_over(taken.model_copy(update={"complete": True}))
    late = f"; for {missed} more there was no time" if missed else ""
    findings.progress.message(f"{len(taken.ids)} networks and {taken.appraised} appraisals of {run} were taken over{late}")


def _take_over_files(findings: Findings, known: Journal, run: Path, until: float) -> int:
    """Measure what covers most of the new front first; how many were left for want of time."""
    forecast, longest = findings.forecast, 0.0
    wanted = [o for o in measured(known.outcomes) if _may_be_wanted(findings, o)]
    order = cover([(gain(o), forecast.latency_s(forecast.proposal(o.policy, {}))) for o in wanted], len(wanted))
    for done, index in enumerate(order):
        started = time.monotonic()
        if started + longest > until:
            return len(order) - done
        findings.show("measuring what was trained before", done, len(order))
        _take_over_file(findings, wanted[index], run)
        longest = max(longest, time.monotonic() - started)
    return 0


def _may_be_wanted(findings: Findings, outcome: Outcome) -> bool:
    """Whether its file is what this device would run, and may be within the budget; the unchanged network is made again in no time."""
    forecast, profile, policy = findings.forecast, findings.setting.device.profile, outcome.policy
    if outcome.rung == "unchanged" or outcome.id in {o.id for o in findings.journal.outcomes}:
        return False
    if for_device(policy, profile) != policy or (8 in (policy.quant.bits, *policy.quant.layers.values()) and 8 not in profile.bits):
        return False
    return forecast.least_excess(forecast.proposal(policy, {})) <= 0


def _take_over_file(findings: Findings, outcome: Outcome, run: Path) -> None:
    bundle, predicted = (run / (outcome.artifact or "")).resolve().parent, findings.forecast.first_prediction(outcome.policy)
    if not bundle.is_relative_to(run.resolve()) or not is_intact(bundle):
        findings.progress.message(f"policy {outcome.id} of {run} is left out: its files are no longer what they were")
        return
    try:
        with at_work(findings, outcome.again(outcome.id, outcome.rung)):
            taken = evaluate_again(findings.setting, outcome, bundle, predicted=predicted)
    except (PolicyFailure, UsageError) as error:
        findings.progress.message(f"policy {outcome.id} of {run} is left out: {error.message}")
        return
    known = findings.taken_over
    findings.note_taken_over(known.model_copy(update={"ids": tuple(sorted({*known.ids, outcome.id}))}))
    findings.keep(taken)


def _take_over_appraisals(findings: Findings, known: Journal, until: float) -> int:
    """Believe what was appraised; how many were left for want of time."""
    findings.show("taking over what was appraised")
    trials, done = known.appraised(), 0
    while done < len(trials) and time.monotonic() < until:
        findings.appraisals.take_over(trials[done])
        done += 1
    findings.note_taken_over(findings.taken_over.model_copy(update={"appraised": len(findings.appraisals)}))
    return len(trials) - done
