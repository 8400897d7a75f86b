"""Who finds the better structures of a real network: samplers, and the search's own start, with equally many appraisals each.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/search_real.py --model resnet20 --evaluations 60 --seeds 3

Structures of a CIFAR-10 ResNet under a budget, two objectives: likeness to the teacher, reconstructed and untrained (1 to 5 s each; see
`rungs.py` for what it foretells), and predicted latency. What prediction rules out costs no sampler anything, as in a search.

* search: as a search does it, the dimensions alone, up to half of all; then what loses least by them; then what FrontSampler suggests
* all count: the same, but where a sampler that enlarges all of the front alike suggests, as it did before what is worth little counted
  for nothing
* promise: as a short search does it, the structures that promise most first, then what FrontSampler suggests
* front, tpe, nsga2, random: samplers from their own start

Counted, not timed. The share of the hypervolume of the best front that all runs together found, from no likeness and the budget's latency
(half of that area lies where little is left of the network); and the most likeness that was found within the budget and parts of it.
Writes benchmarks/results/NAME.{json,md}, search_real unless --name says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.appraisals import Appraisals
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.likeness import Likeness
from autocompress.candidates.pool import draw_pool
from autocompress.candidates.proposals import Proposal
from autocompress.controller.rungs import APPRAISED_FIRST, SINGLES_SHARE
from autocompress.devices import open_device
from autocompress.graph import Structure
from autocompress.policy import Policy
from autocompress.ranking.front import hypervolume, least_counted
from autocompress.ranking.promotion import cover
from autocompress.search_space import find_suggest
from autocompress.setup.loading import load
from autocompress.study.database import open_journal
from autocompress.study.sampler import FrontSampler
from autocompress.task import Task, load_task
from autocompress.trial.preparation import prepare

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S, POOL_S, PATIENCE_S = 60.0, 20.0, 600.0
CHECKPOINTS = (12, 25, 50, 100)
SHARES = (1.0, 0.85, 0.7, 0.6, 0.5, 0.4)
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "search": lambda seed: FrontSampler(seed=seed, least=least_counted),
    "all count": lambda seed: FrontSampler(seed=seed),
    "promise": lambda seed: FrontSampler(seed=seed),
    "front": lambda seed: FrontSampler(seed=seed),
    "tpe": lambda seed: TPESampler(seed=seed, multivariate=True),
    "nsga2": lambda seed: NSGAIISampler(seed=seed),
    "random": lambda seed: RandomSampler(seed=seed),
}
Point = tuple[float, float]


class Remembered:
    """Likeness, asked for once by all runs."""

    def __init__(self, forecast: Forecast) -> None:
        self._forecast, self._likeness = forecast, Likeness(forecast.setting)
        self._known: dict[Structure, float] = {}

    def __call__(self, policy: Policy) -> float:
        structure = self._forecast.structure(policy)
        if structure not in self._known:
            self._known[structure] = self._likeness(policy)
        return self._known[structure]


def first(pool: Sequence[Proposal], appraisals: Appraisals, kind: str, n: int) -> Iterator[Proposal]:
    """What a search of this kind appraises before its sampler suggests, of `n` appraisals in all."""
    if kind in ("search", "all count"):
        for single in appraisals.sensitivity.untried():
            if len(appraisals) >= SINGLES_SHARE * n:
                break
            yield single
        yield from (best for best in appraisals.sensitivity.best(APPRAISED_FIRST) if best.policy not in appraisals)
    elif kind == "promise":
        promising = appraisals.forecast.within_budget(pool)
        for index in cover([(p.promise, p.latency_s) for p in promising], APPRAISED_FIRST):
            yield promising[index]


def found(task: Task, forecast: Forecast, remembered: Remembered, pool: Sequence[Proposal], kind: str, seed: int, n: int) -> list[Point]:
    """(likeness, latency in seconds) of `n` structures in the order in which they were appraised; fewer where there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        journal = open_journal(Path(folder), task, resume=False, sampler=SAMPLERS[kind](seed))
        appraisals = Appraisals(journal, forecast)
        appraisals.__dict__["_likeness"] = remembered
        begin, points = first(pool, appraisals, kind, n), list[Point]()
        while len(points) < n:
            proposal = next(begin, None)
            next_one = appraisals.appraise(proposal) if proposal is not None else appraisals.suggested([], PATIENCE_S)
            if next_one is None:
                break
            points.append((next_one.worth, next_one.latency_s))
    return points


