"""The one training loop: training of a demonstration teacher, distillation, and training through fake quantization.

Muon for hidden weights and SGD with Nesterov momentum for the rest, under a one-cycle schedule (Smith & Topin 2017, arXiv 1708.07120):
a short linear rise, then a linear fall to a hundredth. No weight decay on biases and norms.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.batch import Inputs, call_network
from autocompress.compress.arithmetic import best_training_device, fast_arithmetic, fast_layout, free_memory
from autocompress.compress.distill import (
    Compared,
    ComparedFeatures,
    compare_features,
    difference,
    distillation_loss,
    observe,
)
from autocompress.compress.hidden import compare_hidden
from autocompress.compress.muon import Muon, hidden_matrices
from autocompress.compress.quantize import calibrate, fake_quantize, snap_biases
from autocompress.compress.teacher import Teacher
from autocompress.data import Data
from autocompress.data.splits import FLOAT_BYTES
from autocompress.errors import PolicyFailure
from autocompress.graph.trace import is_opaque
from autocompress.policy import DistillSpec, QuantSpec

WARM_UP_SHARE = 0.15
LEAST_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
SGD_SHARE = 0.5
MUON_SHARE = 0.2
MUON_DECAY = 5e-3
CALIBRATION_INPUTS, CALIBRATION_BATCH = 512, 64
FEW_STEPS = 50
"""After fewer, the running statistics of batch norms are still those that training began with: 0.9 to the 50th is half a percent."""
MOST_BATCHES = 16
"""Batches that norms are re-estimated on, at most."""
FORWARD_COST = 0.4
"""Of a step's time that a batch takes which is only looked at."""
MOST_UPKEEP = 0.3
"""Of the time of training that is left at most for re-estimating norms and calibrating."""
WARM_STEPS, MUCH_TO_LEARN = 300, 0.15
"""A student that answers like its teacher is trained at its highest rates from so many steps on: fewer undo more than they teach. Where so
much of its answers differs it has more to learn than to lose (`benchmarks/rates.py`), but by Muon only, whose steps have the same length
whatever the gradient: of SGD the first steps follow the largest gradients that there will be, and a few of them ruin a student that was
reconstructed."""
GENTLE, MUON_FULL = 0.5, 0.4
"""Share of Muon's full rate that teaches students most that know most of what their teacher knows, and the share of their answers that must
differ for the full one (`benchmarks/trainer.py`): who begins from scratch has further to go."""
SGD_RATE_POWER = 3
"""Power of what there is to learn that SGD's rates keep where steps are few: all from scratch, a fortieth where 0.3 of answers differ."""
SLOWER, MOST_RESTARTS = 4.0, 3
"""By how much rates fall each time that training diverges and begins again, and how often it may: networks without norms need it."""
LEAST_LEFT = 0.1
"""Share of its time that training must have left to begin again."""
LEAST_PART, MEMORY_SHARE = 8, 0.5
"""Examples at least of a part of a batch that does not fit the memory; and the share of what is free that it may take."""
NO_MEMORY = "can't allocate memory"
"""What torch says of the machine's own, with no kind of error for it."""
FEATURE_SCALE = 25.0
"""Weight of the difference of features beside the loss of answers, which is T^2 times a divergence: 16 times at the default T = 4 only."""

Tick = Callable[[float], None]
"""Called after each step with the progress in [0, 1], which falls back where training begins again."""
T = TypeVar("T")


@dataclass(frozen=True)
class TrainPlan:
    """How long and how fast to train.

    Args:
        steps: optimiser steps at most.
        deadline: `time.monotonic()` value at which training must have ended; the schedule follows the clock if that is sooner.
        learning_rate: scale of all peaks: SGD runs at SGD_SHARE of it, Muon at MUON_SHARE.
        quant_fraction: share of the steps at the end that run through fake quantization.
        calibration_inputs: that int8 ranges are fitted to.
        to_learn: how far the student is from its teacher at the start, from 0 to 1 (`Teacher.distance`): the less it has to learn, the
            lower are rates, the more so where steps are few.
    """

    steps: int
    deadline: float = math.inf
    learning_rate: float = 0.1
    batch_size: int = 128
    quant_fraction: float = 0.1
    calibration_inputs: int = CALIBRATION_INPUTS
    seed: int = 0
    to_learn: float = 1.0


