"""Which of the demonstration's networks a search compresses: on a fast processor a wide one, so that the budget binds."""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path

import torch

from autocompress.compress.student import build_student
from autocompress.demo import WIDTHS, DigitReader
from autocompress.devices import open_device
from autocompress.devices.base import Device
from autocompress.errors import PolicyFailure
from autocompress.export.onnx import onnx_bytes
from autocompress.graph import Graph
from autocompress.policy import Policy
from autocompress.references import DEMO
from autocompress.task import DEMO_MODEL, TASK_FILE, Task, load_task

TIMES_BUDGET = 2.0
"""How much longer than the budget the original should take."""
MEASURE_S = 0.2


def of_fitting_size(task: Task, before: Path | str | None, device: Device | None = None) -> Task:
    """The task; the demonstration with the network that has to be compressed to meet a budget in seconds on this device.

    before: folder of the search that is resumed, or learned from: then with the network that it had.
    """
    if task.model != DEMO_MODEL:
        return task
    if before is not None:
        kept = Path(before) / TASK_FILE
        known = load_task(kept, {}) if kept.is_file() else task
        return task.model_copy(update={"model": known.model}) if known.is_demo else task
    limit_s = task.limits.latency_s or task.limits.p95_s
    if limit_s is None:
        return task
    return task.model_copy(update={"model": reference_for(device or open_device(task.device), limit_s, task.batch)})


def reference_for(device: Device, limit_s: float, batch: int) -> str:
    """Reference to the narrowest network that takes TIMES_BUDGET times `limit_s` (seconds) on the device; to the widest where none does."""
    example = (torch.zeros(batch, 1, 8, 8),)

    def seconds(widths: tuple[int, ...]) -> float:
        network = build_student(Graph.trace(DigitReader(widths).eval(), example), Policy())
        with suppress(PolicyFailure):  # why it cannot be measured the search tells
            return device.measure_many([onnx_bytes(network, Policy().quant, example)], seconds_each=MEASURE_S)[0] or math.inf
        return math.inf

    slow = (name for name, widths in WIDTHS.items() if seconds(widths) >= TIMES_BUDGET * limit_s)
    return DEMO + next(slow, [*WIDTHS][-1])
