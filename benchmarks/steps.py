"""What does a step of training take, and the teacher's answer? Ways of computing both, in turns.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/steps.py --rounds 7

A student of ResNet-56 with every second block, batches of 128; the teacher's outputs are known, as to all but the first student of a
search, and its norms are folded. `by autograd` compares hidden features as slices in float32, as was done
before `compress/hidden.py`. A round takes the median of STEPS; ratios are of rounds. Writes benchmarks/results/steps.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from rates import RESULTS, trained
from reconstruct import students

from autocompress.compress import loss as losses
from autocompress.compress.compared import compared_features
from autocompress.compress.distill import Answers, ComparedFeatures, value_loss
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train
from autocompress.data import Data
from autocompress.devices import open_device
from autocompress.export.fold import fold_norms
from autocompress.graph import Graph
from autocompress.policy import DistillSpec

STEPS, WARM_UP = 10, 3
PLAN = TrainPlan(WARM_UP + STEPS, to_learn=0.1)
IMAGES = 256


def by_autograd(student: Answers, teacher: Answers, compared: ComparedFeatures) -> Tensor:
    """`compare_hidden` without a gradient of its own."""
    losses = []
    for layer in compared.hidden:
        wanted = teacher.hidden[layer.counterpart].detach()
        own, wanted = layer.of(student.hidden[layer.layer][: len(wanted)].float(), wanted.float())
        losses.append(value_loss(own, wanted, layer.axis))
    return torch.stack(losses).mean()


def step_of(graph: Graph, data: Data, folded: nn.Module, hidden: float) -> Callable[[], float]:
    """Measures seconds of a step."""
    _, policy = next(students(graph))
    teacher = Teacher(folded, data, classifier=graph.classifier)
    for indices, _ in itertools.islice(PLAN.draws(len(data.train), start=0), PLAN.steps):
        teacher.answers(indices, data.view(indices, 0), 0)
    distillation = Distillation(teacher, DistillSpec(hidden=hidden), compared_features(graph, policy, graph))
    student = build_student(graph, policy)

    def measure() -> float:
        moments: list[float] = []
        train(student, data, PLAN, distillation=distillation, tick=lambda _: moments.append(time.perf_counter()))
        return statistics.median([after - before for before, after in itertools.pairwise(moments)][WARM_UP - 1 :])

    return measure


def answer_of(graph: Graph, data: Data, model: nn.Module) -> Callable[[], float]:
    """Measures seconds of the teacher's answer to IMAGES."""
    teacher, inputs = Teacher(model, data, classifier=graph.classifier), data.view(torch.arange(IMAGES), 0)

    def measure() -> float:
        moments = [time.perf_counter()]
        for _ in range(PLAN.steps):
            teacher._answer(inputs)
            moments.append(time.perf_counter())
        return statistics.median([after - before for before, after in itertools.pairwise(moments)][WARM_UP:])

    return measure


def main() -> None:
    """All ways in turns, several times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    model, data = trained("resnet56")
    graph = Graph.trace(model, (data.example(1),))
    folded = copy.deepcopy(graph.module)
    fold_norms(folded)
    step, without = (step_of(graph, data, folded, hidden) for hidden in (DistillSpec().hidden, 0.0))

    def as_before() -> float:
        with mock.patch.object(losses, "compare_hidden", by_autograd):
            return step()

    usual_step, usual_answer = "a step, hidden features compared", f"the teacher's answer to {IMAGES} images, norms folded"
    ways = {
        usual_step: step,
        "... by autograd": as_before,
        "... no hidden features": without,
        usual_answer: answer_of(graph, data, folded),
        "... as it is": answer_of(graph, data, model),
    }
    taken = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            taken[name].append(measure())
        print({name: f"{1000 * seconds[-1]:.0f} ms" for name, seconds in taken.items()}, flush=True)
    rows = []
    for name, seconds in taken.items():
        usual = taken[usual_answer if name in (usual_answer, "... as it is") else usual_step]
        ratios = sorted(own / other for own, other in zip(seconds, usual, strict=True))
        spread = {"ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
        rows.append({"way": name, "seconds": statistics.median(seconds)} | spread)
    told = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "torch": torch.__version__, "rounds": rounds}
    told |= {"machine": open_device("onnxruntime:cpu?threads=1").environment(), "rows": rows}
    (RESULTS / "steps.json").write_text(json.dumps(told, indent=1) + "\n")
    lines = [f"| {r['way']} | {1000 * r['seconds']:.0f} ms | {r['ratio']:.2f} ({r['ratio_low']:.2f}-{r['ratio_high']:.2f}) |" for r in rows]
    table = "\n".join(["| | median | in units of the usual way (range) |", "|---|---|---|", *lines]) + "\n"
    (RESULTS / "steps.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
