"""A network step by step, as a person reads it: one step an operator that a runtime would run, in the order of the code."""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

from torch import fx, nn

from autocompress.graph.model_graph import Graph
from autocompress.graph.nodes import (
    TURNS,
    Conv,
    arguments,
    fused,
    is_about_sizes,
    is_depthwise,
    kind_of,
    module_of,
    name_of,
    relu_of,
    value_of,
)
from autocompress.policy import Policy
from autocompress.workload import Operator, OutlineStep

ASIDE = ("identity", "output")
"""Kinds of nodes that do nothing here."""
MOVES = ("reshape", "reshape_as", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", *TURNS)
"""What only looks at a tensor in another way: several in a row are one step."""


def outline(graph: Graph, seconds: Callable[[Operator], float | None] = lambda _: None) -> list[OutlineStep]:
    """The steps of a network, its inputs first; `seconds`: what an operator takes, where that is known."""
    module = graph.module
    operators: dict[str, deque[Operator]] = defaultdict(deque)  # a layer that is called twice is two of them
    for operator in graph.workload(Policy()).operators:
        operators[operator.name].append(operator)
    steps: list[OutlineStep] = []
    place: dict[fx.Node, int] = {}
    counted: set[int] = set()
    for node in module.graph.nodes:
        if node in place or node.op == "get_attr" or is_about_sizes(node):
            continue
        sources = [place[source] for source in node.all_input_nodes if source in place]
        if sources and (kind_of(node, module) in ASIDE or name_of(node) == "getitem"):
            place[node] = sources[0]
            continue
        parts = [part for part in _parts(node, module) if part is not None]
        title, shape = " · ".join(_title(part, module) for part in parts), parts[-1].meta.get("shape", ())
        if _moves_on(node):
            place[node] = sources[0]
            before, moved = steps[sources[0]], _next(operators[node.name])
            latency_s = _sum(before.latency_s, seconds(moved) if moved is not None else None)
            steps[sources[0]] = before.model_copy(update={"title": f"{before.title} · {title}", "shape": shape, "latency_s": latency_s})
            continue
        place |= dict.fromkeys(parts, len(steps))
        name = str(node.target) if node.op == "call_module" else node.name
        groups, found = graph.groups_of(parts[-1].name), _next(operators[name])
        step = OutlineStep(
            name=name,
            title=title,
            shape=shape,
            inputs=tuple(dict.fromkeys(sources)),
            group=groups[0] if groups else steps[sources[0]].group if sources and "shapes" in node.meta else None,
            block=graph.block_of(node.name),
            params=sum(_new_parameters(parts, module, counted)),
            macs=found.macs if found is not None else 0,
            line=node.meta.get("line", ""),
            latency_s=seconds(found) if found is not None else None,
        )
        steps.append(step)
    return steps


def _next(waiting: deque[Operator]) -> Operator | None:
    return waiting.popleft() if waiting else None


def _sum(*seconds: float | None) -> float | None:
    """Of what is known."""
    known = [each for each in seconds if each is not None]
    return sum(known) if known else None


def _moves_on(node: fx.Node) -> bool:
    """Whether the node moves what nobody else reads of another move."""
    before = node.all_input_nodes[0] if node.all_input_nodes else node
    return name_of(node) in MOVES and name_of(before) in MOVES and len(before.users) == 1


def _parts(node: fx.Node, module: nn.Module) -> tuple[fx.Node | None, ...]:
    chain = fused(node, module)
    return chain.head, chain.norm, chain.relu


def _new_parameters(parts: list[fx.Node], module: nn.Module, counted: set[int]) -> Iterator[int]:
    """Sizes of the parameters that these are the first to read."""
    for node in (*parts, *(source for part in parts for source in part.all_input_nodes if source.op == "get_attr")):
        held = module_of(node, module)
        values = list(held.parameters()) if held is not None else [value_of(node, module)] if node.op == "get_attr" else []
        for value in values:
            if isinstance(value, nn.Parameter) and id(value) not in counted:
                counted.add(id(value))
                yield value.numel()


def _title(node: fx.Node, root: nn.Module) -> str:
    """What the node does, in a few words."""
    module = module_of(node, root)
    if node.op == "placeholder":
        return "input"
    if isinstance(module, Conv):
        return _conv_title(module)
    if module is not None:
        return "linear" if isinstance(module, nn.Linear) else _spaced(type(module).__name__)
    given = arguments(node)
    kernel = given.get("kernel_size")
    window = " " + "×".join(map(str, kernel)) if isinstance(kernel, (list, tuple)) else ""
    return (relu_of(node) or name_of(node)).strip("_").replace("_", " ") + window


def _conv_title(conv: Conv) -> str:
    kernel = "×".join(map(str, conv.kernel_size))
    stride = f", stride {max(conv.stride)}" if max(conv.stride) > 1 else ""
    groups = f", {conv.groups} groups" if conv.groups > 1 and not is_depthwise(conv) else ""
    return f"{'depthwise ' if is_depthwise(conv) else ''}conv {kernel}{stride}{groups}"


def _spaced(name: str) -> str:
    """LayerNorm -> layer norm, BatchNorm2d -> batch norm."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return re.sub(r"\d?d$", "", words)
