"""From what a task names to a setting: export and measure the original, and ask it what it knows."""

from __future__ import annotations

import contextlib
import copy
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from autocompress.batch import tensors_of
from autocompress.compress.arithmetic import best_training_device
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import Tick, train
from autocompress.data import Data, Split, sample
from autocompress.demo import BATCH_SIZE, LEARNING_RATE, TEACHER_EPOCHS
from autocompress.errors import PolicyFailure, ScoreFailure, UsageError
from autocompress.export import Provenance, check_parity, weights_bytes, write_bundle
from autocompress.export.fold import fold_norms
from autocompress.graph import Graph
from autocompress.graph.exported import DATA_DEPENDENT
from autocompress.graph.trace import is_opaque
from autocompress.policy import Policy, QuantSpec
from autocompress.records import Measurement, Score
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.setup.loading import TEACHER_WEIGHTS, UNFINISHED_TEACHER, Loaded
from autocompress.setup.setting import Baseline, Setting, affordable_calibration
from autocompress.system.failures import policy_errors
from autocompress.system.run_folder import write_atomically
from autocompress.task import Task
from autocompress.trial.evaluate import model_answers, run_artifact, score_artifact
from autocompress.trial.starting import UNTRAINED

BASELINE = "baseline"
PARITY_EXAMPLES = 16
"""Validation examples on which the original's file is compared with the model."""
LEAST_VALIDATION, MOST_SHARE = 256, 5.0
"""Of validation examples there are at least so many, unless they take so many times the seconds that they should."""


def prepare(task: Task, run: Path, loaded: Loaded) -> Setting:
    """Everything that a search needs, with the baseline's latency measured (its score comes from `score_baseline`).

    Raises UsageError when the model does not run on the device as it is.
    """
    graph, data, models = loaded.graphs[None], loaded.data, run / "models"
    models.mkdir(parents=True, exist_ok=True)
    for left in models.glob(f"{UNTRAINED}*"):  # by a search that was killed
        shutil.rmtree(left, ignore_errors=True)
    provenance = Provenance(
        model=task.model, classes=data.classes, class_names=data.class_names, seed=task.seed, normalisation=data.normalisation
    )
    baseline = _baseline(loaded, models, provenance)
    return Setting(
        data=data,
        # the demonstration's is trained before it is asked
        teacher=_teacher(loaded.teacher if task.is_demo else _folded(graph, loaded.teacher), graph, data, task.seed),
        graphs=loaded.graphs,
        device=loaded.device,
        baseline=baseline,
        calibration_inputs=affordable_calibration(task.batch, baseline.latency_s.median),
        baseline_history=[baseline.latency_s],
        example=loaded.example,
        models=models,
        provenance=provenance,
        learning_rate=task.learning_rate,
        batch_size=task.batch_size,
        seed=task.seed,
    )


def _teacher(model: nn.Module, graph: Graph, data: Data, seed: int) -> Teacher:
    """model: the graph's network, in whatever form answers; where its path depends on the data, its classifier may not be called."""
    classifier = None if graph.module.meta.get(DATA_DEPENDENT) else graph.classifier
    return Teacher(model.to(best_training_device()), data, classifier=classifier, seed=seed)


def _folded(graph: Graph, model: nn.Module) -> nn.Module:
    """The model as it answers soonest: traced, with its norms folded into the layers before them, which saves ResNet-56 a third.

    (`benchmarks/steps.py`)
    """
    if is_opaque(graph.module) or graph.module.meta.get(DATA_DEPENDENT):
        return model
    folded = copy.deepcopy(graph.module)
    fold_norms(folded)
    return folded


def _baseline(loaded: Loaded, models: Path, provenance: Provenance, latency_s: Measurement | None = None) -> Baseline:
    """The original's file, checked; its latency as measured now, unless it is known."""
    data, device, example = loaded.data, loaded.device, loaded.example
    with _about_the_model(provenance.model):
        student = build_student(loaded.graphs[None], Policy())
        manifest = write_bundle(models / BASELINE, student.eval(), Policy(), example, provenance)
        path = models / BASELINE / manifest.artifact
        few, batch = sample(data.val, PARITY_EXAMPLES), len(example)
        actual = run_artifact(device, path, data, few, batch)
        expected = model_answers(loaded.teacher, data, few, batch)
        if not torch.isfinite(expected).all():
            raise PolicyFailure("its own outputs are not finite")
        # all that follows is compared with the file
        check_parity(expected, actual, QuantSpec(), (), decisions=data.decides, is_exact=device.profile.is_exact)
        return Baseline(path=path, latency_s=latency_s or device.measure([path])[0], size_bytes=manifest.size_bytes)


@contextlib.contextmanager
def _about_the_model(reference: str) -> Iterator[None]:
    """What fails one policy fails the task where the policy is the unchanged model."""
    try:
        with policy_errors():
            yield
    except ScoreFailure as error:
        raise UsageError(
            f"{error.message}, of the outputs of {reference}",
            hint="call it by itself: it is given all outputs and all targets of a split, on the CPU",
        ) from None
    except PolicyFailure as error:
        raise UsageError(
            f"{reference} must run on the device as it is, before anything is compressed, but: {error.message}",
            hint="look at what `autocompress inspect` says of it; weights that are NaN and operators that ONNX lacks are the usual reasons",
        ) from None


def score_baseline(setting: Setting, split: Split) -> Score:
    """The original's score of a split, taken from its exported file. Raises UsageError where it has none."""
    with _about_the_model(setting.provenance.model), setting.ledger.spend("score"):
        return score_artifact(setting.device, setting.baseline.path, setting.data, split, setting.batch)


def limit_validation(setting: Setting, seconds: float, examples: int | None = None) -> Setting:
    """The setting with as many validation examples as the original answers in `seconds`, or with `examples` as decided before.

    Every policy of a search is scored on them: a large split run at the deployment batch would leave no time to train.
    """
    if examples is None:
        affordable = seconds * setting.batch / setting.baseline.latency_s.median
        examples = max(FEWEST_EXAMPLES, int(affordable), min(LEAST_VALIDATION, int(MOST_SHARE * affordable)))
        examples = min(examples, setting.most_answers)
    return replace(setting, data=replace(setting.data, val=sample(setting.data.val, examples)))


def train_demo_teacher(setting: Setting, run: Path, seconds: float, tick: Tick) -> Setting:
    """Train the demonstration's network for so long at most, and keep it; the setting with the trained teacher."""
    model, data = setting.teacher.model, setting.data
    steps = TEACHER_EPOCHS * (len(data.train) // BATCH_SIZE)
    deadline = time.monotonic() + seconds
    torch.manual_seed(setting.seed)
    plan = TrainPlan(steps, deadline, LEARNING_RATE, BATCH_SIZE, seed=setting.seed)
    with setting.ledger.spend("train"):
        train(model, data, plan, tick=tick)
    write_atomically(run / (TEACHER_WEIGHTS if time.monotonic() < deadline else UNFINISHED_TEACHER), weights_bytes(model))
    graph = Graph.trace(model.cpu(), tensors_of(setting.example))
    loaded = Loaded(setting.device, data, model, {**setting.graphs, None: graph}, setting.example)
    known = setting.baseline.latency_s  # of the same network with other weights
    return replace(
        setting,
        teacher=_teacher(_folded(graph, model), graph, data, setting.seed),
        graphs=loaded.graphs,
        baseline=_baseline(loaded, setting.models, setting.provenance, known),
        activations=[],
    )
