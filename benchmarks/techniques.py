"""What does each technique buy? Students of one network at about the same measured latency, one technique each, trained for the same time.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/techniques.py --task resnet20 --share 0.5 --seconds 60 --seeds 2
    .venv/bin/python benchmarks/banking77.py --out runs/banking77.safetensors
    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/techniques.py --task banking77 --weights runs/banking77.safetensors

Of each technique the gentlest setting is taken whose untrained student, exported and measured in turns with the original, takes no more
than `--share` of its time; the harshest where none does, which the table then shows. `joint` is what a search would train first: of
`--appraisals` structures of the default space, appraised without training, the one worth most whose file takes no more than that. The last
rows are the ways to distil that student. Each student gets the same seconds of training after its reconstruction, as a short
run of a search does (the original in int8 is only calibrated); seeds are the outer loop, so that a machine that gets slower hits all rows
alike. Writes benchmarks/results/techniques_TASK.{json,md} (of a part: techniques_TASK_ONLY).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar10
import search_real

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.pool import draw_pool
from autocompress.compress.teacher import Teacher
from autocompress.graph import Graph
from autocompress.policy import DistillSpec, LowRankSpec, Policy, PruneSpec, QuantSpec, StudentSpec
from autocompress.records import Attempt
from autocompress.search_space import find_suggest, for_device
from autocompress.setup.loading import load
from autocompress.setup.setting import Setting
from autocompress.study.database import open_journal
from autocompress.study.sampler import FrontSampler
from autocompress.task import Task
from autocompress.trial.evaluate import score_artifact
from autocompress.trial.objective import evaluate_policy
from autocompress.trial.preparation import prepare
from autocompress.trial.starting import untrained_student

HERE = Path(__file__).parent
RESULTS = HERE / "results"
STEPS = 16
"""Settings of a technique, from gentle to harsh."""
Technique = Callable[[Graph, float], Policy]
"""The policy of a technique at a harshness from 0, which changes nothing, to 1."""


def depth(graph: Graph, harshness: float) -> Policy:
    """So many blocks fewer in each stream, spread evenly."""
    dropped = []
    for stream in dict.fromkeys(block.stream for block in graph.blocks):
        blocks = [block.name for block in graph.blocks if block.stream == stream]
        dropped += _evenly(blocks, round(harshness * len(blocks)))
    return Policy(student=StudentSpec(drop=tuple(dropped)))


def _evenly(names: list[str], n: int) -> list[str]:
    """`n` of the names, the last one first to go, as far apart as can be."""
    return [names[len(names) - 1 - round(i * len(names) / n)] for i in range(n)] if n else []


def width(graph: Graph, harshness: float) -> Policy:
    """All channel groups narrower by the same factor."""
    return Policy(student=StudentSpec(width=1 - 0.9 * harshness))


def pruning(graph: Graph, harshness: float) -> Policy:
    """The same share of the channels inside every block; where there is no stream, of all."""
    groups = [group for group in graph.groups if group.prunable]
    inner = [group.name for group in groups if not group.stream] or [group.name for group in groups]
    return Policy(prune=PruneSpec(ratios=dict.fromkeys(inner, 0.95 * harshness)))


def low_rank(graph: Graph, harshness: float) -> Policy:
    """The same share of the multiplications of every layer that may be of lower rank."""
    layers = [layer.name for layer in graph.layers if layer.factorable]
    return Policy(low_rank=LowRankSpec(kept=dict.fromkeys(layers, 1 - 0.95 * harshness)))


FAMILIES: dict[str, Technique] = {"depth": depth, "width": width, "pruning inside blocks": pruning, "low rank": low_rank}
DISTILLATIONS = {
    "labels only": DistillSpec(alpha=0.0, features=0.0),
    "KL": DistillSpec(features=0.0),
    "KL, standardized": DistillSpec(features=0.0, standardized=True),
    "decoupled": DistillSpec(answers="decoupled", features=0.0),
    "relational": DistillSpec(answers="relational", features=0.0),
    "features only": DistillSpec(features=1.0),
    "KL and features (the default)": DistillSpec(),
    "KL and similarities": DistillSpec(feature_loss="similarity"),
    "KL and distances": DistillSpec(feature_loss="distances"),
    "decoupled and features": DistillSpec(answers="decoupled"),
    "relational and features": DistillSpec(answers="relational"),
}


def int8(policy: Policy) -> Policy:
    """The same with int8 layers."""
    return policy.model_copy(update={"quant": QuantSpec(bits=8)})


def joint(setting: Setting, task: Task, share: float, appraisals: int) -> Policy:
    """What a search of so many training-free appraisals finds worth most at this share of the original's latency, as measured."""
    forecast = Forecast.start(setting, find_suggest(task.space, setting.graphs[None], setting.device.profile), task.limits)
    measure_ahead(forecast, search_real.CALIBRATION_S, task.seed, lambda phase, done, total: None)
    pool = draw_pool(forecast, task.seed, search_real.POOL_S)
    with tempfile.TemporaryDirectory() as folder:
        sampler = FrontSampler(seed=task.seed, least=search_real.least_counted)
        found = Appraisals(open_journal(Path(folder), task, resume=False, sampler=sampler), forecast)
        for proposal in search_real.first(pool, found, "search", appraisals):
            found.appraise(proposal)
        while len(found) < appraisals and found.suggested([], search_real.PATIENCE_S) is not None:
            pass
    best_first = sorted(found.within_budget(), key=lambda appraised: -appraised.worth)
    fast_enough = (appraised.policy for appraised in best_first if _share_of(setting, appraised.policy) <= share)
    return next(fast_enough, min(best_first, key=lambda appraised: appraised.latency_s).policy)


