"""A teacher whose answers are computed once for each view of the data and shared by all students.

Augmentation is a pure function of (seed, view, index), so the teacher's logits for a view are too. A search trains many students of
one teacher: what the first one paid for, the others read. Students that train for more epochs than there are views see them again
(patient and consistent teaching: Beyer et al. 2022, arXiv 2106.05237, section 3.1, asks only that both see the same view).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autocompress.batch import Inputs, call_network, map_inputs
from autocompress.compress.arithmetic import best_training_device, bf16_is_faster, fast_arithmetic, fast_layout
from autocompress.compress.distill import Answers, observe
from autocompress.compress.memory import inputs_that_fit
from autocompress.compress.outputs import relative_errors, variances
from autocompress.data import Data, sample, sampled
from autocompress.graph.nodes import follows_batch

CACHE_BYTES = 2 * 2**30
MOST_VIEWS = 16
LEAST_VIEWS = 4
BATCH = 256
BATCH_BYTES = 2**28
"""Of the inputs of a batch: what a network computes of them takes several times as much."""
DISTANCE_INPUTS = 256
"""Validation inputs that tell how far a student is from its teacher."""
TIMED_BATCHES = 4
SAME = 0.02
"""Relative difference of outputs that other arithmetic explains, bfloat16 included; another function differs by far more."""
HIDDEN_SHARE = 0.25
"""Share of a batch whose hidden features are told: the teacher has to be asked for them each time, and a map has many positions."""
MOST_ROUNDING = 0.05
"""Share of an output's standard deviation that rounding may make it wrong by, as a rule."""
FEW, MORE = 16, 64
"""Inputs for a first guess, and for a second."""
IMAGES = 4
"""Axes of a batch of images."""