def one_cycle(progress: float) -> float:
    """Fraction of the peak learning rate at `progress` in [0, 1]."""
    if progress < WARM_UP_SHARE:
        return max(LEAST_RATE, progress / WARM_UP_SHARE)
    return max(LEAST_RATE, (1 - progress) / (1 - WARM_UP_SHARE))


@dataclass(frozen=True)
class Distillation:
    """What a student learns from: a teacher, how much of it, and the features that are compared (None: answers only)."""

    teacher: Teacher
    spec: DistillSpec
    features: ComparedFeatures | None = None

    @property
    def hidden_layers(self) -> tuple[Compared, ...]:
        """Layers inside whose inputs are compared."""
        return self.features.hidden if self.features is not None and self.spec.features and self.spec.hidden else ()


def train(
    student: nn.Module, data: Data, plan: TrainPlan, *, distillation: Distillation | None = None, tick: Tick | None = None
) -> nn.Module:
    """Train `student` in place and return it in eval mode.

    Without a distillation the loss is the task's own. Raises PolicyFailure when the loss does not stay finite at any of the rates tried.
    """

    def attempt(plan: TrainPlan) -> nn.Module:
        steps = _Steps(plan)
        _run(student, data, plan, steps, until=1.0, distillation=distillation, tick=tick)
        _reestimate_norms(student, data, plan, steps.done)
        return student.eval()

    return _at_bearable_rates(attempt, student, plan)


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


def quantizes(quant: QuantSpec) -> bool:
    """Whether any layer gets fewer than 32 bits."""
    return quant.bits < 32 or any(bits < 32 for bits in quant.layers.values())


def train_quantized(
    student: fx.GraphModule,
    quant: QuantSpec,
    data: Data,
    plan: TrainPlan,
    *,
    distillation: Distillation | None = None,
    tick: Tick | None = None,
) -> fx.GraphModule:
    """Train in float, insert fake quantizers, train the rest through them; returns the quantized student in eval mode.

    What was learned is in `student` too, in float, also where a signal ends the training.
    One schedule spans both parts. With `plan.steps == 0` this is post-training quantization: calibration only.
    """

    def attempt(plan: TrainPlan) -> fx.GraphModule:
        return _train_quantized(student, quant, data, plan, distillation, tick)

    return _at_bearable_rates(attempt, student, plan) if plan.steps else attempt(plan)


def _train_quantized(
    student: fx.GraphModule, quant: QuantSpec, data: Data, plan: TrainPlan, distillation: Distillation | None, tick: Tick | None
) -> fx.GraphModule:
    rounds = quantizes(quant)
    steps = _Steps(plan)
    float_share = 1.0 - (plan.quant_fraction if rounds else 0.0)
    steps.upkeep = _upkeep(student, calibrated=plan.calibration_inputs / plan.batch_size if rounds else 0.0)
    if plan.steps:
        _run(student, data, plan, steps, until=float_share, distillation=distillation, tick=tick)
        _reestimate_norms(student, data, plan, steps.done)
    if not rounds:
        return student.eval()
    quantized = fake_quantize(student.eval(), quant)
    calibrate(quantized, data.calibration_batches(plan.calibration_inputs, CALIBRATION_BATCH))
    if plan.steps:
        begun = steps.done
        steps.upkeep = _upkeep(quantized, begun=begun)
        try:
            _run(quantized, data, plan, steps, until=1.0, distillation=distillation, tick=tick)
            _reestimate_norms(quantized, data, plan, steps.done - begun)
        finally:  # a signal may end it here; whoever goes on does so from the student
            _learn_from(student, quantized)
    return snap_biases(quantized.eval())


def _learn_from(student: nn.Module, quantized: nn.Module) -> None:
    """Give a student the weights that were trained through its quantizers, which are in float under the same names."""
    own = student.state_dict().keys()
    student.load_state_dict({name: value for name, value in quantized.state_dict().items() if name in own}, strict=False)


