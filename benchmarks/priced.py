"""Does the sum of what a network's operators take by themselves come near to what it takes? With all kinds of operators, and with fewer.

    .venv/bin/pip install -q -e ".[dev,timm]" transformers
    .venv/bin/python benchmarks/priced.py [NAME ...]

Each network (as `any_model.py` builds it, batch 1, random weights) is exported and measured in ONNX Runtime on one thread, before and after
its operators, each alone. Beside the sum over all operators stands the sum over the kinds that were measured at first: convolutions and
linear layers, attention and its products, pools, sums, activations and layer norms, but neither what moves values or computes something of
each nor recurrent layers, transposed convolutions, resizing and group norms. A search corrects the sum by what whole networks take; this is
what it begins with, and what tells it which channels cost time. Writes benchmarks/results/priced.json and prints a table.
"""

from __future__ import annotations

import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import any_model

from autocompress.compress.student import build_student
from autocompress.devices import Device, open_device
from autocompress.export import onnx_bytes
from autocompress.graph import Graph
from autocompress.latency import OperatorTable
from autocompress.policy import Policy

RESULT = Path(__file__).parent / "results" / "priced.json"
DEVICE = "onnxruntime:cpu?threads=1"
NAMES = (
    "own:unet", "own:lstm", "own:gru", "own:keyword_spotter", "transformers:bert", "transformers:llama", "torchvision:resnet18",
    "torchvision:mobilenet_v3_small", "torchvision:swin_t", "torchvision:shufflenet_v2_x0_5", "timm:vit_tiny_patch16_224",
    "timm:poolformer_s12", "timm:mobilevit_xxs", "timm:fastvit_t8",
)  # fmt: skip
LATER = ("groupnorm", "filter", "convtranspose", "recurrent", "einsum", "resize", "transpose", "move", "elementwise")
"""Kinds of operators that cost nothing in predictions at first."""
OPERATORS_S, MEASURE_S = 120.0, 2.0


def main() -> int:
    device, rows = open_device(DEVICE), []
    print("| network | measured | all operators | without later kinds |\n|---|---|---|---|")
    for name in sys.argv[1:] or NAMES:
        rows.append(row := one(name, device))
        every, fewer = (f"{1000 * row[key]:.2f} ms ({100 * row[key] / row['measured_s']:.0f} %)" for key in ("sum_s", "fewer_s"))
        print(f"| {name} | {1000 * row['measured_s']:.2f} ms | {every} | {fewer} |", flush=True)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    content = {"date": when, "commit": any_model.commit(), "machine": device.environment(), "rows": rows}
    RESULT.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def one(name: str, device: Device) -> dict[str, Any]:
    torch.manual_seed(0)
    model, example = any_model.network(name)
    graph = Graph.trace(model, (example[:1],))
    workload, table = graph.workload(Policy()), OperatorTable()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(onnx_bytes(build_student(graph, Policy()), Policy().quant, (example[:1],)))
        before = device.measure([path], seconds_each=MEASURE_S)[0]
        table.measure(device, [workload], OPERATORS_S)
        after = device.measure([path], seconds_each=MEASURE_S)[0]
    sums = (sum(table.estimate(o) for o in workload.operators if o.kind not in kinds) + table.call_overhead for kinds in ((), LATER))
    found = dict(zip(("sum_s", "fewer_s"), sums, strict=True))
    return {"name": name, "measured_s": (before.median + after.median) / 2, "drift": after.median / before.median - 1, **found}


if __name__ == "__main__":
    raise SystemExit(main())
