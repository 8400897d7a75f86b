"""Residual blocks that can be dropped: branches around an identity."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from autocompress.graph.nodes import constant_layers, drop_unread, kind_of, relu_of


@dataclass(frozen=True)
class Branch:
    """A residual branch: node `add` = a skip + node `end`, the nodes inside, and the modules that nothing but the branch calls."""

    name: str
    add: str
    end: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]


def find_branches(module: fx.GraphModule) -> list[Branch]:
    """All additions of a tensor to what layers made of it, and is read by nobody else, in order; not where these read no input."""
    branches: list[Branch] = []
    constant = constant_layers(module)
    nodes = list(module.graph.nodes)
    calls = Counter(str(node.target) for node in nodes)
    position = {node: index for index, node in enumerate(nodes)}
    for node in nodes:
        if kind_of(node, module) != "add" or len(node.all_input_nodes) != 2:
            continue
        first, second = node.all_input_nodes
        for skip, branch in ((first, second), (second, first)):
            inside = _between(skip, branch, nodes[position[skip] + 1 : position[node]])
            closed = all(user is node or user in inside for part in inside for user in part.users)
            called = [n for n in inside if n.op == "call_module" and calls[str(n.target)] == 1]
            layers = [n for n in called if kind_of(n, module) in ("conv", "linear") and str(n.target) not in constant]
            if closed and layers and skip.meta.get("shape") == node.meta.get("shape"):
                modules = tuple(str(n.target) for n in called)
                name = _name([str(n.target) for n in layers], {b.name for b in branches})
                branches.append(Branch(name, node.name, branch.name, tuple(part.name for part in inside), modules))
                break
    return branches


def _between(skip: fx.Node, end: fx.Node, nodes: Sequence[fx.Node]) -> dict[fx.Node, None]:
    """Of the nodes that lie between them in order, those on some path from `skip` to `end`, which may read others beside it."""
    behind: set[fx.Node] = set()
    for node in nodes:
        if any(source is skip or source in behind for source in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()
    for node in reversed(nodes):
        if node is end or any(user in before for user in node.users):
            before.add(node)
    return {node: None for node in nodes if node in behind and node in before}


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
    """Remove branches from the graph in place: each addition becomes its skip, and a ReLU of a ReLU becomes one.

    branches: in order. The last goes first, so that of a branch in a branch the end is still where it was.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    for branch in reversed(branches):
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
