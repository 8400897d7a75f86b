"""What can be compressed in a model, and why the rest cannot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from autocompress.data.sources import load_data
from autocompress.graph import ChannelGroup, Graph
from autocompress.models import example_for, load_model


def inspect_model(reference: str, *, weights: Path | str | None = None, data: str | None = None) -> dict[str, Any]:
    """Layers, channel groups, droppable blocks and frozen parts of a model, and how much of it each technique reaches.

    Args:
        data: reference of data whose inputs the model is traced with; None tries the usual image shapes.

    Raises UsageError when the model or the data do not load or do not fit.
    """
    loaded, file = load_data(data) if data is not None else None, Path(weights) if weights is not None else None
    model = load_model(reference, weights=file, classes=loaded.classes if loaded is not None else None)
    example = loaded.example(1) if loaded is not None else example_for(model, reference)
    graph = Graph.trace(model, (example,))
    return {"model": reference, "input": "x".join(map(str, example.shape))} | summary(graph) | {
        "layers": [asdict(layer) for layer in graph.layers],
        "channel_groups": [_group(group) for group in graph.groups],
        "blocks": [{"name": b.name, "stream": b.stream, "layers": ", ".join(b.layers)} for b in graph.blocks],
        "frozen": [asdict(frozen) for frozen in graph.frozen],
    }  # fmt: skip


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
