"""One policy, from recipe to measured artifact: compress, train, export, check, score, measure.

A policy that cannot become an artifact gives an Outcome with a failure; it never ends the search.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, fx

from autocompress.batch import call_network
from autocompress.budget import Budget
from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.memory import bounded_memory
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.train import Tick, train, train_quantized
from autocompress.data import sampled
from autocompress.devices.base import identity
from autocompress.errors import PolicyFailure
from autocompress.export import BUNDLE, check_onnx, check_parity, load_student, read_manifest
from autocompress.graph.nodes import follows_batch
from autocompress.policy import Policy
from autocompress.records import Attempt, Failure, FailureStage, Outcome, Parity, Prediction, Rung, Score
from autocompress.setup.setting import Setting
from autocompress.system.failures import at_most, policy_errors
from autocompress.system.run_folder import writing
from autocompress.trial.beside_baseline import believable, measure_beside_baseline, measure_within
from autocompress.trial.evaluate import model_answers, run_artifact, score_outputs
from autocompress.trial.starting import FLOAT_WEIGHTS, interrupted_weights, keep_for_further_training, keep_interrupted, start_student

LEAST_RECONSTRUCTION_S = 10.0
"""A student's reconstruction may take as long as its training, and so long in any case: half reconstructed it would be worth little."""
PARITY_INPUTS = 1000
"""Inputs for which a file must answer as its student: enough to tell 0.5 %; all of them take as long as a tenth of the training."""
PARITY_BYTES = 2**26
"""Of the inputs that the student answers at once: what it computes of them takes tens of times as much."""
NO_LIMITS = Budget()
LATE_S = 600.0
"""Beyond its time a policy's training may go on, at least: one step may be long, but one that never ends is given up."""
PROBED_STEPS = 3
"""Of training, before the first policy tells what a step takes; the first loads kernels."""


def evaluate_policy(
    setting: Setting,
    attempt: Attempt,
    *,
    seconds: float,
    latest: float = math.inf,
    limits: Budget = NO_LIMITS,
    continues: str | None = None,
    tick: Tick | None = None,
) -> Outcome:
    """Turn a policy into an artifact with a validation score and a measurement, or into a failure.

    Args:
        seconds: of training, once the student is reconstructed; export, scoring and measuring come after it.
        latest: `time.monotonic()` at which training ends in any case.
        limits: the budget that measuring must tell of.
        continues: id of a lower rung of the same policy, whose float weights are the start.
    """
    started = time.monotonic()
    policy, folder = attempt.policy, setting.models / attempt.id
    stage: FailureStage = "compress"
    training_s, steps, reached = 0.0, 0, 0.0

    def count(progress: float) -> None:
        nonlocal steps, reached
        steps = steps + 1 if progress >= reached else 1  # training that diverged begins again
        reached = progress
        if tick is not None:
            tick(progress)

    shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted, perhaps of another policy
    try:
        with policy_errors(setting.log):
            student = build_student(setting.graph_of(policy), policy)
            stage = "train"
            with bounded_memory():
                start_student(setting, student, policy, continues, until=min(latest, started + max(LEAST_RECONSTRUCTION_S, seconds)))
            begun = time.monotonic()
            with setting.ledger.spend("train"), at_most(seconds + max(LATE_S, seconds), "training"), bounded_memory():
                student = _trained(setting, student, policy, attempt.rung, min(latest, begun + seconds), count)
            trained = time.monotonic()
            training_s = trained - begun
            stage = "export"
            manifest = setting.write(folder, student, policy)
            path = folder / manifest.artifact
            stage = "check"
            outputs, parity = check_artifact(setting, student, path, policy)
            with at_most(LATE_S, "scoring"):
                score = score_outputs(outputs, setting.data.val.targets, setting.data)
            stage = "measure"
            latency = measure_within(limits, setting, path, manifest.size_bytes, attempt.predicted_latency_s)
    except PolicyFailure as error:
        if stage != "measure":  # what was trained in vain else: the device may do it the next time
            interrupted_weights(setting, policy).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        failure = Failure(stage=stage, reason=error.message)
        return Outcome(**dict(attempt), failure=failure, seconds=time.monotonic() - started, training_s=training_s)
    keep_for_further_training(setting, policy, folder)
    return Outcome(
        **dict(attempt),
        val_score=score,
        latency_s=latency,
        size_bytes=manifest.size_bytes,
        artifact=f"models/{attempt.id}/{manifest.artifact}",
        parity=parity,
        seconds=time.monotonic() - started,
        training_s=training_s,
        steps=steps,
        finishing_s=time.monotonic() - trained,
    )


def evaluate_again(setting: Setting, outcome: Outcome, bundle: Path, *, predicted: Prediction | None = None) -> Outcome:
    """The outcome of another search as this one finds it: its file measured here, and scored unless this device has scored it so already.

    Args:
        bundle: the folder of that search which holds the file, intact; it is copied, what its training goes on from included.

    Raises PolicyFailure where the file does not work here, UsageError where it is no sound ONNX file.
    """
    folder = setting.models / outcome.id
    shutil.rmtree(folder, ignore_errors=True)
    with writing(folder):
        folder.mkdir(parents=True)
        for name in (*BUNDLE, FLOAT_WEIGHTS):  # and nothing else that somebody may have put there
            if (bundle / name).is_file():
                shutil.copyfile(bundle / name, folder / name)
    path = folder / read_manifest(folder).artifact
    try:
        check_onnx(path)  # somebody else may have made it
        with policy_errors(setting.log):
            score, parity = _scored_again(setting, outcome, path)
            _, latency = measure_beside_baseline(setting, [path])
            latency = believable(latency, predicted)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    found = {"val_score": score, "parity": parity, "latency_s": latency, "predicted_latency_s": predicted}
    return outcome.model_copy(update=found | {"test_score": None, "search_latency_s": None})


