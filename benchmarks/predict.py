"""How fast rung 0 is: policies a second, on one core, without asking the device.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/predict.py

For ResNet-20 and ResNet-56 of CIFAR-10, in the default space and with every layer for itself: losses and latencies of random policies as
sums over dimensions around the unchanged network (`knapsack`), the whole latency model and all else that is known of a policy's shape
(`Forecast.proposals`), and the best policy for one budget, solved to the end (`Sensitivity.best`). Writes
benchmarks/results/predict.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.knapsack import Knapsack
from autocompress.candidates.sensitivity import Sensitivity
from autocompress.devices import open_device
from autocompress.search_space import find_suggest
from autocompress.setup.loading import load
from autocompress.suggesters import LevelSuggester
from autocompress.task import load_task
from autocompress.trial.preparation import prepare

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S = 10.0
RANDOM, DRAWN, BUDGETS, REPEATS = 200_000, 512, 4, 5
CASES = [("resnet20", "default"), ("resnet20", "per_layer"), ("resnet56", "default"), ("resnet56", "per_layer")]


def seconds(work: Callable[[], Any]) -> float:
    """Median of REPEATS runs."""
    taken = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def measured(model: str, space: str) -> dict[str, Any]:
    """Rates of one model in one space."""
    weights = cifar10.folder() / "cifar10_resnets" / f"{model}.safetensors"
    task = load_task(
        None, {"model": f"{cifar10.__file__}:{model}", "data": f"{cifar10.__file__}:data", "weights": str(weights), "budget": ("0.5x",)}
    )
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(task, Path(folder), load(task))
        forecast = Forecast.start(setting, find_suggest(space, setting.graphs[None], setting.device.profile), task.limits)
        measure_ahead(forecast, CALIBRATION_S, 0, lambda phase, done, total: None)
        sensitivity = Sensitivity(forecast, lambda policy: None)
        base = sensitivity.base
        costs = [np.array([[single.proposal.latency_s - base.latency_s] for single in singles]) for singles in sensitivity.singles]
        table = Knapsack(sensitivity.losses(), costs)
        choices = np.stack([generator.integers(len(values), size=RANDOM) for values in table.losses], axis=1)
        suggesters = [LevelSuggester(generator) for _ in range(DRAWN)]
        policies = [forecast.suggest(suggester) for suggester in suggesters]
        params = [suggester.params for suggester in suggesters]
        forecast.proposals(policies, params)
        started = time.perf_counter()
        assert [*sensitivity.best(BUDGETS)]
        solution_s = (time.perf_counter() - started) / BUDGETS
        return {
            "model": model,
            "space": space,
            "dimensions": len(table.losses),
            "values": sum(map(len, table.losses)),
            "sums_per_s": RANDOM / seconds(lambda: table.totals(choices)),
            "proposals_per_s": DRAWN / seconds(lambda: forecast.proposals(policies, params)),
            "solution_s": solution_s,
        }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| | dimensions | losses and latencies added up | with the whole latency model | the best policy for a budget |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']}, {row['space']} | {row['dimensions']} | {row['sums_per_s']:,.0f} / s | {row['proposals_per_s']:,.0f} / s "
        f"| {row['solution_s']:.1f} s |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all cases."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [measured(*case) for case in CASES]
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "predict.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    (RESULTS / "predict.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
