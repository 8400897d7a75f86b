"""Where a student can be compared with the teacher that it was made of: what their layers read, channel by channel."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from autocompress.compress.distill import Compared, ComparedFeatures
from autocompress.graph import Graph
from autocompress.graph.nodes import channel_axis, is_norm, kind_of, module_of
from autocompress.graph.resize import NEW, Selection
from autocompress.policy import Policy

STREAM_KEEPS = ("activation", "norm", "layernorm", "identity")
"""Kinds whose output is still the stream that they read."""
HIDDEN_BYTES = 2**24
"""Of the hidden features of one input that are compared: a teacher's come on top of what training holds in memory anyway."""


def compared_features(graph: Graph, policy: Policy, teacher: Graph) -> ComparedFeatures | None:
    """What the policy's student and its teacher have in common of what their layers read; None where that is nothing.

    Args:
        graph: of the network that the student is derived from. One of another architecture than the teacher shares no channels with it.
    """
    if policy.student.reference is not None:
        return ComparedFeatures(graph.classifier) if graph.classifier is not None and teacher.classifier is not None else None
    student, selection = graph.without(policy.student.drop), graph.selection(policy)
    nodes = {str(node.target): node for node in student.graph.nodes if node.op == "call_module"}
    ranks, classifier = graph.ranks(policy), graph.classifier
    hidden = [
        compared
        for name in _hidden_layers(nodes, graph)
        if (compared := _compared(f"{name}.0" if name in ranks else name, nodes[name], graph, selection)) is not None
    ]
    if classifier is None:
        return ComparedFeatures(hidden=tuple(hidden)) if hidden else None
    return ComparedFeatures(classifier, _compared(classifier, nodes[classifier], graph, selection), tuple(hidden))


def _hidden_layers(nodes: dict[str, fx.Node], graph: Graph) -> list[str]:
    """The layers that read the network's residual streams, one of those that read the same; of a network without streams all layers.

    As many of them, evenly spread, as HIDDEN_BYTES allow. Not what is called more than once: which call is meant would depend on the
    blocks that are left.
    """
    alone = graph.called_alone - {graph.classifier}
    readers: dict[fx.Node, str] = {}
    for layer in graph.layers:
        node = nodes.get(layer.name)
        if node is not None and layer.name in alone and _reads_rows(node, graph):
            readers.setdefault(node.all_input_nodes[0], layer.name)
    streams = {source: layer for source, layer in readers.items() if _is_stream(source, graph)}
    chosen = list((streams or readers).items())[::-1]
    size = sum(math.prod(source.meta["shape"]) for source, _ in chosen) * 4 / len(graph.example[0])
    return [layer for _, layer in chosen[:: max(1, math.ceil(size / HIDDEN_BYTES))]][::-1]


def _reads_rows(layer: fx.Node, graph: Graph) -> bool:
    """Whether a layer, which the user's network calls too, reads something else than the network's inputs, with a row for each of them."""
    source = layer.all_input_nodes[0]
    rows = source.meta.get("shape", ())[:1]
    return bool(layer.meta.get("is_own")) and source.op != "placeholder" and rows == (len(graph.example[0]),)


def _is_stream(node: fx.Node, graph: Graph) -> bool:
    """Whether a value is a sum of branches, perhaps normalised or activated."""
    while kind_of(node, graph.module) in STREAM_KEEPS or is_norm(module_of(node, graph.module)):
        node = node.all_input_nodes[0]
    return kind_of(node, graph.module) == "add" and sum(source.op != "get_attr" for source in node.all_input_nodes) > 1


def _compared(layer: str, node: fx.Node, graph: Graph, selection: Selection) -> Compared | None:
    """What `layer` of the student reads beside its counterpart, the node's; None where all that it reads was added."""
    source, shared = node.all_input_nodes[0], {}
    for axis in graph.roots(source.name):
        index = graph.index(source.name, axis, selection)
        if index is None:
            continue
        kept = np.flatnonzero(index != NEW)
        if not len(kept):
            return None
        shared[axis] = torch.from_numpy(kept), torch.from_numpy(index[kept])
    return Compared(layer, str(node.target), channel_axis(node, graph.module), shared)
