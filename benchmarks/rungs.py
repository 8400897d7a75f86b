"""Does what a policy is chosen by foretell what training makes of it? Policies of about the same latency, ranked before and after a short run.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/rungs.py --model resnet20 --seconds 30 --policies 14 --seed 0

Candidates of a band of predicted latencies are drawn one half from the pool that a search begins with and one half from the space at
random. Each is judged by its shape (inheritance, capacity, and promise, which joins the two) and as it is once repaired (accuracy and
distance to the teacher), then trained in float32 for the seconds of a short run, its repair included. Spearman's rank correlation with
the accuracy after training, within each band; scored on validation images that the search would see. Adds to
benchmarks/results/rungs.json and writes rungs.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.compress.distill import observe, soft_loss
from autocompress.compress.repair import repair
from autocompress.compress.student import build_student, shared_features
from autocompress.compress.train import Lesson, TrainPlan, train
from autocompress.data import sample
from autocompress.devices import open_device
from autocompress.evaluate import score_model
from autocompress.forecast import Forecast
from autocompress.objective import Setting
from autocompress.policy import DistillSpec, QuantSpec
from autocompress.preparation import load, prepare, score_original, train_demo_teacher
from autocompress.proposals import LevelSuggester, Proposal
from autocompress.ranks import rank_correlation
from autocompress.search_space import find_suggest
from autocompress.task import load_task

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S, POOL_S, TEACHER_S = 60.0, 20.0, 90.0
BANDS = {"fast": 0.3, "half": 0.55}
BREADTH = 1.12
"""A band reaches from its middle divided to its middle multiplied by this."""
DRAWS, SCORED_ON = 600, 1000
SAMPLES = (64, 128, 256, 512)
"""Inputs that a repair looks at."""


def setting_of(model: str, run: Path, seed: int) -> Setting:
    """A teacher whose answers are known, as in a search."""
    own = {"model": f"{cifar10.__file__}:{model}", "data": f"{cifar10.__file__}:data"}
    weights = cifar10.folder() / "cifar10_resnets" / f"{model}.safetensors"
    task = load_task(None, {"seed": seed} | ({} if model == "digits" else own | {"weights": str(weights)}))
    setting = prepare(task, run, load(task))
    if model == "digits":
        setting = train_demo_teacher(setting, run, 150.0, lambda done: None)
    setting.teacher.prepare(TEACHER_S)
    return setting


def candidates(forecast: Forecast, n: int, seed: int) -> Iterator[tuple[str, Proposal]]:
    """`n` policies of each band, all of different shapes."""
    generator, original = np.random.default_rng(seed), forecast.setting.baseline.latency_s.median
    pool = forecast.pool(seed, POOL_S)
    drawn = forecast._draw([LevelSuggester(generator) for _ in range(DRAWS)])
    for band, middle in BANDS.items():
        seen: set[object] = set()
        for source, count in ((pool, n // 2), (drawn, n - n // 2)):
            inside = [p for p in source if 1 / BREADTH < p.latency_s / (middle * original) < BREADTH]
            for index in generator.permutation(len(inside)):
                shape = forecast.structure(inside[index].policy).shape
                if shape not in seen and count:
                    seen, count = seen | {shape}, count - 1
                    yield band, inside[index]


def facts(setting: Setting, proposal: Proposal, seconds: float) -> dict[str, float]:
    """What is known of a policy before it is trained, and how well it does afterwards."""
    policy, graph, data = proposal.policy.model_copy(update={"quant": QuantSpec()}), setting.graphs[None], setting.data
    known = {"latency_s": proposal.latency_s, "inheritance": proposal.inheritance, "capacity": proposal.capacity, "promise": proposal.promise}
    for n in SAMPLES:
        student, started = build_student(graph, policy), time.monotonic()
        repair(student, graph, policy, torch.cat([*data.calibration(n, n)]))
        repair_s = time.monotonic() - started
        known |= {f"repair_s_{n}": repair_s} | {f"{name}_{n}": value for name, value in likeness(setting, student).items()}
    lesson = Lesson(setting.teacher, policy.distill, shared_features(graph, policy))
    plan = TrainPlan(10**9, time.monotonic() + seconds - repair_s, setting.learning_rate, setting.batch_size, seed=setting.seed, warm=True)
    trained = train(student, data, plan, lesson=lesson)
    return known | {"score": score_model(trained, data, data.val).value}


@torch.no_grad()
def likeness(setting: Setting, student: torch.nn.Module) -> dict[str, float]:
    """How near a student is to its teacher: share of the same decisions, and -KL(teacher || student) and the probability that both have
    in common, as they are and at the usual temperature."""
    few, classifier = sample(setting.data.val, SCORED_ON), setting.graphs[None].classifier
    inputs = torch.cat([inputs for inputs, _ in setting.data.batches(few, 250)])
    own, wanted = (observe(model, inputs, classifier) for model in (student, setting.teacher.model))
    spec, found = DistillSpec(), {}
    for suffix, temperature in (("", 1.0), ("_soft", spec.temperature)):
        found[f"nearness{suffix}"] = -float(soft_loss(own.outputs, wanted.outputs, temperature))
        p, q = ((answers.outputs.float() / temperature).softmax(1) for answers in (own, wanted))
        found[f"overlap{suffix}"] = float(torch.minimum(p, q).sum(1).mean())
    return found | {"agreement": float((own.outputs.argmax(1) == wanted.outputs.argmax(1)).float().mean())}


def correlations(rows: Sequence[dict]) -> dict[str, float | None]:
    """Spearman's rho of each predictor with the score."""
    predictors = [key for key in rows[0] if key.partition("_")[0] in ("inheritance", "capacity", "promise", "agreement", "nearness", "overlap")]
    return {key: rank_correlation([row[key] for row in rows], [row["score"] for row in rows]) for key in predictors}


