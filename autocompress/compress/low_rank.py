"""Layers of low rank: two in place of one, with fewer channels between them than would be free.

A layer is a matrix of n filters of k inputs; where its rank may be r only, it is a layer of r filters of k inputs and one of n filters of r
(channel decomposition: Denil et al. 2013, arXiv 1306.0543; Zhang et al. 2016, arXiv 1505.06798). The first looks at the whole kernel, the
second at one position. Both are ordinary layers, which are quantized, trained and exported like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, fx, nn

from autocompress.compress.new_layers import pointwise, unfilled
from autocompress.graph.nodes import Weighted

FIRST_OF = "first_of"
"""Where the first of two layers keeps the name of the second's node, which is that of the layer that they stand for."""
LEAST_SPREAD = 1e-4
"""Of a channel between the two, relative to that which varies most: one that hardly varies would get huge weights."""


def factorise(student: fx.GraphModule, ranks: Mapping[str, int]) -> None:
    """Replace each of these layers by two, in place; LAYER becomes a sequence, whose parts are LAYER.0 and LAYER.1."""
    for node in list(student.graph.nodes):
        name = str(node.target)
        if node.op != "call_module" or name not in ranks:
            continue
        student.set_submodule(name, nn.Sequential(*_halves(cast(Weighted, student.get_submodule(name)), ranks[name])))
        with student.graph.inserting_before(node):
            first = student.graph.call_module(f"{name}.0", node.args, node.kwargs)
        first.meta = {**node.meta, FIRST_OF: node.name}
        node.target, node.args, node.kwargs = f"{name}.1", (first,), {}
    student.graph.lint()


@torch.no_grad()
def _halves(layer: Weighted, rank: int) -> tuple[Weighted, Weighted]:
    """What is nearest to the layer's weights (Eckart & Young 1936), each half with its share of the singular values."""
    left, values, right = torch.linalg.svd(layer.weight.flatten(1).double(), full_matrices=False)
    root = values[:rank].sqrt()
    first = unfilled(layer, layer.weight.shape[1], rank, bias=False)
    second = pointwise(layer, rank, len(layer.weight), bias=layer.bias is not None)
    write(first, right[:rank] * root[:, None])
    write(second, left[:, :rank] * root)
    if layer.bias is not None and second.bias is not None:
        second.bias.copy_(layer.bias)
    return first.train(layer.training), second.train(layer.training)


@torch.no_grad()
def write(layer: Weighted, filters: Tensor) -> None:
    """Set a layer's weights to a matrix of filters, outputs x inputs of a filter."""
    layer.weight.copy_(filters.view_as(layer.weight))


def leading_factors(filters: Tensor, inputs: Tensor, rank: int, *, centred: bool) -> tuple[Tensor, Tensor]:
    """(left: n x rank, right: rank x k) whose product makes of these inputs what is nearest to what the filters (n x k) make of them.

    The leading principal components of the outputs: reduced-rank regression (Izenman 1975, J. of Multivariate Analysis 5(2)), as Zhang et
    al. 2016 (section 3.1) use it. The spread of each is shared equally between both factors, so that either can be rounded to few bits.

    Args:
        inputs: rows x k.
        centred: whether a constant will be added to the outputs, so that only what varies counts.
    """
    outputs = (inputs @ filters.mT).double()
    outputs = outputs - outputs.mean(0) if centred else outputs
    variances, vectors = torch.linalg.eigh(outputs.mT @ outputs / len(outputs))  # in ascending order
    spread = variances[-rank:].clamp_min(0).sqrt()
    root = spread.clamp_min(LEAST_SPREAD * float(spread.max()) + torch.finfo().tiny).sqrt()
    leading = vectors[:, -rank:]
    left, right = leading * root, (leading / root).mT @ filters.double()
    return left.to(filters.dtype), right.to(filters.dtype)
