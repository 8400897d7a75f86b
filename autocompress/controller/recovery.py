"""After failures, damage and kills: what a resumed search may try again, and what it leaves alone."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from autocompress.controller.findings import Findings
from autocompress.errors import AutocompressError
from autocompress.export import MODEL, check_onnx, verify_bundle
from autocompress.records import Attempt, Failure, Outcome


def forget_damaged(findings: Findings) -> list[str]:
    """Policies whose files are no longer there as they were measured are to be made again; their ids.

    Whoever sent this folder may have written anything into its database: only a sound file in the folder of its policy is ever opened.
    """
    damaged = [o for o in findings.journal.outcomes if o.failure is None and not _is_whole(findings, o)]
    for outcome in damaged:
        _forget(findings, outcome)
    return [outcome.id for outcome in damaged]


def _is_whole(findings: Findings, outcome: Outcome) -> bool:
    """Whether its file is there as it was measured, sound, and in the folder of its policy."""
    path = (findings.run / (outcome.artifact or "")).resolve()
    if path != findings.run.resolve() / "models" / outcome.id / MODEL:
        return False
    try:
        verify_bundle(path.parent)
        check_onnx(path)
    except AutocompressError:
        return False
    return True


def retry_failures(findings: Findings) -> int:
    """What made policies fail may be mended by now; a file that was lost but is intact comes back. How many there were."""
    kills = {(o.policy.digest, o.rung) for o in _killers(findings)}
    failed = [o for o in findings.journal.outcomes if o.failure is not None and (o.policy.digest, o.rung) not in kills]
    for outcome in failed:
        if _is_whole(findings, outcome):
            findings.journal.record(outcome.model_copy(update={"failure": None}))
        else:
            _forget(findings, outcome)
    return len(failed)


def _forget(findings: Findings, outcome: Outcome) -> None:
    findings.journal.forget(outcome)
    ids = tuple(id for id in findings.taken_over.ids if id != outcome.id)
    findings.note_taken_over(findings.taken_over.model_copy(update={"ids": ids}))


def leave_killers(findings: Findings) -> None:
    """Let what this search was killed over, time and again, have failed: it would be killed over it once more."""
    done, taken = {(o.policy.digest, o.rung) for o in findings.journal.outcomes}, {o.id for o in findings.journal.outcomes}
    for killer in _killers(findings):
        if (killer.policy.digest, killer.rung) in done or (killer.rung != "short" and killer.id in taken):
            continue
        failure = Failure(stage="train", reason="the search was killed each time that it worked on this: perhaps memory ran out")
        id = findings.journal.next_id() if killer.rung == "short" else killer.id
        left = Outcome(**dict(killer) | {"id": id}, failure=failure)
        findings.journal.record(left)
        findings.announce(left)


def at_work(findings: Findings, attempt: Attempt) -> AbstractContextManager[None]:
    """While a policy is worked on: should that kill the search, a resumed one knows."""
    return findings.journal.at_work(attempt, _how(findings))


def _killers(findings: Findings) -> list[Attempt]:
    """What this search was killed over time and again, by now."""
    findings.journal.note_kill()
    return findings.journal.killed_over(_how(findings))


def _how(findings: Findings) -> dict[str, Any]:
    """What decides how much memory training takes, and may be another in a resumed search."""
    return {"batch_size": findings.setting.batch_size}