def table(rows: list[dict]) -> str:
    """Markdown: a line for each model, seed and band, a column for each predictor."""
    names, lines = list(correlations(rows)), []
    for key in dict.fromkeys((row["model"], row["seconds"], row["seed"], row["band"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["seconds"], row["seed"], row["band"]) == key]
        scores = [100 * row["score"] for row in mine]
        rho = correlations(mine)
        cells = " | ".join("" if rho[name] is None else f"{rho[name]:.2f}" for name in names)
        lines.append(f"| {key[0]} | {key[1]:g} s | {key[2]} | {key[3]} | {len(mine)} | {min(scores):.1f} to {max(scores):.1f} % | {cells} |")
    head = "| model | short run | seed | band | policies | scores | " + " | ".join(names) + " |\n" + "|---" * (6 + len(names)) + "|"
    seconds = ", ".join(f"{n}: {statistics.median(row[f'repair_s_{n}'] for row in rows):.1f} s" for n in SAMPLES)
    return "\n".join([head, *lines]) + f"\n\nMedian seconds of a repair by inputs: {seconds}.\n"


def main() -> None:
    """Judge, train, and judge the judgement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("digits", "resnet20", "resnet56"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--policies", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options.model, Path(folder), options.seed)
        print(f"original: {score_original(setting).value:.4f}", flush=True)
        task = load_task(None, {})
        suggest = find_suggest(task.space, setting.graphs[None], setting.device.profile, reference=None)
        forecast = Forecast.start(setting, suggest, task.limits)
        forecast.calibrate(CALIBRATION_S, options.seed, lambda phase, done, total: None)
        for band, proposal in candidates(forecast, options.policies, options.seed):
            known = {"model": options.model, "seconds": options.seconds, "seed": options.seed, "band": band}
            rows.append(known | facts(setting, proposal, options.seconds) | {"policy": proposal.policy.in_words()})
            print(rows[-1], flush=True)
    path, now = RESULTS / "rungs.json", {"torch": torch.__version__, "machine": open_device("onnxruntime:cpu?threads=1").environment()}
    before = json.loads(path.read_text())["rows"] if path.exists() else []
    same = {(row["model"], row["seconds"], row["seed"]) for row in rows}
    rows = [row for row in before if (row["model"], row["seconds"], row["seed"]) not in same] + rows
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(now | {"rows": rows}, indent=1) + "\n")
    (RESULTS / "rungs.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
