"""What a user of ResNet-56 on CIFAR-10 gets in an hour: our front beside static int8 and beside the best channel pruner.

    .venv/bin/pip install -q -e ".[dev]"
    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/cifar10_resnet56.py --out RUN

Runs `autocompress search benchmarks/cifar10_resnet56.toml --budget 0.45x --search-time 60m`, then builds the two rivals: ONNX Runtime's own
static quantization of the same float32 file, and Torch-Pruning at 50 % with six epochs of our distillation and our int8. All files are
scored on the 10,000 test images by ONNX Runtime and measured interleaved with the float32 file in a fresh process. Writes
benchmarks/results/cifar10_resnet56.{json,md} and the plot; with `--seed 1`, cifar10_resnet56_seed1. `--run RUN` takes a finished search
instead of searching. Exit code 1 when a file that the search reported as within the budget is over it in a fresh process.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp  # the rival; an hour before it is needed, so that its absence costs no hour
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.budget import Budget
from autocompress.compress.distill import Compared, ComparedFeatures
from autocompress.compress.loss import Distillation
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.teacher import Teacher
from autocompress.compress.train import train_quantized
from autocompress.data import Data
from autocompress.devices import open_device
from autocompress.export import Provenance, write_bundle
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import DistillSpec, Policy, QuantSpec
from autocompress.records import Measurement
from autocompress.trial.evaluate import score_artifact

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DEVICE = "onnxruntime:cpu?threads=1"
RIVAL_EPOCHS = 6
CALIBRATION = 512
ROUNDS = 5
MADE = "made.json"
TARGETS = ((2.2, 0.933), (4.0, 0.927), (6.0, 0.917))


def commit() -> str:
    """Of the code that ran, with a mark where it was changed."""
    asked = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def search(out: Path, search_time: str, seed: int) -> None:
    """The command of the README."""
    command = [sys.executable, "-m", "autocompress", "search", str(HERE / "cifar10_resnet56.toml"), "--budget", "0.45x"]
    subprocess.run([*command, "--search-time", search_time, "--seed", str(seed), "--out", str(out)], check=True)


class Calibration(CalibrationDataReader):
    """Training images, one a call."""

    def __init__(self, data: Data, name: str) -> None:
        self._rows = iter(
            [{name: image[None].numpy()} for images in data.calibration_batches(CALIBRATION, CALIBRATION) for image in images]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._rows, None)


def static_int8(baseline: Path, data: Data, folder: Path) -> Path:
    """ONNX Runtime's own post-training quantization: QDQ, per channel, uint8 activations, int8 weights."""
    import onnx

    prepared, target = folder / "prepared.onnx", folder / "static_int8.onnx"
    quant_pre_process(str(baseline), str(prepared))
    name = onnx.load(str(prepared)).graph.input[0].name
    quantize_static(
        str(prepared), str(target), Calibration(data, name), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return target


def kept_features(pruned: nn.Module, teacher: nn.Module) -> ComparedFeatures:
    """Which inputs of the classifier and of each block the pruned network has kept: those whose weights are the teacher's."""
    norm, hidden = "bn1", []  # what each block reads was last scaled by the norm before it
    for stage in ("layer1", "layer2", "layer3"):
        for place in range(len(getattr(teacher, stage))):
            own, whole = (torch.stack([n.weight, n.bias, n.running_mean], 1) for n in (m.get_submodule(norm) for m in (pruned, teacher)))
            name = f"{stage}.{place}.conv1"
            hidden.append(Compared(name, name, shared={1: shared(own, whole)}))
            norm = f"{stage}.{place}.bn2"
    features = Compared("linear", "linear", shared={1: shared(pruned.linear.weight.T, teacher.linear.weight.T)})
    return ComparedFeatures("linear", features, tuple(hidden))


def shared(own: torch.Tensor, whole: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of each row of `own`, and of the one row of `whole` that is equal to it."""
    rows, original = (own[:, None] == whole[None]).all(2).nonzero(as_tuple=True)
    assert torch.equal(rows, torch.arange(len(own))), "the pruned network's channels are the teacher's"
    return rows, original


def torch_pruning(data: Data, teacher: Teacher, folder: Path) -> tuple[Path, float]:
    """Torch-Pruning at half of the channels, then our distillation and our int8; the file and the seconds of training."""
    model, example = cifar10.resnet56(), data.example(1)
    load_weights(model, cifar10.folder() / "cifar10_resnets" / "resnet56.safetensors")
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, round_to=8, ignored_layers=[model.linear]
    )
    pruner.step()
    graph = Graph.trace(model, (example,))
    quant, steps = QuantSpec(bits=8), RIVAL_EPOCHS * (len(data.train) // 128)
    started = time.monotonic()
    distillation = Distillation(teacher, DistillSpec(), kept_features(model, teacher.model))
    student = train_quantized(build_student(graph, Policy()), quant, data, TrainPlan(steps), distillation=distillation)
    seconds = time.monotonic() - started
    write_bundle(folder / "torch_pruning", student, Policy(quant=quant), example, Provenance(model="torch-pruning 50 %"))
    return folder / "torch_pruning" / "model.onnx", seconds


def rivals(run: Path, data: Data, folder: Path) -> dict[str, tuple[Path, str]]:
    """The files that a user could have had without us, with what was done; those that lie in `folder` already are taken as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / MADE
    if made.is_file():
        known = json.loads(made.read_text())
        return {name: (folder / path, f"{what}, by {known['commit']}") for name, (path, what) in known["files"].items()}
    model = cifar10.resnet56()
    load_weights(model, cifar10.folder() / "cifar10_resnets" / "resnet56.safetensors")
    teacher = Teacher(model.eval(), data, classifier="linear")
    pruned, seconds = torch_pruning(data, teacher, folder)
    found = {
        "static int8": (static_int8(run / "models/baseline/model.onnx", data, folder), "onnxruntime.quantization, 512 images"),
        "Torch-Pruning 50 % + int8": (pruned, f"{RIVAL_EPOCHS} epochs of the same distillation ({seconds / 60:.0f} min)"),
    }
    files = {name: (str(path.relative_to(folder)), what) for name, (path, what) in found.items()}
    made.write_text(json.dumps({"commit": commit(), "files": files}))
    return found


def measured(paths: list[Path]) -> list[list[Measurement]]:
    """Each file ROUNDS times, all files interleaved, a fresh process a round."""
    device = open_device(DEVICE)
    rounds = [device.measure(paths, seconds_each=2.0) for _ in range(ROUNDS)]
    return [list(column) for column in zip(*rounds, strict=True)]


def row(name: str, what: str, path: Path, data: Data, times: list[Measurement], base: list[Measurement]) -> dict[str, Any]:
    ratios = sorted(b.median / t.median for b, t in zip(base, times, strict=True))
    return {
        "name": name, "what": what, "file": path.name, "size_bytes": path.stat().st_size,
        "test_accuracy": score_artifact(open_device(DEVICE), path, data, data.test, 1).value,
        "speedup": ratios[len(ratios) // 2], "speedup_low": ratios[0], "speedup_high": ratios[-1],
        "latency_s": sorted(t.median for t in times)[len(times) // 2],
        "latency_high_s": max(t.high for t in times), "noisy_rounds": sum(t.noisy for t in times),
    }  # fmt: skip


def reached(rows: list[dict[str, Any]], speedup: float, accuracy: float) -> bool:
    return any(r["speedup"] >= speedup and r["test_accuracy"] >= accuracy for r in rows)


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | test accuracy | latency | speed-up | size | |", "|---|---|---|---|---|---|"]
    for r in rows:
        speed = f"{r['speedup']:.2f}x ({r['speedup_low']:.2f}-{r['speedup_high']:.2f}){' noisy' if 2 * r['noisy_rounds'] > ROUNDS else ''}"
        size = f"{r['size_bytes'] / 1e3:.0f} kB"
        lines.append(f"| {r['name']} | {100 * r['test_accuracy']:.2f} % | {1e3 * r['latency_s']:.3f} ms | {speed} | {size} | {r['what']} |")
    return "\n".join(lines) + "\n"


def over_budget(named: list[tuple[str, str, Path]], times: list[list[Measurement]], limits: list[str]) -> list[str]:
    """Of our files those that were over the budget in any round; a relative budget is of what the first file, the original, took in it."""
    budget = Budget.parse(tuple(limits))
    ours = [(name, path, own) for (name, _, path), own in zip(named, times, strict=True) if name.startswith("autocompress")]

    def within(path: Path, own: list[Measurement]) -> bool:
        return all(budget.allows(m.beside(original), path.stat().st_size) for m, original in zip(own, times[0], strict=True))

    return [name for name, path, own in ours if not within(path, own)]


def main() -> int:
    """Search, build the rivals, score and measure everything, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10_resnet56"))
    parser.add_argument("--run", type=Path, help="a finished search, instead of searching")
    parser.add_argument("--search-time", default="60m")
    parser.add_argument("--seed", type=int, default=0, help="of the search; other seeds than 0 write files of their own")
    parser.add_argument("--rivals", type=Path, help="where the rivals' files are kept, or taken from where they were made before")
    parser.add_argument("--skip-rivals", action="store_true", help="score and measure our own files only")
    parser.add_argument("--name", help="of the result files; cifar10_resnet56, with the seed where it is not 0")
    options = parser.parse_args()
    os.environ.setdefault("AUTOCOMPRESS_DATA", "../shared/data")
    run = options.run or options.out
    if options.run is None:
        search(run, options.search_time, options.seed)
    front, data = json.loads((run / "front.json").read_text()), cifar10.data()
    seed = front["task"]["seed"]
    others = {} if options.skip_rivals else rivals(run, data, options.rivals or run / "rivals")
    baseline = run / front["baseline"]["artifact"]
    named = [("original (float32)", "ResNet-56", baseline), *((n, what, path) for n, (path, what) in others.items())]
    named += [(f"autocompress {e['id']}", e["words"], run / e["artifact"]) for e in front["front"]]
    times = measured([path for _, _, path in named])
    rows = [row(name, what, path, data, t, times[0]) for (name, what, path), t in zip(named, times, strict=True)]
    ours = [r for r in rows if r["name"].startswith("autocompress")]
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": open_device(DEVICE).environment(),
        "torch": torch.__version__, "seed": seed, "search_time": front["task"]["search_time"], "search_seconds": front["elapsed_s"],
        "budget": front["task"]["budget"], "rows": rows,
        "targets": [{"speedup": s, "accuracy": a, "reached": reached(ours, s, a)} for s, a in TARGETS],
        "over_budget_again": over_budget(named, times, front["task"]["budget"]), "commit": commit(),
        "prediction": front["prediction"], "ladder": front["ladder"], "trials": front["trials"],
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / (options.name or f"cifar10_resnet56{f'_seed{seed}' if seed else ''}")
    target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(rows))
    shutil.copyfile(run / "pareto.png", target.with_suffix(".png"))
    print(table(rows))
    print(json.dumps(result["targets"], indent=1))
    return 1 if result["over_budget_again"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
