"""Learning what a device takes, before anything is trained: operators first, then a few whole networks."""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from autocompress.candidates.forecast import FEASIBILITY_SLACK, Forecast
from autocompress.policy import Policy
from autocompress.suggesters import LevelSuggester
from autocompress.system.progress import PhaseTick

OPERATOR_DRAWS = 64
WHOLE_NETWORKS, LEAST_NETWORKS = 6, 2


def measure_ahead(forecast: Forecast, seconds: float, seed: int, tick: PhaseTick, *, networks: int | None = None) -> None:
    """Measure operators for half of the time, then whole networks of the latencies of interest, without training.

    networks: how many at most, those included that are known; None: the few that a search can afford.
    """
    until, generator = time.monotonic() + seconds, np.random.default_rng(seed)
    policies = [forecast.suggest(LevelSuggester(generator)) for _ in range(OPERATOR_DRAWS)]
    workloads = [forecast.workload(Policy()), *(forecast.workload(policy) for policy in policies)]
    with forecast.setting.ledger.spend("calibrate"):
        forecast.model.table.measure(
            forecast.setting.device, workloads, 0.5 * seconds, lambda done, total: tick("measuring operators", done, total)
        )
    by_latency = _of_interest(forecast, {forecast.structure(policy).timed: policy for policy in policies}.values())
    chosen = np.unique(np.linspace(0, len(by_latency) - 1, networks or WHOLE_NETWORKS).round().astype(int))
    known = len(forecast.networks)
    for done, index in enumerate(generator.permutation(chosen)[known:], known):  # where time is short, not the fastest only
        if time.monotonic() > until and done >= LEAST_NETWORKS:
            break
        tick("measuring whole networks", done, len(chosen))
        forecast.add_to_baseline_history(forecast.measure_untrained(by_latency[index]))
    forecast.note(Policy(), 1.0)
    forecast.refit()


def _of_interest(forecast: Forecast, policies: Iterable[Policy]) -> list[Policy]:
    """Fastest first, without those far over the limit, which take long to measure and are of no use; a few in any case.

    As predicted from operators alone, in units of what these predict for the original.
    """
    limit = FEASIBILITY_SLACK * forecast.latency_limit / forecast.recent_baseline_s * forecast.predict(Policy()).value
    by_latency = sorted(policies, key=lambda policy: forecast.predict(policy).value)
    return [policy for rank, policy in enumerate(by_latency) if rank < WHOLE_NETWORKS or forecast.predict(policy).value <= limit]
