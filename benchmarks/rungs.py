"""Does what a policy is chosen by foretell what training makes of it? Policies of about the same latency, ranked before and after.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/rungs.py --model resnet20 --steps 80,320 --policies 24 --jobs 2

Candidates of a band of predicted latencies are drawn one half from the pool that a search begins with and one half from the space at
random. Each is judged by its shape (inheritance, capacity, and promise, which joins the two) and as it is once reconstructed (likeness,
and two other ways to compare the same answers with the teacher's; likeness after a reconstruction on more inputs), then trained in float32
for so many steps: those of a short run, and more. Steps are counted and not timed, so that a busy machine changes nothing. Spearman's rank
correlation with the accuracy after training, on test images, within each band. Hours on two cores, minutes on a GPU (`--jobs` processes
share it); `--images` takes the first so many training images only. Writes benchmarks/results/rungs.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.candidates.ahead import measure_ahead
from autocompress.candidates.forecast import Forecast
from autocompress.candidates.likeness import Likeness
from autocompress.candidates.pool import draw_pool
from autocompress.candidates.proposals import Proposal
from autocompress.compress.compared import compared_features
from autocompress.compress.distill import soft_loss
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import TeacherActivations, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.train import train
from autocompress.data import Data, sample
from autocompress.devices import open_device
from autocompress.policy import Policy, QuantSpec
from autocompress.ranking.ranks import rank_correlation
from autocompress.search_space import find_suggest
from autocompress.setup.loading import load
from autocompress.setup.setting import Setting
from autocompress.suggesters import LevelSuggester
from autocompress.task import load_task
from autocompress.trial.evaluate import score_model
from autocompress.trial.preparation import prepare

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S, POOL_S = 60.0, 20.0
BANDS = {"0.25x": 0.25, "0.40x": 0.40, "0.60x": 0.60}
BREADTH = 1.2
"""A band reaches from its middle divided to its middle multiplied by this."""
DRAWS = 600
SCORED = 1500
MANY = 512
"""Inputs that a student is reconstructed on before training."""
PREDICTORS = ("inheritance", "capacity", "promise", "likeness", "agreement", "-KL", "likeness_512")


@dataclass(frozen=True)
class Bench:
    """What is trained, and for how long."""

    model: str
    images: int
    seed: int
    steps: tuple[int, ...]

    @property
    def data(self) -> Data:
        """The splits, of the first `images` of CIFAR-10's training images."""
        whole = cifar10.data()
        each = {"train": self.images * 9 // 10, "val": self.images // 10}
        return replace(whole, **{name: getattr(whole, name)[: each[name]] for name in each})

    def setting(self, run: Path) -> Setting:
        """As in a search."""
        weights = cifar10.folder() / "cifar10_resnets" / f"{self.model}.safetensors"
        own = {"model": f"{cifar10.__file__}:{self.model}", "data": f"{cifar10.__file__}:data", "weights": str(weights), "seed": self.seed}
        task = load_task(None, own)
        return prepare(task, run, load(task, data=self.data))


def candidates(forecast: Forecast, n: int, seed: int) -> Iterator[tuple[str, Proposal]]:
    """`n` policies of each band, all of different shapes."""
    generator, original = np.random.default_rng(seed), forecast.setting.baseline.latency_s.median
    suggesters = [LevelSuggester(generator) for _ in range(DRAWS)]
    drawn = forecast.proposals([forecast.suggest(suggester) for suggester in suggesters], [suggester.params for suggester in suggesters])
    pool = draw_pool(forecast, seed, POOL_S)
    for band, middle in BANDS.items():
        seen: set[object] = set()
        for source, count in ((pool, n // 2), (drawn, n - n // 2)):
            inside = [p for p in source if 1 / BREADTH < p.latency_s / (middle * original) < BREADTH]
            for index in generator.permutation(len(inside)):
                shape = forecast.structure(inside[index].policy).shape
                if shape not in seen and count:
                    seen, count = seen | {shape}, count - 1
                    yield band, inside[index]


@functools.cache
def opened(bench: Bench) -> tuple[Setting, Likeness]:
    """Once a process."""
    setting = bench.setting(Path(tempfile.mkdtemp()))
    return setting, Likeness(setting)


@torch.no_grad()
def shared(answers: torch.Tensor, wanted: torch.Tensor) -> float:
    """Likeness, of answers that are known."""
    return float(torch.minimum(answers.softmax(1), wanted.softmax(1)).sum(1).mean())


def tried(bench: Bench, policy: Policy) -> dict[str, float]:
    """What is known of a policy before it is trained, and its accuracy after."""
    setting, likeness = opened(bench)
    graph, data = setting.graphs[None], setting.data
    started = time.monotonic()
    known = {"likeness": likeness(policy), "appraisal_s": time.monotonic() - started}
    answers, wanted = likeness.answers(likeness.student(policy)), likeness.wanted
    known["agreement"] = float((answers.argmax(1) == wanted.argmax(1)).float().mean())
    known["-KL"] = -float(soft_loss(answers, wanted, 1.0))
    student = build_student(graph, policy)
    reconstruct(student, TeacherActivations(graph, torch.cat([*data.calibration_batches(MANY, MANY)])), policy)
    with torch.no_grad():
        known["likeness_512"] = shared(likeness.answers(student.eval()), wanted)
    distillation = Distillation(setting.teacher, policy.distill, compared_features(graph, policy, graph))
    for steps in bench.steps:
        plan = TrainPlan(steps, learning_rate=setting.learning_rate, seed=bench.seed, to_learn=setting.teacher.distance(student))
        trained = train(copy.deepcopy(student), data, plan, distillation=distillation)
        known[f"score_{steps}"] = score_model(trained, data, sample(data.test, SCORED)).value
    return known


def table(rows: Sequence[dict], steps: Sequence[int]) -> str:
    """Markdown: a line for each predictor, a column for each band and number of steps."""
    columns = [(band, n) for band in BANDS for n in steps]
    lines = ["| | " + " | ".join(f"{band}, {n} steps" for band, n in columns) + " |", "|---" * (1 + len(columns)) + "|"]

    def line(name: str, cells: Iterator[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    def of(band: str, name: str) -> list[float]:
        return [row[name] for row in rows if row["band"] == band]

    line("policies", (str(len(of(band, "band"))) for band, _ in columns))
    line("test accuracy", (f"{100 * min(of(b, f'score_{n}')):.0f} to {100 * max(of(b, f'score_{n}')):.0f} %" for b, n in columns))
    for name in (*PREDICTORS, f"score_{min(steps)}"):
        found = (rank_correlation(of(band, name), of(band, f"score_{n}")) for band, n in columns)
        line(name, ("" if rho is None else f"{rho:.2f}" for rho in found))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Judge, train, and judge the judgement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--steps", default="80,320")
    parser.add_argument("--policies", type=int, default=24)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bench = Bench(options.model, options.images, options.seed, tuple(map(int, options.steps.split(","))))
    setting, _ = opened(bench)
    forecast = Forecast.start(setting, find_suggest("default", setting.graphs[None], setting.device.profile), load_task(None, {}).limits)
    measure_ahead(forecast, CALIBRATION_S, options.seed, lambda phase, done, total: None)
    chosen = [*candidates(forecast, options.policies, options.seed)]
    policies = [proposal.policy.model_copy(update={"quant": QuantSpec()}) for _, proposal in chosen]
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.jobs))
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for (band, proposal), found in zip(chosen, pool.map(functools.partial(tried, bench), policies), strict=True):
            latency = proposal.latency_s / setting.baseline.latency_s.median
            known = {"band": band, "policy": proposal.policy.in_words(), "latency": latency}
            shape = {"inheritance": proposal.inheritance, "capacity": proposal.capacity, "promise": proposal.promise}
            rows.append(known | shape | found)
            print(rows[-1], flush=True)
    machine = open_device("onnxruntime:cpu?threads=1").environment() | {"gpu": gpu()}
    told = {"model": bench.model, "images": bench.images, "seed": bench.seed, "torch": torch.__version__, "machine": machine, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "rungs.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / "rungs.md").write_text(table(rows, bench.steps))
    print(table(rows, bench.steps))


def gpu() -> str:
    """Its name, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


if __name__ == "__main__":
    main()
