"""How a search divides its time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autocompress.ranking.ranks import is_low
from autocompress.records import FEWEST_FOR_TAIL

FEWEST_EXAMPLES = 32
"""Validation or test examples at least, however slow a model is: fewer say nothing of it."""
PROFILING_SHARE, PROFILING_CAP_S = 0.08, 120.0
"""Share of the time, and seconds at most, for measuring operators and whole networks ahead."""
POOL_SHARE, POOL_CAP_S = 0.02, 30.0
"""Share of the time, and seconds at most, for drawing and predicting the first policies."""
TEACHER_SHARE = 0.05
"""Share of the time for the teacher's answers that are computed ahead."""
APPRAISAL_SHARE = 0.12
"""Share of the time for appraising untrained students."""
EXTENSION = 1.5
"""Factor on the time of a rung whose ranking the rung below it hardly foretells."""
VALIDATION_SHARE = 0.01
"""Share of the time that the original may take to answer the validation split; it is cut to that."""
FINAL_CALLS, FINAL_S = 60.0, 12.0
"""Kept for the end: calls of the original (a dozen rounds of it and of a faster front, with warm-up), and seconds for all else."""
MOST_RESERVE = 0.3
"""Share of the time that is kept for the end, at most."""
TEST_SHARE = 0.08
"""Share of the time for scoring the test split. Where all of it takes longer a part is scored, which is no great loss."""
FRONT_COST = 2.0
"""What the files of a front take together to answer an example, in units of the original's: assumed, since the front is not known yet."""
SHORT_SHARE, MOST_SHORT_SHARE = 0.25, 0.5
SHORT_RUNS, FEWEST_SHORT_RUNS = 12, 3
"""Short runs take a quarter of the time, twelve of them where that is possible; up to a half where there would be fewer than three."""
LEAST_TRAINING_RATIO = 0.5
"""Seconds of training, at least, for each second that a short run costs otherwise."""
FULL_FACTOR = 8.0
"""A full run is meant to train so many times as long as a short one..."""
LEAST_FULL_STEPS = 1000
"""... and for so many steps: where the time is short, one that is trained is worth more than three that have only begun."""
TELLING_STEPS = 80
"""Steps after which a short run tells more than worth untrained (`benchmarks/rungs.py`); after fewer it tells how many they were."""
TELLING_MARGIN = 1.25
"""Short runs aim at so many times TELLING_STEPS, since what a step will take is a guess."""
MOST_FULL_RUNS = 6
TRIALS_A_FULL_RUN = 4
"""Where `--trials` limits the short runs, one full run for each so many."""
LEAST_COST = 0.25
"""Share of the dearest step that the cheapest is taken to cost: a step has costs that no network is too small for."""
LEAST_GAP = 0.2
"""Share of the largest gap to the original that the smallest is taken to be: the most accurate policy is what most users export."""
MOST_COST = 2.0
"""Times the usual length that a short run gets at most, whatever its steps cost."""


@dataclass(frozen=True)
class Clock:
    """Time of one search against its promise, in seconds of a monotonic clock."""

    started: float
    total: float
    reserve: float = 0.0
    """Kept for the end: re-measuring the front, scoring the test set, writing the report."""

    @classmethod
    def start(cls, total: float, already: float = 0.0) -> Clock:
        return cls(time.monotonic() - already, total)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    @property
    def until_end(self) -> float:
        """Seconds until the promise ends; negative beyond it."""
        return self.total - self.elapsed

    @property
    def left(self) -> float:
        """Until the reserve begins; never negative."""
        return max(0.0, self.until_end - self.reserve)

    def with_reserve(self, seconds: float) -> Clock:
        return Clock(self.started, self.total, min(seconds, MOST_RESERVE * self.total))


def profiling_seconds(clock: Clock) -> float:
    return min(PROFILING_CAP_S, PROFILING_SHARE * clock.total, 0.5 * clock.left)


def pool_seconds(clock: Clock) -> float:
    """How long policies are drawn and predicted before the first is trained."""
    return min(POOL_CAP_S, POOL_SHARE * clock.total)


def teacher_seconds(clock: Clock) -> float:
    return TEACHER_SHARE * clock.left


