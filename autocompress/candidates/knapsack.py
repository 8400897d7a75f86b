"""The multiple-choice knapsack: one value of each dimension, so that the losses add up to least while the costs keep their limits.

An integer programme for HiGHS (`scipy.optimize.milp`), solved to proven optimality unless that takes longer than PATIENCE_S; Kellerer,
Pferschy & Pisinger 2004, "Knapsack Problems", chapter 11. SPDY (Frantar & Alistarh 2022, arXiv 2201.13096) and HAWQ-V3 (Yao et al. 2021,
arXiv 2011.10680) state it for layers; here a dimension is whatever a search space draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Array = NDArray[np.float64]
EXCESS = 1e3
"""A relative excess over a limit weighs so many times as much as all losses together."""
PATIENCE_S = 10.0
"""For one solution; what is best by then is taken. Hundreds of dimensions take a tenth of a second."""


@dataclass(frozen=True)
class Knapsack:
    """Dimensions whose values have additive losses and costs.

    Args:
        losses: of each dimension, one a value.
        costs: of each dimension, values x resources.
    """

    losses: Sequence[Array]
    costs: Sequence[Array]

    def totals(self, choices: NDArray[np.int64]) -> tuple[Array, Array]:
        """(losses: n, costs: n x resources) of many choices at once: n x dimensions, each the index of a value."""
        loss, cost = np.zeros(len(choices)), np.zeros((len(choices), self.costs[0].shape[1] if self.costs else 0))
        for column, losses, costs in zip(choices.T, self.losses, self.costs, strict=True):
            loss += losses[column]
            cost += costs[column]
        return loss, cost

    def best(self, limits: Array, *, near: Sequence[int] | None = None, changes: int = 0) -> list[int] | None:
        """The index of a value for each dimension; where nothing keeps the limits (one a resource), what exceeds them by least.

        Args:
            near: a choice from which the best may differ in so many dimensions.

        None where HiGHS finds nothing in time.
        """
        found = self._solved(limits, near, changes, most_excess=0.0)
        return found if found is not None else self._solved(limits, near, changes, most_excess=np.inf)

    def _solved(self, limits: Array, near: Sequence[int] | None, changes: int, *, most_excess: float) -> list[int] | None:
        """With a variable for the excess over each limit, which weighs more than all losses."""
        sizes, resources = [len(losses) for losses in self.losses], len(limits)
        dimension, loss = np.repeat(np.arange(len(sizes)), sizes), np.concatenate(self.losses)
        excess = np.full(resources, EXCESS * (1.0 + sum(float(losses.max()) for losses in self.losses)))
        one_each = (dimension == np.arange(len(sizes))[:, None]).astype(np.float64)
        rows = [(one_each, np.zeros((len(sizes), resources)), np.ones(len(sizes)), np.ones(len(sizes)))]
        rows.append((np.concatenate(self.costs).T, -np.eye(resources), np.full(resources, -np.inf), limits))
        if near is not None:
            kept = np.zeros(len(loss))
            kept[np.cumsum([0, *sizes[:-1]]) + np.array(near)] = 1.0
            rows.append((kept[None], np.zeros((1, resources)), np.array([len(sizes) - changes]), np.array([np.inf])))
        constraints = [LinearConstraint(np.concatenate([row, slack], axis=1), low, high) for row, slack, low, high in rows]
        found = milp(
            np.concatenate([loss, excess]),
            constraints=constraints,
            integrality=np.concatenate([np.ones(len(loss)), np.zeros(resources)]),
            bounds=Bounds(0, np.concatenate([np.ones(len(loss)), np.full(resources, most_excess)])),
            options={"time_limit": PATIENCE_S, "mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        return [int(part.argmax()) for part in np.split(found.x[: len(loss)], np.cumsum(sizes)[:-1])]