def policies(setting: Setting, task: Task, share: float, appraisals: int, only: str | None) -> Iterator[tuple[str, str, Policy]]:
    """(what is compared, name, policy) of each row: techniques by themselves and together, then ways to distil the latter's student."""
    graph, student = setting.graphs[None], joint(setting, task, share, appraisals)
    if only != "distillation":
        yield "technique", "int8", for_device(int8(Policy()), setting.device.profile)
        for name, technique in FAMILIES.items():
            yield "technique", name, _gentlest(setting, technique, share)
        for name, technique in FAMILIES.items():
            rounded = lambda graph, harshness, made=technique: int8(made(graph, harshness))  # noqa: E731
            yield "technique", f"{name}, int8", _gentlest(setting, rounded, share)
        yield "technique", "joint", student
    if only == "technique":
        return
    for name, spec in DISTILLATIONS.items():
        if graph.classifier is not None or not spec.features:
            yield "distillation", name, student.model_copy(update={"distill": spec})


def _gentlest(setting: Setting, technique: Technique, share: float) -> Policy:
    """The gentlest setting whose untrained student takes at most this share of the original's time, by bisection; else the harshest."""
    graph, profile = setting.graphs[None], setting.device.profile
    low, high = 0, STEPS
    while high - low > 1:
        middle = (low + high) // 2
        policy = for_device(technique(graph, middle / STEPS), profile)
        low, high = (low, middle) if _share_of(setting, policy) <= share else (middle, high)
    return for_device(technique(graph, high / STEPS), profile)


def _share_of(setting: Setting, policy: Policy) -> float:
    """Of the original's latency, what the policy's untrained file takes in turns with it."""
    with tempfile.TemporaryDirectory() as name:
        manifest = setting.write(Path(name), untrained_student(setting, policy), policy)
        original, own = setting.device.measure([setting.baseline.path, Path(name) / manifest.artifact], seconds_each=0.5)
    return own.median / original.median


