"""The one training loop: training of a demonstration teacher, distillation, and training through fake quantization."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from autocompress.compress.arithmetic import best_training_device, fast_layout
from autocompress.compress.loss import Distillation, loss_of
from autocompress.compress.memory import LEAST_PART, inputs_that_fit, is_out_of_memory, parts_that_fit
from autocompress.compress.norms import reestimate_norms, upkeep
from autocompress.compress.optimizer import Optimizer
from autocompress.compress.quantize import CALIBRATION_BATCH, calibrate, fake_quantize, float_state, snap_biases
from autocompress.compress.rates import Schedule, TrainPlan
from autocompress.data import Data
from autocompress.errors import PolicyFailure
from autocompress.graph.trace import is_opaque
from autocompress.policy import QuantSpec

SLOWER, MOST_RESTARTS = 4.0, 3
"""By how much rates fall each time that training diverges and begins again, and how often it may: networks without norms need it."""
KEPT_EVERY_S = 300.0
"""So much training may be lost where a machine loses its power, or kills the search."""
LEAST_LEFT = 0.1
"""Share of its time that training must have left to begin again."""

Tick = Callable[[float], None]
"""Called after each step with the progress in [0, 1], which falls back where training begins again."""
T = TypeVar("T")


def train(
    student: nn.Module, data: Data, plan: TrainPlan, *, distillation: Distillation | None = None, tick: Tick | None = None
) -> nn.Module:
    """Train `student` in place and return it in eval mode.

    Without a distillation the loss is the task's own. Raises PolicyFailure when the loss does not stay finite at any of the rates tried.
    """
    return _at_bearable_rates(lambda plan: _Trainer(data, plan, distillation, tick).train(student), student, plan)


def train_quantized(
    student: fx.GraphModule,
    quant: QuantSpec,
    data: Data,
    plan: TrainPlan,
    *,
    distillation: Distillation | None = None,
    tick: Tick | None = None,
    keep: Callable[[], None] | None = None,
) -> fx.GraphModule:
    """Train in float, insert fake quantizers, train the rest through them; returns the quantized student in eval mode.

    What was learned is in `student` too, in float, also where a signal ends the training, and each time that `keep` is called: every few
    minutes, to write it down.
    One schedule spans both parts. With `plan.steps == 0` this is post-training quantization: calibration only.
    """

    def attempt(plan: TrainPlan) -> fx.GraphModule:
        return _Trainer(data, plan, distillation, tick, keep).train_quantized(student, quant)

    return _at_bearable_rates(attempt, student, plan) if plan.steps else attempt(plan)


class Diverged(PolicyFailure):
    """The loss is no longer finite, though it was."""


def _at_bearable_rates(attempt: Callable[[TrainPlan], T], student: nn.Module, plan: TrainPlan) -> T:
    """Train by the plan; each time that the loss diverges, once more from where the student began, at lower rates, in what time is left.

    Where that is too little the student fails: it would be one that was not trained.
    """
    begun, started = copy.deepcopy(student.state_dict()), time.monotonic()
    for _ in range(MOST_RESTARTS):
        try:
            return attempt(plan)
        except Diverged:
            if plan.deadline - time.monotonic() < LEAST_LEFT * (plan.deadline - started):
                raise
            student.load_state_dict(begun)
            plan = replace(plan, learning_rate=plan.learning_rate / SLOWER)
    return attempt(plan)


@dataclass
class _Trainer:
    """One attempt at a plan, by one schedule from its first step to its last."""

    data: Data
    plan: TrainPlan
    distillation: Distillation | None
    tick: Tick | None
    keep: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        self._schedule, self._told, self._kept_at = Schedule(self.plan), 0.0, time.monotonic()
        self._hand_over: Callable[[], None] = lambda: None
        """Gives the student what was learned so far, where another network is trained in its place."""

    def train(self, student: nn.Module) -> nn.Module:
        """See the function `train`."""
        self._run(student, until=1.0)
        return student.eval()

    def train_quantized(self, student: fx.GraphModule, quant: QuantSpec) -> fx.GraphModule:
        """See the function `train_quantized`."""
        plan, rounds = self.plan, quant.rounds
        if plan.steps:
            batches = plan.calibration_inputs / plan.batch_size if rounds else 0.0
            self._run(student, until=1.0 - (plan.quant_fraction if rounds else 0.0), calibrated=batches)
        if not rounds:
            return student.eval()
        quantized = fake_quantize(student.eval(), quant)
        size = inputs_that_fit(student, CALIBRATION_BATCH, torch.device("cpu"))
        calibrate(quantized, self.data.calibration_batches(plan.calibration_inputs, size))
        if plan.steps:
            self._hand_over = functools.partial(_learn_from, student, quantized)
            try:
                self._run(quantized, until=1.0)
            finally:  # a signal may end it here; whoever goes on does so from the student
                self._hand_over()
        return snap_biases(quantized.eval())

    def _run(self, model: nn.Module, *, until: float, calibrated: float = 0.0) -> None:
        """Train until so much of the schedule is done, and let norms know the weights as they are then.

        calibrated: batches that ranges are fitted to after it, before the time is over.
        """
        schedule, begun, device = self._schedule, self._schedule.done, best_training_device()
        schedule.upkeep = upkeep(model, begun=begun, calibrated=calibrated)
        _train_mode(model, self.distillation).to(device).to(memory_format=fast_layout(model))
        optimizer = Optimizer(model, self.plan.learning_rate)
        schedule.parts = max(schedule.parts, parts_that_fit(model, min(self.plan.batch_size, len(self.data.train)), device))
        for indices, epoch in self.plan.draws(len(self.data.train), start=begun):
            if schedule.progress >= until:
                break
            self._step(model, indices, epoch, optimizer, device)
        model.cpu().to(memory_format=torch.contiguous_format)
        reestimate_norms(model, self.data, self.plan, schedule.done - begun, schedule.parts)

    def _step(self, model: nn.Module, indices: Tensor, epoch: int, optimizer: Optimizer, device: torch.device) -> None:
        view = self.distillation.teacher.view(epoch) if self.distillation is not None else epoch

        def loss(part: Tensor) -> Tensor:
            return loss_of(model, self.data, part, self.data.view(part, view, self.plan.seed), view, self.distillation, device)

        value = self._gradient(loss, indices, optimizer)
        if not math.isfinite(value):
            failure = Diverged if self._schedule.done else PolicyFailure  # slower steps change nothing before the first
            is_odd = not self.data.train.targets[indices].isfinite().all()
            where = ", where some targets are NaN or infinite: leave such examples out, or let the loss skip them" if is_odd else ""
            raise failure(f"training diverged: the loss must stay finite, but is {value} at step {self._schedule.done}{where}")
        optimizer.step(self._schedule.rates)
        self._schedule.done += 1
        self._told = max(self._told, self._schedule.progress)  # which falls where norms no longer need to be re-estimated
        if self.tick is not None:
            self.tick(self._told)
        if self.keep is not None and time.monotonic() > self._kept_at + KEPT_EVERY_S:
            self._hand_over()
            self.keep()
            self._kept_at = time.monotonic()

    def _gradient(self, loss: Callable[[Tensor], Tensor], indices: Tensor, optimizer: Optimizer) -> float:
        """The mean loss of these examples, whose gradient is left for the optimizer; not where the loss is not finite.

        Where memory runs out the batch is taken in twice as many parts from then on, one after the other: norms see a part at a time.
        """
        schedule = self._schedule
        while True:
            optimizer.forget_gradient()
            total = 0.0
            try:
                for part in indices.tensor_split(schedule.parts):
                    weighted = loss(part) * (len(part) / len(indices))
                    total += weighted.item()
                    if not math.isfinite(total):
                        return total
                    weighted.backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(indices) < 2 * schedule.parts * LEAST_PART:
                    raise
            else:
                return total
            schedule.parts *= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _learn_from(student: nn.Module, quantized: nn.Module) -> None:
    """Give a student the weights that were trained through its quantizers, which are in float under the same names."""
    own = student.state_dict().keys()
    student.load_state_dict({name: value for name, value in float_state(quantized).items() if name in own}, strict=False)


def _train_mode(model: nn.Module, distillation: Distillation | None) -> nn.Module:
    """Dropout is for students whose features are not compared with a teacher's: it would blur them.

    A network that could not be traced may return something else in training, such as outputs of further heads: only its layers train.
    """
    model.train()
    if is_opaque(model):
        for module in model.modules():
            trains = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.RNNBase)  # GPUs go back through the last only so
            module.training = isinstance(module, trains)
    if distillation is not None and distillation.features is not None:
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
    return model
