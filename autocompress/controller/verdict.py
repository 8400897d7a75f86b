"""How a search has ended: well, or with the error that says why not."""

from __future__ import annotations

import math
import shlex

from autocompress.controller.findings import Findings
from autocompress.errors import InfeasibleBudget, TooManyFailures
from autocompress.ranking.front import measured
from autocompress.records import Outcome
from autocompress.results import Results
from autocompress.system.failures import fix_and_resume
from autocompress.units import format_duration, format_size


def require_found(findings: Findings, results: Results) -> None:
    """Raises InfeasibleBudget unless something that was measured is within the budget, TooManyFailures where no policy became a file."""
    if results.failures and not results.points:
        first = results.failures[0]
        raise TooManyFailures(
            f"no policy became a file that works; the first failed to {first.stage}: {first.reason}",
            hint=fix_and_resume(findings.setting.log, first.stage),
        )
    run = shlex.quote(str(findings.run))
    if not results.points and not findings.task.budget:
        raise InfeasibleBudget(
            "the search ended before any policy could be measured",
            hint=f"search longer: --resume --out {run} --search-time ...",
            smallest_latency_s=math.nan,
        )
    if any(entry.feasible for entry in results.points):
        return
    told = _nearest(findings) if results.points else "no policy could be measured in time"
    is_trained = any(entry.rung != "unchanged" for entry in results.points)
    raise InfeasibleBudget(
        f"the search ended {'' if is_trained else 'before any policy was trained '}and nothing meets the budget "
        f"({findings.budget.in_words()}): {told}",
        hint=f"search longer (--resume --out {run} --search-time ...), or allow more: --from {run} begins with what was learned",
        smallest_latency_s=min((entry.latency_s.high for entry in results.points), default=math.nan),
    )


def _nearest(findings: Findings) -> str:
    """What missed the budget by least, in words."""

    def miss(outcome: Outcome) -> float:
        latency, original = outcome.latency_s, findings.setting.baseline.latency_s
        assert latency is not None
        limits = findings.limits.against(latency.original_s or original.median)
        return limits.violation(latency.high, outcome.size_bytes, latency.tail)

    nearest = min(measured(findings.outcomes()), key=miss)
    assert nearest.latency_s is not None
    return f"the nearest policy took {format_duration(nearest.latency_s.high)} and {format_size(nearest.size_bytes)}"
