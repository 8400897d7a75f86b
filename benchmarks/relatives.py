"""Does a student learn faster that begins with what a trained relative has learned?

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/relatives.py --model resnet20 --steps 100,300

A relative is trained for `--relative-steps`; then another student of the same teacher for so many steps, in float32 and by the same
distillation, from each of four beginnings: reconstructed from the teacher; so, and trained for SHORT_STEPS; with the relative's weights
where both have them, and norms re-estimated; and with these, reconstructed. Steps are counted and not timed.
Accuracy on SCORED test images. Writes benchmarks/results/relatives_MODEL.{json,md}.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import fx

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.compress.compared import compared_features
from autocompress.compress.inherit import inherit
from autocompress.compress.reconstruct import TeacherActivations, examples_for, reconstruct
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import Distillation, TrainPlan, train
from autocompress.data import sample
from autocompress.devices import open_device
from autocompress.evaluate import score_model
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import Policy, PruneSpec, StudentSpec

RESULTS = Path(__file__).parent / "results"
SHORT_STEPS, SCORED = 100, 2000
BEGINNINGS = ("teacher", "short run", "relative", "relative, reconstructed")


def pairs(graph: Graph) -> Iterator[tuple[str, Policy, Policy]]:
    """(kinship, the relative, the student)."""
    names = [block.name for block in graph.blocks if block.name.split(".")[-1] != "0"]
    inner = [group.name for group in graph.groups if group.prunable and not group.stream]

    def policy(drop: list[str], ratio: float) -> Policy:
        ratios = dict.fromkeys(inner, ratio) if ratio else {}
        return Policy(student=StudentSpec(drop=tuple(drop), multiple=8), prune=PruneSpec(ratios=ratios))

    some, more = names[1::2], [*names[1::2], *names[0 :: max(2, len(names) // 3)]]
    yield "smaller: more blocks dropped", policy(some, 0.0), policy(more, 0.0)
    yield "smaller: pruned by a quarter", policy(some, 0.0), policy(some, 0.25)
    yield "larger", policy(more, 0.25), policy(some, 0.0)
    yield "sibling: other blocks", policy(some, 0.0), policy(names[0::2][: len(some)], 0.0)


class Bench:
    """A teacher and its students."""

    def __init__(self, model: str, seed: int) -> None:
        self.data, self.seed = cifar10.data(), seed
        network = getattr(cifar10, model)()
        load_weights(network, cifar10.folder() / "cifar10_resnets" / f"{model}.safetensors")
        self.graph = Graph.trace(network.eval(), (self.data.example(1),))
        self.teacher = Teacher(network, self.data, classifier=self.graph.classifier, seed=seed)
        n = examples_for(self.graph)
        self.activations = TeacherActivations(self.graph, torch.cat([*self.data.calibration_batches(n, n)]))
        self.test = sample(self.data.test, SCORED)

    def begun(self, policy: Policy, beginning: str, relative: fx.GraphModule | None = None, of: Policy | None = None) -> fx.GraphModule:
        student = build_student(self.graph, policy)
        if relative is not None and of is not None:
            share = inherit(student, self.graph, policy, relative.state_dict(), of)
            print(f"  {100 * share:.0f} % of its weights are the relative's", flush=True)
        reconstruct(student, self.activations, policy, until=-math.inf if beginning == "relative" else math.inf)
        return student

    def trained(self, student: fx.GraphModule, policy: Policy, steps: int) -> fx.GraphModule:
        distillation = Distillation(self.teacher, policy.distill, compared_features(self.graph, policy, self.graph))
        plan = TrainPlan(steps, seed=self.seed, to_learn=self.teacher.distance(student))
        return train(student, self.data, plan, distillation=distillation)

    def score(self, student: fx.GraphModule) -> float:
        return score_model(student, self.data, self.test).value

    def rows(self, relative_steps: int, steps: list[int]) -> Iterator[dict[str, Any]]:
        for kinship, of, policy in pairs(self.graph):
            relative = self.trained(self.begun(of, "teacher"), of, relative_steps)
            print(kinship, f"relative {100 * self.score(relative):.1f} %", flush=True)
            for beginning in BEGINNINGS:
                known = (relative, of) if beginning.startswith("relative") else (None, None)
                student = self.begun(policy, beginning, *known)
                student = self.trained(student, policy, SHORT_STEPS) if beginning == "short run" else student
                started = time.monotonic()
                row = {"kinship": kinship, "beginning": beginning, "distance": self.teacher.distance(student)}
                row["score_0"] = self.score(student)
                for n in steps:
                    row[f"score_{n}"] = self.score(self.trained(copy.deepcopy(student), policy, n))
                print(row, f"{time.monotonic() - started:.0f} s", flush=True)
                yield row


def table(rows: list[dict[str, Any]], steps: list[int]) -> str:
    """Markdown."""
    lines = [f"| student | begins with | differs from the teacher | untrained | {' | '.join(f'{n} steps' for n in steps)} |"]
    lines += ["|---" * (4 + len(steps)) + "|"]
    for row in rows:
        scores = " | ".join(f"{100 * row[f'score_{n}']:.1f} %" for n in (0, *steps))
        lines.append(f"| {row['kinship']} | {row['beginning']} | {100 * row['distance']:.0f} % | {scores} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--steps", default="100,300")
    parser.add_argument("--relative-steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    steps = [int(n) for n in options.steps.split(",")]
    rows = [*Bench(options.model, options.seed).rows(options.relative_steps, steps)]
    machine = open_device("onnxruntime:cpu?threads=1").environment()
    target = RESULTS / f"relatives_{options.model}"
    target.with_suffix(".json").write_text(json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(rows, steps))
    print(table(rows, steps))


if __name__ == "__main__":
    main()
