"""Build the latency table of a device for one model's search space, and say how far it can be trusted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.forecast import Forecast
from autocompress.search_space import suggest_of
from autocompress.setup.loading import load
from autocompress.system.progress import Progress, counting
from autocompress.task import Task
from autocompress.trial.preparation import prepare

NETWORKS = 32
"""Whole networks at most: a search has time for a few, who calibrates wants to know what predictions are worth."""


def calibrate(task: Task, seconds: float, progress: Progress) -> dict[str, Any]:
    """Measure operators for half of `seconds`, then whole untrained networks; the table stays in the user's cache.

    Returns the error of the latency model on networks that it was not fitted to (leave one out).
    """
    task, tick = task.absolute(), counting(progress)
    with tempfile.TemporaryDirectory(prefix="autocompress-") as folder:
        setting = prepare(task, Path(folder) / "run", load(task, tick=tick))
        suggest = suggest_of(task, setting.graphs, setting.device.profile)
        forecast = Forecast.start(setting, suggest, task.limits)
        measure_ahead(forecast, seconds, task.seed, tick, networks=NETWORKS)
    held_out = forecast.model.held_out_error().model_dump(mode="json")
    return {"device": setting.device.name, "networks": len(forecast.networks), "held_out": held_out}
