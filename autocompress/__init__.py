"""Find the most accurate compressed model that answers within your latency budget, measured on the file you ship."""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autocompress.budget import Budget
    from autocompress.commands.apply import apply_policy
    from autocompress.commands.deploy import recreate
    from autocompress.commands.inspect import inspect_model
    from autocompress.commands.measure import measure_model
    from autocompress.data import Data, Split
    from autocompress.errors import (
        AutocompressError,
        DeviceUnavailable,
        InfeasibleBudget,
        RunFolderError,
        TooManyFailures,
        UsageError,
    )
    from autocompress.policy import DistillSpec, LowRankSpec, Policy, PruneSpec, QuantSpec, StudentSpec
    from autocompress.records import Measurement, Score
    from autocompress.results import Entry
    from autocompress.session import SearchResult, search
    from autocompress.study.sampler import FrontSampler

_HOMES = {
    "AutocompressError": "errors", "Budget": "budget", "Data": "data", "DeviceUnavailable": "errors", "DistillSpec": "policy",
    "Entry": "results", "FrontSampler": "study.sampler", "InfeasibleBudget": "errors", "LowRankSpec": "policy", "Measurement": "records",
    "Policy": "policy", "PruneSpec": "policy", "QuantSpec": "policy", "RunFolderError": "errors", "Score": "records",
    "SearchResult": "session", "Split": "data", "StudentSpec": "policy", "TooManyFailures": "errors",
    "UsageError": "errors", "apply_policy": "commands.apply", "inspect_model": "commands.inspect",
    "measure_model": "commands.measure", "recreate": "commands.deploy", "search": "session",
}  # fmt: skip

__version__ = metadata.version("autocompress")
__all__ = [
    "AutocompressError", "Budget", "Data", "DeviceUnavailable", "DistillSpec", "Entry", "FrontSampler", "InfeasibleBudget",
    "LowRankSpec", "Measurement", "Policy", "PruneSpec", "QuantSpec", "RunFolderError", "Score", "SearchResult", "Split", "StudentSpec",
    "TooManyFailures", "UsageError", "apply_policy", "inspect_model", "measure_model", "recreate", "search",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: torch takes seconds, and `autocompress --help` needs none of it."""
    if name in _HOMES:
        return getattr(import_module(f"autocompress.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'autocompress' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
