"""How well latencies are predicted: random joint policies that the calibration never saw, exported and measured.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/latency_truth.py resnet56 --device onnxruntime:cpu?threads=1

Calibrates as `autocompress calibrate --time 5m` does, draws POLICIES of the space `per_layer` (blocks dropped, widths, channels, bits, each
layer for itself) with no more multiplications than the original, predicts each, exports it, and measures its file beside the original's,
twice, in two processes. What is compared is the ratio to the original beside it, since machines are slow now and then. Beside our
prediction: that of the same model as a search has it, fitted again to each network once it was measured; the second measurement as a
prediction of the first, which no model can do better than; and two simpler predictions, each scaled on the networks of the calibration:
multiplications, and the plain sum of the operator table. Weights of torchvision's networks are random, and so are their inputs: what an
operator takes does not depend on them. Writes benchmarks/results/latency_truth_MODEL_RUNTIME.json, and latency_truth.md of all that are
there.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress import Data, Split
from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.forecast import UNTRAINED_SECONDS_EACH, Forecast
from autocompress.commands.calibrate import NETWORKS
from autocompress.errors import PolicyFailure
from autocompress.models import load_weights
from autocompress.policy import Policy, PruneSpec, QuantSpec
from autocompress.ranking.ranks import rank_correlation
from autocompress.schedule import FEWEST_EXAMPLES
from autocompress.search_space import find_suggest, for_device
from autocompress.setup.loading import load
from autocompress.suggesters import LevelSuggester
from autocompress.system.failures import policy_errors
from autocompress.task import Task
from autocompress.trial.preparation import prepare
from autocompress.trial.starting import untrained_student
from autocompress.workload import Workload

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S, POLICIES, REFITTED_AT = 300.0, 100, 5
"""A search fits its model again with each measurement; here after every few, for time."""
SEED = 1
NEAR = 0.10
"""nn-Meter's criterion: the share of networks whose error is at most this (Zhang et al. 2021, MobiSys)."""
MODELS = ("resnet56", "resnet18", "mobilenet_v2", "vit_b_16")


@dataclass(frozen=True)
class Case:
    """A network with data of its shape."""

    model: nn.Module
    data: Data


def case(name: str) -> Case:
    if name == "resnet56":
        model = cifar10.resnet56()
        load_weights(model, cifar10.folder() / "cifar10_resnets" / "resnet56.safetensors")
        return Case(model, cifar10.data())
    torch.manual_seed(0)
    split = Split(torch.randn(64, 3, 224, 224), torch.arange(64))
    return Case(torchvision.models.get_model(name), Data(split, split, split, classes=1000))


@dataclass(frozen=True)
class Row:
    """One policy: what was predicted of it and what it took, all in units of what the original took beside it or is predicted to take."""

    macs: int
    fitted: float
    low: float
    high: float
    refitted: float
    table: float
    measured: float
    again: float


