"""What makes a step of training of a gradient."""

from __future__ import annotations

import torch
from torch import nn

from autocompress.compress.muon import Muon, hidden_matrices
from autocompress.compress.rates import Rates

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
MUON_DECAY = 5e-3
SGD_SHARE, MUON_SHARE = 0.5, 0.2
"""Of a plan's learning rate that each of both has at its peak."""


class Optimizer:
    """Muon for the matrices inside the network, Nesterov SGD for its first and last layer, biases and norms (these without decay)."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        hidden = hidden_matrices(model)
        known = {id(p) for p in hidden}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
        groups = [
            {"params": [p for p in others if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._parts: list[tuple[torch.optim.Optimizer, float]] = [
            (torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=MOMENTUM, nesterov=True), SGD_SHARE * learning_rate)
        ]
        if hidden:
            self._parts.append((Muon(hidden, lr=0.0, weight_decay=MUON_DECAY), MUON_SHARE * learning_rate))

    def forget_gradient(self) -> None:
        """Before the next one is computed."""
        for optimizer, _ in self._parts:
            optimizer.zero_grad(set_to_none=True)

    def step(self, rates: Rates) -> None:
        """Descend along the gradient at these fractions of the peaks."""
        for (optimizer, peak), rate in zip(self._parts, rates, strict=False):  # Muon only where there is something for it
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
