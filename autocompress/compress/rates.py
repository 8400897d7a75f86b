"""How long and how fast to train: a plan, and the rates that follow from it at every moment.

A one-cycle schedule (Smith & Topin 2017, arXiv 1708.07120): a short linear rise, then a linear fall to a hundredth.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from autocompress.compress.quantize import CALIBRATION_INPUTS

WARM_UP_SHARE = 0.15
LEAST_RATE = 0.01
MOST_UPKEEP = 0.3
"""Of the time of training that is left at most for re-estimating norms and calibrating."""
WARM_STEPS, MUCH_TO_LEARN = 300, 0.15
"""A student that answers like its teacher is trained at its highest rates from so many steps on: fewer undo more than they teach. Where so
much of its answers differs it has more to learn than to lose (`benchmarks/rates.py`), but by Muon only, whose steps have the same length
whatever the gradient: of SGD the first steps follow the largest gradients that there will be, and a few of them ruin a student that was
reconstructed."""
GENTLE, MUON_FULL = 0.5, 0.4
"""Share of Muon's full rate that teaches students most that know most of what their teacher knows, and the share of their answers that must
differ for the full one (`benchmarks/trainer.py`): who begins from scratch has further to go."""
SGD_RATE_POWER = 3
"""Power of what there is to learn that SGD's rates keep where steps are few: all from scratch, a fortieth where 0.3 of answers differ."""


@dataclass(frozen=True)
class TrainPlan:
    """How long and how fast to train.

    Args:
        steps: optimiser steps at most.
        deadline: `time.monotonic()` value at which training must have ended; the schedule follows the clock if that is sooner.
        learning_rate: scale of all peaks, see `Optimizer`.
        quant_fraction: share of the steps at the end that run through fake quantization.
        calibration_inputs: that int8 ranges are fitted to.
        to_learn: how far the student is from its teacher at the start, from 0 to 1 (`Teacher.distance`): the less it has to learn, the
            lower are rates, the more so where steps are few.
    """

    steps: int
    deadline: float = math.inf
    learning_rate: float = 0.1
    batch_size: int = 128
    quant_fraction: float = 0.1
    calibration_inputs: int = CALIBRATION_INPUTS
    seed: int = 0
    to_learn: float = 1.0

    def draws(self, n: int, start: int) -> Iterator[tuple[Tensor, int]]:
        """(indices of `n` examples, epoch) of each step for ever, from step `start` on; an epoch shows every input at most once."""
        size = min(self.batch_size, n)
        per_epoch = n // size
        epoch, skip = divmod(start, per_epoch)
        while True:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            order = torch.randperm(n, generator=generator)
            for step in range(skip, per_epoch):
                yield order[step * size : (step + 1) * size], epoch
            epoch, skip = epoch + 1, 0


def one_cycle(progress: float) -> float:
    """Fraction of the peak learning rate at `progress` in [0, 1]."""
    if progress < WARM_UP_SHARE:
        return max(LEAST_RATE, progress / WARM_UP_SHARE)
    return max(LEAST_RATE, (1 - progress) / (1 - WARM_UP_SHARE))


class Rates(NamedTuple):
    """Fractions of the peak learning rates of the two optimisers."""

    sgd: float
    muon: float


class Schedule:
    """Progress of a plan in [0, 1]: by steps or by time, whichever is further.

    A schedule that follows the clock ends annealed at its deadline on any machine, without a guess of its speed.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self.total = plan.steps
        self._least = Rates(plan.to_learn**SGD_RATE_POWER, min(1.0, plan.to_learn / MUCH_TO_LEARN))
        self._highest = Rates(1.0, min(1.0, max(GENTLE, plan.to_learn / MUON_FULL)))
        self.done = 0
        self.parts = 1
        """In which a batch is taken, one after the other."""
        self.upkeep: Callable[[int], float] = lambda done: 0.0
        """What is to be done after so many steps, in steps: it is to end by the deadline too."""
        self._started = time.monotonic()
        self._allowed = plan.deadline - self._started

    @property
    def progress(self) -> float:
        if self.done >= self.total or self._allowed <= 0:
            return 1.0
        elapsed = time.monotonic() - self._started
        upkeep = min(MOST_UPKEEP * self._allowed, self.upkeep(self.done) * elapsed / max(1, self.done))
        return min(1.0, max(self.done / self.total, (elapsed + upkeep) / self._allowed))

    @property
    def rates(self) -> Rates:
        """Fractions of the peak learning rates at this moment."""
        progress = self.progress
        expected = self.done / progress if progress else self.total
        warm, cycle = min(1.0, expected / WARM_STEPS), one_cycle(progress)
        return Rates(*(cycle * high * max(least, warm) for high, least in zip(self._highest, self._least, strict=True)))
