"""How gently a reconstructed student should be trained where steps are few: its score after N steps at shares of the usual rates.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/rates.py --model demo --steps 20,40,100
    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/rates.py --model resnet20 --steps 30,100

First as a search trains it, whose rates follow from the distance to the teacher.
Steps are counted and not timed, so that a busy machine changes nothing.
Float32 students of `reconstruct.students`, scored on up to 2,000
validation examples: what is found here sets constants of `compress/rates.py`. Writes benchmarks/results/rates_MODEL.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cifar10
from reconstruct import examples, students

from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import TeacherActivations, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train, train_quantized
from autocompress.data import Data, sample
from autocompress.data.sources import load_data
from autocompress.demo import LEARNING_RATE, TEACHER_EPOCHS
from autocompress.demo import teacher as demo_teacher
from autocompress.devices import open_device
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import DistillSpec
from autocompress.trial.evaluate import score_model

RESULTS = Path(__file__).parent / "results"
SCORED = 2000
RATES = {"demo": LEARNING_RATE, "resnet20": 0.1, "resnet56": 0.1}
"""Peak learning rates of a search of each."""


def trained(name: str) -> tuple[nn.Module, Data]:
    """A teacher and its data: the demonstration's, trained here, or a CIFAR-10 ResNet."""
    if name == "demo":
        torch.manual_seed(0)
        model, data = demo_teacher(), load_data("digits")
        train(model, data, TrainPlan(TEACHER_EPOCHS * (len(data.train) // 128), learning_rate=LEARNING_RATE))
        return model, data
    model = getattr(cifar10, name)()
    load_weights(model, cifar10.folder() / "cifar10_resnets" / f"{name}.safetensors")
    return model.eval(), cifar10.data()


def table(rows: list[dict], shares: list[float]) -> str:
    """Markdown: a line for each student and number of steps."""
    lines = ["| student | distance | untrained | steps | as a search | " + " | ".join(f"x {share:g}" for share in shares) + " |"]
    lines.append("|---" * (5 + len(shares)) + "|")
    for row in rows:
        scores = " | ".join(f"{100 * score:.1f} %" for score in row["scores"])
        lines.append(f"| {row['student']} | {row['distance']:.2f} | {100 * row['untrained']:.1f} % | {row['steps']} | {scores} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train every student from the same start, with as many steps, at each share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("demo", "resnet20", "resnet56"))
    parser.add_argument("--steps", default="30,100")
    parser.add_argument("--shares", default="1,0.5,0.25,0.12,0.06")
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    model, data = trained(options.model)
    graph, rows, val = Graph.trace(model, (data.example(1),)), [], sample(data.val, SCORED)
    teacher, reference = Teacher(model, data, classifier=graph.classifier), TeacherActivations(graph, examples(graph, data))
    for name, policy in students(graph):
        student = build_student(graph, policy)
        reconstruct(student, reference, policy)
        known = {"student": name, "distance": teacher.distance(student)}
        known["untrained"] = score_model(copy.deepcopy(student), data, val).value
        distillation = Distillation(teacher, DistillSpec(), compared_features(graph, policy, graph))
        for steps in map(int, options.steps.split(",")):
            plan = TrainPlan(steps, learning_rate=RATES[options.model], to_learn=known["distance"])
            as_a_search = train_quantized(copy.deepcopy(student), policy.quant, data, plan, distillation=distillation)
            scores = [score_model(as_a_search, data, val).value]
            for share in shares:
                plan = TrainPlan(steps, learning_rate=share * RATES[options.model])
                scores.append(score_model(train(copy.deepcopy(student), data, plan, distillation=distillation), data, val).value)
            rows.append(known | {"steps": steps, "scores": scores})
            print(rows[-1], flush=True)
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    told = {"model": options.model, "shares": shares, "torch": torch.__version__, "machine": machine, "rows": rows}
    (RESULTS / f"rates_{options.model}.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / f"rates_{options.model}.md").write_text(table(rows, shares))
    print(table(rows, shares))


if __name__ == "__main__":
    main()
