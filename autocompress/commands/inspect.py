"""What can be compressed in a model, and why the rest cannot."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from autocompress.batch import tensors_of
from autocompress.data import Data
from autocompress.data.sources import Splits
from autocompress.devices import Device, open_device
from autocompress.graph import ChannelGroup, Graph
from autocompress.graph.outline import outline
from autocompress.latency import OperatorTable
from autocompress.policy import Policy
from autocompress.references import name_of
from autocompress.setup.loading import open_model
from autocompress.workload import OutlineStep

MEASURE_S = 120.0
"""For measuring operators, at most."""


def inspect_model(
    model: nn.Module | str,
    *,
    weights: Path | str | None = None,
    data: Data | Splits | str | None = None,
    input: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Layers, channel groups, droppable blocks and frozen parts of a model, and how much of it each technique reaches.

    Args:
        model: a module (never changed) or a reference.
        data: whose inputs the model is traced with; see `search`.
        input: without data, the shape of one input (`3x224x224`, `128:int64`), or of several separated by commas, which may be named
            (`ids=128:int64,mask=128:int64`); None tries the usual image shapes.
        device: where operators are measured, each by itself; None measures nothing.

    Raises UsageError when the model or the data do not load or do not fit, or the device is unknown.
    """
    target = open_device(device) if device is not None else None
    opened = open_model(model, weights=Path(weights) if weights is not None else None, data=data, input=input)
    graph = opened.graph
    steps = outline(graph) if target is None else outline(graph, _measured(graph, target).lookup)
    shapes = ("x".join(map(str, tensor.shape)) for tensor in tensors_of(opened.example))
    network = {"model": name_of(model), "input": ", ".join(shapes), "output": opened.output or "all", "device": device}
    return network | summary(graph) | {
        "layers": _layers(graph, steps),
        "channel_groups": [_group(group) for group in graph.groups],
        "blocks": [{"name": b.name, "stream": b.stream, "layers": ", ".join(b.layers)} for b in graph.blocks],
        "frozen": [asdict(frozen) for frozen in graph.frozen],
        "steps": [step.model_dump(mode="json") for step in steps],
    }  # fmt: skip


def _measured(graph: Graph, device: Device) -> OperatorTable:
    """What each operator takes by itself."""
    table = OperatorTable.for_device(device)
    table.measure(device, [graph.workload(Policy())], MEASURE_S)
    return table


def _layers(graph: Graph, steps: list[OutlineStep]) -> list[dict[str, Any]]:
    """What each layer costs, as shares of what all operators cost, and where it belongs; one that is called twice costs twice."""
    called: dict[str, list[OutlineStep]] = defaultdict(list)
    for step in steps:
        called[step.name].append(step)
    totals = {key: _total(steps, key) for key in ("macs", "latency_s")}
    rows = []
    for layer in graph.layers:
        own, row = called[layer.name], asdict(layer)
        where = {"group": row.pop("group"), "block": own[0].block if own else None}
        row["macs"] = _total(own, "macs") if own else None
        for key, total in totals.items():
            if total:
                row[f"share_of_{key.removesuffix('_s')}"] = f"{100 * _total(own, key) / total:.1f} %" if own else None
        rows.append(row | where)
    return rows


def _total(steps: list[OutlineStep], key: str) -> float:
    return sum(getattr(step, key) or 0 for step in steps)


def summary(graph: Graph) -> dict[str, Any]:
    """How much of a network can be changed: shares of the weights of its convolutions and linear layers, or of all that it has."""
    params = sum(layer.params for layer in graph.layers)
    everything = sum(parameter.numel() for parameter in graph.module.parameters())
    free = {group.name for group in graph.groups if group.prunable}
    touched = {name for g in graph.groups if g.prunable for name in (*g.producers, *g.consumers)}
    droppable = {name for block in graph.blocks for name in block.layers}

    def share(names: set[str]) -> str:
        return f"{100 * sum(layer.params for layer in graph.layers if layer.name in names) / max(params, 1):.1f} %"

    return {
        "weights_in_layers": params,
        "weights_that_pruning_reaches": share(touched),
        "weights_in_droppable_blocks": share(droppable),
        "weights_that_can_be_quantized": f"{100 * params / max(everything, 1):.1f} %",
        "searchable_groups": f"{len(free)} of {len(graph.groups)}",
        "droppable_blocks": len(graph.blocks),
    }


def _group(group: ChannelGroup) -> dict[str, Any]:
    return {
        "name": group.name, "channels": group.size * group.unit, "at_once": group.unit, "residual_stream": group.stream,
        "can_change": group.prunable, "written_by": len(group.producers), "read_by": len(group.consumers), "reason": group.reason,
    }  # fmt: skip
