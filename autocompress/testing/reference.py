"""What a pruned student must compute, computed in the network's full shape: the other side of the first law."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from autocompress.graph import Graph
from autocompress.graph.nodes import CONVOLUTIONS, channel_axis, kind_of, module_of, name_of, normalized_axes, reduced_axes
from autocompress.graph.rules import REDUCTIONS
from autocompress.policy import Policy

PRODUCTS = ("matmul", "bmm", "mm", "einsum", "linear", *CONVOLUTIONS)
"""What adds over channels that it multiplies."""


class Unread(fx.Interpreter):
    """The network of which nobody reads a channel that the policy removes.

    Layers and products read zeros in its place, what the network holds for it is zero, and norms, means and the like are taken over the
    channels that are left. Other operators compute what they do anyway: each of their channels is made of channels of the same identity.
    """

    def __init__(self, graph: Graph, policy: Policy) -> None:
        super().__init__(graph.without(policy.student.drop))
        self._graph, self._keep = graph, torch.from_numpy(graph.selection(policy).keep)

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        """The node's value, with anything in place of removed channels."""
        source = n.all_input_nodes[0] if n.all_input_nodes else n
        if n.op == "get_attr":
            value = super().run_node(n)
            return self._zeroed(value, n, range(value.dim())) if isinstance(value, Tensor) else value
        module = module_of(n, self.module)
        if kind_of(n, self.module) in ("conv", "linear") and getattr(module, "groups", 1) == 1:
            return self._reading(n, lambda x: self._zeroed(x, source, [channel_axis(n, self.module)]))
        if name_of(n) in PRODUCTS:
            return self._multiplied(n)
        if name_of(n) in REDUCTIONS:
            return self._reading(n, lambda x: self._left(x, source, reduced_axes(n)))
        if isinstance(module, nn.LayerNorm):
            return self._normalized(n, module.weight, lambda x, weight, left: F.layer_norm(
                x, x.shape[-1:], weight, module.bias.flatten()[left] if module.bias is not None else None, module.eps
            ))  # fmt: skip
        if isinstance(module, nn.GroupNorm) and module.num_groups == 1:
            return self._normalized_maps(n, module)
        if name_of(n) == "rms_norm":
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
            return self._normalized(n, given.get("weight"), lambda x, weight, _: F.rms_norm(x, x.shape[-1:], weight, given.get("eps")))
        return super().run_node(n)

    def _reading(self, node: fx.Node, change: Callable[[Tensor], Tensor]) -> Any:
        """What the node makes of its first input as it is changed."""
        source = node.all_input_nodes[0]
        before = self.env[source]
        self.env[source] = change(before)
        try:
            return super().run_node(node)
        finally:
            self.env[source] = before

    def _multiplied(self, node: fx.Node) -> Any:
        before = {source: value for source in node.all_input_nodes if isinstance(value := self.env[source], Tensor)}
        self.env |= {source: self._zeroed(value, source, range(value.dim())) for source, value in before.items()}
        try:
            return super().run_node(node)
        finally:
            self.env |= before

    def _normalized(self, node: fx.Node, weight: Tensor | None, norm: Callable[..., Tensor]) -> Tensor:
        """norm: of what is left, given with its weight, and which it is."""
        value, axes = self.env[node.all_input_nodes[0]], normalized_axes(node, self.module)
        kept = torch.ones(value.shape[axes.start :], dtype=torch.bool)
        for place, axis in enumerate(axes):
            along = self._kept(value, node, axis)
            if along is not None:
                kept &= along.view([-1 if other == place else 1 for other in range(len(axes))])
        rows, left = value.flatten(-len(axes)), kept.flatten()
        result = torch.zeros_like(rows)
        result[..., left] = norm(rows[..., left], weight.flatten()[left] if weight is not None else None, left)
        return result.view(value.shape)

    def _normalized_maps(self, node: fx.Node, norm: nn.GroupNorm) -> Tensor:
        value = self.env[node.all_input_nodes[0]]
        kept = self._kept(value, node, 1)
        left = kept if kept is not None else torch.ones(value.shape[1], dtype=torch.bool)
        result = torch.zeros_like(value)
        weight, bias = (norm.weight[left], norm.bias[left]) if norm.affine else (None, None)
        result[:, left] = F.group_norm(value[:, left], 1, weight, bias, norm.eps)
        return result

    def _zeroed(self, value: Tensor, node: fx.Node, axes: Iterable[int]) -> Tensor:
        """Without what is removed along these axes of the node's value."""
        for axis in axes:
            kept = self._kept(value, node, axis)
            if kept is not None:
                value = value * kept.view([-1 if other == axis else 1 for other in range(value.dim())]).to(value.dtype)
        return value

    def _left(self, value: Tensor, node: fx.Node, axes: Iterable[int]) -> Tensor:
        """What is left along these axes of the node's value."""
        for axis in axes:
            kept = self._kept(value, node, axis)
            if kept is not None:
                value = value.index_select(axis, torch.nonzero(kept).flatten())
        return value

    def _kept(self, value: Tensor, node: fx.Node, axis: int) -> Tensor | None:
        """Which entries of an axis are left; it may hold the channels of all inputs, one after the other."""
        roots = self._graph.roots(node.name).get(axis)
        return self._keep[roots].repeat(value.shape[axis] // len(roots)) if roots is not None else None
