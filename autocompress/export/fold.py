"""Fold batch norms into the layer before them; exact in eval mode."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

from autocompress.compress.quantize import RoundedConv, RoundedLinear, plain_layer
from autocompress.graph.nodes import fused, kind_of


def plain_weights(module: nn.Module) -> None:
    """Put ordinary layers in place of those that round their weights (in place): the exporter rounds what folding leaves."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, (RoundedConv, RoundedLinear)):
            module.set_submodule(name, plain_layer(layer))


def _scaled(norm: nn.Module) -> nn.Module:
    """A batch norm with a weight and a bias, which torch's fusion of linear layers asks for."""
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None
    if norm.weight is None:
        norm.weight, norm.bias = nn.Parameter(torch.ones_like(norm.running_mean)), nn.Parameter(torch.zeros_like(norm.running_mean))
    return norm


def fold_norms(module: fx.GraphModule) -> None:
    """Fold every convolution or linear layer with the batch norm that alone reads it (in place)."""
    for node in list(module.graph.nodes):
        kind = kind_of(node, module)
        if kind not in ("conv", "linear"):
            continue
        norm = fused(node, module).norm
        if norm is None:
            continue
        layer, batch_norm = module.get_submodule(str(node.target)), _scaled(module.get_submodule(str(norm.target)))
        folded = fuse_conv_bn_eval(layer, batch_norm) if kind == "conv" else fuse_linear_bn_eval(layer, batch_norm)  # type: ignore[type-var, arg-type]
        module.set_submodule(str(node.target), folded)
        norm.replace_all_uses_with(node)
        module.graph.erase_node(norm)
    module.delete_all_unused_submodules()
    module.recompile()
