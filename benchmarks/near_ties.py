"""How far does an int8 file decide as the network that it was exported from, and what of the rest are near ties?

    AUTOCOMPRESS_DATA=../shared/data .venv/bin/python benchmarks/near_ties.py

The student computes int8 in floating point, the runtime in integers. Where a value lies halfway between two integers they may round it to
different ones, and what becomes of that moves the outputs. Three networks in int8, calibrated and not trained, on 1,000 test images of
CIFAR-10: two that know what they see, and a ResNet-18 that was trained for `--seconds` on images of 64 pixels and hardly does. Writes
benchmarks/results/near_ties.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import interpolate

sys.path.insert(0, str(Path(__file__).parent))
import cifar10

from autocompress.compress.quantize import CALIBRATION_BATCH, CALIBRATION_INPUTS, calibrate, fake_quantize, snap_biases
from autocompress.compress.rates import TrainPlan
from autocompress.compress.student import build_student
from autocompress.compress.train import train
from autocompress.data import Data, sample
from autocompress.devices import open_device
from autocompress.export import onnx_bytes
from autocompress.graph import Graph
from autocompress.models import load_weights
from autocompress.policy import Policy, QuantSpec
from autocompress.search_space import for_device
from autocompress.trial.evaluate import run_artifact

RESULT = Path(__file__).parent / "results" / "near_ties.json"
DEVICE = "onnxruntime:cpu?threads=1"
IMAGES = 1000
MARGINS = (0.0, 0.005, 0.01, 0.02, 0.05)
"""Shares of the range of a network's outputs."""


class Enlarged(nn.Module):
    """ResNet-18 as torchvision has it, on images of twice their size."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torchvision.models.resnet18(num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(interpolate(x, scale_factor=2.0, mode="bilinear"))
        return out


def networks(data: Data, seconds: float) -> dict[str, nn.Module]:
    """The networks by name, in eval mode."""
    known = {"ResNet-20": cifar10.resnet20(), "ResNet-56": cifar10.resnet56()}
    for name, model in known.items():
        load_weights(model, cifar10.folder() / "cifar10_resnets" / f"{name.lower().replace('-', '')}.safetensors")
    torch.manual_seed(0)
    few = replace(data, train=sample(data.train, 4000))
    plan = TrainPlan(10**9, deadline=time.monotonic() + seconds, batch_size=64)
    return {name: model.eval() for name, model in known.items()} | {f"ResNet-18, {seconds:.0f} s": train(Enlarged(), few, plan)}


def row(name: str, model: nn.Module, data: Data, folder: Path) -> dict[str, Any]:
    """What the int8 file of a network does beside the network in int8."""
    device, example = open_device(DEVICE), data.example(1)
    policy = for_device(Policy(quant=QuantSpec(bits=8)), device.profile)
    student = fake_quantize(build_student(Graph.trace(model, (example,)), policy).eval(), policy.quant)
    calibrate(student, data.calibration_batches(CALIBRATION_INPUTS, CALIBRATION_BATCH))
    student = snap_biases(student.eval())
    path = folder / f"{name.split(',')[0]}.onnx"
    path.write_bytes(onnx_bytes(student, policy.quant, (example,)))
    test = sample(data.test, IMAGES)
    with torch.inference_mode():
        expected = torch.cat([student(part) for part in data.prepare(test.inputs).split(50)])
    actual = run_artifact(device, path, data, test, 1)
    best, second = expected.topk(2, dim=1).values.unbind(1)
    margin = (best - second) / (expected.amax(1) - expected.amin(1))
    moved = (actual - expected).abs().amax(1) / (expected.amax(1) - expected.amin(1))
    changed = actual.argmax(1) != expected.argmax(1)
    return {
        "name": name, "test_accuracy": float((expected.argmax(1) == test.targets).float().mean()), "images": len(test),
        "outputs_equal": float((moved < 1e-5).float().mean()), "outputs_moved_mean": float(moved.mean()),
        "outputs_moved_most": float(moved.max()),
        "decisions_that_differ_beyond_a_margin": {str(m): int((changed & (margin >= m)).sum()) for m in MARGINS},
        "decisions_within_a_margin": {str(m): int((margin < m).sum()) for m in MARGINS},
    }  # fmt: skip


def main() -> None:
    """Quantize, export, compare, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="of training of the network that knows little")
    data = cifar10.data()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model in networks(data, parser.parse_args().seconds).items():
            rows.append(row(name, model, data, Path(folder)))
            print(rows[-1], flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "machine": open_device(DEVICE).environment(),
        "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
