"""Build the latency table of a device for one model's search space, and say how far it can be trusted."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from autocompress.errors import PolicyFailure
from autocompress.latency import FittedLatencyModel, OperatorTable
from autocompress.objective import Setting, untrained
from autocompress.policy import Policy
from autocompress.preparation import prepare
from autocompress.progress import Progress
from autocompress.proposals import LevelSuggester
from autocompress.records import Workload
from autocompress.search_space import find_suggest
from autocompress.task import Task

POLICIES = 64
NETWORKS = 7


def calibrate(task: Task, seconds: float, progress: Progress) -> dict[str, Any]:
    """Measure operators for half of `seconds`, then whole untrained networks; the table stays in the user's cache.

    Returns the error of the latency model on networks that it was not fitted to (leave one out).
    """
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        setting = prepare(task, Path(folder))
        suggest = find_suggest(task.space, setting.graphs[task.student], setting.device.profile, reference=task.student)
        generator = np.random.default_rng(task.seed)
        policies = [Policy(), *(suggest(LevelSuggester(generator)) for _ in range(POLICIES))]
        workloads = [setting.graph_of(policy).workload(policy) for policy in policies]
        table = OperatorTable.for_device(setting.device)

        def tick(done: int, total: int) -> None:
            progress.update(phase="measuring operators", done=done, total=total, best="", seconds_left=None)

        deadline = time.monotonic() + seconds
        table.calibrate(setting.device, workloads, 0.5 * seconds, tick)
        model = FittedLatencyModel(table)
        pairs = _whole_networks(setting, list(zip(policies, workloads, strict=True)), model, deadline, progress)
        model.fit(pairs)
    return {"device": setting.device.name, "networks": len(pairs), "held_out": model.held_out_error()}


def _whole_networks(
    setting: Setting,
    candidates: list[tuple[Policy, Workload]],
    model: FittedLatencyModel,
    deadline: float,
    progress: Progress,
) -> list[tuple[Workload, float]]:
    """Measured latency (s) of candidates spread over the predicted latencies; at least two, then until the deadline."""
    pairs = [(candidates[0][1], setting.baseline.latency_s.median)]
    by_latency = sorted(candidates, key=lambda candidate: model.predict(candidate[1]).value)
    positions = np.linspace(0, len(by_latency) - 1, NETWORKS).round().astype(int)
    for done, position in enumerate(positions):
        if time.monotonic() > deadline and done >= 2:
            break
        progress.update(phase="measuring whole networks", done=done, total=NETWORKS, best="", seconds_left=None)
        policy, workload = by_latency[position]
        folder = setting.models / f"calibration-{done}"
        try:
            student = untrained(setting, policy)
            artifact = setting.write(folder, student, policy)
            latency = setting.device.measure([folder / artifact.path])[0]
        except PolicyFailure as failure:
            progress.message(f"left out: {failure.message}")
            continue
        pairs.append((workload, latency.median))
    return pairs
