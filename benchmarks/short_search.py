"""What does a search of a few minutes find, of one commit and of another? Interleaved, the same model, budget, time and machine.

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/short_search.py --commits 7b40150,HEAD --model resnet20 --budget 0.35x

Each commit is cloned and searches as its users do, on CIFAR-10 with a pretrained network. What is compared is the best policy within the
budget: its accuracy on the test split as the search reports it, and the share of the time that went to training (of commits that keep it).
A run whose folder is there is not repeated. Writes benchmarks/results/short_search_MODEL.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cifar10 import folder

from autocompress.devices import open_device

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEVICE = "onnxruntime:cpu?threads=1"


def clone(commit: str, out: Path) -> Path:
    """The code of a commit."""
    target = out / f"code-{commit}"
    if not target.is_dir():
        subprocess.run(["git", "clone", "-q", str(HERE.parent), str(target)], check=True)
        subprocess.run(["git", "-C", str(target), "checkout", "-q", commit], check=True)
    return target


def search(code: Path, run: Path, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What front.json says at the end."""
    result = run / "front.json"
    if not result.is_file():
        data = folder().resolve()
        command = [
            sys.executable, "-m", "autocompress", "search", "--model", f"{code}/benchmarks/cifar10.py:{options.model}",
            "--data", f"{code}/benchmarks/cifar10.py:data", "--weights", str(data / "cifar10_resnets" / f"{options.model}.safetensors"),
            "--budget", options.budget, "--search-time", options.search_time, "--seed", str(seed), "--device", DEVICE, "--out", str(run),
        ]  # fmt: skip
        subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": str(code), "AUTOCOMPRESS_DATA": str(data)})
    return dict(json.loads(result.read_text()))


def row(commit: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    """What is compared; None where nothing met the budget."""
    best = next((entry for entry in found["points"] if entry["id"] == found["best"]), None)
    score = best and (best["test_score"] or best["val_score"])
    spent = found.get("spent_s", {})
    return {
        "commit": commit, "seed": seed, "elapsed_s": found["elapsed_s"],
        "best": best and {"id": best["id"], "speedup": best["speedup"], "accuracy": score["value"], "n": score["n"]},
        "front": [(e["speedup"], (e["test_score"] or e["val_score"])["value"]) for e in found["front"]],
        "short_runs": found["ladder"]["short_runs"], "full_runs": found["ladder"]["full_runs"],
        "training_share": spent.get("train", 0.0) / found["elapsed_s"] if spent else None, "spent_s": spent,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| commit | seed | best within the budget: test accuracy | speed-up | short runs | full runs | training | time |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        best = r["best"]
        found = f"{100 * best['accuracy']:.2f} % (n = {best['n']}) | {best['speedup']:.2f}x" if best else "nothing | "
        share = f"{100 * r['training_share']:.0f} %" if r["training_share"] is not None else "?"
        lines.append(f"| {r['commit']} | {r['seed']} | {found} | {r['short_runs']} | {r['full_runs']} | {share} | {r['elapsed_s']:.0f} s |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Search with each commit in turn, seed by seed, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", required=True, help="two or more, as git names them")
    parser.add_argument("--model", default="resnet20", choices=("resnet20", "resnet56"))
    parser.add_argument("--budget", default="0.35x")
    parser.add_argument("--search-time", default="8m")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/short_search"))
    options = parser.parse_args()
    named = ["git", "-C", str(HERE), "rev-parse", "--short"]
    commits = [subprocess.run([*named, c], capture_output=True, text=True, check=True).stdout.strip() for c in options.commits.split(",")]
    out, rows = options.out.resolve(), []
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for commit in commits:
            run = out / f"{commit}_{options.model}_{seed}"
            rows.append(row(commit, seed, search(clone(commit, out), run, options, seed)))
            asked_for = {"budget": options.budget, "search_time": options.search_time}
            known = {"machine": open_device(DEVICE).environment(), **asked_for, "rows": rows}
            target = RESULTS / f"short_search_{options.model}"
            target.with_suffix(".json").write_text(json.dumps(known, indent=1) + "\n")
            target.with_suffix(".md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