def _scored_again(setting: Setting, outcome: Outcome, path: Path) -> tuple[Score, Parity | None]:
    """What this device's runtime makes of a file on the validation split; what is known already where it has scored it so."""
    score, policy = outcome.val_score, outcome.policy
    if score is not None and score.n == len(setting.data.val) and _is_of_this_device(setting, outcome):
        return score, outcome.parity
    student = load_student(path.parent, setting.graph_of(policy), policy)
    outputs, parity = check_artifact(setting, student, path, policy)
    return score_outputs(outputs, setting.data.val.targets, setting.data), parity


def _is_of_this_device(setting: Setting, outcome: Outcome) -> bool:
    """Whether the outcome's file was run by the same runtime on the same processor."""
    return outcome.latency_s is not None and identity(outcome.latency_s.environment) == identity(setting.device.environment())


def training_step_seconds(setting: Setting, until: float) -> float:
    """What a step of training takes the unchanged network in float32, from a few; 0 where it cannot be trained.

    until: `time.monotonic()` after which no other step begins, however slow the first one was.
    """
    moments = [time.monotonic()]
    graph, plan = setting.graphs[None], TrainPlan(PROBED_STEPS, deadline=until, batch_size=setting.batch_size, seed=setting.seed)
    distillation = _distillation(setting, Policy())
    with suppress(PolicyFailure), policy_errors(setting.log), setting.ledger.spend("train"):
        student = build_student(graph, Policy())
        moments = [time.monotonic()]
        train(student, setting.data, plan, distillation=distillation, tick=lambda _: moments.append(time.monotonic()))
    return min((after - before for before, after in itertools.pairwise(moments)), default=0.0)


def _trained(setting: Setting, student: fx.GraphModule, policy: Policy, rung: Rung, deadline: float, tick: Tick) -> fx.GraphModule:
    """Train a student of another shape; the teacher in fewer bits is calibrated first, and trained through them on the full rung."""
    reshaped = setting.changes_shape(policy)
    needs_training = reshaped or (rung == "full" and policy.quant.rounds)
    plan = TrainPlan(
        steps=10**9 if needs_training else 0,
        deadline=deadline if needs_training else math.inf,
        learning_rate=setting.learning_rate,
        batch_size=setting.batch_size,
        seed=setting.seed,
        calibration_inputs=setting.calibration_inputs,
        quant_fraction=TrainPlan.quant_fraction if reshaped else 1.0,
        to_learn=setting.teacher.distance(student, min(setting.calibration_inputs, setting.most_answers)) if needs_training else 0.0,
    )
    distillation = _distillation(setting, policy)

    def keep() -> None:
        if needs_training:
            keep_interrupted(setting, student, policy)

    try:
        trained = train_quantized(student, policy.quant, setting.data, plan, distillation=distillation, tick=tick, keep=keep)
    except BaseException as error:
        if isinstance(error, OSError) or not isinstance(error, Exception):  # it ends the search: who resumes it goes on from here
            keep()
        raise
    keep()  # until it is measured: the device may be gone before that
    return trained


def _distillation(setting: Setting, policy: Policy) -> Distillation:
    """Of answers and of features; a loss of one's own has a unit of its own, beside which features have no known weight."""
    features = compared_features(setting.graph_of(policy), policy, setting.graphs[None]) if setting.data.loss is None else None
    return Distillation(setting.teacher, policy.distill, features)


def check_artifact(setting: Setting, student: fx.GraphModule, path: Path, policy: Policy) -> tuple[Tensor, Parity]:
    """Outputs of the exported file on the validation split. Raises PolicyFailure unless they are the student's on PARITY_INPUTS of them."""
    with setting.ledger.spend("score"):
        outputs = run_artifact(setting.device, path, setting.data, setting.data.val, setting.batch)
        rows, expected = _some_answers(student, setting)
    layers = [layer.name for layer in setting.graph_of(policy).layers]
    decisions, is_exact = setting.data.decides, setting.device.profile.is_exact
    return outputs, check_parity(expected, outputs[rows], policy.quant, layers, decisions=decisions, is_exact=is_exact)


@torch.inference_mode()
def _some_answers(student: fx.GraphModule, setting: Setting) -> tuple[Tensor, Tensor]:
    """(rows of the validation split, what the student answers of them)."""
    data = setting.data
    if any(follows_batch(module) for module in student.modules()):  # then the file's batches give other answers than larger ones
        return torch.arange(len(data.val)), model_answers(student, data, data.val, setting.batch)
    rows = sampled(len(data.val), min(PARITY_INPUTS, setting.most_answers))
    size = data.at_most(setting.batch_size, PARITY_BYTES)
    return rows, torch.cat([call_network(student, inputs).float() for inputs, _ in data.batches(data.val[rows], size)])