class Rates(NamedTuple):
    """Fractions of the peak learning rates of the two optimisers."""

    sgd: float
    muon: float


class _Steps:
    """Progress of a plan in [0, 1]: by steps or by time, whichever is further.

    A schedule that follows the clock ends annealed at its deadline on any machine, without a guess of its speed.
    """

    def __init__(self, plan: TrainPlan) -> None:
        self.total = plan.steps
        self._least = Rates(plan.to_learn**SGD_RATE_POWER, min(1.0, plan.to_learn / MUCH_TO_LEARN))
        self._highest = Rates(1.0, min(1.0, max(GENTLE, plan.to_learn / MUON_FULL)))
        self.done = 0
        self.parts = 1
        """In which a batch is taken, one after the other."""
        self.upkeep: Callable[[int], float] = lambda done: 0.0
        """What is to be done after so many steps, in steps: it is to end by the deadline too."""
        self._started = time.monotonic()
        self._allowed = plan.deadline - self._started

    @property
    def progress(self) -> float:
        if self.done >= self.total or self._allowed <= 0:
            return 1.0
        elapsed = time.monotonic() - self._started
        upkeep = min(MOST_UPKEEP * self._allowed, self.upkeep(self.done) * elapsed / max(1, self.done))
        return min(1.0, max(self.done / self.total, (elapsed + upkeep) / self._allowed))

    @property
    def rates(self) -> Rates:
        """Fractions of the peak learning rates at this moment."""
        progress = self.progress
        expected = self.done / progress if progress else self.total
        warm, cycle = min(1.0, expected / WARM_STEPS), one_cycle(progress)
        return Rates(*(cycle * high * max(least, warm) for high, least in zip(self._highest, self._least, strict=True)))


def _run(
    model: nn.Module, data: Data, plan: TrainPlan, steps: _Steps, *, until: float, distillation: Distillation | None, tick: Tick | None
) -> None:
    device = best_training_device()
    _train_mode(model, distillation).to(device).to(memory_format=fast_layout(model))
    optimizer = _Optimizer(model, plan.learning_rate)
    steps.parts = max(steps.parts, _parts_that_fit(model, min(plan.batch_size, len(data.train)), device))
    for indices, epoch in _draws(len(data.train), plan, start=steps.done):
        if steps.progress >= until:
            break
        view = distillation.teacher.view(epoch) if distillation is not None else epoch

        def loss_of(part: Tensor, view: int = view) -> Tensor:
            return _loss(model, data, part, data.view(part, view, plan.seed), view, distillation, device)

        loss = _gradient(loss_of, indices, optimizer, steps)
        if not math.isfinite(loss):
            failure = Diverged if steps.done else PolicyFailure  # slower steps change nothing before the first
            raise failure(f"training diverged: the loss must stay finite, but is {loss} at step {steps.done}")
        optimizer.step(steps.rates)
        steps.done += 1
        if tick is not None:
            tick(steps.progress)
    model.cpu().to(memory_format=torch.contiguous_format)


def _gradient(loss_of: Callable[[Tensor], Tensor], indices: Tensor, optimizer: _Optimizer, steps: _Steps) -> float:
    """The mean loss of these examples, whose gradient is left for the optimizer; not where the loss is not finite.

    Where memory runs out the batch is taken in twice as many parts from then on, one after the other: norms see a part at a time.
    """
    while True:
        optimizer.forget_gradient()
        total = 0.0
        try:
            for part in indices.tensor_split(steps.parts):
                loss = loss_of(part) * (len(part) / len(indices))
                total += loss.item()
                if not math.isfinite(total):
                    return total
                loss.backward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(indices) < 2 * steps.parts * LEAST_PART:
                raise
        else:
            return total
        steps.parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _parts_that_fit(model: nn.Module, batch_size: int, device: torch.device) -> int:
    """In how many parts a batch is to be taken, as far as the shapes of a traced network tell: a process that takes more is killed."""
    needed, free = batch_size * _activation_bytes(model), free_memory(device)
    parts = 1
    while needed / parts > MEMORY_SHARE * free and batch_size >= 2 * parts * LEAST_PART:
        parts *= 2
    return parts


