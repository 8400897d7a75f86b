"""Does each part of the trainer earn its place? The same students, one part changed at a time, for the same time or number of steps.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/trainer.py --seconds 120 --seeds 2 --ways "usual,no hidden features"
    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/trainer.py --steps 300,1000 --seeds 2

Float32 students of `reconstruct.students`, reconstructed, interleaved, scored on the test split: the teachers were trained on what
validates. The teacher's answers for the first epoch are known beforehand, as they are to all but the first student of a search, which is
the harder case for hidden features: the teacher has to be asked for these every time. Writes benchmarks/results/trainer_MODEL.{json,md}.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent))
from rates import RATES, RESULTS, trained
from reconstruct import examples, students

from autocompress.compress import optimizer as optimizing
from autocompress.compress import rates as pacing
from autocompress.compress import teacher as teaching
from autocompress.compress.arithmetic import best_training_device
from autocompress.compress.compared import compared_features
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.reconstruct import TeacherActivations, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train
from autocompress.data import Data
from autocompress.devices import open_device
from autocompress.graph import Graph
from autocompress.policy import DistillSpec, Policy
from autocompress.trial.evaluate import score_model


@dataclass(frozen=True)
class Way:
    """What differs from the usual training: fields of the policy's distillation, names in the trainer's modules, size of a batch."""

    spec: dict[str, Any] = field(default_factory=dict)
    optimizing: dict[str, Any] = field(default_factory=dict)
    pacing: dict[str, Any] = field(default_factory=dict)
    teaching: dict[str, Any] = field(default_factory=dict)
    batch: int = 128
    reconstructed: bool = True

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module, changes in ((optimizing, self.optimizing), (pacing, self.pacing), (teaching, self.teaching)):
                for name, value in changes.items():
                    stack.enter_context(mock.patch.object(module, name, value))
            yield


def cosine(progress: float) -> float:
    """The usual rise, then half a cosine instead of a line."""
    if progress < pacing.WARM_UP_SHARE:
        return max(pacing.LEAST_RATE, progress / pacing.WARM_UP_SHARE)
    return max(pacing.LEAST_RATE, 0.5 * (1 + math.cos(math.pi * (progress - pacing.WARM_UP_SHARE) / (1 - pacing.WARM_UP_SHARE))))


WAYS = {
    "usual": Way(),
    "no hidden features": Way(spec={"hidden": 0.0}),
    "hidden features of whole batches": Way(teaching={"HIDDEN_SHARE": 1.0}),
    "hidden features of an eighth": Way(teaching={"HIDDEN_SHARE": 0.125}),
    "answers only": Way(spec={"features": 0.0}),
    "Muon at twice the rate": Way(optimizing={"MUON_SHARE": 2 * optimizing.MUON_SHARE}),
    "Muon at half the rate": Way(optimizing={"MUON_SHARE": optimizing.MUON_SHARE / 2}),
    "SGD only": Way(optimizing={"hidden_matrices": lambda model: []}),
    "cosine": Way(pacing={"one_cycle": cosine}),
    "batches of 64": Way(batch=64),
    "batches of 256": Way(batch=256),
    "alpha 1": Way(spec={"alpha": 1.0}),
    "T 2": Way(spec={"temperature": 2.0}),
    "decoupled": Way(spec={"answers": "decoupled"}),
    "relational": Way(spec={"answers": "relational"}),
    "not reconstructed": Way(reconstructed=False),
}


def run(
    way: Way, graph: Graph, policy: Policy, teacher: Teacher, activations: TeacherActivations, data: Data, plan: TrainPlan, seconds: float
) -> dict:
    """Test accuracy of a student that was trained by the plan, for so many seconds at most."""
    student, steps = build_student(graph, policy), 0
    if way.reconstructed:
        reconstruct(student, activations, policy)
    distance = teacher.distance(student)

    def count(_: float) -> None:
        nonlocal steps
        steps += 1

    with way.applied():
        distillation = Distillation(teacher, DistillSpec(**way.spec), compared_features(graph, policy, graph))
        begun = time.monotonic()
        steps_of_its_own = plan.steps * plan.batch_size // way.batch
        asked = replace(plan, steps=steps_of_its_own, deadline=begun + seconds, batch_size=way.batch, to_learn=distance)
        train(student, data, asked, distillation=distillation, tick=count)
    took_s = time.monotonic() - begun
    for view in teacher._kept.keys() - {0}:  # the next one is to find the same answers known
        del teacher._kept[view]
    return {"distance": distance, "steps": steps, "seconds": took_s, "test_accuracy": score_model(student, data, data.test).value}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each way, a column for each student and length of training."""
    columns = list(dict.fromkeys((row["student"], row["length"]) for row in rows))
    lines = ["| | " + " | ".join(f"{student}, {length}" for student, length in columns) + " |", "|---|" + "---|" * len(columns)]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for column in columns:
            runs = [row for row in rows if row["way"] == way and (row["student"], row["length"]) == column]
            scores = ", ".join(f"{100 * row['test_accuracy']:.2f}" for row in runs)
            cells.append(f"{scores} % ({statistics.mean(row['steps'] for row in runs):.0f} steps)" if runs else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train every student in every way, interleaved; results are written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet56", choices=sorted(RATES))
    parser.add_argument("--seconds", help="of training: 60,120")
    parser.add_argument("--steps", help="of training, instead: 300,1000")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--students", default="0,1,2", help="places of the students")
    parser.add_argument("--ways", default=",".join(WAYS), help="some of the ways")
    options = parser.parse_args()
    if bool(options.seconds) == bool(options.steps):
        parser.error("give --seconds or --steps")
    lengths = {f"{n} s": (10**9, float(n)) for n in (options.seconds or "").split(",") if n}
    lengths |= {f"{n} steps": (int(n), math.inf) for n in (options.steps or "").split(",") if n}
    model, data = trained(options.model)
    graph, rows = Graph.trace(model, (data.example(1),)), []
    activations = TeacherActivations(graph, examples(graph, data))
    machine = open_device("onnxruntime:cpu?threads=1").environment() | {"trained on": str(best_training_device())}
    chosen = [list(students(graph))[int(place)] for place in options.students.split(",")]
    for seed in range(options.seeds):
        teacher = Teacher(model.to(best_training_device()), data, classifier=graph.classifier, seed=seed)
        for indices in torch.arange(len(data.train)).split(256):
            teacher.answers(indices, data.view(indices, 0, seed), 0)
        for name, policy in chosen:
            for length, (steps, seconds) in lengths.items():
                for way in options.ways.split(","):
                    plan = TrainPlan(steps, learning_rate=RATES[options.model], seed=seed)
                    known = {"student": name, "length": length, "way": way, "seed": seed}
                    rows.append(known | run(WAYS[way], graph, policy, teacher, activations, data, plan, seconds))
                    print(rows[-1], flush=True)
                    told = {"model": options.model, "torch": torch.__version__, "machine": machine, "rows": rows}
                    (RESULTS / f"trainer_{options.model}.json").write_text(json.dumps(told, indent=1) + "\n")
                    (RESULTS / f"trainer_{options.model}.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
