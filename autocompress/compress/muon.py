"""Muon: momentum SGD whose update of a weight matrix is replaced by the nearest (semi-)orthogonal matrix.

Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (kellerjordan.github.io/posts/muon). All directions of
a layer learn at the same rate, which is meant for short runs; benchmarks/trainer.py compares it with plain momentum.
torch.optim.Muon takes matrices only; filters are flattened to one here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autocompress.compress.arithmetic import bf16_is_faster

NEWTON_SCHULZ_STEPS = 4
MOST_TOGETHER = 2**24
"""Elements of the matrices that are taken together: calls cost time where matrices are small, memory where they are large."""
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
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault((len(parameter), parameter[0].numel()), []).append(parameter)
            for (rows, columns), parameters in alike.items():
                together = max(1, MOST_TOGETHER // (rows * columns))
                for start in range(0, len(parameters), together):
                    self._update(parameters[start : start + together], max(1.0, rows / columns) ** 0.5, group)

    def _update(self, parameters: list[nn.Parameter], scale: float, group: dict[str, Any]) -> None:
        """Step along these, which are matrices of one shape."""
        updates = orthogonalised(torch.stack([self._gradient(p, group["momentum"]).flatten(1) for p in parameters]))
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)

    def _gradient(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with Nesterov momentum."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].mul_(momentum).add_(parameter.grad)
        return parameter.grad.add(state["momentum"], alpha=momentum)


def orthogonalised(matrices: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T of each of n matrices (n x rows x columns).

    Matrices of one shape are taken together: a network has many that are small, and one by one the calls take longer than the arithmetic.
    """
    linear, cubic, quintic = COEFFICIENTS
    x = matrices.bfloat16() if bf16_is_faster(matrices.device) else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    for _ in range(NEWTON_SCHULZ_STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=cubic, alpha=quintic), x, beta=linear)
    return (x.mT if tall else x).to(matrices.dtype)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights between the first and the last layer of a network, without those of depthwise convolutions."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    return [p for p in matrices[1:-1] if p.shape[1] > 1]
