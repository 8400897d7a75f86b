"""Setting: all that is the same for every policy of one search."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from autocompress.batch import Inputs, joined
from autocompress.compress.quantize import CALIBRATION_INPUTS
from autocompress.compress.reconstruct import TeacherActivations, examples_for
from autocompress.compress.teacher import Teacher
from autocompress.data import Data
from autocompress.data.splits import FLOAT_BYTES
from autocompress.devices.base import Device
from autocompress.errors import UsageError
from autocompress.export import Manifest, Provenance, write_bundle
from autocompress.graph import Graph, Structure
from autocompress.policy import Policy
from autocompress.records import Measurement, Score
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.setup.ledger import Ledger
from autocompress.system.failures import FAILURES

MOST_CALIBRATION_S = 20.0
MOST_ANSWER_BYTES = 2**30
RECENT_BASELINES = 7
"""Of the baseline's measurements: what it takes now is their median."""


@dataclass(frozen=True)
class Baseline:
    """The user's own model, exported in float32 and measured. `train_score`: of training examples, about as many as validate."""

    path: Path
    latency_s: Measurement
    size_bytes: int
    train_score: Score | None = None
    val_score: Score | None = None
    test_score: Score | None = None


@dataclass(frozen=True)
class Setting:
    """All that is the same for every policy of one search.

    Args:
        graphs: traced networks by `StudentSpec.reference`; None is the teacher's own.
        example: one batch of inputs at the deployment batch, as the model takes it.
        models: folder of the bundles, one folder an id.
        calibration_inputs: that int8 ranges are fitted to.
        baseline_history: what the baseline took, first alone and then beside others; grows as the search measures.
        ledger: what the search has spent its time on; grows too.
    """

    data: Data
    teacher: Teacher
    graphs: dict[str | None, Graph]
    device: Device
    baseline: Baseline
    example: Inputs
    models: Path
    provenance: Provenance
    learning_rate: float = 0.1
    batch_size: int = 128
    seed: int = 0
    calibration_inputs: int = CALIBRATION_INPUTS
    baseline_history: list[Measurement] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    activations: list[TeacherActivations] = field(default_factory=list)
    """One, once it was asked for; shared by all that are made of this setting by `replace`."""

    @property
    def batch(self) -> int:
        return len(self.example)

    @functools.cached_property
    def most_answers(self) -> int:
        """Examples whose answers are held together, at most: a map for each pixel is large."""
        (made,) = next(node for node in self.graphs[None].module.graph.nodes if node.op == "output").all_input_nodes
        answer = FLOAT_BYTES * math.prod(made.meta.get("shape") or (1,)) / self.batch
        return max(1, int(MOST_ANSWER_BYTES / answer))

    @property
    def log(self) -> Path:
        """For tracebacks of what a search went on after."""
        return self.models.parent / FAILURES

    @property
    def one_architecture(self) -> bool:
        """Whether all students are made of the teacher: others have nothing of it before they are trained."""
        return len(self.graphs) == 1

    @property
    def recent_baseline(self) -> Measurement:
        """What the baseline took lately: the median, so that one odd measurement is outvoted."""
        last = self.baseline_history[-RECENT_BASELINES:] or [self.baseline.latency_s]
        return sorted(last, key=lambda measurement: measurement.median)[(len(last) - 1) // 2]

    @property
    def teacher_activations(self) -> TeacherActivations:
        """What students that are made of the teacher are reconstructed with."""
        if not self.activations:
            graph = self.graphs[None]
            n = min(self.calibration_inputs, examples_for(graph))
            self.activations.append(TeacherActivations(graph, joined([*self.data.calibration_batches(n, n)])))
        return self.activations[0]

    def graph_of(self, policy: Policy) -> Graph:
        """The network that the policy's student is derived from. Raises UsageError for one that the search does not know."""
        try:
            return self.graphs[policy.student.reference]
        except KeyError:
            known = [reference for reference in self.graphs if reference is not None]
            raise UsageError(
                f"the space draws students of {policy.student.reference!r}, which this search does not know",
                hint=f"name it: --student {policy.student.reference}" + (f" (given: {known[0]})" if known else ""),
            ) from None

    def structure(self, policy: Policy) -> Structure:
        return self.graph_of(policy).structure(policy)

    def changes_shape(self, policy: Policy) -> bool:
        """Whether the student is anything but the teacher itself, in whatever number of bits."""
        return self.structure(policy).shape != self.graphs[None].structure(Policy()).shape

    def write(self, folder: Path, student: fx.GraphModule, policy: Policy) -> Manifest:
        """Export a student of this search as a bundle."""
        with self.ledger.spend("export"):
            return write_bundle(folder, student, policy, self.example, self.provenance)


def affordable_calibration(batch: int, latency_s: float) -> int:
    """Inputs that int8 ranges are fitted to, where a call with `batch` of them takes so long: every int8 network runs them."""
    return min(CALIBRATION_INPUTS, max(FEWEST_EXAMPLES, int(MOST_CALIBRATION_S * batch / latency_s)))
