"""A teacher whose answers are computed once for each epoch's view of the data and shared by all students.

Augmentation is a pure function of (seed, epoch, index), so the teacher's logits for an epoch are too. A search trains many
students of one teacher: what the first one paid for, the others read.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from autocompress.data import Data

CACHE_BYTES = 2 * 2**30


class Teacher:
    """Answers for batches of training data; keeps each epoch's answers up to `cache_bytes` (oldest epoch goes first)."""

    def __init__(self, model: nn.Module, data: Data, *, seed: int = 0, cache_bytes: int = CACHE_BYTES) -> None:
        self.model = model
        self._data = data
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._answers: OrderedDict[int, Tensor] = OrderedDict()
        self._known: dict[int, Tensor] = {}

    def logits(self, indices: Tensor, inputs: Tensor, epoch: int) -> Tensor:
        """Outputs for `data.view(indices, epoch)`, which the caller has drawn already as `inputs`."""
        known = self._known.get(epoch)
        if known is None or not bool(known[indices].all()):
            answers = self._answer(inputs)
            self._keep(indices, answers, epoch)
            return answers
        return self._answers[epoch][indices]

    @torch.inference_mode()
    def _answer(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).float()

    def _keep(self, indices: Tensor, answers: Tensor, epoch: int) -> None:
        n = len(self._data.train)
        size = n * answers[0].numel() * 4
        if size > self._cache_bytes:
            return
        if epoch not in self._answers:
            while self._answers and size * (len(self._answers) + 1) > self._cache_bytes:
                oldest, _ = self._answers.popitem(last=False)
                del self._known[oldest]
            self._answers[epoch] = torch.zeros((n, *answers.shape[1:]))
            self._known[epoch] = torch.zeros(n, dtype=torch.bool)
        self._answers[epoch][indices] = answers
        self._known[epoch][indices] = True
