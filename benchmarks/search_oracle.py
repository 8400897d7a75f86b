"""Samplers against tables whose true Pareto front is known: the share of its hypervolume that so many evaluations find.

    python benchmarks/search_oracle.py [--evaluations 200 --seeds 10 --samplers ours,tpe,... --oracles nasbench,haq,device --out DIR]
    python benchmarks/search_oracle.py --overhead

Three kinds of oracle, whose values are visible to a sampler only by asking:

* nasbench: NAS-Bench-201, 15,625 networks of 6 unordered choices, CIFAR-10 accuracy and latency on 27 devices. Reference point: 50 %
  accuracy, the 95th percentile of latency.
* haq: bits of weights and activations (1 to 8) of the 53 layers of MobileNetV2, 106 ordered dimensions, latency of HAQ's table. Accuracy
  by an additive model: 100 - sum over layers of s (4^-w + 4^-a) / mean of s, with s lognormal (sigma 1, seed 0). The true front is that of
  the Lagrangian (all points of it are on the front; what lies between two of them is not counted).
* device: the compressed networks of a ResNet-8 on the fake device, enumerated: blocks kept, widths and bits of each stage. Accuracy by a
  model with interactions: 95 (1 - 0.5 prod over stages of c^-0.35) - 2 (int8 stages)^1.5 / 3, c the stage's width times blocks.

Writes search_oracle.json and .md. `--overhead` times a suggestion at 300 dimensions and 2,000 trials (search_oracle_overhead.json).
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import itertools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

from autocompress.devices import open_device
from autocompress.ranking.front import hypervolume
from autocompress.study.sampler import FrontSampler, Space

Array = NDArray[np.float64]
RESULTS = Path(__file__).parent / "results"
CHECKPOINTS = (25, 50, 100, 200)
WORST_ACCURACY = 50.0
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "ours": lambda seed: FrontSampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed),
    "tpe-multivariate": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "nsga3": lambda seed: NSGAIIISampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, deterministic_objective=True),
}
SLOW = {"gp": 3}
"""Runs of a sampler that takes minutes for each."""


@dataclass(frozen=True)
class Oracle:
    """A problem with a known answer. `ask` draws from an Optuna trial and returns accuracy (up) and latency (down)."""

    name: str
    ask: Callable[[optuna.Trial], tuple[float, float]]
    reference: tuple[float, float]
    best: float

    def share(self, points: Sequence[tuple[float, float]]) -> float:
        """Of the true hypervolume."""
        return hypervolume(np.array(points), self.reference) / self.best


# -- NAS-Bench-201 ------------------------------------------------------------------------------------------------

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = 6


def tables() -> Path:
    return Path(os.environ.get("AUTOCOMPRESS_DATA", "../shared/data")) / "latency_tables"


def rows_of(name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.TextIOWrapper(gzip.open(tables() / name), encoding="utf-8")))


@cache
def nasbench() -> dict[str, Oracle]:
    rows = rows_of("nasbench201_latency_accuracy.csv.gz")
    index = {tuple(e.split("~")[0] for part in row["arch"].split("+") for e in part.strip("|").split("|")): i for i, row in enumerate(rows)}
    accuracy = np.array([float(row["cifar10_test_acc"]) for row in rows])
    return {
        f"nasbench:{key.removeprefix('lat_ms_')}": _of_table(f"nasbench:{key.removeprefix('lat_ms_')}", index, accuracy, rows, key)
        for key in rows[0]
        if key.startswith("lat_ms_")
    }


def _of_table(name: str, index: dict[tuple[str, ...], int], accuracy: Array, rows: list[dict[str, str]], key: str) -> Oracle:
    latency = np.array([float(row[key]) for row in rows])
    reference = (WORST_ACCURACY, float(np.percentile(latency, 95)))

    def ask(trial: optuna.Trial) -> tuple[float, float]:
        row = index[tuple(trial.suggest_categorical(f"edge{edge}", OPERATIONS) for edge in range(EDGES))]
        return float(accuracy[row]), float(latency[row])

    return Oracle(name, ask, reference, hypervolume(np.stack([accuracy, latency], 1), reference))


# -- HAQ ----------------------------------------------------------------------------------------------------------

BITS = range(1, 9)


@cache
def haq() -> dict[str, Oracle]:
    rows = rows_of("haq_mobilenetv2_bitwidth_latency.csv.gz")
    layers = 1 + max(int(row["layer"]) for row in rows)
    latency = np.zeros((layers, len(BITS), len(BITS)))
    for row in rows:
        latency[int(row["layer"]), int(row["w_bits"]) - 1, int(row["a_bits"]) - 1] = float(row["latency"])
    sensitivity = np.random.default_rng(0).lognormal(0.0, 1.0, layers)
    noise = 0.25 ** np.array(BITS)
    loss = (sensitivity / sensitivity.mean())[:, None, None] * (noise[:, None] + noise[None])
    reference = (WORST_ACCURACY, float(latency[:, -1, -1].sum()))

    def ask(trial: optuna.Trial) -> tuple[float, float]:
        w = [trial.suggest_int(f"w:{layer}", 1, 8) - 1 for layer in range(layers)]
        a = [trial.suggest_int(f"a:{layer}", 1, 8) - 1 for layer in range(layers)]
        every = np.arange(layers)
        return 100.0 - float(loss[every, w, a].sum()), float(latency[every, w, a].sum())

    return {"haq:mobilenetv2": Oracle("haq:mobilenetv2", ask, reference, hypervolume(_lagrangian(loss, latency), reference))}


def _lagrangian(loss: Array, latency: Array) -> Array:
    """Points of the true front: for each price of latency the cheapest choice of each layer by itself."""
    flat_loss, flat_latency = loss.reshape(len(loss), -1), latency.reshape(len(latency), -1)
    every = np.arange(len(loss))
    points = []
    for price in np.geomspace(1e-12, 1e2, 20_000):
        chosen = (flat_loss + price * flat_latency).argmin(1)
        points.append((100.0 - flat_loss[every, chosen].sum(), flat_latency[every, chosen].sum()))
    return np.array(points)


# -- the compressed networks of a small ResNet, enumerated ------------------------------------------------------------

WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
STAGES = 3


@cache
def device() -> dict[str, Oracle]:
    import torch

    from autocompress.graph import Graph
    from autocompress.policy import Policy, QuantSpec, StudentSpec
    from autocompress.search_space import stages_of
    from autocompress.testing.devices import Costs, FakeDevice
    from autocompress.testing.models import CifarResNet

    graph = Graph.trace(CifarResNet(2).eval(), (torch.zeros(1, 3, 32, 32),))
    stages = [stage for stage in stages_of(graph) if stage.stream]
    fake = FakeDevice(Costs(call=5e-6, node=2e-6, mac=4e-11, mac_int8=1e-11, element=2e-10))
    choices = list(itertools.product(itertools.product((0, 1), WIDTHS, (8, 32)), repeat=STAGES))

    def policy(choice: tuple[tuple[int, float, int], ...]) -> Policy:
        widths, drop, layers = {}, [], {}
        for stage, (kept, width, bits) in zip(stages, choice, strict=True):
            widths |= dict.fromkeys((stage.stream, *stage.inner), width)
            drop += [] if kept else list(stage.blocks[-1:])
            layers |= dict.fromkeys(stage.layers, bits)
        return Policy(student=StudentSpec(widths=widths, drop=tuple(drop)), quant=QuantSpec(bits=32, layers=layers))

    def accuracy(choice: tuple[tuple[int, float, int], ...]) -> float:
        capacity = np.prod([(width * (1 + kept)) ** -0.35 for kept, width, _ in choice])
        return float(95.0 * (1.0 - 0.5 * capacity * 0.3) - 2.0 * sum(bits == 8 for *_, bits in choice) ** 1.5 / 3.0)

    of_all = graph.workloads(graph.population([policy(choice) for choice in choices])).total([fake.seconds_of_operator])[0]
    latencies = dict(zip(choices, (fake.costs.call + of_all).tolist(), strict=True))
    points = np.array([(accuracy(choice), latency) for choice, latency in latencies.items()])
    reference = (WORST_ACCURACY, float(np.percentile(points[:, 1], 95)))

    def ask(trial: optuna.Trial) -> tuple[float, float]:
        choice = tuple(
            (trial.suggest_int(f"depth:{s}", 0, 1), trial.suggest_float(f"width:{s}", 0.25, 1.5, step=0.25),
             trial.suggest_categorical(f"bits:{s}", (8, 32)))
            for s in range(STAGES)
        )  # fmt: skip
        return accuracy(choice), latencies[choice]

    return {"device:resnet8": Oracle("device:resnet8", ask, reference, hypervolume(points, reference))}


KINDS: dict[str, Callable[[], dict[str, Oracle]]] = {"nasbench": nasbench, "haq": haq, "device": device}


# -- runs -----------------------------------------------------------------------------------------------------------


def run(job: tuple[str, str, int, int]) -> dict[str, Any]:
    """One search: its share of the true hypervolume by number of evaluations, and the mean time of a suggestion."""
    name, sampler, seed, evaluations = job
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    oracle = KINDS[name.partition(":")[0]]()[name]
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=SAMPLERS[sampler](seed))
    points, started = [], time.perf_counter()
    for _ in range(evaluations):
        trial = study.ask()
        points.append(oracle.ask(trial))
        study.tell(trial, points[-1])
    seconds = (time.perf_counter() - started) / evaluations
    shares = {n: oracle.share(points[:n]) for n in CHECKPOINTS if n <= evaluations}
    return {"oracle": name, "sampler": sampler, "seed": seed, "share": shares, "seconds": seconds}


def jobs(kinds: Sequence[str], samplers: Sequence[str], seeds: int, evaluations: int) -> list[tuple[str, str, int, int]]:
    every = [
        (name, sampler, seed, evaluations) for kind in kinds for name in KINDS[kind]() for seed in range(seeds) for sampler in samplers
    ]
    for sampler, most in SLOW.items():
        own = [job for job in every if job[1] == sampler]
        kept = own[:: max(1, len(own) // most)][:most]
        every = [job for job in every if job[1] != sampler or job in kept]
    return every


def summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By kind of oracle and sampler: mean, standard deviation and worst share at each checkpoint; losses of ours, one oracle at a time."""
    rows: dict[str, Any] = {}
    for kind in dict.fromkeys(r["oracle"].partition(":")[0] for r in results):
        of_kind = [r for r in results if r["oracle"].startswith(kind)]
        rows[kind] = {sampler: _figures([r for r in of_kind if r["sampler"] == sampler]) for sampler in _samplers(of_kind)}
        rows[kind]["losses of ours"] = _losses(of_kind)
    return rows


