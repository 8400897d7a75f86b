"""Build a policy's student: blocks really gone, channels really removed or added, layers really factorised. Never in place."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocompress.compress.low_rank import factorise
from autocompress.compress.new_layers import unfilled
from autocompress.compress.sizes import resize_arguments
from autocompress.graph import Graph
from autocompress.graph.nodes import Conv, Weighted, channel_axis, module_of, normalized_axes, value_of
from autocompress.graph.resize import NEW, Roots, Selection
from autocompress.graph.trace import annotate_shapes
from autocompress.policy import Policy

INIT_SEED = 1234


def build_student(graph: Graph, policy: Policy) -> fx.GraphModule:
    """The student's structure with what it can take of the teacher's weights; not quantized yet.

    Filters of added channels start from Kaiming's initialisation (He et al. 2015, arXiv 1502.01852), the same in every process, and
    nothing reads them at first, so that a wider student starts as the same function.
    State-dict keys are the teacher's, but for layers that are factorised. Raises UsageError for names that the graph does not know.
    """
    graph.require_known(policy)
    student = copy.deepcopy(graph.without(policy.student.drop))
    selection = graph.selection(policy)
    generator = torch.Generator().manual_seed(INIT_SEED)
    for node in list(student.graph.nodes):
        if node.op == "call_module":
            _resize_module(node, student, graph, selection, generator)
        elif node.op == "get_attr":
            _resize_attribute(node, student, graph, selection)
        else:
            resize_arguments(node, graph, selection)
    factorise(student, graph.ranks(policy))
    student.recompile()
    annotate_shapes(student, graph.example)
    for parameter in student.parameters():  # a teacher may be frozen; what learns from it is not
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return student.eval()


def _origins(node: fx.Node, student: fx.GraphModule, graph: Graph, selection: Selection) -> tuple[Roots | None, ...]:
    """For each axis of a node's weight the teacher's entries that the student's come from (NEW: added); None: all of them, in order.

    Of a layer the axes of its outputs and of its inputs, all of these where filters look at a group of them each. Empty for what has no
    weight that follows channels.
    """
    if node.op == "get_attr":
        return tuple(graph.index(node.name, axis, selection) for axis in range(max(graph.roots(node.name), default=-1) + 1))
    module = module_of(node, student)
    if isinstance(module, nn.LayerNorm):
        return tuple(graph.index(node.name, axis, selection) for axis in normalized_axes(node, student))
    if not isinstance(module, (Weighted, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return ()
    axis, source = channel_axis(node, student), node.all_input_nodes[0].name
    rows = graph.index(node.name, axis, selection)
    return (rows, graph.index(source, axis, selection)) if isinstance(module, Weighted) else (rows,)


def _resize_module(node: fx.Node, student: fx.GraphModule, graph: Graph, selection: Selection, generator: torch.Generator) -> None:
    module, indices = module_of(node, student), _origins(node, student, graph, selection)
    if all(index is None for index in indices):
        return
    if isinstance(module, nn.LayerNorm):
        resized: nn.Module = _layer_norm(module, indices)
    elif isinstance(module, Weighted):
        rows, columns = indices
        resized = _layer(module, rows, columns, generator)
    else:
        (kept,) = indices
        assert kept is not None
        resized = _group_norm(module, kept) if isinstance(module, nn.GroupNorm) else _norm(cast(nn.BatchNorm2d, module), kept)
    student.set_submodule(str(node.target), resized)


def _layer(old: Weighted, rows: Roots | None, columns: Roots | None, generator: torch.Generator) -> Weighted:
    """Groups of filters go as a whole: what one of them reads does not change."""
    outputs = len(rows) if rows is not None else len(old.weight)
    grouped = isinstance(old, Conv) and old.groups > 1
    whole = old.in_channels if isinstance(old, Conv) else old.in_features
    inputs = len(columns) if columns is not None else whole
    groups = inputs * old.groups // whole if isinstance(old, Conv) and grouped else 1
    new = unfilled(old, inputs, outputs, bias=old.bias is not None, groups=groups)
    _fill(new, old, rows, None if grouped else columns, generator)
    return new


@torch.no_grad()
def _group_norm(old: nn.GroupNorm, index: Roots) -> nn.GroupNorm:
    """As many channels in a group as before, in more or fewer groups; one group stays one."""
    groups = len(index) * old.num_groups // old.num_channels if old.num_groups > 1 else 1
    new = nn.GroupNorm(groups, len(index), old.eps, old.affine, dtype=old.weight.dtype if old.affine else None)
    if old.affine:
        new.weight.copy_(_gather(old.weight, index, 0, fill=1.0))
        new.bias.copy_(_gather(old.bias, index, 0))
    return new.train(old.training)


@torch.no_grad()
def _layer_norm(old: nn.LayerNorm, indices: Sequence[Roots | None]) -> nn.LayerNorm:
    """indices: of each axis that is normalised."""
    shape = [len(index) if index is not None else size for index, size in zip(indices, old.normalized_shape, strict=True)]
    dtype = old.weight.dtype if old.elementwise_affine else None
    new = nn.LayerNorm(shape, old.eps, old.elementwise_affine, bias=old.bias is not None, dtype=dtype)
    for name, parameter in old.named_parameters():
        value: Tensor = parameter
        for axis, index in enumerate(indices):
            value = _gather(value, index, axis)
        new.get_parameter(name).copy_(value)
    return new.train(old.training)


@torch.no_grad()
def _resize_attribute(node: fx.Node, student: fx.GraphModule, graph: Graph, selection: Selection) -> None:
    """A parameter or buffer that follows channels; what it says of those that are added is what it says of the others on average."""
    value = old = value_of(node, student)
    for axis, index in enumerate(_origins(node, student, graph, selection)):
        value = _gather(value, index, axis, fill=float(old.mean())) if index is not None else value
    if value is old:
        return
    path, _, name = str(node.target).rpartition(".")
    owner = student.get_submodule(path)
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(value))
    else:
        owner.register_buffer(name, value, persistent=name not in owner._non_persistent_buffers_set)


@torch.no_grad()
def _fill(new: Weighted, old: Weighted, rows: Roots | None, columns: Roots | None, generator: torch.Generator) -> None:
    """Old filters read nothing from added channels at first (function-preserving growth as in Net2Net, Chen et al. 2016, arXiv
    1511.05641, by zeros instead of copies)."""
    weight = _gather(_gather(old.weight, rows, 0), columns, 1, fill=0.0)
    if rows is not None and bool((rows == NEW).any()):
        fresh = torch.randn(new.weight.shape, generator=generator) * (2.0 / new.weight[0].numel()) ** 0.5
        weight = torch.where(_along(rows == NEW, 0, weight.dim()), fresh.to(weight.dtype), weight)
    new.weight.copy_(weight)
    if old.bias is not None and new.bias is not None:
        new.bias.copy_(_gather(old.bias, rows, 0, fill=0.0))
    new.train(old.training)


def _norm(old: nn.BatchNorm2d, index: Roots) -> nn.Module:
    new = type(old)(len(index), eps=old.eps, momentum=old.momentum, affine=old.affine, track_running_stats=old.track_running_stats)
    fills = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    with torch.no_grad():
        for name, fill in fills.items():
            value = getattr(old, name)
            if value is not None:
                new.to(value.dtype)
                getattr(new, name).copy_(_gather(value, index, 0, fill=fill))
        if old.num_batches_tracked is not None and new.num_batches_tracked is not None:
            new.num_batches_tracked.copy_(old.num_batches_tracked)
    return new.train(old.training)


def _gather(value: Tensor, index: Roots | None, axis: int, fill: float = 0.0) -> Tensor:
    """Rows of `value` along `axis`; `fill` where the index is NEW."""
    if index is None:
        return value
    taken = value.index_select(axis, torch.from_numpy(np.maximum(index, 0)))
    return torch.where(_along(index != NEW, axis, value.dim()), taken, torch.full_like(taken, fill))


def _along(flags: NDArray[np.bool_], axis: int, dims: int) -> Tensor:
    """Flags of the entries along one axis, in a shape that broadcasts over `dims` axes."""
    shape = [1] * dims
    shape[axis] = -1
    return torch.from_numpy(flags).view(shape)
