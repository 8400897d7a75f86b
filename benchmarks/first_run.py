"""What someone sees who follows the first page of the README word for word: the commands, how long each takes, what comes out.

    .venv/bin/python benchmarks/first_run.py

Runs the commands of the section "Start" in an empty folder, on a clone of this repository, in an environment of its own; then the Python
of that section in another environment, which holds numpy and onnxruntime alone; and measures the front again. Writes
benchmarks/results/first_run.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from autocompress.budget import Budget
from autocompress.devices import open_device

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "first_run.json"
ROUNDS = 5
STEPS = re.compile(r"(?<=[^&])&&(?=[^&])")
"""The commands of one line that are timed one by one."""


def blocks(language: str) -> list[str]:
    """The code of the README's section "Start"."""
    start = (ROOT / "README.md").read_text(encoding="utf-8").split("## Start")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", start, re.DOTALL)


def follow(commands: str, folder: Path) -> list[dict[str, object]]:
    """Run lines of a shell one step after the other in one folder that `cd` changes; raises CalledProcessError where one fails."""
    rows: list[dict[str, object]] = []
    for step in (step.strip() for line in commands.splitlines() if line for step in STEPS.split(line)):
        if step.startswith("cd "):
            folder /= step.removeprefix("cd ")
            continue
        started = time.monotonic()
        done = subprocess.run(["bash", "-c", step], cwd=folder, check=True, capture_output=True, text=True)
        rows.append({"step": step, "seconds": round(time.monotonic() - started, 1), "says": (done.stdout.strip().splitlines() or [""])[-1]})
        print(rows[-1], flush=True)
    return rows


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    """Of an entry of front.json: milliseconds, test accuracy and bytes."""
    return {"ms": 1000 * entry["latency_s"]["median"], "test_accuracy": entry["test_score"]["value"], "bytes": entry["size_bytes"]}


def over_again(run: Path, found: dict[str, Any]) -> int:
    """How often files of the front are over the budget when they are measured again, ROUNDS times, each time by a fresh process."""
    device, budget = open_device(found["device"]), Budget.parse(tuple(found["task"]["budget"]))
    paths = [run / found["baseline"]["artifact"], *(run / entry["artifact"] for entry in found["front"])]
    over = 0
    for _ in range(ROUNDS):
        original, *others = device.measure(paths, seconds_each=2.0)
        sizes = [entry["size_bytes"] for entry in found["front"]]
        over += sum(not budget.allows(m.beside(original), size) for m, size in zip(others, sizes, strict=True))
    return over


def main() -> None:
    """Follow the README, run what it shipped, and write down what happened."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    began = datetime.datetime.now(datetime.UTC)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, check=True, capture_output=True, text=True)
    with tempfile.TemporaryDirectory(prefix="first-run-") as name:
        home = Path(name)
        rows = follow("\n".join(blocks("bash")).replace("REPOSITORY", str(ROOT)), home)
        found = json.loads((home / "autocompress" / "run" / "front.json").read_text(encoding="utf-8"))
        over = over_again(home / "autocompress" / "run", found)
        plain = home / "plain"
        subprocess.run([sys.executable, "-m", "venv", str(plain)], check=True)
        subprocess.run([plain / "bin" / "pip", "install", "-q", "numpy", "onnxruntime"], check=True)
        for code in blocks("python"):
            subprocess.run([plain / "bin" / "python", "-c", code], cwd=home / "autocompress", check=True)
    best = next(entry for entry in found["front"] if entry["id"] == found["best"])
    result = {
        "date": began.isoformat(timespec="minutes"),
        "commit": commit.stdout.strip(),
        "machine": open_device("onnxruntime:cpu?threads=1").environment(),
        "steps": rows,
        "original": numbers(found["baseline"]),
        "best": numbers(best) | {"noisy": best["latency_s"]["noisy"], "test_examples": best["test_score"]["n"]},
        "measured_again": {"files": len(found["front"]), "rounds": ROUNDS, "over_the_budget": over},
        "runs_in_plain_onnxruntime": True,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
