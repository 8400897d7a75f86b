"""Graph: what can be compressed in a network, and what a policy makes of it, without touching weights."""

from __future__ import annotations

import copy
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocompress.errors import UsageError, one_line
from autocompress.graph.blocks import Branch, drop, find_branches
from autocompress.graph.channels import Channels, Role, frozen_roots, group_ids
from autocompress.graph.exported import DATA_DEPENDENT, save_only
from autocompress.graph.flow import PRODUCT, STATISTIC
from autocompress.graph.importance import channel_scores
from autocompress.graph.nodes import Weighted, channel_axis, constant_layers, is_layer, is_norm, kind_of, leaves, module_of
from autocompress.graph.operators import packed_bytes
from autocompress.graph.parts import Block, ChannelGroup, Frozen, Layer, Structure
from autocompress.graph.resize import Groups, Roots, Selection, are_alike, run_ends
from autocompress.graph.rules import propagate
from autocompress.graph.trace import OPAQUE, annotate_shapes, trace, untraced
from autocompress.graph.workloads import Arithmetic, Population, Workloads
from autocompress.policy import Criterion, Policy, rank_of
from autocompress.references import nearest
from autocompress.workload import Workload

CACHED_SHAPES = 256
LEAST_KEPT = 1e-3
"""Of a layer's multiplications: one that would not get fewer with so small a share has no lower rank."""