def _activation_bytes(model: nn.Module) -> int:
    """Of what training keeps of an example until its gradient is known: about what all operators make of it; 0 where nothing tells."""
    if not isinstance(model, fx.GraphModule):
        return 0
    shapes = [node.meta["shape"] for node in model.graph.nodes if node.meta.get("shape") and node.op not in ("get_attr", "output")]
    batch = next((shape[0] for shape in shapes), 1)
    return FLOAT_BYTES * sum(map(math.prod, shapes)) // batch


def is_out_of_memory(error: Exception) -> bool:
    """Of the machine or of a GPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY in str(error)


@torch.no_grad()
def _reestimate_norms(model: nn.Module, data: Data, plan: TrainPlan, steps: int) -> None:
    """Where training was short, let batch norms know the weights as they are: statistics of some of the batches, averaged evenly."""
    norms = _norms(model)
    if not 0 < steps < FEW_STEPS or not norms:
        return
    momenta, device = [norm.momentum for norm in norms], best_training_device()
    model.eval().to(device).to(memory_format=fast_layout(model))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()  # these only: what is dropped in training would change the statistics
    with fast_arithmetic(device):
        for indices, epoch in itertools.islice(_draws(len(data.train), plan, start=0), min(steps, MOST_BATCHES)):
            call_network(model, data.view(indices, epoch, plan.seed).to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.cpu().to(memory_format=torch.contiguous_format)


def _norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Those that have running statistics."""
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def _upkeep(model: nn.Module, *, begun: int = 0, calibrated: float = 0.0) -> Callable[[int], float]:
    """What follows training that began with step `begun`, by the steps that are done, in steps: norms, and ranges of so many batches."""
    has_norms = bool(_norms(model))

    def batches(done: int) -> float:
        return calibrated + (min(done - begun, MOST_BATCHES) if has_norms and done - begun < FEW_STEPS else 0)

    return lambda done: FORWARD_COST * batches(done)


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


def _loss(
    model: nn.Module, data: Data, indices: Tensor, inputs: Inputs, view: int, distillation: Distillation | None, device: torch.device
) -> Tensor:
    targets = data.train.targets[indices].to(device)
    features = distillation.features if distillation is not None else None
    hidden = distillation.hidden_layers if distillation is not None else ()
    with fast_arithmetic(device):
        own = [compared.layer for compared in hidden]
        student = observe(model, inputs.to(device), features.classifier if features is not None else None, own)
    outputs = student.outputs.float().contiguous()  # a loss of one's own may take views of it
    if distillation is None:
        return data.loss(outputs, targets) if data.loss is not None else F.cross_entropy(outputs, targets)
    counterparts = [compared.counterpart for compared in hidden]
    teacher, spec = distillation.teacher.answers(indices, inputs, view, counterparts), distillation.spec
    answers = teacher.outputs.to(device)
    if data.loss is not None:
        variance, constant = distillation.teacher.units
        loss = spec.alpha * F.mse_loss(outputs, answers) / variance + (1 - spec.alpha) * data.loss(outputs, targets) / constant
    else:
        loss = distillation_loss(outputs, answers, targets, spec)
    if features is None:
        return loss
    at_end, inside = compare_features(student, teacher, features, spec.feature_loss), compare_hidden(student, teacher, features)
    unlike = difference(at_end, inside, spec.hidden)
    return loss if unlike is None else (1 - spec.features) * loss + spec.features * FEATURE_SCALE * unlike


def _draws(n: int, plan: TrainPlan, start: int) -> Iterator[tuple[Tensor, int]]:
    """(indices, epoch) of each step for ever, from step `start` on; an epoch shows every input at most once."""
    size = min(plan.batch_size, n)
    per_epoch = n // size
    epoch, skip = divmod(start, per_epoch)
    while True:
        generator = torch.Generator().manual_seed((plan.seed << 20) + epoch)
        order = torch.randperm(n, generator=generator)
        for step in range(skip, per_epoch):
            yield order[step * size : (step + 1) * size], epoch
        epoch, skip = epoch + 1, 0


class _Optimizer:
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
