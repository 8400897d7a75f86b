"""New layers like a given one, with other numbers of channels and without values yet."""

from __future__ import annotations

from typing import cast

from torch import nn
from torch.nn.utils import skip_init

from autocompress.graph.nodes import Conv, Weighted


def unfilled(layer: Weighted, inputs: int, outputs: int, *, bias: bool, groups: int = 1) -> Weighted:
    """A layer that looks at its input as this one does, in as many channels as are said."""
    if isinstance(layer, nn.Linear):
        return cast(nn.Linear, skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=layer.weight.dtype))
    made: Conv = skip_init(
        type(layer), inputs, outputs, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        groups=groups, bias=bias, padding_mode=layer.padding_mode, dtype=layer.weight.dtype,
    )  # fmt: skip
    return made


def pointwise(layer: Weighted, inputs: int, outputs: int, *, bias: bool) -> Weighted:
    """A layer of the same kind that looks at one position."""
    if isinstance(layer, nn.Linear):
        return unfilled(layer, inputs, outputs, bias=bias)
    made: Conv = skip_init(type(layer), inputs, outputs, 1, bias=bias, dtype=layer.weight.dtype)
    return made
