"""Residual blocks that can be dropped: branches around an identity."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import fx

from autocompress.graph.nodes import drop_unread, is_about_sizes, kind_of, relu_of


@dataclass(frozen=True)
class Branch:
    """A residual branch: node `add` = a skip + node `end`, and the modules that only the branch uses."""

    name: str
    add: str
    end: str
    modules: tuple[str, ...]


def find_branches(module: fx.GraphModule) -> list[Branch]:
    """All additions of a tensor to what was computed from it alone, in order."""
    branches: list[Branch] = []
    for node in module.graph.nodes:
        if kind_of(node, module) != "add" or len(node.all_input_nodes) != 2:
            continue
        first, second = node.all_input_nodes
        for skip, branch in ((first, second), (second, first)):
            inside = _between(skip, branch, node)
            layers = [n for n in inside if kind_of(n, module) in ("conv", "linear")]
            if layers and skip.meta.get("shape") == node.meta.get("shape"):
                modules = tuple(str(n.target) for n in reversed(inside) if n.op == "call_module")
                name = _name([str(n.target) for n in reversed(layers)], {b.name for b in branches})
                branches.append(Branch(name, node.name, branch.name, modules))
                break
    return branches


def _between(skip: fx.Node, end: fx.Node, add: fx.Node) -> list[fx.Node]:
    """Nodes from `skip` (exclusive) to `end`, last first; empty unless they start at `skip` alone and feed `add` alone."""
    inside: dict[fx.Node, None] = {}
    waiting = [end]
    while waiting:
        node = waiting.pop()
        if node is skip or node in inside:
            continue
        if is_about_sizes(node):  # the batch's
            continue
        if node.op == "placeholder":
            return []
        inside[node] = None
        waiting.extend(node.all_input_nodes)
    closed = all(user is add or user in inside for node in inside for user in node.users)
    return [node for node in reversed(add.graph.nodes) if node in inside] if closed else []


def _name(layers: list[str], taken: set[str]) -> str:
    """The longest common path of the branch's layers, or the first of them; made unique."""
    paths = [layer.split(".")[:-1] or [layer] for layer in layers]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    wanted = ".".join(common)
    free = next((name for name in (wanted, layers[0]) if name and name not in taken), None)
    return free or next(name for number in itertools.count(2) if (name := f"{layers[0]}#{number}") not in taken)


def drop(module: fx.GraphModule, branches: list[Branch]) -> None:
    """Remove branches from the graph in place: each addition becomes its skip, and a ReLU of a ReLU becomes one."""
    nodes = {node.name: node for node in module.graph.nodes}
    for branch in branches:
        add = nodes[branch.add]
        skip = next(operand for operand in add.all_input_nodes if operand.name != branch.end)
        users = list(add.users)
        add.replace_all_uses_with(skip)
        for user in users:
            if relu_of(user) and relu_of(user) == relu_of(skip):
                user.replace_all_uses_with(skip)
    drop_unread(module.graph)
    module.delete_all_unused_submodules()
    module.recompile()
