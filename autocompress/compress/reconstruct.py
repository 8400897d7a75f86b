"""Reconstruct a student before it is trained: fit its layers, one after the other, to what the teacher computes in their place.

What a student inherits of its teacher expects inputs that it no longer gets: channels are missing, and blocks have left the stream as it
was. So each layer is solved by least squares for the teacher's values, given the inputs that it has in the student as reconstructed so far
(layer-wise reconstruction as in AdaPrune: Hubara et al. 2021, arXiv 2102.08124; ZipLM: Kurtic et al. 2023, arXiv 2302.04089). The last
layer of a residual block is fitted to the stream as the student's next block reads it in the teacher, so that it also does the work of
the blocks that were dropped between them. Of two layers that stand for one the first gets what the best layer in their place makes most
of; the second is fitted like any other. Batch norms get the statistics of the reconstructed student.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.batch import Inputs, tensors_of
from autocompress.compress.least_squares import solve
from autocompress.compress.low_rank import FIRST_OF, leading_factors, write
from autocompress.graph import Graph
from autocompress.graph.nodes import Conv, Weighted, fused, is_depthwise, is_folded_norm, is_layer, kind_of, module_of
from autocompress.graph.resize import NEW, Selection
from autocompress.policy import Policy

_Value = tuple[str, bool]
"""Name of a node, and whether channels are the last axis of its values, else the second."""
MOST_EXAMPLES = 512
KEPT_BYTES = 2**28
"""Of the teacher's values, for the next student."""
MAP_BYTES = 2**28
"""Of the largest value in the network, for all examples together."""
ROWS = 8192
"""Positions in the maps of all examples together to which a layer is fitted, about."""
TARGET_BYTES = 2**30
"""Of what all layers together are fitted to: of large networks at fewer positions."""
MOST_INPUTS = 2304
"""Of a filter (256 channels of 3 x 3): the equations cost the cube of them."""
SEED = 20241
TINY = 1e-6
"""A norm that multiplies by less has no use for what its layer makes."""


def examples_for(graph: Graph) -> int:
    """How many inputs a reconstruction looks at: fewer where maps are large."""
    maps = [node for node in graph.module.graph.nodes if "shape" in node.meta and node.op != "get_attr"]  # a table of words is none
    shapes = [node.meta["shape"] for node in maps]
    largest = max(math.prod(shape) for shape in shapes) / len(graph.example[0])
    return max(1, min(MOST_EXAMPLES, int(MAP_BYTES / (4 * largest))))


