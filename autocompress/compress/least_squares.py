"""Linear functions fitted to examples, no further from the weights that they begin with than holds on other examples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGES = (math.inf, 3e-2, 1e-3)
"""What keeps weights at their inherited values, as a share of the mean square of their inputs; the first where none does better."""
HELD_OUT = 0.25
"""Of the examples: those on which the ridges are compared."""


def solve(inputs: Tensor, target: Tensor, inherited: Tensor, *, free: bool) -> tuple[Tensor, Tensor]:
    """(W: groups x outputs x inputs, b: groups x outputs) that minimise |W x + b - target|^2 + ridge |W - inherited|^2.

    For each group with the ridge that does best on examples that it was not fitted to.

    Args:
        inputs, target: rows x groups x inputs (outputs), example by example.
        free: whether there may be a constant b, else it is 0.
    """
    middle = inputs.mean(0) * free  # sums of squares of what is far from zero would be less exact
    x, y = (inputs - middle).transpose(0, 1), target.transpose(0, 1)
    held = round(HELD_OUT * x.shape[1])
    part, rest = Moments.of(x[:, held:], y[:, held:], free=free), Moments.of(x[:, :held], y[:, :held], free=free)
    errors = []
    for ridge in RIDGES:
        weight, bias = part.solution(torch.full((len(x),), ridge), inherited)
        errors.append((x[:, :held] @ weight.mT + bias[:, None] - y[:, :held]).square().mean((1, 2)))
    best = torch.tensor(RIDGES)[torch.stack(errors).nan_to_num(math.inf).argmin(0)]
    weight, bias = (part + rest).solution(best, inherited)
    return weight, bias - (weight @ middle[:, :, None])[:, :, 0]


@dataclass(frozen=True)
class Moments:
    """Sums over rows, for each group: of inputs x and targets y, of x x' and of x y'. Sums of x and y are 0 where there is no constant."""

    rows: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, *, free: bool) -> Moments:
        """Of groups x rows x inputs (outputs)."""
        x_sum, y_sum = (value.sum(1).double() * free for value in (x, y))
        return cls(x.shape[1], x_sum, y_sum, (x.mT @ x).double(), (x.mT @ y).double())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.rows + other.rows, self.x + other.x, self.y + other.y, self.xx + other.xx, self.xy + other.xy)

    def solution(self, ridges: Tensor, inherited: Tensor) -> tuple[Tensor, Tensor]:
        """(W, b) with a ridge for each group; an infinite one leaves W as it was inherited, and so do singular equations."""
        rows, before = max(1, self.rows), inherited.double()
        square = self.xx - self.x[:, :, None] * self.x[:, None] / rows
        gradient = self.xy - self.x[:, :, None] * self.y[:, None] / rows - square @ before.mT
        diagonal = square.diagonal(dim1=1, dim2=2)
        diagonal += torch.where(ridges.isinf(), 1.0, ridges)[:, None] * diagonal.mean(1, keepdim=True) + 1e-9
        weight = before
        if not ridges.isinf().all():  # what costs most
            lower, singular = torch.linalg.cholesky_ex(square)
            fixed = (ridges.isinf() | (singular > 0))[:, None, None]
            weight = torch.where(fixed, before, before + torch.cholesky_solve(gradient, lower).mT)
        bias = (self.y - (weight @ self.x[:, :, None])[:, :, 0]) / rows
        return weight.to(inherited.dtype), bias.to(inherited.dtype)