def appraisal_seconds(clock: Clock) -> float:
    return APPRAISAL_SHARE * clock.left


def extended(seconds: float, correlation: float | None) -> float:
    """The time of a rung: more where what is below it foretells little."""
    return EXTENSION * seconds if is_low(correlation) else seconds


def validation_seconds(clock: Clock) -> float:
    """How long the original may take to answer the validation split, which every policy of the search answers too."""
    return VALIDATION_SHARE * clock.total


def reserve_seconds(total: float, per_example_s: float, examples: int, latency_s: float, *, tail: bool = False) -> float:
    """For the end of a search: the test split for the original and a front of faster networks, and measuring them together.

    tail: whether so long that the 95th percentile is known of each.
    """
    each = (1 + FRONT_COST) * per_example_s
    calls = max(FINAL_CALLS, (1 + FRONT_COST) * FEWEST_FOR_TAIL) if tail else FINAL_CALLS
    return FINAL_S + calls * latency_s + max(FEWEST_EXAMPLES * each, min(examples * each, TEST_SHARE * total))


@dataclass(frozen=True)
class Division:
    """Seconds for the short rung as a whole; and of one short run for training, and for all else that a policy costs."""

    short_total: float
    training: float
    overhead: float

    @classmethod
    def of(cls, left: float, overhead: float, telling_s: float = 0.0) -> Division:
        """Divide what is `left`; a run trains for LEAST_TRAINING_RATIO of its overhead at least (choosing to measuring).

        Where steps are slow there are fewer runs, so that each trains for the `telling_s` after which it tells. Where not even one of them
        would tell, there is one, in the usual share: the time is worth more in the full run that goes on from there.
        """
        telling = int(MOST_SHORT_SHARE * left / max(telling_s + overhead, 1e-9))
        if telling == 0:
            return cls(SHORT_SHARE * left, max(SHORT_SHARE * left - overhead, LEAST_TRAINING_RATIO * overhead), overhead)
        each = max(SHORT_SHARE * left / SHORT_RUNS, (1 + LEAST_TRAINING_RATIO) * overhead, telling_s + overhead)
        total = max(SHORT_SHARE * left, min(MOST_SHORT_SHARE * left, min(telling, FEWEST_SHORT_RUNS) * each))
        return cls(total, each - overhead, overhead)

    @property
    def short_each(self) -> float:
        """Of one short run, all in all."""
        return self.training + self.overhead


def full_runs(left: float, each: float, candidates: int, trials: int | None = None, done: int = 0) -> int:
    """How many policies share the time that is left, where one is meant to have `each` seconds.

    A limit on trials limits them too: one climbs for every TRIALS_A_FULL_RUN that were allowed, those included that are `done`.
    """
    affordable = round(left / max(each, 1e-9))
    allowed = MOST_FULL_RUNS if trials is None else math.ceil(trials / TRIALS_A_FULL_RUN) - done
    return max(0, min(MOST_FULL_RUNS, allowed, candidates, max(1, affordable)))


def full_seconds(left: float, costs: Sequence[float], gaps: Sequence[float], each: float, trials: int | None = None) -> float:
    """Seconds for the first of the full runs; no more than `each` where trials are what is limited.

    Training narrows the gap to the original about with the root of the number of steps (ResNet-56's students, 300 to 2,000 steps: powers
    of 0.43 to 0.56, from `benchmarks/results/trainer_gpu.json`). The sum of gaps is then least in seconds that go with
    (gap^2 * cost)^(1/3): what has most to learn gets most.

    Args:
        costs: of a step of each run that is still to come, up to a factor.
        gaps: of their scores to the original's after equal numbers of steps.
    """
    weights = np.cbrt(_at_least(LEAST_GAP, gaps) ** 2 * _at_least(LEAST_COST, costs))
    share = left * float(weights[0] / weights.sum())
    return share if trials is None else min(share, each)


def _at_least(share: float, values: Sequence[float]) -> NDArray[np.float64]:
    """The values, none of them less than this share of the largest; all alike where none is positive."""
    largest = max(values)
    return np.maximum(values, share * largest) if largest > 0 else np.ones(len(values))