def run(setting: Setting, name: str, policy: Policy, seconds: float) -> dict[str, Any]:
    """Train a policy's student for so long: its test accuracy, latency and size."""
    outcome = evaluate_policy(setting, Attempt(id="technique", policy=policy, rung="short"), seconds=seconds)
    if outcome.failure is not None or outcome.latency_s is None:
        return {"failure": outcome.failure.reason if outcome.failure is not None else "not measured"}
    path = setting.models / "technique" / "model.onnx"
    return {
        "test_accuracy": score_artifact(setting.device, path, setting.data, setting.data.test, setting.batch).value,
        "speedup": 1 / outcome.latency_s.relative(setting.baseline.latency_s.median),
        "size_bytes": outcome.size_bytes, "steps": outcome.steps, "training_s": outcome.training_s, "seconds": outcome.seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each row, means over the seeds."""
    lines = ["| what | test accuracy | spread | speed-up | size | steps | policy |", "|---|---|---|---|---|---|---|"]
    for compared, name in dict.fromkeys((row["compared"], row["name"]) for row in rows):
        mine = [row for row in rows if (row["compared"], row["name"]) == (compared, name)]
        if any("failure" in row for row in mine):
            lines.append(f"| {name} | {mine[0].get('failure', 'failed')} | | | | | {mine[0]['policy']} |")
            continue
        accuracy, speedup, size, steps = ([row[key] for row in mine] for key in ("test_accuracy", "speedup", "size_bytes", "steps"))
        spread = max(accuracy) - min(accuracy)
        lines.append(
            f"| {name} | {100 * statistics.mean(accuracy):.2f} % | {100 * spread:.2f} | {statistics.mean(speedup):.2f}x "
            f"| {statistics.mean(size) / 1e3:.0f} kB | {statistics.mean(steps):.0f} | {mine[0]['policy']} |"
        )
    return "\n".join(lines) + "\n"


def task_of(options: argparse.Namespace) -> Task:
    """The network and the data."""
    if options.task == "banking77":
        model, data, weights = "banking77.py:transformer", "banking77.py:data", options.weights
    else:
        model, data = f"cifar10.py:{options.task}", "cifar10.py:data"
        weights = cifar10.folder() / "cifar10_resnets" / f"{options.task}.safetensors"
    return Task(model=f"{HERE}/{model}", data=f"{HERE}/{data}", weights=str(weights), budget=(f"{options.share:g}x",))


def main() -> None:
    """Find the policies once, then train all of them for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="resnet20", choices=("resnet20", "resnet56", "banking77"))
    parser.add_argument("--weights", type=Path, default=Path("runs/banking77.safetensors"), help="of banking77's transformer")
    parser.add_argument("--share", type=float, default=0.5, help="of the original's latency")
    parser.add_argument("--appraisals", type=int, default=60, help="without training, to choose the joint policy")
    parser.add_argument("--only", choices=("technique", "distillation"), help="of what is compared")
    parser.add_argument("--seconds", type=float, default=60.0, help="of training")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    with tempfile.TemporaryDirectory(prefix="techniques-") as folder:
        task = task_of(options)
        setting = prepare(task, Path(folder), load(task))
        original = score_artifact(setting.device, setting.baseline.path, setting.data, setting.data.test, setting.batch).value
        chosen = list(policies(setting, task, options.share, options.appraisals, options.only))
        for seed in range(options.seeds):
            teacher = Teacher(setting.teacher.model, setting.data, classifier=setting.graphs[None].classifier, seed=seed)
            teacher.prepare(options.seconds)
            seeded = replace(setting, seed=seed, teacher=teacher)
            for compared, name, policy in chosen:
                known = {"compared": compared, "name": name, "seed": seed, "policy": policy.in_words()}
                rows.append(known | run(seeded, name, policy, options.seconds))
                print(rows[-1], flush=True)
        told = {
            "task": options.task, "share": options.share, "seconds": options.seconds, "seeds": options.seeds,
            "appraisals": options.appraisals, "original": original, "original_bytes": setting.baseline.size_bytes,
            "original_s": setting.baseline.latency_s.median, "torch": torch.__version__, "commit": commit.stdout.strip(),
            "machine": setting.device.environment(), "rows": rows,
        }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    name = "_".join(filter(None, ["techniques", options.task, options.only]))
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