class Teacher:
    """Answers for batches of training data; keeps them as far as `cache_bytes` reach.

    Args:
        model: asked as it is but for its memory layout, which is changed in place where that makes it faster.
        classifier: name of the linear layer whose inputs are part of an answer, as features; None: outputs only.
    """

    def __init__(
        self, model: nn.Module, data: Data, *, classifier: str | None = None, seed: int = 0, cache_bytes: int = CACHE_BYTES
    ) -> None:
        self.model = model
        self._most_views = MOST_VIEWS if data.is_augmented else 1
        self.views = self._most_views
        self._data = data
        self._classifier = classifier
        self._seed = seed
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._batch = inputs_that_fit(model, data.at_most(BATCH, BATCH_BYTES), device)
        self._cache_bytes = cache_bytes
        self._kept: dict[int, _Kept] = {}
        self._mixes = any(map(follows_batch, model.modules()))
        """Whether an answer depends on what else is in the batch: then students are to be told of just theirs."""
        self._held_out: tuple[Inputs, Tensor] | None = None

    def view(self, epoch: int) -> int:
        """The view of the data that students see in this epoch."""
        return epoch % self.views

    def answers(self, indices: Tensor, inputs: Inputs, view: int, hidden: Sequence[str] = ()) -> Answers:
        """What the teacher says of `data.view(indices, view, seed)`, which the caller has drawn already as `inputs`.

        hidden: layers of which is told what they read of the first inputs, HIDDEN_SHARE of them. That is too much to be kept.
        """
        kept, rows = self._kept.get(view), math.ceil(HIDDEN_SHARE * len(inputs))
        if kept is not None and bool(kept.known[indices].all()):
            answers = kept.take(indices)
            return replace(answers, hidden=self._answer(inputs[:rows], hidden).hidden) if hidden else answers
        answers = self._answer(inputs, hidden, rows)
        if self._mixes:
            return answers
        if kept is None:
            n = len(self._data.train)
            if (len(self._kept) + 1) * _Kept.bytes_for(n, answers) > self._cache_bytes:
                return answers
            kept = self._kept[view] = _Kept.room_for(n, answers)
        kept.put(indices, answers)
        return answers

    @torch.no_grad()
    def distance(self, student: nn.Module, most: int = DISTANCE_INPUTS) -> float:
        """How far a student is from its teacher on inputs as they are deployed, from 0 to 1; it is on the CPU, and left in eval mode.

        Of classifiers the share of decisions that differ, of other networks the squared difference relative to the variance, on average
        of all outputs. 1 where the student cannot answer, for want of memory. `most` limits the inputs: the first call decides.
        """
        inputs, wanted = self._held_out or self._answered(min(most, DISTANCE_INPUTS))
        self._held_out = inputs, wanted
        student.eval()
        try:
            with self.arithmetic(torch.device("cpu")):
                answers = torch.cat([call_network(student, part).float() for part in inputs.split(self._batch)])
        except (RuntimeError, MemoryError):
            return 1.0
        if self._data.decides:
            return float((answers.argmax(1) != wanted.argmax(1)).float().mean())
        return float(relative_errors(answers, wanted).clamp_max(1.0).mean())

    @functools.cached_property
    def units(self) -> tuple[Tensor, float]:
        """(variance of each output, the data's own loss of a constant answer) on some training inputs: what losses are counted in.

        What a network predicts may be thousands or thousandths. A loss that has no sound value there is counted as it is.
        """
        indices = sampled(len(self._data.train), min(self._batch, DISTANCE_INPUTS, len(self._data.train)))
        outputs, targets = self._answer(self._data.view(indices, 0, self._seed)).outputs, self._data.train.targets[indices]
        own = 0.0
        with suppress(Exception):  # whatever the user's own code raises over a constant
            assert self._data.loss is not None
            device, constant = best_training_device(), outputs.mean(0, keepdim=True).expand_as(outputs).contiguous()
            own = float(self._data.loss(constant.to(device), targets.to(device)))
        return variances(outputs), own if 0 < own < math.inf else 1.0

    def _answered(self, n: int) -> tuple[Inputs, Tensor]:
        """Some validation inputs, and the outputs for them."""
        inputs = self._data.prepare(sample(self._data.val, n).inputs)
        return inputs, torch.cat([self._answer(part).outputs for part in inputs.split(self._batch)])

    def prepare(self, seconds: float, tick: Callable[[int, int], None] | None = None) -> None:
        """Answer whole views ahead of training for about `seconds`, and let students cycle through these.

        Answering during training would charge the first students for what the later ones read. Where not even LEAST_VIEWS can be had
        in that time and kept, or there is no memory for such batches, answers are computed as they are asked for.
        """
        try:
            self._prepare(seconds, tick)
        except (RuntimeError, MemoryError):  # which torch and numpy raise when memory runs out, of whatever device
            self.views = self._most_views
            self._kept.clear()

    def _prepare(self, seconds: float, tick: Callable[[int, int], None] | None) -> None:
        if self._mixes or self._is_hopeless(seconds):
            return
        affordable = min(int(seconds / self._seconds_a_view(seconds)), self._keepable())
        if affordable < self._least_views:
            return
        self.views = min(self._most_views, max(1, affordable - affordable % 2))  # even: mirroring alternates between views
        for view in range(self.views):
            for indices in torch.arange(len(self._data.train)).split(self._batch):
                self.answers(indices, self._data.view(indices, view, self._seed), view)
            if tick is not None:
                tick(view + 1, self.views)

    @property
    def _least_views(self) -> int:
        return min(LEAST_VIEWS, self._most_views)

    def _is_hopeless(self, seconds: float) -> bool:
        """Whether LEAST_VIEWS take longer even if a whole batch took no longer than a few inputs, as it may on a GPU.

        Asked of more and more, before much of a slow network's time is spent; once for nothing, since a first call loads kernels.
        """
        batches = self._least_views * max(1.0, len(self._data.train) / self._batch)
        for size in (1, FEW, MORE):
            inputs = self._data.view(torch.arange(min(size, self._batch, len(self._data.train))), 0, self._seed)
            started = time.monotonic()
            self._answer(inputs)
            if size > 1 and batches * (time.monotonic() - started) > seconds:
                return True
        return False

    def _seconds_a_view(self, patience_s: float) -> float:
        """From a few batches, or one where these take longer than that; what they answer is kept."""
        batches = torch.arange(len(self._data.train)).split(self._batch)
        timed = batches[: TIMED_BATCHES + 1]
        counted, started = 0, time.monotonic()
        for position, indices in enumerate(timed):
            if position == min(1, len(timed) - 1):  # the first batch warms up
                counted, started = 0, time.monotonic()
            self.answers(indices, self._data.view(indices, 0, self._seed), 0)
            counted += 1
            if time.monotonic() - started > patience_s:
                break
        return (time.monotonic() - started) * len(batches) / counted

    def _keepable(self) -> int:
        """Views that the cache has room for, once one has been asked for."""
        return self._cache_bytes // max((kept.bytes for kept in self._kept.values()), default=self._cache_bytes + 1)

    @functools.cached_property
    def _layout(self) -> torch.memory_format:
        """The layout that is fast, where the model takes it, as two inputs tell: its code may take views that only contiguous maps have."""
        layout = fast_layout(self.model)
        if layout is torch.preserve_format:
            return layout
        few = self._data.view(torch.arange(min(2, len(self._data.train))), 0, self._seed)
        wanted = self._said(few, torch.contiguous_format).outputs
        nn.Module.to(self.model, memory_format=layout)  # its own `to` may take devices only
        try:
            found = self._said(few, layout).outputs
        except Exception:  # whatever the user's code raises over strides
            found = torch.full_like(wanted, math.nan)
        if not torch.allclose(found, wanted, rtol=SAME, atol=SAME * float(wanted.abs().max())):
            layout = torch.contiguous_format
            nn.Module.to(self.model, memory_format=layout)
        return layout

    def _answer(self, inputs: Inputs, hidden: Sequence[str] = (), rows: int | None = None) -> Answers:
        return self._said(inputs, self._layout, hidden, len(inputs) if rows is None else rows)

    def arithmetic(self, device: torch.device) -> AbstractContextManager[object]:
        """In which students learn from this teacher: the fast one, unless that rounds its answers to what tells them apart."""
        return fast_arithmetic(device) if self._bears_rounding else nullcontext()

    @functools.cached_property
    @torch.no_grad()
    def _bears_rounding(self) -> bool:
        """Whether fast arithmetic keeps each output within MOST_ROUNDING of its spread: one around 2000 has steps of 8 in bfloat16.

        Decisions between classes always bear it.
        """
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        if self._data.decides or not bf16_is_faster(device):
            return True
        few = self._data.view(torch.arange(min(MORE, self._batch, len(self._data.train))), 0, self._seed)
        exact = call_network(self.model, few.to(device, copy=True)).float()
        with fast_arithmetic(device):
            rounded = call_network(self.model, few.to(device, copy=True)).float()
        return bool((relative_errors(rounded, exact) <= MOST_ROUNDING**2).all())

    @torch.no_grad()
    def _said(self, inputs: Inputs, layout: torch.memory_format, hidden: Sequence[str] = (), rows: int = 0) -> Answers:
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        own = inputs.to(device, copy=True)  # it may change them in place
        with self.arithmetic(device):
            own = map_inputs(lambda tensor: tensor.to(memory_format=layout) if tensor.dim() == IMAGES else tensor, own)
            said = observe(self.model, own, self._classifier, hidden, rows)
        return Answers(said.outputs.float().cpu(), said.features.float().cpu() if said.features is not None else None, said.hidden)


@dataclass(frozen=True)
class _Kept:
    """The answers for one view of all training data, as far as they are known."""

    outputs: Tensor
    features: Tensor | None
    known: Tensor

    @classmethod
    def room_for(cls, n: int, like: Answers) -> _Kept:
        outputs = torch.zeros((n, *like.outputs.shape[1:]))
        features = torch.zeros((n, *like.features.shape[1:])) if like.features is not None else None
        return cls(outputs, features, torch.zeros(n, dtype=torch.bool))

    @staticmethod
    def bytes_for(n: int, like: Answers) -> int:
        rows = len(like.outputs)
        return n * sum(part.nbytes // rows for part in (like.outputs, like.features) if part is not None)

    @property
    def bytes(self) -> int:
        return self.outputs.nbytes + (self.features.nbytes if self.features is not None else 0)

    def put(self, indices: Tensor, answers: Answers) -> None:
        self.outputs[indices] = answers.outputs
        if self.features is not None and answers.features is not None:
            self.features[indices] = answers.features
        self.known[indices] = True

    def take(self, indices: Tensor) -> Answers:
        return Answers(self.outputs[indices], self.features[indices] if self.features is not None else None)