class TeacherActivations:
    """What the teacher computes on some inputs, at the positions that are looked at: one for all students that are reconstructed on these.

    Args:
        inputs: n of them, as the network takes them. All values that a layer has for them are held at once.
    """

    def __init__(self, graph: Graph, inputs: Inputs) -> None:
        self.graph, self.inputs = graph, inputs
        self.rows = min(ROWS, TARGET_BYTES // (4 * max(1, sum(layer.out_channels for layer in graph.layers))))
        self._kept: dict[_Value, Tensor] = {}

    def values(self, wanted: set[_Value]) -> dict[_Value, Tensor]:
        """These values of the teacher, each as rows x channels; kept, unless all that was asked for takes more than KEPT_BYTES."""
        missing = wanted - self._kept.keys()
        found = self._kept | (_Recorder(self.graph.module, missing, self.rows).of(self.inputs) if missing else {})
        self._kept = found if sum(rows.nbytes for rows in found.values()) <= KEPT_BYTES else {}
        return {value: found[value] for value in wanted}


@torch.no_grad()
def reconstruct(student: fx.GraphModule, teacher: TeacherActivations, policy: Policy, *, until: float = math.inf) -> None:
    """Fit the student's convolutions and linear layers to the teacher on the inputs of `teacher`, in place.

    Args:
        student: what `build_student` makes of the teacher's graph and the policy, in eval mode.
        until: `time.monotonic()` after which no other layer is fitted; those behind it keep what they inherited.
    """
    graph = teacher.graph
    aims = {aim.layer.name: aim for aim in _aims(student, _roles(student, graph.module))}
    known = teacher.values({(aim.teacher, aim.last) for aim in aims.values()})
    _Reconstruction(student, graph, graph.selection(policy), aims, known, teacher.rows, until).run(*tensors_of(teacher.inputs))


@dataclass(frozen=True)
class _Aim:
    """A layer, the batch norm behind it, and what the two are fitted to: a value of the teacher, less what an addition adds to theirs.

    last: channels are the last axis of the values, else the second.
    """

    layer: fx.Node
    norm: fx.Node | None
    teacher: str
    beside: fx.Node | None
    last: bool

    @property
    def end(self) -> fx.Node:
        return self.norm or self.layer


def _roles(student: fx.GraphModule, teacher: fx.GraphModule) -> dict[str, fx.Node]:
    """For each node of the student what its reader reads in the teacher: not the node's namesake where blocks behind it are gone."""
    namesakes = {node.name: node for node in teacher.graph.nodes}
    roles: dict[str, fx.Node] = {}
    for node in reversed(student.graph.nodes):
        for user in node.users:
            stands_for = roles.get(user.name) if kind_of(user, student) == "activation" else None
            if stands_for is None or kind_of(stands_for, teacher) != "activation":
                stands_for = namesakes.get(user.meta.get(FIRST_OF, user.name))
            sources = stands_for.all_input_nodes if stands_for is not None else []
            place = user.all_input_nodes.index(node)
            if place < len(sources):
                roles[node.name] = sources[place]
                break
    return roles


def _aims(student: fx.GraphModule, roles: dict[str, fx.Node]) -> Iterator[_Aim]:
    order = {node: position for position, node in enumerate(student.graph.nodes)}
    uses = Counter(id(weight) for node in order if (weight := _weight(node, student)) is not None)
    for node in student.graph.nodes:
        if FIRST_OF in node.meta:
            continue
        layer, norm = module_of(node, student), fused(node, student).norm
        weights = [_weight(part, student) for part in (node, norm) if part is not None]
        if not _is_solvable(layer) or any(weight is None or uses[id(weight)] > 1 for weight in weights):
            continue
        end = norm or node
        beside = _beside(end, student)
        if beside is not None and order[beside] < order[node]:
            end = next(iter(end.users))
        else:
            beside = None
        last = isinstance(layer, nn.Linear)
        if end.name in roles and _positions_of(roles[end.name], last=last) == _positions_of(end, last=last) is not None:
            yield _Aim(node, norm, roles[end.name].name, beside, last)


def _positions_of(node: fx.Node, *, last: bool) -> tuple[int, ...] | None:
    """Shape of a tensor but for its channels, in its batch of examples; None of what is no tensor."""
    shape = node.meta.get("shape")
    if shape is None or len(shape) < 2:
        return None
    return tuple(shape[:-1] if last else (*shape[:1], *shape[2:]))


def _weight(node: fx.Node, student: fx.GraphModule) -> Tensor | None:
    """The weight of the module that the node calls: other nodes may share it."""
    return getattr(module_of(node, student), "weight", None)


def _is_solvable(layer: nn.Module | None) -> bool:
    """Whether the layer is a linear function of patches that can be taken from its input."""
    if isinstance(layer, Conv) and is_layer(layer):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) is nn.Linear


def _beside(end: fx.Node, student: fx.GraphModule) -> fx.Node | None:
    """What is added to the value of this node, where that is all that becomes of it."""
    users = list(end.users)
    if len(users) != 1 or kind_of(users[0], student) != "add" or len(users[0].all_input_nodes) != 2:
        return None
    (other,) = (operand for operand in users[0].all_input_nodes if operand is not end)
    return other if other.meta.get("shape") == end.meta.get("shape") else None


class _Recorder(fx.Interpreter):
    """Runs a network and keeps some of its values, each as rows x channels."""

    def __init__(self, module: fx.GraphModule, wanted: set[_Value], rows: int) -> None:
        super().__init__(module)
        self._wanted, self._rows = wanted, rows
        self._known: dict[_Value, Tensor] = {}

    def of(self, inputs: Inputs) -> dict[_Value, Tensor]:
        self.run(*tensors_of(inputs))
        return self._known

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        for last in (False, True):
            if (n.name, last) in self._wanted and isinstance(value, Tensor):
                self._known[n.name, last] = _rows_of(value, self._rows, last=last)
        return value


