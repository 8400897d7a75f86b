"""How much each channel matters: the order in which channels are kept.

L2 norm of the filters that make the channel (Li et al. 2017, arXiv 1608.08710, use L1), with batch norm folded in, each producer's
norms divided by their mean so that no producer of a shared stream dominates, summed over producers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocompress.graph.channels import Channels
from autocompress.graph.nodes import Weighted, fused, module_of, value_of


def channel_scores(module: fx.GraphModule, channels: Channels) -> NDArray[np.float64]:
    """Score of every id class (index: id of the class); 0 for classes that no layer makes."""
    scores = np.zeros(len(channels.parents))
    nodes = {node.name: node for node in module.graph.nodes}
    for role, ids in channels.roles:
        if role.part not in ("out", "depthwise"):
            continue
        roots = [channels.root(index) for index in ids.tolist()]
        node = nodes[role.node]
        if node.op == "get_attr":
            axis = next(axis for axis, own in channels.layouts[node.name].items() if own is ids)
            norms = _norms(value_of(node, module), axis).numpy()
        else:
            norms = _filter_norms(node, module).numpy()
        np.add.at(scores, roots, norms / max(float(norms.mean()), 1e-12))
    return scores


def _norms(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().movedim(axis, 0).flatten(1).norm(dim=1)


@torch.no_grad()
def _filter_norms(node: fx.Node, module: fx.GraphModule) -> Tensor:
    layer = module_of(node, module)
    assert isinstance(layer, Weighted)
    norms = _norms(layer.weight, 0)
    norm_node = fused(node, module).norm
    norm = module_of(norm_node, module) if norm_node is not None else None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None and norm.weight is not None:
        norms = norms * (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).abs()
    return norms