class Graph:
    """A traced network with its channel groups, droppable blocks and layers.

    The network passed to `trace` is copied; nothing here changes it or the copy.
    `classifier` names the linear layer that makes the network's outputs (n x classes) of features (n x channels); None without such.
    """

    def __init__(self, module: fx.GraphModule, example: tuple[Tensor, ...], opaque_reason: str) -> None:
        self.module = module
        self.example = example
        self.opaque_reason = opaque_reason
        self._channels = _propagated(module, example) if not opaque_reason else Channels()
        self._roots = {
            name: {axis: self._channels.roots(ids) for axis, ids in layout.items()} for name, layout in self._channels.layouts.items()
        }  # fmt: skip
        self._nodes = {node.name: node for node in module.graph.nodes}
        pairs = ({self._channels.root(index) for index in pair} for pair in self._channels.cuts)
        self._cut = {root for pair in pairs if len(pair) == 1 for root in pair}
        self._members: dict[str, Roots] = {}
        self._constant = constant_layers(module)
        self.groups = self._find_groups()
        self._branches = find_branches(module) if not opaque_reason else []
        self.classifier = self._find_classifier()
        self.layers = self._find_layers()
        self.blocks = tuple(self._block(branch) for branch in self._branches)
        self.frozen = self._find_frozen()
        self._resizable = self._rank_channels("l2")
        self._ranked: dict[Criterion, Groups] = {"l2": self._resizable}
        self._without = functools.lru_cache(CACHED_SHAPES)(self._drop_copy)
        names, factorable = [layer.name for layer in self.layers], [layer.name for layer in self.layers if layer.factorable]
        self._arithmetic = Arithmetic(module, self._roots, self._resizable, self._branches, names, factorable)

    @classmethod
    def trace(cls, model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
        """Trace a model on a batch of example inputs. Raises UsageError when the model does not run on it."""
        traced = trace(model, example)
        try:
            return cls(traced.module, example, traced.reason)
        except Exception as error:  # a network of a kind that the analysis has not met: a bug of ours, and no reason to refuse it
            whole = untraced(model, example, f"its operators cannot be analysed: {one_line(error)}")
            return cls(whole.module, example, whole.reason)

    # -- what a policy makes of the network -----------------------------------------------------------------------

    def require_known(self, policy: Policy) -> None:
        """Raises UsageError when the policy names a group, block or layer that is not here, or one that must not change."""
        groups = {group.name for group in self.groups if group.prunable}
        blocks, layers = {block.name for block in self.blocks}, {layer.name for layer in self.layers}
        factorable = {layer.name for layer in self.layers if layer.factorable}
        for what, names, known in (
            ("channel group", [*policy.student.widths, *policy.prune.ratios], groups),
            ("block", policy.student.drop, blocks),
            ("layer", policy.quant.layers, layers),
            ("layer of lower rank", policy.low_rank.kept, factorable),
        ):
            for name in names:
                if name not in known:
                    raise UsageError(
                        f"the policy names the {what} {name!r}, which this network does not have or cannot change",
                        hint=nearest(name, known),
                    )

    def sizes(self, policy: Policy, *, grown: bool = True) -> dict[str, int]:
        """Channels of every group that the policy may change; not `grown`: without those that the network does not have."""
        counts = {g.name: (policy.channels(g.name, g.size, g.unit), g.size) for g in self.groups if g.prunable}
        growable = {group.name for group in self.groups if group.growable}
        return {name: count if grown and name in growable else min(count, size) for name, (count, size) in counts.items()}

    def selection(self, policy: Policy, *, grown: bool = True) -> Selection:
        """Which channels stay, and where new ones go."""
        return self._ranked_by(policy.prune.criterion).select(len(self._channels.parents), self.sizes(policy, grown=grown))

    def _ranked_by(self, criterion: Criterion) -> Groups:
        if criterion not in self._ranked:
            self._ranked[criterion] = self._rank_channels(criterion)
        return self._ranked[criterion]

    def ranks(self, policy: Policy) -> dict[str, int]:
        """Rank of each layer that the policy factorises, in order; those that would not gain by it stay whole, and are left out."""
        kept = policy.factorised
        if not kept:
            return {}
        selection = self.selection(policy)
        ranks = {layer.name: self._rank(layer.name, policy, selection) for layer in self.layers if layer.name in kept}
        return {name: rank for name, rank in ranks.items() if rank}

    def _rank(self, layer: str, policy: Policy, selection: Selection) -> int:
        node = self._nodes[self._node_of[layer]]
        weight = self.module.get_submodule(layer).weight
        assert isinstance(weight, Tensor)
        axis = channel_axis(node, self.module)
        inputs, outputs = (
            selection.size(roots) if (roots := self.roots(name).get(axis)) is not None else size
            for name, size in ((node.all_input_nodes[0].name, weight.shape[1]), (node.name, weight.shape[0]))
        )
        return rank_of(inputs * weight[0, 0].numel(), outputs, policy.factorised[layer], policy.student.multiple)

    def structure(self, policy: Policy) -> Structure:
        """What the policy makes of this network; what it says of parts that it drops is left out."""
        dropped = self._with_inner(policy.student.drop)
        gone = self._layers_in(dropped)
        alive = {group.name for group in self.groups if not gone.issuperset(group.producers)}
        bits = tuple((layer.name, policy.quant.of(layer.name)) for layer in self.layers if layer.name not in gone)
        channels = tuple((name, count) for name, count in self.sizes(policy).items() if name in alive)
        return Structure(
            reference=policy.student.reference,
            dropped=dropped,
            channels=channels,
            ranks=tuple((name, rank) for name, rank in self.ranks(policy).items() if name not in gone),
            bits=bits,
            reduced_range=policy.quant.reduced_range and any(n == 8 for _, n in bits),
            criterion=self._criterion(policy, dict(channels)),
        )

    def _criterion(self, policy: Policy, channels: Mapping[str, int]) -> Criterion:
        """The policy's, where it chooses other channels than the usual one."""
        if policy.prune.criterion == "l2":
            return "l2"
        ranked, sizes = self._ranked_by(policy.prune.criterion).order, {group.name: group.size for group in self.groups}
        usual = self._resizable.order
        differs = (count < sizes[name] and not np.array_equal(ranked[name], usual[name]) for name, count in channels.items())
        return policy.prune.criterion if any(differs) else "l2"

    def _with_inner(self, dropped: tuple[str, ...]) -> tuple[str, ...]:
        """These blocks, and those inside of them, in order."""
        gone = [set(branch.nodes) for branch in self._branches if branch.name in dropped]
        return tuple(b.name for b in self._branches if b.name in dropped or any(set(b.nodes) < nodes for nodes in gone))

    def _layers_in(self, blocks: tuple[str, ...]) -> set[str]:
        return {layer for block in self.blocks if block.name in blocks for layer in block.layers}

    def roots(self, node: str) -> Mapping[int, Roots]:
        """Id classes of a node's value along each axis that holds channels."""
        return self._roots.get(node, {})

    def groups_of(self, node: str) -> list[str]:
        """Channel groups that a node's value has channels of, those with most first."""
        counts = {
            name: sum(int(np.isin(own, members).sum()) for own in self.roots(node).values()) for name, members in self._members.items()
        }
        return sorted((name for name, count in counts.items() if count), key=lambda name: -counts[name])

    def block_of(self, node: str) -> str | None:
        """The innermost droppable block that a node belongs to."""
        around = [branch for branch in self._branches if node in branch.nodes]
        return min(around, key=lambda branch: len(branch.nodes)).name if around else None

    def index(self, node: str, axis: int, selection: Selection) -> Roots | None:
        """For each entry of a student's node the one it comes from, or NEW; None where nothing changes or the teacher lacks the node."""
        roots = self.roots(node).get(axis)
        return selection.index(roots) if roots is not None and selection.changes(roots) else None

    def without(self, dropped: tuple[str, ...]) -> fx.GraphModule:
        """The traced network without these blocks; shared and read-only: copy it before a change."""
        return self._without(dropped)

    def workload(self, policy: Policy, *, grown: bool = True) -> Workload:
        """Operators and weight bytes of the policy's student, by arithmetic on shapes alone; see `sizes` for `grown`."""
        return self.workloads(self.population([policy], grown=grown))[0]

    def population(self, policies: Sequence[Policy], *, grown: bool = True) -> Population:
        """Policies of this network as arrays; see `sizes` for `grown`."""
        n = len(policies)
        sizes = [list(self.sizes(policy, grown=grown).values()) for policy in policies]
        drops = [set(policy.student.drop) for policy in policies]
        factorable = [layer.name for layer in self.layers if layer.factorable]
        return Population(
            channels=np.array(sizes, dtype=np.int64).reshape(n, -1).T,
            dropped=np.array([[block.name in drop for block in self.blocks] for drop in drops], dtype=bool).reshape(n, -1).T,
            bits=np.array([[policy.quant.of(layer.name) for layer in self.layers] for policy in policies], dtype=np.int64).reshape(n, -1).T,
            kept=np.array([[policy.low_rank.kept.get(name, 1.0) for name in factorable] for policy in policies]).reshape(n, -1).T,
            multiple=np.array([policy.student.multiple for policy in policies], dtype=np.int64),
        )

    def workloads(self, population: Population) -> Workloads:
        """Workloads of many policies at once; give some ten thousand at a time, memory grows with them."""
        found = self._arithmetic.workloads(population)
        if not self.opaque_reason:
            return found
        return replace(found, weight_bytes=found.weight_bytes + self._saved_inside(population))

    def _saved_inside(self, population: Population) -> NDArray[np.int64]:
        """What the layers of a network that could not be traced take more in the file than in float32: less than nothing."""
        saved = np.zeros(len(population), dtype=np.int64)
        for layer, bits in zip(self.layers, population.bits, strict=True):
            weights = math.prod(self.module.get_parameter(f"{layer.name}.weight").shape)
            for n in np.unique(bits).tolist():
                packed = packed_bytes(weights, layer.params - weights, layer.out_channels, n)
                saved[bits == n] += packed - 4 * layer.params
        return saved

    def describe(self, policy: Policy) -> list[dict[str, Any]]:
        """Per layer in depth order: channels of teacher and student, rank where it is factorised, bits, and whether it is dropped."""
        selection, ranks = self.selection(policy), self.ranks(policy)
        gone = self._layers_in(policy.student.drop)
        rows = []
        for layer in self.layers:
            roots = self._channels_of(self._node_of[layer.name]) if not self.opaque_reason else None
            channels = selection.size(roots) if roots is not None else layer.out_channels
            rows.append({
                "name": layer.name, "kind": layer.kind, "teacher_channels": layer.out_channels,
                "channels": 0 if layer.name in gone else channels, "rank": None if layer.name in gone else ranks.get(layer.name),
                "bits": policy.quant.of(layer.name), "dropped": layer.name in gone,
            })  # fmt: skip
        return rows

    # -- construction ---------------------------------------------------------------------------------------------

    def _find_groups(self) -> tuple[ChannelGroup, ...]:
        reasons = frozen_roots(self._channels)
        position = {node.name: index for index, node in enumerate(self.module.graph.nodes)}
        target = {node.name: str(node.target) for node in self.module.graph.nodes}
        groups, taken = [], Counter[str]()
        for roles, members in sorted(group_ids(self._channels), key=lambda item: min(position[r.node] for r in item[0])):
            makers = sorted((r for r in roles if r.part in ("out", "depthwise")), key=lambda r: position[r.node])
            if not makers:
                continue
            name = target[makers[0].node]
            taken[name] += 1
            name = name if taken[name] == 1 else f"{name}#{taken[name]}"
            alone = "it is one that goes together" if len(members) == 1 else ""
            reason = next((reasons[root] for root in members.tolist() if root in reasons), alone)
            self._members[name] = members
            groups.append(
                ChannelGroup(
                    name=name,
                    size=len(members),
                    prunable=not reason,
                    reason=reason,
                    growable=self._is_growable(roles, makers, members),
                    unit=self._unit(makers, members),
                    stream=any(role.part == "add" for role in roles),
                    producers=tuple(target[r.node] for r in makers),
                    consumers=_targets(roles, "in", position, target),
                )
            )
        return tuple(groups)

    def _unit(self, makers: Sequence[Role], members: Roots) -> int:
        """Channels of a layer that are one of the group."""
        rows = [self._channels.roots(ids) for role, ids in self._channels.roles if role in makers]
        return min(int(count) for own in rows if (count := np.isin(own, members).sum() // len(members)))

    def _is_growable(self, roles: frozenset[Role], makers: Sequence[Role], members: Roots) -> bool:
        """Not where a function multiplies, averages or makes them, nor where those that go together are taken apart elsewhere."""
        if any(role.part in (PRODUCT, STATISTIC) for role in roles) or any(self._nodes[role.node].op == "get_attr" for role in makers):
            return False
        return self._cut.isdisjoint(members.tolist())

    def _channels_of(self, name: str) -> Roots | None:
        """Id classes of what a layer makes."""
        node = self._nodes[name]
        return self.roots(name).get(channel_axis(node, self.module))

    def _find_layers(self) -> tuple[Layer, ...]:
        if self.opaque_reason:
            self._node_of: dict[str, str] = {}
            inside = leaves(self.module.get_submodule(OPAQUE), OPAQUE)
            return tuple(_layer(name, module, None, factorable=False) for name, module in inside if is_layer(module))
        nodes = {str(n.target): n for n in self.module.graph.nodes if kind_of(n, self.module) in ("conv", "linear")}
        nodes = {name: node for name, node in nodes.items() if name not in self._constant}
        self._node_of = {name: node.name for name, node in nodes.items()}
        alone = self.called_alone - {self.classifier}
        return tuple(
            _layer(name, module_of(node, self.module), self._born_at(node), factorable=name in alone) for name, node in nodes.items()
        )

    @functools.cached_property
    def called_alone(self) -> set[str]:
        """Modules that are called once, and share their weights with no other part of the network."""
        calls = Counter(str(node.target) for node in self.module.graph.nodes if node.op == "call_module")
        holders = Counter(id(parameter) for _, parameter in self.module.named_parameters(remove_duplicate=False))
        modules = {name: self.module.get_submodule(name) for name, n in calls.items() if n == 1}
        return {name for name, module in modules.items() if all(holders[id(p)] == 1 for p in module.parameters())}

    def _born_at(self, node: fx.Node) -> str | None:
        """Of the groups that share a tensor, the one that is produced first the latest: the group of this stage."""
        roots = set(self._roots[node.name][channel_axis(node, self.module)].tolist())
        sharing = [g for g in self.groups if roots & set(self._members[g.name].tolist())]
        order = {str(n.target): i for i, n in enumerate(self.module.graph.nodes)}
        return max(sharing, key=lambda g: order[g.producers[0]]).name if sharing else None

    def _block(self, branch: Branch) -> Block:
        group_of = {layer.name: layer.group for layer in self.layers}
        layers = tuple(name for name in branch.modules if name in group_of)
        return Block(branch.name, group_of[layers[-1]], layers)

    def _find_frozen(self) -> tuple[Frozen, ...]:
        whole = [Frozen("the whole network", self.opaque_reason)] if self.opaque_reason else []
        groups = [Frozen(group.name, group.reason) for group in self.groups if not group.prunable]
        branch = self.module.meta.get(DATA_DEPENDENT)
        path = [Frozen("the path through the code", f"it depends on the data, and the example's was taken: {branch}")] if branch else []
        held = {
            name: type(module).__name__
            for name, module in leaves(self.module)
            if not is_layer(module) and not is_norm(module) and any(True for _ in module.parameters())
        }
        held |= dict(node.meta["owner"] for node in self.module.graph.nodes if node.meta.get("owner"))
        pruned = self._owners_of_pruned_parameters()
        parts = [
            Frozen(name, f"{kind} is one operator here: its weights are {'not' if name in pruned else 'neither pruned nor'} quantized")
            for name, kind in held.items()
        ]
        parts += [Frozen(name, "it reads no input: what it makes is a constant, and stays in float32") for name in sorted(self._constant)]
        return (*whole, *path, *groups, *parts)

    def _owners_of_pruned_parameters(self) -> set[str]:
        """Paths of what holds parameters that follow channels which may change."""
        free = {root for group in self.groups if group.prunable for root in self._members[group.name].tolist()}
        held = (node for node in self.module.graph.nodes if node.op == "get_attr")
        return {
            str(node.target).rpartition(".")[0]
            for node in held
            if any(not free.isdisjoint(roots.tolist()) for roots in self.roots(node.name).values())
        }

    def _find_classifier(self) -> str | None:
        output = next(node for node in self.module.graph.nodes if node.op == "output")
        made = output.args[0]
        if not isinstance(made, fx.Node) or kind_of(made, self.module) != "linear" or not made.meta.get("is_own"):
            return None  # in the network itself a module of this name must be called too
        shapes = [node.meta.get("shape", ()) for node in (made, *made.all_input_nodes)]
        return str(made.target) if all(len(shape) == 2 for shape in shapes) else None

    def _rank_channels(self, criterion: Criterion) -> Groups:
        """The channels of each group by this criterion; by the usual one where they are not alike in all layouts.

        There it decides the size of layouts which channels stay, and that is predicted by the usual one.
        """
        usual = channel_scores(self.module, self._channels, "l2")
        scores = usual if criterion == "l2" else channel_scores(self.module, self._channels, criterion)
        layouts = list({roots.tobytes(): roots for by_axis in self._roots.values() for roots in by_axis.values()}.values())
        members = {group.name: self._members[group.name] for group in self.groups if group.prunable}
        by = {name: scores if criterion == "l2" or are_alike(roots, layouts) else usual for name, roots in members.items()}
        return Groups(
            order={name: roots[np.lexsort((roots, -by[name][roots]))] for name, roots in members.items()},
            ends={name: run_ends(roots, layouts) for name, roots in members.items()},
        )

    def _drop_copy(self, dropped: tuple[str, ...]) -> fx.GraphModule:
        if not dropped:
            return self.module
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.module.graph, values)
        graph.output(output)
        module = fx.GraphModule(_references(self.module), graph)
        save_only(module, self.module.state_dict().keys())
        drop(module, [branch for branch in self._branches if branch.name in dropped])
        return module


def _propagated(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Channels:
    """Channels of one input: in a larger batch an axis may hold the channels of all inputs, one after the other."""
    if all(len(tensor) == 1 for tensor in example):
        return propagate(module)
    ranks = _ranks(module)
    try:
        annotate_shapes(module, tuple(tensor[:1] for tensor in example))
        is_same = _ranks(module) == ranks  # unless a squeeze takes the batch away
    except Exception:  # as a norm raises that has nothing to average over
        is_same = False
    if not is_same:
        annotate_shapes(module, example)
    channels = propagate(module)
    annotate_shapes(module, example)
    return channels


def _ranks(module: fx.GraphModule) -> list[int]:
    """Of every tensor."""
    return [len(node.meta["shape"]) for node in module.graph.nodes if "shape" in node.meta]


def _targets(roles: frozenset[Role], part: str, position: dict[str, int], target: dict[str, str]) -> tuple[str, ...]:
    nodes = sorted({role.node for role in roles if role.part == part}, key=lambda name: position[name])
    return tuple(target[node] for node in nodes)


def _layer(name: str, module: nn.Module | None, group: str | None, *, factorable: bool) -> Layer:
    """factorable: whether nothing around the layer is in the way of that."""
    assert isinstance(module, Weighted)
    params = sum(p.numel() for p in module.parameters())
    gains = rank_of(module.weight[0].numel(), len(module.weight), LEAST_KEPT, 1) > 0
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", module.in_features, module.out_features, params, group, factorable and gains)
    return Layer(name, "conv", module.in_channels, module.out_channels, params, group, factorable and gains and module.groups == 1)


def _references(module: fx.GraphModule) -> nn.Module:
    """The same modules under a new root, so that a graph can lose some of them; weights are shared."""
    root = nn.Module()
    for name, child in module.named_children():
        root.add_module(name, _shell(child))
    for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        setattr(root, name, value)
    return root


def _shell(module: nn.Module) -> nn.Module:
    """A container is copied without its leaves' weights; a leaf is shared."""
    if not list(module.children()):
        return module
    shell = copy.copy(module)
    shell._modules = {name: _shell(child) if child is not None else None for name, child in module._modules.items()}
    return shell
