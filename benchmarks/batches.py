"""Is a step of training better spent on many examples or are many steps of few? The same examples in batches of several sizes.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/batches.py --model resnet20 --examples 12800,38400 --sizes 128,64,32

Float32 students of `reconstruct.students`, each from the same reconstructed start, over the same views of the same examples in the same
order, as a search trains them; scored on up to 2,000 validation examples. Sizes are interleaved. Seconds are those of training, the
teacher's answers known. Writes benchmarks/results/batches_MODEL.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from rates import RATES, RESULTS, SCORED, trained
from reconstruct import examples, students

from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import TeacherActivations, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train
from autocompress.data import sample
from autocompress.devices import open_device
from autocompress.graph import Graph
from autocompress.policy import DistillSpec
from autocompress.trial.evaluate import score_model


def numbers(text: str) -> list[int]:
    """Integers with commas between them."""
    return [int(number) for number in text.split(",")]


def table(rows: list[dict], sizes: list[int]) -> str:
    """Markdown: a line for each student and number of examples."""
    lines = ["| student | distance | untrained | examples | " + " | ".join(f"batches of {size}" for size in sizes) + " |"]
    lines.append("|---" * (4 + len(sizes)) + "|")
    for row in rows:
        found = " | ".join(f"{100 * row[f'score_{size}']:.1f} %, {row[f'seconds_{size}']:.0f} s" for size in sizes)
        lines.append(f"| {row['student']} | {row['distance']:.2f} | {100 * row['untrained']:.1f} % | {row['examples']} | {found} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train every student from the same start on the same examples, in batches of each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=tuple(RATES))
    parser.add_argument("--examples", type=numbers, default=[12800, 38400])
    parser.add_argument("--sizes", type=numbers, default=[128, 64, 32])
    parser.add_argument("--students", type=int, default=3)
    options = parser.parse_args()
    model, data = trained(options.model)
    graph, rows, val = Graph.trace(model, (data.example(1),)), [], sample(data.val, SCORED)
    teacher, reference = Teacher(model, data, classifier=graph.classifier), TeacherActivations(graph, examples(graph, data))
    for n in options.examples:
        for name, policy in list(students(graph))[: options.students]:
            student = build_student(graph, policy)
            reconstruct(student, reference, policy)
            row = {"student": name, "examples": n, "distance": teacher.distance(student)}
            row["untrained"] = score_model(copy.deepcopy(student), data, val).value
            distillation = Distillation(teacher, DistillSpec(), compared_features(graph, policy, graph))
            for indices in torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:n].split(256):
                teacher.answers(indices, data.view(indices, 0, 0), 0)  # the first epoch of seed 0
            for size in options.sizes:
                plan = TrainPlan(n // size, batch_size=size, learning_rate=RATES[options.model], to_learn=row["distance"])
                started = time.monotonic()
                result = train(copy.deepcopy(student), data, plan, distillation=distillation)
                row |= {f"seconds_{size}": time.monotonic() - started, f"score_{size}": score_model(result, data, val).value}
            rows.append(row)
            print(row, flush=True)
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    told = {"model": options.model, "torch": torch.__version__, "machine": machine, "rows": rows}
    (RESULTS / f"batches_{options.model}.json").write_text(json.dumps(told, indent=1) + "\n")
    (RESULTS / f"batches_{options.model}.md").write_text(table(rows, options.sizes))
    print(table(rows, options.sizes))


if __name__ == "__main__":
    main()
