"""Plain frozen data that travels between the parts. Seconds and bytes only."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from autocompress.errors import UsageError
from autocompress.policy import Policy, Record
from autocompress.units import format_duration, format_size, is_size, parse_latency, parse_size

Shape = tuple[int, ...]
Signature = tuple[object, ...]
SMALLEST = 1e-12
"""Of outputs that others are compared with."""
Rung = Literal["unchanged", "short", "full"]
"""What a policy went through: `unchanged` is the model itself in fewer bits, calibrated; `short` and `full` say how long it was trained."""
OperatorKind = Literal[
    "conv", "linear", "add", "mul", "maxpool", "avgpool", "norm", "activation", "concat", "pad", "slice", "matmul", "softmax",
    "attention", "layernorm", "groupnorm", "filter", "convtranspose", "recurrent", "einsum", "resize", "transpose", "move", "elementwise",
    "other",
]  # fmt: skip
"""Pools may be adaptive; `avgpool` covers means over the whole map, `norm` only norms that cannot be folded into a layer.

`filter` is a convolution or linear layer whose weight is one of its inputs, as it is for `convtranspose` and `recurrent`. `move` puts
values elsewhere; `elementwise` stands for every operator without a kind of its own. `other`, and operators that give several tensors
(recurrent ones apart), cost nothing.
"""


class Operator(Record):
    """One operator of a student as a runtime sees it: batch norm folded, fusible activation attached.

    Shapes include the batch; those of recurrent layers are steps x batch x channels. `function` is what the operator computes, where
    several share a kind; of an einsum its equation. `bits` is 8 when it runs in int8, else 32; `weight_bits` is what its weights take in
    the file. `params` counts weights and biases after folding, but none that are inputs.
    """

    name: str
    kind: OperatorKind
    inputs: tuple[Shape, ...]
    output: Shape
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    activation: str | None = None
    function: str | None = None
    bits: Literal[8, 32] = 32
    weight_bits: int = 32
    params: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates with weights; 0 for operators without."""
        if self.kind == "conv":
            return math.prod(self.output) * self.inputs[0][1] // self.groups * math.prod(self.kernel)
        if self.kind == "linear":
            return math.prod(self.output) * self.inputs[0][-1]
        if self.kind == "filter":
            return math.prod(self.output) * math.prod(self.inputs[1][1:])
        if self.kind == "convtranspose":
            return math.prod(self.inputs[0]) * math.prod(self.inputs[1][1:])
        if self.kind == "recurrent":
            return math.prod(self.output[:2]) * sum(math.prod(shape) for shape in self.inputs[1:] if len(shape) == 2)
        return 0

    @property
    def is_int8(self) -> bool:
        return self.bits == 8

    @property
    def read(self) -> int:
        """Elements of its first input."""
        return math.prod(self.inputs[0]) if self.inputs else 0

    @property
    def signature(self) -> Signature:
        """Everything but the name: operators with the same signature take the same time."""
        return tuple(value for field, value in self if field != "name")


class OutlineStep(Record):
    """One operator of a network as a person reads it, with what a runtime folds into it.

    name: of its layer, or of the operator. inputs: positions of the steps that it reads. group: the channel group that most of its channels
    are of. block: the innermost droppable block around it. line: of the code, where it is known. latency_s: of the operator by itself,
    where it was measured.
    """

    name: str
    title: str
    shape: Shape
    inputs: tuple[int, ...]
    group: str | None
    block: str | None
    params: int
    macs: int
    line: str
    latency_s: float | None = None


class Workload(Record):
    """The operators of one student in execution order, and the bytes of its weights in the file."""

    operators: tuple[Operator, ...]
    weight_bytes: int

    @property
    def converted(self) -> tuple[int, ...]:
        """For each operator the elements that it reads in another arithmetic than the operator before it has made: int8 or not."""
        before = (None, *self.operators)
        return tuple(
            operator.read if last is not None and last.is_int8 != operator.is_int8 else 0
            for last, operator in zip(before, self.operators, strict=False)
        )

    @property
    def macs(self) -> int:
        return sum(operator.macs for operator in self.operators)

    @property
    def params(self) -> int:
        return sum(operator.params for operator in self.operators)


class Prediction(Record):
    """What a latency model says of a workload: seconds with a 90 % interval."""

    value: float
    low: float
    high: float


FEWEST_FOR_TAIL = 59
"""Samples of which the largest exceeds the 95th percentile with 95 %: 0.95^59 < 0.05."""


