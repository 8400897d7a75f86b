"""Does what a policy is chosen by foretell what training makes of it? Policies of about the same latency, ranked before and after.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/rungs.py --model resnet20 --seconds 30 --policies 14 --seed 0

Candidates of a band of predicted latencies are drawn one half from the pool that a search begins with and one half from the space at
random. Each is judged by its shape (inheritance, capacity, and promise, which joins the two) and as it is once repaired (likeness, and
two other ways to compare the same answers with the teacher's), then trained in float32 for the seconds of a short run, its repair
included. Spearman's rank correlation with the accuracy after training, within each band; scored on validation images, as in a search.
Adds to benchmarks/results/rungs.json and writes rungs.md.
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

from autocompress.compress.distill import soft_loss
from autocompress.compress.repair import examples_for, repair
from autocompress.compress.student import build_student, shared_features
from autocompress.compress.train import Lesson, TrainPlan, train
from autocompress.devices import open_device
from autocompress.evaluate import score_model
from autocompress.forecast import Forecast
from autocompress.likeness import Likeness
from autocompress.objective import Setting
from autocompress.policy import QuantSpec
from autocompress.preparation import load, prepare, score_original
from autocompress.proposals import LevelSuggester, Proposal
from autocompress.ranks import rank_correlation
from autocompress.search_space import find_suggest
from autocompress.task import load_task

RESULTS = Path(__file__).parent / "results"
CALIBRATION_S, POOL_S, TEACHER_S = 60.0, 20.0, 90.0
BANDS = {"0.30x": 0.3, "0.55x": 0.55}
BREADTH = 1.12
"""A band reaches from its middle divided to its middle multiplied by this."""
DRAWS = 600
PREDICTORS = ("inheritance", "capacity", "promise", "likeness", "agreement", "-KL")


def setting_of(model: str, run: Path, seed: int) -> Setting:
    """A teacher whose answers are known, as in a search."""
    weights = cifar10.folder() / "cifar10_resnets" / f"{model}.safetensors"
    own = {"model": f"{cifar10.__file__}:{model}", "data": f"{cifar10.__file__}:data", "weights": str(weights), "seed": seed}
    task = load_task(None, own)
    setting = prepare(task, run, load(task))
    setting.teacher.prepare(TEACHER_S)
    return setting


def candidates(forecast: Forecast, n: int, seed: int) -> Iterator[tuple[str, Proposal]]:
    """`n` policies of each band, all of different shapes."""
    generator, original = np.random.default_rng(seed), forecast.setting.baseline.latency_s.median
    suggesters = [LevelSuggester(generator) for _ in range(DRAWS)]
    drawn = forecast.proposals([forecast.suggest(suggester) for suggester in suggesters], [suggester.params for suggester in suggesters])
    pool = forecast.pool(seed, POOL_S)
    for band, middle in BANDS.items():
        seen: set[object] = set()
        for source, count in ((pool, n // 2), (drawn, n - n // 2)):
            inside = [p for p in source if 1 / BREADTH < p.latency_s / (middle * original) < BREADTH]
            for index in generator.permutation(len(inside)):
                shape = forecast.structure(inside[index].policy).shape
                if shape not in seen and count:
                    seen, count = seen | {shape}, count - 1
                    yield band, inside[index]


def judged(proposal: Proposal, likeness: Likeness) -> dict[str, float]:
    """What is known of a policy before it is trained."""
    started = time.monotonic()
    liked = likeness(proposal.policy)
    seconds = time.monotonic() - started
    answers, wanted = likeness.answers(likeness.student(proposal.policy)), likeness.wanted
    return {
        "inheritance": proposal.inheritance,
        "capacity": proposal.capacity,
        "promise": proposal.promise,
        "likeness": liked,
        "agreement": float((answers.argmax(1) == wanted.argmax(1)).float().mean()),
        "-KL": -float(soft_loss(answers, wanted, 1.0)),
        "appraisal_s": seconds,
    }


def trained(setting: Setting, proposal: Proposal, seconds: float, likeness: float) -> float:
    """Accuracy on validation after so many seconds, those of the repair included."""
    policy, graph, data = proposal.policy.model_copy(update={"quant": QuantSpec()}), setting.graphs[None], setting.data
    deadline, n = time.monotonic() + seconds, min(setting.calibration, examples_for(graph))
    student = build_student(graph, policy)
    repair(student, graph, policy, torch.cat([*data.calibration(n, n)]))
    lesson = Lesson(setting.teacher, policy.distill, shared_features(graph, policy))
    plan = TrainPlan(10**9, deadline, setting.learning_rate, setting.batch_size, seed=setting.seed, likeness=likeness)
    return score_model(train(student, data, plan, lesson=lesson), data, data.val).value


def table(rows: Sequence[dict]) -> str:
    """Markdown: a line for each model, time, seed and band, a column for each predictor."""
    lines = [
        "| model | short run | seed | latency | policies | scores | " + " | ".join(PREDICTORS) + " |",
        "|---" * (6 + len(PREDICTORS)) + "|",
    ]
    for key in dict.fromkeys((row["model"], row["seconds"], row["seed"], row["band"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["seconds"], row["seed"], row["band"]) == key]
        scores = [row["score"] for row in mine]
        found = [rank_correlation([row[name] for row in mine], scores) for name in PREDICTORS]
        cells = " | ".join("" if rho is None else f"{rho:.2f}" for rho in found)
        spread = f"{100 * min(scores):.1f} to {100 * max(scores):.1f} %"
        lines.append(f"| {key[0]} | {key[1]:g} s | {key[2]} | {key[3]} | {len(mine)} | {spread} | {cells} |")
    seconds = statistics.median(row["appraisal_s"] for row in rows)
    return "\n".join(lines) + f"\n\nAn appraisal took {seconds:.1f} s in the median.\n"


def main() -> None:
    """Judge, train, and judge the judgement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--policies", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        setting = setting_of(options.model, Path(folder), options.seed)
        print(f"original: {score_original(setting).value:.4f}", flush=True)
        space = find_suggest("default", setting.graphs[None], setting.device.profile)
        forecast = Forecast.start(setting, space, load_task(None, {}).limits)
        forecast.calibrate(CALIBRATION_S, options.seed, lambda phase, done, total: None)
        likeness = Likeness(setting)
        for band, proposal in candidates(forecast, options.policies, options.seed):
            known = {"model": options.model, "seconds": options.seconds, "seed": options.seed, "band": band}
            known |= {"policy": proposal.policy.in_words(), "latency_s": proposal.latency_s} | judged(proposal, likeness)
            rows.append(known | {"score": trained(setting, proposal, options.seconds, known["likeness"])})
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
