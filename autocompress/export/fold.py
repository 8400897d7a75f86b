"""Fold batch norms into the layer before them; exact in eval mode. Those that follow the batch are spelt out instead."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from autocompress.compress.quantize import RoundedConv, RoundedLinear, plain_layer
from autocompress.graph.nodes import follows_batch, fused, kind_of


def plain_weights(module: nn.Module) -> None:
    """Put ordinary layers in place of those that round their weights (in place): the exporter rounds what folding leaves."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, (RoundedConv, RoundedLinear)):
            module.set_submodule(name, plain_layer(layer))


class _BatchStatistics(nn.Module):
    """A batch norm without running statistics, in operators that every runtime has."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        axes, shape = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
        centred = x - x.mean(axes, keepdim=True)
        normal = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + self.eps)
        scaled = normal if self.weight is None else normal * self.weight.view(shape)
        return scaled if self.bias is None else scaled + self.bias.view(shape)


def spell_out_batch_statistics(module: nn.Module) -> None:
    """Put operators in place of batch norms without running statistics, which runtimes know in training only (in place)."""
    for name, norm in list(module.named_modules()):
        if follows_batch(norm):
            module.set_submodule(name, _BatchStatistics(norm))


def fold_norms(module: fx.GraphModule) -> None:
    """Fold every convolution or linear layer with the batch norm that alone reads it (in place); not what is called more than once."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    for node in list(module.graph.nodes):
        kind = kind_of(node, module)
        if kind not in ("conv", "linear"):
            continue
        norm = fused(node, module).norm
        if norm is None or calls[str(node.target)] > 1 or calls[str(norm.target)] > 1:
            continue
        layer, batch_norm = module.get_submodule(str(node.target)), module.get_submodule(str(norm.target))
        folded = fuse_conv_bn_eval(layer, batch_norm) if kind == "conv" else fuse_linear_bn_eval(layer, batch_norm)  # type: ignore[type-var, arg-type]
        module.set_submodule(str(node.target), folded)
        norm.replace_all_uses_with(node)
        module.graph.erase_node(norm)
    module.delete_all_unused_submodules()
    module.recompile()