class Measurement(Record):
    """Latency of one artifact on one device, in seconds. [low, high] is the 95 % interval of the median.

    p95_high: what the 95th percentile is below, with 95 %; of fewer than FEWEST_FOR_TAIL samples the largest, which it may well exceed.
    original_s: median of the original, where both were measured in turns: what a speed-up and a relative budget refer to.
    samples: what the device told, rounds x samples; of no part in JSON, and not known of what was read.
    """

    median: float = Field(gt=0)
    low: float
    high: float
    p95: float
    p95_high: float | None = None
    n: int
    iqr: float = 0.0
    first_call: float = 0.0
    original_s: float | None = None
    noisy: bool = False
    noise_reason: str = ""
    environment: dict[str, str] = {}
    samples: tuple[tuple[float, ...], ...] = Field((), exclude=True, repr=False)

    @property
    def tail(self) -> float:
        """What a budget of the 95th percentile is held against: the upper end of its interval, where that is known."""
        return self.p95 if self.p95_high is None else self.p95_high

    def mistrusted(self, reason: str) -> Measurement:
        """The same, flagged as noisy for one more reason."""
        return self.model_copy(update={"noisy": True, "noise_reason": "; ".join(filter(None, [self.noise_reason, reason]))})

    def beside(self, original: Measurement) -> Measurement:
        """The same, with what the original took when both were measured in turns."""
        return self.model_copy(update={"original_s": original.median})

    def relative(self, otherwise_s: float) -> float:
        """The median in units of what the original took beside it; of so many seconds where it was not measured beside it."""
        return self.median / (self.original_s or otherwise_s)

    def times(self, factor: float) -> Measurement:
        """The same on a machine that takes so many times as long."""
        names = ("median", "low", "high", "p95", "p95_high", "iqr", "first_call", "original_s")
        known = {name: value for name in names if (value := getattr(self, name)) is not None}
        return self.model_copy(update={"samples": ()} | {name: factor * value for name, value in known.items()})


