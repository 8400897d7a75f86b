"""Muon: momentum SGD whose update of a weight matrix is replaced by the nearest (semi-)orthogonal matrix.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). All directions of
a layer learn at the same rate, which is meant for short runs; benchmarks/trainer.py compares it with plain momentum.
torch.optim.Muon takes matrices only; filters are flattened to one here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from autocompress.compress.arithmetic import bf16_is_faster

STEPS = 4
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Quintic Newton-Schulz iteration, tuned by the authors for speed: singular values end in about [0.7, 1.2]."""


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised; weight decay apart from the gradient, in proportion to the learning rate."""

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                momentum.mul_(group["momentum"]).add_(parameter.grad)
                update = orthogonalised(parameter.grad.add(momentum, alpha=group["momentum"]).flatten(1))
                rows, columns = update.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of a matrix (rows x columns)."""
    linear, cubic, quintic = COEFFICIENTS
    x = matrix.bfloat16() if bf16_is_faster(matrix.device) else matrix
    x = x / (x.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.mT if tall else x).to(matrix.dtype)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights between the first and the last layer of a network, without those of depthwise convolutions."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    return [p for p in matrices[1:-1] if p.shape[1] > 1]
