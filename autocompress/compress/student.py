"""Build a policy's student: blocks really gone, channels really removed or added. Never in place."""

from __future__ import annotations

import copy
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init

from autocompress.compress.distill import SharedFeatures
from autocompress.graph import Graph
from autocompress.graph.channels import pad_amounts
from autocompress.graph.nodes import Conv, Weighted, is_depthwise, kind_of, module_of
from autocompress.graph.resize import NEW, Roots, Selection
from autocompress.graph.trace import annotate_shapes
from autocompress.policy import Policy

INIT_SEED = 1234


def build_student(graph: Graph, policy: Policy) -> fx.GraphModule:
    """The student's structure with what it can take of the teacher's weights; not quantized yet.

    Filters of added channels start from Kaiming's initialisation (He et al. 2015, arXiv 1502.01852), the same in every process, and
    nothing reads them at first, so that a wider student starts as the same function.
    State-dict keys are the teacher's. Raises UsageError for names that the graph does not know.
    """
    graph.require_known(policy)
    student = copy.deepcopy(graph.without(policy.student.drop))
    selection = graph.selection(policy)
    generator = torch.Generator().manual_seed(INIT_SEED)
    for node in student.graph.nodes:
        kind = kind_of(node, student)
        if kind in ("conv", "linear", "norm"):
            _resize_module(node, student, graph, selection, generator)
        elif kind == "pad":
            _resize_pad(node, graph, selection)
    student.recompile()
    annotate_shapes(student, graph.example)
    for parameter in student.parameters():  # a teacher may be frozen; what learns from it is not
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return student.eval()


def shared_features(graph: Graph, policy: Policy) -> SharedFeatures | None:
    """Which inputs of its classifier the policy's student has in common with its teacher; None without a classifier, or with nothing.

    A student of another architecture shares nothing.
    """
    if graph.classifier is None or policy.student.reference is not None:
        return None
    student = graph.without(policy.student.drop)
    node = next(n for n in student.graph.nodes if n.op == "call_module" and n.target == graph.classifier)
    source = node.all_input_nodes[0]
    index = graph.index(source.name, graph.selection(policy))
    if index is None:
        index = np.arange(source.meta["shape"][1])
    kept = np.flatnonzero(index != NEW)
    return SharedFeatures(graph.classifier, torch.from_numpy(kept), torch.from_numpy(index[kept])) if len(kept) else None


def _resize_module(node: fx.Node, student: fx.GraphModule, graph: Graph, selection: Selection, generator: torch.Generator) -> None:
    source, target = node.all_input_nodes[0].name, node.name
    rows, columns = graph.index(target, selection), graph.index(source, selection)
    if rows is None and columns is None:
        return
    module = module_of(node, student)
    if isinstance(module, Conv):
        resized: nn.Module = _conv(module, rows, columns, generator)
    elif isinstance(module, nn.Linear):
        resized = _linear(module, rows, columns, generator)
    else:
        resized = _norm(cast(nn.BatchNorm2d, module), rows)
    student.set_submodule(str(node.target), resized)


def _conv(old: Conv, rows: Roots | None, columns: Roots | None, generator: torch.Generator) -> Conv:
    depthwise = is_depthwise(old)
    outputs = len(rows) if rows is not None else old.out_channels
    inputs = outputs if depthwise else len(columns) if columns is not None else old.in_channels
    new: Conv = skip_init(
        type(old), inputs, outputs, old.kernel_size, old.stride, old.padding, old.dilation,
        groups=outputs if depthwise else old.groups, bias=old.bias is not None, padding_mode=old.padding_mode, dtype=old.weight.dtype,
    )  # fmt: skip
    _fill(new, old, rows, None if depthwise else columns, generator)
    return new


def _linear(old: nn.Linear, rows: Roots | None, columns: Roots | None, generator: torch.Generator) -> nn.Linear:
    new: nn.Linear = skip_init(
        nn.Linear,
        len(columns) if columns is not None else old.in_features,
        len(rows) if rows is not None else old.out_features,
        bias=old.bias is not None,
        dtype=old.weight.dtype,
    )
    _fill(new, old, rows, columns, generator)
    return new


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


def _norm(old: nn.BatchNorm2d, index: Roots | None) -> nn.Module:
    if index is None:
        return old
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


def _resize_pad(node: fx.Node, graph: Graph, selection: Selection) -> None:
    """Padding over channels: what is padded in front and behind follows from the channels that came before and after."""
    amounts, roots = pad_amounts(node), graph.roots(node.name)
    if amounts is None or roots is None or len(amounts) < 2 * (len(node.meta["shape"]) - 1):
        return
    front, back = amounts[-2], amounts[-1]
    before = selection.size(roots[:front])
    behind = selection.size(roots[len(roots) - back :]) if back else 0
    node.args = (node.args[0], (*amounts[:-2], before, behind), *node.args[2:])
