"""How much each channel matters: the order in which channels are kept, by one of the criteria of `PruneSpec`.

The score of the filters that make the channel, with batch norm folded in, each producer's scores divided by their mean so that no
producer of a shared stream dominates, summed over producers. Parameters that no layer holds, and layers without a batch norm where its
scale is asked for, are judged by their l2 norm.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from autocompress.graph.channels import Channels
from autocompress.graph.nodes import Weighted, fused, module_of, value_of
from autocompress.policy import Criterion

TINY = 1e-12
DIGITS = 9
"""Scores that agree to so many are equal, whatever rounding has made of them; of equal ones the first stay."""
MOST_COMPARED = 8192
"""Filters of a layer that are compared with each other: more are the words of a language, or fill the memory."""


def channel_scores(module: fx.GraphModule, channels: Channels, criterion: Criterion = "l2") -> NDArray[np.float64]:
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
            found = _rows(value_of(node, module), axis).norm(dim=1)
        else:
            found = _filter_scores(node, module, criterion)
        own = found.numpy()
        np.add.at(scores, roots, np.round(own / max(float(own.mean()), TINY), DIGITS))
    return scores


def _rows(weight: Tensor, axis: int) -> Tensor:
    return weight.detach().double().movedim(axis, 0).flatten(1)


@torch.no_grad()
def _filter_scores(node: fx.Node, module: fx.GraphModule, criterion: Criterion) -> Tensor:
    layer = module_of(node, module)
    assert isinstance(layer, Weighted)
    filters = _rows(layer.weight, 0)
    norm_node = fused(node, module).norm
    norm = module_of(norm_node, module) if norm_node is not None else None
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None and norm.weight is not None:
        if criterion == "scale":
            return norm.weight.double().abs()
        filters = filters * (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt())[:, None]
    if criterion == "l1":
        return filters.abs().sum(1)
    if criterion == "median" and len(filters) <= MOST_COMPARED:
        return torch.cdist(filters, filters).sum(1)
    return filters.norm(dim=1)
