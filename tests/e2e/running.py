"""A search in the middle of its run, on a fake device, and what it may have measured so far."""

from __future__ import annotations

from autocompress.records import Measurement, Outcome, Score
from autocompress.task import Task

TASK = Task(model="own:net", data="own:blobs", search_time="60s")


def measurement(seconds, p95=None):
    return Measurement(median=seconds, low=seconds, high=seconds, p95=p95 or seconds, n=9)


def trained(findings, policy, latency_s, score=0.95, id="00000", **changes):
    latency = measurement(latency_s)
    made = Outcome(id=id, policy=policy, rung="short", val_score=Score(value=score), latency_s=latency, artifact="a.onnx", size_bytes=9)
    findings.journal.record(made.model_copy(update=changes))