class _Reconstruction(fx.Interpreter):
    """Runs the student, and fits each layer as soon as its inputs are there."""

    def __init__(
        self,
        student: fx.GraphModule,
        graph: Graph,
        selection: Selection,
        aims: dict[str, _Aim],
        known: dict[_Value, Tensor],
        rows: int,
        until: float,
    ) -> None:
        super().__init__(student)
        self._student, self._graph, self._selection = student, graph, selection
        self._aims, self._known, self._rows, self._until = aims, known, rows, until
        self._fitted: dict[str, _Fit] = {}

    def run_node(self, n: fx.Node) -> object:
        if time.monotonic() < self._until:
            if (aim := self._aims.get(n.name)) is not None:
                self._fit(aim)
            elif (aim := self._aims.get(n.meta.get(FIRST_OF, ""))) is not None:
                self._fit_first(n, aim)
        if is_folded_norm(n):
            self._reestimate(n)
        return super().run_node(n)

    def _fit(self, aim: _Aim) -> None:
        layer, norm = self._layer(aim.layer), module_of(aim.norm, self._student) if aim.norm is not None else None
        kept, target = self._target(aim)
        depthwise = is_depthwise(layer)
        groups = len(kept) if depthwise else getattr(layer, "groups", 1)
        size = layer.weight[0].numel()
        if not len(kept) or size > MOST_INPUTS or (groups > 1 and not depthwise and len(kept) < len(layer.weight)):
            return
        inputs = _patches(layer, self.env[aim.layer.all_input_nodes[0]], self._rows)
        inputs = inputs[:, kept] if depthwise else inputs
        if len(inputs) != len(target):
            return
        inherited = (_gain(norm).expand(len(layer.weight))[kept, None] * layer.weight[kept].flatten(1)).view(groups, -1, size)
        free = norm is not None or layer.bias is not None
        weight, bias = solve(inputs, target.view(len(target), groups, -1), inherited, free=free)
        self._write(aim, layer, kept, weight.view(len(kept), size), bias.view(len(kept)))

    def _fit_first(self, node: fx.Node, aim: _Aim) -> None:
        """The first of two layers that stand for one, which is solved for both; the second, whose aim it is, begins with what is left."""
        first, second = self._layer(node), self._layer(aim.layer)
        norm = module_of(aim.norm, self._student) if aim.norm is not None else None
        kept, target = self._target(aim)
        rank, size = len(first.weight), first.weight[0].numel()
        if len(kept) < rank or size > MOST_INPUTS:
            return
        inputs = _patches(first, self.env[node.all_input_nodes[0]], self._rows)
        if len(inputs) != len(target):
            return
        gain = _gain(norm).expand(len(second.weight))[kept, None]
        whole = gain * second.weight[kept].flatten(1) @ first.weight.flatten(1)
        free = norm is not None or second.bias is not None
        weight, _ = solve(inputs, target[:, None], whole[None], free=free)
        left, right = leading_factors(weight[0], inputs[:, 0], rank, centred=free)
        write(first, right)
        second.weight[kept] = (left / torch.where(gain.abs() > TINY, gain, 1.0)).view_as(second.weight[kept])

    def _layer(self, node: fx.Node) -> Weighted:
        layer = module_of(node, self._student)
        assert isinstance(layer, Weighted)
        return layer

    def _target(self, aim: _Aim) -> tuple[Tensor, Tensor]:
        """(the layer's channels that the teacher has too, rows x these channels: what their values should be)."""
        known, index = self._known[aim.teacher, aim.last], self._graph.index(aim.end.name, self._axis(aim), self._selection)
        index = np.arange(known.shape[1]) if index is None else index
        kept = np.flatnonzero(index != NEW)
        target, rows = known[:, torch.from_numpy(index[kept])], torch.from_numpy(kept)
        return rows, target if aim.beside is None else target - _rows_of(self.env[aim.beside], self._rows, last=aim.last)[:, rows]

    def _axis(self, aim: _Aim) -> int:
        return len(aim.end.meta["shape"]) - 1 if aim.last else 1

    def _write(self, aim: _Aim, layer: Weighted, kept: Tensor, weight: Tensor, bias: Tensor) -> None:
        """Where a batch norm follows, filters keep the length that they had, on which the speed of their training depends.

        Those that were shorter than most get the median: the shorter a filter in front of a norm, the larger its gradient, and one that had
        decayed to nothing and was fitted for real work would be destroyed by the first step.
        """
        if aim.norm is not None:
            lengths = layer.weight[kept].flatten(1).norm(dim=1)
            scale = lengths.clamp_min(float(lengths.median())) / weight.norm(dim=1).clamp_min(1e-12)
            self._fitted[aim.norm.name] = _Fit(kept, scale, bias)
            weight, bias = weight * scale[:, None], torch.zeros_like(bias)
        layer.weight[kept] = weight.view_as(layer.weight[kept])
        if layer.bias is not None:
            layer.bias[kept] = bias

    def _reestimate(self, node: fx.Node) -> None:
        """Statistics of what the batch norm is given; where its layer was fitted, weights with which it gives the fitted values."""
        norm, value = module_of(node, self._student), self.env[node.all_input_nodes[0]]
        assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None and norm.running_var is not None
        if value.numel() <= value.shape[1]:
            return
        axes = [axis for axis in range(value.dim()) if axis != 1]
        mean, variance = value.mean(axes), value.var(axes)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if (fit := self._fitted.get(node.name)) is not None:
            kept = fit.channels
            norm.weight[kept] = (variance[kept] + norm.eps).sqrt() / fit.scale
            norm.bias[kept] = mean[kept] / fit.scale + fit.bias


