"""Students of another architecture: ResNet-20 distilled from ResNet-56 of CIFAR-10, its width, depth, pruning and bits searched.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/other_architecture.py --search-time 12m --out RUN

Runs `autocompress search benchmarks/cifar10_resnet56.toml --student benchmarks/cifar10.py:resnet20`, makes the best student again from what
was exported, and measures the front's files once more in a fresh process. Writes benchmarks/results/other_architecture.{json,md}. What
ResNet-56's own sub-networks reach in an hour is in cifar10_resnet56_*.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import autocompress
from autocompress.budget import Budget
from autocompress.devices import open_device
from autocompress.results import Entry, Results

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "other_architecture"
STUDENT = f"{HERE / 'cifar10.py'}:resnet20"
BUDGET, ROUNDS = "0.45x", 5
KEPT = {"id", "policy", "val_score", "test_score", "size_bytes", "steps"}


def search(out: Path, search_time: str, seed: int) -> Results:
    """Run the command, and read what it found."""
    options = ["--student", STUDENT, "--budget", BUDGET, "--search-time", search_time, "--seed", str(seed), "--out", str(out)]
    subprocess.run([sys.executable, "-m", "autocompress", "search", str(HERE / "cifar10_resnet56.toml"), *options], check=True)
    return Results.load(out)


def speedups(run: Path, results: Results) -> tuple[list[list[float]], int]:
    """Speed-ups of the front's files, ROUNDS of each, and how often one was over the budget."""
    device, budget = open_device(results.device), Budget.parse(BUDGET)
    paths = [run / str(results.baseline.artifact), *(run / str(entry.artifact) for entry in results.front)]
    rounds, over = [], 0
    for _ in range(ROUNDS):
        original, *others = device.measure(paths, seconds_each=2.0)
        rounds.append([original.median / latency.median for latency in others])
        over += sum(not budget.allows(m.beside(original), e.size_bytes) for m, e in zip(others, results.front, strict=True))
    return [list(column) for column in zip(*rounds, strict=True)], over


def made_again(run: Path, entry: Entry) -> None:
    """Raises where the student that is made of policy, weights and architecture answers otherwise than its file."""
    with tempfile.TemporaryDirectory() as folder:
        autocompress.SearchResult.load(run).export(Path(folder) / "shipped", pick=entry.id)
        autocompress.recreate(Path(folder) / "shipped", student=STUDENT)


def table(results: Results, measured: list[list[float]]) -> str:
    """One row for the original, and one for each file of the front."""
    original = results.baseline
    rows = ["| model | test accuracy | speed-up | size | trained |", "|---|---|---|---|---|"]
    assert original.test_score is not None
    rows.append(f"| ResNet-56 (float32) | {100 * original.test_score.value:.2f} % | 1.00x | {original.size_bytes / 1e3:.0f} kB | |")
    for entry, values in zip(results.front, measured, strict=True):
        speed = f"{statistics.median(values):.2f}x ({min(values):.2f}-{max(values):.2f})"
        score = 100 * (entry.test_score or entry.val_score).value
        rows.append(f"| {entry.words} | {score:.2f} % | {speed} | {entry.size_bytes / 1e3:.0f} kB | {entry.trained} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Search, measure again, write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search-time", default="12m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    began = datetime.datetime.now(datetime.UTC)
    commit = subprocess.run(["git", "-C", str(HERE), "describe", "--always", "--dirty"], check=True, capture_output=True, text=True)
    results = search(options.out, options.search_time, options.seed)
    measured, over = speedups(options.out, results)
    best = results.best_entry
    assert best is not None, "nothing is within the budget"
    made_again(options.out, best)
    known = {
        "date": began.isoformat(timespec="minutes"), "commit": commit.stdout.strip(), "search_time": options.search_time,
        "seed": options.seed, "budget": BUDGET, "machine": results.environment, "over_budget": over,
        "prediction": results.prediction.model_dump(mode="json"), "ladder": results.ladder.model_dump(mode="json"),
        "front": [entry.model_dump(mode="json", include=KEPT) | {"speedups": s} for entry, s in zip(results.front, measured, strict=True)],
    }  # fmt: skip
    RESULTS.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(table(results, measured))
    print(table(results, measured))


if __name__ == "__main__":
    main()
