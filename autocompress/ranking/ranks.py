"""Rank correlation: whether one number orders things as another does."""

from __future__ import annotations

import math
from collections.abc import Sequence

FEWEST = 8
"""Fewer say next to nothing, once what they have in common is taken out."""
LEAST = 0.3
TINY = 1e-9


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rho; None below three pairs or when one side is constant."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    from scipy.stats import spearmanr  # takes long to import, and who reads a result needs it not

    return float(spearmanr(left, right).statistic)


def is_low(correlation: float | None) -> bool:
    """Whether two rankings are known to have hardly anything in common."""
    return correlation is not None and correlation < LEAST


def partial_rank_correlation(left: Sequence[float], right: Sequence[float], given: Sequence[float]) -> float | None:
    """Spearman's rho of what `given` does not tell of either (Kendall & Stuart 1973, The Advanced Theory of Statistics, volume 2, 27.4).

    None below FEWEST triples, or where one side is constant or follows from `given`.
    """
    if len(left) < FEWEST:
        return None
    both, first, second = rank_correlation(left, right), rank_correlation(left, given), rank_correlation(right, given)
    if both is None or first is None or second is None:
        return both
    left_over = math.sqrt(max(0.0, (1 - first**2) * (1 - second**2)))
    return max(-1.0, min(1.0, (both - first * second) / left_over)) if left_over > TINY else None
