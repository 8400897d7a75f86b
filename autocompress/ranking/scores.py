"""What two scores of different examples, or of different networks, tell beyond chance."""

from __future__ import annotations

import math
import re

from autocompress.records import Score

Z95 = 1.959964
STANDARD_ERRORS = 2.0
"""By which two scores of one split differ by chance."""
MOST_CHANCE = 0.05
"""Share of right answers by which two scores may differ by chance, and still be compared."""
SEEN_GAP = 0.01
"""Least difference of validation and test accuracy that tells of a model that has seen the validation examples."""


SHARES = re.compile(r"accuracy|accuracy[@_ -].*|top[_ -]?\d+.*")
"""Names of scores that are shares of right answers: `accuracy`, `accuracy@1`, `top5`, `top-5 accuracy`."""


def is_share(score: Score) -> bool:
    """Whether the score is a share of right answers, to be shown in percent."""
    return SHARES.fullmatch(score.name) is not None and 0.0 <= score.value <= 1.0


def score_interval(score: Score) -> tuple[float, float] | None:
    """95 % interval of a share of n answers (Wilson 1927, JASA 22, 209-212); None for other scores."""
    if not _is_counted(score):
        return None
    z, p, n = Z95, score.value, score.n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def by_chance(*scores: Score | None) -> float:
    """By how much shares of right answers may differ by chance; 0 for other scores, whose spread is not known."""
    variances = [score.value * (1 - score.value) / score.n for score in scores if score is not None and _is_counted(score)]
    return STANDARD_ERRORS * math.sqrt(sum(variances)) if len(variances) == len(scores) else 0.0


def knows_validation_like_training(train: Score | None, val: Score | None) -> bool:
    """Whether a model knows validation examples as well as those of training, as it does where it was trained on both.

    Of so few examples that chance explains more than MOST_CHANCE, nothing is said.
    """
    if train is None or val is None or not (_is_counted(train) and _is_counted(val)):
        return False
    chance = by_chance(train, val)
    return train.value - val.value <= chance <= MOST_CHANCE


def validation_beats_test(val: Score | None, test: Score | None) -> bool:
    """Whether a model does better on validation than on test examples, which is no chance: it has probably seen the former."""
    known, unknown = (score_interval(score) if score is not None else None for score in (val, test))
    if val is None or test is None or known is None or unknown is None:
        return False
    return known[0] > unknown[1] and val.value - test.value >= SEEN_GAP


def _is_counted(score: Score) -> bool:
    """Whether it is a share of a known number of examples."""
    return is_share(score) and score.n > 0
