"""Outputs that are no decisions between classes, each in its own unit: years beside logarithms of prices."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 1e-4
"""Share of the largest variance: outputs whose standard deviations are a hundred times apart still count alike."""
CONSTANT = 1e-5
"""Standard deviation as a share of the mean: what varies by less is taken for a constant."""


def variances(outputs: Tensor) -> Tensor:
    """The variance of each output (along the second axis; else of all) over examples and positions; broadcasts over `outputs`.

    An output that does not vary has its own square, or 1 where it is zero. None is less than LEAST of the largest: what hardly ever answers
    must not outweigh all else.
    """
    axes = [axis for axis in range(outputs.dim()) if axis != 1]
    mean, n = outputs.mean(axes, keepdim=True), outputs.numel() // (outputs.shape[1] if outputs.dim() > 1 else 1)
    spread = (outputs - mean).square().sum(axes, keepdim=True) / max(1, n - 1)
    otherwise = torch.where(mean == 0, 1.0, mean.square())
    spread = torch.where(spread > (CONSTANT * mean).square(), spread, otherwise)
    return spread.clamp_min(LEAST * float(spread.max()))


def relative_errors(outputs: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared difference of each output from what is wanted, in units of what is wanted's variance."""
    axes = [axis for axis in range(outputs.dim()) if axis != 1]
    return (outputs - wanted).square().mean(axes) / variances(wanted).flatten()
