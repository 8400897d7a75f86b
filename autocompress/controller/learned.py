"""What another search of the same model and data has learned, taken over: accuracy depends on no budget and hardly on the device.

What was appraised is believed. Networks that were trained are measured here, and scored where the device is another; so that training
goes into what the new front lacks.
"""

from __future__ import annotations

from pathlib import Path

from autocompress.controller.findings import Findings
from autocompress.errors import one_line
from autocompress.export import is_intact
from autocompress.front import gain, measured
from autocompress.objective import evaluate_again, fails_policy
from autocompress.records import Outcome
from autocompress.search_space import fitted
from autocompress.study.journal import Journal


def take_over(findings: Findings, known: Journal, run: Path) -> None:
    """Take over what the journal of another search, in the folder `run`, knows; once, however often this search is resumed."""
    intact = [o for o in measured(known.outcomes) if o.artifact is not None and is_intact((run / o.artifact).parent)]
    wanted = [o for o in sorted(intact, key=gain, reverse=True) if _may_be_wanted(findings, o)]
    for done, outcome in enumerate(wanted):
        if findings.clock.left <= 0:
            return
        findings.show("measuring what was trained before", done, len(wanted))
        _take_over_file(findings, outcome, run)
    findings.show("taking over what was appraised")
    appraised = findings.appraisals.take_over(known.appraised())
    findings.note_taken_over(complete=True)
    findings.progress.message(f"{len(findings.taken_over)} networks and {appraised} appraisals of {run} were taken over")


def _may_be_wanted(findings: Findings, outcome: Outcome) -> bool:
    """Whether its file is what this device would run, and may be within the budget; the unchanged network is made again in no time."""
    forecast, profile, policy = findings.forecast, findings.setting.device.profile, outcome.policy
    if outcome.rung == "unchanged" or outcome.id in {o.id for o in findings.journal.outcomes}:
        return False
    if fitted(policy, profile) != policy or (8 in (policy.quant.bits, *policy.quant.layers.values()) and 8 not in profile.bits):
        return False
    return forecast.excess(forecast.proposal(policy, {}), measuring=False) <= 0


def _take_over_file(findings: Findings, outcome: Outcome, run: Path) -> None:
    bundle, predicted = (run / (outcome.artifact or "")).parent, findings.forecast.foretell(outcome.policy)
    try:
        taken = evaluate_again(findings.setting, outcome, bundle, predicted=predicted)
    except Exception as error:
        if not fails_policy(error):
            raise
        findings.progress.message(f"policy {outcome.id} of {run} is left out: {one_line(error)}")
        return
    findings.taken_over.add(outcome.id)
    findings.note_taken_over()
    findings.keep(taken)
