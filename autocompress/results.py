"""front.json: what a finished or interrupted search says of itself. The search writes it, whatever shows or exports reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field

from autocompress.budget import Budget
from autocompress.errors import RunFolderError, UsageError
from autocompress.policy import Policy
from autocompress.record import first_problem
from autocompress.records import Measurement, Parity, Prediction, Rung, Score
from autocompress.references import nearest
from autocompress.system.run_folder import read_front
from autocompress.units import counted


class _Read(BaseModel):
    """Keys that a later version may have added are skipped."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class LayerChange(_Read):
    """One layer of the network that students are derived from, as a rule the teacher, and what a policy makes of it.

    Latencies (seconds) are predictions. rank: where it is factorised.
    """

    name: str
    kind: str = ""
    teacher_channels: int
    channels: int
    rank: int | None = None
    bits: int = 32
    dropped: bool = False
    teacher_latency_s: float | None = None
    latency_s: float | None = None


class Entry(_Read):
    """One measured policy: its outcome (see `records.Outcome`), and what it means beside the original and the budget.

    speedup: how many times as fast as the original beside it. feasible: within the budget. dominated: not on the front.
    """

    id: str
    digest: str = ""
    policy: Policy
    rung: Rung = "full"
    val_score: Score
    test_score: Score | None = None
    latency_s: Measurement
    search_latency_s: Measurement | None = None
    predicted_latency_s: Prediction | None = None
    worth: float | None = None
    size_bytes: int
    artifact: str | None = None
    parity: Parity | None = None
    seconds: float = 0.0
    training_s: float = 0.0
    finishing_s: float = 0.0
    steps: int = 0
    speedup: float
    feasible: bool
    dominated: bool = False
    layers: tuple[LayerChange, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def words(self) -> str:
        """The policy, for people."""
        return self.policy.in_words(distilled=not self.is_untrained)

    @property
    def is_untrained(self) -> bool:
        """Whether it is the teacher in other bits, with nothing but calibrated ranges."""
        return self.rung == "unchanged" and not self.steps

    @property
    def trained(self) -> str:
        """How long, for people; of one that was trained to the end the last part. Empty where nobody knows."""
        return "calibrated only" if self.is_untrained else counted(self.steps, "step") if self.steps else ""


class BaselineEntry(_Read):
    """The teacher as exported and measured; scores are missing when the search ended before they were taken."""

    train_score: Score | None = None
    val_score: Score | None = None
    test_score: Score | None = None
    latency_s: Measurement
    size_bytes: int
    artifact: str | None = None


class ProgressPoint(_Read):
    """State of the search at one time: seconds since its start, evaluated trials, hypervolume of the front."""

    elapsed_s: float
    trials: int
    hypervolume: float
    best_val: float | None = None


class PredictionQuality(_Read):
    """How well `n` latencies were predicted: median relative error, and Spearman's rank correlation; None of too few."""

    n: int = 0
    median_error: float | None = None
    spearman: float | None = None


class Predictions(PredictionQuality):
    """Of networks before they were measured; `held_out`, by the latency model as it is in the end."""

    held_out: PredictionQuality = PredictionQuality()


class Ladder(_Read):
    """How many policies stood on each rung, and whether each ranked them as the one below it: rank correlations, None of too few."""

    appraised: int = 0
    foreseen_appraised_spearman: float | None = None
    short_runs: int = 0
    full_runs: int = 0
    appraised_short_spearman: float | None = None
    short_full_spearman: float | None = None


class FailedPolicy(_Read):
    """A policy that did not become an artifact."""

    id: str
    stage: str
    reason: str


class Results(_Read):
    """Everything that a finished or interrupted search says of itself.

    budget: as it was asked for, but for a relative latency, which is given in seconds. front: fastest first. best: id of its last, which is
    the most accurate, or was trained to the end where only validation examples speak for another that the original has seen.
    spent_s: seconds by what they went to.
    """

    schema_version: int = Field(1, alias="schema")
    task: dict[str, Any] = {}
    device: str = ""
    environment: dict[str, Any] = {}
    budget: Budget = Budget()
    baseline: BaselineEntry
    front: tuple[Entry, ...] = ()
    points: tuple[Entry, ...] = ()
    best: str | None = None
    progress: tuple[ProgressPoint, ...] = ()
    prediction: Predictions = Predictions()
    ladder: Ladder = Ladder()
    failures: tuple[FailedPolicy, ...] = ()
    trials: int = 0
    elapsed_s: float = 0.0
    spent_s: dict[str, float] = {}

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Self:
        """Validate the content of front.json; raises RunFolderError that names the field."""
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise RunFolderError(
                f"front.json is damaged: {first_problem(error)}", hint="resume the search: it writes the file again"
            ) from None

    @classmethod
    def load(cls, run: Path) -> Self:
        """Of a run folder; raises UsageError where it holds none, RunFolderError where it is damaged."""
        return cls.read(read_front(run))

    def to_json(self) -> str:
        """The content of front.json."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, allow_nan=False)

    @property
    def model(self) -> str:
        return str(self.task.get("model", "model"))

    @property
    def best_entry(self) -> Entry | None:
        return next((entry for entry in self.points if entry.id == self.best), None)

    @property
    def listed(self) -> tuple[Entry, ...]:
        """What a table shows: the front, or all that was measured when nothing is on it; fastest first."""
        return self.front or tuple(sorted(self.points, key=lambda entry: entry.latency_s.median))

    @property
    def limits(self) -> Budget:
        """The budget as it was asked for, which may be relative; `budget` is the same in seconds."""
        asked = self.task.get("budget")
        return Budget.parse(tuple(asked)) if asked else self.budget

    @property
    def has_budget(self) -> bool:
        return self.budget != Budget()

    def pick(self, name: str) -> Entry:
        """The policy called `name`: its id, the first digits of its digest, or `best`. Raises UsageError."""
        wanted = self.best if name == "best" else name
        for entry in self.points:
            if wanted and (entry.id == wanted or (len(wanted) >= 6 and entry.digest.startswith(wanted))):
                return entry
        if name == "best" and self.points:
            why = "better than the original" if any(entry.feasible for entry in self.points) else "within the budget"
            raise UsageError(f"no measured policy is {why}", hint="name one by its id; `show` lists them")
        if name == "best":
            failed = f"; the first failed to {self.failures[0].stage}: {self.failures[0].reason}" if self.failures else ""
            raise UsageError(f"no policy has been measured{failed}", hint="search again, with --resume")
        raise UsageError(f"no measured policy has the id {name!r}", hint=nearest(name, [e.id for e in self.points]))
