"""The beginning of a search: what the device and the original are like, and whether the budget can be met at all."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace

import torch

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.feasibility import Feasibility
from autocompress.candidates.pool import draw_pool
from autocompress.candidates.proposals import Proposal
from autocompress.controller.findings import Findings
from autocompress.data import sample
from autocompress.errors import PolicyFailure
from autocompress.policy import Policy
from autocompress.ranking.front import measured
from autocompress.records import Score
from autocompress.report.view import format_score
from autocompress.schedule import pool_seconds, profiling_seconds, reserve_seconds, teacher_seconds, validation_seconds
from autocompress.setup.loading import kept_teacher
from autocompress.setup.setting import Setting
from autocompress.study.notes import Note
from autocompress.task import Task
from autocompress.trial.evaluate import run_artifact, score_outputs
from autocompress.trial.preparation import limit_validation, score_baseline, train_demo_teacher

MOST_OF_TRAIN = 1000
"""Training examples that the original is scored on, at most: enough to tell whether it knows validation examples less well."""
FEWEST_OF_TRAIN = 100
"""And at least: fewer tell nothing (`scores.knows_validation_like_training`), and those of a slow model take long."""
DOUBTED = 256
"""Validation examples that tell whether a score of the user's own goes the right way."""
FEWEST_DOUBTED = 16
DEMO_TEACHER_SHARE = 0.4
"""Of the time that is left, at most: a quick machine trains it to the end in less, and all else is worthless on a slow
one where it has not learned."""
GUESSING = 0.05
"""Share of the way from guessing to no error: an original that has not gone so far looks untrained, which is told."""


def learn_latencies(findings: Findings, *, ahead: bool) -> None:
    """Learn to predict latency from what a resumed search had measured, and where much is still to be predicted by measuring ahead."""
    forecast = findings.forecast
    if ahead or not len(forecast.model.table):
        measure_ahead(forecast, profiling_seconds(findings.clock), findings.task.seed, findings.show)
    else:
        forecast.note(Policy(), 1.0)
    findings.adopt_drifted_baseline()
    forecast.learn(measured(findings.journal.outcomes))


def propose(findings: Findings) -> list[Proposal]:
    """Policies to begin with, and to fall back on; raises InfeasibleBudget when none can meet the budget."""
    findings.show("choosing first policies")
    pool = draw_pool(findings.forecast, findings.task.seed + findings.journal.asked, pool_seconds(findings.clock))
    if findings.best is None:
        Feasibility(findings.forecast).require_feasible(pool)
    return pool


def train_teacher_of_demo(findings: Findings) -> None:
    """The demonstration's original learns only now, when the budget is known to be within reach."""
    if kept_teacher(findings.task, findings.run, begun=findings.journal.has_begun) is not None:
        return
    tick = findings.percent("training the demonstration teacher")
    seconds = DEMO_TEACHER_SHARE * findings.clock.left
    findings.setting = train_demo_teacher(findings.setting, findings.run, seconds, tick)
    findings.record_baseline(findings.setting.baseline)


def know_baseline(findings: Findings) -> None:
    """The original's validation score; how many examples validate a policy, and how much time the end of the search needs."""
    whole = len(findings.setting.data.val)
    findings.setting = limit_validation(findings.setting, validation_seconds(findings.clock), findings.journal.noted(Note.VAL_EXAMPLES))
    data = findings.setting.data
    findings.journal.note(Note.VAL_EXAMPLES, len(data.val))
    if len(data.val) < whole:
        findings.progress.message(f"validating on {len(data.val)} of {whole} examples: all would take too much time or memory")
    score = _score_original(findings)
    guess = 1 / data.classes if data.classes and data.decides else 0.0
    if data.score is None and score.value < guess + GUESSING * (1 - guess):
        findings.progress.message(f"the original scores {100 * score.value:.1f} %, hardly more than guessing: {_cure(findings.task)}")
    clock, latency, tail = findings.clock, findings.setting.baseline.latency_s.median, findings.limits.p95_s is not None
    findings.clock = clock.with_reserve(reserve_seconds(clock.total, findings.per_example_s, len(data.test), latency, tail=tail))


def _score_original(findings: Findings) -> Score:
    """Its validation score, and beside that its score of training examples where there are enough to compare; known after a first time."""
    setting, data, before = findings.setting, findings.setting.data, findings.setting.baseline
    known = findings.journal.noted(Note.PER_EXAMPLE_S)
    if known is not None and before.val_score is not None and before.val_score.n == len(data.val):
        findings.per_example_s = known
        return before.val_score
    findings.show("scoring the original")
    started = time.monotonic()
    score = score_baseline(setting, data.val)
    took = time.monotonic() - started
    findings.per_example_s = max((took - _first_answer_s(setting)) / len(data.val), setting.baseline.latency_s.median / setting.batch)
    findings.journal.note(Note.PER_EXAMPLE_S, findings.per_example_s)
    if data.score is not None:
        _doubt_score(findings)
    examples = min(len(data.val), MOST_OF_TRAIN)
    of_train = score_baseline(setting, sample(data.train, examples)) if examples >= FEWEST_OF_TRAIN else None
    findings.record_baseline(replace(setting.baseline, val_score=score, train_score=of_train))
    return score


def _doubt_score(findings: Findings) -> None:
    """Tell where answers that are given to the wrong examples score as well as the right ones: a search would go the wrong way."""
    setting, data, few = findings.setting, findings.setting.data, sample(findings.setting.data.val, DOUBTED)
    if len(few) < FEWEST_DOUBTED:
        return
    with suppress(PolicyFailure), setting.ledger.spend("score"):  # of so few a score may have no value
        outputs = run_artifact(setting.device, setting.baseline.path, data, few, setting.batch)
        others = outputs[torch.randperm(len(outputs), generator=torch.Generator().manual_seed(0))]
        right, wrong = (score_outputs(answers, few.targets, data) for answers in (outputs, others))
        if wrong.gain >= right.gain:
            findings.progress.message(
                f"the original's answers to {len(few)} examples score {right.name} {format_score(right)}, and no worse, "
                f"{format_score(wrong)}, where they are given to each other's examples: check score_direction (it is "
                f"{right.direction!r}), and that targets belong to their inputs"
            )


def _first_answer_s(setting: Setting) -> float:
    """What it takes to start the runtime and to answer one batch, beside which a small network's other answers take no time."""
    started = time.monotonic()
    with suppress(PolicyFailure), setting.ledger.spend("score"):
        run_artifact(setting.device, setting.baseline.path, setting.data, sample(setting.data.val, setting.batch), setting.batch)
    return time.monotonic() - started


def _cure(task: Task) -> str:
    """What may help an original that looks untrained."""
    if task.is_demo:
        return "search longer (--search-time)"
    if task.weights:
        return "check that the data has the mean and std of its training, and its order of classes (of folders: by name)"
    return (
        "give its trained weights (--weights FILE; or of torchvision and timm NAME?pretrained=true), and the data the mean and std of its "
        "training, and its order of classes"
    )


def ask_teacher(findings: Findings) -> None:
    """Answer the training data ahead, so that no student pays for what the others read."""
    seconds = teacher_seconds(findings.clock)
    with findings.setting.ledger.spend("teach"):
        findings.setting.teacher.prepare(seconds, lambda done, total: findings.show("asking the teacher", done, total))
