"""Does each part of the trainer earn its place? The same students of ResNet-56, the same views and steps, one part added at a time.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/trainer.py --epochs 3 --seeds 2

Float32 students without quantization. Validation images were part of what the teacher was trained on, so that whatever makes students
more like their teacher looks better there than it is: the test split is what counts here. Writes benchmarks/results/trainer.json and
prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.compress import train as trainer
from autocompress.compress.student import build_student, compared_features
from autocompress.compress.teacher import Teacher
from autocompress.data import Data
from autocompress.devices import open_device
from autocompress.evaluate import score_model
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import DistillSpec, Policy, StudentSpec
from autocompress.search_space import spread, stages_of

RESULTS = Path(__file__).parent / "results" / "trainer.json"
SGD_LEARNING_RATE = 0.2
"""SGD runs at half of it, 0.1: the usual peak for these networks and batch."""
RECIPES = {"sgd, answers": ("sgd", 0.0), "muon, answers": ("muon", 0.0), "muon, answers and features": ("muon", DistillSpec().features)}
STUDENTS = {"sliced 3,3,3": ((3, 2, 2), (1.0, 1.0, 1.0)), "wide 1,2,2": ((1, 1, 1), (1.0, 3.0, 2.0))}


def policy(graph: Graph, keep: tuple[int, ...], widths: tuple[float, ...]) -> Policy:
    """Keep so many droppable blocks of each stage, and multiply each stage's channels."""
    stages = [stage for stage in stages_of(graph) if stage.blocks]
    drop, factors = [], {}
    for stage, n, width in zip(stages, keep, widths, strict=True):
        kept = set(spread(len(stage.blocks), n))
        drop += [block for index, block in enumerate(stage.blocks) if index not in kept]
        factors |= dict.fromkeys((*stage.inner, *([stage.stream] if stage.stream else [])), width)
    return Policy(student=StudentSpec(drop=tuple(drop), widths=factors))


def run(graph: Graph, chosen: Policy, data: Data, teacher: Teacher, recipe: str, epochs: float, seed: int) -> dict[str, float]:
    """Accuracies and seconds of one training."""
    optimiser, features = RECIPES[recipe]
    steps = int(epochs * (len(data.train) // 128))
    plan = trainer.TrainPlan(steps, seed=seed, learning_rate=SGD_LEARNING_RATE if optimiser == "sgd" else 0.1)
    distillation = trainer.Distillation(teacher, DistillSpec(features=features), compared_features(graph, chosen, graph))
    keep, started = trainer.hidden_matrices, time.monotonic()
    try:
        if optimiser == "sgd":
            trainer.hidden_matrices = lambda model: []
        student: nn.Module = trainer.train(build_student(graph, chosen), data, plan, distillation=distillation)
    finally:
        trainer.hidden_matrices = keep
    seconds = time.monotonic() - started
    return {
        "val_accuracy": score_model(student, data, data.val).value,
        "test_accuracy": score_model(student, data, data.test).value,
        "seconds": seconds,
    }


def main() -> None:
    """Train every student with every recipe over the seeds, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    data, model = cifar10.data(), cifar10.resnet56()
    load_weights(model, cifar10.folder() / "cifar10_resnets" / "resnet56.safetensors")
    graph, rows = Graph.trace(model.eval(), (data.example(1),)), []
    for seed in range(options.seeds):
        teacher = Teacher(model, data, classifier=graph.classifier, seed=seed)
        for name, (keep, widths) in STUDENTS.items():
            for recipe in RECIPES:
                rows.append(
                    {"student": name, "recipe": recipe, "seed": seed}
                    | run(graph, policy(graph, keep, widths), data, teacher, recipe, options.epochs, seed)
                )
                print(rows[-1], flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    RESULTS.write_text(
        json.dumps({"epochs": options.epochs, "torch": torch.__version__, "machine": machine, "rows": rows}, indent=1) + "\n"
    )
    for name in STUDENTS:
        for recipe in RECIPES:
            values = [r["test_accuracy"] for r in rows if r["student"] == name and r["recipe"] == recipe]
            print(f"{name:14s} {recipe:28s} {100 * statistics.mean(values):.2f} % ({100 * min(values):.2f}-{100 * max(values):.2f})")


if __name__ == "__main__":
    main()
