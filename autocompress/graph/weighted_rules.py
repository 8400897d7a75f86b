"""What becomes of channel identity in layers and norms, and in functions that are given weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from autocompress.graph.channels import Ids, Layout
from autocompress.graph.flow import PRODUCT, STATISTIC, Flow, NotUnderstood, title
from autocompress.graph.nodes import (
    CONVOLUTIONS,
    RECURRENT,
    TRANSPOSED_CONVOLUTIONS,
    Conv,
    arguments,
    is_depthwise,
    is_depthwise_call,
    is_layer,
    is_norm,
    module_of,
    name_of,
    normalized_axes,
    value_of,
)

Rule = Callable[[Flow, fx.Node], Layout]
AXES = re.compile(r"(\d)d")
"""In the name of an operator: how many axes behind that of the channels it slides along."""


def of_module(flow: Flow, node: fx.Node) -> Layout:
    """The layout of what a module makes. Raises NotUnderstood for one without a rule."""
    module = module_of(node, flow.module)
    rule = next((rule for types, rule in _MODULES if isinstance(module, types)), None)
    if rule is None or module is None:
        raise NotUnderstood
    layout = rule(flow, node)
    if str(node.target) in flow.shared and (is_layer(module) or is_norm(module)):
        for each in (layout, flow.known(node.all_input_nodes[0])):
            flow.freeze(each, f"{node.target} is used more than once")
    return layout


def of_attribute(flow: Flow, node: fx.Node) -> Layout:
    """Every axis of a parameter may have to follow channels; what is only an index may not."""
    value = value_of(node, flow.module)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return {}
    return flow.own_axes(node, value.shape)


def _new(flow: Flow, node: fx.Node) -> Layout:
    """What has one value throughout may follow as well, where its size is written down."""
    sizes = arguments(node)["size"]
    return flow.own_axes(node, [size if isinstance(size, int) else 1 for size in sizes])


def spatial(flow: Flow, node: fx.Node) -> Layout:
    """What slides over a map keeps its channels."""
    source, given = flow.only(node), next(each for each in node.all_input_nodes if "shape" in each.meta)
    slides = AXES.search(name_of(node) or type(module_of(node, flow.module)).__name__)
    several = node.meta.get("shapes", ())  # some tell where they have found what they give
    before, after = given.meta["shape"], several[0] if several else node.meta["shape"]
    if slides is None or len(after) != int(slides[1]) + 2 or after[1] != before[1]:
        raise NotUnderstood(f"{title(node)} slides over channels")
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{title(node)} slides along them")
    layout = {axis: ids for axis, ids in source.items() if axis == 1}
    if several:
        flow.parts[node.name] = [layout] * len(several)
    return {} if several else layout


def _conv(flow: Flow, node: fx.Node) -> Layout:
    conv, source = module_of(node, flow.module), flow.known(node.all_input_nodes[0])
    assert isinstance(conv, Conv)
    if node.all_input_nodes[0].meta["shape"][:1] != node.meta["shape"][:1] or len(node.meta["shape"]) != conv.weight.dim():
        raise NotUnderstood(f"{node.target} reads what is no batch")
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} slides along them")
    if is_depthwise(conv) and 1 in source:
        flow.channels.play(node.name, "depthwise", source[1])
        return {1: source[1]}
    target = flow.channels.fresh(conv.out_channels)
    if conv.groups > 1:
        _tie_groups(flow, source.get(1), target, conv.groups)
    _between(flow, node, source.get(1), target)
    return {1: target}


def _tie_groups(flow: Flow, source: Ids | None, target: Ids, groups: int) -> None:
    """What a group of filters reads and makes goes together: whole groups can be removed."""
    rows = target.reshape(groups, -1)
    flow.channels.unify(rows, rows[:, :1])
    if source is None:
        flow.channels.freeze(target, "its groups of filters read what cannot change")
    else:
        flow.channels.unify(source.reshape(groups, -1), rows[:, :1])


def _linear(flow: Flow, node: fx.Node) -> Layout:
    linear, source = module_of(node, flow.module), flow.known(node.all_input_nodes[0])
    assert isinstance(linear, nn.Linear)
    last = len(node.meta["shape"]) - 1
    target = flow.channels.fresh(linear.out_features)
    _between(flow, node, source.get(last), target)
    return {axis: ids for axis, ids in source.items() if axis != last} | {last: target}


def _between(flow: Flow, node: fx.Node, source: Ids | None, target: Ids) -> None:
    if source is not None:
        flow.channels.play(node.name, "in", source)
    flow.channels.play(node.name, "out", target)


def _batch_norm(flow: Flow, node: fx.Node) -> Layout:
    source = flow.known(node.all_input_nodes[0])
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} averages over them")
    if 1 in source:
        flow.channels.play(node.name, "norm", source[1])
    return {axis: ids for axis, ids in source.items() if axis == 1}


def _layer_norm(flow: Flow, node: fx.Node) -> Layout:
    """Normalises over what is left; scale and shift follow it."""
    source = flow.known(node.all_input_nodes[0])
    for axis in normalized_axes(node, flow.module):
        if axis in source:
            flow.channels.play(node.name, STATISTIC, source[axis])
    return source


def _rms_norm(flow: Flow, node: fx.Node) -> Layout:
    """Zhang & Sennrich 2019, arXiv 1910.07467."""
    given = arguments(node)
    source, weight = flow.known(given["input"]), given["weight"]
    for place, axis in enumerate(normalized_axes(node, flow.module)):
        if axis in source:
            flow.channels.play(node.name, STATISTIC, source[axis])
        if isinstance(weight, fx.Node):
            flow.follow(flow.known(weight).get(place), source.get(axis), title(node))
    return source


def _instance_norm(flow: Flow, node: fx.Node) -> Layout:
    """Each channel by itself (Ulyanov et al. 2016, arXiv 1607.08022)."""
    given = arguments(node)
    source = flow.known(given["input"])
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{title(node)} averages over them")
    held = [given[name] for name in ("weight", "bias", "running_mean", "running_var")]
    for value in held:
        if isinstance(value, fx.Node):
            flow.follow(flow.known(value).get(0), source.get(1), title(node))
    return {axis: ids for axis, ids in source.items() if axis == 1}


def _group_norm(flow: Flow, node: fx.Node) -> Layout:
    """What is normalised together goes together; where that is everything, as in a layer norm, what is left of it is normalised."""
    norm, source = module_of(node, flow.module), flow.known(node.all_input_nodes[0])
    assert isinstance(norm, nn.GroupNorm)
    if 1 in source and norm.num_groups == 1:
        flow.channels.play(node.name, STATISTIC, source[1])
    elif 1 in source:
        rows = source[1].reshape(norm.num_groups, -1)
        flow.channels.unify(rows, rows[:, :1])
        flow.channels.play(node.name, "norm", source[1])
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{node.target} averages over them")
    return {axis: ids for axis, ids in source.items() if axis == 1}


def _prelu(flow: Flow, node: fx.Node) -> Layout:
    source, weight = node.all_input_nodes
    layout, own = flow.known(source), flow.known(weight)
    if 0 in own and 1 in layout:
        flow.channels.unify(own[0], layout[1])
    elif 0 in own:
        raise NotUnderstood
    return layout


def _filter(flow: Flow, node: fx.Node) -> Layout:
    """A convolution as a function, transposed or not; where it filters each channel by itself, filters follow these."""
    given = arguments(node)
    weight, source = flow.known(given["weight"]), flow.known(given["input"])
    if len(node.meta["shape"]) != len(given["weight"].meta["shape"]):
        raise NotUnderstood(f"{title(node)} reads what is no batch")
    flow.freeze_axes(source, [axis for axis in source if axis != 1], f"{title(node)} slides along them")
    flow.freeze_axes(weight, [axis for axis in weight if axis > 1], f"{title(node)} has a kernel of this size")
    if is_depthwise_call(node):
        return _each_by_itself(flow, node)
    if given["groups"] != 1:
        raise NotUnderstood
    if name_of(node) in TRANSPOSED_CONVOLUTIONS:
        return _transposed_conv(flow, node)
    flow.contract(source.get(1), weight.get(1), node)
    return _made_of(flow, node, {}, 1)


def _functional_linear(flow: Flow, node: fx.Node) -> Layout:
    """A product with a weight that is computed."""
    given = arguments(node)
    weight, source = flow.known(given["weight"]), flow.known(given["input"])
    last = len(node.meta["shape"]) - 1
    if len(given["weight"].meta["shape"]) != 2:
        raise NotUnderstood
    flow.contract(source.get(last), weight.get(1), node)
    return _made_of(flow, node, {axis: ids for axis, ids in source.items() if axis != last}, last)


def _made_of(flow: Flow, node: fx.Node, layout: Layout, axis: int) -> Layout:
    """What a layer makes whose weight is a value: its rows are the channels along `axis`, and the bias follows them."""
    given = arguments(node)
    rows = flow.known(given["weight"]).get(0)
    if isinstance(given["bias"], fx.Node):
        flow.follow(flow.known(given["bias"]).get(0), rows, title(node))
    return layout if rows is None else {**layout, axis: rows}


def _each_by_itself(flow: Flow, node: fx.Node) -> Layout:
    """Filters and biases follow the channels that they are for."""
    given = arguments(node)
    channels = flow.known(given["input"]).get(1)
    for held in (given["weight"], given["bias"]):
        if isinstance(held, fx.Node):
            flow.follow(flow.known(held).get(0), channels, title(node))
    return {1: channels} if channels is not None else {}


def _transposed_conv(flow: Flow, node: fx.Node) -> Layout:
    """Its weight has the channels that it makes along the second axis."""
    given = arguments(node)
    weight, source = flow.known(given["weight"]), flow.known(given["input"])
    if given["weight"].op != "get_attr" or 1 not in weight:
        raise NotUnderstood
    flow.follow(weight.get(0), source.get(1), title(node))
    if 1 in source:
        flow.channels.play(node.name, PRODUCT, source[1])
    flow.channels.play(given["weight"].name, "out", weight[1])
    if isinstance(given["bias"], fx.Node):
        flow.follow(flow.known(given["bias"]).get(0), weight[1], title(node))
    return {1: weight[1]}


def _recurrent(flow: Flow, node: fx.Node) -> Layout:
    """Hidden units of all layers and directions go together, since one tensor holds their states."""
    given, name = arguments(node), title(node)
    states = given["hx"] if isinstance(given["hx"], (list, tuple)) else [given["hx"]]
    directions, of_one = 1 + given["bidirectional"], 4 if given["has_biases"] else 2
    weights = [flow.known(weight) for weight in given["params"]]
    if (
        len(given["input"].meta["shape"]) != 3
        or len(weights) != given["num_layers"] * directions * of_one
        or any(0 not in weight for weight in weights)
    ):
        raise NotUnderstood
    hidden, source = weights[1].get(1), flow.known(given["input"]).get(2)
    if hidden is None:
        raise NotUnderstood
    for first in range(0, len(weights), of_one):
        inward, own, *biases = weights[first : first + of_one]
        for weight in (inward, own, *biases):
            flow.channels.unify(weight[0], np.tile(hidden, RECURRENT[name]))
        flow.channels.unify(own[1], hidden)
        flow.follow(inward.get(1), source, name)
        flow.channels.play(given["params"][first].name, "out", inward[0])
        if (first // of_one + 1) % directions == 0:
            source = np.tile(hidden, directions)
    if 2 in flow.known(given["input"]):
        flow.channels.play(node.name, PRODUCT, flow.known(given["input"])[2])
    for state in states:
        flow.follow(flow.known(state).get(2), hidden, name)
    rows = [flow.known(given["input"]).get(axis) for axis in (0, 1)]
    flow.freeze({axis: ids for axis, ids in enumerate(rows) if ids is not None}, f"{name} runs along them")
    flow.parts[node.name] = [{2: np.tile(hidden, directions)}, *([{2: hidden}] * len(states))]
    return {}


def _embedding(flow: Flow, node: fx.Node) -> Layout:
    table = flow.known(arguments(node)["weight"])
    flow.freeze_axes(table, [0], f"{title(node)} looks them up")
    return {len(node.meta["shape"]) - 1: table[1]} if 1 in table else {}


def _index(flow: Flow, node: fx.Node) -> Layout:
    """Rows that are looked up in one axis by an index of any shape."""
    given = arguments(node)
    source, indices = given["self"], list(given["indices"])
    used = [axis for axis, index in enumerate(indices) if index is not None]
    if len(used) != 1 or any(flow.known(index) for index in indices) or indices[used[0]].meta["dtype"] is torch.bool:
        raise NotUnderstood
    (axis,) = used
    more = len(indices[axis].meta["shape"]) - 1
    layout = flow.known(source)
    flow.freeze_axes(layout, [axis], f"{title(node)} looks them up")
    return {other + more * (other > axis): ids for other, ids in layout.items() if other != axis}


_MODULES: tuple[tuple[Any, Rule], ...] = (
    (Conv, _conv), (nn.Linear, _linear), (nn.modules.batchnorm._BatchNorm, _batch_norm), (nn.LayerNorm, _layer_norm),
    (nn.GroupNorm, _group_norm), (nn.modules.dropout._DropoutNd, lambda flow, node: flow.only(node)), (nn.AdaptiveMaxPool2d, spatial),
)  # fmt: skip
WEIGHTED: dict[str, Rule] = {
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _new),
    **dict.fromkeys(RECURRENT, _recurrent), "prelu": _prelu, "rms_norm": _rms_norm, "instance_norm": _instance_norm,
    "embedding": _embedding, "index": _index,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS), _filter), "linear": _functional_linear,
}  # fmt: skip
"""Rules of functions that hold or are given what the network holds."""