class Normalisation(Record):
    """How images of whole numbers up to 255 become inputs of a model: (pixel / 255 - mean) / std, with a value for each channel or one."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


class Score(Record):
    """Task quality of one model on one split; `value` is better in `direction`."""

    name: str = "accuracy"
    value: float
    direction: Literal["maximize", "minimize"] = "maximize"
    n: int = 0

    @property
    def gain(self) -> float:
        """The value with the sign that makes larger better."""
        return self.value if self.direction == "maximize" else -self.value


def _budget_duration(text: str) -> float:
    try:
        return parse_latency(text)
    except UsageError as error:
        raise UsageError(
            error.message.replace("latency", "budget"), hint="write 10ms, 500us, 0.5x (of the baseline), 4MB or p95=10ms"
        ) from None


class Budget(Record):
    """Limits on the product. `latency_s` bounds the upper end of the median's 95 % interval, `p95_s` that of the 95th percentile's.

    `relative` bounds latency as a fraction of the original's: of what it took beside a measurement, or `against` what is known of it.
    """

    latency_s: float | None = Field(None, gt=0)
    p95_s: float | None = Field(None, gt=0)
    size_bytes: int | None = Field(None, gt=0)
    relative: float | None = Field(None, gt=0)

    @classmethod
    def parse(cls, texts: str | tuple[str, ...] | list[str]) -> Budget:
        """`"10ms"`, `"0.5x"`, `"4MB"`, `"p95=10ms"`, several at once (a list, or separated by commas)."""
        parts = [part.strip() for text in ([texts] if isinstance(texts, str) else texts) for part in text.split(",")]
        limits: dict[str, float] = {}
        for part in parts:
            key, value = cls._parse_one(part)
            if key in limits:
                what = {"latency_s": "latency", "p95_s": "p95", "size_bytes": "size", "relative": "relative latency"}[key]
                raise UsageError(f"the budget limits {what} twice: {', '.join(parts)}", hint="give each limit once")
            limits[key] = value
        return cls.model_validate(limits)

    @staticmethod
    def _parse_one(part: str) -> tuple[str, float]:
        if part.startswith("p95="):
            return "p95_s", _budget_duration(part.removeprefix("p95="))
        if is_size(part):
            return "size_bytes", parse_size(part)
        if part.endswith("x"):
            try:
                factor = float(part[:-1])
            except ValueError:
                factor = math.nan
            if not (math.isfinite(factor) and factor > 0):
                raise UsageError(
                    f"a relative budget must be a number greater than zero and x, but got {part!r}",
                    hint="0.5x means half of the measured baseline",
                )
            return "relative", factor
        return "latency_s", _budget_duration(part)

    def against(self, original_s: float) -> Budget:
        """The same budget with `relative` turned into seconds, for an original of this latency."""
        if self.relative is None:
            return self
        limit = self.relative * original_s
        return self.model_copy(update={"relative": None, "latency_s": min(limit, self.latency_s or limit)})

    def violation(self, latency_s: float, size_bytes: float, p95_s: float | None = None) -> float:
        """Largest relative excess over a limit; <= 0 means within the budget."""
        pairs = [(latency_s, self.latency_s), (size_bytes, self.size_bytes), (p95_s, self.p95_s)]
        return max((value / limit - 1.0 for value, limit in pairs if limit is not None and value is not None), default=-1.0)

    def allows(self, measurement: Measurement, size_bytes: float, *, margin: float = 0.0) -> bool:
        """Whether a measured artifact is within the budget, and would be if it were slower by `margin`."""
        if self.relative is not None:
            assert measurement.original_s is not None, "a relative budget needs the original beside each measurement"
            return self.against(measurement.original_s).allows(measurement, size_bytes, margin=margin)
        return self.violation((1 + margin) * measurement.high, size_bytes, (1 + margin) * measurement.tail) <= 0

    def times(self, factor: float) -> Budget:
        """All limits so many times as wide."""
        limits = {name: factor * value for name, value in self.model_dump().items() if value is not None}
        return Budget.model_validate(limits | ({"size_bytes": int(limits["size_bytes"])} if "size_bytes" in limits else {}))

    @property
    def of_time(self) -> Budget:
        """Its limits on latency alone."""
        return self.model_copy(update={"size_bytes": None})

    @property
    def of_size(self) -> Budget:
        """Its limit on size alone."""
        return Budget(size_bytes=self.size_bytes)

    def in_words(self) -> str:
        limits = []
        if self.latency_s is not None:
            limits.append(f"latency {format_duration(self.latency_s)}")
        if self.p95_s is not None:
            limits.append(f"p95 {format_duration(self.p95_s)}")
        if self.size_bytes is not None:
            limits.append(f"size {format_size(self.size_bytes)}")
        if self.relative is not None:
            limits.append(f"latency {self.relative:g}x of the baseline")
        return ", ".join(limits) or "none"


FailureStage = Literal["compress", "train", "export", "check", "measure", "test"]
"""Of what a policy goes through, in order."""


class Failure(Record):
    """Why a policy did not become an artifact, or lost it."""

    stage: FailureStage
    reason: str


class Parity(Record):
    """How the outputs of a file differ from those of the student that it was exported from, on `n` inputs.

    Args:
        difference: largest absolute difference; infinite where the file's outputs are not finite.
        largest: magnitude of the largest expected output.
        differing: number of decisions of a classifier that differ; None for outputs that are no decisions.
        undecided: of these, how many the student itself has hardly decided.
    """

    difference: float = Field(allow_inf_nan=True)
    largest: float
    differing: int | None
    undecided: int = 0
    n: int

    @property
    def relative(self) -> float:
        """The largest difference as a share of the largest expected output."""
        return self.difference / max(self.largest, SMALLEST)


class Outcome(Record):
    """One evaluated policy: a score and a measurement, or a failure.

    `seconds` is what it cost, of a short run choosing it included; of it `training_s` went to training (so many `steps`) and `finishing_s`
    to what came after: exporting, scoring and measuring.
    `worth` is what was known of its structure before it was trained, as a rule likeness to the teacher.
    A failure that names an artifact lost it: the file worked once. `search_latency_s` is what was measured first, where the file was
    measured again together with the front. `parity` says how its outputs differ from the student's.
    """

    id: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    policy: Policy
    rung: Rung
    val_score: Score | None = None
    test_score: Score | None = None
    latency_s: Measurement | None = None
    search_latency_s: Measurement | None = None
    predicted_latency_s: Prediction | None = None
    worth: float | None = None
    size_bytes: int = 0
    artifact: str | None = None
    parity: Parity | None = None
    failure: Failure | None = None
    seconds: float = 0.0
    training_s: float = 0.0
    finishing_s: float = 0.0
    steps: int = 0


class TakenOver(Record):
    """What a search has of another one: ids of networks, the number of appraisals, and whether that is all it will have."""

    ids: tuple[str, ...] = ()
    appraised: int = 0
    complete: bool = False
