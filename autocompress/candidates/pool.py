"""The policies that a search begins with: draws of the space, bred until nothing gets better.

The search is MAP-Elites (Mouret & Clune 2015, arXiv 1504.04909) with latencies as cells: what is found at one latency is a step towards
the best of the next.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from autocompress.candidates.forecast import FEASIBILITY_SLACK, Forecast
from autocompress.candidates.proposals import Proposal, elites
from autocompress.suggesters import LevelSuggester, Variation

DRAWS, MOST_DRAWS = 64, 4096
GENERATIONS, CHILDREN = 100, 4
"""How often a pool is bred, and how many variations each of its latencies gets each time."""


def draw_pool(forecast: Forecast, seed: int, seconds: float) -> list[Proposal]:
    """Some hundred policies, at all latencies of interest those that promise most, in any order.

    Draws of the space, then variations of the best, up to GENERATIONS times CHILDREN of each cell, or until nothing gets better. Draws
    get a quarter of `seconds`.
    Raises UsageError when the space names groups, blocks, layers or architectures that the model does not have.
    """
    generator, now = np.random.default_rng(seed), time.monotonic()
    pool = _draw(forecast, [LevelSuggester(generator) for _ in range(DRAWS)])
    while len(pool) < MOST_DRAWS and time.monotonic() < now + 0.25 * seconds:
        pool += _draw(forecast, [LevelSuggester(generator) for _ in range(DRAWS)])
    cells, before = _elites(forecast, pool), None
    for _ in range(GENERATIONS):
        if time.monotonic() > now + seconds or cells == before:
            break
        parents = [cell[generator.integers(len(cell))] for cell in cells for _ in range(CHILDREN)]
        children = _bred(forecast, parents, generator, now + seconds)
        cells, before = _elites(forecast, [*itertools.chain(*cells), *children]), cells
    pool = [*itertools.chain(*cells)]
    return [pool[index] for index in generator.permutation(len(pool))]


def _bred(forecast: Forecast, parents: Sequence[Proposal], generator: np.random.Generator, until: float) -> list[Proposal]:
    """A variation of each, in any order, as far as there is time: of a large network a draw takes long."""
    bred: list[Proposal] = []
    order = generator.permutation(len(parents))
    for start in range(0, len(parents), DRAWS):
        if time.monotonic() < until:
            bred += _draw(forecast, [Variation(parents[index].params, LevelSuggester(generator)) for index in order[start : start + DRAWS]])
    return bred


def _elites(forecast: Forecast, pool: Sequence[Proposal]) -> list[list[Proposal]]:
    """Of each latency what is least too large, and of that what promises most; a little beyond the limit, since predictions err."""

    def merit(proposal: Proposal) -> tuple[float, float]:
        excess = forecast.violation(proposal.workload, proposal.latency_s, forecast.budget.of_size)
        return -max(0.0, excess), proposal.promise

    return elites(pool, FEASIBILITY_SLACK * forecast.latency_limit, merit)


def _draw(forecast: Forecast, suggesters: Sequence[LevelSuggester | Variation]) -> list[Proposal]:
    policies = [forecast.suggest(suggester) for suggester in suggesters]
    for policy in policies:
        forecast.setting.graph_of(policy).require_known(policy)
    return forecast.proposals(policies, [suggester.params for suggester in suggesters])
