"""A teacher whose answers are computed once for each view of the data and shared by all students.

Augmentation is a pure function of (seed, view, index), so the teacher's logits for a view are too. A search trains many students of
one teacher: what the first one paid for, the others read. Students that train for more epochs than there are views see them again
(patient and consistent teaching: Beyer et al. 2022, arXiv 2106.05237, section 3.1, asks only that both see the same view).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autocompress.compress.arithmetic import fast_arithmetic
from autocompress.data import Data

CACHE_BYTES = 2 * 2**30
MOST_VIEWS = 16
LEAST_VIEWS = 4
BATCH = 256
TIMED_BATCHES = 4


class Teacher:
    """Answers for batches of training data; keeps them as far as `cache_bytes` reach."""

    def __init__(self, model: nn.Module, data: Data, *, seed: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model
        self.views = MOST_VIEWS
        self._data = data
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._answers: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}

    def view(self, epoch: int) -> int:
        """The view of the data that students see in this epoch."""
        return epoch % self.views

    def logits(self, indices: Tensor, inputs: Tensor, view: int) -> Tensor:
        """Outputs for `data.view(indices, view, seed)`, which the caller has drawn already as `inputs`."""
        known = self._known.get(view)
        if known is not None and bool(known[indices].all()):
            return self._answers[view][indices]
        answers = self._answer(inputs)
        self._keep(indices, answers, view)
        return answers

    def prepare(self, seconds: float, tick: Callable[[int, int], None] | None = None) -> None:
        """Answer whole views ahead of training for about `seconds`, and let students cycle through these.

        Answering during training would charge the first students for what the later ones read. Where not even LEAST_VIEWS can be had
        in that time, answers are computed as they are asked for.
        """
        affordable = int(seconds / self._seconds_a_view())
        if affordable < LEAST_VIEWS:
            return
        self.views = min(MOST_VIEWS, affordable - affordable % 2)  # even: mirroring alternates between views
        for view in range(self.views):
            for indices in torch.arange(len(self._data.train)).split(BATCH):
                self.logits(indices, self._data.view(indices, view, self._seed), view)
            if tick is not None:
                tick(view + 1, self.views)

    def _seconds_a_view(self) -> float:
        batches = torch.arange(len(self._data.train)).split(BATCH)
        timed = batches[: TIMED_BATCHES + 1]
        for position, indices in enumerate(timed):
            if position == min(1, len(timed) - 1):  # the first batch warms up
                started = time.monotonic()
            self.logits(indices, self._data.view(indices, 0, self._seed), 0)
        return (time.monotonic() - started) * len(batches) / max(1, len(timed) - 1)

    @torch.inference_mode()
    def _answer(self, inputs: Tensor) -> Tensor:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        with fast_arithmetic(device):
            answers: Tensor = self.model(inputs.to(device))
        return answers.float().cpu()

    def _keep(self, indices: Tensor, answers: Tensor, view: int) -> None:
        n = len(self._data.train)
        if view not in self._answers:
            if (len(self._answers) + 1) * n * answers[0].numel() * 4 > self._cache_bytes:
                return
            self._answers[view] = torch.zeros((n, *answers.shape[1:]))
            self._known[view] = torch.zeros(n, dtype=torch.bool)
        self._answers[view][indices] = answers
        self._known[view][indices] = True
