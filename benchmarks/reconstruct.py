"""What reconstruction before training is worth: the same students of a CIFAR-10 ResNet, as cut from their teacher and reconstructed.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/reconstruct.py --model resnet20 --seconds 0,20,60 --seeds 1

Both ways get the same seconds of distillation; the reconstruction's own time is taken from them, as in a search, and its rates are those of
a search. Interleaved. With 0 seconds nothing is trained (the cut student with batch norms that know it, the reconstructed one as it is).
Float32 students, scored on the whole test split, since validation images were part of what the teacher was trained on. Writes
benchmarks/results/reconstruct.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.quantize import CALIBRATION_INPUTS
from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import TeacherActivations, examples_for, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train
from autocompress.data import Data
from autocompress.devices import open_device
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import DistillSpec, Policy, PruneSpec, StudentSpec
from autocompress.trial.evaluate import score_model

RESULTS = Path(__file__).parent / "results"
TEACHER_S = 60.0


def students(graph: Graph) -> Iterator[tuple[str, Policy]]:
    """Shallower, narrower and both."""
    half = StudentSpec(drop=tuple(block.name for block in graph.blocks[1::2]))
    groups = [group for group in graph.groups if group.prunable]
    inner = PruneSpec(ratios={group.name: 0.5 for group in groups if not group.stream})
    everywhere = PruneSpec(ratios={group.name: 0.25 for group in groups})
    yield "every second block", Policy(student=half)
    yield "half of the channels inside blocks", Policy(prune=inner)
    yield "every second block, three quarters of all channels", Policy(student=half, prune=everywhere)
    yield (
        "every second block, 1.5 times the channels inside",
        Policy(student=half.model_copy(update={"widths": {group.name: 1.5 for group in groups if not group.stream}})),
    )


def examples(graph: Graph, data: Data) -> torch.Tensor:
    """What a search would reconstruct on."""
    n = min(CALIBRATION_INPUTS, examples_for(graph))
    return torch.cat([*data.calibration_batches(n, n)])


@torch.no_grad()
def settle(student: nn.Module, inputs: torch.Tensor) -> nn.Module:
    """Batch norms with the statistics of these inputs."""
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    student.train()(inputs)
    return student.eval()


def run(graph: Graph, policy: Policy, data: Data, teacher: Teacher, way: str, seconds: float, seed: int) -> dict[str, float]:
    """Test accuracy after so many seconds."""
    deadline, inputs = time.monotonic() + seconds, examples(graph, data)
    student, reconstruct_s = build_student(graph, policy), 0.0
    if way == "reconstructed":
        started = time.monotonic()
        reconstruct(student, TeacherActivations(graph, inputs), policy)
        reconstruct_s = time.monotonic() - started
    elif not seconds:
        settle(student, inputs)
    if seconds:
        plan = TrainPlan(10**9, deadline, seed=seed, to_learn=teacher.distance(student))
        train(student, data, plan, distillation=Distillation(teacher, DistillSpec(), compared_features(graph, policy, graph)))
    return {"test_accuracy": score_model(student, data, data.test).value, "reconstruct_s": reconstruct_s}


def table(rows: list[dict]) -> str:
    """Markdown: a line for each student and time."""
    lines = ["| student | seconds | cut | reconstructed | difference |", "|---|---|---|---|---|"]
    for student, seconds in dict.fromkeys((row["student"], row["seconds"]) for row in rows):
        mine = [row for row in rows if (row["student"], row["seconds"]) == (student, seconds)]
        cut, reconstructed = (statistics.mean(r["test_accuracy"] for r in mine if r["way"] == way) for way in ("cut", "reconstructed"))
        lines.append(f"| {student} | {seconds:g} | {100 * cut:.2f} % | {100 * reconstructed:.2f} % | {100 * (reconstructed - cut):+.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train every student both ways, interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--seconds", default="0,20,60")
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    data, model = cifar10.data(), getattr(cifar10, options.model)()
    load_weights(model, cifar10.folder() / "cifar10_resnets" / f"{options.model}.safetensors")
    graph, rows = Graph.trace(model.eval(), (data.example(1),)), []
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    for seed in range(options.seeds):
        teacher = Teacher(model, data, classifier=graph.classifier, seed=seed)
        teacher.prepare(TEACHER_S)
        for name, policy in students(graph):
            for seconds in map(float, options.seconds.split(",")):
                for way in ("cut", "reconstructed"):
                    known = {"student": name, "seconds": seconds, "way": way, "seed": seed}
                    rows.append(known | run(graph, policy, data, teacher, way, seconds, seed))
                    print(rows[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    told = {"model": options.model, "seeds": options.seeds, "torch": torch.__version__, "machine": machine, "rows": rows}
    (RESULTS / "reconstruct.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / "reconstruct.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