def table(runs: dict[str, list[list[Point]]], budget_s: float) -> str:
    """Markdown: a line for each kind, a column for each number of appraisals: mean over the seeds, and the least and the most."""
    reference = (0.0, budget_s)

    def area(points: list[Point]) -> float:
        return hypervolume(np.array([p for p in points if p[1] <= budget_s]).reshape(-1, 2), reference)

    best = area([point for kind in runs.values() for run in kind for point in run])
    longest = max(len(run) for kind in runs.values() for run in kind)
    columns = [n for n in CHECKPOINTS if n <= longest]
    lines = ["| | " + " | ".join(f"{n} appraisals" for n in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for kind, mine in runs.items():
        shares = [[100 * area(run[:n]) / best for run in mine] for n in columns]
        cells = (f"{statistics.mean(s):.1f} % ({min(s):.1f} to {max(s):.1f})" for s in shares)
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + heights(runs, budget_s, columns)


def heights(runs: dict[str, list[list[Point]]], budget_s: float, columns: Sequence[int]) -> str:
    """Markdown: the most likeness within parts of the budget, mean over the seeds, after each number of appraisals."""
    lines = ["| | appraisals | " + " | ".join(f"{share:g} of the budget" for share in SHARES) + " |", "|---" * (2 + len(SHARES)) + "|"]
    for kind, n in itertools.product(runs, columns):
        best = [[max((w for w, s in run[:n] if s <= share * budget_s), default=0.0) for run in runs[kind]] for share in SHARES]
        lines.append(f"| {kind} | {n} | " + " | ".join(f"{statistics.mean(each):.2f}" for each in best) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Let every kind look for structures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--space", default="default")
    parser.add_argument("--budget", default="0.5x")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samplers", default=",".join(SAMPLERS))
    parser.add_argument("--name", default="search_real", help="of the results")
    options = parser.parse_args()
    weights = cifar10.folder() / "cifar10_resnets" / f"{options.model}.safetensors"
    own = {"model": f"{cifar10.__file__}:{options.model}", "data": f"{cifar10.__file__}:data", "weights": str(weights)}
    task = load_task(None, own | {"budget": (options.budget,), "space": options.space})
    runs: dict[str, list[list[Point]]] = {kind: [] for kind in options.samplers.split(",")}
    with tempfile.TemporaryDirectory() as folder:
        setting = prepare(task, Path(folder), load(task))
        forecast = Forecast.start(setting, find_suggest(options.space, setting.graphs[None], setting.device.profile), task.limits)
        measure_ahead(forecast, CALIBRATION_S, 0, lambda phase, done, total: None)
        remembered = Remembered(forecast)
        for seed in range(options.seeds):
            pool = draw_pool(forecast, seed, POOL_S)
            for kind in runs:
                runs[kind].append(found(task, forecast, remembered, pool, kind, seed, options.evaluations))
                print(kind, seed, [(round(worth, 3), round(1e6 * latency)) for worth, latency in runs[kind][-1]], flush=True)
        budget_s = forecast.budget.latency_s
    assert budget_s is not None
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    told = {"model": options.model, "space": options.space, "budget": options.budget, "budget_s": budget_s}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(json.dumps(told | {"torch": torch.__version__, "machine": machine, "runs": runs}) + "\n")
    (RESULTS / f"{options.name}.md").write_text(table(runs, budget_s))
    print(table(runs, budget_s))


if __name__ == "__main__":
    main()
