"""How unlike layers inside student and teacher are: what they read, channel by channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autocompress.compress.distill import Answers, ComparedFeatures, Selected, channel_variance, selected


def compare_hidden(student: Answers, teacher: Answers, compared: ComparedFeatures) -> Tensor | None:
    """The mean loss of values over all layers inside that both were observed at, on the inputs of which the teacher's are known.

    A student that is cut from its teacher is taught by these where its own errors begin, not by what is left of them at its end (hints:
    Romero et al. 2015, arXiv 1412.6550, section 2.2, at every residual block, and without a regressor since channels correspond). None
    where there is nothing to compare.
    """
    losses = []
    for layer in compared.hidden:
        if layer.layer not in student.hidden or layer.counterpart not in teacher.hidden:
            continue
        own, wanted = student.hidden[layer.layer], selected(teacher.hidden[layer.counterpart].detach(), layer.wanted)
        if _shape(own, len(wanted), layer.own) == wanted.shape:  # of networks whose shapes depend on the data they may differ
            losses.append(_SquaredDifference.apply(own, wanted.to(own), layer.own) / channel_variance(wanted, layer.axis))
    return torch.stack(losses).mean() if losses else None


def _shape(values: Tensor, rows: int, where: Selected) -> torch.Size:
    """Of these entries of the first rows."""
    return torch.Size([rows, *(len(where[axis]) if axis in where else values.shape[axis] for axis in range(1, values.dim()))])


class _SquaredDifference(torch.autograd.Function):
    """Mean squared difference of some entries of the first rows of a map from those that are wanted.

    Its gradient is laid out as the map is, and computed in the map's own arithmetic. That of a slice is contiguous: added to the gradient
    of a map that has its channels last, it slows all that follows. With it, and in float32, a step takes 1.15 times as long
    (`benchmarks/steps.py`).
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, wanted: Tensor, where: Selected) -> Tensor:
        apart = selected(own[: len(wanted)], where) - wanted
        ctx.save_for_backward(apart)
        ctx.where, ctx.like = where, torch.empty_like(own, device="meta")
        return apart.square().mean(dtype=torch.promote_types(apart.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (apart,) = ctx.saved_tensors
        whole = torch.zeros_like(ctx.like, device=apart.device)
        _put(apart * (2 / apart.numel() * gradients[0]).to(apart.dtype), whole[: len(apart)], list(ctx.where.items()))
        return whole, None, None


def _put(part: Tensor, whole: Tensor, where: list[tuple[int, Tensor]]) -> None:
    """Write a part into these entries of what is 0 so far (in place)."""
    if not where:
        whole.copy_(part)
        return
    *others, (axis, index) = where
    for other, entries in others:
        size = [whole.shape[other] if at == other else n for at, n in enumerate(part.shape)]
        part = part.new_zeros(size).index_copy_(other, entries.to(part.device), part)
    whole.index_copy_(axis, index.to(part.device), part)