class Truth:
    """A calibrated latency model, and what it is worth."""

    def __init__(self, task: Task, given: Case, folder: Path) -> None:
        self.setting = prepare(task, folder, load(task, model=given.model, data=given.data))
        suggest = find_suggest("per_layer", self.setting.graphs[None], self.setting.device.profile)
        self.forecast = Forecast.start(self.setting, suggest, task.limits)
        started = time.monotonic()
        measure_ahead(self.forecast, CALIBRATION_S, 0, _say, networks=NETWORKS)
        self.calibration_s = time.monotonic() - started
        self.calibrated = copy.copy(self.forecast.model)
        self.seen = dict(self.forecast.networks)

    def draws(self, n: int) -> list[Policy]:
        """Policies whose networks were not measured, with no more multiplications than the original."""
        generator, most, found = np.random.default_rng(SEED), self.forecast.teacher_workload.macs, []
        while len(found) < n:
            policy = self.forecast.suggest(LevelSuggester(generator))
            if self.forecast.structure(policy) not in self.seen and self.forecast.workload(policy).macs <= most:
                found.append(policy)
        return found

    def row(self, policy: Policy) -> Row | None:
        """None where the policy cannot become a file."""
        workload, usual = self.forecast.workload(policy), self.forecast.recent_baseline_s
        fitted, refitted = self.calibrated.predict(workload), self.forecast.predict(policy).value
        try:
            first, second = self.measured(policy)
        except PolicyFailure as error:
            print(f"left out: {error.message}", flush=True)
            return None
        self.forecast.networks[self.forecast.structure(policy)] = (workload, first)
        of_original = [value / usual for value in (fitted.value, fitted.low, fitted.high, refitted)]
        return Row(workload.macs, *of_original, self.by_table(workload), first, second)

    def measured(self, policy: Policy) -> list[float]:
        """What the policy's file takes in units of the original beside it, twice."""
        with tempfile.TemporaryDirectory(dir=self.setting.models) as name, policy_errors():
            folder = Path(name)
            manifest = self.setting.write(folder, untrained_student(self.setting, policy, calibration_inputs=FEWEST_EXAMPLES), policy)
            paths = [self.setting.baseline.path, folder / manifest.artifact]
            pairs = [self.setting.device.measure(paths, seconds_each=UNTRAINED_SECONDS_EACH) for _ in range(2)]
            return [own.median / original.median for original, own in pairs]

    def by_table(self, workload: Workload) -> float:
        table = self.calibrated.table
        return table.call_overhead + sum(table.estimate(operator) for operator in workload.operators)

    def scale(self, of: Sequence[float], to: Sequence[float]) -> float:
        """The factor with least relative error over the networks of the calibration."""
        ratio = np.array(of) / np.array(to)
        return float(ratio.sum() / np.square(ratio).sum())

    def result(self, rows: Sequence[Row]) -> dict[str, Any]:
        known = list(self.seen.values())
        targets = [originals for _, originals in known]
        macs = self.scale([workload.macs for workload, _ in known], targets)
        table = self.scale([self.by_table(workload) for workload, _ in known], targets)
        measured = np.array([row.measured for row in rows])
        return {
            "policies": len(rows), "calibration_s": self.calibration_s, "calibrated_on": len(known),
            "latency_of_original_s": self.forecast.recent_baseline_s,
            "measured": [float(measured.min()), float(np.median(measured)), float(measured.max())],
            "covered": float(np.mean([row.low <= row.measured <= row.high for row in rows])),
            "calibrated": errors([row.fitted for row in rows], measured), "refitted": errors([row.refitted for row in rows], measured),
            "measured again": errors([row.again for row in rows], measured),
            "multiplications": errors([macs * row.macs for row in rows], measured),
            "plain table": errors([table * row.table for row in rows], measured),
        }  # fmt: skip

    def staircase(self) -> dict[str, float]:
        """Int8 at three quarters of the channels inside blocks, beside int8 as it is: a known trap, since 48 channels run as 64 do."""
        inside = [group.name for group in self.setting.graphs[None].groups if group.prunable and not group.stream]
        whole, narrow = (
            for_device(Policy(quant=QuantSpec(bits=8), prune=PruneSpec(ratios=dict.fromkeys(inside, ratio))), self.setting.device.profile)
            for ratio in (0.0, 0.25)
        )
        predicted = [self.calibrated.predict(self.forecast.workload(policy)).value for policy in (narrow, whole)]
        taken = [self.measured(policy)[0] for policy in (narrow, whole)]
        return {"predicted": predicted[0] / predicted[1], "measured": taken[0] / taken[1]}


def errors(predicted: Sequence[float], measured: NDArray[np.float64]) -> dict[str, float]:
    """Relative errors: median and share within NEAR; and Spearman's rank correlation."""
    error = np.abs(np.array(predicted) / measured - 1)
    return {
        "median_error": float(np.median(error)), "within_10_percent": float(np.mean(error <= NEAR)),
        "spearman": float(rank_correlation(list(predicted), measured.tolist()) or 0.0),
    }  # fmt: skip


def _say(phase: str, done: int, total: int) -> None:
    if done % 50 == 0 or total < 50:
        print(f"{phase} {done}/{total}", flush=True)


def table() -> str:
    """Markdown, of all results that are there."""
    shown = ("calibrated", "refitted", "measured again", "plain table", "multiplications")
    lines = [f"| | {' | '.join(shown)} | in the 90 % interval |", "|---" * (len(shown) + 2) + "|"]
    for path in sorted(RESULTS.glob("latency_truth_*.json")):
        result = json.loads(path.read_text())
        cells = [
            f"{100 * r['median_error']:.1f} %, {100 * r['within_10_percent']:.0f} %, {r['spearman']:.3f}" for r in map(result.get, shown)
        ]
        lines.append(f"| {result['model']}, {result['runtime']} | {' | '.join(cells)} | {100 * result['covered']:.0f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Calibrate, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--device", default="onnxruntime:cpu?threads=1")
    parser.add_argument("--policies", type=int, default=POLICIES)
    options = parser.parse_args()
    task = Task.create({"model": options.model, "data": "random", "device": options.device, "space": "per_layer"})
    with tempfile.TemporaryDirectory() as folder:
        truth, rows = Truth(task, case(options.model), Path(folder)), []
        for number, policy in enumerate(truth.draws(options.policies), 1):
            row = truth.row(policy)
            rows += [row] if row is not None else []
            if number % REFITTED_AT == 0:
                truth.forecast.refit()
            print(number, row, flush=True)
        result = truth.result(rows) | {"staircase": truth.staircase()}
    runtime = truth.setting.device.profile.runtime
    result |= {
        "model": options.model, "runtime": runtime, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": truth.setting.device.environment(), "torch": torch.__version__, "rows": [vars(row) for row in rows],
    }  # fmt: skip
    (RESULTS / f"latency_truth_{options.model}_{runtime}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "latency_truth.md").write_text(table())
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))


if __name__ == "__main__":
    main()
