"""Workloads of many policies of one network at once, by arithmetic on arrays: nothing is built, copied or run.

Whatever a policy changes is local: a group's channels decide shapes, a dropped block hands its input on, bits decide what runs in int8. So
the traced network is interpreted once for all policies, with an array where an interpreter of one policy has a value: first which nodes
are left and what a runtime fuses (by distinct sets of dropped blocks), then what stays in int8, then for each operator which of its few
distinct variants each policy has.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocompress.graph.blocks import Branch
from autocompress.graph.nodes import (
    FOLLOWERS,
    Conv,
    channel_axis,
    fed_nodes,
    hands_on,
    is_folded_norm,
    kind_of,
    module_of,
    normalized_axes,
    operands,
    relu_of,
)  # fmt: skip
from autocompress.graph.operators import Factor, operator_name, operator_of, weight_bytes
from autocompress.graph.resize import Groups, Roots
from autocompress.policy import rank_of
from autocompress.workload import Operator, OperatorKind, Shape, Workload

OPERATOR_KINDS = tuple(kind for kind in get_args(OperatorKind) if kind != "other")
MOST_CODES = 2**20
"""Combinations of an operator's dimensions that are numbered without looking which of them occur."""
MOST_OPERATORS = 2**18
NONE = -1

Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Cost = Callable[[Operator], float]


@dataclass(frozen=True)
class Population:
    """Policies of one network as arrays, one column a policy.

    channels: groups that may change x n. dropped: blocks x n. bits: layers x n. kept: factorable layers x n, the share of their
    multiplications. multiple: n, of which ranks are multiples.
    """

    channels: Numbers
    dropped: Flags
    bits: Numbers
    kept: NDArray[np.float64]
    multiple: Numbers

    def __len__(self) -> int:
        return self.channels.shape[1]


@dataclass(frozen=True)
class Workloads:
    """The workloads of a population.

    variants: for each place in execution order the distinct operators that some policy has there; which: places x n, the variant of
    each policy, or NONE. weight_bytes: n.
    """

    variants: tuple[tuple[Operator, ...], ...]
    which: Numbers
    weight_bytes: Numbers

    def __len__(self) -> int:
        return len(self.weight_bytes)

    def __iter__(self) -> Iterator[Workload]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Workload:
        chosen = zip(self.variants, self.which[:, index].tolist(), strict=True)
        operators = tuple(variants[variant] for variants, variant in chosen if variant != NONE)
        return Workload(operators=operators, weight_bytes=int(self.weight_bytes[index]))

    def converted(self) -> Numbers:
        """For each policy the sum of `Workload.converted`."""
        before, sums = np.full(len(self), NONE), np.zeros(len(self), dtype=np.int64)
        for variants, which in zip(self.variants, self.which, strict=True):
            is_int8 = np.array([*(operator.is_int8 for operator in variants), NONE], dtype=np.int64)[which]
            read = np.array([*(operator.read for operator in variants), 0], dtype=np.int64)[which]
            there = which != NONE
            sums += np.where(there & (before != NONE) & (is_int8 != before), read, 0)
            before = np.where(there, is_int8, before)
        return sums

    def total(self, costs: Sequence[Cost]) -> NDArray[np.float64]:
        """Sums over the operators of each policy: costs x n."""
        sums = np.zeros((len(costs), len(self)))
        for variants, which in zip(self.variants, self.which, strict=True):
            for row, cost in enumerate(costs):
                sums[row] += np.array([*map(cost, variants), 0.0])[which]  # NONE, the last, takes nothing
        return sums


@dataclass(frozen=True)
class Column:
    """One number for each policy: the position of its value among the distinct ones."""

    distinct: Numbers
    position: Numbers

    @classmethod
    def of(cls, values: Numbers) -> Column:
        present = np.zeros(int(values.max(initial=0)) + 1, dtype=bool)
        present[values] = True
        return cls(np.flatnonzero(present), (np.cumsum(present) - 1)[values])

    def at(self, index: int) -> int:
        return int(self.distinct[self.position[index]])


@dataclass(frozen=True)
class Skeleton:
    """What is left of the network for each distinct set of dropped blocks: arrays nodes x sets.

    value: the node that a node's value comes from. alive: whether the node is computed. norm, tail: nodes fused behind a head, or NONE
    and the head itself. inner: whether the node is fused into another. ends: whether the output is all that becomes of the node's value.
    """

    value: Numbers
    alive: Flags
    norm: Numbers
    tail: Numbers
    inner: Flags
    ends: Flags


