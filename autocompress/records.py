"""Plain frozen data that travels between the parts. Seconds and bytes only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from autocompress.policy import Policy
from autocompress.record import Record

SMALLEST = 1e-12
"""Of outputs that others are compared with."""
FEWEST_FOR_TAIL = 59
"""Samples of which the largest exceeds the 95th percentile with 95 %: 0.95^59 < 0.05."""
Rung = Literal["unchanged", "short", "full"]
"""What a policy went through: `unchanged` is the model itself in fewer bits, calibrated; `short` and `full` say how long it was trained."""


class Prediction(Record):
    """What a latency model says of a workload: seconds with a 90 % interval."""

    value: float
    low: float
    high: float


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
        undecided: of these, how many the student itself has hardly decided: what the file chose is nearly its best.
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


class Attempt(Record):
    """One evaluation of a policy, before it begins.

    id: also of the bundle's folder. predicted_latency_s: by which it was chosen. worth: what was known of its structure before it was
    trained, as a rule likeness to the teacher.
    """

    id: Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]
    policy: Policy
    rung: Rung
    predicted_latency_s: Prediction | None = None
    worth: float | None = None

    def again(self, id: str, rung: Rung) -> Attempt:
        """Another attempt at the same policy, by what was known of it."""
        return Attempt(id=id, policy=self.policy, rung=rung, predicted_latency_s=self.predicted_latency_s, worth=self.worth)


class Outcome(Attempt):
    """What has become of an attempt: a score and a measurement, or a failure.

    `seconds` is what it cost, of a short run choosing it included; of it `training_s` went to training (so many `steps`) and `finishing_s`
    to what came after: exporting, scoring and measuring.
    A failure that names an artifact lost it: the file worked once. `search_latency_s` is what was measured first, where the file was
    measured again together with the front. `parity` says how its outputs differ from the student's.
    """

    val_score: Score | None = None
    test_score: Score | None = None
    latency_s: Measurement | None = None
    search_latency_s: Measurement | None = None
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
