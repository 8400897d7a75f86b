"""Batch norms after a short training: their running statistics would be those of weights that are no more."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import nn

from autocompress.batch import call_network
from autocompress.compress.arithmetic import best_training_device, fast_arithmetic, fast_layout
from autocompress.compress.rates import TrainPlan
from autocompress.data import Data

FEW_STEPS = 50
"""Of a batch norm as torch makes it. After fewer, its running statistics are still those that training began with: 0.9 to the 50th is half
a percent."""
OLD = 0.9**FEW_STEPS
"""Share of what training began with that statistics may hold."""
MOST_BATCHES = 16
"""Batches that norms are re-estimated on, at most."""
FORWARD_COST = 0.4
"""Of a step's time that a batch takes which is only looked at."""


@torch.no_grad()
def reestimate_norms(model: nn.Module, data: Data, plan: TrainPlan, steps: int, parts: int = 1) -> None:
    """Where training was short for them, let batch norms know the weights as they are: statistics of some batches, averaged evenly.

    parts: in which a batch is taken, as in training.
    """
    norms = [norm for norm in _norms(model) if steps and _is_old(norm, steps)]
    if not norms:
        return
    momenta, device = [norm.momentum for norm in norms], best_training_device()
    model.eval().to(device).to(memory_format=fast_layout(model))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()  # these only: what is dropped in training would change the statistics
    with fast_arithmetic(device):
        for indices, epoch in itertools.islice(plan.draws(len(data.train), start=0), min(steps, MOST_BATCHES)):
            for part in indices.tensor_split(parts):
                call_network(model, data.view(part, epoch, plan.seed).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.cpu().to(memory_format=torch.contiguous_format)


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those that have running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def _is_old(norm: nn.modules.batchnorm._BatchNorm, steps: int) -> bool:
    """Whether so many steps leave it more than OLD of what it held before; one without momentum averages over all that it ever saw."""
    return norm.momentum is None or (1 - norm.momentum) ** steps > OLD * (1 + 1e-9)


def upkeep(model: nn.Module, *, begun: int = 0, calibrated: float = 0.0) -> Callable[[int], float]:
    """What follows training that began with step `begun`, by the steps that are done, in steps: norms, and ranges of so many batches."""
    norms = _norms(model)

    def batches(done: int) -> float:
        return calibrated + (min(done - begun, MOST_BATCHES) if any(_is_old(norm, done - begun) for norm in norms) else 0)

    return lambda done: FORWARD_COST * batches(done)
