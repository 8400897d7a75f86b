"""Rank correlation: whether one number orders things as another does."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import spearmanr


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float | None:
    """Spearman's rho; None below three pairs or when one side is constant."""
    if len(left) < 3 or len(set(left)) < 2 or len(set(right)) < 2:
        return None
    return float(spearmanr(left, right).statistic)
