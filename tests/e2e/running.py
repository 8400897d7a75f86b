"""A search in the middle of its run, on a fake device, and what it may have measured so far."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from tasks import SLOW_CALLS

from autocompress.policy import Policy, QuantSpec
from autocompress.records import Measurement, Outcome, Score
from autocompress.setup.loading import load
from autocompress.study.database import DATABASE, DISTILLATIONS, STUDY
from autocompress.study.journal import Journal
from autocompress.task import Task
from autocompress.testing.devices import FakeDevice
from autocompress.trial.preparation import prepare

TASK = Task(model="own:net", data="own:blobs", search_time="60s")
INT8 = Policy(quant=QuantSpec(bits=8))


def ready(net, data, run, device=None):
    """A setting, on a fake device where nothing else is said."""
    return prepare(TASK, run, load(TASK, model=net, data=data, device=device or FakeDevice(SLOW_CALLS)))


def measurement(seconds, p95=None):
    return Measurement(median=seconds, low=seconds, high=seconds, p95=p95 or seconds, n=9)


def trained(findings, policy, latency_s, score=0.95, id="00000", **changes):
    latency = measurement(latency_s)
    made = Outcome(id=id, policy=policy, rung="short", val_score=Score(value=score), latency_s=latency, artifact="a.onnx", size_bytes=9)
    findings.journal.record(made.model_copy(update=changes))


def journal_of(run: Path) -> Journal:
    storage = f"sqlite:///{run / DATABASE}"
    return Journal(*(optuna.load_study(study_name=name, storage=storage) for name in (STUDY, DISTILLATIONS)))


def short_runs_only(patch: pytest.MonkeyPatch) -> None:
    """Policies train for a second each, as long as the search takes: what ends it is what a test is about, not the machine's load."""
    patch.setattr("autocompress.schedule.SHORT_SHARE", 0.9)
    patch.setattr("autocompress.schedule.SHORT_RUNS", 100)
    patch.setattr("autocompress.controller.pace.Pace.overhead", lambda self: 0.2)
    patch.setattr("autocompress.controller.rungs.Rungs.full_rung", lambda self: None)


def appraised(findings, proposals):
    return [findings.appraisals.appraise(proposal) for proposal in proposals]