def _samplers(results: Sequence[dict[str, Any]]) -> list[str]:
    return [s for s in SAMPLERS if any(r["sampler"] == s for r in results)]


def _figures(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    at = {n: [r["share"][n] for r in results] for n in results[0]["share"]}
    return {
        "runs": len(results),
        "milliseconds": 1000 * statistics.mean(r["seconds"] for r in results),
        "share": {n: {"mean": statistics.mean(v), "deviation": statistics.pstdev(v), "worst": min(v)} for n, v in at.items()},
    }


def _losses(results: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Where a rival's mean over the seeds that both ran is above ours, by number of evaluations."""
    found: dict[str, list[str]] = {}
    for n in results[0]["share"]:
        for name in dict.fromkeys(r["oracle"] for r in results):
            own = {r["seed"]: r["share"][n] for r in results if r["oracle"] == name and r["sampler"] == "ours"}
            for rival in _samplers(results):
                theirs = {r["seed"]: r["share"][n] for r in results if r["oracle"] == name and r["sampler"] == rival}
                both = own.keys() & theirs.keys()
                if rival != "ours" and both and statistics.mean(theirs[s] for s in both) > statistics.mean(own[s] for s in both):
                    found.setdefault(str(n), []).append(f"{name} {rival}")
    return found


def table(rows: dict[str, Any]) -> str:
    lines = []
    for kind, by_sampler in rows.items():
        points = list(next(iter(by_sampler.values()))["share"])
        lines += [f"### {kind}", "", "| sampler | runs | " + " | ".join(f"{n} evaluations" for n in points) + " | a suggestion |"]
        lines.append("|---|---|" + "---|" * (len(points) + 1))
        for sampler, figures in by_sampler.items():
            if sampler in SAMPLERS:
                shares = (figures["share"][n] for n in points)
                cells = " | ".join(f"{100 * s['mean']:.2f} ± {100 * s['deviation']:.2f} (worst {100 * s['worst']:.1f})" for s in shares)
                lines.append(f"| {sampler} | {figures['runs']} | {cells} | {figures['milliseconds']:.0f} ms |")
        lost = by_sampler["losses of ours"]
        lines += ["", f"Ours is below a rival's mean: {'; '.join(f'at {n}: ' + ', '.join(v) for n, v in lost.items()) or 'nowhere'}.", ""]
    return "\n".join(lines)


def overhead(dimensions: int = 300, trials: int = 2000, suggestions: int = 40) -> dict[str, float]:
    """Seconds of a suggestion in a study so large, the first of which reads all trials and fits the processes from their prior."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space, study = large_study(dimensions, trials)
    generator, seconds = np.random.default_rng(1), []
    for _ in range(suggestions):
        started = time.perf_counter()
        trial = study.ask(space)
        seconds.append(time.perf_counter() - started)
        study.tell(trial, [float(generator.normal()), float(generator.normal())])
    first, *others = seconds
    return {
        "dimensions": dimensions, "trials": trials, "first_s": first,
        "median_s": statistics.median(others), "mean_s": statistics.mean(others), "worst_s": max(others),
    }  # fmt: skip


def large_study(dimensions: int, trials: int) -> tuple[dict[str, BaseDistribution], optuna.Study]:
    """A third each of floats, integers and choices; a quarter of the trials violate a constraint."""
    third = dimensions // 3
    space: dict[str, BaseDistribution] = {f"width:{i}": FloatDistribution(0.25, 2.0) for i in range(third)}
    space |= {f"depth:{i}": IntDistribution(0, 9) for i in range(third)}
    space |= {f"bits:{i}": CategoricalDistribution((4, 8, 32)) for i in range(dimensions - 2 * third)}
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=FrontSampler(seed=0))
    generator = np.random.default_rng(0)
    coded = Space(space)
    for row in coded.draw(trials, generator):
        params = coded.decode(row)
        size = sum(value for name, value in params.items() if not name.startswith("bits"))
        values = [size + generator.normal(), size + sum(params[name] for name in params if name.startswith("bits"))]
        constraints = {"budget": float(generator.normal()) if generator.random() < 0.25 else -1.0}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values, constraints=constraints))
    return space, study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--oracles", default=",".join(KINDS))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--overhead", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    environment = open_device("onnxruntime:cpu").environment() | {"optuna": optuna.__version__}
    if given.overhead:
        found = json.dumps({"environment": environment} | overhead(), indent=1)
        (given.out / "search_oracle_overhead.json").write_text(found)
        print(found)
        return
    todo = jobs(given.oracles.split(","), given.samplers.split(","), given.seeds, given.evaluations)
    results = []
    with ProcessPoolExecutor(given.processes) as pool:
        for done, result in enumerate(pool.map(run, todo, chunksize=1), 1):
            results.append(result)
            print(f"{done}/{len(todo)}", result["oracle"], result["sampler"], result["seed"], result["share"], flush=True)
    rows = summary(results)
    (given.out / "search_oracle.json").write_text(json.dumps({"environment": environment, "summary": rows, "runs": results}, indent=1))
    (given.out / "search_oracle.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