def _gain(norm: nn.Module | None) -> Tensor:
    """What a batch norm multiplies each channel by; without one, nothing changes."""
    if norm is None:
        return torch.ones(1)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None
    return norm.weight / (norm.running_var + norm.eps).sqrt()


@dataclass(frozen=True)
class _Fit:
    """What a batch norm has to do for the values of these channels: divide them by `scale` and add `bias`."""

    channels: Tensor
    scale: Tensor
    bias: Tensor


def _rows_of(value: Tensor, rows: int, *, last: bool) -> Tensor:
    """About `rows` x channels of a value n x channels x ... (`last`: n x ... x channels), at the positions that are looked at."""
    if value.dim() == 2:
        return value
    flat = value.flatten(1, -2) if last else value.flatten(2).transpose(1, 2)
    picked = _positions(len(flat), flat.shape[1], rows)
    return flat.gather(1, picked[:, :, None].expand(-1, -1, flat.shape[2])).flatten(0, 1)


def _positions(n: int, size: int, rows: int) -> Tensor:
    """n x positions, indices below `size`: the same for maps of the same size, in student and teacher."""
    each = max(1, rows // n)
    if each >= size:
        return torch.arange(size).expand(n, -1)
    return torch.randint(size, (n, each), generator=torch.Generator().manual_seed(SEED))


def _patches(layer: Weighted, value: Tensor, rows: int) -> Tensor:
    """rows x groups x inputs of a filter, at the positions of the outputs that are looked at.

    Taken one by one: `F.unfold` makes all of a map's patches, a hundred times as many in a large one.
    """
    if isinstance(layer, nn.Linear):
        return _rows_of(value, rows, last=True)[:, None]
    assert not isinstance(layer.padding, str)
    padded = F.pad(value, [side for padding in reversed(layer.padding) for side in (padding, padding)])
    reach = [dilation * (kernel - 1) + 1 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)]
    outputs = [(size - r) // stride + 1 for size, r, stride in zip(padded.shape[2:], reach, layer.stride, strict=True)]
    corners = torch.unravel_index(_positions(len(value), math.prod(outputs), rows), outputs)
    places = []
    for axis, corner in enumerate(corners):
        along = corner[:, :, None] * layer.stride[axis] + layer.dilation[axis] * torch.arange(layer.kernel_size[axis])
        places.append(along.view(*corner.shape, *(-1 if axis == other else 1 for other in range(len(outputs)))))
    examples = torch.arange(len(value)).view(-1, 1, *(1 for _ in outputs))
    patches = padded.movedim(1, -1)[examples, *places]  # n x positions x kernel x channels
    return patches.movedim(-1, 2).flatten(0, 1).flatten(1).unflatten(1, (layer.groups, -1))