@dataclass(frozen=True)
class Loose:
    """A parameter that is counted by itself: its bytes, the layouts that it follows, the nodes that read it, and those that count it."""

    size: int
    keys: tuple[bytes, ...]
    readers: list[int]
    counted: list[int]


class Arithmetic:
    """A traced network, prepared for the workloads of populations.

    Args:
        roots: id classes of the axes that hold channels, by node name. groups: those that may change. layers: names, as in
            `Population.bits`. factorable: of these, as in `Population.kept`.
    """

    def __init__(
        self, module: fx.GraphModule, roots: Mapping[str, Mapping[int, Roots]], groups: Groups,
        branches: Sequence[Branch], layers: Sequence[str], factorable: Sequence[str],
    ) -> None:  # fmt: skip
        self._module, self._groups = module, groups
        self._nodes: list[fx.Node] = list(module.graph.nodes)
        self._number = {node: index for index, node in enumerate(self._nodes)}
        self._inputs = [[self._number[source] for source in operands(node)] for node in self._nodes]
        self._kinds = [kind_of(node, module) for node in self._nodes]
        self._hands_on = [hands_on(node, module) for node in self._nodes]
        relus = [relu_of(node) or "" for node in self._nodes]
        self._relu_names = sorted({"", *relus})
        self._relu = np.array([self._relu_names.index(relu) for relu in [*relus, ""]])  # NONE, the last, is no ReLU
        self._folds = np.array([is_folded_norm(node) for node in self._nodes] + [False])
        self._tensor = ["shape" in node.meta for node in self._nodes]
        self._skips = {self._number_of(branch.add): (block, self._skip(branch)) for block, branch in enumerate(branches)}
        self._layer = {name: index for index, name in enumerate(layers)}
        self._factorable = {name: index for index, name in enumerate(factorable)}
        self._keys_of = {
            index: {axis: classes.tobytes() for axis, classes in roots[node.name].items()}
            for index, node in enumerate(self._nodes) if roots.get(node.name)
        }  # fmt: skip
        self._classes = {classes.tobytes(): classes for by_axis in roots.values() for classes in by_axis.values()}
        self._parts = {key: self._parts_of(classes) for key, classes in self._classes.items()}
        self._places = list(self._find_places())
        self._loose = self._find_loose()
        self._operators: dict[tuple[object, ...], Operator] = {}

    def _find_places(self) -> Iterator[tuple[int, bool]]:
        """Where an operator may be, in execution order: its node, and whether it is the first of the two of a factorised layer."""
        fed = fed_nodes(self._module)
        for index, kind in enumerate(self._kinds):
            if kind not in ("conv", "linear", "norm") and self._nodes[index] not in fed:
                continue  # constants cost nothing; layers and norms stay, since their weights are counted
            if kind in OPERATOR_KINDS and (self._tensor[index] or kind == "recurrent"):
                if str(self._nodes[index].target) in self._factorable:
                    yield index, True
                yield index, False

    def _number_of(self, name: str) -> int:
        return next(index for index, node in enumerate(self._nodes) if node.name == name)

    def _skip(self, branch: Branch) -> int:
        add = self._nodes[self._number_of(branch.add)]
        return self._number[next(operand for operand in add.all_input_nodes if operand.name != branch.end)]

    def _parts_of(self, classes: Roots) -> tuple[int, list[tuple[int, str]]]:
        """How many channels of a layout cannot change, and the groups of the others, with their rows in a population."""
        inside = set(classes.tolist())
        parts = [(row, group) for row, group in enumerate(self._groups.order) if inside.intersection(self._groups.order[group].tolist())]
        changing = {root for _, group in parts for root in self._groups.order[group].tolist()}
        return sum(1 for root in classes.tolist() if root not in changing), parts

    def _find_loose(self) -> list[Loose]:
        """Tensors that not only layers and norms hold, which are counted with these."""
        sizes: dict[int, tuple[int, tuple[bytes, ...]]] = {}
        readers: dict[int, list[int]] = defaultdict(list)
        counted: dict[int, list[int]] = defaultdict(list)
        for index, node in enumerate(self._nodes):
            for tensor in _tensors(node, self._module):
                keys = tuple(key for axis, key in self._keys_of.get(index, {}).items() if self._follows(node, axis))
                sizes[id(tensor)] = tensor.nbytes, keys
                kinds = counted if self._kinds[index] in ("conv", "linear", "norm") else readers
                kinds[id(tensor)].append(index)
        return [Loose(*sizes[key], readers[key], counted[key]) for key in readers]

    def _follows(self, node: fx.Node, axis: int) -> bool:
        """Whether the node's parameters have an axis of what it makes."""
        return not isinstance(module_of(node, self._module), nn.LayerNorm) or axis in normalized_axes(node, self._module)

    # -- which nodes are left --------------------------------------------------------------------------------------

    def workloads(self, population: Population) -> Workloads:
        """The workload of every policy."""
        sets, of_policy = _distinct_columns(population.dropped)
        skeleton = self._skeleton(sets)
        runs_int8 = self._runs_int8(skeleton, of_policy, population)
        columns = self._columns(population)
        bits = [Column.of(row) for row in population.bits]
        variants, which = [], np.full((len(self._places), len(population)), NONE)
        for place, (index, is_first) in enumerate(self._places):
            found, which[place] = self._variants(index, is_first, skeleton, of_policy, columns, bits, runs_int8[index], population)
            variants.append(found)
        return Workloads(tuple(variants), which, self._weight_bytes(variants, which) + self._loose_bytes(skeleton, of_policy, columns))

    def _skeleton(self, dropped: Flags) -> Skeleton:
        value = self._values(dropped)
        alive, uses, reader, ends = self._readers(value)
        every = np.arange(alive.shape[1])
        norm, tail = np.full(value.shape, NONE), np.repeat(np.arange(len(self._nodes))[:, None], len(every), axis=1)
        inner = np.zeros_like(alive)
        for index, kind in enumerate(self._kinds):
            if kind not in ("conv", "linear", "add"):
                continue
            only = np.where(uses[index] == 1, reader[index], NONE)
            if kind != "add":
                norm[index] = np.where(self._folds[only], only, NONE)
            last = np.where(norm[index] != NONE, norm[index], index)
            only = np.where(uses[last, every] == 1, reader[last, every], NONE)
            tail[index] = np.where(self._relu[only] > 0, only, last)
            for part in (norm[index], np.where(tail[index] != last, tail[index], NONE)):
                fused = alive[index] & (part != NONE)
                inner[part[fused], every[fused]] = True
        return Skeleton(value, alive, norm, tail, inner, ends)

    def _values(self, dropped: Flags) -> Numbers:
        """A dropped block's addition hands its skip on, and a ReLU of a ReLU is one (as `blocks.drop` does it)."""
        value = np.repeat(np.arange(len(self._nodes))[:, None], dropped.shape[1], axis=1)
        for index, inputs in enumerate(self._inputs):
            if index in self._skips:
                block, skip = self._skips[index]
                value[index] = np.where(dropped[block], value[skip], index)
            elif self._relu[index] and inputs[0] in self._skips:
                source = inputs[0]
                handed_on = dropped[self._skips[source][0]] & (self._relu[value[source]] == self._relu[index])
                value[index] = np.where(handed_on, value[source], index)
        return value

    def _readers(self, value: Numbers) -> tuple[Flags, Numbers, Numbers, Flags]:
        """From the output back: what is computed, by how many nodes it is read, one of these, and whether only the output reads it."""
        alive, ends = np.zeros(value.shape, dtype=bool), np.ones(value.shape, dtype=bool)
        uses, reader = np.zeros_like(value), np.full(value.shape, NONE)
        alive[[index for index, kind in enumerate(self._kinds) if kind == "output"]] = True
        for index in reversed(range(len(self._nodes))):
            earlier: list[Numbers] = []
            for source in self._inputs[index]:
                read = alive[index].copy()
                for other in earlier:
                    read &= value[source] != other
                earlier.append(value[source])
                where = np.flatnonzero(read)
                rows = value[source][where]
                alive[rows, where] = True
                uses[rows, where] += 1
                reader[rows, where] = index
                if self._kinds[index] != "output":
                    ends[rows, where] &= ends[index, where] & self._hands_on[index]
        return alive, uses, reader, ends

    # -- what runs in int8 -----------------------------------------------------------------------------------------

    def _runs_int8(self, skeleton: Skeleton, of_policy: Numbers, population: Population) -> Flags:
        """Nodes x n: whether the operator runs in int8; the rules are those of `nodes.int8_tensors`."""
        every = np.arange(len(population))
        held = np.zeros((len(self._nodes), len(population)), dtype=bool)
        runs = np.zeros_like(held)
        for index, kind in enumerate(self._kinds):
            tail, ends = skeleton.tail[index], skeleton.ends
            leaves = ~ends[tail, np.arange(len(tail))]
            if kind in ("conv", "linear"):
                layer = self._layer.get(str(self._nodes[index].target))
                runs[index] = population.bits[layer] == 8 if layer is not None else False
                stays = runs[index] & (skeleton.alive[index] & leaves)[of_policy]
            elif kind in FOLLOWERS and self._tensor[index] and any(self._tensor[source] for source in self._inputs[index]):
                stays = (skeleton.alive[index] & ~skeleton.inner[index] & leaves)[of_policy]
                for source in self._inputs[index]:
                    if self._tensor[source]:
                        value = skeleton.value[source]
                        first = int(value[0])
                        stays &= held[first] if bool((value == first).all()) else held[value[of_policy], every]
                runs[index] = stays
            else:
                continue
            for end in np.unique(tail).tolist():
                held[end] |= stays & (tail == end)[of_policy]
        return runs

    # -- what each operator is -------------------------------------------------------------------------------------

    def _columns(self, population: Population) -> dict[bytes, Column]:
        """Channels of every distinct layout, by its id classes."""
        rows = [Column.of(row) for row in population.channels]
        columns: dict[bytes, Column] = {}
        for key, (fixed, parts) in self._parts.items():
            counts = [(rows[row], self._groups.count(group, self._classes[key], rows[row].distinct)) for row, group in parts]
            if len(counts) == 1:
                column, count = counts[0]
                columns[key] = Column(fixed + count, column.position)
            else:
                sizes = np.full(len(population), fixed)
                columns[key] = Column.of(sum((count[column.position] for column, count in counts), sizes))
        return columns

    def _variants(
        self, index: int, is_first: bool, skeleton: Skeleton, of_policy: Numbers, columns: Mapping[bytes, Column],
        bits: Sequence[Column], int8: Flags, population: Population,
    ) -> tuple[tuple[Operator, ...], Numbers]:  # fmt: skip
        """The distinct operators at one place, and which of them each policy has."""
        ranked = self._ranked(index, population)
        if is_first and ranked is None:
            return (), np.full(len(population), NONE)
        node, fused_norm = self._nodes[index], skeleton.norm[index] != NONE
        activation = self._relu[skeleton.tail[index]]
        layer = self._layer.get(str(node.target)) if self._kinds[index] in ("conv", "linear") else None
        fusions = Column.of((2 * activation + fused_norm)[of_policy])
        tensors = [tensor for tensor in (*self._inputs[index], index) if self._tensor[tensor]]
        keys = dict.fromkeys(key for tensor in tensors for key in self._keys_of.get(tensor, {}).values())
        dimensions = [columns[key] for key in keys] + [fusions, Column.of(int8.astype(np.int64))]
        dimensions += [bits[layer]] if layer is not None else []
        code = _numbered(dimensions + ([ranked] if ranked is not None else []))
        present = (skeleton.alive[index] & ~skeleton.inner[index])[of_policy]
        example = np.full(len(code.distinct), NONE)
        example[code.position[present]] = np.flatnonzero(present)
        which = np.full(len(code.distinct), NONE)
        variants: list[Operator] = []
        for number in np.flatnonzero(example != NONE).tolist():
            policy = int(example[number])
            shapes = tuple(self._shape(tensor, columns, policy) for tensor in tensors)
            rank = self._rank(index, shapes, population, policy) if ranked is not None else 0
            if is_first and not rank:
                continue
            fusion = fusions.at(policy)
            weight_bits = bits[layer].at(policy) if layer is not None else 32
            factor = Factor(rank, is_first) if rank else None
            which[number] = len(variants)
            variants.append(self._operator(index, shapes, fusion // 2, bool(fusion % 2), bool(int8[policy]), weight_bits, factor))
        return tuple(variants), np.where(present, which[code.position], NONE)

    def _ranked(self, index: int, population: Population) -> Column | None:
        """Numbers what decides a layer's rank beside its shape; None where no policy factorises it."""
        row = self._factorable.get(str(self._nodes[index].target))
        if row is None or bool((population.kept[row] >= 1.0).all()):
            return None
        distinct, position = np.unique(population.kept[row] + 2 * population.multiple, return_inverse=True)  # shares are not above 1
        return Column(np.arange(len(distinct)), position)

    def _rank(self, index: int, shapes: tuple[Shape, ...], population: Population, policy: int) -> int:
        """Of a layer in one policy; 0: it is whole."""
        name = str(self._nodes[index].target)
        layer, axis = self._module.get_submodule(name), channel_axis(self._nodes[index], self._module)
        kernel = math.prod(layer.kernel_size) if isinstance(layer, Conv) else 1
        kept = float(population.kept[self._factorable[name], policy])
        return rank_of(shapes[0][axis] * kernel, shapes[-1][axis], kept, int(population.multiple[policy]))

    def _shape(self, index: int, columns: Mapping[bytes, Column], policy: int) -> Shape:
        shape = list(self._nodes[index].meta["shape"])
        for axis, key in self._keys_of.get(index, {}).items():
            shape[axis] = shape[axis] * columns[key].at(policy) // len(self._classes[key])
        return tuple(shape)

    def _operator(self, *key: Any) -> Operator:
        """Operators are kept: those of one population are mostly those of the next."""
        if key not in self._operators:
            if len(self._operators) >= MOST_OPERATORS:
                self._operators.clear()
            index, shapes, relu, has_norm, int8, weight_bits, factor = key
            self._operators[key] = operator_of(
                self._nodes[index], self._module, self._kinds[index], shapes, activation=self._relu_names[relu] or None, has_norm=has_norm,
                int8=int8, weight_bits=weight_bits, factor=factor,
            )  # fmt: skip
        return self._operators[key]

    # -- bytes -----------------------------------------------------------------------------------------------------

    def _weight_bytes(self, variants: Sequence[tuple[Operator, ...]], which: Numbers) -> Numbers:
        """Layers and norms by their bits, each once however often it is called."""
        total = np.zeros(which.shape[1], dtype=np.int64)
        by_name: dict[tuple[str, bool], list[int]] = defaultdict(list)
        for place, (index, is_first) in enumerate(self._places):
            by_name[operator_name(self._nodes[index]), is_first].append(place)
        for places in by_name.values():
            counted = np.zeros(which.shape[1], dtype=bool)
            for place in reversed(places):
                table = np.array([*map(weight_bytes, variants[place]), 0])  # NONE, the last, takes nothing
                total += np.where(counted, 0, table[which[place]])
                counted |= which[place] != NONE
        return total

    def _loose_bytes(self, skeleton: Skeleton, of_policy: Numbers, columns: Mapping[bytes, Column]) -> Numbers:
        """What other modules hold, in float32."""
        total = np.zeros(len(of_policy), dtype=np.int64)
        for loose in self._loose:
            size = np.full(len(of_policy), loose.size)
            for key in loose.keys:
                size = size * columns[key].distinct[columns[key].position] // len(self._classes[key])
            is_left = np.any(skeleton.alive[loose.readers], axis=0) & ~np.any(skeleton.alive[loose.counted], axis=0)
            total += size * is_left[of_policy]
        return total


def _distinct_columns(flags: Flags) -> tuple[Flags, Numbers]:
    """The distinct columns of flags (rows x n), and which of them each column is."""
    packed = np.packbits(flags, axis=0)
    if not len(packed):
        return flags[:, :1], np.zeros(flags.shape[1], dtype=np.int64)
    _, first, of_column = np.unique(packed, axis=1, return_index=True, return_inverse=True)
    return flags[:, first], of_column.reshape(-1)


def _numbered(dimensions: Sequence[Column]) -> Column:
    """One column for several: each combination of their values is a value."""
    size, number = 1, np.zeros_like(dimensions[0].position)
    for column in dimensions:
        if size * len(column.distinct) > MOST_CODES:  # then only those that occur are numbered
            distinct, number = np.unique(number, return_inverse=True)
            size = len(distinct)
        number = number * len(column.distinct) + column.position
        size *= len(column.distinct)
    if size > MOST_CODES:
        distinct, number = np.unique(number, return_inverse=True)
        size = len(distinct)
    return Column(np.arange(size), number)


def _tensors(node: fx.Node, module: fx.GraphModule) -> list[Tensor]:
    """What a file holds of a node: parameters of a module, a tensor that the network names."""
    if node.op == "call_module":
        return list(module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(owner), name, None)
        return [value] if isinstance(value, Tensor) else []
    return []
